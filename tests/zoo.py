"""Every mechanism once, with the options that the contract tests run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import attnzoo

E, H, G = 32, 4, 2
Make = Callable[..., nn.Module]

# A new mechanism is one line here: a function of embed_dim and any common option.
MECHANISMS: dict[str, Make] = {
    "mha": lambda embed_dim=E, **options: attnzoo.MultiHeadAttention(embed_dim, H, **options),
    "mqa": lambda embed_dim=E, **options: attnzoo.MultiQueryAttention(embed_dim, H, **options),
    "gqa": lambda embed_dim=E, **options: attnzoo.GroupedQueryAttention(embed_dim, H, G, **options),
    "gta": lambda embed_dim=E, **options: attnzoo.GroupedTiedAttention(embed_dim, H, G, **options),
    "kha": lambda embed_dim=E, **options: attnzoo.KnockingHeadsAttention(embed_dim, H, G, **options),
    "kha-linear": lambda embed_dim=E, **options: attnzoo.KnockingHeadsAttention(
        embed_dim, H, G, variant="linear", **options
    ),
    "kha-gta": lambda embed_dim=E, **options: attnzoo.KnockingHeadsTiedAttention(embed_dim, H, G, **options),
    "kha-mla": lambda embed_dim=E, **options: attnzoo.KnockingHeadsLatentAttention(
        embed_dim, H, kv_lora_rank=20, **options
    ),
    "mla": lambda embed_dim=E, **options: attnzoo.MultiHeadLatentAttention(embed_dim, H, kv_lora_rank=20, **options),
    "mla-pre": lambda embed_dim=E, **options: attnzoo.MultiHeadLatentAttention(
        embed_dim, H, kv_lora_rank=20, rope_mode="pre", **options
    ),
    "dcmha": lambda embed_dim=E, **options: attnzoo.DynamicallyComposableAttention(
        embed_dim, H, G, chunk_size=5, **options
    ),
    "dcmha-folded": lambda embed_dim=E, **options: attnzoo.DynamicallyComposableAttention(
        embed_dim, H, G, head_groups=2, key_wise=False, static_base=True, **options
    ),
    "talking-heads": lambda embed_dim=E, **options: attnzoo.TalkingHeadsAttention(
        embed_dim, H, chunk_size=5, **options
    ),
    "eit": lambda embed_dim=E, **options: attnzoo.EnhancedMultiheadAttention(embed_dim, H, chunk_size=5, **options),
    "eit-efficient": lambda embed_dim=E, **options: attnzoo.EnhancedMultiheadAttention(
        embed_dim, H, efficient=True, interaction_bias=False, **options
    ),
    "complexformer": lambda embed_dim=E, **options: attnzoo.ComplexAttention(embed_dim, H, G, **options),
    "static-context": lambda embed_dim=E, **options: attnzoo.StaticContextAttention(
        embed_dim, H, G, **{"causal": True, "rope": attnzoo.Rotary(), "separate_static": False} | options
    ),
    "moh": lambda embed_dim=E, **options: attnzoo.MixtureOfHeadAttention(
        embed_dim, H, G, num_shared_heads=1, num_routed_active=2, **options
    ),
    "moh-few": lambda embed_dim=E, **options: attnzoo.MixtureOfHeadAttention(
        embed_dim, H, G, num_shared_heads=1, num_routed_active=1, gate_form="paper", **options
    ),
    "moh-norm": lambda embed_dim=E, **options: attnzoo.MixtureOfHeadAttention(
        embed_dim, H, G, router="query_norm", **options
    ),
    "moa": lambda embed_dim=E, **options: attnzoo.MixtureOfAttentionHeads(
        embed_dim, H, 2, num_experts=5, out_bias=True, **options
    ),
    "mhe": lambda embed_dim=E, **options: attnzoo.MultipleHeadEmbeddingAttention(embed_dim, H, **options),
    "mhe-add": lambda embed_dim=E, **options: attnzoo.MultipleHeadEmbeddingAttention(
        embed_dim, H, **{"mode": "add", "rope": attnzoo.Rotary()} | options
    ),
    "mgk": lambda embed_dim=E, **options: attnzoo.MixtureOfGaussianKeysAttention(
        embed_dim, H, G, **{"rope": attnzoo.Rotary()} | options
    ),
    "mgk-hard": lambda embed_dim=E, **options: attnzoo.MixtureOfGaussianKeysAttention(
        embed_dim, H, G, shared_key=True, assignment="hard", eps=1e-3, **options
    ),
    "mgk-linear": lambda embed_dim=E, **options: attnzoo.MixtureOfGaussianKeysAttention(
        embed_dim, H, G, shared_key=True, attention="linear", **options
    ),
    "smha": lambda embed_dim=E, **options: attnzoo.SelectiveMultiHeadAttention(
        embed_dim, H, **{"bias": False} | options
    ),
    "mae": lambda embed_dim=E, **options: attnzoo.MixtureOfAttentiveExperts(embed_dim, H, G, gate_hidden=12, **options),
    "mae-token": lambda embed_dim=E, **options: attnzoo.MixtureOfAttentiveExperts(
        embed_dim, H, G, gate_hidden=12, gate_input="token", num_active=2, **options
    ),
    "rcmha": lambda embed_dim=E, **options: attnzoo.RelativeConvAttention(
        embed_dim, H, max_distance=64, **{"chunk_size": 5, "dropout": 0.0} | options
    ),
    "gated": lambda embed_dim=E, **options: attnzoo.GatedAttention(embed_dim, H, G, **options),
    "gated-value": lambda embed_dim=E, **options: attnzoo.GatedAttention(
        embed_dim, H, G, gate="value", gate_type="headwise", gate_bias=True, **options
    ),
    "gated-key": lambda embed_dim=E, **options: attnzoo.GatedAttention(embed_dim, H, G, gate="key", **options),
    "gated-dense": lambda embed_dim=E, **options: attnzoo.GatedAttention(embed_dim, H, G, gate="dense", **options),
    "tpa": lambda embed_dim=E, bias=False, **options: attnzoo.TensorProductAttention(embed_dim, H, **options),
    "tpa-kv": lambda embed_dim=E, bias=False, **options: attnzoo.TensorProductAttention(
        embed_dim, H, 10, q_rank=None, k_rank=3, v_rank=2, v_head_dim=6, head_norm=True, **options
    ),
    "diff": lambda embed_dim=E, **options: attnzoo.DifferentialAttention(embed_dim, H, G, **{"depth": 2} | options),
    "diff-v2": lambda embed_dim=E, **options: attnzoo.DifferentialAttention(embed_dim, H, G, version=2, **options),
    "sigmoid": lambda embed_dim=E, **options: attnzoo.SigmoidAttention(embed_dim, H, G, chunk_size=5, **options),
    "sigmoid-learned": lambda embed_dim=E, **options: attnzoo.SigmoidAttention(
        embed_dim, H, G, logit_bias="learned", context_length=20, output_norm=True, **options
    ),
    "mta": lambda embed_dim=E, **options: attnzoo.MultiTokenAttention(
        embed_dim, H, G, pre_kernel=(3, 3), chunk_size=5, **{"depth": 2} | options
    ),
    "mta-full": lambda embed_dim=E, **options: attnzoo.MultiTokenAttention(
        embed_dim,
        H,
        G,
        pre_kernel=(2, 3),
        post_kernel=(3, 2),
        pre_head_group=4,
        post_head_group=2,
        key_alignment="left",
        head_norm=False,
        gate="headwise",
        **options,
    ),
    "selective": lambda embed_dim=E, **options: attnzoo.SelectiveAttention(
        embed_dim, H, G, selection_head=1, chunk_size=5, **options
    ),
    "forgetting": lambda embed_dim=E, bias=False, **options: attnzoo.ForgettingAttention(embed_dim, H, G, **options),
    "forgetting-pro": lambda embed_dim=E, bias=False, **options: attnzoo.ForgettingAttention(
        embed_dim, H, G, **{"pro": True, "rope": attnzoo.Rotary()} | options
    ),
    "forgetting-fixed": lambda embed_dim=E, bias=False, **options: attnzoo.ForgettingAttention(
        embed_dim, H, G, forget_gate="fixed", decay_times=(1, 8), output_gate="silu", **options
    ),
    "linear": lambda embed_dim=E, **options: attnzoo.LinearAttention(embed_dim, H, G, chunk_size=5, **options),
    "linear-lm": lambda embed_dim=E, **options: attnzoo.LinearAttention(
        embed_dim,
        H,
        G,
        **{
            "chunk_size": 5,
            "feature_map": "relu",
            "normalize": False,
            "output_norm": "rmsnorm",
            "gate": True,
            "rope": attnzoo.Rotary(),
        }
        | options,
    ),
    "mhla": lambda embed_dim=E, **options: attnzoo.MultiHeadLinearAttention(
        embed_dim, H, G, block_size=4, num_blocks=12, **options
    ),
    "mhla-heads": lambda embed_dim=E, causal=True, **options: attnzoo.MultiHeadLinearAttention(
        embed_dim,
        H,
        G,
        block_size=5,
        num_blocks=2 if causal else 3,
        extrapolation="clamp" if causal else "error",
        causal=causal,
        mixing_per_head=True,
        normalizer="mixed",
        feature_map="elu",
        output_norm="none",
        gate=False,
        **options,
    ),
}

# Options that change what attention sees or computes; each is run with each mechanism that takes it.
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "no-rope": {"rope": None},
    "qk-norm": {"qk_norm": True},
    "window": {"sliding_window": 5},
    "window-sinks": {"sliding_window": 5, "sink_tokens": 2},
    "zero-sink": {"sink": "zero"},
    "learned-sink": {"sink": "learned"},
    "softcap": {"logit_softcap": 3.0},
    "alibi": {"alibi": True, "rope": None},
}

# What a mechanism takes of these, where it is not everything.
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gta", "kha-gta"), tuple(option for option in OPTIONS if option not in ("qk-norm", "alibi"))),
    **dict.fromkeys(("kha-mla", "mla"), ("plain", "no-rope")),
    "mla-pre": ("plain",),
    **dict.fromkeys(("dcmha", "dcmha-folded"), ("plain", "no-rope", "qk-norm", "window")),
    "static-context": ("plain", "no-rope", "qk-norm"),
    "complexformer": tuple(option for option in OPTIONS if option not in ("qk-norm", "alibi")),
    **dict.fromkeys(("moh", "moh-few", "moh-norm", "moa"), ("plain", "no-rope")),
    **dict.fromkeys(("talking-heads", "eit", "eit-efficient"), ("plain", "no-rope", "window")),
    "mhe": tuple(option for option in OPTIONS if option != "qk-norm"),
    "mhe-add": ("plain", "window", "window-sinks"),
    **dict.fromkeys(("mgk", "smha"), ("plain", "no-rope")),
    **dict.fromkeys(("mgk-hard", "mgk-linear"), ("plain",)),
    **dict.fromkeys(("forgetting", "forgetting-pro", "forgetting-fixed"), ("plain", "no-rope", "qk-norm", "window")),
    **dict.fromkeys(("diff", "diff-v2"), ("plain", "no-rope", "qk-norm", "window", "softcap")),
    # They take everything; what is no different from the output gate is left out.
    **dict.fromkeys(("gated-key", "gated-dense"), ("plain", "qk-norm")),
    **dict.fromkeys(("rcmha", "linear"), ("plain",)),
    # A window leaves the cache as it is; their own tests have it.
    "selective": ("plain", "no-rope", "qk-norm"),
    **dict.fromkeys(("mta", "mta-full"), ("plain", "no-rope")),
    "sigmoid": tuple(option for option in OPTIONS if "sink" not in option),
    "sigmoid-learned": ("plain", "window"),
    **dict.fromkeys(("tpa", "tpa-kv"), ("plain", "no-rope", "window")),
    **dict.fromkeys(("linear-lm", "mhla", "mhla-heads"), ("plain", "no-rope")),
}
REFUSED = [
    (name, option)
    for name in TAKES
    for option in OPTIONS
    if option not in TAKES[name]
    and not (name.startswith(("linear", "mhla")) and option in ("no-rope", "qk-norm"))
    and name not in ("gated-key", "gated-dense", "sigmoid-learned")
    and not (name in ("mta", "mta-full", "selective") and option == "window")
    and not (name in ("mhe-add", "mgk", "mgk-hard", "mgk-linear") and option in ("no-rope", "alibi"))
]
"""Options that a mechanism's constructor refuses."""

