"""From the `positions` argument of a call to the rotary tables of its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.masks import AttentionMask
from attnzoo.rotary import Rotary, rotary_range_table, rotary_table

Table = tuple[Tensor, Tensor]
"""cos and sin factors of every rotated feature, each (T, r) or (B, T, r)."""


def rotary_tables(
    rope: Rotary,
    width: int,
    q: Tensor,
    k: Tensor,
    positions: Tensor | tuple[Tensor, Tensor] | None,
    mask: AttentionMask | None,
    *,
    cross: bool,
    past: int = 0,
    limit: int | None = None,
) -> tuple[Table, Table]:
    """Tables for q (B, T, H, D) and k (B, S, G, D).

    Args:
        rope: what to rotate by.
        width: rotary width r; n = r / 2.
        q: queries, for their shape, dtype and device.
        k: keys, likewise.
        positions: as the modules take it.
        mask: a packed mask restarts default positions in every document.
        cross: whether k comes from a context; then positions must be a pair.
        past: tokens in the cache.
        limit: the cache's max_length. Frequencies that depend on the length are fixed by it, so that
            decoding equals the full forward of that length.
    """
    if cross:
        positions = _pair(positions, q, k)
        length = max(_length(rope, positions[0], limit), _length(rope, positions[1], limit))
        q_table = rotary_table(rope, width, positions[0], length=length, dtype=q.dtype, device=q.device)
        k_table = rotary_table(rope, width, positions[1], length=length, dtype=q.dtype, device=q.device)
        return q_table, k_table
    if isinstance(positions, tuple | list):
        raise ValueError("positions must be one tensor unless context is given, got a pair")
    batch, tokens = q.shape[:2]
    if positions is not None:
        _check("positions", positions, q)
        length = _length(rope, positions, limit)
        table = rotary_table(rope, width, positions, length=length, dtype=q.dtype, device=q.device)
        return table, table
    packed = None if mask is None else mask.positions(batch, tokens)
    if packed is None:
        length = past + tokens if limit is None else limit
        table = rotary_range_table(rope, width, past, past + tokens, length=length, dtype=q.dtype, device=q.device)
        return table, table
    length = _length(rope, packed, limit)
    cos, sin = rotary_range_table(rope, width, 0, tokens, length=length, dtype=q.dtype, device=q.device)
    table = cos[packed], sin[packed]
    return table, table


def token_positions(
    q: Tensor,
    k: Tensor,
    positions: Tensor | tuple[Tensor, Tensor] | None,
    mask: AttentionMask | None,
    *,
    cross: bool,
    past: int = 0,
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, (T,) or (B, T), by the rules of `rotary_tables`."""
    if cross:
        query, key = _pair(positions, q, k)
        return query.to(q.device), key.to(q.device)
    if isinstance(positions, tuple | list):
        raise ValueError("positions must be one tensor unless context is given, got a pair")
    batch, tokens = q.shape[:2]
    if positions is not None:
        _check("positions", positions, q)
        positions = positions.to(q.device)
    else:
        positions = None if mask is None else mask.positions(batch, tokens)
    if positions is None:
        positions = torch.arange(past, past + tokens, device=q.device)
    return positions, positions


def _pair(positions: Tensor | tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys in cross-attention."""
    if not isinstance(positions, tuple | list) or len(positions) != 2:
        raise ValueError(
            "positions must be a pair (query positions, key positions) when context is given and rope is "
            "set; or construct the module with rope=None"
        )
    for name, part, x in (("query", positions[0], q), ("key", positions[1], k)):
        _check(f"positions ({name})", part, x)
    return positions[0], positions[1]


def _length(rope: Rotary, positions: Tensor, limit: int | None) -> int:
    """The current length, for dynamic and longrope scaling; reading it off positions costs a synchronisation."""
    if not rope.depends_on_length or positions.numel() == 0:
        return 1
    return int(positions.max()) + 1 if limit is None else limit


def _check(name: str, positions: Tensor, x: Tensor) -> None:
    batch, tokens = x.shape[:2]
    if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"{name} must be an integer tensor, got {getattr(positions, 'dtype', positions)}")
    if positions.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        raise ValueError(f"{name} must have shape ({tokens},) or ({batch}, {tokens}), got {tuple(positions.shape)}")
