"""The sigmoid attention kernels against the operation's definition: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library

import attnzoo
from attnzoo import AttentionMask
from attnzoo.masks import Visibility
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo_kernels import tuning
from attnzoo_kernels.launch import descriptor
from attnzoo_kernels.sigmoid_attention import sigmoid_attention as kernel
from tests.kernels.tiles import SMALL, tile
from tests.kernels.tolerance import assert_as_good_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, G, D, DV = 2, 37, 2, 1, 5, 7
SIZES = {"B": B, "T": T, "S": T, "H": H, "G": G, "D": D, "DV": DV}
SLOPES = torch.tensor([0.5, 0.0625], device=DEVICE)
PACKED = AttentionMask.packed([0, 3, 20, 41, 57, 74]).to(DEVICE)
Case = tuple[dict[str, int], Visibility, dict[str, Any]]
# Several tiles of queries and keys, so that every way to skip or to mask a tile is taken.
CASES: dict[str, Case] = {
    "causal": ({}, Visibility(), {}),
    "bidirectional": ({}, Visibility(causal=False), {}),
    "a number": ({}, Visibility(), {"logit_bias": -1.5}),
    "learned": ({}, Visibility(causal=False), {"logit_bias": "learned"}),
    "cross": ({"T": 19, "S": 50}, Visibility(causal=False), {}),
    "cached prefix": ({"T": 21, "S": 50}, Visibility(), {}),
    "one query": ({"T": 1, "S": 40}, Visibility(), {"logit_bias": "learned"}),
    "queries beyond the keys": ({"S": 20}, Visibility(query_start=3), {}),
    "window": ({}, Visibility(window=6), {}),
    "bidirectional window": ({}, Visibility(window=9, causal=False), {"logit_bias": "learned"}),
    "padding with an empty row": ({}, Visibility(mask=AttentionMask.padding([0, 33]).to(DEVICE)), {}),
    "packed": ({}, Visibility(mask=PACKED), {}),
    "packed, bidirectional, window": ({}, Visibility(mask=PACKED, causal=False, window=5), {}),
    "packed and padded": (
        {}, Visibility(mask=(AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 20])).to(DEVICE)), {},
    ),
    "dense": ({}, Visibility(mask=AttentionMask.dense((torch.arange(T * T) % 7 > 2).view(T, T)).to(DEVICE)), {}),
    "ring": (
        {"T": 3, "S": 20},
        Visibility(query_start=40, key_positions=((torch.arange(20) + 7) % 20 + 23).to(DEVICE), window=18),
        {"logit_bias": "learned"},
    ),
    "softcap": ({}, Visibility(), {"softcap": 0.7, "logit_bias": "learned"}),
    "alibi": ({}, Visibility(), {"alibi_slopes": SLOPES}),
    "groups of several heads": ({"T": 19, "S": 19, "H": 6, "G": 2}, Visibility(), {"logit_bias": "learned"}),
    "negative scale": ({}, Visibility(), {"scale": -0.7}),
    "everything": (
        {}, Visibility(mask=PACKED, window=11), {"softcap": 2.0, "alibi_slopes": SLOPES, "logit_bias": "learned"},
    ),
}  # fmt: skip


def draw(sizes: dict[str, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a bias of each head."""
    b, t, s, h, g, d, dv = sizes.values()
    generator = torch.Generator().manual_seed(7)
    shapes = (b, t, h, d), (b, s, g, d), (b, s, g, dv), (h,)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [
        x.to(DEVICE, torch.float32 if x.ndim == 1 else dtype).requires_grad_() for x in tensors
    ]  # fmt: skip


def call(view: Visibility, options: dict[str, Any], backend: str) -> Callable[..., list[Tensor]]:
    """The operation of q, k, v and the heads' biases."""

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> list[Tensor]:
        given = options | ({"logit_bias": bias} if options.get("logit_bias") == "learned" else {})
        return [sigmoid_attention(q, k, v, view, **given, backend=backend)]

    return run


