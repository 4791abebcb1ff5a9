"""Decoding from factors against the formed keys and values in float64: masks, ranks, splits, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library

from attnzoo import AttentionMask
from attnzoo.masks import Visibility
from attnzoo.ops.factored_attention import factored_attention, tensor_product
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo_kernels.decode.factors import decode_factors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, S, H, D, DV = 2, 107, 5, 6, 7
VIEWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"causal": False},
    "window": {"window": 45},
    "window and sink tokens": {"window": 37, "sink_tokens": 3},
    "padding with an empty row": {"mask": AttentionMask.padding([S - 40, 0]).to(DEVICE)},
    "dense": {"mask": AttentionMask.dense(torch.arange(B * S).view(B, 1, 1, S) % 5 > 1).to(DEVICE)},
    "ring": {"window": 90, "query_start": S + 8, "key_positions": ((torch.arange(S) * 40 + 9) % S + 11).to(DEVICE)},
    "first query": {"query_start": 40},
}


def draw(tokens: int, ranks: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q and the factors, as a cache (B, R, S, ...) holds them."""
    generator = torch.Generator().manual_seed(3)
    shapes = (B, tokens, H, D), *((B, r, S, n) for r, w in zip(ranks, (D, DV), strict=True) for n in (H, w))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    return [drawn[0], *(x.transpose(1, 2) for x in drawn[1:])]


def formed(tensors: list[Tensor], view: Visibility, scale: float) -> Tensor:
    q, k_a, k_b, v_a, v_b = tensors
    k, v = tensor_product(k_a, k_b), tensor_product(v_a, v_b)
    return softmax_attention(q, k, v, view, scale=scale, backend="eager")


def assert_right(
    name: str, tokens: int = 1, ranks: tuple[int, int] = (2, 3), dtype: torch.dtype = torch.float32,
    num_splits: int | None = None, scale: float = 0.4,
) -> None:  # fmt: skip
    """At most twice as far from the float64 answer as formed heads in the same dtype, and eight steps."""
    view = Visibility(**{"query_start": S - tokens, **VIEWS[name]})
    tensors = draw(tokens, ranks, dtype)
    options = view.for_kernel((B, H, tokens, S), tensors[0].device)
    del options["documents"]
    out = decode_factors(*tensors, scale=scale, **options, num_splits=num_splits)
    exact = formed([x.double() for x in tensors], view, scale)
    budget = (formed(tensors, view, scale).double() - exact).abs().max()
    assert out.shape == exact.shape
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * budget + 8 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("name", VIEWS)
def test_every_view(name: str, num_splits: int) -> None:
    assert_right(name, tokens=2, num_splits=num_splits)


@pytest.mark.parametrize("name", ["plain", "window and sink tokens", "padding with an empty row", "ring"])
def test_half_precision(name: str) -> None:
    assert_right(name, dtype=torch.float16)


@pytest.mark.parametrize("ranks", [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_ranks_and_tokens(ranks: tuple[int, int], tokens: int) -> None:
    assert_right("plain", tokens, ranks)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    assert_right("window", scale=scale)


def test_opcheck() -> None:
    given = *draw(1, (2, 1), torch.float32), None, None, None, 0.4, 0, 0, S - 1, 2, True
    library.opcheck(torch.ops.attnzoo.decode_factors.default, given)


def test_the_operation_decodes_with_the_kernel() -> None:
    tensors = draw(1, (1, 1), torch.float32)
    view = Visibility(query_start=S - 1)
    with torch.no_grad():
        out = factored_attention(*tensors, view, scale=0.4, backend="triton")
    assert torch.equal(out, decode_factors(*tensors, scale=0.4, query_start=S - 1))
