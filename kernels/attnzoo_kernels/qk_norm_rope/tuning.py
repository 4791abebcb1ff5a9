"""Tile sizes of the kernels for head map, norm and rotation; the size of a head is its width, padded."""

from __future__ import annotations

import torch

from attnzoo_kernels.tuning import Config, Lines, Table, padded

# BLOCK_M whole vectors, which spill where they are wide and many, and blocks of hidden and of inner features. A name's
# second part is the head map. Of Hopper's, heads of 128 have been timed, on an H200 (benchmarks/gpu_tune.py).
VECTOR_LINES: Lines = {
    "qk_norm_rope_fwd none": {
        ("hopper", 2): {256: (16, 16, 16, 4, 1)},
        ("any", 2): {128: (32, 16, 16, 4, 1), 256: (16, 16, 16, 4, 1)},
        ("any", 4): {128: (32, 16, 16, 4, 1), 256: (16, 16, 16, 4, 1)},
    },
    "qk_norm_rope_fwd linear": {
        ("any", 2): {128: (128, 16, 64, 8, 2), 256: (64, 16, 64, 8, 2)},
        ("any", 4): {128: (32, 16, 32, 8, 2), 256: (16, 16, 32, 8, 2)},
    },
    "qk_norm_rope_fwd gated": {
        ("any", 2): {128: (128, 64, 64, 8, 2), 256: (64, 64, 64, 8, 2)},
        ("any", 4): {128: (32, 32, 32, 8, 2), 256: (16, 32, 32, 8, 2)},
    },
    "qk_norm_rope_bwd_input none": {
        ("hopper", 2): {128: (16, 16, 16, 2, 1), 256: (16, 16, 16, 4, 1)},
        ("any", 2): {128: (32, 16, 16, 4, 1), 256: (16, 16, 16, 4, 1)},
        ("any", 4): {128: (32, 16, 16, 4, 1), 256: (16, 16, 16, 4, 1)},
    },
    "qk_norm_rope_bwd_input linear": {
        ("any", 2): {128: (64, 16, 64, 8, 1), 256: (32, 16, 64, 8, 1)},
        ("any", 4): {128: (32, 16, 16, 8, 1), 256: (16, 16, 16, 8, 1)},
    },
    "qk_norm_rope_bwd_input gated": {
        ("any", 2): {128: (32, 64, 128, 8, 1), 256: (16, 64, 128, 8, 1)},
        ("any", 4): {128: (16, 32, 32, 8, 1), 256: (8, 32, 32, 8, 1)},
    },
}
# BLOCK_M vectors, and blocks of output, hidden and inner features.
MATRIX_LINES: Lines = {
    "qk_norm_rope_bwd_out linear": {
        ("any", 2): {256: (64, 128, 128, 16, 8, 2)},
        ("any", 4): {256: (32, 64, 64, 16, 8, 1)},
    },
    "qk_norm_rope_bwd_out gated": {
        ("any", 2): {256: (64, 128, 64, 64, 8, 1)},
        ("any", 4): {256: (32, 64, 32, 32, 8, 1)},
    },
    "qk_norm_rope_bwd_hidden gated": {
        ("any", 2): {256: (64, 64, 64, 128, 8, 1)},
        ("any", 4): {256: (32, 32, 32, 64, 8, 1)},
    },
}

VECTORS = Table(("BLOCK_M", "BLOCK_J", "BLOCK_K"), VECTOR_LINES)
MATRICES = Table(("BLOCK_M", "BLOCK_I", "BLOCK_J", "BLOCK_K"), MATRIX_LINES)


def config_for(kernel: str, width: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of a kernel for heads of that width, no block of features larger than the head."""
    side = padded(width)
    table = VECTORS if kernel in VECTORS.lines else MATRICES
    return table.config(kernel, dtype, device, side).at_most(BLOCK_I=side, BLOCK_J=side, BLOCK_K=side)
