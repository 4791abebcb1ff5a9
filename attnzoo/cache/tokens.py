"""Caches that hold states of each token, preallocated and filled in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
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


def writable(buffers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Buffers that can be written outside inference mode too, as copies made in it cannot."""
    with torch.inference_mode(False):
        return tuple([buffer.clone() if buffer.is_inference() else buffer for buffer in buffers])


Snapshot = tuple[int, Tensor | int | None, tuple[Tensor, ...]]
"""Length of a cache, and what the next append will overwrite: slots of the ring, and their states."""


class BufferCache:
    """What all caches share: buffers with the batch first, filled up to a length."""

    batch_size: int
    max_length: int
    length: int
    buffers: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers)

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was, as beam search needs it; index (B,) integers."""
        index = checked_rows(index, self.batch_size)
        for buffer in self.buffers:
            buffer.copy_(buffer.index_select(0, index))

    def check_length(self, tokens: int) -> None:
        """Refuse more tokens than the cache may ever see."""
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {tokens} new tokens exceed its max_length {self.max_length}"
            )


class TokenCache(BufferCache):
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
        # What is made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self.buffers = tuple(
                torch.zeros(
                    batch_size, heads, self.capacity, width, device=device,
                    dtype=precise if i in self.precise else dtype,
                )
                for i, (heads, width) in enumerate(widths)
            )  # fmt: skip
            # As appended and returned; made once, since a view costs as much as a check in every decoding step.
            self._rows = tuple(buffer.transpose(1, 2) for buffer in self.buffers)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which pickle would make tensors of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with torch.inference_mode(False):
            self.buffers = writable(self.buffers)
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

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.length = 0

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

    def append(self, *states: Tensor) -> tuple[Any, ...]:
        """Store the states (B, T, heads, width) of new tokens; return those of all tokens and their positions."""
        kept, positions = self._append(*states)
        return *kept, positions

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

    def check_batch(self, batch: int) -> None:
        """Refuse another number of sequences."""
        if batch != self.batch_size:
            raise ValueError(f"cache was made for states of {self.batch_size} sequences, got {batch}")

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


class StaticContextCache(TokenCache):
    """Keys and values of the static tokens first, and in the prefix form those of the dynamic tokens after them.

    Attributes:
        num_static: static tokens in it.
    """

    num_static = 0

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


class LatentCache(TokenCache):
    """Latent attention: latents and rotary keys side by side, (B, 1, S, R + Gr Dr)."""


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

    def append(self, *states: Tensor) -> tuple[Any, ...]:
        """Store v (B, T, G, D), whose first features are k (B, T, G, Dn), and k_rope (B, T, 1, Dr), given k first."""
        kept, positions = self._append(*self.stored(*states))
        return *self.restored(kept, states), positions


class UntiedCache(TokenCache):
    """As TiedCache, for values that do not start with the keys: G (D + Dn) + Dr numbers per token, the keys first."""


class ComposedCache(TokenCache):
    """Keys, values, and what belongs to each key in the compositions: G (D + Dv) + P (2 R + 1) H numbers per token."""


class FactorCache(TokenCache):
    """Factors of keys and values: (B, Rk, S, H), (B, Rk, S, D) rotated, (B, Rv, S, H) and (B, Rv, S, Dv)."""
