"""Attention over a sequence whose tokens are spread over the ranks of a group: exact, forward and backward.

Shapes are those of a rank: queries (B, t, H, D) and states (B, t, ...) of its own t = T / P tokens, in the order of
`Shards.positions`. See `attnzoo.distributed.SequenceParallel` for layouts and forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnzoo.distributed import collectives
from attnzoo.distributed.collectives import Passing, differentiable_exchange
from attnzoo.distributed.sequence import Run, SequenceParallel, Shards
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.linear_attention import linear_attention, read_states
from attnzoo.ops.observation import ScoreMap
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import constant, softmax_attention, softmax_attention_lse

QUERIES_AT_ONCE = 512
"""Queries of a tile of the ring's plain form, which stores its scores."""

Expand = Callable[..., tuple[Tensor, ...]]
"""States of some tokens -> keys (B, s, G, D), values (B, s, G, Dv) and, where there is one, the shared rotary key."""


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


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility,
    rules: ScoreRules,
    backend: str = "auto",
) -> Tensor:
    """`softmax_attention` where `view.shards` says how the tokens are spread; without its factors of the outputs.

    k and v are those of all tokens in form "gather", of this rank's part of the cache in form "cache", else its own.
    """
    shards: Shards = view.shards
    if rules.decay is not None or (rules.bias is not None and shards.form != "gather"):
        raise ValueError(
            "this operation has no form for a sequence that is spread over processes: its scores have a bias"
        )
    if shards.form == "cache":
        return cached_attention(q, k, v, view, rules)
    if shards.form == "gather":
        return gather_attention(q, k, v, view, rules, backend)
    states = (k, v) if rules.k_rope is None else (k, v, rules.k_rope)
    if shards.form == "ring":
        return ring_attention(q, states, view, rules)
    return heads_attention(q, states, view, rules, backend)


