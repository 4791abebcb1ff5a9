"""Composed attention, backward for what belongs to queries. Weights are recomputed; no atomics.

With the names of the forward kernels and C = Q_t + K_s, C' = Q'_t + K'_s:

    dw_n = do_n . v_n,   dp = [dw] + C' dw,   delta_j = sum_s p_j dp_j,   da'_j = p_j (dp_j - delta_j)
    da = [da'] + C da',  dq_i = scale sum_s da_i k_i,   dQ_t[i, j] = sum_s a_i da'_j,   dQ'_t[j, n] = sum_s p_j dw_n

delta_j is not do_j . o_j, which holds for sums over a group's heads alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.composed_attention.pieces import (
    compose,
    load_heads,
    load_matrices,
    load_rows,
    mask_scores,
    normalised,
    outer_rows,
    products,
    store_heads,
    store_matrices,
    store_rows,
    transposed,
)
from attnzoo_kernels.softmax_attention.pieces import key_ranges, segment_of


# grid (tiles of T * B * N): one program owns BLOCK_T queries of all heads of a group and walks the keys that they see,
# for delta and for dQ', which needs no delta.
@triton.jit
def composed_attention_bwd_delta_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, mask_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dq_post_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_pre_b, stride_q_pre_t, stride_q_pre_n, stride_k_pre_b, stride_k_pre_s, stride_k_pre_n,
    stride_q_post_b, stride_q_post_t, stride_q_post_n, stride_k_post_b, stride_k_post_s, stride_k_post_n,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_do_b, stride_do_t, stride_do_h,
    stride_dq_post_b, stride_dq_post_t, stride_dq_post_n,
    B, T, S, N, GROUP, VALUE_GROUP, scale, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, MI: tl.constexpr, MJ: tl.constexpr, MV: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, RESIDUAL_PRE: tl.constexpr, RESIDUAL_POST: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SHARED_POST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bn = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b = (bn // N).to(tl.int64)
    n = (bn % N).to(tl.int64)
    t_0 = tile * BLOCK_T
    o_t = t_0 + tl.arange(0, BLOCK_T)
    i = query_start + o_t
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    EXACT: tl.constexpr = PRECISION == "ieee"
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)

    b_q = load_heads(q_ptr + b * stride_q_b, stride_q_t, stride_q_h, n * MI, 1, t_0, T, MI, D, M, BLOCK_T, BLOCK_D)
    b_do = load_heads(
        do_ptr + b * stride_do_b, stride_do_t, stride_do_h, n * MV, 1, t_0, T, MV, DV, M, BLOCK_T, BLOCK_DV
    )
    k_ptr += b * stride_k_b
    v_ptr += b * stride_v_b
    c_q = b_q
    c_q_post = b_q
    if q_pre_ptr is not None:
        q_pre_ptr += b * stride_q_pre_b + n * stride_q_pre_n
        c_q = transposed(load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T))
    if q_post_ptr is not None:
        q_post_ptr += b * stride_q_post_b + n * stride_q_post_n
        c_q_post = load_matrices(q_post_ptr, t_0, T, stride_q_post_t, MJ, MV, M, W, BLOCK_T)
    if k_pre_ptr is not None:
        k_pre_ptr += b * stride_k_pre_b + n * stride_k_pre_n
    if k_post_ptr is not None:
        k_post_ptr += b * stride_k_post_b + n * stride_k_post_n
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + n * MJ * stride_mask_h
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    shift = load_rows(shift_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T, float("inf"))
    norm = shift
    if EXACT:
        norm = load_rows(norm_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
    delta = tl.zeros([BLOCK_T, M], tl.float32)
    total = tl.zeros([BLOCK_T, M], tl.float32)
    dc = tl.zeros([BLOCK_T * M // W, W, W], tl.float32)
    _, _, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE,
        BLOCK_T, BLOCK_S,
    )  # fmt: skip
    for s_0 in range(lo, hi, BLOCK_S):
        o_s = s_0 + tl.arange(0, BLOCK_S)
        b_k = load_heads(k_ptr, stride_k_s, stride_k_g, n * MI, GROUP, s_0, S, MI, D, M, BLOCK_S, BLOCK_D)
        a = products(b_q, b_k, PRECISION) * scale
        c_k = c_q
        if k_pre_ptr is not None:
            c_k = transposed(load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S))
        x = compose(
            a, a.to(b_k.dtype), c_q, c_k, RESIDUAL_PRE, q_pre_ptr is not None, k_pre_ptr is not None, W, PRECISION
        )
        if (s_0 < full_lo) | (s_0 >= full_hi):
            j = o_s
            if positions_ptr is not None:
                j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
            x = mask_scores(
                x, o_t, o_s, i, j, first, last, mask_ptr, stride_mask_h, stride_mask_t, stride_mask_s, T, S, window, MJ,
                CAUSAL, WINDOW, SEGMENT,
            )  # fmt: skip
        p = normalised(x, shift, norm, EXACT)
        b_v = load_heads(v_ptr, stride_v_s, stride_v_g, n * MV, VALUE_GROUP, s_0, S, MV, DV, M, BLOCK_S, BLOCK_DV)
        dw = products(b_do, b_v, PRECISION)
        low = dw.to(b_v.dtype)
        c_k_post = c_q
        if k_post_ptr is not None:
            c_k_post = load_matrices(k_post_ptr, s_0, S, stride_k_post_s, MJ, MV, M, W, BLOCK_S)
        dp = compose(
            dw, low, c_q_post, c_k_post, RESIDUAL_POST, q_post_ptr is not None, k_post_ptr is not None, W, PRECISION
        )
        delta += tl.sum(p * dp, 2)
        if EXACT:
            total += tl.sum(p, 2)
        if dq_post_ptr is not None:
            dc = outer_rows(p.to(b_v.dtype), low, dc, W, PRECISION)
    if EXACT:
        # Weights sum to 1 but for rounding, and delta may be much larger than its differences from dp.
        delta /= tl.where(total > 0, total, 1.0)
    store_rows(delta_ptr, delta, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
    if dq_post_ptr is not None:
        dq_post_ptr += b * stride_dq_post_b + n * stride_dq_post_n
        store_matrices(dq_post_ptr, dc, t_0, T, stride_dq_post_t, tile, SHARED_POST, MJ, MV, M, W, BLOCK_T)


# grid and walk as above, now with delta, for dq and dQ.
@triton.jit
def composed_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, mask_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dq_ptr, dq_pre_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_pre_b, stride_q_pre_t, stride_q_pre_n, stride_k_pre_b, stride_k_pre_s, stride_k_pre_n,
    stride_q_post_b, stride_q_post_t, stride_q_post_n, stride_k_post_b, stride_k_post_s, stride_k_post_n,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_do_b, stride_do_t, stride_do_h,
    stride_dq_pre_b, stride_dq_pre_t, stride_dq_pre_n,
    B, T, S, N, GROUP, VALUE_GROUP, scale, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, MI: tl.constexpr, MJ: tl.constexpr, MV: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, RESIDUAL_PRE: tl.constexpr, RESIDUAL_POST: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SHARED_PRE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bn = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b = (bn // N).to(tl.int64)
    n = (bn % N).to(tl.int64)
    t_0 = tile * BLOCK_T
    o_t = t_0 + tl.arange(0, BLOCK_T)
    i = query_start + o_t
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    EXACT: tl.constexpr = PRECISION == "ieee"
    AGAIN: tl.constexpr = M > 16
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)

    b_q = load_heads(q_ptr + b * stride_q_b, stride_q_t, stride_q_h, n * MI, 1, t_0, T, MI, D, M, BLOCK_T, BLOCK_D)
    b_do = load_heads(
        do_ptr + b * stride_do_b, stride_do_t, stride_do_h, n * MV, 1, t_0, T, MV, DV, M, BLOCK_T, BLOCK_DV
    )
    k_ptr += b * stride_k_b
    v_ptr += b * stride_v_b
    c_q = b_q
    c_q_post = b_q
    if q_pre_ptr is not None:
        q_pre_ptr += b * stride_q_pre_b + n * stride_q_pre_n
        c_q = load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T)
    if q_post_ptr is not None:
        q_post_ptr += b * stride_q_post_b + n * stride_q_post_n
        c_q_post = load_matrices(q_post_ptr, t_0, T, stride_q_post_t, MJ, MV, M, W, BLOCK_T)
    if k_pre_ptr is not None:
        k_pre_ptr += b * stride_k_pre_b + n * stride_k_pre_n
    if k_post_ptr is not None:
        k_post_ptr += b * stride_k_post_b + n * stride_k_post_n
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + n * MJ * stride_mask_h
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    shift = load_rows(shift_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T, float("inf"))
    norm = shift
    if EXACT:
        norm = load_rows(norm_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
    delta = load_rows(delta_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
    dq = tl.zeros([M, BLOCK_T, BLOCK_D], tl.float32)
    dc = tl.zeros([BLOCK_T * M // W, W, W], tl.float32)
    _, _, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE,
        BLOCK_T, BLOCK_S,
    )  # fmt: skip
    for s_0 in range(lo, hi, BLOCK_S):
        o_s = s_0 + tl.arange(0, BLOCK_S)
        b_k = load_heads(k_ptr, stride_k_s, stride_k_g, n * MI, GROUP, s_0, S, MI, D, M, BLOCK_S, BLOCK_D)
        a = products(b_q, b_k, PRECISION) * scale
        low_a = a.to(b_k.dtype)
        now_q = c_q
        now_k = c_q
        c_qt = c_q
        c_kt = c_q
        if q_pre_ptr is not None:
            if AGAIN:
                now_q = load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T, AGAIN)
            c_qt = transposed(now_q)
        if k_pre_ptr is not None:
            now_k = load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S, AGAIN)
            c_kt = transposed(now_k)
        x = compose(a, low_a, c_qt, c_kt, RESIDUAL_PRE, q_pre_ptr is not None, k_pre_ptr is not None, W, PRECISION)
        if (s_0 < full_lo) | (s_0 >= full_hi):
            j = o_s
            if positions_ptr is not None:
                j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
            x = mask_scores(
                x, o_t, o_s, i, j, first, last, mask_ptr, stride_mask_h, stride_mask_t, stride_mask_s, T, S, window, MJ,
                CAUSAL, WINDOW, SEGMENT,
            )  # fmt: skip
        p = normalised(x, shift, norm, EXACT)
        b_v = load_heads(v_ptr, stride_v_s, stride_v_g, n * MV, VALUE_GROUP, s_0, S, MV, DV, M, BLOCK_S, BLOCK_DV)
        dw = products(b_do, b_v, PRECISION)
        c_k_post = c_q
        if k_post_ptr is not None:
            c_k_post = load_matrices(k_post_ptr, s_0, S, stride_k_post_s, MJ, MV, M, W, BLOCK_S)
        dp = compose(
            dw, dw.to(b_v.dtype), c_q_post, c_k_post, RESIDUAL_POST, q_post_ptr is not None, k_post_ptr is not None, W,
            PRECISION,
        )  # fmt: skip
        dx = p * (dp - delta[:, :, None])
        low = dx.to(b_k.dtype)
        if dq_pre_ptr is not None:
            dc = outer_rows(low_a, low, dc, W, PRECISION)
        if AGAIN:
            if q_pre_ptr is not None:
                now_q = load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T, AGAIN)
            if k_pre_ptr is not None:
                now_k = load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S, AGAIN)
        da = compose(dx, low, now_q, now_k, RESIDUAL_PRE, q_pre_ptr is not None, k_pre_ptr is not None, W, PRECISION)
        dq = tl.dot(tl.permute(da.to(b_k.dtype), (1, 0, 2)), b_k, acc=dq, input_precision=PRECISION)
    store_heads(dq_ptr + b * T * N * MI * D, dq * scale, N * MI * D, D, n * MI, t_0, T, MI, D, M, BLOCK_T, BLOCK_D)
    if dq_pre_ptr is not None:
        dq_pre_ptr += b * stride_dq_pre_b + n * stride_dq_pre_n
        store_matrices(dq_pre_ptr, dc, t_0, T, stride_dq_pre_t, tile, SHARED_PRE, MI, MJ, M, W, BLOCK_T)
