"""Sigmoid attention: every pair has a weight of its own, so that nothing is kept of a row and nothing rescaled.

s_ij = softcap(scale q_i k_j) - slope |i - j|,  a_ij = sigmoid(s_ij + bias_i), 0 where invisible
o_i = sum_j a_ij v_j
ds_ij = (do_i v_j) a_ij (1 - a_ij),  times (1 - (capped_ij / softcap)^2) before ALiBi
dv_j = sum_i a_ij do_i,  dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j,  dbias_i = sum_j ds_ij
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LENGTHS, LOG2E, powers
from attnzoo_kernels.softmax_attention.pieces import (
    factor_and_unit,
    key_ranges,
    masked_outside,
    pair_scores,
    query_ranges,
    row_tile,
    segment_of,
)


@triton.jit
def tile_weights(
    s, bias, start, full_lo, full_hi, o_t, o_s, i, j, first, last, mask_ptr, stride_mask_t, stride_mask_s, T, S, scale,
    softcap, slope, window,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
    DENSE: tl.constexpr,
):  # fmt: skip
    """Products s of a tile -> its weights and the capped scores; tiles in full_lo .. full_hi need no mask.

    bias counts in base 2. Indices broadcast to s.
    """
    factor, unit = factor_and_unit(scale, not (SOFTCAP or ALIBI))
    s, capped = pair_scores(
        s, o_t, o_s, i, j, first, last, None, 0, 0, mask_ptr, stride_mask_t, stride_mask_s, T, S, factor, softcap,
        slope, window, 0, CAUSAL, SOFTCAP, ALIBI, WINDOW, False, SEGMENT, DENSE,
    )  # fmt: skip
    if not DENSE:
        s = masked_outside(
            s, start, full_lo, full_hi, o_t, o_s, i, j, first, last, T, S, window, 0, CAUSAL, WINDOW, False, SEGMENT
        )
    # tanh would take one special function instead of two, but is off by more than the weights are with many keys.
    return 1.0 / (1.0 + powers(s, -unit, bias)), capped


@triton.jit
def score_gradient(a, e, capped, softcap, SOFTCAP: tl.constexpr):
    """Gradients of the scores after ALiBi, and of those before the cap, from weights a and gradients e of weights."""
    ds = e * a * (1.0 - a)
    raw = ds
    if SOFTCAP:
        raw = ds * (1.0 - (capped / softcap) * (capped / softcap))
    return ds, raw


# grid (B * H * tiles of T): one program owns BLOCK_T queries of one head and walks the keys that they see. Weights
# (T, S) and the repeated keys and values of a group never exist. Causal tiles start with the longest.
@triton.jit(do_not_specialize=LENGTHS)
def sigmoid_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, bias_ptr, mask_ptr, slopes_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, o_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    T, S, H, GROUP, scale, softcap, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    t_0 = tile * BLOCK_T
    o_t = t_0 + tl.arange(0, BLOCK_T)
    o_dv = tl.arange(0, BLOCK_DV)
    i = query_start + o_t
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)
    b_q = row_tile(None, b, h, q_ptr + b * stride_q_b + h * stride_q_h, stride_q_t, t_0, T, D, True, BLOCK_T, BLOCK_D)
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h)
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    bias_at = bias_ptr + b * stride_bias_b + h * stride_bias_h + o_t.to(tl.int64) * stride_bias_t
    bias = tl.load(bias_at, mask=o_t < T, other=0.0) * LOG2E
    _sink_lo, _sink_hi, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE, BLOCK_T,
        BLOCK_S,
    )  # fmt: skip
    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    for start in range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        b_k = row_tile(k_desc, b, g, k_ptr, stride_k_s, start, S, D, True, BLOCK_S, BLOCK_D)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
        a, _capped = tile_weights(
            s, bias[:, None], start, full_lo, full_hi, o_t[:, None], o_s[None, :], i[:, None], j[None, :],
            first[:, None], last[:, None], mask_ptr, stride_mask_t, stride_mask_s, T, S, scale, softcap, slope, window,
            CAUSAL, SOFTCAP, slopes_ptr is not None, WINDOW, SEGMENT, DENSE > 0,
        )  # fmt: skip
        b_v = row_tile(v_desc, b, g, v_ptr, stride_v_s, start, S, DV, True, BLOCK_S, BLOCK_DV)
        acc = tl.dot(a.to(b_v.dtype), b_v, acc=acc, input_precision=PRECISION)
    o_at = ((b * T + o_t.to(tl.int64)[:, None]) * H + h) * DV + o_dv[None, :]
    tl.store(o_ptr + o_at, acc.to(o_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_dv < DV)[None, :])


# grid (B * G * tiles of S): one program owns BLOCK_S keys of one group and walks the queries that see them, head after
# head, so that a group's gradients are summed in registers. Tiles are [keys, queries].
@triton.jit
def sigmoid_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, slopes_ptr, lengths_ptr, first_ptr, last_ptr, positions_ptr, do_ptr,
    dk_ptr, dv_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    stride_do_b, stride_do_t, stride_do_h,
    T, S, H, GROUP, scale, softcap, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    bg = tl.program_id(0) // tiles
    G = H // GROUP
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    s_0 = tl.program_id(0) % tiles * BLOCK_S
    o_s = s_0 + tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)
    b_k = row_tile(None, b, g, k_ptr + b * stride_k_b + g * stride_k_g, stride_k_s, s_0, S, D, True, BLOCK_S, BLOCK_D)
    own_v = v_ptr + b * stride_v_b + g * stride_v_g
    b_v = row_tile(None, b, g, own_v, stride_v_s, s_0, S, DV, True, BLOCK_S, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    j = o_s
    if positions_ptr is not None:
        j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
    lo, full_lo, full_hi, hi = query_ranges(
        b, s_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE, BLOCK_T,
        BLOCK_S,
    )  # fmt: skip
    for member in range(GROUP):
        h = g * GROUP + member
        slope = 0.0
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + h)
        own_q = q_ptr + b * stride_q_b + h * stride_q_h
        own_do = do_ptr + b * stride_do_b + h * stride_do_h
        own_bias = bias_ptr + b * stride_bias_b + h * stride_bias_h
        own_mask = mask_ptr
        if mask_ptr is not None:
            own_mask = mask_ptr + b * stride_mask_b + h * stride_mask_h
        for start in range(lo, hi, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T)
            i = query_start + o_t
            b_q = row_tile(None, b, h, own_q, stride_q_t, start, T, D, True, BLOCK_T, BLOCK_D)
            s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
            # A weight of a query that is not there meets gradients of 0.
            bias = tl.load(own_bias + o_t.to(tl.int64) * stride_bias_t, mask=o_t < T, other=0.0) * LOG2E
            a, capped = tile_weights(
                s, bias[None, :], start, full_lo, full_hi, o_t[None, :], o_s[:, None], i[None, :], j[:, None],
                first[None, :], last[None, :], own_mask, stride_mask_t, stride_mask_s, T, S, scale, softcap, slope,
                window, CAUSAL, SOFTCAP, slopes_ptr is not None, WINDOW, SEGMENT, DENSE > 0,
            )  # fmt: skip
            b_do = row_tile(None, b, h, own_do, stride_do_t, start, T, DV, True, BLOCK_T, BLOCK_DV)
            b_dv = tl.dot(a.to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
            e = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            _of_bias, ds = score_gradient(a, e, capped, softcap, SOFTCAP)
            b_dk = tl.dot(ds.to(b_q.dtype), b_q, acc=b_dk, input_precision=PRECISION)
    at = (b * S + o_s.to(tl.int64)[:, None]) * G + g
    inside = (o_s < S)[:, None]
    tl.store(dk_ptr + at * D + o_d[None, :], (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=inside & (o_d < D))
    tl.store(dv_ptr + at * DV + o_dv[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=inside & (o_dv < DV))


# grid (B * H * tiles of T): as the forward kernel, one program owns BLOCK_T queries of one head and walks its keys.
@triton.jit
def sigmoid_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, mask_ptr, slopes_ptr, lengths_ptr, first_ptr, last_ptr, positions_ptr, do_ptr,
    dq_ptr, dbias_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    stride_do_b, stride_do_t, stride_do_h,
    T, S, H, GROUP, scale, softcap, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    g = h // GROUP
    t_0 = tile * BLOCK_T
    o_t = t_0 + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    i = query_start + o_t
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)
    b_q = row_tile(None, b, h, q_ptr + b * stride_q_b + h * stride_q_h, stride_q_t, t_0, T, D, True, BLOCK_T, BLOCK_D)
    own_do = do_ptr + b * stride_do_b + h * stride_do_h
    b_do = row_tile(None, b, h, own_do, stride_do_t, t_0, T, DV, True, BLOCK_T, BLOCK_DV)
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h)
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    bias_at = bias_ptr + b * stride_bias_b + h * stride_bias_h + o_t.to(tl.int64) * stride_bias_t
    bias = tl.load(bias_at, mask=o_t < T, other=0.0) * LOG2E
    _sink_lo, _sink_hi, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE, BLOCK_T,
        BLOCK_S,
    )  # fmt: skip
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_T], tl.float32)
    for start in range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        b_k = row_tile(None, b, g, k_ptr, stride_k_s, start, S, D, True, BLOCK_S, BLOCK_D)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
        a, capped = tile_weights(
            s, bias[:, None], start, full_lo, full_hi, o_t[:, None], o_s[None, :], i[:, None], j[None, :],
            first[:, None], last[:, None], mask_ptr, stride_mask_t, stride_mask_s, T, S, scale, softcap, slope, window,
            CAUSAL, SOFTCAP, slopes_ptr is not None, WINDOW, SEGMENT, DENSE > 0,
        )  # fmt: skip
        b_v = row_tile(None, b, g, v_ptr, stride_v_s, start, S, DV, True, BLOCK_S, BLOCK_DV)
        e = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        of_bias, ds = score_gradient(a, e, capped, softcap, SOFTCAP)
        if dbias_ptr is not None:
            dbias += tl.sum(of_bias, 1)
        b_dq = tl.dot(ds.to(b_k.dtype), b_k, acc=b_dq, input_precision=PRECISION)
    at = ((b * T + o_t.to(tl.int64)[:, None]) * H + h) * D + o_d[None, :]
    mask = (o_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(dq_ptr + at, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + bh.to(tl.int64) * T + o_t, dbias, mask=o_t < T)
