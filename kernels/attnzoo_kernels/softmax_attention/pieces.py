"""Softmax attention, the part that forward and backward share: which tiles exist, and a tile's scores."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LOG2E, finish_scores, powers, visible

DECAY_WIDTH = tl.constexpr(16)
"""Features of a key that carry its cumulated gate: three parts, and zeros up to the depth of a matrix product."""


@triton.jit
def segment_of(b, o, n, S, lengths_ptr, first_ptr, last_ptr):
    """Keys that rows o of batch b may see as far as padding and packing go: first <= j < last, int32 like o.

    first_ptr and last_ptr hold (B, n) bounds of packed documents, lengths_ptr (B,) real keys of each row.
    """
    first = o * 0
    last = o * 0 + S
    if first_ptr is not None:
        first = tl.load(first_ptr + b * n + o, mask=o < n, other=0)
        last = tl.load(last_ptr + b * n + o, mask=o < n, other=0)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        # A length counts the tokens of a sequence, and a ring buffer's keys have indices beyond S.
        last = tl.minimum(last, length) if first_ptr is not None else o * 0 + length
    return first, last


@triton.jit
def key_ranges(
    b, t_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Keys that a tile of queries t_0 .. visits: (sink_hi, lo, full_lo, full_hi, hi) and the first sink tile.

    Tiles in [full_lo, full_hi) need no mask, those in [lo, full_lo) and [full_hi, hi) do, and so do the tiles with
    sink tokens before lo, [sink_lo, sink_hi). Everything else is never read. With DENSE (a mask or bias
    tensor, or keys in any order) every tile needs the mask.
    """
    t_1 = tl.minimum(t_0 + BLOCK_T, T)
    i_0 = query_start + t_0
    i_1 = query_start + t_1
    lo = 0
    hi = S
    if DENSE == 2:
        return 0, 0, lo, lo, lo, hi
    start = 0
    if first_ptr is not None:
        start = tl.load(first_ptr + b * T + t_0)
        lo = start
        hi = tl.minimum(hi, tl.load(last_ptr + b * T + t_1 - 1))
    if lengths_ptr is not None:
        hi = tl.minimum(hi, tl.load(lengths_ptr + b))
    if CAUSAL:
        hi = tl.minimum(hi, i_1)
    if WINDOW:
        lo = tl.maximum(lo, i_0 - window + 1)
        if not CAUSAL:
            near = i_1 - 1 + window
            if SINK_TOKENS:
                # Sink tokens may be to the right of the window; a document may begin at any of these queries.
                if first_ptr is not None:
                    near = tl.maximum(near, i_1 - 1 + sink_tokens)
                else:
                    near = tl.maximum(near, sink_tokens)
            hi = tl.minimum(hi, near)
    full_lo = lo
    full_hi = hi
    if CAUSAL:
        full_hi = tl.minimum(full_hi, i_0 + 1)
    if WINDOW:
        full_lo = tl.maximum(full_lo, i_1 - window)
        if not CAUSAL:
            full_hi = tl.minimum(full_hi, i_0 + window)
    if first_ptr is not None:
        full_lo = tl.maximum(full_lo, tl.load(first_ptr + b * T + t_1 - 1))
        full_hi = tl.minimum(full_hi, tl.load(last_ptr + b * T + t_0))
    lo = lo // BLOCK_S * BLOCK_S
    hi = tl.maximum(hi, lo)
    full_lo = (full_lo + BLOCK_S - 1) // BLOCK_S * BLOCK_S
    full_hi = tl.maximum(full_hi, 0) // BLOCK_S * BLOCK_S
    if DENSE:
        full_hi = lo
    none = full_hi <= full_lo
    full_lo = tl.where(none, lo, full_lo)
    full_hi = tl.where(none, lo, full_hi)
    sink_lo = 0
    sink_hi = 0
    if SINK_TOKENS:
        sink_lo = start // BLOCK_S * BLOCK_S
        sink_hi = tl.minimum(start + sink_tokens, lo)
    return sink_lo, sink_hi, lo, full_lo, full_hi, hi


