"""Unusual but valid calls, drawn over the options of all mechanisms, against the definition in float64.

A draw is a module with odd sizes and a random choice of its options, and a call with a mask, positions, a context or a
cache. `pytest -m slow tests/test_sweep.py` draws 400.
"""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import AttentionMask, Rotary
from tests.zoo import gradients

E = 24
SIZES = ((4, 2), (4, 4), (4, 1), (6, 3), (3, 3), (6, 2), (1, 1))
ROPES = (None, Rotary(), Rotary(style="interleaved"), Rotary(dim=2))
SWITCH = (False, True)
SOFTMAX: dict[str, tuple[Any, ...]] = {
    "v_head_dim": (None, 5), "bias": SWITCH, "o_bias": (None, True, False), "qk_norm": (False, True, "joint"),
    "rope": ROPES, "scale": (None, 0.7, -0.4), "logit_softcap": (None, 2.5), "alibi": SWITCH,
    "sliding_window": (None, None, 1, 3, 6), "sink_tokens": (0, 0, 2), "sink": (None, None, "zero", "learned"),
}  # fmt: skip
COMPOSED: dict[str, tuple[Any, ...]] = {
    "bias": SWITCH, "rope": ROPES, "sliding_window": (None, 3), "chunk_size": (2, 5, None)
}  # fmt: skip


