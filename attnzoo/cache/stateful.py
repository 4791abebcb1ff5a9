"""Caches of keys and values that hold a state of fixed size beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.cache.tokens import KeyValueCache, TokenCache, check_held, checked_rows


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

    def store_rows(self, *new: Tensor) -> None:
        """Move on by new rows (B, T, ...), of a state that holds the last rows of each."""
        pairs = zip(self.state, new, strict=True)
        self.store(*(torch.cat([held, part], 1)[:, part.shape[1] :] for held, part in pairs))

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
        index = checked_rows(index, self.batch_size)
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


class RecentCache(StatefulCache):
    """Keys and values, and a state (B, N, ...) of rows for the last tokens, the last row for the last token.

    Attributes:
        known: how many of the rows belong to tokens in the cache.
    """

    known = 0

    def follow(self, *new: Tensor) -> None:
        """Move on to the last rows after new ones (B, T, ...)."""
        self.store_rows(*new)
        self.known = min(self.state[0].shape[1], self.known + new[0].shape[1])

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
