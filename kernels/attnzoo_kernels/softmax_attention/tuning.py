"""Tile sizes of softmax attention.

The size of a head is its width, with the shared part, padded. On Hopper heads of 64 and 128 have been timed, and 128
with a shared part of 64, on an H200 (benchmarks/gpu_tune.py): programs of one warpgroup, of which a multiprocessor runs
several, are faster than those with the fewest instructions. All other lines are chosen by what the compilers report:
few instructions for a pair of query and key, few or no spilled registers, and on Hopper a warpgroup for every 64 rows,
or its products are split and wait for each other.
"""

from __future__ import annotations

from attnzoo_kernels.tuning import Lines, Table

LINES: Lines = {
    "softmax_attention_fwd": {
        ("hopper", 2): {
            128: (64, 64, 4, 3), 192: (128, 64, 8, 3), 256: (128, 64, 8, 2), 320: (64, 32, 8, 2),
        },
        ("cuda", 2): {
            64: (128, 64, 4, 3), 192: (128, 64, 8, 2), 320: (64, 32, 4, 2),
        },
        ("cuda", 4): {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 320: (16, 16, 4, 1)},
        ("hip", 2): {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 320: (64, 32, 4, 1)},
        ("hip", 4): {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 320: (32, 16, 4, 1)},
    },
    "softmax_attention_bwd_dkdv": {
        ("hopper", 2): {
            64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 192: (64, 128, 8, 2),
            256: (64, 64, 8, 1), 320: (32, 64, 8, 1),
        },
        ("cuda", 2): {64: (32, 128, 8, 2), 128: (64, 64, 8, 2), 320: (32, 32, 4, 1)},
        ("cuda", 4): {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 320: (16, 16, 8, 1)},
        ("hip", 2): {64: (64, 64, 4, 1), 128: (64, 64, 4, 1), 320: (32, 32, 4, 1)},
        ("hip", 4): {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 320: (16, 16, 4, 1)},
    },
    "softmax_attention_bwd_dq": {
        ("hopper", 2): {
            128: (128, 64, 8, 3), 192: (64, 32, 4, 3), 256: (128, 32, 8, 2), 320: (64, 32, 4, 2),
        },
        ("cuda", 2): {
            64: (128, 64, 8, 2), 128: (128, 32, 8, 2),
            192: (128, 32, 8, 1), 320: (32, 32, 4, 1),
        },
        ("cuda", 4): {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 320: (16, 16, 4, 2)},
        ("hip", 2): {64: (128, 32, 4, 1), 128: (128, 32, 4, 1), 320: (64, 32, 4, 1)},
        ("hip", 4): {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 320: (32, 16, 4, 1)},
    },
}  # fmt: skip

# Several heads per group: a loop around the loop over queries, which takes registers.
LINES["softmax_attention_bwd_dkdv grouped"] = LINES["softmax_attention_bwd_dkdv"] | {
    ("hopper", 2): {
        64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 192: (32, 128, 8, 2),
        256: (64, 64, 8, 1), 320: (32, 64, 8, 1),
    },
}  # fmt: skip
# The features that carry a decay take shared memory.
LINES["softmax_attention_fwd decay"] = LINES["softmax_attention_fwd"] | {
    ("hopper", 2): {64: (64, 64, 4, 2)} | LINES["softmax_attention_fwd"]["hopper", 2] | {128: (128, 64, 4, 2)},
}
# A tile of a bias or mask takes shared memory for every stage, and its addresses registers.
LINES["softmax_attention_fwd dense"] = LINES["softmax_attention_fwd"] | {
    ("hopper", 2): {128: (128, 64, 8, 2), 192: (128, 32, 8, 2), 320: (64, 32, 8, 1)},
    ("cuda", 2): {128: (128, 32, 8, 2), 320: (64, 32, 8, 1)},
}
LINES["softmax_attention_bwd_dkdv dense"] = LINES["softmax_attention_bwd_dkdv"] | {
    ("hopper", 2): {128: (32, 128, 8, 1), 320: (32, 32, 4, 1)},
    ("cuda", 2): {64: (32, 64, 4, 1), 128: (64, 64, 8, 1), 320: (32, 32, 4, 1)},
}
LINES["softmax_attention_bwd_dq dense"] = LINES["softmax_attention_bwd_dq"] | {
    ("hopper", 2): {128: (128, 32, 8, 1), 320: (32, 32, 4, 1)},
    ("cuda", 2): {128: (128, 32, 8, 1), 320: (32, 32, 4, 1)},
}

TABLE = Table(("BLOCK_T", "BLOCK_S"), LINES)