def expanded_attention(
    q: Tensor,
    states: tuple[Tensor, ...],
    expand: Expand,
    view: Visibility,
    *,
    groups: int,
    parameters: Sequence[Tensor] = (),
    scale: float,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Softmax attention whose keys and values are expanded on arrival, so that only states travel; forms but "gather".

    Args:
        q: queries (B, t, H, D).
        states: (B, t, ...) each, of this rank's tokens.
        expand: makes keys and values of states; called with `groups`, a slice of key/value heads, in form "heads".
        view: who sees whom.
        groups: number of key/value heads that `expand` gives.
        parameters: tensors that `expand` reads and that want a gradient.
        scale: factor of the scores.
        backend: of the form "heads".
        options: of `ScoreRules`.
    """
    rules = ScoreRules(scale, **options)
    if view.shards.form == "ring":
        return ring_attention(q, states, view, rules, expand, parameters)
    return heads_attention(q, states, view, rules, backend, expand, groups, parameters)


# Gather


def query_runs(view: Visibility, keys: int, splits: bool = True) -> Iterator[tuple[slice, int, Visibility]]:
    """The ordinary calls that one over all keys of a sequence, in their order, consists of.

    Yields the rows of this rank's queries, how many of the first keys they need, and who sees whom.

    Args:
        view: with shards.
        keys: S.
        splits: whether the distance of tokens counts other than by causality, windows and masks.
    """
    shards: Shards = view.shards
    mask = view.mask
    packed = mask is not None and mask.cu_seqlens is not None
    dense = None if mask is None else mask.dense_mask
    runs = shards.sp.runs(shards.tokens)
    if not (view.causal or view.window is not None or packed or splits):
        # Every query sees the same, whatever the layout.
        runs = ((0, shards.positions.shape[0]),)
    at = 0
    for start, length in runs:
        rows, stop = slice(at, at + length), start + length if view.causal and not packed else keys
        at += length
        own = None
        if mask is not None:
            lengths = None if mask.lengths is None else mask.lengths.clamp(max=stop)
            some = None if dense is None else rows_of(dense, rows)
            some = some[..., :stop] if some is not None and some.ndim and some.shape[-1] > 1 else some
            own = AttentionMask(lengths=lengths, cu_seqlens=mask.cu_seqlens, dense_mask=some)
        query_start = start if packed or not view.causal else None
        yield rows, stop, Visibility(view.causal, view.window, view.sink_tokens, own, query_start)


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """These queries of a tensor that broadcasts to (B, H, T, S)."""
    return tensor[..., rows, :] if tensor.ndim > 1 and tensor.shape[-2] > 1 else tensor


def gather_attention(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, backend: str) -> Tensor:
    """This rank's queries over the keys of all tokens: an ordinary call for each run of them."""
    outs = []
    for rows, stop, own in query_runs(view, k.shape[1], rules.alibi_slopes is not None):
        q_rope = None if rules.q_rope is None else rules.q_rope[:, rows]
        k_rope = None if rules.k_rope is None else rules.k_rope[:, :stop]
        bias = None if rules.bias is None else rows_of(rules.bias, rows)[..., :stop]
        outs.append(
            softmax_attention(
                q[:, rows], k[:, :stop], v[:, :stop], own, scale=rules.scale, softcap=rules.softcap,
                alibi_slopes=rules.alibi_slopes, sinks=rules.sinks, q_rope=q_rope, k_rope=k_rope, bias=bias,
                dropout=rules.dropout, backend=backend,
            )
        )  # fmt: skip
    return torch.cat(outs, 1)


# Heads


def to_heads(x: Tensor, group: Any, order: Tensor | None = None) -> Tensor:
    """Heads x (B, t, H, ..) of this rank's tokens -> all P t tokens of the group of its own heads, (B, P t, H / P, ..).

    Tokens come in this order of those that are side by side. Default: as they are.
    """
    P = dist.get_world_size(group)
    came = differentiable_exchange(x.unflatten(2, (P, x.shape[2] // P)).movedim(2, 0), group)
    came = came.transpose(0, 1).flatten(1, 2)
    return came if order is None else came.index_select(1, order)


def from_heads(x: Tensor, group: Any, order: Tensor | None = None) -> Tensor:
    """The inverse of `to_heads`."""
    P = dist.get_world_size(group)
    x = x if order is None else x.index_select(1, order.argsort())
    came = differentiable_exchange(x.unflatten(1, (P, x.shape[1] // P)).transpose(0, 1), group)
    return came.movedim(0, 2).flatten(2, 3)


def split_groups(x: Tensor, parts: int) -> Tensor:
    """Key/value heads (B, t, G, D), repeated where there are fewer than ranks."""
    groups = x.shape[2]
    return x if groups % parts == 0 else x.repeat_interleave(parts // groups, 2)


def own_part(x: Any, group: Any, dim: int = 0) -> Any:
    """This rank's share of a tensor that has an entry for each head; numbers and None as they are."""
    has_heads = isinstance(x, Tensor) and x.ndim > 0
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)] if has_heads else x


def own_groups(groups: int, group: Any) -> slice:
    """The key/value heads that the query heads of this rank read."""
    P, rank = dist.get_world_size(group), dist.get_rank(group)
    first = rank * groups // P
    return slice(first, first + max(groups // P, 1))


def view_of_heads(view: Visibility) -> Visibility:
    """Who sees whom among all tokens of the sequence and this rank's heads."""
    sp, mask = view.shards.sp, view.mask
    dense = None if mask is None else mask.dense_mask
    if mask is not None and dense is not None:
        if dense.ndim > 1 and dense.shape[-2] > 1:
            rows = collectives.gather(dense.movedim(-2, 0).to(torch.uint8), sp.group).flatten(0, 1)
            dense = rows.index_select(0, sp.order(rows.shape[0]).to(rows.device)).bool().movedim(0, -2)
        dense = own_part(dense, sp.group, dense.ndim - 3) if dense.ndim > 2 and dense.shape[-3] > 1 else dense
        mask = AttentionMask(lengths=mask.lengths, cu_seqlens=mask.cu_seqlens, dense_mask=dense)
    return replace(view, mask=mask, shards=None)


def heads_attention(
    q: Tensor,
    states: tuple[Tensor, ...],
    view: Visibility,
    rules: ScoreRules,
    backend: str,
    expand: Expand | None = None,
    groups: int = 0,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """All-to-all to all tokens of some heads, attention there, and back (DeepSpeed-Ulysses, arXiv:2309.14509).

    Keys and values are exchanged, or where they are expanded the states are gathered and each rank expands its heads.
    In form "hybrid" the tokens are those of the heads group, and attention there is a ring.
    """
    shards: Shards = view.shards
    sp, hybrid = shards.sp, shards.form == "hybrid"
    group = sp.groups[-1]
    order = None if hybrid else sp.order(shards.tokens).to(q.device)
    exchange = partial(to_heads, group=group, order=order)
    rules = replace(
        rules, alibi_slopes=own_part(rules.alibi_slopes, group), sinks=own_part(rules.sinks, group), k_rope=None,
        q_rope=None if rules.q_rope is None else exchange(rules.q_rope),
    )  # fmt: skip
    if expand is not None:
        own = own_groups(groups, group)
        given = tuple(_gathered(state, group, order) for state in states)
        states, expand = (given, partial(expand, groups=own)) if hybrid else (expand(*given, groups=own), None)
    else:
        P = dist.get_world_size(group)
        shared = tuple(_gathered(state, group, order) for state in states[2:])
        states = *(exchange(split_groups(state, P)) for state in states[:2]), *shared
    q = exchange(q)
    if hybrid:
        ring = replace(shards, sp=sp.ring, form="ring", positions=sp.ring.positions(shards.tokens).to(q.device))
        out = ring_attention(q, states, replace(view, shards=ring), rules, expand, parameters)
    else:
        k, v, *rope = states
        out = softmax_attention(
            q, k, v, view_of_heads(view), scale=rules.scale, softcap=rules.softcap, alibi_slopes=rules.alibi_slopes,
            sinks=rules.sinks, q_rope=rules.q_rope, k_rope=rope[0] if rope else None, backend=backend,
        )  # fmt: skip
    return from_heads(out, group, order)


def _gathered(x: Tensor, group: Any, order: Tensor | None) -> Tensor:
    """Tokens (B, t, ..) of all ranks of a group, (B, P t, ..)."""
    whole = collectives.differentiable_gather(x, group).transpose(0, 1).flatten(1, 2)
    return whole if order is None else whole.index_select(1, order)


# Ring


@dataclass(frozen=True)
class Tile:
    """Some queries and some keys of a block, and who sees whom among them.

    Attributes:
        rows: of this rank's queries.
        keys: of the block's keys.
        view: a view of the tile alone.
        bias: of its scores, (H, rows, keys), or None.
    """

    rows: slice
    keys: slice
    view: Visibility
    bias: Tensor | None = None


def tiles(
    view: Visibility, own: Sequence[Run], block: Sequence[Run], like: Tensor, slopes: Tensor | None
) -> Iterator[Tile]:
    """The tiles of a rank's queries, runs `own`, and a block of keys, runs `block`, in which anything is seen."""
    plain = view.window is None and view.mask is None and slopes is None
    if len(own) > 2 and own[0][1] == 1:
        # Striped: a dense mask for all.
        q_at, k_at = (torch.tensor([run[0] for run in runs], device=like.device) for runs in (own, block))
        yield _positioned(view, slice(0, len(own)), slice(0, len(block)), q_at, k_at, like, slopes)
        return
    at = 0
    for q_start, q_length in own:
        for first in range(q_start, q_start + q_length, QUERIES_AT_ONCE):
            count = min(QUERIES_AT_ONCE, q_start + q_length - first)
            rows, place = slice(at, at + count), 0
            at += count
            for start, length in block:
                end = min(start + length, first + count) if view.causal else start + length
                keys, place = slice(place, place + end - start), place + length
                # Sinks, of which every packed document has its own, are seen from anywhere.
                far = (
                    view.window is not None
                    and not view.sink_tokens
                    and (
                        first - (end - 1) >= view.window
                        or (start - (first + count - 1) >= view.window and not view.causal)
                    )
                )
                if end <= start or far:
                    continue
                if plain:
                    diagonal = view.causal and end > first
                    yield Tile(rows, keys, Visibility(diagonal, query_start=first - start if diagonal else None))
                else:
                    q_at = torch.arange(first, first + count, device=like.device)
                    yield _positioned(
                        view, rows, keys, q_at, torch.arange(start, end, device=like.device), like, slopes
                    )


def _positioned(
    view: Visibility, rows: slice, keys: slice, q_at: Tensor, k_at: Tensor, like: Tensor, slopes: Tensor | None
) -> Tile:
    """A tile of queries and keys at these positions, with a dense mask."""
    visible = visible_at(view, q_at, k_at, like.shape[0])
    mask = None if visible is None else AttentionMask.dense(visible)
    bias = None if slopes is None else -slopes[:, None, None] * (q_at[:, None] - k_at).abs()
    return Tile(rows, keys, Visibility(False, mask=mask), bias)


def visible_at(view: Visibility, q_at: Tensor, k_at: Tensor, batch: int) -> Tensor | None:
    """Who sees whom of queries (t,) and keys (s,) at positions in the sequence, broadcastable to (B, H, t, s)."""
    i, j, mask, shards = q_at[:, None], k_at[None], view.mask, view.shards
    packed = None if mask is None or mask.cu_seqlens is None else mask._documents(batch, shards.tokens)[1]
    parts = [j <= i] if view.causal else []
    if view.window is not None:
        near = (i - j if view.causal else (i - j).abs()) < view.window
        if view.sink_tokens:
            place = None if mask is None else mask.positions(batch, shards.tokens)
            near = near | ((j if place is None else place[:, None, None, k_at]) < view.sink_tokens)
        parts.append(near)
    if packed is not None:
        parts.append((packed[:, q_at, None] == packed[:, None, k_at])[:, None])
    if mask is not None and mask.lengths is not None:
        parts.append((k_at < mask.lengths[:, None])[:, None, None])
    if mask is not None and mask.dense_mask is not None:
        dense = mask.dense_mask
        parts.append(dense.index_select(-1, k_at) if dense.ndim and dense.shape[-1] > 1 else dense)
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible


def hops(view: Visibility) -> int:
    """How many ranks back a ring has to reach: fewer than P - 1 for a window of contiguous shards."""
    shards: Shards = view.shards
    last, own = shards.sp.size - 1, shards.positions.shape[0]
    if view.window is None or not view.causal or view.sink_tokens or shards.sp.layout != "contiguous":
        return last
    return min(last, -(-(view.window - 1) // own))


def ring_attention(
    q: Tensor,
    states: tuple[Tensor, ...],
    view: Visibility,
    rules: ScoreRules,
    expand: Expand | None = None,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """States travel around the ring while each rank attends to those that it has (Ring Attention, arXiv:2310.01889).

    Saved for the backward pass: this rank's queries and states, its output and one number of each query and head. There
    states travel again, and their gradient, in at least float32, one step behind them. Outputs are kept in at least
    float32 and rounded once.
    """
    queries = (q,) if rules.q_rope is None else (q, rules.q_rope)
    ring = _SoftmaxRing(
        view, replace(rules, sinks=None, q_rope=None, k_rope=None), expand, len(queries), len(states), q
    )
    out, lse = _Ring.apply(ring, *queries, *states, *parameters)  # type: ignore[no-untyped-call]
    return with_sinks(out, lse, rules.sinks).to(states[0].dtype)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | float | None) -> Tensor:
    """Outputs (B, t, H, Dv) with one more logit, (H,) or a number, in the denominator."""
    return out if sinks is None else out * torch.sigmoid(lse - sinks)[..., None]


class _Ring(torch.autograd.Function):
    """A ring of blocks as one differentiable function of queries, states and parameters."""

    @staticmethod
    def forward(ctx: Any, ring: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ring = ring
        out, lse = ring.forward(*ring.split(tensors))
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        ring = ctx.ring
        with torch.autocast(d_out.device.type, **ring.autocast):
            given = ring.backward(*ring.split(tensors), out, lse, d_out, d_lse)
        return None, *(None if g is None else g.to(t.dtype) for g, t in zip(given, tensors, strict=True))


class _Travel:
    """What all rings share: the order of blocks, and messages of several states."""

    def __init__(self, view: Visibility, queries: int, states: int, like: Tensor) -> None:
        self.view, self.shards = view, view.shards
        self.sp: SequenceParallel = self.shards.sp
        self.group, self.last = self.sp.group, hops(view)
        self.counts = queries, states
        device = like.device.type
        self.autocast = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Queries, states and parameters."""
        queries, states = self.counts
        given = list(tensors)
        return given[:queries], given[queries : queries + states], given[queries + states :]

    def blocks(self, states: Sequence[Tensor]) -> Iterator[tuple[int, Sequence[Run], list[Tensor]]]:
        """Step, runs and states of each block, from this rank's own backwards."""
        rank, P = self.sp.rank, self.sp.size
        block = packed(states)
        for step in range(self.last + 1):
            passing = Passing(block, self.group) if step < self.last else None
            if passing is not None and not self.sp.overlap:
                passing.wait()
            yield step, self.sp.runs(self.shards.tokens, (rank - step) % P), unpacked(block, states)
            if passing is not None:
                block = passing.wait()

    def tiles(self, runs: Sequence[Run], like: Tensor, slopes: Tensor | None = None) -> Iterator[Tile]:
        """The tiles of this rank's queries and a block."""
        return tiles(self.view, self.sp.runs(self.shards.tokens), runs, like, slopes)

    def homing(self, step: int, gradient: Tensor, before: Passing | None) -> Passing:
        """The gradient of a block follows one step behind it, with what ranks before this have added; last, home."""
        gradient = gradient if before is None else gradient + before.wait()
        return Passing(gradient, self.group, 1 if step < self.last else -self.last)


def packed(states: Sequence[Tensor]) -> Tensor:
    """States (B, t, ..) as one message (B, t, n)."""
    return torch.cat([state.flatten(2) for state in states], -1)


def unpacked(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, of states of these shapes."""
    parts = message.split([state[0, 0].numel() for state in like], -1)
    return [part.view(*part.shape[:2], *state.shape[2:]) for part, state in zip(parts, like, strict=True)]


def leaves(tensors: Sequence[Tensor], at: slice = slice(None)) -> list[Tensor]:
    """These tokens of tensors (B, t, ..), as a graph of its own starts with them."""
    return [tensor[:, at].detach().requires_grad_() for tensor in tensors]


def add_to(sums: Sequence[Tensor], gradients: Sequence[Tensor | None], at: slice = slice(None)) -> None:
    """Add gradients of these tokens where there are any."""
    for total, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            total[:, at] += gradient


def wide_zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of these shapes in at least float32."""
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]


class _SoftmaxRing(_Travel):
    def __init__(
        self, view: Visibility, rules: ScoreRules, expand: Expand | None, queries: int, states: int, like: Tensor
    ) -> None:
        super().__init__(view, queries, states, like)
        self.rules, self.expand = rules, expand

    def partial(self, queries: Sequence[Tensor], made: Sequence[Tensor], tile: Tile) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a tile alone, differentiable."""
        k, v, *rope = made
        rules = replace(
            self.rules, alibi_slopes=None, bias=tile.bias, q_rope=queries[1] if rope else None,
            k_rope=rope[0] if rope else None,
        )  # fmt: skip
        return softmax_attention_lse(queries[0], k, v, tile.view, rules)

    def forward(
        self,
        queries: list[Tensor],
        states: list[Tensor],
        parameters: list[Tensor],  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        out, lse = None, None
        for _, runs, block in self.blocks(states):
            made = block if self.expand is None else self.expand(*block)
            if out is None or lse is None:
                (out,) = wide_zeros([queries[0][..., :1].expand(*queries[0].shape[:3], made[1].shape[3])])
                lse = torch.full_like(out[..., 0], -torch.inf)
            for tile in self.tiles(runs, queries[0], self.rules.alibi_slopes):
                rows, keys = tile.rows, tile.keys
                own = self.partial([q[:, rows] for q in queries], [x[:, keys] for x in made], tile)
                out[:, rows], lse[:, rows] = merge_partials(out[:, rows], lse[:, rows], *own)
        assert out is not None
        assert lse is not None
        return out, lse

    def backward(
        self, queries: list[Tensor], states: list[Tensor], parameters: list[Tensor], out: Tensor, lse: Tensor,
        d_out: Tensor, d_lse: Tensor,
    ) -> list[Tensor | None]:  # fmt: skip
        d_queries, d_parameters = wide_zeros(queries), wide_zeros(parameters)
        going: Passing | None = None
        used = [p for p in parameters if p.requires_grad]
        d_used = {p: total for p, total in zip(parameters, d_parameters, strict=True) if p.requires_grad}
        # What every weight loses, since they add up to 1.
        lost = (d_out * out).sum(-1) - d_lse
        floor = lse.masked_fill(lse == -torch.inf, 0.0)
        for step, runs, block in self.blocks(states):
            inputs = leaves(block)
            with torch.enable_grad():
                made = inputs if self.expand is None else self.expand(*inputs)
            d_made = wide_zeros(made)
            for tile in self.tiles(runs, queries[0], self.rules.alibi_slopes):
                rows, keys = tile.rows, tile.keys
                qs, ks = leaves(queries, rows), leaves(made, keys)
                with torch.enable_grad():
                    o, own = self.partial(qs, ks, tile)
                share = torch.exp(own.detach() - floor[:, rows])
                d_o = share[..., None] * d_out[:, rows]
                d_own = (d_o * o.detach()).sum(-1) - share * lost[:, rows]
                given = torch.autograd.grad((o, own), (*qs, *ks), (d_o, d_own), allow_unused=True)
                add_to(d_queries, given[: len(qs)], rows)
                add_to(d_made, given[len(qs) :], keys)
            if self.expand is not None:
                d_made = [d.to(m.dtype) for d, m in zip(d_made, made, strict=True)]
                given = torch.autograd.grad(made, (*inputs, *used), d_made, allow_unused=True)
                d_made = wide_zeros(block)
                add_to(d_made, given[: len(block)])
                for p, gradient in zip(used, given[len(block) :], strict=True):
                    if gradient is not None:
                        d_used[p] += gradient
            going = self.homing(step, packed(d_made), going)
        assert going is not None
        return [*d_queries, *unpacked(going.wait(), states), *d_parameters]


# Mixed heads


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
    assert pre is None or isinstance(pre, Composition)
    ring = _ComposedRing(view, q, k, v, pre, post, scale, wanted)
    mixed: Tensor = _Ring.apply(ring, *ring.tensors(q, k, v, pre, post))[0]  # type: ignore[no-untyped-call]
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


class _ComposedRing(_Travel):
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


# States


def pass_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: Shards,
    *,
    size: int,
    causal: bool,
    mask: AttentionMask | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` of a sharded sequence: each rank adds what the states of the others hold (arXiv:2502.07563).

    Every run of tokens has one state sum k v^T; all are gathered, which does not depend on the number of tokens, and a
    run reads the sum of those before it, or if not causal of all others. In packed rows a state is that of the run's
    last document, and if not causal there is one of its first, so that runs read those of their own documents alone.

    Args:
        q: features of the queries (B, t, H, D).
        k: features of the keys (B, t, G, D).
        v: values (B, t, G, Dv).
        shards: how the tokens are spread.
        size: as in `linear_attention`.
        causal: no query sees a later key.
        mask: a packed mask of the whole sequence separates documents; other parts are ignored.
        backend: of what happens within a run.

    Returns:
        Outputs (B, t, H, Dv), and the sum of all states (B, G, D, Dv), without gradient.
    """
    sp, v = shards.sp, v.to(q.dtype)
    documents = None if mask is None or mask.cu_seqlens is None else mask._documents(q.shape[0], shards.tokens)[1]
    one = not causal and documents is None
    length = q.shape[1] if one else sp.runs(shards.tokens)[0][1]
    places = [
        [rank] if one else [start // length for start, _ in sp.runs(shards.tokens, rank)] for rank in range(sp.size)
    ]
    order = torch.tensor([place for own in places for place in own]).argsort().to(q.device)
    runs = list(zip(places[sp.rank], q.split(length, 1), k.split(length, 1), v.split(length, 1), strict=True))
    # The document (B, n) at the first and at the last token of every run.
    firsts, lasts = (None if documents is None else documents[:, at::length] for at in (0, length - 1))

    def states(edges: Tensor | None) -> Tensor:
        kept = [
            torch.einsum("bsgd,bsgv->bgdv", key * _inside(documents, edges, n, key), value) for n, _, key, value in runs
        ]
        return collectives.differentiable_gather(torch.stack(kept), sp.group).flatten(0, 1).index_select(0, order)

    ending = states(lasts)
    beginning = ending if causal or documents is None else states(firsts)
    outs = []
    for n, query, key, value in runs:
        own = None if documents is None else packed_again(documents[:, n * length : (n + 1) * length])
        out, _ = linear_attention(query, key, value, size=size, causal=causal, mask=own, backend=backend)
        earlier, later = slice(0, n), slice(n + 1, len(order))
        sides = ((earlier, ending, firsts, lasts), (later, beginning, lasts, firsts))
        for others, held, edges, of_others in sides[: 1 if causal else 2]:
            read = held[others]
            if edges is not None and of_others is not None:
                same = of_others[:, others] == edges[:, n : n + 1]
                read = read * same.T[..., None, None, None].to(read.dtype)
            # Also where there are none, so that every rank takes part in the backward pass.
            out = out + _read_total(query * _inside(documents, edges, n, query), read.sum(0))
        outs.append(out)
    return torch.cat(outs, 1), ending.detach().sum(0)


def _inside(documents: Tensor | None, edges: Tensor | None, run: int, like: Tensor) -> Tensor | float:
    """1 for tokens (B, length, 1, 1) of the run in the document at its edge (B, n), 0 for others."""
    if documents is None or edges is None:
        return 1.0
    own = documents[:, run * like.shape[1] : (run + 1) * like.shape[1]]
    return (own == edges[:, run : run + 1])[..., None, None].to(like.dtype)


def _read_total(q: Tensor, state: Tensor) -> Tensor:
    """q (B, t, H, D) times a state (B, G, D, Dv) of its key/value head: (B, t, H, Dv)."""
    grouped = q.unflatten(2, (state.shape[1], -1))
    return torch.einsum("btgrd,bgdv->btgrv", grouped, state).flatten(2, 3)


def packed_again(documents: Tensor) -> AttentionMask:
    """A packed mask of rows whose tokens are in these documents (B, t)."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ends = torch.cat([starts.flatten().nonzero()[:, 0], starts.new_full((1,), starts.numel(), dtype=torch.long)])
    return AttentionMask.packed(ends.int())


def pass_block_states(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards, *, size: int, causal: bool, mixing: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """`linear_attention` with a mixing matrix of a sharded sequence: the states of all blocks are gathered.

    Args:
        q: features of the queries (B, t, H, D).
        k: features of the keys (B, t, G, D).
        v: values (B, t, G, Dv).
        shards: how the tokens are spread; its runs must consist of whole blocks.
        size: tokens of a block.
        causal: no query sees a later key; then mixing is triangular.
        mixing: (n, n) or (H, n, n) of all n blocks.
        backend: of what happens within a block.

    Returns:
        Outputs (B, t, H, Dv), and the states of all blocks (B, n, G, D, Dv), without gradient.

    Raises:
        ValueError: if a run ends within a block, since its state would then belong to two ranks.
    """
    sp, (B, t, H, D), G = shards.sp, q.shape, k.shape[2]
    runs = sp.runs(shards.tokens)
    if any(start % size or length % size for start, length in runs):
        raise ValueError(
            f"x must have runs of whole blocks on each rank, a multiple of block_size {size} tokens, got "
            f"{[length for _, length in runs]}"
        )
    own = (shards.positions[::size] // size).to(q.device)
    kept = torch.einsum("bncgd,bncgv->nbgdv", k.unflatten(1, (-1, size)), v.to(q.dtype).unflatten(1, (-1, size)))
    order = sp.order(shards.tokens)[::size].to(q.device) // size
    states = collectives.differentiable_gather(kept, sp.group).flatten(0, 1).index_select(0, order).transpose(0, 1)
    within = torch.diag_embed(mixing.diagonal(dim1=-2, dim2=-1).index_select(-1, own))
    out, _ = linear_attention(q, k, v, size=size, causal=causal, mixing=within, backend=backend)
    rows = mixing.index_select(-2, own)
    rows = rows * (own[:, None] != torch.arange(mixing.shape[-1], device=q.device)).to(rows.dtype)
    rows = rows[None] if rows.ndim == 3 else rows[None, None]
    read = read_states(q.view(B, t // size, size, G, H // G, D), rows, states)
    return out + read.reshape(out.shape), states.detach()


# Decoding


def cached_attention(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """Queries that are the same on all ranks over this rank's part of a cache, merged over the ranks.

    With m the largest L_r of the ranks: o = sum exp(L_r - m) o_r / sum exp(L_r - m), which is B H (Dv + 1) numbers.
    """
    own, bias = cached_view(view, q, rules.alibi_slopes)
    out, lse = softmax_attention_lse(q, k, v, own, replace(rules, alibi_slopes=None, bias=bias, sinks=None))
    groups = view.shards.sp.groups
    m = summed(lse, groups, "max")
    m = m.masked_fill(m == -torch.inf, 0.0)
    share = torch.exp(lse - m)[..., None]
    total = summed(torch.cat([share * out, share], -1), groups)
    out, share = total[..., :-1], total[..., -1]
    seen = share > 0
    out = out / share.masked_fill(~seen, 1.0)[..., None]
    return with_sinks(out, (m + share.log()).masked_fill(~seen, -torch.inf), rules.sinks).to(v.dtype)


def cached_view(view: Visibility, q: Tensor, slopes: Tensor | None) -> tuple[Visibility, Tensor | None]:
    """Who sees whom of new queries and this rank's cached keys, and the bias of their distances."""
    shards: Shards = view.shards
    assert shards.key_positions is not None
    tile = _positioned(view, slice(None), slice(None), shards.positions, shards.key_positions, q, slopes)
    return tile.view, tile.bias


def summed(x: Tensor, groups: Sequence[Any], op: str = "sum") -> Tensor:
    """Sum or maximum over the ranks of all groups."""
    for group in groups:
        x = collectives.all_reduce(x, group, op)
    return x
