"""Blocks of tokens: where packed documents put them, and how much a block of keys weighs for a block of queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.masks import AttentionMask
from attnzoo.tracing import is_exporting, is_traced


@dataclass(frozen=True)
class Blocks:
    """Where every token of packed rows goes when each document starts a block of its own.

    Attributes:
        slot: (B, T) place of each token in a row of `count` blocks of `size` tokens, padding between documents.
        block: (B, count) number of each block within its document, -1 for an unused one.
        document: (B, count) document of each block.
        size: tokens of a block.
        count: blocks of a row.
    """

    slot: Tensor
    block: Tensor
    document: Tensor
    size: int
    count: int

    def spread(self, x: Tensor) -> Tensor:
        """x (B, T, ...) in its places, (B, count * size, ...), zeros elsewhere."""
        B, T = x.shape[:2]
        whole = x.new_zeros(B, self.count * self.size, *x.shape[2:])
        index = self.slot.view(B, T, *(1,) * (x.ndim - 2)).expand_as(x)
        return whole.scatter(1, index, x)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        index = self.slot.view(*self.slot.shape, *(1,) * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def starts(self) -> Tensor:
        """(B, count + 1): block i of a row holds its tokens starts[i] .. starts[i + 1] - 1, none if it is unused."""
        of_token = (self.slot // self.size).contiguous()
        block = torch.arange(self.count + 1, device=of_token.device).expand(of_token.shape[0], -1).contiguous()
        return torch.searchsorted(of_token, block)


def document_blocks(mask: AttentionMask, batch: int, tokens: int, size: int) -> Blocks:
    """Blocks of packed documents; every document starts a new one."""
    position = mask.positions(batch, tokens)
    assert position is not None
    assert mask.cu_seqlens is not None
    of_token = (position % size == 0).long().cumsum(1) - 1
    if is_traced():
        count = block_count(tokens, size) + mask.cu_seqlens.shape[0]
    else:
        count = int(of_token.max()) + 1 if of_token.numel() else 1
    slot = of_token * size + position % size
    block = position.new_full((batch, count), -1).scatter(1, of_token, position // size)
    document = torch.zeros_like(block).scatter(1, of_token, (position == 0).long().cumsum(1))
    return Blocks(slot, block, document, size, count)


def block_count(tokens: int, size: int) -> int:
    """Blocks that so many tokens take, at least one; in an exported program, whose tokens may vary, one to spare."""
    if is_exporting():
        return (tokens + 2 * size - 1) // size  # two or more: a program cannot leave open whether a size is 1
    return -(-tokens // size) or 1


def block_weights(mixing: Tensor, blocks: Blocks | None = None) -> Tensor:
    """Weights of block pairs (1 or B, 1 or H, n, n) from mixing (n, n) or (H, n, n); 0 across documents."""
    mixing = mixing if mixing.ndim == 3 else mixing[None]
    if blocks is None:
        return mixing[None]
    at = blocks.block.clamp(min=0)
    chosen = mixing[:, at[:, :, None], at[:, None, :]].transpose(0, 1)
    same = (blocks.document[:, :, None] == blocks.document[:, None, :]) & (blocks.block >= 0)[:, None, :]
    return chosen * same[:, None]


def pair_weights(
    q: Tensor,
    k: Tensor,
    size: int,
    causal: bool,
    mixing: Tensor | None = None,
    mask: AttentionMask | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """w_ts (1 or B, 1 or H, T, S) by the rules of `linear_attention`."""
    B, T, S = *q.shape[:2], k.shape[1]
    positions = None if mask is None else mask.positions(B, T)
    weights = q.new_ones(1, 1, T, S)
    if mixing is not None:
        place = torch.arange(T, device=q.device) if order is None else order.argsort()
        block = (place[None] if positions is None else positions) // size
        weights = block_weights(mixing)[0][:, block[:, :, None], block[:, None, :]].transpose(0, 1)
    if mask is not None and positions is not None:
        same = AttentionMask(cu_seqlens=mask.cu_seqlens).visible(B, 1, T, S)
        assert same is not None
        weights = weights * same
    return weights.tril() if causal else weights


def check_image(
    grid: tuple[int, int] | None, block_grid: tuple[int, int] | None, *, causal: bool
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Both sizes of an image as integers, or None and None for tokens in a row."""
    if grid is None and block_grid is None:
        return None, None
    if grid is None or block_grid is None or causal:
        raise ValueError(
            f"grid and block_grid must be given together and with causal=False, got {grid}, {block_grid} and "
            f"causal={causal}"
        )
    grid, block_grid = (int(grid[0]), int(grid[1])), (int(block_grid[0]), int(block_grid[1]))
    if min(*grid, *block_grid) < 1 or grid[0] % block_grid[0] or grid[1] % block_grid[1]:
        raise ValueError(f"block_grid must divide grid, got {block_grid} and {grid}")
    return grid, block_grid


def block_sizes(grid: tuple[int, int] | None, block_grid: tuple[int, int] | None) -> tuple[int, tuple[int, ...]]:
    """Tokens of a block, and how many blocks there are along each axis; 64 and 32 for tokens in a row."""
    if grid is None or block_grid is None:
        return 64, (32,)
    return block_grid[0] * block_grid[1], (grid[0] // block_grid[0], grid[1] // block_grid[1])


def raster_order(
    grid: tuple[int, int] | None, block_grid: tuple[int, int] | None, device: torch.device
) -> Tensor | None:
    """Token numbers (gh gw,) of an image block after block; None for tokens in a row."""
    if grid is None or block_grid is None:
        return None
    (gh, gw), (ph, pw) = grid, block_grid
    image = torch.arange(gh * gw, device=device).view(gh // ph, ph, gw // pw, pw)
    return image.transpose(1, 2).flatten()
