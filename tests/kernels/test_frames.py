"""How many of our own functions are on the stack when a kernel is launched, from what a user calls on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
import attnzoo_kernels
from attnzoo_kernels.composed_attention import composed_attention
from attnzoo_kernels.decode import decode_attention, latent_decode
from attnzoo_kernels.expert_projection import expert_linear
from attnzoo_kernels.head_routing import routed_attention
from attnzoo_kernels.linear_attention import (
    linear_attention,
    linear_attention_finish,
    linear_attention_states,
    linear_attention_step,
)
from attnzoo_kernels.qk_norm_rope import qk_norm_rope
from attnzoo_kernels.sigmoid_attention import sigmoid_attention
from attnzoo_kernels.softmax_attention import softmax_attention

OWN = tuple(str(Path(package.__file__).parent) for package in (attnzoo, attnzoo_kernels))
Frames = dict[str, list[str]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Frames:
    """Kernel -> our functions on the stack when it is launched, outermost first; nothing is computed.

    The launch with the most frames counts.
    """
    if torch.cuda.is_available():
        pytest.skip("stubs the interpreter's launches")
    from triton.runtime.interpreter import InterpretedFunction

    seen: Frames = {}

    def run(self: Any, *_: Any, grid: Any, warmup: bool, **__: Any) -> None:
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_qualname
            # `HintedCall.__call__` takes the place of torch's own: see test_hints. `Operator` takes that of
            # torch's dispatcher.
            own = frame.f_code.co_filename.startswith(OWN) and not name.startswith("Operator.")
            if own and frame.f_code.co_name != "__call__":
                frames.append(name)
            frame = frame.f_back
        name = self.__name__
        seen[name] = max(seen.get(name, []), frames[::-1], key=len)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return seen


def few(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, requires_grad=grad)


def call_softmax() -> Tensor:
    q, k, v = (few(1, 5, 2, 4) for _ in range(3))
    out, _ = softmax_attention(q, k, v, scale=0.5, bias=few(5, 5), sinks=few(2), head_scale=few(2))
    return out


def call_decay() -> Tensor:
    q, k, v = (few(1, 5, 2, 4).half() for _ in range(3))
    out, _ = softmax_attention(q, k, v, scale=0.5, decay=few(1, 2, 5), output_gate=few(1, 5, 2, 1).half())
    return out


def call_sigmoid() -> Tensor:
    q, k, v = (few(1, 5, 2, 4) for _ in range(3))
    return sigmoid_attention(q, k, v, scale=0.5, logit_bias=few(2, 1))


def call_decode() -> Tensor:
    q, k, v = (few(1, t, 2, 4, grad=False) for t in (1, 90, 90))
    return decode_attention(q, k, v, scale=0.5, query_start=89, num_splits=2)


def call_latent_decode() -> Tensor:
    q, q_rope, cache = few(1, 1, 2, 8, grad=False), few(1, 1, 2, 4, grad=False), few(1, 90, 12, grad=False)
    return latent_decode(q, q_rope, cache[..., :8], cache[..., 8:], scale=0.5, query_start=89, num_splits=2)


def call_composed() -> Tensor:
    q, k, v = (few(1, 5, 2, 4) for _ in range(3))
    matrices = {side: few(1, 5, 1, 2, 2) for side in ("q_pre", "k_pre", "q_post", "k_post")}
    return composed_attention(q, k, v, scale=0.5, splits=2, **matrices)


def call_linear(weights: bool) -> Tensor:
    q, k, v = (few(1, 5, 2, 4) for _ in range(3))
    return linear_attention(q, k, v, size=4, causal=True, weights=few(1, 1, 2, 2) if weights else None)[0]


def call_linear_states() -> Tensor:
    return linear_attention_states(few(1, 5, 2, 4), few(1, 5, 2, 4), 4)


def call_linear_step() -> Tensor:
    q, k, v, states = (few(*shape, grad=False) for shape in (*[(1, 1, 2, 4)] * 3, (1, 1, 2, 4, 4)))
    return linear_attention_step(q, k, v, states)


def call_linear_finish() -> Tensor:
    return linear_attention_finish(few(1, 5, 2, 4), few(4), few(1, 5, 8), eps=1e-6, dtype=torch.float32)


def call_routing() -> Tensor:
    q, k, v = (few(1, 5, 2, 4) for _ in range(3))
    return routed_attention(q, k, v, torch.ones(1, 5, 2, dtype=torch.bool), scale=0.5, gates=few(1, 5, 2))


def call_qk_norm_rope() -> Tensor:
    z, matrices = few(1, 5, 2, 4), (few(4, 4), few(4, 4), few(4, 4))
    return qk_norm_rope(z, mlp=matrices, norm_weight=few(4), cos=torch.ones(5, 4), sin=torch.zeros(5, 4))


def call_experts() -> Tensor:
    order, ends = torch.arange(10), torch.tensor([4, 10], dtype=torch.int32)
    return expert_linear(few(5, 1, 2, 4), few(2, 4, 4), order, ends, gates=few(5, 2))


# What is called, and how many kernels both passes launch.
FUNCTIONS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "softmax_attention": (call_softmax, 4),
    "softmax_attention, decay": (call_decay, 5),
    "sigmoid_attention": (call_sigmoid, 3),
    "decode_attention": (call_decode, 2),
    "latent_decode": (call_latent_decode, 2),
    "composed_attention": (call_composed, 5),
    "linear_attention": (lambda: call_linear(False), 2),
    "linear_attention, mixed": (lambda: call_linear(True), 4),
    "linear_attention_states": (call_linear_states, 1),
    "linear_attention_step": (call_linear_step, 1),
    "linear_attention_finish": (call_linear_finish, 2),
    "routed_attention": (call_routing, 5),
    "qk_norm_rope": (call_qk_norm_rope, 4),
    "expert_linear": (call_experts, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_kernel_is_two_functions_away_from_the_public_one(name: str, launches: Frames) -> None:
    """The public function and the operator's body; in the backward pass autograd's formula and the operator's body."""
    call, kernels = FUNCTIONS[name]
    out = call()
    if out.requires_grad:
        out.sum().backward()
    assert len(launches) == kernels
    assert {kernel: frames for kernel, frames in launches.items() if len(frames) > 2} == {}


