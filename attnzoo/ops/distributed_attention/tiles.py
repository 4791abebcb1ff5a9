"""Queries of a rank and keys of a block, cut into tiles in which a simple mask or a dense one holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.distributed.sequence import Run
from attnzoo.masks import AttentionMask, Visibility

QUERIES_AT_ONCE = 512
"""Queries of a tile of the ring's plain form, which stores its scores."""


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
        yield positioned(view, slice(0, len(own)), slice(0, len(block)), q_at, k_at, like, slopes)
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
                    yield positioned(view, rows, keys, q_at, torch.arange(start, end, device=like.device), like, slopes)


def positioned(
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
