"""Tile sizes of launches: what a configuration is, how the tables are read, how one is pinned.

Every operation's `tuning` holds a `Table` of its kernels. "hopper" means GPUs with 227 KiB of shared memory for a
program, "cuda" all other NVIDIA GPUs from capability 8.0 on, down to 99 KiB, "hip" AMD's. Every line compiles for
sm_80, sm_89, sm_90 and gfx942 within their shared memory; `benchmarks/aot_resources.py` writes the registers and spills
that result. Which lines have been timed on a GPU the tables say.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Tile sizes of a launch, under the names of the kernel's arguments, and how a program is run.

    `config["BLOCK_T"]` is the size of a tile.
    """

    tiles: dict[str, int]
    num_warps: int
    num_stages: int

    def __getitem__(self, tile: str) -> int:
        return self.tiles[tile]

    def at_most(self, **sizes: int) -> Config:
        """With no tile larger than its size here."""
        return replace(self, tiles={name: min(size, sizes.get(name, size)) for name, size in self.tiles.items()})

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch. The default of enable_fp_fusion changes between versions of Triton."""
        return {
            **self.tiles,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# A global, not a context variable: backward kernels are launched by autograd's thread of the device.
_pinned: tuple[Config, str | None] | None = None


@contextmanager
def pinned(config: Config, kernel: str | None = None) -> Iterator[None]:
    """Every launch within has this configuration's tiles, as far as its kernel has them, its warps and its stages.

    With a kernel's name, as in the tables, only that kernel's, in all its variants. It holds in every thread. For tests
    and for measuring candidates.
    """
    global _pinned
    before, _pinned = _pinned, (config, kernel)
    try:
        yield
    finally:
        _pinned = before


def is_pinned() -> bool:
    """Whether a configuration is pinned, for whichever kernel."""
    return _pinned is not None


def or_pinned(config: Config, kernel: str = "") -> Config:
    """The configuration of a kernel, or the one that is pinned for it."""
    if _pinned is None:
        return config
    chosen, only = _pinned
    if only is not None and kernel != only and not kernel.startswith(f"{only} "):
        return config
    tiles = {name: chosen.tiles.get(name, size) for name, size in config.tiles.items()}
    return replace(chosen, tiles=tiles)


# A table's inner keys are one number or a pair of them.
Lines = dict[str, dict[tuple[str, int], dict[Any, tuple[int, ...]]]]


@dataclass(frozen=True)
class Table:
    """kernel -> (architecture, bytes of an element) -> size of a head -> sizes of tiles, num_warps, num_stages.

    A kernel's name may be followed by a variant ("softmax_attention_fwd dense"). An architecture without lines of its
    own uses those of "cuda", or else of "any". The size is one or two numbers, padded, which the
    table's module defines. The first line whose size is at least the call's is used, or else the last one.

    Attributes:
        tiles: names of the kernels' arguments that a line's numbers are for.
        lines: of every kernel.
    """

    tiles: tuple[str, ...]
    lines: Lines

    def config(self, kernel: str, dtype: torch.dtype, device: torch.device, *size: int) -> Config:
        """The configuration of a kernel in that dtype for heads of that size; `pinned` overrides it."""
        lines = self.lines[kernel]
        places = ((name, dtype.itemsize) for name in (architecture(device), "cuda", "any"))
        chosen = lines[next(place for place in places if place in lines)]
        wide_enough = (line for limit, line in chosen.items() if _covers(limit, size))
        *tiles, num_warps, num_stages = next(wide_enough, list(chosen.values())[-1])
        return or_pinned(Config(dict(zip(self.tiles, tiles, strict=True)), num_warps, num_stages), kernel)


def _covers(limit: int | tuple[int, int], size: tuple[int, ...]) -> bool:
    limits = limit if isinstance(limit, tuple) else (limit,)
    return all(most >= own for most, own in zip(limits, size, strict=False))


@lru_cache(maxsize=16)
def device_limits(device: torch.device) -> tuple[int, int, int]:
    """Multiprocessors, bytes of shared memory a program may have, and threads of a warp.

    The interpreter counts as an H100 with one multiprocessor.
    """
    if device.type == "cpu":
        return 1, 227 * 1024, 32
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"], properties["warpSize"]


def architecture(device: torch.device) -> str:
    """The key of the tables: "hip" on AMD GPUs, "hopper" with 227 KiB of shared memory for a program, or "cuda"."""
    _, shared_memory, warp_size = device_limits(device)
    if torch.version.hip or warp_size == 64:
        return "hip"
    return "hopper" if shared_memory >= 227 * 1024 else "cuda"


def cdiv(size: int, block: int) -> int:
    """How many blocks cover the size."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is not below the size."""
    return 1 << max(0, size - 1).bit_length()


def padded(width: int) -> int:
    """The tile's side for that many features, heads or tokens: a power of two that tensor cores take."""
    return max(16, power_of_two(width))


def splits_for(programs: int, keys: int, block_s: int, slots: int) -> int:
    """Into how many parts to cut the keys, from sizes alone: the GPU is never asked and a CUDA graph can hold it.

    As many as fill the slots (programs that the GPU runs at once) without a last, nearly empty round, but none
    shorter than two tiles, below which merging costs more than it hides.
    """
    return max(1, min(slots // max(programs, 1), cdiv(keys, 2 * block_s)))
