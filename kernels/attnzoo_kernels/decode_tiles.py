"""Tile sizes and splits of the decoding kernels, from shapes and the device's limits alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton

from attnzoo_kernels.tuning import Config, padded


def decode_config(
    rows: int,
    key_width: int,
    rest_width: int,
    extra_width: int,
    element_size: int,
    shared_memory: int,
    warp_size: int,
) -> Config:
    """Tile of rows (BLOCK_T) by keys (BLOCK_S) for heads of these widths, within shared_memory bytes.

    rest_width are the value's features that are not the key's, 0 for latent attention. Of the tiles that fit, the
    one with the most keys takes the fewest steps.
    """
    widths = key_width, rest_width, extra_width
    wide = sum(padded(width) for width in widths if width)
    half = element_size == 2
    block_t = min(max(16, triton.next_power_of_2(rows)), 64 if half else 16)
    block_s = 64 if half else 32
    if block_t == 64 and wide > 512 and tile_bytes(Config(64, block_s, 8, 2), *widths, element_size) > shared_memory:
        block_t = 32
    # 128 threads until ptxas spills, at 64 rows of 192 features or 16 of 256 in float32; AMD's four warps are 256.
    num_warps = 4 if warp_size == 64 or (block_t * wide <= 16 * 576 and (half or wide < 256)) else 8
    config = Config(block_t, block_s, num_warps, num_stages=2)
    while config.BLOCK_S > 16 and tile_bytes(config, *widths, element_size) > shared_memory:
        config = replace(config, BLOCK_S=config.BLOCK_S // 2)
    if tile_bytes(config, *widths, element_size) > shared_memory:
        return replace(config, num_stages=1)
    # A third stage keeps more reads in flight, but not at the price of a second program on the multiprocessor.
    deeper = replace(config, num_stages=3)
    return deeper if 2 * tile_bytes(deeper, *widths, element_size) <= shared_memory else config


def tile_bytes(config: Config, key_width: int, rest_width: int, extra_width: int, element_size: int) -> int:
    """Shared memory of a program: its queries, and num_stages tiles of keys and values."""
    scored = sum(padded(w) for w in (key_width, extra_width) if w)
    stored = scored + (padded(rest_width) if rest_width else 0)
    return (config.BLOCK_T * scored + config.num_stages * config.BLOCK_S * stored) * element_size


def splits_for(programs: int, keys: int, block_s: int, slots: int) -> int:
    """Into how many parts to cut the keys, from sizes alone: the GPU is never asked and a CUDA graph can hold it.

    As many as fill the slots (programs that the GPU runs at once) without a last, nearly empty round, but none
    shorter than two tiles, below which merging costs more than it hides.
    """
    return max(1, min(slots // max(programs, 1), -(-keys // (2 * block_s))))


def key_range(
    S: int, T: int, query_start: int, *, causal: bool, window: int | None, sink_tokens: int, ring: bool
) -> tuple[int, int]:
    """First and last + 1 of the keys that any of the T queries can see; all S of a ring, whose order is its own."""
    begin, end = 0, S
    if ring:
        return begin, end
    if causal:
        end = min(end, query_start + T)
    elif window is not None:
        end = min(end, max(query_start + T - 1 + window, sink_tokens))
    if window is not None and not sink_tokens:
        begin = max(begin, query_start - window + 1)
    return min(begin, max(end, 0)), max(end, 0)


def constants(
    D: int, DV: int, DX: int, *, tied: bool, causal: bool, softcap: bool, window: bool, sink_tokens: bool, close: bool,
    config: Config,
) -> dict[str, Any]:  # fmt: skip
    """The constant arguments of `decode_attention_fwd_kernel`."""
    return {
        "D": D, "DV": DV, "DX": DX, "TIED": tied, "CAUSAL": causal, "SOFTCAP": softcap, "WINDOW": window,
        "SINK_TOKENS": sink_tokens, "CLOSE": close, "BLOCK_T": config.BLOCK_T, "BLOCK_S": config.BLOCK_S,
        "BLOCK_D": padded(D), "BLOCK_V": padded(DV - D if tied else DV), "BLOCK_X": padded(DX),
    }  # fmt: skip
