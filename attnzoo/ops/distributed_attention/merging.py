"""Results of attention over parts of the keys, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.distributed import collectives


def merge_partials(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs (.., Dv) and log-sum-exps (..) of the scores.

        L = log(exp(L_a) + exp(L_b)),   o = exp(L_a - L) o_a + exp(L_b - L) o_b

    A query that sees nothing in a set has o = 0 and L = -inf there. Associative and commutative.
    """
    m = torch.maximum(lse_a, lse_b).detach()
    m = m.masked_fill(m == -torch.inf, 0.0)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    total = a + b
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    o = (a[..., None] * o_a + b[..., None] * o_b) / total[..., None]
    return o, (m + total.log()).masked_fill(unseen, -torch.inf)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | float | None) -> Tensor:
    """Outputs (B, t, H, Dv) with one more logit, (H,) or a number, in the denominator."""
    return out if sinks is None else out * torch.sigmoid(lse - sinks)[..., None]


def summed(x: Tensor, groups: Sequence[Any], op: str = "sum") -> Tensor:
    """Sum or maximum over the ranks of all groups."""
    for group in groups:
        x = collectives.all_reduce(x, group, op)
    return x
