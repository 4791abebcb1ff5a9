"""Cross-entropy of hidden states and output weights, without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of a token that is not predicted, the default ignore_index of torch.nn.functional.cross_entropy."""

LARGEST_LOGITS = 2**26
"""Bytes of float32 logits up to which all of them are computed at once, which is faster."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T in nats, with softmax and sum in float32 -> ().

    More than `LARGEST_LOGITS` bytes of logits are never in memory together. In float32,
    `torch.nn.functional.linear_cross_entropy` takes them in pieces where torch has it (2.13 or later); it would return
    the loss of half-precision inputs in half precision. Otherwise each piece is computed again in the backward pass.

    Args:
        hidden: (N, E).
        weight: (V, E).
        targets: (N,) int64; `IGNORED` marks what is not predicted.
        reduction: "mean" or "sum", over the targets that are predicted.
    """
    if len(hidden) > _rows(weight) and (fused := _fused(hidden, weight, targets, reduction)) is not None:
        return fused
    return _in_pieces(hidden, weight, targets, reduction, with_z=False)[0]


def cross_entropy_and_z(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """The cross-entropy, and the squared logarithm of the softmax's denominator, both reduced in the same way.

    The second is the z-loss without its coefficient (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Arguments
    are those of `linear_cross_entropy`.
    """
    nats, z = _in_pieces(hidden, weight, targets, reduction, with_z=True)
    return nats, z


def _rows(weight: Tensor) -> int:
    return max(1, LARGEST_LOGITS // (4 * len(weight)))


def _in_pieces(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, with_z: bool) -> Tensor:
    """(2,): the cross-entropy and, if asked for, the squared logarithm."""
    rows = _rows(weight)
    if len(hidden) <= rows:
        total = _piece(hidden, weight, targets, with_z)
    else:
        total = hidden.new_zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            total = total + checkpoint(_piece, part, weight, wanted, with_z, use_reentrant=False)
    return total if reduction == "sum" else total / (targets != IGNORED).sum()


def _piece(hidden: Tensor, weight: Tensor, targets: Tensor, with_z: bool) -> Tensor:
    """Both sums over the predicted tokens, (2,)."""
    logits = F.linear(hidden, weight)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    squares = (logits.logsumexp(-1).square() * (targets != IGNORED)).sum() if with_z else torch.zeros_like(nats)
    return torch.stack([nats, squares])


def _fused(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor | None:
    """By torch's own operation, or None if it cannot be used here."""
    operation: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    single = {hidden.dtype, weight.dtype} == {torch.float32} and not torch.is_autocast_enabled(hidden.device.type)
    if operation is None or options is None or not single:
        return None
    made: Tensor = operation(
        hidden, weight, targets, reduction=reduction, ignore_index=IGNORED, options=options(acc_policy="accurate")
    )
    return made
