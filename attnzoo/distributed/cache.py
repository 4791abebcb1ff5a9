"""A cache whose tokens are spread over the ranks of a group."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnzoo.distributed.sequence import Shards
from attnzoo.rules import check_options, is_integer


class ShardedCache:
    """The states of this rank's tokens, and their positions in the sequence.

    The first call takes this rank's shard of the prompt; later calls take new tokens, the same on all ranks, of which
    position i is kept by rank i mod P. The order of tokens within a cache does not matter, since keys are rotated when
    they are stored. A window hides tokens and does not free them.

    Attributes:
        layout: what modules it fits.
        length: tokens seen so far, on all ranks.
        max_length: tokens it may ever see.
        inner: the states of this rank's tokens.
    """

    def __init__(
        self, module: Any, batch_size: int, max_length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        check_options(batch_size=batch_size, max_length=max_length)
        if not module.sequence_cache:
            raise ValueError(f"{type(module).__name__} has no cache that is spread over processes")
        self.sp = module.sequence_parallel
        self.layout = module.cache_layout()
        self.max_length, self.length, self.prompt = max_length, 0, 0
        capacity = -(-max_length // self.sp.size)
        self.inner = module.cache_type(batch_size, capacity, module.cache_widths(), device=device, dtype=dtype)
        # What is made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self._positions = torch.zeros(capacity, dtype=torch.long, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedCache:
        """A copy over the same processes: a group of them cannot be copied."""
        copied = copy.copy(self)
        copied.inner = copy.deepcopy(self.inner, memo)
        with torch.inference_mode(False):
            copied._positions = self._positions.clone()
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes that this rank's buffers take."""
        nbytes: int = self.inner.nbytes
        return nbytes

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.length = self.prompt = 0
        self.inner.reset()

    def reorder(self, index: Tensor) -> None:
        """As `TokenCache.reorder`, the same on all ranks."""
        self.inner.reorder(index)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; those of the prompt only all together (length 0)."""
        if is_integer(length) and length == 0:
            self.reset()
        elif not is_integer(length) or not self.prompt <= length <= self.length:
            raise ValueError(
                f"length must be 0 or lie between the prompt's {self.prompt} tokens and {self.length}, got {length}"
            )
        else:
            self.inner.truncate(int((self._positions[: self.inner.length] < length).sum()))
            self.length = length

    def snapshot(self, tokens: int) -> tuple[int, int, int]:  # noqa: ARG002
        """What `restore` needs."""
        return self.length, self.prompt, self.inner.length

    def restore(self, snapshot: tuple[int, int, int]) -> None:
        """Take back what was appended since the snapshot."""
        self.length, self.prompt, self.inner.length = snapshot

    def append(self, shards: Any, *states: Tensor) -> tuple[Any, ...]:
        """Keep this rank's part of new states; return what queries of this call look at here, and its positions."""
        if not isinstance(shards, Shards):
            raise ValueError(
                "cache must be made by init_cache of this module, which is of one process, got one that is spread over "
                "several"
            )
        if self.sp is None or shards.sp.groups != self.sp.groups:  # None: unpickled
            raise ValueError(
                "cache must be made by init_cache after the module was parallelized, got one of another group"
            )
        if shards.tokens > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {shards.tokens - self.length} new tokens exceed its "
                f"max_length {self.max_length}"
            )
        stored = shards.storage.stored(*states)
        if shards.form != "cache":
            self._keep(stored, shards.positions)
            self.length = self.prompt = shards.tokens
            return *states, None
        own = shards.positions % self.sp.size == self.sp.rank
        held = self._keep(tuple(state[:, own] for state in stored), shards.positions[own])
        self.length = shards.tokens
        return *shards.storage.restored(held, states), self._positions[: self.inner.length]

    def _keep(self, states: tuple[Tensor, ...], positions: Tensor) -> tuple[Tensor, ...]:
        before = self.inner.length
        held, _ = self.inner._append(*states)
        self._positions[before : self.inner.length] = positions
        kept: tuple[Tensor, ...] = held
        return kept