@triton.jit
def query_ranges(
    b, s_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Queries that visit a tile of keys s_0 .., as (lo, full_lo, full_hi, hi); see `key_ranges`."""
    s_1 = tl.minimum(s_0 + BLOCK_S, S)
    lo = 0
    hi = T
    if DENSE == 2:
        return lo, lo, lo, hi
    full_lo = 0
    full_hi = T
    if CAUSAL:
        lo = tl.maximum(lo, s_0 - query_start)
        full_lo = tl.maximum(full_lo, s_1 - 1 - query_start)
    if WINDOW:
        near_hi = tl.minimum(hi, s_1 - 1 + window - query_start)
        near_lo = lo
        if not CAUSAL:
            near_lo = tl.maximum(lo, s_0 - window + 1 - query_start)
            full_lo = tl.maximum(full_lo, s_1 - window - query_start)
        if SINK_TOKENS:
            o_s = s_0 + tl.arange(0, BLOCK_S)
            first = o_s * 0
            if first_ptr is not None:
                first = tl.load(first_ptr + b * T + o_s, mask=o_s < S, other=S)
            sinks = tl.sum((o_s - first < sink_tokens).to(tl.int32), 0) > 0
            near_hi = tl.where(sinks, hi, near_hi)
            near_lo = tl.where(sinks, lo, near_lo)
        hi = near_hi
        lo = near_lo
        full_hi = tl.minimum(full_hi, s_0 + window - query_start)
    if first_ptr is not None:
        lo = tl.maximum(lo, tl.load(first_ptr + b * T + s_0))
        hi = tl.minimum(hi, tl.load(last_ptr + b * T + s_1 - 1))
        full_lo = tl.maximum(full_lo, tl.load(first_ptr + b * T + s_1 - 1))
        full_hi = tl.minimum(full_hi, tl.load(last_ptr + b * T + s_0))
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        hi = tl.where(s_0 >= length, lo, hi)
        full_hi = tl.where(s_1 > length, 0, full_hi)
    lo = lo // BLOCK_T * BLOCK_T
    hi = tl.maximum(hi, lo)
    full_lo = tl.maximum((full_lo + BLOCK_T - 1) // BLOCK_T * BLOCK_T, lo)
    full_hi = tl.maximum(tl.minimum(full_hi, hi), 0) // BLOCK_T * BLOCK_T
    if DENSE:
        full_hi = lo
    none = full_hi <= full_lo
    full_lo = tl.where(none, lo, full_lo)
    full_hi = tl.where(none, lo, full_hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def row_tile(
    desc, b, g, ptr, stride_s, start, S, WIDTH: tl.constexpr, MASKED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys or values start, start + 1, ... of a head, [BLOCK_S, BLOCK], 0 outside.

    With a descriptor of the tensor (B, G, S, WIDTH) hardware computes the addresses, which takes neither instructions
    nor registers; without, ptr is where batch row b and head g begin. Not MASKED: all are keys below S.
    """
    if desc is not None:
        tile = desc.load([b.to(tl.int32), g.to(tl.int32), start, 0]).reshape(BLOCK_S, BLOCK)
    else:
        o_s = start + tl.arange(0, BLOCK_S)[:, None]
        o = tl.arange(0, BLOCK)[None, :]
        at = ptr + o_s.to(tl.int64) * stride_s + o
        if MASKED:
            tile = tl.load(at, mask=(o_s < S) & (o < WIDTH), other=0.0)
        elif WIDTH == BLOCK:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=o < WIDTH, other=0.0)
    return tile


@triton.jit
def decay_of_queries(decay_ptr, positions_ptr, i, S):
    """Cumulated gates c_i of queries with indices i, or others that are the same in every kernel.

    What a row's keys have in common changes no weight: where a query's place among the keys is unknown, c of the last
    key serves as well.
    """
    if positions_ptr is not None:
        i = i * 0 + S
    return tl.load(decay_ptr + tl.minimum(tl.maximum(i, 0), S - 1))


@triton.jit
def decay_of_keys(desc, b, h, features_ptr, decay_ptr, start, S, MASKED: tl.constexpr, BLOCK_S: tl.constexpr):
    """What `with_decay` takes of keys start, start + 1, ...: their features in half precision, or else c_j."""
    if features_ptr is not None:
        b_decay = row_tile(desc, b, h, features_ptr, DECAY_WIDTH, start, S, DECAY_WIDTH, MASKED, BLOCK_S, DECAY_WIDTH)
    else:
        o_s = start + tl.arange(0, BLOCK_S)
        b_decay = tl.load(decay_ptr + o_s, mask=o_s < S, other=0.0)
    return b_decay


