"""What every forward does before its mathematics: checks, sources of keys and values, rotation tables, the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import AttentionMask, CompleteMask, Visibility, as_mask
from attnzoo.modules.checks import check_bias, check_cache, check_input, key_value_sources
from attnzoo.rotary import Rotary, RotaryTable, rotary_range_table, rotary_table, rotate
from attnzoo.rules import describe, is_integer_tensor
from attnzoo.tracing import is_readable

Mask = Tensor | AttentionMask | None
Positions = Tensor | tuple[Tensor, Tensor] | None


@dataclass(eq=False)
class Call:
    """One call of a mechanism, checked.

    Attributes:
        sources: what keys (B, S, kdim) and values (B, S, vdim) are made from.
        view: who sees whom; complete inside `remember`.
        q_table: rotation of the queries, or None without a rotary embedding.
        k_table: rotation of the keys.
        past: tokens in the cache.
        cache: the cache, or None.
    """

    sources: tuple[Tensor, Tensor]
    view: Visibility
    q_table: RotaryTable | None = None
    k_table: RotaryTable | None = None
    past: int = 0
    cache: Any = None

    @property
    def source(self) -> Tensor:
        """The one input of mechanisms whose keys and values have no inputs of their own."""
        return self.sources[0]

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, T, N, D) after rotation."""
        if self.q_table is None or self.k_table is None:
            return q, k
        return rotate(q, *self.q_table), rotate(k, *self.k_table)

    @property
    def bias(self) -> Tensor | None:
        """What a complete mask adds to the scores, (B, H, T, S), or None."""
        return getattr(self.view.mask, "bias", None)

    @property
    def moves_states(self) -> bool:
        """Whether tokens are spread over processes in a form where states travel and keys are made on arrival."""
        return self.view.shards is not None and self.view.shards.form in ("heads", "ring", "hybrid")

    def remember(self, *states: Tensor) -> Remembered:
        """A block that sees the states of all tokens, cached and new, which the cache keeps if it ends without error.

            with call.remember(k, v) as (k, v):
                return self.o_proj(attention(q, k, v, call.view))

        Without a cache the states are those given.
        """
        return Remembered(self, states)

    def real_tokens(self, x: Tensor) -> Tensor | None:
        """Which queries (B, T) are tokens and not padding; None if all count."""
        mask, shards = self.view.mask, self.view.shards
        if mask is not None and shards is not None:
            real: Tensor | None = shards.real_queries(mask)
            return real
        if mask is None or mask.real_queries is not None:
            return None if mask is None else mask.real_queries
        return self.keys_within_lengths() if self.sources[0] is x else None

    def keys_within_lengths(self) -> Tensor | None:
        """Which of the new keys (B, S) a padding mask leaves; None if it leaves all."""
        mask, source = self.view.mask, self.source
        if mask is None or mask.lengths is None:
            return None
        return torch.arange(self.past, self.past + source.shape[1], device=source.device) < mask.lengths[:, None]


class Remembered:
    """See `Call.remember`. What has to be restored is kept here, since the cache outlives the call."""

    def __init__(self, call: Call, states: tuple[Tensor, ...]) -> None:
        self.call = call
        self.states = states
        self.before: Any = None

    def __enter__(self) -> tuple[Tensor, ...]:
        cache, shards = self.call.cache, self.call.view.shards
        if cache is None and shards is not None and shards.form == "gather":
            return self._gathered(shards)
        if cache is None:
            return self.states
        self.before = cache.snapshot(self.states[0].shape[1])
        try:
            *states, key_positions = cache.append(*(() if shards is None else (shards,)), *self.states)
        except BaseException:
            cache.restore(self.before)
            raise
        if shards is not None:
            if shards.form == "gather":
                return self._gathered(shards)
            self.call.view = replace(self.call.view, shards=replace(shards, key_positions=key_positions))
        elif key_positions is not None:
            self.call.view = replace(self.call.view, key_positions=key_positions)
        # The cache has copies, so what was given can be freed while the block runs.
        self.states = ()
        return tuple(states)

    def _gathered(self, shards: Any) -> tuple[Tensor, ...]:
        """The states of all tokens in their order."""
        given, self.states = self.states, ()
        states: tuple[Tensor, ...] = shards.storage.restored(shards.gathered(*shards.storage.stored(*given)), given)
        return states

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.call.cache is not None:
            self.call.cache.restore(self.before)


