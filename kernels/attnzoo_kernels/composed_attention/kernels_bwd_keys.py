"""Composed attention, backward for what belongs to keys: dk, dv and the gradients of the keys' matrices.

dk_i = scale sum_t da_i q_i,   dv_n = sum_t w_n do_n,   dK_s[i, j] = sum_t a_i da'_j,   dK'_s[j, n] = sum_t p_j dw_n
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
    outer_columns,
    products,
    store_heads,
    store_matrices,
    transposed,
)
from attnzoo_kernels.softmax_attention.pieces import query_ranges, segment_of


# grid (tiles of S * B * N): one program owns BLOCK_S keys of all heads of a group and walks the queries that see them.
# dk and dv are stored per query head, so that heads that share a key may belong to several programs.
@triton.jit
def composed_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, mask_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, dk_pre_ptr, dk_post_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_pre_b, stride_q_pre_t, stride_q_pre_n, stride_k_pre_b, stride_k_pre_s, stride_k_pre_n,
    stride_q_post_b, stride_q_post_t, stride_q_post_n, stride_k_post_b, stride_k_post_s, stride_k_post_n,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_do_b, stride_do_t, stride_do_h,
    stride_dk_pre_b, stride_dk_pre_s, stride_dk_pre_n, stride_dk_post_b, stride_dk_post_s, stride_dk_post_n,
    B, T, S, N, GROUP, VALUE_GROUP, scale, window, query_start,
    D: tl.constexpr, DV: tl.constexpr, MI: tl.constexpr, MJ: tl.constexpr, MV: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, RESIDUAL_PRE: tl.constexpr, RESIDUAL_POST: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    tile = tl.program_id(0) % tiles
    bn = tl.program_id(0) // tiles
    b = (bn // N).to(tl.int64)
    n = (bn % N).to(tl.int64)
    s_0 = tile * BLOCK_S
    o_s = s_0 + tl.arange(0, BLOCK_S)
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    EXACT: tl.constexpr = PRECISION == "ieee"
    AGAIN: tl.constexpr = M > 16
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if mask_ptr is not None else 0)

    b_k = load_heads(k_ptr + b * stride_k_b, stride_k_s, stride_k_g, n * MI, GROUP, s_0, S, MI, D, M, BLOCK_S, BLOCK_D)
    b_v = load_heads(
        v_ptr + b * stride_v_b, stride_v_s, stride_v_g, n * MV, VALUE_GROUP, s_0, S, MV, DV, M, BLOCK_S, BLOCK_DV
    )
    q_ptr += b * stride_q_b
    do_ptr += b * stride_do_b
    c_k = b_k
    c_k_post = b_k
    if q_pre_ptr is not None:
        q_pre_ptr += b * stride_q_pre_b + n * stride_q_pre_n
    if q_post_ptr is not None:
        q_post_ptr += b * stride_q_post_b + n * stride_q_post_n
    if k_pre_ptr is not None:
        k_pre_ptr += b * stride_k_pre_b + n * stride_k_pre_n
        c_k = load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S)
    if k_post_ptr is not None:
        k_post_ptr += b * stride_k_post_b + n * stride_k_post_n
        c_k_post = load_matrices(k_post_ptr, s_0, S, stride_k_post_s, MJ, MV, M, W, BLOCK_S)
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + n * MJ * stride_mask_h
    j = o_s
    if positions_ptr is not None:
        j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
    dk = tl.zeros([M, BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([M, BLOCK_S, BLOCK_DV], tl.float32)
    dc = tl.zeros([BLOCK_S * M // W, W, W], tl.float32)
    dc_post = tl.zeros([BLOCK_S * M // W, W, W], tl.float32)
    lo, full_lo, full_hi, hi = query_ranges(
        b, s_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE,
        BLOCK_T, BLOCK_S,
    )  # fmt: skip
    for t_0 in range(lo, hi, BLOCK_T):
        o_t = t_0 + tl.arange(0, BLOCK_T)
        b_q = load_heads(q_ptr, stride_q_t, stride_q_h, n * MI, 1, t_0, T, MI, D, M, BLOCK_T, BLOCK_D)
        a = products(b_q, b_k, PRECISION) * scale
        low_a = a.to(b_k.dtype)
        c_q = c_k
        c_qt = c_k
        c_kt = c_k
        now_k = c_k
        if q_pre_ptr is not None:
            c_q = load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T, AGAIN)
            c_qt = transposed(c_q)
        if k_pre_ptr is not None:
            if AGAIN:
                now_k = load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S, AGAIN)
            c_kt = transposed(now_k)
        x = compose(a, low_a, c_qt, c_kt, RESIDUAL_PRE, q_pre_ptr is not None, k_pre_ptr is not None, W, PRECISION)
        # Keys beyond S have to be hidden too: where several tokens share a product, an overflow would reach others.
        if (t_0 < full_lo) | (t_0 >= full_hi) | (s_0 + BLOCK_S > S):
            first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
            x = mask_scores(
                x, o_t, o_s, query_start + o_t, j, first, last, mask_ptr, stride_mask_h, stride_mask_t, stride_mask_s,
                T, S, window, MJ, CAUSAL, WINDOW, SEGMENT,
            )  # fmt: skip
        shift = load_rows(shift_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T, float("inf"))
        norm = shift
        if EXACT:
            norm = load_rows(norm_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
        p = normalised(x, shift, norm, EXACT)
        low_p = p.to(b_k.dtype)
        c_q_post = c_k
        if q_post_ptr is not None:
            c_q_post = load_matrices(q_post_ptr, t_0, T, stride_q_post_t, MJ, MV, M, W, BLOCK_T)
        now_k_post = c_k_post
        if AGAIN and k_post_ptr is not None:
            now_k_post = load_matrices(k_post_ptr, s_0, S, stride_k_post_s, MJ, MV, M, W, BLOCK_S, AGAIN)
        b_do = load_heads(do_ptr, stride_do_t, stride_do_h, n * MV, 1, t_0, T, MV, DV, M, BLOCK_T, BLOCK_DV)
        if dv_ptr is not None:
            c_q_postt = c_k
            c_k_postt = c_k
            if q_post_ptr is not None:
                c_q_postt = transposed(c_q_post)
            if k_post_ptr is not None:
                c_k_postt = transposed(now_k_post)
            w = compose(
                p, low_p, c_q_postt, c_k_postt, RESIDUAL_POST, q_post_ptr is not None, k_post_ptr is not None, W,
                PRECISION,
            )  # fmt: skip
            dv = tl.dot(tl.permute(w.to(b_v.dtype), (1, 2, 0)), b_do, acc=dv, input_precision=PRECISION)
        if (dk_ptr is not None) or (dk_post_ptr is not None):
            dw = products(b_do, b_v, PRECISION)
            low = dw.to(b_v.dtype)
            if dk_post_ptr is not None:
                dc_post = outer_columns(low_p, low, dc_post, W, PRECISION)
            if dk_ptr is not None:
                dp = compose(
                    dw, low, c_q_post, now_k_post, RESIDUAL_POST, q_post_ptr is not None, k_post_ptr is not None, W,
                    PRECISION,
                )  # fmt: skip
                delta = load_rows(delta_ptr, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
                dx = p * (dp - delta[:, :, None])
                low = dx.to(b_k.dtype)
                if dk_pre_ptr is not None:
                    dc = outer_columns(low_a, low, dc, W, PRECISION)
                if AGAIN:
                    if q_pre_ptr is not None:
                        c_q = load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T, AGAIN)
                    if k_pre_ptr is not None:
                        now_k = load_matrices(k_pre_ptr, s_0, S, stride_k_pre_s, MI, MJ, M, W, BLOCK_S, AGAIN)
                da = compose(
                    dx, low, c_q, now_k, RESIDUAL_PRE, q_pre_ptr is not None, k_pre_ptr is not None, W, PRECISION
                )
                dk = tl.dot(tl.permute(da.to(b_k.dtype), (1, 2, 0)), b_q, acc=dk, input_precision=PRECISION)
    if dk_ptr is not None:
        own_k = dk_ptr + b * S * N * MI * D
        store_heads(own_k, dk * scale, N * MI * D, D, n * MI, s_0, S, MI, D, M, BLOCK_S, BLOCK_D)
    if dv_ptr is not None:
        own_v = dv_ptr + b * S * N * MV * DV
        store_heads(own_v, dv, N * MV * DV, DV, n * MV, s_0, S, MV, DV, M, BLOCK_S, BLOCK_DV)
    if dk_pre_ptr is not None:
        dk_pre_ptr += b * stride_dk_pre_b + n * stride_dk_pre_n
        store_matrices(dk_pre_ptr, dc, s_0, S, stride_dk_pre_s, tile, False, MI, MJ, M, W, BLOCK_S)
    if dk_post_ptr is not None:
        dk_post_ptr += b * stride_dk_post_b + n * stride_dk_post_n
        store_matrices(dk_post_ptr, dc_post, s_0, S, stride_dk_post_s, tile, False, MJ, MV, M, W, BLOCK_S)
