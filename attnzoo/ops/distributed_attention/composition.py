"""Attention that mixes heads, of a sharded sequence: all forms, and a ring in two sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.distributed.collectives import Passing
from attnzoo.distributed.sequence import SequenceParallel, Shards
from attnzoo.masks import Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.distributed_attention.decoding import cached_view
from attnzoo.ops.distributed_attention.gather import query_runs
from attnzoo.ops.distributed_attention.heads import from_heads, own_part, split_groups, to_heads, view_of_heads
from attnzoo.ops.distributed_attention.merging import summed
from attnzoo.ops.distributed_attention.ring import Ring, Travel, add_to, leaves, packed, unpacked, wide_zeros
from attnzoo.ops.distributed_attention.tiles import Tile
from attnzoo.ops.distributed_attention.unobserved import unobserved
from attnzoo.ops.observation import ScoreMap
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import constant


@unobserved
def sharded_composition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ScoreMap | None,
    post: Composition | None,
    view: Visibility,
    *,
    scale: float,
    chunk_size: int | None,
    value_heads: tuple[int, ...] | None,
    backend: str,
) -> Tensor:
    """`composed_attention` where `view.shards` says how the tokens are spread.

    What belongs to keys in the compositions is that of the same tokens as k and v.
    """
    shards: Shards = view.shards
    if shards.form == "gather":
        outs = []
        for rows, stop, own in query_runs(view, k.shape[1], False):
            at, keys = partial(_at, rows=rows, keys=slice(stop)), slice(stop)
            outs.append(
                composed_attention(
                    q[:, rows], k[:, keys], v[:, keys], at(pre), at(post), own, scale=scale, chunk_size=chunk_size,
                    value_heads=value_heads, backend=backend,
                )
            )  # fmt: skip
        return torch.cat(outs, 1)
    if shards.form == "heads":
        return _composition_of_groups(q, k, v, pre, post, view, scale, chunk_size, backend)
    wanted = None if value_heads is None else constant(value_heads, q.device, torch.long)
    if shards.form == "cache":
        return _cached_composition(q, k, v, pre, post, view, scale, wanted)
    if not shards.tokens:
        return composed_attention(q, k, v, pre, post, Visibility(), scale=scale, value_heads=value_heads)
    assert pre is None or isinstance(pre, Composition)
    ring = _ComposedRing(view, q, k, v, pre, post, scale, wanted)
    mixed: Tensor = Ring.apply(ring, *ring.tensors(q, k, v, pre, post))[0]  # type: ignore[no-untyped-call]
    return mixed.to(v.dtype)


def _at(score_map: Any, rows: slice, keys: slice) -> Any:
    return None if score_map is None else score_map.at(rows, keys)


def _composition_of_groups(
    q: Tensor, k: Tensor, v: Tensor, pre: Any, post: Composition | None, view: Visibility, scale: float,
    chunk_size: int | None, backend: str,
) -> Tensor:  # fmt: skip
    """All-to-all to all tokens of some composition groups, and back."""
    sp: SequenceParallel = view.shards.sp
    order = sp.order(view.shards.tokens).to(q.device)
    exchange = partial(to_heads, group=sp.group, order=order)

    def own(composition: Composition | None) -> Composition | None:
        if composition is None:
            return None
        matrix = own_part(composition.matrix, sp.group)
        query, key = (
            None if side is None else tuple(map(exchange, side)) for side in (composition.query, composition.key)
        )
        return Composition(matrix, composition.residual, query, key)  # type: ignore[arg-type]

    k, v = (exchange(split_groups(x, sp.size)) for x in (k, v))
    out = composed_attention(
        exchange(q), k, v, own(pre), own(post), view_of_heads(view), scale=scale, chunk_size=chunk_size, backend=backend
    )
    return from_heads(out, sp.group, order)


def _composed_scores(q: Tensor, k: Tensor, pre: Any, view: Visibility, scale: float) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, t, s) after the first composition, -inf where masked, and which rows see any key."""
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2) if q.shape[2] != k.shape[2] else k
        a = torch.einsum("bthd,bshd->bhts", q.to(compute_dtype), k.to(compute_dtype)) * scale
        a = a if pre is None else pre(a)
        visible = view.dense(a.shape, a.device)  # type: ignore[arg-type]
        return (a, None) if visible is None else (a.masked_fill(~visible, -torch.inf), visible)


