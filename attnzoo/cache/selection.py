"""The cache of selective attention, which can evict keys that later tokens do not need."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.cache.stateful import RecentCache
from attnzoo.cache.tokens import TokenCache, check_held
from attnzoo.tracing import is_traced


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

    def append(self, *states: Tensor) -> tuple[Any, ...]:
        """As `TokenCache.append`, of the tokens that are left."""
        if self.positions is None:
            return super().append(*states)
        tokens = self._check(states)
        self.check_length(tokens)
        places = self._free(tokens)
        new = torch.arange(self.length, self.length + tokens, device=self.positions.device)
        self.positions = torch.cat([self.positions, new])
        for rows, state in zip(self._rows, states, strict=True):
            rows.narrow(1, places, tokens).copy_(state.detach())
        self.length += tokens
        return *(rows.narrow(1, 0, places + tokens) for rows in self._rows), self.positions

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
        self.positions = left if self.positions is None else self.positions[left]
        # What is made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            kept = [buffer.index_select(2, left) for buffer in self.buffers]
            self.buffers = tuple(F.pad(part, (0, 0, 0, capacity - left.shape[0])) for part in kept)
            self._rows = tuple(buffer.transpose(1, 2) for buffer in self.buffers)

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
