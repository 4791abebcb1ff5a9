"""Tile sizes of composed attention, and the sizes of a group that the kernels have room for.

A program holds all M heads of a group: M times the head's width fills its registers, and the M x M matrices of a tile's
tokens its shared memory. `attnzoo_kernels.aot` tells what every line takes; none has been timed on a GPU yet.
"""

from __future__ import annotations

import torch
import triton

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Config, padded

# (architecture, bytes of an element) -> (most heads of a group, most heads times width), padded: the first line that is
# as large serves. A tile of 32 queries reads half as many bytes of keys as one of 16. Two stages where there is room.
Lines = dict[tuple[int, int], Config]
TABLE: dict[str, dict[tuple[str, int], Lines]] = {
    "composed_attention_fwd_stats": {
        ("cuda", 2): {
            (8, 512): Config(32, 32, 4, 2), (16, 512): Config(32, 32, 8, 1), (16, 1024): Config(32, 32, 8, 2),
            (32, 1024): Config(16, 32, 8, 1),
        },
        ("cuda", 4): {(16, 512): Config(16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): Config(32, 32, 8, 1)},
        ("hip", 4): {(8, 256): Config(16, 16, 8, 1)},
    },
    "composed_attention_fwd_out": {
        ("cuda", 2): {
            (8, 512): Config(32, 32, 8, 2), (16, 512): Config(32, 16, 8, 1), (16, 1024): Config(32, 16, 8, 2),
            (32, 1024): Config(16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): Config(16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): Config(32, 16, 8, 1)},
        ("hip", 4): {(8, 256): Config(16, 16, 8, 1)},
    },
    "composed_attention_bwd_delta": {
        ("cuda", 2): {
            (8, 512): Config(32, 16, 8, 2), (16, 1024): Config(32, 16, 8, 1), (32, 1024): Config(16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): Config(16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): Config(32, 16, 8, 1)},
        ("hip", 4): {(8, 256): Config(16, 16, 8, 1)},
    },
    "composed_attention_bwd_dq": {
        ("cuda", 2): {
            (8, 512): Config(32, 16, 8, 1), (16, 512): Config(16, 16, 8, 1), (16, 1024): Config(16, 16, 8, 2),
            (32, 1024): Config(16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): Config(16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): Config(16, 16, 8, 1)},
        ("hip", 4): {(8, 256): Config(16, 16, 8, 1)},
    },
    "composed_attention_bwd_dkdv": {
        ("cuda", 2): {(8, 512): Config(16, 16, 8, 2), (32, 1024): Config(16, 16, 8, 1)},
        ("cuda", 4): {(16, 512): Config(16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): Config(16, 16, 8, 1)},
        ("hip", 4): {(8, 256): Config(16, 16, 8, 1)},
    },
}  # fmt: skip

# (architecture, bytes of an element) -> most heads of a group, and most heads times width: what compiles within the
# shared memory of a program, 227 KiB of "hopper", 163 KiB of sm_80, 99 KiB of sm_86 and sm_89; AMD's 64 KiB go further.
ROOM: dict[tuple[str, int], tuple[int, int]] = {
    ("hopper", 2): (32, 1024), ("hopper", 4): (16, 512),
    ("cuda", 2): (16, 512), ("cuda", 4): (8, 256),
    ("cuda, 99 KiB", 2): (8, 256), ("cuda, 99 KiB", 4): (8, 256),
    ("hip", 2): (16, 1024), ("hip", 4): (8, 256),
}  # fmt: skip


# For torch.compile, which cannot look into a driver: the answer is the same in every call.
@torch.compiler.assume_constant_result
def room(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Most heads of a group, and most heads times width, both padded."""
    kind = tuning.architecture(device)
    if kind == "cuda" and tuning.device_limits(device)[1] < 160 * 1024:
        kind = "cuda, 99 KiB"
    return ROOM[kind, dtype.itemsize]


def sizes(heads: int, width: int) -> tuple[int, int]:
    """Heads of a group, and these times the head's width, as their tiles are padded."""
    M = int(triton.next_power_of_2(heads))
    return M, M * padded(width)


def config(kernel: str, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of a kernel for groups of so many heads of that width; `tuning.pinned` overrides it."""
    chosen = tuning._PINNED.get()
    if chosen is not None:
        return chosen
    M, state = sizes(heads, width)
    lines = tuning.lines_for(TABLE[kernel], dtype, device)
    return next(line for (most, largest), line in lines.items() if most >= M and largest >= state)


def keys_in_one_launch(heads: int, dtype: torch.dtype) -> bool:
    """Whether one program has room for the gradients of keys and of values at once; else each takes a launch."""
    return dtype.itemsize == 2 and heads <= 16
