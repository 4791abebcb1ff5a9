"""Caches of mechanisms without a softmax: sums of keys and values instead of the keys and values."""

from __future__ import annotations

import torch
from torch import Tensor


class StateCache:
    """Running sums of linear attention: S = sum k v^T (B, G, Df, Dv) and z = sum k (B, G, Df), in float32 or float64.

    What it takes does not depend on the number of tokens.

    Attributes:
        length: tokens seen so far.
        max_length: tokens it may ever see.
        streams: S and z.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        shapes: tuple[tuple[int, ...], ...],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 0 or max_length < 1:
            raise ValueError(
                f"batch_size must be at least 0 and max_length at least 1, got {batch_size} and {max_length}"
            )
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        self.streams = tuple(torch.zeros(batch_size, *shape, device=device, dtype=dtype) for shape in shapes)

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return sum(stream.numel() * stream.element_size() for stream in self.streams)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        for stream in self.streams:
            stream.zero_()

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was; index (B,) integers."""
        if index.shape != (self.batch_size,) or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index must hold {self.batch_size} integers, got {index.dtype} of shape {tuple(index.shape)}"
            )
        for stream in self.streams:
            stream.copy_(stream.index_select(0, index))

    def truncate(self, length: int) -> None:
        """Forget everything (length 0) or nothing: a sum does not tell what single tokens brought."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and the {self.length} cached tokens, got {length}")
        if length == 0:
            self.reset()
        elif length != self.length:
            raise ValueError(f"length must be 0 or {self.length}: a state cannot give single tokens back, got {length}")

    def admit(self, batch: int, tokens: int, like: Tensor) -> None:
        """Refuse what does not fit, before anything is stored."""
        stream = self.streams[0]
        if batch != self.batch_size or like.dtype != stream.dtype or like.device != stream.device:
            raise ValueError(
                f"cache was made for states of {self.batch_size} sequences in {stream.dtype} on {stream.device}, got "
                f"{batch} in {like.dtype} on {like.device}"
            )
        if self.length + tokens > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {tokens} new tokens exceed its max_length {self.max_length}"
            )


class BlockStateCache(StateCache):
    """Multi-head linear attention: one S and z for each block, the last one growing, in float32 or float64.

    It grows with the number of blocks, G Df (Dv + 1) numbers each.

    Attributes:
        block_size: tokens of a block.
        streams: S (B, n, G, Df, Dv) and z (B, n, G, Df) of all blocks up to max_length.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        shapes: tuple[tuple[int, ...], ...],
        block_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        blocks = -(-max(max_length, 1) // block_size)
        super().__init__(
            batch_size, max_length, tuple((blocks, *shape) for shape in shapes), device=device, dtype=dtype
        )
        self.block_size = block_size

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on; only whole blocks can be forgotten."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie between 0 and the {self.length} cached tokens, got {length}")
        if length != self.length and length % self.block_size:
            raise ValueError(
                f"length must be {self.length} or a multiple of the block_size {self.block_size}: a state cannot give "
                f"single tokens back, got {length}"
            )
        if length != self.length:
            for stream in self.streams:
                stream[:, length // self.block_size :].zero_()
            self.length = length
