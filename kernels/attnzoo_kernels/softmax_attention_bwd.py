"""Softmax attention, backward. Weights are recomputed from q, k, v and what is kept of each row; no atomics.

p_ij = exp(s_ij - shift_i) norm_i,  e_ij = do_i v_j,  delta_i = do_i o_i - dlse_i
ds_ij = p_ij (gain e_ij - delta_i),  times (1 - (capped_ij / softcap)^2) before bias and ALiBi
dv_j = sum_i gain p_ij do_i,  dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j
dbias_ij = ds_ij,  dgain = sum_ij p_ij e_ij
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import powers
from attnzoo_kernels.softmax_attention_tiles import (
    column_weights,
    factor_and_unit,
    key_ranges,
    masked_outside,
    pair_scores,
    query_ranges,
    segment_of,
)


# grid (B * H * tiles of T): delta_i = sum over the value width of do_i o_i. Where one key dominates a row, e_ij nearly
# equals delta_i and ds carries all of delta's rounding, so float32 is summed in float64, which the reads hide.
@triton.jit
def softmax_attention_bwd_delta_kernel(
    o_ptr, do_ptr, delta_ptr, stride_ob, stride_ot, stride_oh, stride_dob, stride_dot, stride_doh, T, H,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    o_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_dv = tl.arange(0, BLOCK_DV)
    row = o_t.to(tl.int64)[:, None]
    inside = (o_t < T)[:, None] & (o_dv < DV)[None, :]
    b_o = tl.load(o_ptr + b * stride_ob + h * stride_oh + row * stride_ot + o_dv[None, :], mask=inside, other=0.0)
    b_do = tl.load(do_ptr + b * stride_dob + h * stride_doh + row * stride_dot + o_dv[None, :], mask=inside, other=0.0)
    wide = tl.float64 if o_ptr.dtype.element_ty == tl.float32 else tl.float32
    delta = tl.sum(b_o.to(wide) * b_do.to(wide), 1).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * T + o_t, delta, mask=o_t < T)


@triton.jit
def walk_queries(
    b_dk, b_dv, b_dkx, lo, full_lo, full_hi, hi, b_k, b_v, b_kx, o_s, j, q_ptr, qx_ptr, do_ptr, shift_ptr, norm_ptr,
    delta_ptr, bias_ptr, mask_ptr, first_ptr, last_ptr, lengths_ptr, b, slope, gain,
    stride_qt, stride_qxt, stride_dot, stride_bt, stride_bs, stride_mt, stride_ms,
    T, S, query_start, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds what the queries lo, lo + BLOCK_T, ... < hi of one head bring; tiles are [keys, queries].

    Those in full_lo .. full_hi need no mask, unless DENSE.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    FOLD: tl.constexpr = not (SOFTCAP or ALIBI or (bias_ptr is not None))
    factor, unit = factor_and_unit(scale, FOLD)
    for start in range(lo, hi, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        row = o_t.to(tl.int64)
        inside = o_t < T
        q_mask = inside[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q_ptr + row[:, None] * stride_qt + o_d[None, :], mask=q_mask, other=0.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
        b_qx = b_q
        if R > 0:
            o_r = tl.arange(0, BLOCK_R)
            qx_mask = inside[:, None] & (o_r < R)[None, :]
            b_qx = tl.load(qx_ptr + row[:, None] * stride_qxt + o_r[None, :], mask=qx_mask, other=0.0)
            s = tl.dot(b_kx, tl.trans(b_qx), acc=s, input_precision=PRECISION)
        first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
        i = query_start + o_t
        s, capped = pair_scores(
            s, o_t[None, :], o_s[:, None], i[None, :], j[:, None], first[None, :], last[None, :],
            bias_ptr, stride_bt, stride_bs, mask_ptr, stride_mt, stride_ms, T, S, factor, softcap, slope, window,
            sink_tokens, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE,
        )  # fmt: skip
        if not DENSE:
            s = masked_outside(
                s, start, full_lo, full_hi, o_t[None, :], o_s[:, None], i[None, :], j[:, None], first[None, :],
                last[None, :], T, S, window, sink_tokens, CAUSAL, WINDOW, SINK_TOKENS, SEGMENT,
            )  # fmt: skip
        p = column_weights(s, unit, shift_ptr, norm_ptr, o_t, inside, PRECISION)
        do_mask = inside[:, None] & (o_dv < DV)[None, :]
        b_do = tl.load(do_ptr + row[:, None] * stride_dot + o_dv[None, :], mask=do_mask, other=0.0)
        b_dv = tl.dot((p * gain).to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        e = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + o_t, mask=inside, other=0.0)
        ds = p * (e * gain - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - (capped / softcap) * (capped / softcap))
        ds = ds.to(b_q.dtype)
        b_dk = tl.dot(ds, b_q, acc=b_dk, input_precision=PRECISION)
        if R > 0:
            b_dkx = tl.dot(ds, b_qx, acc=b_dkx, input_precision=PRECISION)
    return b_dk, b_dv, b_dkx


# grid (B * G * tiles of S): one program owns BLOCK_S keys of one group and walks the queries that see them, head after
# head, so that a group's gradient is summed in registers. The shared key's gradient is left per group in float32.
@triton.jit
def softmax_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, qx_ptr, kx_ptr, bias_ptr, mask_ptr, slopes_ptr, gain_ptr, lengths_ptr, first_ptr,
    last_ptr, positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr, dkx_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    stride_qxb, stride_qxt, stride_qxh, stride_kxb, stride_kxs, stride_bb, stride_bh, stride_bt, stride_bs,
    stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_dob, stride_dot, stride_doh,
    T, S, H, GROUP, scale, softcap, window, sink_tokens, query_start,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_S)
    tile = tl.program_id(0) % tiles
    bg = tl.program_id(0) // tiles
    G = H // GROUP
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    s_0 = tile * BLOCK_S
    o_s = s_0 + tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_r = tl.arange(0, BLOCK_R)
    row = o_s.to(tl.int64)[:, None]
    inside = (o_s < S)[:, None]
    ALIBI: tl.constexpr = slopes_ptr is not None
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    TENSOR: tl.constexpr = (bias_ptr is not None) or (mask_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if TENSOR else 0)

    k_mask = inside & (o_d < D)[None, :]
    v_mask = inside & (o_dv < DV)[None, :]
    b_k = tl.load(k_ptr + b * stride_kb + g * stride_kg + row * stride_ks + o_d[None, :], mask=k_mask, other=0.0)
    b_v = tl.load(v_ptr + b * stride_vb + g * stride_vg + row * stride_vs + o_dv[None, :], mask=v_mask, other=0.0)
    b_kx = b_k
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    b_dkx = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if R > 0:
        kx_mask = inside & (o_r < R)[None, :]
        b_kx = tl.load(kx_ptr + b * stride_kxb + row * stride_kxs + o_r[None, :], mask=kx_mask, other=0.0)
    j = o_s
    if positions_ptr is not None:
        j = tl.load(positions_ptr + o_s, mask=o_s < S, other=0)
    lo, full_lo, full_hi, hi = query_ranges(
        b, s_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
        CAUSAL, WINDOW, SINK_TOKENS, DENSE, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    for member in range(GROUP):
        h = g * GROUP + member
        bh = b * H + h
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + h)
        gain = 1.0
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + b * stride_gb + h * stride_gh)
        own_q = q_ptr + b * stride_qb + h * stride_qh
        own_do = do_ptr + b * stride_dob + h * stride_doh
        own_shift = shift_ptr + bh * T
        own_norm = norm_ptr + bh * T
        own_delta = delta_ptr + bh * T
        own_qx = q_ptr
        if R > 0:
            own_qx = qx_ptr + b * stride_qxb + h * stride_qxh
        own_bias = bias_ptr
        if bias_ptr is not None:
            own_bias = bias_ptr + b * stride_bb + h * stride_bh
        own_mask = mask_ptr
        if mask_ptr is not None:
            own_mask = mask_ptr + b * stride_mb + h * stride_mh
        b_dk, b_dv, b_dkx = walk_queries(
            b_dk, b_dv, b_dkx, lo, full_lo, full_hi, hi, b_k, b_v, b_kx, o_s, j, own_q, own_qx, own_do, own_shift,
            own_norm, own_delta, own_bias, own_mask, first_ptr, last_ptr, lengths_ptr, b, slope, gain, stride_qt,
            stride_qxt, stride_dot, stride_bt, stride_bs, stride_mt, stride_ms, T, S, query_start, scale, softcap,
            window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0, PRECISION,
            BLOCK_T, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    at = (b * S + row) * G + g
    tl.store(dk_ptr + at * D + o_d[None, :], (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + at * DV + o_dv[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=v_mask)
    if R > 0:
        tl.store(dkx_ptr + (bg.to(tl.int64) * S + row) * R + o_r[None, :], b_dkx * scale, mask=kx_mask)


@triton.jit
def walk_keys_back(
    b_dq, b_dqx, r, lo, full_lo, full_hi, hi, b_q, b_qx, b_do, shift, norm, delta, o_t, i, first, last,
    k_ptr, v_ptr, kx_ptr, bias_ptr, dbias_ptr, mask_ptr, positions_ptr, slope, gain,
    stride_ks, stride_vs, stride_kxs, stride_bt, stride_bs, stride_mt, stride_ms,
    T, S, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds what the keys lo, lo + BLOCK_S, ... < hi bring to a tile of queries.

    Those in full_lo .. full_hi need no mask, unless DENSE.
    """
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    FOLD: tl.constexpr = not (SOFTCAP or ALIBI or (bias_ptr is not None))
    factor, unit = factor_and_unit(scale, FOLD)
    for start in range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        row = o_s.to(tl.int64)
        inside = o_s < S
        k_mask = inside[:, None] & (o_d < D)[None, :]
        v_mask = inside[:, None] & (o_dv < DV)[None, :]
        b_k = tl.load(k_ptr + row[:, None] * stride_ks + o_d[None, :], mask=k_mask, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        b_kx = b_k
        if R > 0:
            o_r = tl.arange(0, BLOCK_R)
            kx_mask = inside[:, None] & (o_r < R)[None, :]
            b_kx = tl.load(kx_ptr + row[:, None] * stride_kxs + o_r[None, :], mask=kx_mask, other=0.0)
            s = tl.dot(b_qx, tl.trans(b_kx), acc=s, input_precision=PRECISION)
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=inside, other=0)
        s, capped = pair_scores(
            s, o_t[:, None], o_s[None, :], i[:, None], j[None, :], first[:, None], last[:, None],
            bias_ptr, stride_bt, stride_bs, mask_ptr, stride_mt, stride_ms, T, S, factor, softcap, slope, window,
            sink_tokens, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE,
        )  # fmt: skip
        if not DENSE:
            s = masked_outside(
                s, start, full_lo, full_hi, o_t[:, None], o_s[None, :], i[:, None], j[None, :], first[:, None],
                last[:, None], T, S, window, sink_tokens, CAUSAL, WINDOW, SINK_TOKENS, SEGMENT,
            )  # fmt: skip
        p = powers(s, unit, shift[:, None])
        if PRECISION == "ieee":
            p *= norm[:, None]
        b_v = tl.load(v_ptr + row[:, None] * stride_vs + o_dv[None, :], mask=v_mask, other=0.0)
        e = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        r += tl.sum(p * e, 1)
        ds = p * (e * gain - delta[:, None])
        if dbias_ptr is not None:
            at = o_t.to(tl.int64)[:, None] * S + o_s[None, :]
            tl.store(dbias_ptr + at, ds, mask=(o_t < T)[:, None] & inside[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - (capped / softcap) * (capped / softcap))
        ds = ds.to(b_k.dtype)
        b_dq = tl.dot(ds, b_k, acc=b_dq, input_precision=PRECISION)
        if R > 0:
            b_dqx = tl.dot(ds, b_kx, acc=b_dqx, input_precision=PRECISION)
    return b_dq, b_dqx, r


# grid (B * H * tiles of T): as the forward kernel, one program owns BLOCK_T queries of one head and walks its keys.
@triton.jit
def softmax_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, qx_ptr, kx_ptr, bias_ptr, mask_ptr, slopes_ptr, gain_ptr, lengths_ptr, first_ptr,
    last_ptr, positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dq_ptr, dqx_ptr, dbias_ptr, r_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    stride_qxb, stride_qxt, stride_qxh, stride_kxb, stride_kxs, stride_bb, stride_bh, stride_bt, stride_bs,
    stride_mb, stride_mh, stride_mt, stride_ms, stride_gb, stride_gh, stride_dob, stride_dot, stride_doh,
    T, S, H, GROUP, scale, softcap, window, sink_tokens, query_start,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
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
    o_r = tl.arange(0, BLOCK_R)
    row = o_t.to(tl.int64)[:, None]
    inside = (o_t < T)[:, None]
    i = query_start + o_t
    ALIBI: tl.constexpr = slopes_ptr is not None
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    TENSOR: tl.constexpr = (bias_ptr is not None) or (mask_ptr is not None)
    DENSE: tl.constexpr = 2 if positions_ptr is not None else (1 if TENSOR else 0)

    q_mask = inside & (o_d < D)[None, :]
    do_mask = inside & (o_dv < DV)[None, :]
    b_q = tl.load(q_ptr + b * stride_qb + h * stride_qh + row * stride_qt + o_d[None, :], mask=q_mask, other=0.0)
    b_do = tl.load(do_ptr + b * stride_dob + h * stride_doh + row * stride_dot + o_dv[None, :], mask=do_mask, other=0.0)
    b_qx = b_q
    if R > 0:
        qx_mask = inside & (o_r < R)[None, :]
        b_qx = tl.load(
            qx_ptr + b * stride_qxb + h * stride_qxh + row * stride_qxt + o_r[None, :], mask=qx_mask, other=0.0
        )
        kx_ptr += b * stride_kxb
    shift = tl.load(shift_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=float("inf"))
    norm = shift
    if PRECISION == "ieee":
        norm = tl.load(norm_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=0.0)
    delta = tl.load(delta_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=0.0)
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    if bias_ptr is not None:
        bias_ptr += b * stride_bb + h * stride_bh
    if dbias_ptr is not None:
        dbias_ptr += bh.to(tl.int64) * T * S
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    gain = 1.0
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + b * stride_gb + h * stride_gh)
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_dqx = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    r = tl.zeros([BLOCK_T], tl.float32)
    sink_lo, sink_hi, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
        CAUSAL, WINDOW, SINK_TOKENS, DENSE, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    if SINK_TOKENS:
        b_dq, b_dqx, r = walk_keys_back(
            b_dq, b_dqx, r, sink_lo, sink_hi, sink_hi, sink_hi, b_q, b_qx, b_do, shift, norm, delta, o_t, i, first,
            last, k_ptr, v_ptr, kx_ptr, bias_ptr, dbias_ptr, mask_ptr, positions_ptr, slope, gain, stride_ks, stride_vs,
            stride_kxs, stride_bt, stride_bs, stride_mt, stride_ms, T, S, scale, softcap, window, sink_tokens, D, DV, R,
            CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV,
            BLOCK_R,
        )  # fmt: skip
    b_dq, b_dqx, r = walk_keys_back(
        b_dq, b_dqx, r, lo, full_lo, full_hi, hi, b_q, b_qx, b_do, shift, norm, delta, o_t, i, first, last, k_ptr,
        v_ptr, kx_ptr, bias_ptr, dbias_ptr, mask_ptr, positions_ptr, slope, gain, stride_ks, stride_vs, stride_kxs,
        stride_bt, stride_bs, stride_mt, stride_ms, T, S, scale, softcap, window, sink_tokens, D, DV, R, CAUSAL,
        SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
    )  # fmt: skip
    at = (b * T + row) * H + h
    tl.store(dq_ptr + at * D + o_d[None, :], (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=q_mask)
    if R > 0:
        tl.store(dqx_ptr + at * R + o_r[None, :], (b_dqx * scale).to(dqx_ptr.dtype.element_ty), mask=qx_mask)
    if r_ptr is not None:
        tl.store(r_ptr + bh.to(tl.int64) * T + o_t, r, mask=o_t < T)
