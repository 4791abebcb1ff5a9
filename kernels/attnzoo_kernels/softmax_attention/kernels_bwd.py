"""Softmax attention, backward. Weights are recomputed from q, k, v and what is kept of each row; no atomics.

p_ij = exp(s_ij - shift_i) norm_i,  e_ij = do_i v_j,  delta_i = do_i o_i - dlse_i
ds_ij = p_ij (head_scale e_ij - delta_i),  times (1 - (capped_ij / softcap)^2) before bias and ALiBi
dv_j = sum_i head_scale p_ij do_i,  dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j
dbias_ij = ds_ij,  ddecay_j = -sum_i ds_ij,  dhead_scale = sum_ij p_ij e_ij
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import powers
from attnzoo_kernels.softmax_attention.pieces import (
    DECAY_WIDTH,
    column_weights,
    decay_of_keys,
    decay_of_queries,
    factor_and_unit,
    gate_tile,
    key_ranges,
    masked_outside,
    pair_scores,
    query_ranges,
    segment_of,
    with_decay,
)


# grid (B * H * tiles of T): delta_i = sum over the value width of do_i o_i. Where one key dominates a row, e_ij nearly
# equals delta_i and ds carries all of delta's rounding, so float32 is summed in float64, which the reads hide. With a
# gate, o is the output before it, and the gradients of o (which the other kernels read as do) and of the gate's logits
# are stored.
@triton.jit
def softmax_attention_bwd_delta_kernel(
    o_ptr, do_ptr, delta_ptr, output_gate_ptr, da_ptr, dgate_ptr, stride_o_b, stride_o_t, stride_o_h, stride_do_b,
    stride_do_t, stride_do_h, stride_output_gate_b, stride_output_gate_t, stride_output_gate_h, T, H,
    DV: tl.constexpr, GATES: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
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
    b_o = tl.load(o_ptr + b * stride_o_b + h * stride_o_h + row * stride_o_t + o_dv[None, :], mask=inside, other=0.0)
    b_do = tl.load(
        do_ptr + b * stride_do_b + h * stride_do_h + row * stride_do_t + o_dv[None, :], mask=inside, other=0.0
    )
    if output_gate_ptr is not None:
        gate = gate_tile(
            output_gate_ptr + b * stride_output_gate_b + h * stride_output_gate_h, stride_output_gate_t, o_t, T, GATES,
            BLOCK_DV,
        )  # fmt: skip
        at = (b * T + row) * H + h
        if dgate_ptr is not None:
            dgate = b_do.to(tl.float32) * b_o.to(tl.float32)
            if GATES == 1:
                dgate = tl.sum(dgate, 1)[:, None] * gate * (1.0 - gate)
                tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=(o_t < T)[:, None])
            else:
                dgate = dgate * gate * (1.0 - gate)
                tl.store(dgate_ptr + at * DV + o_dv[None, :], dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
        b_do = (b_do * gate).to(b_o.dtype)
        tl.store(da_ptr + at * DV + o_dv[None, :], b_do, mask=inside)
    wide = tl.float64 if o_ptr.dtype.element_ty == tl.float32 else tl.float32
    delta = tl.sum(b_o.to(wide) * b_do.to(wide), 1).to(tl.float32)
    tl.store(delta_ptr + bh.to(tl.int64) * T + o_t, delta, mask=o_t < T)


@triton.jit
def walk_queries(
    b_dk, b_dv, b_dk_rope, b_ddecay, lo, full_lo, full_hi, hi, b_k, b_v, b_k_rope, b_decay, o_s, j, decay_ptr,
    positions_ptr, q_ptr, q_rope_ptr,
    do_ptr, shift_ptr,
    norm_ptr, delta_ptr, bias_ptr, mask_ptr, first_ptr, last_ptr, lengths_ptr, b, slope, head_scale,
    decay_factor, stride_q_t, stride_q_rope_t, stride_do_t, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s,
    T, S, query_start, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, DENSE: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the queries lo, lo + BLOCK_T, ... < hi of one head; tiles are [keys, queries].

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
        b_q = tl.load(q_ptr + row[:, None] * stride_q_t + o_d[None, :], mask=q_mask, other=0.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
        b_q_rope = b_q
        if R > 0:
            o_r = tl.arange(0, BLOCK_R)
            q_rope_mask = inside[:, None] & (o_r < R)[None, :]
            b_q_rope = tl.load(q_rope_ptr + row[:, None] * stride_q_rope_t + o_r[None, :], mask=q_rope_mask, other=0.0)
            s = tl.dot(b_k_rope, tl.trans(b_q_rope), acc=s, input_precision=PRECISION)
        i = query_start + o_t
        if decay_ptr is not None:
            c_i = decay_of_queries(decay_ptr, positions_ptr, i, S)
            s = with_decay(s, b_decay, c_i, decay_factor, FEATURES, True)
        first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
        s, capped = pair_scores(
            s, o_t[None, :], o_s[:, None], i[None, :], j[:, None], first[None, :], last[None, :], bias_ptr,
            stride_bias_t, stride_bias_s, mask_ptr, stride_mask_t, stride_mask_s, T, S, factor, softcap, slope, window,
            sink_tokens, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE,
        )  # fmt: skip
        if not DENSE:
            s = masked_outside(
                s, start, full_lo, full_hi, o_t[None, :], o_s[:, None], i[None, :], j[:, None], first[None, :],
                last[None, :], T, S, window, sink_tokens, CAUSAL, WINDOW, SINK_TOKENS, SEGMENT,
            )  # fmt: skip
        p = column_weights(s, unit, shift_ptr, norm_ptr, o_t, inside, PRECISION)
        do_mask = inside[:, None] & (o_dv < DV)[None, :]
        b_do = tl.load(do_ptr + row[:, None] * stride_do_t + o_dv[None, :], mask=do_mask, other=0.0)
        b_dv = tl.dot((p * head_scale).to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        e = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + o_t, mask=inside, other=0.0)
        ds = p * (e * head_scale - delta[None, :])
        if decay_ptr is not None:
            b_ddecay -= tl.sum(ds, 1)
        if SOFTCAP:
            ds = ds * (1.0 - (capped / softcap) * (capped / softcap))
        ds = ds.to(b_q.dtype)
        b_dk = tl.dot(ds, b_q, acc=b_dk, input_precision=PRECISION)
        if R > 0:
            b_dk_rope = tl.dot(ds, b_q_rope, acc=b_dk_rope, input_precision=PRECISION)
    return b_dk, b_dv, b_dk_rope, b_ddecay


# grid (B * G * tiles of S): one program owns BLOCK_S keys of one group and walks the queries that see them, head after
# head, so that a group's gradient is summed in registers. The shared key's gradient is stored per group in float32.
@triton.jit
def softmax_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, features_ptr, decay_ptr, bias_ptr, mask_ptr, slopes_ptr,
    head_scale_ptr,
    lengths_ptr, first_ptr, last_ptr, positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr,
    dk_rope_ptr,
    ddecay_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_rope_b, stride_q_rope_t, stride_q_rope_h, stride_k_rope_b, stride_k_rope_s, stride_bias_b, stride_bias_h,
    stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_head_scale_b, stride_head_scale_h, stride_do_b,
    stride_do_t, stride_do_h,
    T, S, H, GROUP, scale, softcap, window, sink_tokens, query_start, decay_factor,
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
    b_k = tl.load(k_ptr + b * stride_k_b + g * stride_k_g + row * stride_k_s + o_d[None, :], mask=k_mask, other=0.0)
    b_v = tl.load(v_ptr + b * stride_v_b + g * stride_v_g + row * stride_v_s + o_dv[None, :], mask=v_mask, other=0.0)
    b_k_rope = b_k
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    b_dk_rope = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    if R > 0:
        k_rope_mask = inside & (o_r < R)[None, :]
        b_k_rope = tl.load(
            k_rope_ptr + b * stride_k_rope_b + row * stride_k_rope_s + o_r[None, :], mask=k_rope_mask, other=0.0
        )
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
        head_scale = 1.0
        if head_scale_ptr is not None:
            head_scale = tl.load(head_scale_ptr + b * stride_head_scale_b + h * stride_head_scale_h)
        own_q = q_ptr + b * stride_q_b + h * stride_q_h
        own_do = do_ptr + b * stride_do_b + h * stride_do_h
        own_shift = shift_ptr + bh * T
        own_norm = norm_ptr + bh * T
        own_delta = delta_ptr + bh * T
        b_ddecay = tl.zeros([BLOCK_S], tl.float32)
        b_decay = b_k
        own_decay = decay_ptr
        if decay_ptr is not None:
            own_decay = decay_ptr + bh * S
            own_features = features_ptr
            if features_ptr is not None:
                own_features = features_ptr + bh * S * DECAY_WIDTH
            b_decay = decay_of_keys(None, b, h, own_features, own_decay, s_0, S, True, BLOCK_S)
        own_q_rope = q_ptr
        if R > 0:
            own_q_rope = q_rope_ptr + b * stride_q_rope_b + h * stride_q_rope_h
        own_bias = bias_ptr
        if bias_ptr is not None:
            own_bias = bias_ptr + b * stride_bias_b + h * stride_bias_h
        own_mask = mask_ptr
        if mask_ptr is not None:
            own_mask = mask_ptr + b * stride_mask_b + h * stride_mask_h
        b_dk, b_dv, b_dk_rope, b_ddecay = walk_queries(
            b_dk, b_dv, b_dk_rope, b_ddecay, lo, full_lo, full_hi, hi, b_k, b_v, b_k_rope, b_decay, o_s, j, own_decay,
            positions_ptr, own_q, own_q_rope, own_do, own_shift, own_norm, own_delta, own_bias, own_mask, first_ptr,
            last_ptr, lengths_ptr, b, slope, head_scale, decay_factor, stride_q_t, stride_q_rope_t, stride_do_t,
            stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s, T, S, query_start, scale, softcap, window,
            sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0,
            features_ptr is not None, PRECISION, BLOCK_T, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
        if decay_ptr is not None:  # noqa: SIM102  (Triton compiles one branch away)
            # Fixed gates have no gradient.
            if ddecay_ptr is not None:
                tl.store(ddecay_ptr + bh * S + o_s, b_ddecay, mask=o_s < S)
    at = (b * S + row) * G + g
    tl.store(dk_ptr + at * D + o_d[None, :], (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + at * DV + o_dv[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=v_mask)
    if R > 0:
        tl.store(dk_rope_ptr + (bg.to(tl.int64) * S + row) * R + o_r[None, :], b_dk_rope * scale, mask=k_rope_mask)


@triton.jit
def walk_keys_back(
    b_dq, b_dq_rope, r, lo, full_lo, full_hi, hi, b_q, b_q_rope, b_do, shift, norm, delta, o_t, i, first, last,
    k_ptr, v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, dbias_ptr, mask_ptr, positions_ptr,
    slope, head_scale,
    stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s, stride_mask_t, stride_mask_s,
    T, S, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, WINDOW: tl.constexpr,
    SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the keys lo, lo + BLOCK_S, ... < hi to a tile of queries.

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
        b_k = tl.load(k_ptr + row[:, None] * stride_k_s + o_d[None, :], mask=k_mask, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_T, BLOCK_S]
        b_k_rope = b_k
        if R > 0:
            o_r = tl.arange(0, BLOCK_R)
            k_rope_mask = inside[:, None] & (o_r < R)[None, :]
            b_k_rope = tl.load(k_rope_ptr + row[:, None] * stride_k_rope_s + o_r[None, :], mask=k_rope_mask, other=0.0)
            s = tl.dot(b_q_rope, tl.trans(b_k_rope), acc=s, input_precision=PRECISION)
        if decay_ptr is not None:
            b_decay = decay_of_keys(None, 0, 0, features_ptr, decay_ptr, start, S, True, BLOCK_S)
            s = with_decay(s, b_decay, c_i, decay_factor, features_ptr is not None, False)
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=inside, other=0)
        s, capped = pair_scores(
            s, o_t[:, None], o_s[None, :], i[:, None], j[None, :], first[:, None], last[:, None], bias_ptr,
            stride_bias_t, stride_bias_s, mask_ptr, stride_mask_t, stride_mask_s, T, S, factor, softcap, slope, window,
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
        b_v = tl.load(v_ptr + row[:, None] * stride_v_s + o_dv[None, :], mask=v_mask, other=0.0)
        e = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        r += tl.sum(p * e, 1)
        ds = p * (e * head_scale - delta[:, None])
        if dbias_ptr is not None:
            at = o_t.to(tl.int64)[:, None] * S + o_s[None, :]
            tl.store(dbias_ptr + at, ds, mask=(o_t < T)[:, None] & inside[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - (capped / softcap) * (capped / softcap))
        ds = ds.to(b_k.dtype)
        b_dq = tl.dot(ds, b_k, acc=b_dq, input_precision=PRECISION)
        if R > 0:
            b_dq_rope = tl.dot(ds, b_k_rope, acc=b_dq_rope, input_precision=PRECISION)
    return b_dq, b_dq_rope, r


# grid (B * H * tiles of T): as the forward kernel, one program owns BLOCK_T queries of one head and walks its keys.
@triton.jit
def softmax_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, features_ptr, decay_ptr, bias_ptr, mask_ptr, slopes_ptr,
    head_scale_ptr,
    lengths_ptr, first_ptr, last_ptr, positions_ptr, do_ptr, shift_ptr, norm_ptr, delta_ptr, dq_ptr, dq_rope_ptr,
    dbias_ptr, r_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_rope_b, stride_q_rope_t, stride_q_rope_h, stride_k_rope_b, stride_k_rope_s, stride_bias_b, stride_bias_h,
    stride_bias_t, stride_bias_s,
    stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s, stride_head_scale_b, stride_head_scale_h, stride_do_b,
    stride_do_t, stride_do_h,
    T, S, H, GROUP, scale, softcap, window, sink_tokens, query_start, decay_factor,
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
    b_q = tl.load(q_ptr + b * stride_q_b + h * stride_q_h + row * stride_q_t + o_d[None, :], mask=q_mask, other=0.0)
    b_do = tl.load(
        do_ptr + b * stride_do_b + h * stride_do_h + row * stride_do_t + o_dv[None, :], mask=do_mask, other=0.0
    )
    b_q_rope = b_q
    if R > 0:
        q_rope_mask = inside & (o_r < R)[None, :]
        b_q_rope = tl.load(
            q_rope_ptr + b * stride_q_rope_b + h * stride_q_rope_h + row * stride_q_rope_t + o_r[None, :],
            mask=q_rope_mask,
            other=0.0,
        )
        k_rope_ptr += b * stride_k_rope_b
    shift = tl.load(shift_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=float("inf"))
    norm = shift
    if PRECISION == "ieee":
        norm = tl.load(norm_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=0.0)
    delta = tl.load(delta_ptr + bh.to(tl.int64) * T + o_t, mask=o_t < T, other=0.0)
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
    if dbias_ptr is not None:
        dbias_ptr += bh.to(tl.int64) * T * S
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h * stride_mask_h
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)
    head_scale = 1.0
    if head_scale_ptr is not None:
        head_scale = tl.load(head_scale_ptr + b * stride_head_scale_b + h * stride_head_scale_h)
    first, last = segment_of(b, o_t, T, S, lengths_ptr, first_ptr, last_ptr)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_dq_rope = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    r = tl.zeros([BLOCK_T], tl.float32)
    sink_lo, sink_hi, lo, full_lo, full_hi, hi = key_ranges(
        b, t_0, T, S, query_start, window, sink_tokens, lengths_ptr, first_ptr, last_ptr,
        CAUSAL, WINDOW, SINK_TOKENS, DENSE, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    if SINK_TOKENS:
        b_dq, b_dq_rope, r = walk_keys_back(
            b_dq, b_dq_rope, r, sink_lo, sink_hi, sink_hi, sink_hi, b_q, b_q_rope, b_do, shift, norm, delta, o_t, i,
            first, last, k_ptr, v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, dbias_ptr,
            mask_ptr, positions_ptr, slope, head_scale, stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t,
            stride_bias_s, stride_mask_t, stride_mask_s, T, S, scale, softcap, window, sink_tokens, D, DV, R, CAUSAL,
            SOFTCAP, ALIBI, WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    b_dq, b_dq_rope, r = walk_keys_back(
        b_dq, b_dq_rope, r, lo, full_lo, full_hi, hi, b_q, b_q_rope, b_do, shift, norm, delta, o_t, i, first, last,
        k_ptr, v_ptr, k_rope_ptr, features_ptr, decay_ptr, c_i, decay_factor, bias_ptr, dbias_ptr, mask_ptr,
        positions_ptr, slope, head_scale, stride_k_s, stride_v_s, stride_k_rope_s, stride_bias_t, stride_bias_s,
        stride_mask_t, stride_mask_s, T, S, scale, softcap, window, sink_tokens, D, DV, R, CAUSAL, SOFTCAP, ALIBI,
        WINDOW, SINK_TOKENS, SEGMENT, DENSE > 0, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, BLOCK_R,
    )  # fmt: skip
    at = (b * T + row) * H + h
    tl.store(dq_ptr + at * D + o_d[None, :], (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=q_mask)
    if R > 0:
        tl.store(
            dq_rope_ptr + at * R + o_r[None, :], (b_dq_rope * scale).to(dq_rope_ptr.dtype.element_ty), mask=q_rope_mask
        )
    if r_ptr is not None:
        tl.store(r_ptr + bh.to(tl.int64) * T + o_t, r, mask=o_t < T)
