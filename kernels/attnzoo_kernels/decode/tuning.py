"""Tile sizes and splits of the decoding kernels, from shapes and the device's limits alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnzoo_kernels import tuning
from attnzoo_kernels.tuning import Config, or_pinned, padded, power_of_two

HOPPER = 227 * 1024
"""Shared memory of a program there. Heads of 128 have been timed on an H200 (benchmarks/gpu_tune.py): small programs
keep more reads in flight."""


def decode_config(
    rows: int,
    key_width: int,
    rest_width: int,
    rope_width: int,
    element_size: int,
    shared_memory: int,
    warp_size: int,
) -> Config:
    """Tile of rows (BLOCK_T) by keys (BLOCK_S) for heads of these widths, within shared_memory bytes.

    rest_width are the value's features that are not the key's, 0 for latent attention. Of the tiles that fit, the
    one with the most keys takes the fewest steps.
    """
    widths = key_width, rest_width, rope_width
    wide = sum(padded(width) for width in widths if width)
    half = element_size == 2
    block_t = min(max(16, power_of_two(rows)), 64 if half else 16)
    block_s = 64 if half else 32
    if block_t == 64 and wide > 512 and tile_bytes(_config(64, block_s, 8, 2), *widths, element_size) > shared_memory:
        block_t = 32
    if half and block_t == 16 and rest_width > 0 and wide <= 256 and shared_memory >= HOPPER:
        return _config(16, 32, 2, 4)
    # 128 threads until ptxas spills, at 64 rows of 192 features or 16 of 256 in float32; AMD's four warps are 256.
    num_warps = 4 if warp_size == 64 or (block_t * wide <= 16 * 576 and (half or wide < 256)) else 8
    config = _config(block_t, block_s, num_warps, 2)
    while config["BLOCK_S"] > 16 and tile_bytes(config, *widths, element_size) > shared_memory:
        config = config.at_most(BLOCK_S=config["BLOCK_S"] // 2)
    if tile_bytes(config, *widths, element_size) > shared_memory:
        return replace(config, num_stages=1)
    # A third stage keeps more reads in flight, but not at the price of a second program on the multiprocessor.
    deeper = replace(config, num_stages=3)
    return deeper if 2 * tile_bytes(deeper, *widths, element_size) <= shared_memory else config


def _config(block_t: int, block_s: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_T": block_t, "BLOCK_S": block_s}, num_warps, num_stages)


def tile_bytes(config: Config, key_width: int, rest_width: int, rope_width: int, element_size: int) -> int:
    """Shared memory of a program: its queries, and num_stages tiles of keys and values."""
    scored = sum(padded(w) for w in (key_width, rope_width) if w)
    stored = scored + (padded(rest_width) if rest_width else 0)
    return (config["BLOCK_T"] * scored + config.num_stages * config["BLOCK_S"] * stored) * element_size


def config_and_slots(
    kernel: str, rows: int, widths: tuple[int, int, int], element_size: int, device: torch.device
) -> tuple[Config, int]:
    """The configuration of a kernel for sets of so many rows, and how many of its programs the device runs at once."""
    processors, shared_memory, warp_size = tuning.device_limits(device)
    config = or_pinned(decode_config(rows, *widths, element_size, shared_memory, warp_size), kernel)
    resident = 1 if 2 * tile_bytes(config, *widths, element_size) > shared_memory else 2
    return config, processors * resident


def key_range(
    S: int, T: int, query_start: int, *, causal: bool, window: int, sink_tokens: int, ring: bool
) -> tuple[int, int]:
    """First and last + 1 of the keys that any of the T queries can see; all S of a ring, which has its own order.

    A window of 0 is none.
    """
    begin, end = 0, S
    if ring:
        return begin, end
    if causal:
        end = min(end, query_start + T)
    elif window:
        end = min(end, max(query_start + T - 1 + window, sink_tokens))
    if window and not sink_tokens:
        begin = max(begin, query_start - window + 1)
    return min(begin, max(end, 0)), max(end, 0)
