"""Tile sizes of linear attention; no line spills.

Products of bfloat16 go through tensor cores as they are. Those of float16 are of TF32, whose lines are a variant of
each kernel, and those of float32 exact. Hopper's lines have been timed with states of 128 by 128, on an H200
(benchmarks/gpu_tune.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnzoo_kernels.tuning import Config, Lines, Table, padded

# Tokens of a tile, and the pieces of two widths: BLOCK_A of the one that is summed over, BLOCK_Z of the one that a
# program owns.
OF_TOKENS: Lines = {
    "linear_attention_state": {("any", 2): {0: (64, 64, 128, 4, 2)}, ("any", 4): {0: (32, 32, 64, 4, 1)}},
    "linear_attention_state tf32": {("any", 2): {0: (64, 64, 64, 4, 1)}},
    "linear_attention_sums": {("any", 2): {0: (64, 64, 64, 4, 2)}, ("any", 4): {0: (32, 32, 32, 4, 1)}},
    "linear_attention_sums tf32": {("any", 2): {0: (64, 64, 32, 4, 1)}},
    "linear_attention_tile": {
        ("hopper", 2): {0: (64, 128, 128, 4, 2)},
        ("any", 2): {0: (64, 64, 128, 8, 2)},
        ("any", 4): {0: (64, 16, 64, 8, 1)},
    },
    # With eight warps and two stages Triton 3.6 made a program for Hopper whose results were wrong.
    "linear_attention_tile tf32": {("any", 2): {0: (64, 32, 32, 4, 2)}},
}
# BLOCK_I by BLOCK_J blocks of tokens and BLOCK_E numbers of a state. Up to 128 blocks mix reads a state once.
OF_BLOCKS: Lines = {
    "linear_attention_mix": {
        ("hopper", 2): {0: (128, 32, 64, 4, 2)},
        ("any", 2): {0: (128, 32, 128, 8, 2)},
        ("any", 4): {0: (32, 32, 32, 4, 1)},
    },
    "linear_attention_pair": {("any", 2): {0: (64, 64, 64, 8, 2)}, ("any", 4): {0: (32, 32, 32, 4, 1)}},
}

TOKENS = Table(("BLOCK_T", "BLOCK_A", "BLOCK_Z"), OF_TOKENS)
BLOCKS = Table(("BLOCK_I", "BLOCK_J", "BLOCK_E"), OF_BLOCKS)


def of_tokens(kernel: str, dtype: torch.dtype, device: torch.device, tokens: int, summed: int, owned: int) -> Config:
    """The configuration of a kernel that walks tokens, with no tile larger than the call needs."""
    variant = " tf32" if dtype == torch.float16 else ""
    config = TOKENS.config(kernel + variant, dtype, device)
    return _few_warps(config.at_most(BLOCK_T=padded(tokens), BLOCK_A=padded(summed), BLOCK_Z=padded(owned)), "BLOCK_T")


def of_blocks(kernel: str, dtype: torch.dtype, device: torch.device, blocks: int, numbers: int) -> Config:
    """The same for a kernel that walks blocks of tokens and the numbers of their states."""
    side, config = padded(blocks), BLOCKS.config(kernel, dtype, device)
    return _few_warps(config.at_most(BLOCK_I=side, BLOCK_J=side, BLOCK_E=padded(numbers)), "BLOCK_I")


def _few_warps(config: Config, rows: str) -> Config:
    """A tile of 16 rows has no work for more than four warps."""
    return replace(config, num_warps=min(config.num_warps, 4)) if config[rows] == 16 else config