# What a mechanism cannot do, by the words that `cases` and `names` take; its own page and tests say why.
LACKS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("kha-mla", "mla", "mla-pre", "mhe", "mhe-add"), ("head order by rows",)),
    **dict.fromkeys(("dcmha", "talking-heads"), ("head order by rows", "sdpa", "bidirectional window")),
    **dict.fromkeys(("eit", "eit-efficient"), ("head order by rows", "sdpa", "rounding of its own")),
    **dict.fromkeys(("moh", "moh-few", "moh-norm"), ("head order by rows", "padding as a mask", "pruning as a mask")),
    "static-context": ("context",),
    "moa": (
        "head order by rows",
        "counted flops",
        "padding as a mask",
        "pruning as a mask",
        "rounding of its own",
    ),
    "dcmha-folded": ("head order by rows", "bidirectional window"),
    "mgk": ("head order by rows",),
    "mae": ("head order by rows", "padding as a mask", "token cache"),
    "mae-token": ("head order by rows", "counted flops"),
    "diff": ("unnormed heads",),
    "forgetting": ("bidirectional", "context", "counted flops"),
    "forgetting-fixed": ("bidirectional", "context", "counted flops", "head order by rows"),
    "forgetting-pro": (
        "bidirectional",
        "context",
        "counted flops",
        "padded prompt",
        "token cache",
        "unnormed heads",
    ),
    "gated-value": ("head order by rows", "rounding of its own"),
    **dict.fromkeys(("gated-key", "gated-dense"), ("head order by rows",)),
    "smha": ("head order by rows", "context", "padding as a mask", "pruning as a mask"),
    "rcmha": (
        "head order by rows",
        "context",
        "padded prompt",
        "rotation",
        "rounding of its own",
        "sdpa",
        "token cache",
    ),
    "sigmoid": ("sdpa", "rounding of its own"),
    "sigmoid-learned": ("head order by rows", "sdpa", "rounding of its own", "unnormed heads", "pruning as a mask"),
    **dict.fromkeys(
        ("mta", "mta-full"),
        (
            "head order by rows",
            "bidirectional",
            "context",
            "counted flops",
            "masks of earlier queries",
            "padded prompt",
            "pruning as a mask",
            "rounding of its own",
            "sdpa",
            "token cache",
            "unnormed heads",
        ),
    ),
    "selective": (
        "head order by rows",
        "bidirectional",
        "context",
        "counted flops",
        "padding as a mask",
        "pruning as a mask",
        "sdpa",
    ),
    "tpa": ("head order by rows", "circuits"),
    "tpa-kv": ("head order by rows", "circuits", "unnormed heads"),
    "mgk-hard": ("head order by rows", "sdpa"),
    "mgk-linear": ("head order by rows", "dense mask", "counted flops", "sdpa", "token cache"),
    **dict.fromkeys(("linear", "linear-lm"), ("dense mask", "counted flops", "sdpa", "token cache")),
    **dict.fromkeys(("mhla", "mhla-heads"), ("dense mask", "counted flops", "sdpa", "token cache", "context")),
}


