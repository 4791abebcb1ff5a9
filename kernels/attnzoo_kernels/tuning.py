"""Tile sizes: one table, kernel -> widest head and bytes of an element -> configuration.

Every line compiles for sm_80, sm_90 and gfx942 within their shared memory; `benchmarks/aot_resources.py` writes the
registers and spills that come out. None has been timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Tile of BLOCK_T queries (or rows) by BLOCK_S keys, and how a program is run."""

    BLOCK_T: int
    BLOCK_S: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int | bool]:
        """As keyword arguments of a launch."""
        return {**asdict(self), "enable_fp_fusion": True}


# (widest head after padding, bytes of an element): the first line that is at least as large serves.
TABLE: dict[str, dict[tuple[int, int], Config]] = {
    "softmax_attention_fwd": {
        (64, 2): Config(128, 64, 4, 3),
        (128, 2): Config(128, 64, 8, 3),
        (256, 2): Config(64, 32, 4, 2),
        (64, 4): Config(64, 32, 4, 2),
        (128, 4): Config(64, 32, 8, 2),
        (256, 4): Config(32, 16, 4, 1),
    },
    "softmax_attention_bwd_dkdv": {
        (64, 2): Config(64, 64, 4, 2),
        (128, 2): Config(64, 64, 8, 2),
        (256, 2): Config(32, 32, 4, 1),
        (64, 4): Config(32, 32, 4, 1),
        (128, 4): Config(32, 32, 8, 1),
        (256, 4): Config(16, 16, 4, 1),
    },
    "softmax_attention_bwd_dq": {
        (64, 2): Config(64, 64, 4, 2),
        (128, 2): Config(64, 64, 8, 2),
        (256, 2): Config(32, 32, 4, 1),
        (64, 4): Config(32, 32, 4, 1),
        (128, 4): Config(32, 32, 8, 1),
        (256, 4): Config(16, 16, 4, 1),
    },
}

_PINNED: ContextVar[Config | None] = ContextVar("pinned configuration", default=None)


@contextmanager
def pinned(config: Config) -> Iterator[None]:
    """Every launch within runs with this configuration: for tests and for measuring candidates."""
    token = _PINNED.set(config)
    try:
        yield
    finally:
        _PINNED.reset(token)


def config(kernel: str, width: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel for heads of that width, padded, in that dtype."""
    chosen = _PINNED.get()
    if chosen is not None:
        return chosen
    return next(line for (widest, size), line in TABLE[kernel].items() if width <= widest and dtype.itemsize == size)


def padded(width: int) -> int:
    """The tile's side for a head of that width: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))
