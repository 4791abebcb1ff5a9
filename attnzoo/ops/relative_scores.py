"""Scores that depend on the distance between query and key, from tables of learned vectors and numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RelativeDistances:
    """A score map that adds the scores of distances r = index of the query - index of the key:

        a'_h = a_h + scale (q_h . keys[m - r, h] + bias[m - r, h]),           m = half the tables' length

    A tile of t queries and s keys reads its t + s - 1 rows of the tables, and no (t, s, D) tensor is made: the
    products of queries and rows are skewed.

    Attributes:
        q: queries (B, T, H, D).
        keys: (2 m, H, D).
        bias: (2 m, H).
        scale: factor.
        offset: index of the first query minus that of the first key.
    """

    q: Tensor
    keys: Tensor
    bias: Tensor
    scale: float
    offset: int = 0

    def at(self, queries: slice, keys: slice | Tensor) -> RelativeDistances:
        """The part that a tile of the scores needs; keys must be a slice."""
        assert isinstance(keys, slice)
        offset = self.offset + (queries.start or 0) - (keys.start or 0)
        return replace(self, q=self.q[:, queries], offset=offset)

    def heads_after(self, heads: int) -> int:
        """As many."""
        return heads

    def __call__(self, a: Tensor) -> Tensor:
        """a (B, H, t, s) -> (B, H, t, s)."""
        t, s = a.shape[-2:]
        if t == 0 or s == 0:
            return a
        # From the distance of the last query to the first key down to that of the first query to the last key.
        first = self.keys.shape[0] // 2 - (self.offset + t - 1)
        rows = slice(first, first + t + s - 1)
        scores = torch.einsum("bthd,lhd->bhtl", self.q.to(a.dtype), self.keys[rows].to(a.dtype))
        scores = scores + self.bias[rows].to(a.dtype).t()[:, None]
        # Query i's scores begin at column t - 1 - i: rows that are one shorter shift it there.
        flat = F.pad(scores, (0, 1)).flatten(-2)[..., t - 1 : t - 1 + t * (t + s - 1)]
        skewed: Tensor = flat.unflatten(-1, (t, t + s - 1))
        return a + self.scale * skewed[..., :s]
