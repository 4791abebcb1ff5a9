"""Softmax attention, forward.

    s_ij = softcap(scale (q_i k_j + q_rope_i k_rope_j)) - slope |i - j| + bias_ij - decay_j, -inf where invisible
    lse_i = log(exp(sink) + sum_j exp(s_ij)),  o_i = head_scale sigmoid(output_gate_i) sum_j exp(s_ij - lse_i) v_j

A query's own decay is the same for all its keys, so no weight depends on it. What the backward pass needs of a row is
`shift_and_norm`, and the output before the gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LENGTHS, LN2, LOG2E, shift_and_norm, softmax_step
from attnzoo_kernels.softmax_attention.pieces import (
    DECAY_WIDTH,
    decay_of_keys,
    decay_of_queries,
    factor_and_unit,
    gate_tile,
    key_ranges,
    pair_scores,
    row_tile,
    segment_of,
    with_decay,
)


@triton.jit
def walk_keys(
    acc, m, l, lo, hi, b_q, b_q_rope, o_t, i, first, last, b, g, h, k_desc, v_desc, features_desc, k_ptr, v_ptr,
    k_rope_ptr,
    features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, mask_ptr, positions_ptr, slope,
    stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s,
    T, S, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The online softmax over key tiles lo, lo + BLOCK_S, ... < hi."""
    FOLD: tl.constexpr = not (SOFTCAP or ALIBI or (bias_ptr is not None))
    factor, unit = factor_and_unit(scale, FOLD)
    for start in range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        b_k = row_tile(k_desc, b, g, k_ptr, stride_k_s, start, S, D, MASKED, BLOCK_S, BLOCK_D)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        if R > 0:
            b_k_rope = row_tile(None, b, g, k_rope_ptr, stride_k_rope_s, start, S, R, True, BLOCK_S, BLOCK_R)
            s = tl.dot(b_q_rope, tl.trans(b_k_rope), acc=s, input_precision=PRECISION)
        if decay_ptr is not None:
            b_decay = decay_of_keys(features_desc, b, h, features_ptr, decay_ptr, start, S, MASKED, BLOCK_S)
            s = with_decay(s, b_decay, c_i, decay_factor, features_ptr is not None, False)
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
        s, _ = pair_scores(
            s, o_t[:, None], o_s[None, :], i[:, None], j[None, :], first[:, None], last[:, None], bias_ptr,
            stride_bias_t, stride_bias_s, mask_ptr, stride_mask_t, stride_mask_s, T, S, factor, softcap, slope, window,
            sink_tokens, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, MASKED,
        )  # fmt: skip
        p, shrink, m, l = softmax_step(s, unit, m, l)
        b_v = row_tile(v_desc, b, g, v_ptr, stride_v_s, start, S, DV, MASKED, BLOCK_S, BLOCK_DV)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc=acc * shrink[:, None], input_precision=PRECISION)
    return acc, m, l