def names(*needs: str) -> list[str]:
    """Mechanisms that can do all of that."""
    return [name for name in MECHANISMS if not set(needs) & set(LACKS.get(name, ()))]


def cases(*needs: str) -> list[tuple[str, str]]:
    """Those mechanisms with every option that they take."""
    return [(name, option) for name in names(*needs) for option in TAKES.get(name, tuple(OPTIONS))]


def directed(found: list[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """Each of these cases causal, and not causal where the mechanism takes that."""
    windowed = [option for option, values in OPTIONS.items() if "sliding_window" in values]
    either, both = names("bidirectional"), names("bidirectional", "bidirectional window")
    return [
        (name, option, causal)
        for name, option in found
        for causal in (True, False)
        if causal or name in both or (name in either and option not in windowed)
    ]


def build(name: str, *, dtype: torch.dtype = torch.float64, perturbed: bool = True, **options: object) -> nn.Module:
    """The mechanism, its parameters moved off their start so that identity and zero starts hide nothing."""
    module = MECHANISMS[name](**options).to(dtype)
    if perturbed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(dtype))
    return module


def gradients(module: nn.Module, x: Tensor, weight: Tensor, **call: object) -> dict[str, Tensor]:
    """Output, and the gradient of (y * weight).sum() for x and every parameter."""
    x = x.detach().clone().requires_grad_()
    y = module(x, **call)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * weight).sum(), [x, *named.values()])
    return {"y": y.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


@contextmanager
def exact_numbers() -> Iterator[None]:
    """Deterministic algorithms only."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