def assert_same_as_eager(
    name: str, dtype: torch.dtype = torch.float32, config: tuning.Config = SMALL, **sizes: int
) -> None:
    """Output and all gradients of the kernels, held to the definition."""
    changed, view, options = CASES[name]
    # Around both passes: the backward kernels take the tiles too.
    with tuning.pinned(config):
        fused, plain = (call(view, options, backend) for backend in ("triton", "eager"))
        assert_as_good_as(fused, plain, *draw(SIZES | changed | sizes, dtype))


@pytest.mark.parametrize("name", CASES)
def test_every_feature(name: str) -> None:
    assert_same_as_eager(name)


@pytest.mark.parametrize("name", ["causal", "packed", "everything", "groups of several heads", "dense", "ring"])
def test_half_precision_with_descriptors(name: str) -> None:
    """Heads of 16 and 24 features begin at multiples of 16 bytes."""
    assert descriptor(draw(SIZES | {"D": 16}, torch.float16)[1], 16) is not None
    assert_same_as_eager(name, torch.float16, D=16, DV=24)


@pytest.mark.parametrize("sides", [(32, 16), (16, 32), (64, 64)])
@pytest.mark.parametrize("name", ["causal", "packed, bidirectional, window"])
def test_tiles_of_other_shapes(name: str, sides: tuple[int, int]) -> None:
    assert_same_as_eager(name, config=tile(*sides))


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (33, 5), (64, 128), (192, 256)])
def test_any_width(d: int, dv: int) -> None:
    assert_same_as_eager("causal", T=19, S=19, D=d, DV=dv)


def test_no_keys_give_zeros() -> None:
    q, k, v, _ = draw(SIZES | {"S": 0}, torch.float32)
    out = sigmoid_attention(q, k, v, Visibility(causal=False), backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_two_runs_are_bitwise_equal() -> None:
    tensors = draw(SIZES, torch.float32)
    run = call(Visibility(), {"logit_bias": "learned"}, "triton")
    one, two = ([y, *torch.autograd.grad(y.square().sum(), tensors)] for y in (run(*tensors)[0] for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_registration() -> None:
    """torch's own checks of the operator: schema, fake tensors, autograd registration."""
    q, k, v, _ = draw(SIZES, torch.float32)
    bias = torch.randn(B, H, T, device=DEVICE, requires_grad=True)
    given = q, k, v, bias, *[None] * 6, 0.3, 0.0, 0, 0, True
    library.opcheck(torch.ops.attnzoo.sigmoid_attention.default, given)


def test_nothing_of_all_pairs_is_kept() -> None:
    """What the backward pass needs grows with the tokens, not with their pairs."""
    kept: list[int] = []
    for tokens in (32, 64):
        held: dict[int, int] = {}

        def pack(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        tensors = draw(SIZES | {"T": tokens, "S": tokens}, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            call(Visibility(), {"logit_bias": "visible"}, "triton")(*tensors)
        kept.append(sum(held.values()))
    assert kept[1] <= 2.05 * kept[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "the kernels have no dropout, got 0.1"),
        ({"bias": torch.zeros(T, T)}, "the kernels of sigmoid attention add no bias tensor"),
        ({"view": Visibility(window=3, sink_tokens=2)}, "the kernels of sigmoid attention have no sink tokens, got 2"),
    ],
)
def test_what_the_kernels_refuse(options: dict[str, Any], message: str) -> None:
    q, k, v, _ = draw(SIZES, torch.float32)
    with pytest.raises(attnzoo.BackendUnavailable, match=f"'triton' cannot run sigmoid_attention: {message}"):
        sigmoid_attention(q, k, v, **options, backend="triton")


def test_the_kernels_are_what_the_operation_calls() -> None:
    q, k, v, bias = draw(SIZES, torch.float32)
    direct = kernel(q, k, v, logit_bias=bias[:, None], scale=0.3)
    assert torch.equal(direct, sigmoid_attention(q, k, v, logit_bias=bias, scale=0.3, backend="triton"))