# grid (B * H * tiles of S): what the cumulated gates c of BLOCK_S keys add to products in half precision, c_last - c_j
# over the scale, as DECAY_WIDTH features of a key: three parts, whose sum times a power of two is exact, and zeros.
@triton.jit(do_not_specialize=LENGTHS)
def softmax_attention_decay_kernel(
    decay_ptr, features_ptr, S, factor, BLOCK_S: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    o_s = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    o = tl.arange(0, DECAY_WIDTH)[None, :]
    last = tl.load(decay_ptr + bh * S + S - 1)
    c = tl.load(decay_ptr + bh * S + o_s, mask=o_s < S, other=0.0)
    dtype = features_ptr.dtype.element_ty
    rest = (last - c) * factor
    if dtype == tl.float16:
        rest = tl.clamp(rest, -65504.0, 65504.0)
    features = tl.zeros([BLOCK_S, DECAY_WIDTH], dtype)
    for part in tl.static_range(3):
        rounded = rest.to(dtype)
        features = tl.where(o == part, rounded[:, None], features)
        rest -= rounded.to(tl.float32)
    at = features_ptr + (bh * S + o_s[:, None]) * DECAY_WIDTH + o
    tl.store(at, features, mask=(o_s < S)[:, None])


# grid (B * H * tiles of T): one program owns BLOCK_T queries of one head and walks the keys that they see from left
# to right with a running max m, denominator l and numerator acc. Scores (T, S), the repeated keys and values of a
# group, and a copy of the shared key for every head never exist. Causal tiles start with the longest.
@triton.jit(do_not_specialize=LENGTHS)
def softmax_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, features_desc, q_rope_ptr, k_rope_ptr, output_gate_ptr, features_ptr,
    decay_ptr, bias_ptr,
    mask_ptr,
    slopes_ptr, sinks_ptr, head_scale_ptr, lengths_ptr, first_ptr, last_ptr, positions_ptr, o_ptr, plain_ptr, lse_ptr,
    shift_ptr, norm_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_rope_b, stride_q_rope_t, stride_q_rope_h, stride_k_rope_b, stride_k_rope_s,
    stride_output_gate_b, stride_output_gate_t, stride_output_gate_h, stride_bias_b, stride_bias_h, stride_bias_t,
    stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_head_scale_b, stride_head_scale_h,
    T, S, H, GROUP, scale, softcap, window, sink_tokens, query_start, decay_factor,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, GATES: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
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
    o_dv = tl.arange(0, BLOCK_DV)
    row = o_t.to(tl.int64)
    i = query_start + o_t
    ALIBI: tl.constexpr = slopes_ptr is not None
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    TENSOR: tl.constexpr = (bias_ptr is not None) or (mask_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if TENSOR else 0)

    q_mask = (o_t < T)[:, None] & (o_d < D)[None, :]
    q_at = b * stride_q_b + h * stride_q_h + row[:, None] * stride_q_t + o_d[None, :]
    b_q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)
    b_q_rope = b_q
    if R > 0:
        o_r = tl.arange(0, BLOCK_R)
        q_rope_mask = (o_t < T)[:, None] & (o_r < R)[None, :]
        b_q_rope = tl.load(
            q_rope_ptr + b * stride_q_rope_b + h * stride_q_rope_h + row[:, None] * stride_q_rope_t + o_r[None, :],
            mask=q_rope_mask,
            other=0.0,
        )
        k_rope_ptr += b * stride_k_rope_b
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    c_i = 0.0
    if decay_ptr is not None:
        decay_ptr += bh.to(tl.int64) * S
        c_i = decay_of_queries(decay_ptr, positions_ptr, i, S)
        if features_ptr is not None:
            features_ptr += bh.to(tl.int64) * S * DECAY_WIDTH
    if bias_ptr is not None:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)

    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    sink_lo, sink_hi, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
        CAUSAL, WINDOW, SINK_TOKENS, DENSE, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    if SINK_TOKENS:
        acc, m, l = walk_keys(
            acc, m, l, sink_lo, sink_hi, b_q, b_q_rope, o_t, i, first, last, b, g, h, k_desc, v_desc, features_desc,
            k_ptr, v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, mask_ptr, positions_ptr,
            slope, stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s,
            T, S, scale, softcap, window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT,
            True, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    if WINDOW or SEGMENT:
        acc, m, l = walk_keys(
            acc, m, l, lo, full_lo, b_q, b_q_rope, o_t, i, first, last, b, g, h, k_desc, v_desc, features_desc, k_ptr,
            v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, mask_ptr, positions_ptr, slope,
            stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s, T, S,
            scale, softcap, window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, True,
            PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    if DENSE == 0:
        acc, m, l = walk_keys(
            acc, m, l, full_lo, full_hi, b_q, b_q_rope, o_t, i, first, last, b, g, h, k_desc, v_desc, features_desc,
            k_ptr, v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, mask_ptr, positions_ptr,
            slope, stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s,
            T, S, scale, softcap, window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT,
            False, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    acc, m, l = walk_keys(
        acc, m, l, full_hi, hi, b_q, b_q_rope, o_t, i, first, last, b, g, h, k_desc, v_desc, features_desc, k_ptr,
        v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, mask_ptr, positions_ptr, slope,
        stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s, T, S,
        scale, softcap, window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, True,
        PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
    )  # fmt: skip

    seen = l > 0
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h) * LOG2E
        m_new = tl.maximum(m, sink)
        shrink = tl.exp2(m - m_new)
        acc = acc * shrink[:, None]
        l = l * shrink + tl.exp2(sink - m_new)
        m = m_new
    shift, norm = shift_and_norm(m, l, PRECISION == "ieee")
    lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * LN2, float("-inf"))
    if decay_ptr is not None:
        if features_ptr is not None:
            c_i = tl.load(decay_ptr + S - 1)
        lse -= c_i
    factor = tl.where(seen, norm, 0.0)
    if head_scale_ptr is not None:
        factor *= tl.load(head_scale_ptr + b * stride_head_scale_b + h * stride_head_scale_h)
    o_at = (b * T + row[:, None]) * H * DV + h * DV + o_dv[None, :]
    o_mask = (o_t < T)[:, None] & (o_dv < DV)[None, :]
    acc = acc * factor[:, None]
    if output_gate_ptr is not None:
        if plain_ptr is not None:
            tl.store(plain_ptr + o_at, acc.to(o_ptr.dtype.element_ty), mask=o_mask)
        acc *= gate_tile(
            output_gate_ptr + b * stride_output_gate_b + h * stride_output_gate_h, stride_output_gate_t, o_t, T, GATES,
            BLOCK_DV,
        )  # fmt: skip
    tl.store(o_ptr + o_at, acc.to(o_ptr.dtype.element_ty), mask=o_mask)
    at = bh.to(tl.int64) * T + o_t
    tl.store(lse_ptr + at, lse, mask=o_t < T)
    tl.store(shift_ptr + at, shift, mask=o_t < T)
    if PRECISION == "ieee":
        tl.store(norm_ptr + at, norm, mask=o_t < T)
