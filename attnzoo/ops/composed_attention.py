"""Softmax attention whose heads are mixed before and after the softmax.

Scores of all heads at a pair (t, s) are one vector; a composition maps it to another. Shapes: q (B, T, Hk, D),
k (B, S, G, D), v (B, S, Gv, Dv) give (B, T, Hv, Dv).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask, check_broadcastable
from attnzoo.ops.fused_composition import composed_obstacle, fused_composed_attention
from attnzoo.ops.precision import without_autocast

Side = tuple[Tensor, Tensor, Tensor]
"""u (B, L, N, R, M), v (B, L, N, R, M) and gate g (B, L, N, M) of every query, or of every key."""


@dataclass(frozen=True)
class Composition:
    """A map of the M heads of each of N groups at one pair (t, s):

        a'_j = [a_j] + sum_m a_m W[n, m, j] + sum_r (a . u_r) v_rj + a_j g_j      u, v, g of t, and likewise of s

    The first term only with `residual`; every branch reads a.

    Attributes:
        matrix: (N, M, J) from source to target heads, or None.
        residual: whether a itself is a term; then J = M.
        query: what belongs to queries, or None.
        key: what belongs to keys, or None.
    """

    matrix: Tensor | None = None
    residual: bool = True
    query: Side | None = None
    key: Side | None = None

    def at(self, queries: slice, keys: slice | Tensor) -> Composition:
        """The part that a tile of the scores needs."""
        query = None if self.query is None else tuple(x[:, queries] for x in self.query)
        key = None if self.key is None else tuple(x[:, keys] for x in self.key)
        return Composition(self.matrix, self.residual, query, key)  # type: ignore[arg-type]

    def __call__(self, a: Tensor) -> Tensor:
        """a (B, N M, t, s) -> (B, N J, t, s). With no key part s may be anything, such as features of a head."""
        groups = self._groups()
        x = a.reshape(a.shape[0], groups, a.shape[1] // groups, *a.shape[2:])
        out = x if self.residual else None
        if self.matrix is not None:
            mixed: Tensor = torch.einsum("bnmts,nmj->bnjts", x, self.matrix.to(x.dtype))
            out = mixed if out is None else out + mixed
        assert out is not None
        if self.query is not None:
            u, v, g = (z.to(x.dtype) for z in self.query)
            low = torch.einsum("bnmts,btnrm->bnrts", x, u)
            out = out + torch.einsum("bnrts,btnrj->bnjts", low, v) + x * g.permute(0, 2, 3, 1)[..., None]
        if self.key is not None:
            u, v, g = (z.to(x.dtype) for z in self.key)
            low = torch.einsum("bnmts,bsnrm->bnrts", x, u)
            out = out + torch.einsum("bnrts,bsnrj->bnjts", low, v) + x * g.permute(0, 2, 3, 1)[..., None, :]
        return out.flatten(1, 2)

    def _groups(self) -> int:
        for side in (self.query, self.key):
            if side is not None:
                return side[0].shape[2]
        return 1 if self.matrix is None else self.matrix.shape[0]


@dataclass(frozen=True)
class Sight:
    """Who sees whom: query t of the call stands at index start + t, key s at positions[s], by default s."""

    causal: bool
    window: int | None
    mask: AttentionMask | None
    start: int
    positions: Tensor | None = None

    def visible(
        self, shape: tuple[int, int, int, int], rows: slice, keys: slice, device: torch.device
    ) -> Tensor | None:
        """Boolean, broadcastable to (B, H, rows, keys), or None if all is visible; shape is the whole (B, H, T, S)."""
        B, H, T, S = shape
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] + self.start
        j = (torch.arange(S, device=device) if self.positions is None else self.positions)[keys][None]
        visible = None
        if self.causal:
            visible = j <= i
            if self.window is not None:
                visible = visible & (i - j < self.window)
        if self.mask is None:
            return visible
        parts = []
        if self.mask.lengths is not None:
            if self.mask.lengths.shape[0] != B:
                raise ValueError(f"lengths must have one entry a row, got {self.mask.lengths.shape[0]} for {B}")
            parts.append((j < self.mask.lengths[:, None])[:, None, None])
        if self.mask.cu_seqlens is not None:
            if T != S:
                raise ValueError(f"a packed mask needs as many queries as keys, got {T} queries and {S} keys")
            document = self.mask._documents(B, T)[1]
            parts.append((document[:, rows, None] == document[:, None, keys])[:, None])
        dense = self.mask.dense_mask
        if dense is not None:
            total = S if self.positions is None else self.start + T
            check_broadcastable(dense, (B, H, T, total))
            dense = dense[..., rows, :] if dense.ndim > 1 and dense.shape[-2] > 1 else dense
            if dense.shape[-1] > 1:
                dense = dense[..., keys] if self.positions is None else dense.index_select(-1, j[0])
            parts.append(dense)
        for part in parts:
            if part.device != device:
                raise ValueError(f"mask must be on the device of the input {device}, got {part.device}")
            visible = part if visible is None else visible & part
        return visible

    def keys_of(self, rows: slice, keys: int) -> slice:
        """The keys that these queries can see by causality and window alone."""
        if not self.causal or self.positions is not None:
            return slice(0, keys)
        first = 0 if self.window is None else max(0, self.start + rows.start - self.window + 1)
        return slice(first, min(keys, self.start + rows.stop))


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Composition | None,
    post: Composition | None,
    sight: Sight,
    *,
    scale: float,
    dropout: float = 0.0,
    chunk_size: int | None = None,
    value_heads: Tensor | None = None,
    value_groups: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_n = sum_s post(softmax_s(pre(scale q . k) + visibility))_n v_s.

    A query that sees no key gives zeros. Scores and softmax are float32, or float64 for float64.

    Args:
        q: queries (B, T, Hk, D).
        k: keys (B, S, G, D); head h reads key h // (Hk / G).
        v: values (B, S, Gv, Dv); head n reads value n // (Hv / Gv).
        pre: on the scores, before the mask; None: nothing.
        post: on the normalised weights; None: nothing.
        sight: who sees whom.
        scale: of the scores.
        dropout: of the composed weights.
        chunk_size: queries that are done at once; their scores are made anew in the backward pass, so that the
            (B, H, T, S) scores never exist. None: all at once, which is the definition.
        value_heads: indices (Hv,) of the target heads that are wanted. Default: all.
        value_groups: which of v's heads each of them reads, where that is not n // (Hv / Gv).
        backend: "triton" runs the kernels or raises `BackendUnavailable`; anything else is plain PyTorch.
    """
    T, S = q.shape[1], k.shape[1]
    if backend == "triton":
        choose(backend, "composed_attention", {"triton": lambda: composed_obstacle(q, v, pre, post, dropout)})
        return fused_composed_attention(
            q, k, v, pre, post, sight, scale=scale, value_heads=value_heads, value_groups=value_groups
        )
    if chunk_size is None or chunk_size >= T:
        return _tile(q, k, v, pre, post, sight, slice(0, T), slice(0, S), T, scale, dropout, value_heads, value_groups)
    outputs = []
    needs_grad = torch.is_grad_enabled()
    for first in range(0, T, chunk_size):
        rows = slice(first, min(T, first + chunk_size))
        keys = sight.keys_of(rows, S)
        arguments = (q, k, v, pre, post, sight, rows, keys, T, scale, dropout, value_heads, value_groups)
        outputs.append(checkpoint(_tile, *arguments, use_reentrant=False) if needs_grad else _tile(*arguments))
    return torch.cat(outputs, dim=1)


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Composition | None,
    post: Composition | None,
    sight: Sight,
    rows: slice,
    keys: slice,
    T: int,
    scale: float,
    dropout: float,
    value_heads: Tensor | None,
    value_groups: tuple[int, ...] | None,
) -> Tensor:
    """Outputs of the queries `rows` over the keys `keys`."""
    B, _, H, _ = q.shape
    S, G = k.shape[1], k.shape[2]
    high = torch.promote_types(q.dtype, torch.float32)
    device = q.device
    with without_autocast(q):
        tile_q, tile_k, tile_v = q[:, rows].to(high), k[:, keys].to(high), v[:, keys]
        tile_k = tile_k.repeat_interleave(H // max(G, 1), dim=2) if H != G else tile_k
        a = torch.einsum("bthd,bshd->bhts", tile_q, tile_k) * scale
        if pre is not None:
            a = pre.at(rows, keys)(a)
        visible = sight.visible((B, a.shape[1], T, S), rows, keys, device)
        blind = None
        if visible is not None:
            blind = ~visible.any(-1, keepdim=True)
            a = a.masked_fill(~(visible | blind), -math.inf)
        p = torch.softmax(a, dim=-1)
        if visible is not None and blind is not None:
            p = p.masked_fill(blind, 0.0)
        if post is not None:
            p = post.at(rows, keys)(p)
        if value_heads is not None:
            p = p.index_select(1, value_heads)
        p = F.dropout(p, dropout)
        heads = p.shape[1]
        if value_groups is not None:
            tile_v = tile_v.index_select(2, torch.tensor(value_groups, dtype=torch.long, device=device))
        elif heads != tile_v.shape[2]:
            tile_v = tile_v.repeat_interleave(heads // max(tile_v.shape[2], 1), dim=2)
        return torch.einsum("bhts,bshd->bthd", p.to(tile_v.dtype), tile_v)
