"""Form "heads": all tokens of some heads on each rank; "hybrid", with a ring over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnzoo.distributed import collectives
from attnzoo.distributed.collectives import differentiable_exchange
from attnzoo.distributed.sequence import Shards
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.distributed_attention.ring import Expand, ring_attention
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention


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
        # One row is that of the only query, or the same for the only queries of all ranks.
        if dense.ndim > 1 and (dense.shape[-2] > 1 or view.shards.positions.shape[0] == 1):
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
