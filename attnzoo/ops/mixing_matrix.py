"""Mixing matrices of multi-head linear attention: their start, their bounds, their continuation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.tracing import is_exporting

MIXING_INITS = ("uniform", "linear", "cos", "exp", "local", "gaussian")


def initial_mixing(
    kind: str,
    grid: tuple[int, ...],
    *,
    causal: bool,
    norm: str = "row",
    sigma: float = 3.0,
) -> Tensor:
    """The (M, M) start: row = query block, column = key block; float64.

    kind: "uniform", or a function of the distance d between blocks on their grid: "linear" 1 - d / max d, "cos"
    cos(pi/4 d / max d), "exp" exp(-d / sigma), "local" [d <= 1.5], "gaussian" exp(-d^2 / (2 (max d / 3)^2)); all but
    the last divided by their sum along rows (norm "row") or columns ("col"). Causal: the lower triangle, rows that
    sum to 1, and "linear" is 1 - d / M, so that no entry vanishes.
    """
    count = math.prod(grid)
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64, device="cpu") for n in grid], indexing="ij")
    at = torch.stack([axis.flatten() for axis in axes], dim=-1)
    distance = torch.cdist(at, at)
    longest = max(math.sqrt(sum((n - 1) ** 2 for n in grid)), 1.0)
    if kind == "uniform":
        weights = torch.ones_like(distance)
    elif kind == "linear":
        weights = 1 - distance / (count if causal else longest)
    elif kind == "cos":
        weights = torch.cos(math.pi / 4 * distance / longest)
    elif kind == "exp":
        weights = torch.exp(-distance / sigma)
    elif kind == "local":
        weights = (distance <= 1.5).double()
    elif kind == "gaussian":
        weights = torch.exp(-distance.square() / (2 * (longest / 3) ** 2))
    else:
        raise ValueError(f"mixing_init must be one of {', '.join(map(repr, MIXING_INITS))}, got {kind!r}")
    if causal:
        weights = weights.tril()
        return weights / weights.sum(1, keepdim=True)
    if kind == "gaussian":
        return weights
    return weights / weights.sum(1 if norm == "row" else 0, keepdim=norm == "row")


def clipped(mixing: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """mixing between its bounds, with a straight-through gradient."""
    if bounds is None:
        return mixing
    value = mixing.detach().clamp(*bounds)
    # The value of the clamp exactly, the gradient of the identity.
    return value + (mixing - mixing.detach()) if torch.is_grad_enabled() else value


def leading(mixing: Tensor, blocks: int) -> Tensor:
    """The first rows and columns of a mixing (..., M, M); blocks beyond it, which are padding, repeat the last."""
    if not is_exporting():
        return mixing[..., :blocks, :blocks]
    # A slice of an exported program would ask whether it is the whole.
    at = torch.arange(blocks, device=mixing.device).clamp(max=mixing.shape[-1] - 1)
    return mixing.index_select(-2, at).index_select(-1, at)


def extended(mixing: Tensor, blocks: int, rule: str) -> Tensor:
    """A causal mixing (..., M, M) continued to `blocks` rows and columns by distance to the last trained row.

    Entries above the diagonal have no meaning.

    Args:
        mixing: the trained matrix.
        blocks: rows and columns that are wanted.
        rule: "clamp" gives blocks farther back than the row reaches its first entry, "window" gives them 0.
    """
    trained = mixing.shape[-1]
    if not is_exporting() and blocks <= trained:
        return mixing[..., :blocks, :blocks]
    i, j = torch.arange(blocks, device=mixing.device)[:, None], torch.arange(blocks, device=mixing.device)
    column = j - (i - (trained - 1)).clamp(min=0)
    weights = mixing[..., i.clamp(max=trained - 1), column.clamp(0, trained - 1)]
    return weights * (column >= 0) if rule == "window" else weights
