"""Tile sizes: one table, kernel -> architecture, bytes of an element and width of a head -> configuration.

"hopper" are GPUs with 227 KiB of shared memory for a program, "cuda" all other NVIDIA GPUs from capability 8.0 on, down
to 99 KiB, "hip" AMD's. Every line compiles for sm_80, sm_89, sm_90 and gfx942 within their shared memory;
`benchmarks/aot_resources.py` writes the registers and spills that come out. None has been timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TypeVar

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
# least as wide serves. Chosen by what the compilers report: few instructions for a pair of query and key, few or no
# spilled registers, and on Hopper a warpgroup for every 64 rows, or its products are split and wait for each other.
Widths = dict[int, Config]
Lines = TypeVar("Lines")
TABLE: dict[str, dict[tuple[str, int], Widths]] = {
    "softmax_attention_fwd": {
        ("hopper", 2): {
            64: Config(128, 64, 4, 3), 128: Config(128, 128, 8, 3), 192: Config(128, 128, 8, 2),
            256: Config(128, 64, 8, 2), 320: Config(64, 32, 8, 2),
        },
        ("cuda", 2): {
            64: Config(128, 64, 4, 3), 192: Config(128, 64, 8, 2), 320: Config(64, 32, 4, 2),
        },
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 32, 4, 1), 320: Config(16, 16, 4, 1)},
        ("hip", 2): {64: Config(128, 64, 4, 1), 128: Config(128, 64, 4, 1), 320: Config(64, 32, 4, 1)},
        ("hip", 4): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1), 320: Config(32, 16, 4, 1)},
    },
    "softmax_attention_bwd_dkdv": {
        ("hopper", 2): {
            64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 192: Config(32, 128, 8, 2),
            256: Config(64, 64, 8, 1), 320: Config(32, 64, 8, 1),
        },
        ("cuda", 2): {64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 320: Config(32, 32, 4, 1)},
        ("cuda", 4): {64: Config(16, 32, 4, 1), 128: Config(16, 16, 4, 1), 320: Config(16, 16, 8, 1)},
        ("hip", 2): {64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 320: Config(32, 32, 4, 1)},
        ("hip", 4): {64: Config(32, 32, 4, 1), 128: Config(32, 32, 4, 1), 320: Config(16, 16, 4, 1)},
    },
    "softmax_attention_bwd_dq": {
        ("hopper", 2): {192: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2), 320: Config(64, 32, 4, 2)},
        ("cuda", 2): {
            64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2),
            192: Config(128, 32, 8, 1), 320: Config(32, 32, 4, 1),
        },
        ("cuda", 4): {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 2), 320: Config(16, 16, 4, 2)},
        ("hip", 2): {64: Config(128, 32, 4, 1), 128: Config(128, 32, 4, 1), 320: Config(64, 32, 4, 1)},
        ("hip", 4): {64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1), 320: Config(32, 16, 4, 1)},
    },
}  # fmt: skip

# Several heads a group: a loop around the loop over queries, which takes registers.
TABLE["softmax_attention_bwd_dkdv grouped"] = TABLE["softmax_attention_bwd_dkdv"] | {
    ("hopper", 2): {
        64: Config(64, 128, 8, 2), 192: Config(32, 128, 8, 2), 256: Config(64, 64, 8, 1), 320: Config(32, 64, 8, 1),
    },
}  # fmt: skip
# A tile of a bias or mask takes shared memory for every stage, and its addresses registers.
TABLE["softmax_attention_fwd dense"] = TABLE["softmax_attention_fwd"] | {
    ("hopper", 2): {128: Config(128, 64, 8, 2), 192: Config(128, 32, 8, 2), 320: Config(64, 32, 8, 1)},
    ("cuda", 2): {128: Config(128, 32, 8, 2), 320: Config(64, 32, 8, 1)},
}
TABLE["softmax_attention_bwd_dkdv dense"] = TABLE["softmax_attention_bwd_dkdv"] | {
    ("hopper", 2): {128: Config(32, 128, 8, 1), 320: Config(32, 32, 4, 1)},
    ("cuda", 2): {64: Config(32, 64, 4, 1), 128: Config(64, 64, 8, 1), 320: Config(32, 32, 4, 1)},
}
TABLE["softmax_attention_bwd_dq dense"] = TABLE["softmax_attention_bwd_dq"] | {
    ("hopper", 2): {128: Config(128, 32, 8, 1), 320: Config(32, 32, 4, 1)},
    ("cuda", 2): {128: Config(128, 32, 8, 1), 320: Config(32, 32, 4, 1)},
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


def lines_for(table: dict[tuple[str, int], Lines], dtype: torch.dtype, device: torch.device) -> Lines:
    """A kernel's lines for a device; those of "cuda" where "hopper" has none of its own."""
    key = architecture(device), dtype.itemsize
    return table[key] if key in table else table["cuda", dtype.itemsize]


def config(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of a kernel for heads of that width, padded, in that dtype."""
    chosen = _PINNED.get()
    if chosen is not None:
        return chosen
    lines = lines_for(TABLE[kernel], dtype, device)
    return next(line for widest, line in lines.items() if width <= widest or widest == max(lines))


def padded(width: int) -> int:
    """The tile's side for a head of that width: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(width))
