"""Caches for decoding: preallocated, filled in place, passed in explicitly.

A cache belongs to one module and one batch of sequences of equal length. No gradient flows through it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TokenCache:
    """Per-token states of the sequences so far; what a mechanism stores there is its subclass's matter.

    Without a window a cache holds `max_length` tokens. With one it is a ring buffer of at most
    window + sink_tokens tokens: the first sink_tokens stay, the others are overwritten when the window has
    passed them.

    Attributes:
        length: tokens seen so far.
        max_length: tokens it may ever see.
        capacity: tokens it holds at most.
        streams: the buffers, each (B, heads, capacity, width).
    """

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
        if batch_size < 0 or max_length < 1:
            raise ValueError(
                f"batch_size must be at least 0 and max_length at least 1, got {batch_size} and {max_length}"
            )
        self.batch_size = batch_size
        self.max_length = max_length
        self.window = window
        self.sink_tokens = sink_tokens
        self.capacity = max_length if window is None else min(max_length, window + sink_tokens)
        self.length = 0
        self._widths = widths
        self.streams = tuple(
            torch.zeros(batch_size, heads, self.capacity, width, device=device, dtype=dtype) for heads, width in widths
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(stream.numel() * stream.element_size() for stream in self.streams)

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.length = 0

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was, as beam search needs it; index (B,) integers."""
        if index.shape != (self.batch_size,) or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index must hold {self.batch_size} integers, got {index.dtype} of shape {tuple(index.shape)}"
            )
        for stream in self.streams:
            stream.copy_(stream.index_select(0, index))

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as speculative decoding needs it.

        A ring buffer that has overwritten tokens which would be visible again cannot go back.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and the {self.length} cached tokens, got {length}")
        if length < self.length and self.length > self.capacity and length > 0:
            raise ValueError(
                f"length must be {self.length}: the ring buffer of {self.capacity} tokens has overwritten "
                f"what {length} tokens would need"
            )
        self.length = length

    def _append(self, *new: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Store new states, each (B, T, heads, width), and return what the new queries may look at.

        Returns the states (B, S, heads, width) and the index of each of the S tokens; None means 0 .. S-1.
        Nothing is stored if anything does not fit.
        """
        tokens = new[0].shape[1]
        for (heads, width), stream, state in zip(self._widths, self.streams, new, strict=True):
            expected = (self.batch_size, tokens, heads, width)
            got = tuple(state.shape)
            if got != expected or state.dtype != stream.dtype or state.device != stream.device:
                raise ValueError(
                    f"cache was made for states (batch, tokens, heads, width) {expected} in {stream.dtype} "
                    f"on {stream.device}, got {got} in {state.dtype} on {state.device}"
                )
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {tokens} new tokens exceed its max_length {self.max_length}"
            )
        states = tuple([state.detach().transpose(1, 2) for state in new])
        if self.capacity == self.max_length:
            return self._append_linear(states, tokens), None
        return self._append_ring(states, tokens)

    def _append_linear(self, states: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
        end = self.length + tokens
        for stream, state in zip(self.streams, states, strict=True):
            stream.narrow(2, self.length, tokens).copy_(state)
        self.length = end
        return tuple([stream.narrow(2, 0, end).transpose(1, 2) for stream in self.streams])

    def _append_ring(self, states: tuple[Tensor, ...], tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
        device = self.streams[0].device
        end = self.length + tokens
        new_positions = torch.arange(self.length, end, device=device)
        old_positions = self._held_positions(self.length, device)
        if tokens == 1:
            slot = self._slots(new_positions)
            for stream, state in zip(self.streams, states, strict=True):
                stream[:, :, slot] = state
            self.length = end
            held = self._held_positions(end, device)
            slots = self._slots(held)
            positions = torch.empty_like(held)
            positions[slots] = held
            return tuple(stream[:, :, : held.shape[0]].transpose(1, 2) for stream in self.streams), positions
        old_slots = self._slots(old_positions)
        seen = tuple(
            torch.cat([stream[:, :, old_slots], state], dim=2).transpose(1, 2)
            for stream, state in zip(self.streams, states, strict=True)
        )
        kept = self._held_positions(end, device)
        kept = kept[kept >= self.length]
        slots = self._slots(kept)
        for stream, state in zip(self.streams, states, strict=True):
            stream[:, :, slots] = state[:, :, kept - self.length]
        self.length = end
        return seen, torch.cat([old_positions, new_positions])

    def _held_positions(self, length: int, device: torch.device) -> Tensor:
        """Ascending positions that a ring holds after `length` tokens."""
        sinks = min(length, self.sink_tokens)
        window = self.capacity - self.sink_tokens
        start = max(self.sink_tokens, length - window)
        return torch.cat([torch.arange(sinks, device=device), torch.arange(start, max(length, start), device=device)])

    def _slots(self, positions: Tensor) -> Tensor:
        """Where in the ring each position lies."""
        window = self.capacity - self.sink_tokens
        ring = self.sink_tokens + (positions - self.sink_tokens) % window
        return torch.where(positions < self.sink_tokens, positions, ring)


class KeyValueCache(TokenCache):
    """Keys (B, G, S, D) after norm and rotation, and values (B, G, S, Dv): G (D + Dv) numbers a token."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k (B, T, G, D) and v (B, T, G, Dv); return all keys, values and their positions."""
        (k, v), positions = self._append(k, v)
        return k, v, positions


class LatentCache(TokenCache):
    """Latent attention: latents and rotary keys side by side, (B, 1, S, R + Gr Dr)."""

    def append(self, latent: Tensor) -> Tensor:
        """Store latent (B, T, 1, R + Gr Dr) and return those of all tokens."""
        (latent,), _ = self._append(latent)
        return latent


class TiedCache(TokenCache):
    """Grouped-tied attention: the tied state (B, G, S, D) and one rotated key (B, 1, S, Dr) for all heads.

    G D + Dr numbers a token. The non-rotary key is the first Dn features of the tied state, so it is not
    stored.
    """

    def append(self, k: Tensor, v: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Store v (B, T, G, D), whose first features are k (B, T, G, Dn), and k_rope (B, T, 1, Dr)."""
        key_width = k.shape[-1]
        (v, k_rope), positions = self._append(v, k_rope)
        return v[..., :key_width], v, k_rope, positions


class UntiedCache(TokenCache):
    """As TiedCache for a value that no longer starts with the key: G (D + Dn) + Dr numbers a token."""

    def append(self, k: Tensor, v: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Store k (B, T, G, Dn), v (B, T, G, D) and k_rope (B, T, 1, Dr)."""
        (k, v, k_rope), positions = self._append(k, v, k_rope)
        return k, v, k_rope, positions
