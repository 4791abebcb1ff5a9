"""Tile sizes: one table, kernel -> architecture, bytes of an element and width of a head -> configuration.

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


# (architecture, bytes of an element) -> width of a head, with the shared part, after padding: the first line that is at
# least as wide serves. Chosen by what the compilers report: the largest tiles without spilled registers.
Widths = dict[int, Config]
TABLE: dict[str, dict[tuple[str, int], Widths]] = {
    "softmax_attention_fwd": {
        ("cuda", 2): {
            64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 3),
            192: Config(128, 64, 8, 2), 320: Config(64, 32, 8, 2),
        },
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 32, 4, 1), 320: Config(16, 16, 4, 1)},
        ("hip", 2): {64: Config(128, 64, 4, 1), 128: Config(128, 64, 4, 1), 320: Config(64, 32, 4, 1)},
        ("hip", 4): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1), 320: Config(32, 16, 4, 1)},
    },
    "softmax_attention_bwd_dkdv": {
        ("cuda", 2): {
            64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 192: Config(64, 32, 8, 2), 320: Config(32, 32, 8, 1),
        },
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 16, 4, 1), 320: Config(16, 16, 8, 1)},
        ("hip", 2): {64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 320: Config(32, 32, 4, 1)},
        ("hip", 4): {64: Config(32, 32, 4, 1), 128: Config(32, 32, 4, 1), 320: Config(16, 16, 4, 1)},
    },
    # Several heads a group: a loop around the loops over queries, which takes registers.
    "softmax_attention_bwd_dkdv grouped": {
        ("cuda", 2): {
            64: Config(64, 64, 8, 2), 128: Config(64, 32, 8, 2), 192: Config(32, 32, 8, 2), 320: Config(32, 32, 8, 1),
        },
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 16, 4, 1), 320: Config(16, 16, 8, 1)},
        ("hip", 2): {64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 320: Config(32, 32, 4, 1)},
        ("hip", 4): {64: Config(32, 32, 4, 1), 128: Config(32, 32, 4, 1), 320: Config(16, 16, 4, 1)},
    },
    "softmax_attention_bwd_dq": {
        ("cuda", 2): {
            64: Config(64, 64, 4, 2), 128: Config(64, 64, 8, 2), 192: Config(64, 32, 8, 2), 320: Config(32, 32, 8, 1),
        },
        ("cuda", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 320: Config(16, 16, 4, 2)},
        ("hip", 2): {64: Config(128, 32, 4, 1), 128: Config(128, 32, 4, 1), 320: Config(64, 32, 4, 1)},
        ("hip", 4): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1), 320: Config(32, 16, 4, 1)},
    },
}  # fmt: skip

_PINNED: ContextVar[Config | None] = ContextVar("pinned configuration", default=None)


@contextmanager
def pinned(config: Config) -> Iterator[None]:
    """Every launch within runs with this configuration: for tests and for measuring candidates."""
    token = _PINNED.set(config)
    try:
        yield
    finally:
        _PINNED.reset(token)


def architecture() -> str:
    """The key of the table: "hip" on a ROCm build of torch, else "cuda"."""
    return "hip" if torch.version.hip else "cuda"


def config(kernel: str, width: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel for heads of that width, padded, in that dtype."""
    chosen = _PINNED.get()
    if chosen is not None:
        return chosen
    lines = TABLE[kernel][architecture(), dtype.itemsize]
    return next(line for widest, line in lines.items() if width <= widest or widest == max(lines))


def padded(width: int) -> int:
    """The tile's side for a head of that width: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))
