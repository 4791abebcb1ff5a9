"""Tile sizes of the kernels of routed heads.

The size of a head is its width, padded. On Hopper heads of 64 and 128 have been timed, on an H200
(benchmarks/gpu_tune.py). All other lines are chosen by what the compilers report: large tiles within the shared memory
and with few instructions, few or no spilled registers.
"""

from __future__ import annotations

from attnzoo_kernels.tuning import Lines, Table

LINES: Lines = {
    "head_routing_fwd": {
        ("hopper", 2): {128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
        ("cuda", 2): {64: (64, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        ("cuda", 4): {64: (32, 32, 4, 1), 128: (16, 16, 4, 2), 256: (16, 16, 8, 1)},
        ("hip", 2): {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
        ("hip", 4): {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
    },
    "head_routing_bwd_dkdv": {
        ("hopper", 2): {128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
        ("cuda", 2): {64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
        ("cuda", 4): {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        ("hip", 2): {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1)},
        ("hip", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    },
    "head_routing_bwd_dq": {
        ("hopper", 2): {64: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
        ("cuda", 2): {128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        ("cuda", 4): {64: (32, 32, 4, 2), 128: (16, 32, 4, 2), 256: (16, 16, 4, 2)},
        ("hip", 2): {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        ("hip", 4): {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}

TABLE = Table(("BLOCK_T", "BLOCK_S"), LINES)