def begin(
    module: Any,
    x: Tensor,
    context: Tensor | tuple[Tensor, Tensor] | None = None,
    mask: Tensor | AttentionMask | None = None,
    positions: Positions = None,
    cache: Any = None,
) -> Call:
    """Check the arguments of a call of a `Mechanism` and prepare what its mathematics needs.

    Raises:
        ValueError: for an argument that does not fit the module or another argument.
    """
    layer = module._modules.get(module.input_layer)
    check_input("x", x, module.embed_dim, layer)
    sources = key_value_sources(module, x, context, layer)
    past, limit, start = 0, None, None
    if mask is not None:
        mask = as_mask(mask)
    if cache is not None:
        check_cache(module, cache, context, mask)
        past, limit = cache.length, cache.max_length
        start = past
    shards = None
    if (sp := module.sequence_parallel) is not None and sp.size > 1:
        from attnzoo.distributed.calls import shards_of

        shards, positions, limit = shards_of(module, x, sources[0], mask, positions, cache, cross=context is not None)
    elif mask is not None and not isinstance(mask, CompleteMask):
        batch, tokens, keys = *x.shape[:2], past + sources[0].shape[1]
        mask.check(batch, module.score_heads, tokens, keys, x.device)
    if positions is not None:
        check_positions(positions, x, sources[0], cross=context is not None)
    if isinstance(mask, CompleteMask):
        # Checked by the operation: a cache of fixed size hands out more keys than there are tokens.
        check_bias(module, mask)
    if isinstance(mask, CompleteMask) and mask.has_window:
        view = Visibility(False, mask=mask, query_start=start)
    else:
        view = Visibility(module.causal, module.sliding_window, module.sink_tokens, mask, start, shards=shards)
    call = Call(sources, view, None, None, past, cache)
    if module.rope is not None:
        call.q_table, call.k_table = module.rotation_tables(
            x, sources[0], positions, mask, cross=context is not None, past=past, limit=limit
        )
    return call


def rotary_tables(
    rope: Rotary,
    width: int,
    x: Tensor,
    source: Tensor,
    positions: Positions,
    mask: AttentionMask | None,
    *,
    cross: bool,
    past: int = 0,
    limit: int | None = None,
) -> tuple[RotaryTable, RotaryTable]:
    """Tables for queries made from x (B, T, E) and keys made from source (B, S, kdim).

    Args:
        rope: what to rotate by.
        width: rotary width r.
        x: input of the queries, for its shape, dtype and device.
        source: input of the keys.
        positions: as the modules take it.
        mask: a packed mask restarts default positions in every document.
        cross: whether keys come from a context; then positions must be a pair.
        past: tokens in the cache.
        limit: the cache's max_length. Frequencies that depend on the length are fixed by it, so that
            decoding equals the full forward of that length.
    """
    options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    batch, tokens = x.shape[:2]
    if not cross and positions is None:
        packed = None if mask is None else mask.positions(batch, tokens)
        if packed is None:
            length = past + tokens if limit is None else limit
            table = rotary_range_table(rope, width, past, past + tokens, length=length, **options)
        else:
            length = _length(rope, (packed,), limit)
            cos, sin = rotary_range_table(rope, width, 0, tokens, length=length, **options)
            table = cos[packed], sin[packed]
        shared = RotaryTable(*table, rope.style)
        return shared, shared
    pair = token_positions(x, source, positions, mask, cross=cross, past=past)
    length = _length(rope, pair, limit)
    q_table = RotaryTable(*rotary_table(rope, width, pair[0], length=length, **options), rope.style)
    if pair[1] is pair[0]:
        return q_table, q_table
    return q_table, RotaryTable(*rotary_table(rope, width, pair[1], length=length, **options), rope.style)


def token_positions(
    x: Tensor,
    source: Tensor,
    positions: Positions,
    mask: AttentionMask | None,
    *,
    cross: bool,
    past: int = 0,
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys, (T,) or (B, T), by the rules of `rotary_tables`."""
    check_positions(positions, x, source, cross=cross)
    if isinstance(positions, tuple | list):
        return positions[0].to(x.device), positions[1].to(x.device)
    if positions is None and mask is not None:
        positions = mask.positions(*x.shape[:2])
    positions = torch.arange(past, past + x.shape[1]) if positions is None else positions
    positions = positions.to(x.device)
    return positions, positions


def check_positions(positions: Positions, x: Tensor, source: Tensor, *, cross: bool) -> None:
    """Refuse positions that are not one integer for each token, or in cross-attention not a pair of that."""
    if cross:
        if not isinstance(positions, tuple | list) or len(positions) != 2:
            raise ValueError(
                "positions must be a pair (query positions, key positions) when context is given and rope is "
                f"set; or construct the module with rope=None; got {positions!r}"
            )
        _check("positions (query)", positions[0], x)
        _check("positions (key)", positions[1], source)
    elif isinstance(positions, tuple | list):
        raise ValueError(f"positions must be one tensor unless context is given, got {positions!r}")
    elif positions is not None:
        _check("positions", positions, x)


def _length(rope: Rotary, positions: tuple[Tensor, ...], limit: int | None) -> int:
    """The current length, for dynamic and longrope scaling; reading it off positions costs a synchronisation."""
    if not rope.depends_on_length:
        return 1
    if limit is not None:
        return limit
    return max(1 if part.numel() == 0 else int(part.max()) + 1 for part in positions)


def _check(name: str, positions: Tensor, x: Tensor) -> None:
    batch, tokens = x.shape[:2]
    if not is_integer_tensor(positions):
        raise ValueError(f"{name} must be an integer tensor, got {describe(positions)}")
    if positions.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        raise ValueError(f"{name} must have shape ({tokens},) or ({batch}, {tokens}), got {tuple(positions.shape)}")
    if positions.is_meta and not x.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the device meta")
    if positions.numel() and is_readable(positions) and int(positions.min()) < 0:
        raise ValueError(f"{name} must not be negative, got {int(positions.min())}")