@triton.jit
def with_decay(s, b_decay, c_i, decay_factor, FEATURES: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Products s of a tile, [queries, keys] or KEYS_FIRST, plus (c_i - c_j) / scale, up to what a row has in common.

    In half precision the tile b_decay [keys, DECAY_WIDTH] is what `softmax_attention_decay_kernel` wrote: a matrix
    product adds it with a few instructions, where additions would take several for every pair.
    """
    if FEATURES:
        if KEYS_FIRST:
            units = tl.full([b_decay.shape[1], s.shape[1]], decay_factor, b_decay.dtype)
            s = tl.dot(b_decay, units, acc=s)
        else:
            units = tl.full([s.shape[0], b_decay.shape[1]], decay_factor, b_decay.dtype)
            s = tl.dot(units, tl.trans(b_decay), acc=s)
    elif KEYS_FIRST:
        s += (c_i[None, :] - b_decay[:, None]) * decay_factor
    else:
        s += (c_i[:, None] - b_decay[None, :]) * decay_factor
    return s


@triton.jit
def gate_tile(ptr, stride_t, o_t, T, GATES: tl.constexpr, BLOCK: tl.constexpr):
    """Gates of a head's outputs, sigmoids of the logits at ptr: [queries, BLOCK], or [queries, 1] with a single one."""
    o = tl.arange(0, BLOCK if GATES > 1 else 1)[None, :]
    at = ptr + o_t.to(tl.int64)[:, None] * stride_t + o
    x = tl.load(at, mask=(o_t < T)[:, None] & (o < GATES), other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def factor_and_unit(scale, FOLD: tl.constexpr):
    """What products are multiplied by, and then scores: with FOLD the scale is part of the step to base 2."""
    if FOLD:
        return 1.0, scale * LOG2E
    return scale, LOG2E


@triton.jit
def pair_scores(
    s, o_t, o_s, i, j, first, last, bias_ptr, stride_bias_t, stride_bias_s, mask_ptr, stride_mask_t, stride_mask_s,
    T, S, scale, softcap, slope, window, sink_tokens,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products s of a tile -> its scores, -inf where invisible, and the capped scores.

    o_t, o_s count queries and keys, i and j are their indices; all broadcast to s.
    """
    s, capped = finish_scores(s, i, j, scale, softcap, slope, SOFTCAP, ALIBI)
    if MASKED:
        inside = (o_t < T) & (o_s < S)
        if bias_ptr is not None:
            at = o_t.to(tl.int64) * stride_bias_t + o_s.to(tl.int64) * stride_bias_s
            s += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            at = o_t.to(tl.int64) * stride_mask_t + o_s.to(tl.int64) * stride_mask_s
            inside = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        ok = inside & visible(i, j, window, sink_tokens, first, last, CAUSAL, WINDOW, SINK_TOKENS, SEGMENT)
        s = tl.where(ok, s, float("-inf"))
    return s, capped


@triton.jit
def masked_outside(
    s, start, full_lo, full_hi, o_t, o_s, i, j, first, last, T, S, window, sink_tokens,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """What `pair_scores` does with MASKED, without tensors to read, unless the tile is in full_lo .. full_hi.

    For kernels that walk all tiles in one loop: after two of them ptxas lets every product of either wait for the one
    before, and their registers do not fit as well.
    """
    if (start < full_lo) | (start >= full_hi):
        ok = visible(i, j, window, sink_tokens, first, last, CAUSAL, WINDOW, SINK_TOKENS, SEGMENT)
        s = tl.where(ok & (o_t < T) & (o_s < S), s, float("-inf"))
    return s


@triton.jit
def column_weights(s, unit, shift_ptr, norm_ptr, rows, inside, PRECISION: tl.constexpr):
    """Weights of a tile [keys, queries] from what the forward pass kept of its queries; see `shift_and_norm`."""
    shift = tl.load(shift_ptr + rows, mask=inside, other=float("inf"))
    p = powers(s, unit, shift[None, :])
    if PRECISION == "ieee":
        p *= tl.load(norm_ptr + rows, mask=inside, other=0.0)[None, :]
    return p
