"""Composed attention, forward: the scores of all heads at a pair of tokens are mixed, and so are their weights.

    a_i = scale q_i . k_i,   a'_j = [a_j] + sum_i a_i (Q_t + K_s)[i, j],   -inf where invisible
    p_j = softmax_s(a'_j),   w_n = [p_n] + sum_j p_j (Q'_t + K'_s)[j, n],   o_n = sum_s w_n v_n

Q, Q' are matrices of the query, K, K' of the key. Weights of different heads must be normalised before they are mixed,
so there are two sweeps over the keys: the first computes what each row's weights need, the second recomputes scores.
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
    products,
    store_heads,
    store_rows,
    transposed,
)
from attnzoo_kernels.primitives import LOG2E, powers, shift_and_norm
from attnzoo_kernels.softmax_attention.pieces import key_ranges, segment_of


@triton.jit
def split_of(lo, hi, split, splits, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr):
    """The part of the keys lo .. hi that is a split's, in whole tiles."""
    if not SPLIT:
        return lo, hi
    part = tl.cdiv(tl.cdiv(hi - lo, BLOCK_S), splits) * BLOCK_S
    start = lo + split * part
    return start, tl.minimum(start + part, hi)


# grid (tiles of T * B * N * splits): one program owns BLOCK_T queries of all heads of a group and walks the keys that
# they see (or its split of them) with a running maximum and denominator of each head. Scores (T, S) never exist.
@triton.jit
def composed_attention_fwd_stats_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, mask_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, shift_ptr, norm_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_pre_b, stride_q_pre_t, stride_q_pre_n, stride_k_pre_b, stride_k_pre_s, stride_k_pre_n,
    stride_q_post_b, stride_q_post_t, stride_q_post_n, stride_k_post_b, stride_k_post_s, stride_k_post_n,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    B, T, S, N, GROUP, VALUE_GROUP, scale, window, query_start, splits,
    D: tl.constexpr, DV: tl.constexpr, MI: tl.constexpr, MJ: tl.constexpr, MV: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, RESIDUAL_PRE: tl.constexpr, RESIDUAL_POST: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    bn = tl.program_id(0) // tiles // splits
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
    k_ptr += b * stride_k_b
    c_q = b_q
    if q_pre_ptr is not None:
        q_pre_ptr += b * stride_q_pre_b + n * stride_q_pre_n
        c_q = transposed(load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T))
    if k_pre_ptr is not None:
        k_pre_ptr += b * stride_k_pre_b + n * stride_k_pre_n
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + n * MJ * stride_mask_h
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    m = tl.full([BLOCK_T, M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T, M], tl.float32)
    _, _, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE,
        BLOCK_T, BLOCK_S,
    )  # fmt: skip
    start_s, end_s = split_of(lo, hi, split, splits, SPLIT, BLOCK_S)
    for s_0 in range(start_s, end_s, BLOCK_S):
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
        m_new = tl.maximum(m, tl.max(x, 2) * LOG2E)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        l = l * tl.exp2(m - base) + tl.sum(powers(x, LOG2E, base[:, :, None]), 2)
        m = m_new
    if not SPLIT:
        shift, norm = shift_and_norm(m, l, EXACT)
        store_rows(shift_ptr, shift, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
        if EXACT:
            store_rows(norm_ptr, norm, b * N * MJ * T, n * MJ, T, t_0, MJ, M, BLOCK_T)
    else:
        own = (split * B + b) * N * MJ * T
        store_rows(shift_ptr, m, own, n * MJ, T, t_0, MJ, M, BLOCK_T)
        store_rows(norm_ptr, l, own, n * MJ, T, t_0, MJ, M, BLOCK_T)


# grid as above: the same walk with normalised weights, composed once more. With SPLIT every split stores its own
# part of the output, in float32.
@triton.jit
def composed_attention_fwd_out_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, mask_ptr, lengths_ptr, first_ptr, last_ptr,
    positions_ptr, shift_ptr, norm_ptr, o_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_pre_b, stride_q_pre_t, stride_q_pre_n, stride_k_pre_b, stride_k_pre_s, stride_k_pre_n,
    stride_q_post_b, stride_q_post_t, stride_q_post_n, stride_k_post_b, stride_k_post_s, stride_k_post_n,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    B, T, S, N, GROUP, VALUE_GROUP, scale, window, query_start, splits,
    D: tl.constexpr, DV: tl.constexpr, MI: tl.constexpr, MJ: tl.constexpr, MV: tl.constexpr, M: tl.constexpr,
    W: tl.constexpr, RESIDUAL_PRE: tl.constexpr, RESIDUAL_POST: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    bn = tl.program_id(0) // tiles // splits
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
    k_ptr += b * stride_k_b
    v_ptr += b * stride_v_b
    c_q = b_q
    c_q_post = b_q
    if q_pre_ptr is not None:
        q_pre_ptr += b * stride_q_pre_b + n * stride_q_pre_n
        c_q = transposed(load_matrices(q_pre_ptr, t_0, T, stride_q_pre_t, MI, MJ, M, W, BLOCK_T))
    if q_post_ptr is not None:
        q_post_ptr += b * stride_q_post_b + n * stride_q_post_n
        c_q_post = transposed(load_matrices(q_post_ptr, t_0, T, stride_q_post_t, MJ, MV, M, W, BLOCK_T))
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
    acc = tl.zeros([M, BLOCK_T, BLOCK_DV], tl.float32)
    _, _, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, 0, lengths_ptr, first_ptr, last_ptr, CAUSAL, WINDOW, False, DENSE,
        BLOCK_T, BLOCK_S,
    )  # fmt: skip
    start_s, end_s = split_of(lo, hi, split, splits, SPLIT, BLOCK_S)
    for s_0 in range(start_s, end_s, BLOCK_S):
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
        c_k_post = c_q
        if k_post_ptr is not None:
            c_k_post = transposed(load_matrices(k_post_ptr, s_0, S, stride_k_post_s, MJ, MV, M, W, BLOCK_S))
        w = compose(
            p, p.to(b_k.dtype), c_q_post, c_k_post, RESIDUAL_POST, q_post_ptr is not None, k_post_ptr is not None, W,
            PRECISION,
        )  # fmt: skip
        b_v = load_heads(v_ptr, stride_v_s, stride_v_g, n * MV, VALUE_GROUP, s_0, S, MV, DV, M, BLOCK_S, BLOCK_DV)
        acc = tl.dot(tl.permute(w.to(b_v.dtype), (1, 0, 2)), b_v, acc=acc, input_precision=PRECISION)
    own = (split * B + b) * T * N * MV * DV
    store_heads(o_ptr + own, acc, N * MV * DV, DV, n * MV, t_0, T, MV, DV, M, BLOCK_T, BLOCK_DV)
