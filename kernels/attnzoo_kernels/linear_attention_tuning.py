"""Tile sizes of the linear attention kernels: kernel -> dtype of the call -> sizes.

Every line compiles for sm_80, sm_89, sm_90 and gfx942 without spills and within their shared memory. None has been
timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """How a program is cut and run.

    Attributes:
        tokens: tokens of a tile, of queries and of keys alike.
        inner: widest piece of a width that is summed over.
        outer: widest piece of a width that a program owns.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    tokens: int
    inner: int
    outer: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Of bfloat16; of float16, whose products go through TF32; of float32, exact.
TABLE: dict[str, dict[torch.dtype, Tiles]] = {
    "state": {
        torch.bfloat16: Tiles(64, 64, 128, 4, 2),
        torch.float16: Tiles(64, 64, 64, 4, 1),
        torch.float32: Tiles(32, 32, 64, 4, 1),
    },
    "tile": {
        torch.bfloat16: Tiles(64, 64, 128, 8, 2),
        torch.float16: Tiles(64, 32, 32, 8, 2),
        torch.float32: Tiles(64, 16, 64, 8, 1),
    },
    # Of states, float32 always: blocks of a tile, blocks that are summed over, numbers of a state.
    "mix": {
        torch.bfloat16: Tiles(32, 32, 128, 4, 1),
        torch.float16: Tiles(32, 32, 128, 4, 1),
        torch.float32: Tiles(32, 32, 32, 4, 1),
    },
    # Blocks of a tile, numbers of a state that are summed over, blocks of a tile.
    "pair": {
        torch.bfloat16: Tiles(32, 64, 32, 4, 1),
        torch.float16: Tiles(32, 64, 32, 4, 1),
        torch.float32: Tiles(32, 32, 32, 4, 1),
    },
}

_PINNED: ContextVar[Tiles | None] = ContextVar("pinned tiles", default=None)


@contextmanager
def pinned(tiles: Tiles) -> Iterator[None]:
    """Every launch within is cut like this: for tests and for measuring candidates."""
    token = _PINNED.set(tiles)
    try:
        yield
    finally:
        _PINNED.reset(token)


def tiles(kernel: str, dtype: torch.dtype, *, tokens: int, inner: int, outer: int) -> Tiles:
    """The tiles of a kernel, no larger than the call's sizes need; inner and outer are widths of the call."""
    line = _PINNED.get() or TABLE[kernel][dtype]
    cut = min(line.tokens, side(tokens))
    return replace(
        line,
        tokens=cut,
        inner=min(line.inner, side(inner)),
        outer=min(line.outer, side(outer)),
        # A tile of 16 tokens has no work for more.
        num_warps=line.num_warps if cut > 16 else min(line.num_warps, 4),
    )


def side(size: int) -> int:
    """The least side of a tile for that many: a power of two that tensor cores take."""
    return max(16, 1 << max(0, size - 1).bit_length())
