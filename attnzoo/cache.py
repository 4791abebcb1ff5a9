"""Caches for decoding: preallocated, filled in place, passed in explicitly.

A cache belongs to one module and one batch of sequences of equal length. No gradient flows through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.rules import check_options, is_integer, is_integer_tensor
from attnzoo.tracing import is_readable, is_traced


class CacheLayout(NamedTuple):
    """What distinguishes the caches of two modules, whatever their batch and length.

    Attributes:
        widths: (heads, width) of each buffer's states.
        window: keys that a query sees at most, or None.
        sink_tokens: leading keys that stay.
        block_size: tokens of a block, where states belong to blocks.
    """

    widths: tuple[tuple[int, ...], ...]
    window: int | None = None
    sink_tokens: int = 0
    block_size: int | None = None

    def __str__(self) -> str:
        states = " and ".join(" x ".join(map(str, width)) for width in self.widths)
        window = "no window" if self.window is None else f"a window of {self.window}"
        sinks = f" and {self.sink_tokens} sink tokens" if self.sink_tokens else ""
        blocks = "" if self.block_size is None else f", blocks of {self.block_size}"
        return f"states of {states} with {window}{sinks}{blocks}"


def checked_rows(index: Tensor, batch_size: int) -> Tensor:
    """An index of rows (B,), as `index_select` takes it."""
    if not is_integer_tensor(index) or index.shape != (batch_size,):
        got = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
        raise ValueError(f"index must hold {batch_size} integers, got {got}")
    if batch_size and is_readable(index) and not 0 <= int(index.min()) <= int(index.max()) < batch_size:
        raise ValueError(f"index must lie between 0 and {batch_size - 1}, got {index.tolist()}")
    return index.long()


def check_held(length: int, held: int) -> None:
    """Refuse a length of which a cache does not have so many tokens."""
    if not is_integer(length) or not 0 <= length <= held:
        raise ValueError(f"length must lie between 0 and the {held} cached tokens, got {length}")


Snapshot = tuple[int, Tensor | int | None, tuple[Tensor, ...]]
"""Length of a cache, and what the next append will overwrite: slots of the ring, and their states."""


class TokenCache:
    """Per-token states of the sequences so far. Subclasses define what is stored.

    Without a window a cache holds `max_length` tokens. With one it is a ring buffer of at most
    window + sink_tokens tokens: the first sink_tokens stay, the others are overwritten when the window has
    passed them.

    Attributes:
        layout: what modules it fits.
        length: tokens seen so far.
        max_length: tokens it may ever see.
        capacity: tokens it holds at most.
        buffers: the buffers, each (B, heads, capacity, width).
        precise: places of the buffers that have at least float32, whatever the cache's dtype.
    """

    precise: tuple[int, ...] = ()

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        widths: tuple[tuple[int, int], ...],
        *,
        window: int | None = None,
        sink_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate one buffer for each (heads, width) in widths."""
        check_options(batch_size=batch_size, max_length=max_length, device=device, dtype=dtype)
        self.batch_size = batch_size
        self.max_length = max_length
        self.window = window
        self.sink_tokens = sink_tokens
        self.capacity = max_length if window is None else min(max_length, window + sink_tokens)
        self.length = 0
        self.layout = CacheLayout(widths, window, sink_tokens)
        self._widths = widths
        precise = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.buffers = tuple(
            torch.zeros(
                batch_size, heads, self.capacity, width, device=device, dtype=precise if i in self.precise else dtype
            )
            for i, (heads, width) in enumerate(widths)
        )

        # As appended and returned; made once, since a view costs as much as a check in every decoding step.
        self._rows = tuple(buffer.transpose(1, 2) for buffer in self.buffers)

    @staticmethod
    def stored(*states: Tensor) -> tuple[Tensor, ...]:
        """Those of the states given to `append` that have to be kept."""
        return states

    @staticmethod
    def restored(
        stored: tuple[Tensor, ...],
        states: tuple[Tensor, ...],  # noqa: ARG004
    ) -> tuple[Tensor, ...]:
        """All states again from those kept; `states` are those of some tokens, for their widths."""
        return stored

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.length = 0

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was, as beam search needs it; index (B,) integers."""
        index = checked_rows(index, self.batch_size)
        for buffer in self.buffers:
            buffer.copy_(buffer.index_select(0, index))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as speculative decoding needs it.

        A ring buffer that has overwritten tokens which would be visible again cannot go back.
        """
        check_held(length, self.length)
        if length < self.length and self.length > self.capacity and length > 0:
            raise ValueError(
                f"length must be {self.length}: the ring buffer of {self.capacity} tokens has overwritten "
                f"what {length} tokens would need"
            )
        self.length = length

    def take(self, other: Any) -> None:
        """Continue what a smaller cache of the same module and batch holds."""
        for buffer, held in zip(self.buffers, other.buffers, strict=True):
            buffer[:, :, : held.shape[2]] = held
        self.length = other.length

    def snapshot(self, tokens: int) -> Snapshot:
        """What `restore` needs to take back an append of so many tokens."""
        if self.capacity == self.max_length or not self.length:
            return self.length, None, ()
        device = self.buffers[0].device
        if tokens == 1:
            slots = self._slot(self.length)
        else:
            slots = self._slots(self._held_positions(self.length + tokens, device, self.length))
        return self.length, slots, tuple(buffer[:, :, slots].clone() for buffer in self.buffers)

    def restore(self, snapshot: Snapshot) -> None:
        """Take back what was appended since the snapshot."""
        self.length, slots, states = snapshot
        if slots is not None:
            for buffer, state in zip(self.buffers, states, strict=True):
                buffer[:, :, slots] = state

    def _append(self, *new: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Store new states, each (B, T, heads, width), and return what the new queries may look at.

        Returns the states (B, S, heads, width) and the index of each of the S tokens; None means 0 .. S-1.
        Nothing is stored if anything does not fit.
        """
        tokens = self._check(new)
        self.check_length(tokens)
        states = tuple([state.detach() if state.requires_grad else state for state in new])
        if self.capacity == self.max_length:
            return self._append_linear(states, tokens), None
        return self._append_ring(tuple(state.transpose(1, 2) for state in states), tokens)

    def check_length(self, tokens: int) -> None:
        """Refuse more tokens than the cache may ever see."""
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {tokens} new tokens exceed its max_length {self.max_length}"
            )

    def _check(self, new: tuple[Tensor, ...], first: int | None = None) -> int:
        """How many new tokens; refuses states of another batch, width, dtype or device than the (first) buffers."""
        tokens = new[0].shape[1]
        for (heads, width), buffer, state in zip(self._widths[:first], self.buffers[:first], new, strict=True):
            expected = (self.batch_size, tokens, heads, width)
            if state.shape != expected or state.dtype != buffer.dtype or state.device != buffer.device:
                raise ValueError(
                    f"cache was made for states (batch, tokens, heads, width) {expected} in {buffer.dtype} "
                    f"on {buffer.device}, got {tuple(state.shape)} in {state.dtype} on {state.device}"
                )
        return tokens

    def _append_linear(self, states: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        end = self.length + tokens
        for rows, state in zip(self._rows, states, strict=True):
            rows.narrow(1, self.length, tokens).copy_(state)
        self.length = end
        return tuple([rows.narrow(1, 0, end) for rows in self._rows])

    def _append_ring(self, states: tuple[Tensor, ...], tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
        device = self.buffers[0].device
        end = self.length + tokens
        if tokens == 1:
            slot = self._slot(self.length)
            for buffer, state in zip(self.buffers, states, strict=True):
                buffer[:, :, slot] = state[:, :, 0] if isinstance(slot, int) else state
            self.length = end
            held = min(end, self.capacity)
            place = torch.arange(held, device=device)
            positions = end - 1 - (end - 1 - place) % (self.capacity - self.sink_tokens)
            if self.sink_tokens:
                positions = torch.where(place < self.sink_tokens, place, positions)
            return tuple(buffer[:, :, :held].transpose(1, 2) for buffer in self.buffers), positions
        new_positions = torch.arange(self.length, end, device=device)
        old_positions = self._held_positions(self.length, device)
        old_slots = self._slots(old_positions)
        seen = tuple(
            torch.cat([buffer[:, :, old_slots], state], dim=2).transpose(1, 2)
            for buffer, state in zip(self.buffers, states, strict=True)
        )
        kept = self._held_positions(end, device, self.length)
        slots = self._slots(kept)
        for buffer, state in zip(self.buffers, states, strict=True):
            buffer[:, :, slots] = state[:, :, kept - self.length]
        self.length = end
        return seen, torch.cat([old_positions, new_positions])

    def _held_positions(self, length: int, device: torch.device, since: int = 0) -> Tensor:
        """Ascending positions, from `since` on, that a ring holds after `length` tokens."""
        sinks = min(length, self.sink_tokens)
        first = max(sinks, length - (self.capacity - self.sink_tokens), since)
        runs = (min(since, sinks), sinks), (first, max(length, first))
        return torch.cat([torch.arange(*run, device=device) for run in runs])

    def _slot(self, position: int) -> int | Tensor:
        """The slot of one position; a tensor while a program is recorded, which a number would tie to this slot."""
        if is_traced():
            return self._slots(torch.tensor([position], device=self.buffers[0].device))
        window = self.capacity - self.sink_tokens
        return position if position < self.sink_tokens else self.sink_tokens + (position - self.sink_tokens) % window

    def _slots(self, positions: Tensor) -> Tensor:
        """The slot of each position."""
        window = self.capacity - self.sink_tokens
        ring = self.sink_tokens + (positions - self.sink_tokens) % window
        return torch.where(positions < self.sink_tokens, positions, ring)


class KeyValueCache(TokenCache):
    """Keys (B, G, S, D) after norm and rotation, and values (B, G, S, Dv): G (D + Dv) numbers per token."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k (B, T, G, D) and v (B, T, G, Dv); return all keys, values and their positions."""
        (k, v), positions = self._append(k, v)
        return k, v, positions


class StaticContextCache(TokenCache):
    """Keys and values of the static tokens first, and in the prefix form those of the dynamic tokens after them.

    Attributes:
        num_static: static tokens in it.
    """

    num_static = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k (B, T, G, D) and v (B, T, G, D); return all keys, values and their positions."""
        (k, v), positions = self._append(k, v)
        return k, v, positions

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        super().reset()
        self.num_static = 0

    def take(self, other: Any) -> None:
        """As `TokenCache.take`."""
        super().take(other)
        self.num_static = other.num_static

    def truncate(self, length: int) -> None:
        """As `TokenCache.truncate`; static tokens stay."""
        if is_integer(length) and 0 <= length < self.num_static:
            raise ValueError(f"length must be at least the {self.num_static} static tokens, got {length}; or reset()")
        super().truncate(length)


class StatefulCache(KeyValueCache):
    """Keys and values, and beside them a state of fixed size, which belongs to all tokens so far.

    Attributes:
        state: its tensors, batch first. They are replaced and never written in place.
        no_way_back: why single tokens cannot be taken back.
    """

    state: tuple[Tensor, ...] = ()
    no_way_back = ""

    def store(self, *state: Tensor) -> None:
        """Move on to the state after the tokens that were appended."""
        self.state = tuple(part.detach() for part in state)

    @property
    def nbytes(self) -> int:
        """Bytes that buffers and state take."""
        return super().nbytes + sum(part.numel() * part.element_size() for part in self.state)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        super().reset()
        self.state = tuple(map(torch.zeros_like, self.state))

    def reorder(self, index: Tensor) -> None:
        """As `TokenCache.reorder`."""
        super().reorder(index)
        self.state = tuple(part.index_select(0, index) for part in self.state)

    def truncate(self, length: int) -> None:
        """Forget everything (length 0) or nothing."""
        check_held(length, self.length)
        if length not in (0, self.length):
            raise ValueError(f"length must be 0 or {self.length}: {self.no_way_back}, got {length}")
        super().truncate(length)
        if length == 0:
            self.reset()

    def take(self, other: Any) -> None:
        """As `TokenCache.take`, with the state."""
        super().take(other)
        self.state = other.state

    def snapshot(self, tokens: int) -> Any:
        """As `TokenCache.snapshot`, with the state."""
        return super().snapshot(tokens), self.state

    def restore(self, snapshot: Any) -> None:
        """Take back what was appended since the snapshot."""
        before, self.state = snapshot
        super().restore(before)


class MeanCache(StatefulCache):
    """Keys and values, and for a running mean the sum of all inputs (B, E) and their number (B, 1).

    Both are in float32, or float64 for a float64 cache.
    """

    no_way_back = "a sum cannot give single tokens back"

    def make_sums(self, width: int) -> None:
        """Allocate a sum of that width."""
        buffer = self.buffers[0]
        dtype = torch.promote_types(buffer.dtype, torch.float32)
        sums = torch.zeros(self.batch_size, width, device=buffer.device, dtype=dtype)
        self.state = sums, sums.new_zeros(self.batch_size, 1)

    @property
    def sums(self) -> Tensor:
        """(B, E)."""
        return self.state[0]

    @property
    def counts(self) -> Tensor:
        """(B, 1)."""
        return self.state[1]


class ConvolutionCache(StatefulCache):
    """Keys and values after a convolution, and the last rows of queries, keys and values before it."""

    no_way_back = "a convolution has kept the last inputs only"

    def make_rows(self, rows: int, width: tuple[int, int]) -> None:
        """Allocate so many rows (B, rows, heads, width) of each."""
        self.state = tuple(self.buffers[0].new_zeros(self.batch_size, rows, *width) for _ in range(3))

    def rows_before(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The rows that the convolution needs before these queries, keys and values, which must fit the cache."""
        self._check(new[1:])
        return self.state

    def store_rows(self, *new: Tensor) -> None:
        """Move on to the last rows of queries, keys and values that came after those in the cache."""
        pairs = zip(self.state, new, strict=True)
        self.store(*(torch.cat([held, part], 1)[:, part.shape[1] :] for held, part in pairs))


class RecentCache(StatefulCache):
    """Keys and values, and a state (B, N, ...) of rows for the last tokens, the last row for the last token.

    Attributes:
        known: how many of the rows belong to tokens in the cache.
    """

    known = 0

    def follow(self, *new: Tensor) -> None:
        """Move on to the last rows after new ones (B, T, ...)."""
        rows = self.state[0].shape[1]
        pairs = zip(self.state, new, strict=True)
        self.store(*(torch.cat([held, part], 1)[:, part.shape[1] :] for held, part in pairs))
        self.known = min(rows, self.known + new[0].shape[1])

    def take_back(self, tokens: int) -> None:
        """Forget the rows of so many last tokens."""
        self.state = tuple(
            torch.cat([torch.zeros_like(part[:, :tokens]), part[:, : max(0, part.shape[1] - tokens)]], 1)
            for part in self.state
        )
        self.known = max(0, self.known - tokens)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        super().reset()
        self.known = 0

    def take(self, other: Any) -> None:
        """As `TokenCache.take`, with the rows."""
        super().take(other)
        self.known = other.known

    def snapshot(self, tokens: int) -> Any:
        """As `TokenCache.snapshot`, with the rows."""
        return super().snapshot(tokens), self.known

    def restore(self, snapshot: Any) -> None:
        """Take back what was appended since the snapshot."""
        before, self.known = snapshot
        super().restore(before)


class ForgettingCache(RecentCache):
    """Keys, values and cumulated log gates (B, H, S, 1), and the last keys and values before a token shift.

    The gates are in float32, or float64 for a float64 cache. A module without gates stores none, one without a shift
    keeps no rows.
    """

    ROWS = 16
    precise = (2,)

    def append(self, *states: Tensor) -> tuple[Any, ...]:
        """Store k (B, T, G, D), v (B, T, G, Dv) and gates (B, T, H, 1); return those of all tokens and positions."""
        kept, positions = self._append(*states)
        return *kept, positions

    def last_gates(self) -> Tensor:
        """Cumulated gates (B, 1, H) of the last token so far, 0 before the first."""
        gates = self.buffers[2][..., 0]
        if not self.length:
            return torch.zeros_like(gates[:, :, :1]).transpose(1, 2)
        slot = self.length - 1 if self.capacity == self.max_length else self._slot(self.length - 1)
        last = gates[:, :, slot : slot + 1] if isinstance(slot, int) else gates[:, :, slot]
        return last.transpose(1, 2)

    def make_rows(self) -> None:
        """Allocate the last rows (B, ROWS, heads, width) of keys and values."""
        self.state = tuple(
            buffer.new_zeros(self.batch_size, self.ROWS, *width)
            for buffer, width in zip(self.buffers[:2], self._widths[:2], strict=True)
        )

    def check_fits(self, *new: Tensor) -> None:
        """Raise ValueError unless these keys and values fit the cache."""
        self._check(new, 2)

    def last_rows(self) -> tuple[Tensor, ...]:
        """The last key and value before the shift, (B, 1, heads, width)."""
        return tuple(part[:, -1:] for part in self.state)

    def truncate(self, length: int) -> None:
        """As `TokenCache.truncate`; with a token shift not beyond the rows that are kept, unless to 0."""
        check_held(length, self.length)
        back = self.length - length
        if self.state and length and back >= self.known:
            raise ValueError(
                f"length must be 0 or at least {self.length - self.known + 1}: the token shift needs the key and value "
                f"before it, and the last {self.known} are kept, got {length}"
            )
        TokenCache.truncate(self, length)
        if not length:
            self.reset()
        elif self.state and back:
            self.take_back(back)


class LatentCache(TokenCache):
    """Latent attention: latents and rotary keys side by side, (B, 1, S, R + Gr Dr)."""

    def append(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Store latent (B, T, 1, R + Gr Dr); return those of all tokens and their positions."""
        (latent,), positions = self._append(latent)
        return latent, positions


class TiedCache(TokenCache):
    """Grouped-tied attention: the tied state (B, G, S, D) and one rotated key (B, 1, S, Dr) for all heads.

    G D + Dr numbers per token. The non-rotary key is the first Dn features of the tied state, so it is not
    stored.
    """

    @staticmethod
    def stored(*states: Tensor) -> tuple[Tensor, ...]:
        """All but the key, which is part of the value."""
        return states[1:]

    @staticmethod
    def restored(stored: tuple[Tensor, ...], states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """With the key."""
        return stored[0][..., : states[0].shape[-1]], *stored

    def append(self, k: Tensor, v: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Store v (B, T, G, D), whose first features are k (B, T, G, Dn), and k_rope (B, T, 1, Dr)."""
        (v, k_rope), positions = self._append(v, k_rope)
        return v[..., : k.shape[-1]], v, k_rope, positions


class UntiedCache(TokenCache):
    """As TiedCache for a value that no longer starts with the key: G (D + Dn) + Dr numbers per token."""

    def append(self, k: Tensor, v: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Store k (B, T, G, Dn), v (B, T, G, D) and k_rope (B, T, 1, Dr)."""
        (k, v, k_rope), positions = self._append(k, v, k_rope)
        return k, v, k_rope, positions


class ComposedCache(TokenCache):
    """Keys, values, and what belongs to each key in the compositions: G (D + Dv) + P (2 R + 1) H numbers per token."""

    def append(self, *states: Tensor) -> tuple[Tensor | None, ...]:
        """Store the states (B, T, heads, width) of new tokens; return those of all tokens and their positions."""
        kept, positions = self._append(*states)
        return *kept, positions


class FactorCache(TokenCache):
    """Factors of keys and values: (B, Rk, S, H), (B, Rk, S, D) rotated, (B, Rv, S, H) and (B, Rv, S, Dv)."""

    def append(self, *factors: Tensor) -> tuple[Tensor | None, ...]:
        """Store the factors (B, T, rank, width) of new tokens; return those of all tokens and their positions."""
        kept, positions = self._append(*factors)
        return *kept, positions


class RecentQueriesCache(RecentCache):
    """Keys and values, and the rotated queries of the last tokens, (B, rows, H, D).

    A few more than are read are kept, so that as many tokens can be taken back.
    """

    SPARE = 16
    earlier = 0

    @classmethod
    def rows_for(cls, earlier: int) -> int:
        """Rows that are kept where `earlier` are read."""
        return earlier + cls.SPARE if earlier else 0

    def make_rows(self, earlier: int, width: tuple[int, int]) -> None:
        """Allocate, for so many rows that are read."""
        self.earlier = earlier
        self.state = (self.buffers[0].new_zeros(self.batch_size, self.rows_for(earlier), *width),)

    def recent(self) -> Tensor:
        """The queries before the next token, as many of those that are read as there are: (B, L, H, D)."""
        (queries,) = self.state
        return queries[:, queries.shape[1] - min(self.known, self.earlier) :]

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as long as the queries before them are kept."""
        check_held(length, self.length)
        gone = self.length - length
        if length == 0:
            self.reset()
        elif gone:
            if self.earlier and self.known - gone < min(self.earlier, length):
                raise ValueError(
                    f"length must be 0 or at least {self.length - self.known + self.earlier}: queries of earlier "
                    f"tokens are gone, got {length}"
                )
            self.take_back(gone)
            TokenCache.truncate(self, length)


class SelectionCache(RecentCache):
    """Keys and values, and what tokens have taken from each key, (B, N, max_length) in float32 or float64.

    The last row is what all tokens have taken, the row before it what all but the last have, and so on. With a
    threshold, keys and values of which more was taken in all sequences are evicted as places run out, as soon as no
    token that can be taken back needs them; buffers grow when that gives too few places.

    Attributes:
        threshold: what may be taken from a token that stays, or None.
        positions: (S,) indices of the tokens that are held, or None: all.
    """

    ROWS = 16
    """Tokens that can be taken back."""
    PLACES = 64
    """Tokens that a cache which evicts has places for at first."""
    threshold: float | None = None
    positions: Tensor | None = None

    def make_sums(self, threshold: float | None = None) -> None:
        """Allocate the sums, and with a threshold buffers that grow."""
        buffer = self.buffers[0]
        dtype = torch.promote_types(buffer.dtype, torch.float32)
        shape = self.batch_size, self.ROWS + 1, self.max_length
        self.state = (torch.zeros(shape, device=buffer.device, dtype=dtype),)
        if threshold is not None:
            self.threshold = threshold
            self._hold(torch.arange(0, device=buffer.device), min(self.PLACES, self.max_length))

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `KeyValueCache.append`, of the tokens that are left."""
        if self.positions is None:
            return super().append(k, v)
        tokens = self._check((k, v))
        self.check_length(tokens)
        places = self._free(tokens)
        new = torch.arange(self.length, self.length + tokens, device=k.device)
        self.positions = torch.cat([self.positions, new])
        for rows, state in zip(self._rows, (k, v), strict=True):
            rows.narrow(1, places, tokens).copy_(state.detach())
        self.length += tokens
        key, value = (rows.narrow(1, 0, places + tokens) for rows in self._rows)
        return key, value, self.positions

    def _free(self, tokens: int) -> int:
        """Make places for new tokens, and return how many are taken."""
        assert self.positions is not None
        places = self.positions.shape[0]
        if places + tokens <= self.buffers[0].shape[2]:
            return places
        left = torch.arange(places, device=self.positions.device)
        if not is_traced():
            # Of the oldest row, so that no token that is taken back finds a key gone.
            oldest = self.state[0][:, 0].index_select(1, self.positions)
            left = left[~(oldest > (self.threshold or 0.0)).all(0)]
        self._hold(left, min(self.max_length, max(2 * left.shape[0], self.PLACES) + tokens))
        return left.shape[0]

    def _hold(self, left: Tensor, capacity: int) -> None:
        """Continue with these positions of the old buffers in new ones of that capacity."""
        buffers = []
        for buffer in self.buffers:
            kept = buffer.index_select(2, left)
            buffers.append(F.pad(kept, (0, 0, 0, capacity - left.shape[0])))
        self.positions = left if self.positions is None else self.positions[left]
        self.buffers, self._rows = tuple(buffers), tuple(buffer.transpose(1, 2) for buffer in buffers)

    def removed(self) -> Tensor:
        """What was taken from each key of the cache, (B, S)."""
        last = self.state[0][:, -1]
        return last[:, : self.length] if self.positions is None else last.index_select(1, self.positions)

    def store_removed(self, removed: Tensor, tokens: int) -> None:
        """Move on by so many tokens that were appended.

        removed (B, n + 1, S) says what was taken from each key after all but the last n of them, ..., and after all.
        """
        if self.positions is None:
            rows = F.pad(removed, (0, self.max_length - removed.shape[2]))
        else:
            rows = removed.new_zeros(*removed.shape[:2], self.max_length).index_copy(2, self.positions, removed)
        held = self.state[0][:, :-1]
        self.store(torch.cat([held, rows], 1)[:, -self.ROWS - 1 :])
        self.known = min(self.ROWS, self.known + tokens)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as long as it is known what was taken before them."""
        check_held(length, self.length)
        back = self.length - length
        if length and back > self.known:
            raise ValueError(
                f"length must be 0 or at least {self.length - self.known}: what earlier tokens had taken is known for "
                f"the last {self.known} alone, got {length}"
            )
        if not length:
            self.reset()
            return
        self.take_back(back)
        if self.positions is not None:
            # The last tokens are never evicted.
            self.positions = self.positions[: self.positions.shape[0] - back]
        TokenCache.truncate(self, length)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        super().reset()
        self.positions = None if self.positions is None else self.positions[:0]

    def take(self, other: Any) -> None:
        """As `TokenCache.take`, with the sums, and buffers that grow as they are."""
        if other.positions is not None:
            self.buffers, self._rows, self.positions = other.buffers, other._rows, other.positions
        super().take(other)
        self.state = (F.pad(other.state[0], (0, self.max_length - other.max_length)),)

    def snapshot(self, tokens: int) -> Any:
        """As `RecentCache.snapshot`, with the buffers, which are replaced."""
        return super().snapshot(tokens), self.buffers, self._rows, self.positions

    def restore(self, snapshot: Any) -> None:
        """Take back what was appended since the snapshot."""
        before, self.buffers, self._rows, self.positions = snapshot
        super().restore(before)