def _composed_output(p: Tensor, v: Tensor, post: Composition | None, wanted: Tensor | None) -> Tensor:
    """sum_s post(p)_s v_s (B, t, Hv, Dv) in the dtype of p (B, H, t, s)."""
    with without_autocast(p):
        p = p if post is None else post(p)
        repeats = p.shape[1] // v.shape[2]
        if wanted is not None:
            p, v = p.index_select(1, wanted), v.index_select(2, wanted // repeats)
        elif repeats > 1:
            v = v.repeat_interleave(repeats, dim=2)
        return torch.einsum("bhts,bshd->bthd", p, v.to(p.dtype))


def _cached_composition(
    q: Tensor, k: Tensor, v: Tensor, pre: Any, post: Composition | None, view: Visibility, scale: float,
    wanted: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `cached_attention`: first the normaliser of each softmax head over all ranks, then the outputs."""
    groups = view.shards.sp.groups
    a, _ = _composed_scores(q, k, pre, cached_view(view, q, None)[0], scale)
    own = a.logsumexp(-1, keepdim=True) if a.shape[-1] else a.new_full((*a.shape[:-1], 1), -torch.inf)
    m = summed(own, groups, "max")
    m = m.masked_fill(m == -torch.inf, 0.0)
    total = summed(torch.exp(own - m), groups)
    p = torch.exp(a - m) / total.masked_fill(total == 0, 1.0)
    return summed(_composed_output(p, v, post, wanted), groups).to(v.dtype)


class _ComposedRing(Travel):
    """A ring in two sweeps, for outputs that mix the weights of several heads.

    The first finds the normaliser L of each softmax head, the second the outputs of p = exp(a' - L). Backward, the
    first finds delta_m = sum_s p_m dP_m, which is not the product of a head's output and its gradient.
    """

    def __init__(
        self, view: Visibility, q: Tensor, k: Tensor, v: Tensor, pre: Composition | None, post: Composition | None,
        scale: float, wanted: Tensor | None,
    ) -> None:  # fmt: skip
        self.stages = [
            None if c is None else (c.residual, *(x is not None for x in (c.query, c.key, c.matrix)))
            for c in (pre, post)
        ]
        self.scale, self.wanted = scale, wanted
        queries, states, _ = self.sides(q, k, v, pre, post)
        super().__init__(view, len(queries), len(states), q)
        self.first = 1 if pre is None or pre.key is None else 4

    @staticmethod
    def sides(
        q: Tensor, k: Tensor, v: Tensor, pre: Composition | None, post: Composition | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What belongs to queries, to keys (first what the scores need) and to neither."""
        used = [c for c in (pre, post) if c is not None]
        queries = [q, *(x for c in used if c.query is not None for x in c.query)]
        own = [() if c is None or c.key is None else c.key for c in (pre, post)]
        return queries, [k, *own[0], v, *own[1]], [c.matrix for c in used if c.matrix is not None]

    def tensors(self, *given: Any) -> list[Tensor]:
        """All of them, in this order."""
        return [x for side in self.sides(*given) for x in side]

    def maps(
        self, queries: Sequence[Tensor], states: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> tuple[Composition | None, Composition | None]:
        """The compositions again; the second is missing what the states do not hold."""
        q_side, matrices = list(queries[1:]), list(parameters)
        made: list[Composition | None] = []
        keys = [list(states[1 : self.first]), list(states[self.first + 1 :])]
        for stage, k_side in zip(self.stages, keys, strict=True):
            if stage is None:
                made.append(None)
                continue
            residual, of_queries, of_keys, has_matrix = stage
            query = tuple(q_side.pop(0) for _ in range(3)) if of_queries else None
            key = tuple(k_side) if of_keys and k_side else None
            made.append(Composition(matrices.pop(0) if has_matrix else None, residual, query, key))  # type: ignore[arg-type]
        return made[0], made[1]

    def scores(
        self, queries: Sequence[Tensor], states: Sequence[Tensor], parameters: Sequence[Tensor], tile: Tile
    ) -> Tensor:
        """Scores of a tile after the first composition, -inf where masked."""
        pre, _ = self.maps(queries, states, parameters)
        return _composed_scores(queries[0], states[0], pre, tile.view, self.scale)[0]

    def output(
        self, p: Tensor, queries: Sequence[Tensor], states: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Tensor:
        """The output of a tile's weights."""
        _, post = self.maps(queries, states, parameters)
        return _composed_output(p, states[self.first], post, self.wanted)

    def cut(self, queries: Sequence[Tensor], states: Sequence[Tensor], tile: Tile) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and states of a tile."""
        return [x[:, tile.rows] for x in queries], [x[:, tile.keys] for x in states]

    def forward(self, queries: list[Tensor], states: list[Tensor], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        lse: Tensor | None = None
        for _, runs, block in self.blocks(states[: self.first]):
            for tile in self.tiles(runs, queries[0]):
                a = self.scores(*self.cut(queries, block, tile), parameters, tile)
                if lse is None:
                    lse = a.new_full((*a.shape[:2], queries[0].shape[1]), -torch.inf)
                lse[:, :, tile.rows] = torch.logaddexp(lse[:, :, tile.rows], a.logsumexp(-1))
        out: Tensor | None = None
        for _, runs, block in self.blocks(states):
            for tile in self.tiles(runs, queries[0]):
                qs, ks = self.cut(queries, block, tile)
                assert lse is not None
                o = self.output(self.weights(self.scores(qs, ks, parameters, tile), lse, tile), qs, ks, parameters)
                if out is None:
                    out = o.new_zeros(o.shape[0], queries[0].shape[1], *o.shape[2:])
                out[:, tile.rows] += o
        assert lse is not None
        assert out is not None
        return out, lse

    @staticmethod
    def weights(a: Tensor, lse: Tensor, tile: Tile) -> Tensor:
        """exp(a' - L) of a tile."""
        own = lse[:, :, tile.rows]
        return torch.exp(a - own.masked_fill(own == -torch.inf, 0.0)[..., None])

    def backward(
        self, queries: list[Tensor], states: list[Tensor], parameters: list[Tensor], out: Tensor, lse: Tensor,
        d_out: Tensor, d_lse: Tensor,
    ) -> list[Tensor | None]:  # fmt: skip
        del out, d_lse
        delta = torch.zeros_like(lse)
        for _, runs, block in self.blocks(states):
            for tile in self.tiles(runs, queries[0]):
                qs, ks = self.cut(queries, block, tile)
                p = self.weights(self.scores(qs, ks, parameters, tile), lse, tile).detach().requires_grad_()
                with torch.enable_grad():
                    o = self.output(p, qs, ks, parameters)
                (d_p,) = torch.autograd.grad(o, p, d_out[:, tile.rows])
                delta[:, :, tile.rows] += (p.detach() * d_p).sum(-1)
        d_queries, d_parameters = wide_zeros(queries), wide_zeros(parameters)
        going: Passing | None = None
        for step, runs, block in self.blocks(states):
            d_block = wide_zeros(block)
            for tile in self.tiles(runs, queries[0]):
                qs, ks = leaves(queries, tile.rows), leaves(block, tile.keys)
                own = [x.detach().requires_grad_() for x in parameters]
                with torch.enable_grad():
                    a = self.scores(qs, ks, own, tile)
                    p = self.weights(a, lse, tile)
                    o = self.output(p, qs, ks, own)
                # L is that of all blocks, so its part of the gradient comes to the scores directly.
                lost = -p.detach() * delta[:, :, tile.rows, None]
                given = torch.autograd.grad((o, a), (*qs, *ks, *own), (d_out[:, tile.rows], lost), allow_unused=True)
                add_to(d_queries, given[: len(qs)], tile.rows)
                add_to(d_block, given[len(qs) : len(qs) + len(ks)], tile.keys)
                for total, gradient in zip(d_parameters, given[len(qs) + len(ks) :], strict=True):
                    if gradient is not None:
                        total += gradient
            going = self.homing(step, packed(d_block), going)
        assert going is not None
        return [*d_queries, *unpacked(going.wait(), states), *d_parameters]
