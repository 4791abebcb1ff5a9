"""Tile sizes of composed attention, and the sizes of a group that the kernels can hold.

A program holds all M heads of a group: M times the head's width fills its registers, and the M x M matrices of a tile's
tokens its shared memory. The size of a group is its heads and these times the head's width, see `sizes`. A tile of 32
queries reads half as many bytes of keys as one of 16. Two stages where they fit. On Hopper groups of 8 and 16 heads of
64 have been timed, on an H200 (benchmarks/gpu_tune.py): but for the statistics of 8 heads 16 queries are faster.
"""

from __future__ import annotations

import torch

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Lines, Table, padded, power_of_two

LINES: Lines = {
    "composed_attention_fwd_stats": {
        ("hopper", 2): {
            (8, 512): (32, 32, 4, 2), (16, 512): (32, 32, 8, 1), (16, 1024): (16, 32, 8, 2),
            (32, 1024): (16, 32, 8, 1),
        },
        ("cuda", 2): {
            (8, 512): (32, 32, 4, 2), (16, 512): (32, 32, 8, 1), (16, 1024): (32, 32, 8, 2),
            (32, 1024): (16, 32, 8, 1),
        },
        ("cuda", 4): {(16, 512): (16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): (32, 32, 8, 1)},
        ("hip", 4): {(8, 256): (16, 16, 8, 1)},
    },
    "composed_attention_fwd_out": {
        ("hopper", 2): {
            (8, 512): (16, 32, 8, 2), (16, 512): (32, 16, 8, 1), (16, 1024): (16, 32, 8, 2),
            (32, 1024): (16, 16, 8, 1),
        },
        ("cuda", 2): {
            (8, 512): (32, 32, 8, 2), (16, 512): (32, 16, 8, 1), (16, 1024): (32, 16, 8, 2),
            (32, 1024): (16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): (16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): (32, 16, 8, 1)},
        ("hip", 4): {(8, 256): (16, 16, 8, 1)},
    },
    "composed_attention_bwd_delta": {
        ("hopper", 2): {(8, 512): (16, 32, 8, 2), (16, 1024): (16, 16, 8, 2), (32, 1024): (16, 16, 8, 1)},
        ("cuda", 2): {
            (8, 512): (32, 16, 8, 2), (16, 1024): (32, 16, 8, 1), (32, 1024): (16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): (16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): (32, 16, 8, 1)},
        ("hip", 4): {(8, 256): (16, 16, 8, 1)},
    },
    "composed_attention_bwd_dq": {
        ("hopper", 2): {
            (8, 512): (16, 32, 8, 1), (16, 512): (16, 16, 8, 1), (16, 1024): (16, 16, 8, 2),
            (32, 1024): (16, 16, 8, 1),
        },
        ("cuda", 2): {
            (8, 512): (32, 16, 8, 1), (16, 512): (16, 16, 8, 1), (16, 1024): (16, 16, 8, 2),
            (32, 1024): (16, 16, 8, 1),
        },
        ("cuda", 4): {(16, 512): (16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): (16, 16, 8, 1)},
        ("hip", 4): {(8, 256): (16, 16, 8, 1)},
    },
    "composed_attention_bwd_dkdv": {
        ("cuda", 2): {(8, 512): (16, 16, 8, 2), (32, 1024): (16, 16, 8, 1)},
        ("cuda", 4): {(16, 512): (16, 16, 8, 1)},
        ("hip", 2): {(16, 1024): (16, 16, 8, 1)},
        ("hip", 4): {(8, 256): (16, 16, 8, 1)},
    },
}  # fmt: skip

TABLE = Table(("BLOCK_T", "BLOCK_S"), LINES)

# (architecture, bytes of an element) -> most heads of a group, and most heads times width: what compiles within the
# shared memory of a program, 227 KiB of "hopper", 163 KiB of sm_80, 99 KiB of sm_86 and sm_89; AMD's 64 KiB go further.
CAPACITY: dict[tuple[str, int], tuple[int, int]] = {
    ("hopper", 2): (32, 1024), ("hopper", 4): (16, 512),
    ("cuda", 2): (16, 512), ("cuda", 4): (8, 256),
    ("cuda, 99 KiB", 2): (8, 256), ("cuda, 99 KiB", 4): (8, 256),
    ("hip", 2): (16, 1024), ("hip", 4): (8, 256),
}  # fmt: skip


# torch.compile cannot look into a driver; the answer is the same in every call.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def capacity(dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Most heads of a group, and most heads times width, both padded."""
    chip = tuning.architecture(device)
    if chip == "cuda" and tuning.device_limits(device)[1] < 160 * 1024:
        chip = "cuda, 99 KiB"
    return CAPACITY[chip, dtype.itemsize]


def sizes(heads: int, width: int) -> tuple[int, int]:
    """Heads of a group, and these times the head's width, as their tiles are padded."""
    M = power_of_two(heads)
    return M, M * padded(width)


def keys_in_one_launch(heads: int, dtype: torch.dtype) -> bool:
    """Whether one program can hold the gradients of keys and of values at once; else each takes a launch."""
    return dtype.itemsize == 2 and heads <= 16


def splits_of_keys(programs: int, keys: int, device: torch.device) -> int:
    """Into how many parts the keys are cut so that the programs fill the GPU."""
    return tuning.splits_for(programs, keys, 32, tuning.device_limits(device)[0])
