"""Caches of mechanisms without a softmax: sums of keys and values instead of the keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.cache import BufferCache, CacheLayout, check_held, writable
from attnzoo.rules import check_options


class StateCache(BufferCache):
    """Running sums of linear attention: S = sum k v^T (B, G, Df, Dv) and z = sum k (B, G, Df), in float32 or float64.

    What it takes does not depend on the number of tokens.

    Attributes:
        layout: what modules it fits.
        length: tokens seen so far.
        max_length: tokens it may ever see.
        buffers: S and z.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        layout: CacheLayout,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(batch_size=batch_size, max_length=max_length, device=device, dtype=dtype)
        self.batch_size = batch_size
        self.max_length = max_length
        self.layout = layout
        self.length = 0
        blocks = () if layout.block_size is None else (-(-max_length // layout.block_size),)
        # What is made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            self.buffers = tuple(
                torch.zeros(batch_size, *blocks, *width, device=device, dtype=dtype) for width in layout.widths
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.buffers = writable(self.buffers)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        for buffer in self.buffers:
            buffer.zero_()

    def truncate(self, length: int) -> None:
        """Forget everything (length 0) or nothing: a sum does not tell what single tokens brought."""
        check_held(length, self.length)
        if length == 0:
            self.reset()
        elif length != self.length:
            raise ValueError(f"length must be 0 or {self.length}: a state cannot give single tokens back, got {length}")

    def check_fits(self, batch: int, tokens: int, like: Tensor) -> None:
        """Refuse what does not fit, before anything is stored."""
        buffer = self.buffers[0]
        if batch != self.batch_size or like.dtype != buffer.dtype or like.device != buffer.device:
            raise ValueError(
                f"cache was made for states of {self.batch_size} sequences in {buffer.dtype} on {buffer.device}, got "
                f"{batch} in {like.dtype} on {like.device}"
            )
        self.check_length(tokens)

    def current(self) -> tuple[Tensor, Tensor]:
        """S and z as `attnzoo.ops.linear_attention.linear_attention` continues them."""
        state, sums = self.buffers
        return state, sums

    def store(self, state: Tensor, keys: Tensor) -> None:
        """Move on: to the state S after the new tokens, and by their keys' features (B, T, G, Df)."""
        own_state, sums = self.buffers
        _store_both(own_state, state, sums, keys.detach().sum(1))
        self.length += keys.shape[1]

    def fill(self, state: Tensor, sums: Tensor, tokens: int) -> None:
        """Become the cache of so many tokens: their S, and z (B, G, Df), each of all blocks where there are blocks."""
        for buffer, held in zip(self.buffers, (state, sums), strict=True):
            target = buffer if self.layout.block_size is None else buffer[:, : held.shape[1]]
            target.copy_(held.detach())
        self.length = tokens


def _store_both(own_state: Tensor, state: Tensor, own_sums: Tensor, added: Tensor) -> None:
    """Write S and add to z, or if anything fails neither."""
    before = own_sums.clone()
    try:
        own_sums += added
        own_state.copy_(state.detach())
    except BaseException:
        own_sums.copy_(before)
        raise


class BlockStateCache(StateCache):
    """Multi-head linear attention: one S and z for each block, the last one growing, in float32 or float64.

    It grows with the number of blocks, G Df (Dv + 1) numbers each.

    Attributes:
        block_size: tokens of a block.
        buffers: S (B, n, G, Df, Dv) and z (B, n, G, Df) of all blocks up to max_length.
    """

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        assert self.layout.block_size is not None
        return self.layout.block_size

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; only whole blocks can be forgotten."""
        check_held(length, self.length)
        if length != self.length and length % self.block_size:
            raise ValueError(
                f"length must be {self.length} or a multiple of the block_size {self.block_size}: a state cannot give "
                f"single tokens back, got {length}"
            )
        if length != self.length:
            for buffer in self.buffers:
                buffer[:, length // self.block_size :].zero_()
            self.length = length

    def current(self) -> tuple[Tensor, Tensor]:
        """S and z of every block up to that of the next token."""
        blocks = self.length // self.block_size + 1
        state, sums = self.buffers
        return state[:, :blocks], sums[:, :blocks]

    def store(self, state: Tensor, keys: Tensor) -> None:
        """Move on: to the states S of the blocks that new tokens are in, and by their keys' features (B, T, G, Df)."""
        first, tokens = self.length // self.block_size, keys.shape[1]
        stored = slice(first, first + state.shape[1])
        added = keys.detach()
        if tokens != 1:
            block = torch.arange(self.length, self.length + tokens, device=keys.device) // self.block_size - first
            added = torch.zeros_like(self.buffers[1][:, stored]).index_add_(1, block, added)
        _store_both(self.buffers[0][:, stored], state, self.buffers[1][:, stored], added)
        self.length += tokens
