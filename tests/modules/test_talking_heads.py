"""Talking heads: stored figures, what it reduces to, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import TalkingHeadsAttention
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "talking_heads.safetensors"
E, H, T = 24, 4, 11
HEADS = {"num_qk_heads": 3, "num_v_heads": 6}


def make(**options):
    torch.manual_seed(5)
    attn = TalkingHeadsAttention(E, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"chunk_size": 6}, {"chunk_size": 1}])
def test_stored_figures(options):
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config, single = (json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64"))
    assert not config["rope"]
    config = {key: value for key, value in config.items() if not key.startswith("rope")}
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = TalkingHeadsAttention(*sizes, rope=None, dtype=torch.float64, **config, **options)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    low = gradients(copy.deepcopy(attn).float(), t["input.x"].float(), t["input.w"].float())
    found = gradients(attn, t["input.x"], t["input.w"])
    assert (found["y"] - t["output.y"]).abs().max() < 1e-9
    for key, value in t.items():
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            assert (found[name] - value).abs().max() < 1e-9, key
            assert (low[name].double() - value).abs().max() < 10 * single[f"grad_{name}"], key


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 4}])
def test_identity_mixes_are_multi_head_attention(options):
    attn = TalkingHeadsAttention(E, H, dtype=torch.float64, **options)
    mha = attnzoo.MultiHeadAttention(E, H, bias=False, dtype=torch.float64, **options)
    mha.load_state_dict({k: v for k, v in attn.state_dict().items() if k not in ("logits_proj", "weights_proj")})
    x = sample()
    torch.testing.assert_close(attn(x), mha(x), atol=1e-13, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        attn.logits_proj.copy_(torch.eye(H)[order])
        attn.weights_proj.copy_(torch.eye(H)[order].T)
    torch.testing.assert_close(attn(x), mha(x), atol=1e-13, rtol=0)


def test_it_is_the_static_case_of_dcmha():
    attn = make()
    dynamic = attnzoo.DynamicallyComposableAttention(
        E, H, query_wise=False, key_wise=False, static_base=True, dtype=torch.float64
    )
    state = {k: v for k, v in attn.state_dict().items() if k not in ("logits_proj", "weights_proj")}
    one = torch.eye(H).double()
    state |= {"pre_base": (attn.logits_proj - one)[None], "post_base": (attn.weights_proj - one)[None]}
    dynamic.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(dynamic(x), attn(x), atol=1e-12, rtol=0)


def test_weights_that_sum_to_one_keep_constant_values():
    attn = make(bias=True, rope=None)
    with torch.no_grad():
        attn.weights_proj.div_(attn.weights_proj.sum(0, keepdim=True))
        attn.v_proj.weight.zero_()
    expected = attn.o_proj(attn.v_proj.bias).expand(2, T, E)
    torch.testing.assert_close(attn(sample()), expected, atol=1e-12, rtol=0)


def test_mixes_fold_where_heads_share_key_and_value():
    attn = make(rope=None)
    with torch.no_grad():
        for projection in (attn.k_proj, attn.v_proj):
            heads = projection.weight.view(H, -1, E)
            heads.copy_(heads[:1].expand_as(heads).clone())
    mqa = attnzoo.MultiQueryAttention(E, H, rope=None, dtype=torch.float64)
    D = E // H
    q = torch.einsum("mde,mh->hde", attn.q_proj.weight.view(H, D, E), attn.logits_proj)
    o = torch.einsum("ehd,nh->end", attn.o_proj.weight.view(E, H, D), attn.weights_proj)
    mqa.load_state_dict({
        "q_proj.weight": q.flatten(0, 1), "k_proj.weight": attn.k_proj.weight[:D],
        "v_proj.weight": attn.v_proj.weight[:D], "o_proj.weight": o.flatten(1),
    })  # fmt: skip
    x = sample()
    torch.testing.assert_close(attn(x), mqa(x), atol=1e-12, rtol=0)


def test_a_softmax_head_without_logits_is_uniform():
    attn = make(rope=None)
    with torch.no_grad():
        attn.logits_proj.zero_()
        attn.weights_proj.copy_(torch.eye(H))
    x = sample()
    mean = attn.v_proj(x).cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(attn(x), attn.o_proj(mean), atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [HEADS, {**HEADS, "head_dim": 5, "v_head_dim": 3, "rope": None, "bias": True}])
def test_numbers_of_heads_may_differ(options):
    attn, x = make(**options), sample()
    chunked = make(chunk_size=4, **options)
    torch.testing.assert_close(chunked(x), attn(x), atol=1e-12, rtol=0)
    cache = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split([3, 1, 7], 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-12, rtol=0)
    assert cache.nbytes == 2 * T * attn.cache_bytes_per_token(torch.float64)
    x = sample(3)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True)


@pytest.mark.slow
def test_chunks_compile_for_any_length():
    torch.compiler.reset()
    attn = make(chunk_size=5)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 9):
        x = sample(tokens)
        torch.testing.assert_close(compiled(x), attn(x), atol=1e-12, rtol=0)


def test_cross_attention_and_flops():
    attn = make(causal=False, kdim=9, rope=None, backend="eager", **HEADS)
    x, context = sample(), torch.randn(2, 5, 9).double()
    assert attn(x, context).shape == x.shape
    with FlopCounterMode(display=False) as counter:
        attn(x[:1], context[:1])
    assert attn.flops(T, 5) == counter.get_total_flops()
    with pytest.raises(ValueError, match="context must be given"):
        attn(x)


def test_pruned_heads_are_value_heads_with_output_zero():
    attn, x = make(**HEADS), sample()
    keep = torch.ones(6).double()
    keep[[1, 4]] = 0
    hook = attn.o_proj.register_forward_pre_hook(lambda _, i: (i[0] * keep.repeat_interleave(E // 6),))
    expected = attn(x)
    hook.remove()
    attn.prune_heads([1])
    attn.prune_heads([4])
    assert attn.pruned_heads == (1, 4)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_qk_heads": 5}, "num_qk_heads must divide embed_dim unless head_dim is given, got 5 and 24"),
        ({"num_v_heads": 7}, "num_v_heads must divide embed_dim unless v_head_dim is given, got 7 and 24"),
        (
            {"num_v_heads": 6, "mix_init": "identity"},
            "mix_init 'identity' needs equal numbers of heads, got 4, 4 and 6",
        ),
        ({"mix_init": "ones"}, "mix_init must be 'identity' or 'fan_in', got 'ones'"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"sliding_window": 2, "causal": False}, "sliding_window needs causal=True, got 2"),
        ({"kdim": 3}, "kdim needs causal=False, got kdim=3"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        TalkingHeadsAttention(E, H, **options)


def test_mixes_of_other_numbers_of_heads_start_as_truncated_normals():
    torch.manual_seed(0)
    attn = TalkingHeadsAttention(64, 64, num_qk_heads=16, num_v_heads=32)
    for mix, sources in ((attn.logits_proj, 16), (attn.weights_proj, 64)):
        scaled = mix.detach() * sources**0.5
        # The standard deviation of what is left of a normal between -2 and 2 is 0.88.
        assert 1.9 < scaled.abs().max() <= 2
        assert float(scaled.std()) == pytest.approx(0.88, abs=0.03)


@pytest.mark.parametrize("backend", ["sdpa", "flash", "triton"])
def test_other_backends_say_why_not(backend):
    operation = "qk_norm_rope" if backend == "triton" else "composed_attention"
    with pytest.raises(attnzoo.BackendUnavailable, match=f"backend '{backend}' cannot run {operation}: "):
        make(backend=backend)(sample())


def test_the_start_of_unequal_heads_is_a_truncated_normal():
    attn = TalkingHeadsAttention(768, 64, num_qk_heads=48, num_v_heads=96)
    assert attn.logits_proj.std().item() == pytest.approx(48**-0.5, rel=0.15)
    assert attn.logits_proj.abs().max() <= 2
    assert attn.no_weight_decay() == {"logits_proj", "weights_proj"}