def softmax(*without: str, **more: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The options of softmax attention but some, and more."""
    return {name: values for name, values in SOFTMAX.items() if name not in without} | more


# Values that options are drawn from; what fits no other option is drawn again.
POOLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "GroupedQueryAttention": SOFTMAX,
    "MultiHeadAttention": SOFTMAX,
    "MultiQueryAttention": SOFTMAX,
    "GroupedTiedAttention": softmax("v_head_dim", "qk_norm", "alibi", k_rope_bias=(None, True), rope=ROPES[:3]),
    "KnockingHeadsAttention": softmax(variant=("auto", "linear", "linear_v", "mlp_qkv")),
    "KnockingHeadsLatentAttention": {"variant": ("auto", "linear"), "rope": (None, Rotary(style="interleaved"))},
    "MultiHeadLatentAttention": {
        "kv_lora_rank": (10,), "q_lora_rank": (None, 7), "qk_rope_head_dim": (None, 4), "v_head_dim": (None, 3),
        "rope_mode": ("decoupled", "pre"), "rope": ROPES[:3], "kv_norm": SWITCH, "kv_b_bias": SWITCH,
        "q_bias": SWITCH, "bias": SWITCH, "scale": (None, 0.4), "absorb": ("auto", True, False),
    },
    "MixtureOfHeadAttention": {
        "num_shared_heads": (None, 1, 2), "num_routed_active": (None, 1, 2), "router": ("two_stage", "query_norm"),
        "gate_form": (None, "paper"), "v_head_dim": (None, 5), "bias": SWITCH, "rope": ROPES,
    },
    "MixtureOfAttentionHeads": {
        "num_experts": (5,), "num_experts_per_tok": (None, 1, 2), "v_head_dim": (None, 5), "bias": SWITCH,
        "out_bias": SWITCH, "gate_mode": ("topk_softmax", "softmax_topk", "softmax_topk_norm"), "rope": ROPES,
    },
    "DynamicallyComposableAttention": COMPOSED | {
        "rank": (1, 2), "head_groups": (1, 1, 2), "dyn_hidden_dim": (None, 8), "pre_compose": SWITCH,
        "post_compose": SWITCH, "query_wise": SWITCH, "key_wise": SWITCH, "static_base": SWITCH,
        "dyn_act": ("gelu", "gelu_tanh"), "qk_norm": SWITCH,
    },
    "TalkingHeadsAttention": COMPOSED | {
        "num_qk_heads": (None, 2, 5), "num_v_heads": (None, 3), "v_head_dim": (None, 5),
    },
    "EnhancedMultiheadAttention": COMPOSED | {
        "isi_hidden": (None, 3), "csi_hidden": (None, 7), "efficient": SWITCH, "interaction_bias": SWITCH,
        "init": ("default", "mha"),
    },
    "ComplexAttention": softmax("scale", "qk_norm", "alibi", softmax_scale=(1.0, 0.5)),
    "MultipleHeadEmbeddingAttention": softmax("qk_norm", mode=("mul", "add")),
    "MixtureOfGaussianKeysAttention": {
        "v_head_dim": (None, 5), "bias": SWITCH, "o_bias": (None, True, False), "num_mixtures": (1, 2, 3),
        "shared_key": SWITCH, "assignment": ("learned", "soft", "hard"), "prior": ("head", "position", "global"),
        "max_positions": (None, 40), "eps": (0.0, 1e-3), "attention": ("softmax", "softmax", "linear"),
        "feature_norm": SWITCH, "rope": (None, None, Rotary(), Rotary(dim=2)),
    },
    "SelectiveMultiHeadAttention": {
        "num_active": (None, 1, 2), "gate_mode": ("normalized", "softmax"),
        "rope_positions": ("original", "rank"), "head_out_bias": SWITCH, "bias": SWITCH, "rope": ROPES,
        "v_head_dim": (None, 5),
    },
    "MixtureOfAttentiveExperts": softmax(
        num_active=(None, 1, 2), gate_input=(None, "token", "causal_mean", "mean"), gate_hidden=(9,)
    ),
    "RelativeConvAttention": {
        "kernel_size": (1, 2, 3), "max_distance": (40,), "bias": SWITCH, "dropout": (0.0,), "chunk_size": (2, 5, None),
    },
    "GatedAttention": softmax(
        gate=("output", "value", "key", "query", "dense"), gate_type=("elementwise", "headwise"),
        gate_bias=(None, True, False),
    ),
    "TensorProductAttention": {
        "q_rank": (None, 1, 3), "k_rank": (1, 2), "v_rank": (1, 3), "v_head_dim": (None, 5), "head_norm": SWITCH,
        "rope": ROPES, "scale": (None, 0.5), "sliding_window": (None, 3),
    },
    "DifferentialAttention": {
        "version": (1, 2), "depth": (0, 3), "lambda_init": (None, 0.3), "bias": SWITCH, "o_bias": (None, True),
        "qk_norm": SWITCH, "rope": ROPES, "scale": (None, 0.5), "logit_softcap": (None, 2.0),
        "sliding_window": (None, 3),
    },
    "SigmoidAttention": softmax(
        "sink", "sink_tokens", logit_bias=("visible", "learned", -1.5), context_length=(None, 9),
        output_norm=SWITCH, chunk_size=(2, 5, None),
    ),
    "MultiTokenAttention": COMPOSED | {
        "pre_kernel": (None, (3, 3), (2, 5), (1, 1)), "post_kernel": (None, (2, 3)), "pre_head_group": (None, 1, 2),
        "post_head_group": (None, 2, 1), "key_alignment": ("both", "left", "right"), "head_norm": SWITCH,
        "depth": (None, 2), "gate": (None, "headwise", "elementwise"), "scale": (None, 0.5),
    },
    "SelectiveAttention": softmax(
        "sink", "sink_tokens", "alibi", "logit_softcap", selection_head=(0, 0, 1), protect_first=SWITCH,
        prune_threshold=(None, 0.5), chunk_size=(2, 5, None),
    ),
    "ForgettingAttention": {
        "v_head_dim": (None, 5), "forget_gate": ("data", "bias", "fixed", None), "decay_times": (None, (1, 8)),
        "k_shift": SWITCH, "v_shift": SWITCH, "qk_norm": (False, True, "shared"), "output_norm": SWITCH,
        "output_gate": (None, "sigmoid", "silu"), "rope": ROPES, "scale": (None, 0.5, -0.5),
        "sliding_window": (None, 3), "prune_tolerance": (None, -30.0),
    },
    "LinearAttention": {
        "v_head_dim": (None, 5), "bias": SWITCH, "out_bias": (None, True), "feature_eps": (0.0, 0.1),
        "feature_map": ("elu", "hedgehog", "dpfp"), "normalize": SWITCH, "qk_norm": SWITCH, "sum_norm": SWITCH,
        "output_norm": ("none", "rmsnorm"), "gate": SWITCH, "rope": (None, None, *ROPES[1:3]),
        "chunk_size": (2, 5, 64), "scale": (None, 0.5),
    },
    "MultiHeadLinearAttention": {
        "v_head_dim": (None, 5), "bias": SWITCH, "block_size": (3, 4), "num_blocks": (6,), "feature_eps": (0.1,),
        "feature_map": ("elu",), "qk_norm": SWITCH, "normalizer": ("none", "mixed"),
        "output_norm": ("none", "rmsnorm"), "gate": SWITCH, "rope": ROPES[:3], "mixing_per_head": SWITCH,
        "mixing_init": ("uniform", "linear", "exp", "local"), "extrapolation": ("error", "clamp", "window"),
    },
    "StaticContextAttention": {
        # A context leaves some of the static projections unused.
        "separate_static": (False,), "bias": SWITCH, "qk_norm": SWITCH, "rope": ROPES, "scale": (None, 0.5),
    },
}  # fmt: skip
ALWAYS = {"kv_lora_rank", "num_experts", "max_distance", "dropout", "num_blocks", "feature_eps", "separate_static"}
"""Options without which a pool makes no module, or one whose figures are not comparable."""
CAUSAL = ("MultiTokenAttention", "SelectiveAttention", "ForgettingAttention")
NO_CONTEXT = (*CAUSAL, "SelectiveMultiHeadAttention", "RelativeConvAttention", "MultiHeadLinearAttention")


@dataclass
class Draw:
    """A module and a call."""

    module: nn.Module
    x: Tensor
    context: Tensor | None
    call: dict[str, Any]
    kind: str
    words: str

    def run(self, module: nn.Module, x: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        x, context = self.x if x is None else x, self.context
        y: Tensor = module(x[rows], None if context is None else context[rows].to(x.dtype), **self.call)
        return y


def drawn_module(draw: random.Random, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A module with options that fit each other, in float64, its parameters moved off their start."""
    cls, pool = getattr(attnzoo, name), POOLS[name]
    while True:
        H, G = draw.choice(SIZES)
        options = {option: draw.choice(values) for option, values in pool.items() if draw.random() < 0.6}
        options |= {option: draw.choice(pool[option]) for option in ALWAYS & pool.keys()}
        options |= {"causal": name in CAUSAL or draw.random() < 0.6, "num_kv_heads": G, "head_dim": draw.choice((4, 6))}
        torch.manual_seed(draw.randrange(2**20))
        for _ in range(3):
            try:
                with warnings.catch_warnings(action="ignore"):
                    module = cls(E, H, dtype=torch.float64, **options)
            except TypeError as error:
                # Not every mechanism has these two.
                del options[next(option for option in ("num_kv_heads", "head_dim") if option in str(error))]
            except ValueError:
                break
            else:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(0.25 * torch.randn_like(parameter))
                return module, options


def drawn_mask(draw: random.Random, name: str, kind: str, module: nn.Module, B: int, T: int, S: int) -> Any:
    """A mask of that kind, or None."""
    generator = torch.Generator().manual_seed(draw.randrange(2**20))
    lengths = torch.randint(0, S + 1, (B,), generator=generator)
    mask = None
    if kind in ("padding", "padding and dense"):
        mask = AttentionMask.padding(lengths)
    elif kind in ("packed", "packed and dense"):
        mask = AttentionMask.packed([0, *sorted(draw.choices(range(B * T + 1), k=3)), B * T])
    elif kind == "left":
        real = torch.arange(T)[None] >= T - lengths[:, None]
        return AttentionMask(dense_mask=real[:, None, None], real_queries=real)
    shape = {"heads": (1, module.score_heads, T, S), "keys": (B, 1, 1, S)}.get(kind, (T, S))
    if kind in ("heads", "keys") or kind.endswith("dense"):
        keep = torch.rand(shape, generator=generator) < 0.7
        mask = AttentionMask.dense(keep) if mask is None else mask & keep
    return mask


def drawn(seed: int) -> Draw:
    """The draw of a seed; the mechanisms come in turn."""
    draw, name = random.Random(seed), list(POOLS)[seed % len(POOLS)]
    module, options = drawn_module(draw, name)
    B, T = draw.choice((0, 1, 2, 3)), draw.choice((1, 2, 3, 7, 13))
    crosses = not options["causal"] and name not in NO_CONTEXT and draw.random() < 0.4
    S = draw.choice((0, 1, 5, 9)) if crosses else T
    x, context = torch.randn(B, T, E).double(), torch.randn(B, S, E).double() if crosses else None
    call: dict[str, Any] = {}
    by_rank = options.get("rope_positions") == "rank"
    if getattr(module, "rope", None) is not None and not by_rank and (crosses or draw.random() < 0.3):
        at = torch.randint(0, 20, draw.choice(((B, T), (T,))))
        call["positions"] = (at, torch.randint(0, 20, (S,))) if crosses else at
    kinds = ["none", "none", "padding", "dense", "heads", "keys", "padding and dense"]
    kinds += [] if crosses else ["packed", "packed and dense", "left"]
    if not getattr(module, "has_patterns", True):
        kinds = ["none", "padding"] + ([] if crosses else ["packed"])
    if name == "StaticContextAttention" and crosses:
        kinds = ["none", "dense"]
    kind, keys = draw.choice(kinds), T + S if name == "StaticContextAttention" and crosses else S
    mask = drawn_mask(draw, name, kind, module, B, T, keys)
    call |= {} if mask is None else {"mask": mask}
    words = f"seed {seed}: {name}, {options}, B {B}, T {T}, S {S}, mask {kind}, context {crosses}, {list(call)}"
    module.train(draw.random() < 0.5 and options.get("assignment") != "soft")
    return Draw(module, x, context, call, kind, words)


def definition(module: nn.Module) -> nn.Module:
    """A copy that computes by the definition, all queries at once."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, value in (("backend", "eager"), ("chunk_size", 10**6), ("sparse", False), ("prune_tolerance", None)):
            if hasattr(part, name) and not (name == "chunk_size" and isinstance(part, attnzoo.LinearAttention)):
                setattr(part, name, value)
    return module


LAYOUTS = (
    lambda x: x,
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.stack([x, -x], dim=-1)[..., 0],
)  # fmt: skip


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=lambda words: f"{what}: {words}")


def check_gradients(case: Draw, draw: random.Random) -> None:
    """The fast form of any layout, with any parameters frozen, has the output and the gradients of the definition."""
    weight = torch.randn_like(case.x)
    call = dict(case.call) if case.context is None else {**case.call, "context": case.context}
    expected = gradients(definition(case.module), case.x, weight, **call)
    found = gradients(copy.deepcopy(case.module), draw.choice(LAYOUTS)(case.x), weight, **call)
    for name, value in expected.items():
        close(found[name], value, f"{case.words}: {name}")
    some = copy.deepcopy(case.module)
    trained = {name: parameter for name, parameter in some.named_parameters() if draw.random() < 0.4}
    for name, parameter in some.named_parameters():
        parameter.requires_grad_(name in trained)
    y = case.run(some)
    close(y.detach(), expected["y"], f"{case.words}: output with frozen parameters")
    if trained:
        grads = torch.autograd.grad((y * weight).sum(), list(trained.values()), allow_unused=True)
        for name, value in zip(trained, grads, strict=True):
            if value is not None:
                close(value, expected[name], f"{case.words}: {name} alone")


@torch.no_grad()
def check_parts(case: Draw, draw: random.Random) -> None:
    """Rows, documents, padded rows and cached chunks are what they are alone."""
    module, x, mask = case.module.eval(), case.x, case.call.get("mask")
    B, T = x.shape[:2]
    if case.context is not None or "positions" in case.call or not B:
        return
    y = module(x, mask=mask)
    if case.kind in ("none", "dense"):
        close(module(x[:1], mask=mask), y[:1], f"{case.words}: the first row alone")
    elif case.kind == "padding":
        for row, length in enumerate(mask.lengths.tolist()):
            alone = module(x[row : row + 1, :length])
            close(y[row : row + 1, :length], alone, f"{case.words}: row {row} without padding")
    elif case.kind == "packed":
        ends = sorted({*mask.cu_seqlens.tolist(), *range(0, B * T, T)})
        for a, b in itertools.pairwise(ends):
            at = (slice(a // T, a // T + 1), slice(a % T, a % T + b - a))
            close(y[at], module(x[at]), f"{case.words}: document {a} to {b}")
    if case.kind == "none" and module.causal:
        cache, outputs, left = module.init_cache(B, T + draw.choice((0, 5))), [], T
        while left:
            size = draw.randint(1, left)
            outputs.append(module(draw.choice(LAYOUTS)(x)[:, T - left : T - left + size], cache=cache))
            left -= size
        close(torch.cat(outputs, 1), y, f"{case.words}: decoded")


@torch.no_grad()
def check_precision(case: Draw) -> None:
    """In lower precision the fast form is as good as the definition, and autocast gives numbers."""
    for dtype in (torch.float32, torch.bfloat16):
        low = copy.deepcopy(case.module).eval().to(dtype)
        x = case.x.to(dtype)
        exact = case.run(definition(low).double(), x.double())
        if exact.numel():
            budget, error = (
                float((case.run(module, x).double() - exact).abs().max()) for module in (definition(low), low)
            )
            floor = torch.finfo(dtype).eps * float(exact.abs().max())
            assert error <= 4 * budget + 2 * floor, f"{case.words}: {dtype}, {error:.2e}, budget {budget:.2e}"
    with torch.autocast("cpu", torch.bfloat16):
        assert case.run(copy.deepcopy(case.module).eval().float(), case.x.float()).isfinite().all(), case.words


def check(seed: int) -> None:
    case, draw = drawn(seed), random.Random(-seed)
    check_gradients(case, draw)
    check_parts(case, draw)
    check_precision(case)


@pytest.mark.parametrize("seed", range(100))
def test_unusual_calls(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 500, 20))
def test_many_unusual_calls(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [504, 515, 526])
def test_unusual_calls_compile(seed: int) -> None:
    torch.compiler.reset()
    case = drawn(seed)
    case.module.eval()
    compiled = torch.compile(copy.deepcopy(case.module), backend="aot_eager")
    with torch.no_grad():
        close(case.run(compiled), case.run(case.module), case.words)