def decode(module: nn.Module, launches: Frames) -> None:
    """One token after seven."""
    with torch.no_grad():
        cache = module.init_cache(1, 8)
        module(torch.randn(1, 7, 16), cache=cache)
        launches.clear()
        module(torch.randn(1, 1, 16), cache=cache)


def forward(module: nn.Module, launches: Frames) -> None:
    module.train()(torch.randn(1, 8, 16))


TRITON: dict[str, Any] = {"backend": "triton"}
LIMIT = 4
"""The module's forward, the operation, the kernels' public function, and the operator's body."""

# What is built, how it is called, and kernels that have to be among the launched ones.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Frames], None], set[str]]] = {
    "mha": (lambda: attnzoo.MultiHeadAttention(16, 2, **TRITON), forward, {"softmax_attention_fwd_kernel"}),
    "mha, decoding": (lambda: attnzoo.MultiHeadAttention(16, 2, **TRITON), decode, {"decode_attention_fwd_kernel"}),
    "kha, mlp_qkv": (
        lambda: attnzoo.KnockingHeadsAttention(16, 2, variant="mlp_qkv", **TRITON), forward,
        {"qk_norm_rope_fwd_kernel", "softmax_attention_fwd_kernel"},
    ),
    "kha, linear": (
        lambda: attnzoo.KnockingHeadsAttention(16, 2, variant="linear", **TRITON), forward,
        {"qk_norm_rope_fwd_kernel", "softmax_attention_fwd_kernel"},
    ),
    "mla, absorbed decoding": (
        lambda: attnzoo.MultiHeadLatentAttention(16, 2, absorb=True, **TRITON), decode,
        {"decode_attention_fwd_kernel"},
    ),
    "moh, sparse": (
        lambda: attnzoo.MixtureOfHeadAttention(16, 4, sparse=True, **TRITON), forward, {"head_routing_fwd_kernel"},
    ),
    "dcmha": (
        lambda: attnzoo.DynamicallyComposableAttention(16, 4, **TRITON), forward,
        {"composed_attention_fwd_out_kernel"},
    ),
    "sigmoid": (lambda: attnzoo.SigmoidAttention(16, 2, **TRITON), forward, {"sigmoid_attention_fwd_kernel"}),
    "linear": (lambda: attnzoo.LinearAttention(16, 2, **TRITON), forward, {"linear_attention_tile_kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_is_four_functions_away_from_the_module(name: str, launches: Frames) -> None:
    build, call, expected = MODULES[name]
    call(build(), launches)
    assert expected <= launches.keys()
    assert {kernel: frames for kernel, frames in launches.items() if len(frames) > LIMIT} == {}
