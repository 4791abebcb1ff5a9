"""Any sizes and options that a mechanism takes: its fast form against its eager one, with gradients, and decoding.

`pytest -m slow tests/test_fuzz.py` draws 2,000 examples of each.
"""

import copy
import inspect
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo import AttentionMask, Rotary
from attnzoo.modules.base import Mechanism

# Encoders' layers and layers around others have calls of their own.
CLASSES = {
    name: value
    for name, value in vars(attnzoo).items()
    if inspect.isclass(value)
    and issubclass(value, Mechanism)
    and name not in ("TABAttention", "ClusteredHeadAttention")
}
SWITCH = (False, True)
VALUES = {
    **dict.fromkeys(
        ("bias", "o_bias", "out_bias", "causal", "alibi", "kv_norm", "kv_b_bias", "q_bias", "pro", "k_shift", "v_shift",
         "normalize", "sum_norm", "mixing_per_head", "shared_key", "pre_compose", "post_compose", "query_wise",
         "key_wise", "static_base", "efficient", "interaction_bias", "head_norm", "conv_query_memory", "protect_first",
         "head_out_bias", "separate_static", "feature_norm"), SWITCH,
    ),
    "qk_norm": (False, True, "joint"),
    "qk_norm_eps": (None, 1e-2),
    "scale": (0.7, -0.4),
    "logit_softcap": (2.5,),
    "sink": ("zero", "learned"),
    "sliding_window": (1, 2, 4, 9),
    "sink_tokens": (1, 3),
    "v_head_dim": (3, 6),
    "chunk_size": (3, 5),
    "variant": ("linear", "linear_v", "mlp", "mlp_qkv"),
    "knock_scope": ("tied", "value"),
    "rope_mode": ("pre",),
    "q_lora_rank": (7,),
    "kv_lora_rank": (9, 12),
    "qk_nope_head_dim": (4,),
    "absorb": SWITCH,
    "forget_gate": (None, "bias"),
    "output_gate": ("sigmoid", "silu"),
    "feature_map": ("elu", "relu"),
    "feature_eps": (1e-2,),
    "normalizer": ("mixed",),
    "mixing_norm": ("row", "col"),
    "router": ("query_norm",),
    "gate_form": ("paper",),
    "ste": ("active", "none"),
    "sparse": (False,),
    "num_shared_heads": (0, 1),
    "num_routed_active": (1, 2),
    "num_experts": (5,),
    "num_experts_per_tok": (1, 2),
    "num_active": (1, 2),
    "gate_input": ("token",),
    "gate_hidden": (5,),
    "num_mixtures": (3,),
    "assignment": ("hard",),
    "rank": (1,),
    "head_groups": (2, 3),
    "dyn_hidden_dim": (5,),
    "isi_hidden": (3,),
    "csi_hidden": (3,),
    "num_qk_heads": (2, 3),
    "num_v_heads": (2, 3),
    "mode": ("add",),
    "version": (2,),
    "depth": (0, 2),
    "lambda_init": (0.3,),
    "pre_kernel": (None, (2, 3), (3, 3)),
    "post_kernel": ((2, 3),),
    "pre_head_group": (2,),
    "post_head_group": (None, 2),
    "key_alignment": ("left",),
    "kernel_size": (2, 3),
    "selection_head": (0, 1),
    "rope_positions": ("selected",),
    "packed": (False,),
    "logit_bias": (-1.0, 0.0),
    "q_rank": (None, 3),
    "k_rank": (2, 3),
    "v_rank": (1, 2),
    "softmax_scale": (0.8,),
    "gate_type": ("headwise",),
}  # fmt: skip
"""What options of these names are drawn from, besides their defaults."""

OWN = {
    "GatedAttention": {"gate": ("value", "key", "query", "dense"), "gate_bias": SWITCH},
    "LinearAttention": {"gate": SWITCH, "output_norm": ("none", "rmsnorm"), "qk_norm": SWITCH},
    "MultiHeadLinearAttention": {
        "gate": SWITCH, "output_norm": ("none", "rmsnorm"), "qk_norm": SWITCH, "block_size": (4, 7),
        "num_blocks": (4, 5),
    },
    "MultiTokenAttention": {"gate": ("headwise", "elementwise")},
    "ForgettingAttention": {"output_norm": SWITCH, "qk_norm": (True, "shared")},
    "SigmoidAttention": {"output_norm": SWITCH},
    "MixtureOfAttentionHeads": {"out_bias": SWITCH},
    "RelativeConvAttention": {"dropout": (0.0,), "max_distance": (32,)},
}  # fmt: skip
"""The same for one mechanism."""

SCORES = ("qk_norm", "scale", "logit_softcap", "alibi", "sliding_window", "sink", "sink_tokens")
REFUSED = {
    "GroupedTiedAttention": ("qk_norm", "v_head_dim"),
    "KnockingHeadsTiedAttention": ("qk_norm", "v_head_dim"),
    "MixtureOfGaussianKeysAttention": SCORES,
    "SelectiveMultiHeadAttention": SCORES,
    "SelectiveAttention": ("sink", "sink_tokens", "logit_softcap", "alibi"),
    "SigmoidAttention": ("sink", "sink_tokens"),
    "ComplexAttention": ("qk_norm", "scale", "alibi"),
    "MultipleHeadEmbeddingAttention": ("qk_norm",),
}
"""What a mechanism has no use for, as other tests hold."""

ALWAYS = {
    "MultiHeadLinearAttention": ("block_size", "num_blocks"),
    "RelativeConvAttention": ("dropout", "max_distance"),
}
WITHOUT_HEAD_DIM = ("MultiHeadLatentAttention", "KnockingHeadsLatentAttention")
WITHOUT_GROUPS = ("MultiHeadAttention", "MultiQueryAttention", "MultipleHeadEmbeddingAttention")


def options_of(name):
    """The options of a constructor, those that it hands to its bases included."""
    found = {}
    for base in CLASSES[name].__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: None for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in found}
            if all(p.kind != p.VAR_KEYWORD for p in parameters):
                break
    return list(found)


@st.composite
def rotaries(draw):
    return Rotary(
        theta=draw(st.sampled_from([10000.0, 50.0])),
        style=draw(st.sampled_from(["half", "interleaved"])),
        dim=draw(st.sampled_from([None, 2])),
        scaling=draw(st.sampled_from([None, {"rope_type": "linear", "factor": 3.0}])),
    )


@st.composite
def modules(draw, name):
    """A module of that mechanism with odd sizes and a random choice of the options it has."""
    names = [option for option in options_of(name) if option not in REFUSED.get(name, ())]
    values = VALUES | OWN.get(name, {})
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    embed_dim, head_dim = draw(st.sampled_from([8, 12, 15, 24])), draw(st.integers(1, 5)) * 2
    options = {}
    if "head_dim" in names and name not in WITHOUT_HEAD_DIM:
        options["head_dim"] = head_dim
    if "num_kv_heads" in names and name not in WITHOUT_GROUPS:
        options["num_kv_heads"] = draw(st.sampled_from([groups, groups * per_group]))
    for option in names:
        if option in values:
            left = () if option in ALWAYS.get(name, ()) else (..., ..., ...)
            value = draw(st.sampled_from([*left, *values[option]]))
            options |= {} if value is ... else {option: value}
    if "rope" in names:
        rope = draw(st.one_of(st.just(...), st.none(), rotaries()))
        options |= {} if rope is ... else {"rope": rope}
    torch.manual_seed(draw(st.integers(0, 2**20)))
    try:
        attn = CLASSES[name](embed_dim, groups * per_group, **options, dtype=torch.float64)
    except ValueError:
        # Options that do not go together are refused, which other tests hold.
        assume(False)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return attn


@st.composite
def masks(draw, B, T):
    mask = None
    if draw(st.booleans()):
        mask = AttentionMask.padding(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, B * T), max_size=3)))
        packed = AttentionMask.packed([0, *cuts, B * T])
        mask = packed if mask is None else mask & packed
    if draw(st.booleans()):
        keep = torch.rand(T, T, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) > 0.3
        mask = AttentionMask.dense(keep) if mask is None else mask & keep
    return mask


def gradients(attn, x, weight, mask):
    """The output, and gradients of all that it may depend on."""
    x = x.clone().requires_grad_()
    y = attn(x, mask=mask)
    wanted = {"x": x, **dict(attn.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), list(wanted.values()), materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def assert_fast_form(data, name):
    """Outputs and gradients of "auto" and "eager" agree, and decoding equals the full forward."""
    attn = data.draw(modules(name))
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 13))
    mask = data.draw(masks(B, T))
    x = torch.randn(B, T, attn.embed_dim).double()
    weight = torch.randn_like(x)
    eager = copy.deepcopy(attn)
    eager.backend = "eager"
    try:
        expected = gradients(eager, x, weight, mask)
    except ValueError as refused:
        with pytest.raises(ValueError, match=re.escape(str(refused))):
            attn(x, mask=mask)
        return
    for what, found in gradients(attn, x, weight, mask).items():
        assert expected[what].isfinite().all()
        torch.testing.assert_close(found, expected[what], atol=1e-9, rtol=1e-9, msg=lambda m, w=what: f"{w}: {m}")
    if not attn.causal:
        return
    expected, cache, start = eager(x), attn.init_cache(B, T), 0
    while start < T:
        size = data.draw(st.integers(1, T - start))
        y = attn(x[:, start : start + size], cache=cache)
        torch.testing.assert_close(y, expected[:, start : start + size], atol=1e-9, rtol=1e-9)
        start += size


HEALTH = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.filterwarnings("ignore:.*compresses nothing")
@pytest.mark.filterwarnings("ignore:linear attention without normalize")
@pytest.mark.parametrize("name", CLASSES)
def test_fast_form_and_decoding(name):
    settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=HEALTH)(
        given(st.data())(lambda data: assert_fast_form(data, name))
    )()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*compresses nothing")
@pytest.mark.filterwarnings("ignore:linear attention without normalize")
@pytest.mark.parametrize("name", CLASSES)
def test_fast_form_and_decoding_widely(name):
    settings(max_examples=2000, deadline=None, suppress_health_check=HEALTH)(
        given(st.data())(lambda data: assert_fast_form(data, name))
    )()
