"""Attention of routed heads: packing of the active (token, head) rows, and attention of packed rows.

For every batch row and key/value head the active rows of its query heads are packed, ordered by token and then by head:

    rows[r] = token * GROUP + head within the group,   start[t] = rows of the tokens before t,   start[T] = all rows

A tile of packed rows spans few tokens and shares one walk over the keys. The lists are long enough for every pair;
what is beyond a list's end is never read, and programs there return at once, so the host never waits for a count.

    o_r = gate_r sum_j p_rj v_j,  e_rj = do_r v_j,  delta_r = do_r o_r,  ds_rj = p_rj (gate_r e_rj - delta_r)
    dv_j = sum_r gate_r p_rj do_r,  dk_j = scale sum_r ds_rj q_r
    dq_r = scale sum_j ds_rj k_j,  dgate_r = sum_j p_rj e_rj
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LENGTHS, shift_and_norm
from attnzoo_kernels.softmax_attention.kernels_bwd import walk_keys_back
from attnzoo_kernels.softmax_attention.kernels_fwd import walk_keys
from attnzoo_kernels.softmax_attention.pieces import column_weights, factor_and_unit, pair_scores, segment_of


# grid (B * G * tiles of T): one program writes the rows of BLOCK_T tokens of a group to their places.
@triton.jit(do_not_specialize=LENGTHS)
def head_routing_pack_kernel(
    active_ptr, start_ptr, rows_ptr, stride_active_b, stride_active_t, stride_active_h, T, G,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    o_t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    inside = (o_t < T)[:, None] & (o_m < GROUP)[None, :]
    at = (
        bg // G * stride_active_b
        + o_t.to(tl.int64)[:, None] * stride_active_t
        + (bg % G * GROUP + o_m)[None, :] * stride_active_h
    )
    active = tl.load(active_ptr + at, mask=inside, other=0).to(tl.int32)
    start = tl.load(start_ptr + bg * (T + 1) + o_t, mask=o_t < T, other=0)
    place = start[:, None] + tl.cumsum(active, 1) - active
    row = o_t[:, None] * GROUP + o_m[None, :]
    tl.store(rows_ptr + bg * T * GROUP + place, row, mask=inside & (active != 0))


@triton.jit
def packed_rows(tile, bg, start_ptr, rows_ptr, T, GROUP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Offsets, tokens and heads within the group of a tile's rows, which of them exist, and the end of the list.

    Rows that do not exist have token T.
    """
    count = tl.load(start_ptr + bg * (T + 1) + T)
    o_r = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = o_r < count
    row = tl.load(rows_ptr + bg * T * GROUP + o_r, mask=inside, other=T * GROUP)
    return o_r, row // GROUP, row % GROUP, inside, count


@triton.jit
def packed_key_range(
    tile, b, bg, count, rows_ptr, lengths_ptr, first_ptr, last_ptr, T,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Keys that a tile of rows visits: (lo, full_lo, full_hi, hi), those in [full_lo, full_hi) without a mask."""
    r_0 = tile * BLOCK_T
    own = rows_ptr + bg * T * GROUP
    t_0 = tl.load(own + r_0) // GROUP
    t_1 = tl.load(own + tl.minimum(r_0 + BLOCK_T, count) - 1) // GROUP
    lo = t_0 * 0
    full_lo = lo
    full_hi = t_0 + 1
    hi = t_1 + 1
    if first_ptr is not None:
        lo = tl.load(first_ptr + b * T + t_0)
        full_lo = tl.load(first_ptr + b * T + t_1)
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        hi = tl.minimum(hi, length)
        full_hi = tl.minimum(full_hi, length)
    lo = lo // BLOCK_S * BLOCK_S
    hi = tl.maximum(hi, lo)
    full_lo = (full_lo + BLOCK_S - 1) // BLOCK_S * BLOCK_S
    full_hi = full_hi // BLOCK_S * BLOCK_S
    none = full_hi <= full_lo
    full_lo = tl.where(none, lo, full_lo)
    full_hi = tl.where(none, lo, full_hi)
    return lo, full_lo, full_hi, hi


# grid (B * G * tiles of T GROUP): one program owns BLOCK_T packed rows and walks the keys up to its last token with a
# running max m, denominator l and numerator acc. Scores, gathered keys and outputs of inactive pairs never exist. The
# tiles with the most keys come first.
@triton.jit(do_not_specialize=LENGTHS)
def head_routing_fwd_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, start_ptr, rows_ptr, lengths_ptr, first_ptr, last_ptr, o_ptr, shift_ptr, norm_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_gates_b, stride_gates_t, stride_gates_h, T, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * GROUP, BLOCK_T)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    o_r, token, member, inside, count = packed_rows(tile, bg, start_ptr, rows_ptr, T, GROUP, BLOCK_T)
    if tile * BLOCK_T >= count:
        return
    b = bg // G
    g = bg % G
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_t = token.to(tl.int64)
    o_h = g * GROUP + member
    q_mask = inside[:, None] & (o_d < D)[None, :]
    q_at = b * stride_q_b + o_t * stride_q_t + o_h * stride_q_h
    b_q = tl.load(q_ptr + q_at[:, None] + o_d[None, :], mask=q_mask, other=0.0)
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    first, last = segment_of(b, token, T, T, lengths_ptr, first_ptr, last_ptr)
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    lo, full_lo, full_hi, hi = packed_key_range(
        tile, b, bg, count, rows_ptr, lengths_ptr, first_ptr, last_ptr, T, GROUP, BLOCK_T, BLOCK_S
    )
    if first_ptr is not None:
        acc, m, l = walk_keys(
            acc, m, l, lo, full_lo, b_q, b_q, token, token, first, last, 0, 0, 0, None, None, None, k_ptr, v_ptr, None,
            None, None, 0.0, 0.0, None, None, None, 0.0, stride_k_s, stride_v_s, 0, 0, 0, 0, 0, T, T, scale, 0.0, 0, 0,
            D, DV, 0, True, False, False, False, False, SEGMENT, True, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, 16,
        )  # fmt: skip
    acc, m, l = walk_keys(
        acc, m, l, full_lo, full_hi, b_q, b_q, token, token, first, last, 0, 0, 0, None, None, None, k_ptr, v_ptr, None,
        None, None, 0.0, 0.0, None, None, None, 0.0, stride_k_s, stride_v_s, 0, 0, 0, 0, 0, T, T, scale, 0.0, 0, 0, D,
        DV, 0, True, False, False, False, False, SEGMENT, False, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, 16,
    )  # fmt: skip
    acc, m, l = walk_keys(
        acc, m, l, full_hi, hi, b_q, b_q, token, token, first, last, 0, 0, 0, None, None, None, k_ptr, v_ptr, None,
        None, None, 0.0, 0.0, None, None, None, 0.0, stride_k_s, stride_v_s, 0, 0, 0, 0, 0, T, T, scale, 0.0, 0, 0, D,
        DV, 0, True, False, False, False, False, SEGMENT, True, PRECISION, BLOCK_S, BLOCK_D, BLOCK_DV, 16,
    )  # fmt: skip
    shift, norm = shift_and_norm(m, l, PRECISION == "ieee")
    factor = norm
    if gates_ptr is not None:
        at = b * stride_gates_b + o_t * stride_gates_t + o_h * stride_gates_h
        factor *= tl.load(gates_ptr + at, mask=inside, other=0.0).to(tl.float32)
    o_at = ((b * T + o_t) * G * GROUP + o_h) * DV
    o_mask = inside[:, None] & (o_dv < DV)[None, :]
    b_o = (acc * factor[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + o_at[:, None] + o_dv[None, :], b_o, mask=o_mask)
    tl.store(shift_ptr + bg * T * GROUP + o_r, shift, mask=inside)
    if PRECISION == "ieee":
        tl.store(norm_ptr + bg * T * GROUP + o_r, norm, mask=inside)


# grid (B * G * tiles of T GROUP): delta of packed rows.
@triton.jit(do_not_specialize=LENGTHS)
def head_routing_bwd_delta_kernel(
    o_ptr, do_ptr, start_ptr, rows_ptr, delta_ptr, stride_do_b, stride_do_t, stride_do_h, T, G,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * GROUP, BLOCK_T)
    tile = tl.program_id(0) % tiles
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    o_r, token, member, inside, count = packed_rows(tile, bg, start_ptr, rows_ptr, T, GROUP, BLOCK_T)
    if tile * BLOCK_T >= count:
        return
    b = bg // G
    o_t = token.to(tl.int64)
    o_h = bg % G * GROUP + member
    o_dv = tl.arange(0, BLOCK_DV)
    mask = inside[:, None] & (o_dv < DV)[None, :]
    o_at = ((b * T + o_t) * G * GROUP + o_h) * DV
    do_at = b * stride_do_b + o_t * stride_do_t + o_h * stride_do_h
    b_o = tl.load(o_ptr + o_at[:, None] + o_dv[None, :], mask=mask, other=0.0)
    b_do = tl.load(do_ptr + do_at[:, None] + o_dv[None, :], mask=mask, other=0.0)
    # As in the dense kernel.
    wide = tl.float64 if o_ptr.dtype.element_ty == tl.float32 else tl.float32
    delta = tl.sum(b_o.to(wide) * b_do.to(wide), 1).to(tl.float32)
    tl.store(delta_ptr + bg * T * GROUP + o_r, delta, mask=inside)


# grid (B * G * tiles of T GROUP): the forward kernel's tiles; scatters dq and dgate to zeroed (B, T, H) places.
@triton.jit(do_not_specialize=LENGTHS)
def head_routing_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, start_ptr, rows_ptr, lengths_ptr, first_ptr, last_ptr, do_ptr, shift_ptr, norm_ptr,
    delta_ptr, dq_ptr, dgates_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_gates_b, stride_gates_t, stride_gates_h, stride_do_b, stride_do_t, stride_do_h, T, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T * GROUP, BLOCK_T)
    tile = tiles - 1 - tl.program_id(0) % tiles
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    o_r, token, member, inside, count = packed_rows(tile, bg, start_ptr, rows_ptr, T, GROUP, BLOCK_T)
    if tile * BLOCK_T >= count:
        return
    b = bg // G
    g = bg % G
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_t = token.to(tl.int64)
    o_h = g * GROUP + member
    q_mask = inside[:, None] & (o_d < D)[None, :]
    do_mask = inside[:, None] & (o_dv < DV)[None, :]
    q_at = b * stride_q_b + o_t * stride_q_t + o_h * stride_q_h
    do_at = b * stride_do_b + o_t * stride_do_t + o_h * stride_do_h
    b_q = tl.load(q_ptr + q_at[:, None] + o_d[None, :], mask=q_mask, other=0.0)
    b_do = tl.load(do_ptr + do_at[:, None] + o_dv[None, :], mask=do_mask, other=0.0)
    shift = tl.load(shift_ptr + bg * T * GROUP + o_r, mask=inside, other=float("inf"))
    norm = shift
    if PRECISION == "ieee":
        norm = tl.load(norm_ptr + bg * T * GROUP + o_r, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + bg * T * GROUP + o_r, mask=inside, other=0.0)
    gate = tl.full([BLOCK_T], 1.0, tl.float32)
    if gates_ptr is not None:
        at = b * stride_gates_b + o_t * stride_gates_t + o_h * stride_gates_h
        gate = tl.load(gates_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k_ptr += b * stride_k_b + g * stride_k_g
    v_ptr += b * stride_v_b + g * stride_v_g
    first, last = segment_of(b, token, T, T, lengths_ptr, first_ptr, last_ptr)
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    spare = tl.zeros([BLOCK_T, 16], tl.float32)
    r = tl.zeros([BLOCK_T], tl.float32)
    lo, full_lo, full_hi, hi = packed_key_range(
        tile, b, bg, count, rows_ptr, lengths_ptr, first_ptr, last_ptr, T, GROUP, BLOCK_T, BLOCK_S
    )
    b_dq, spare, r = walk_keys_back(
        b_dq, spare, r, lo, full_lo, full_hi, hi, b_q, b_q, b_do, shift, norm, delta, token, token, first, last, k_ptr,
        v_ptr, None, None, None, 0.0, 0.0, None, None, None, None, 0.0, gate[:, None], stride_k_s, stride_v_s, 0, 0, 0,
        0, 0, T, T, scale, 0.0, 0, 0, D, DV, 0, True, False, False, False, False, SEGMENT, False, PRECISION, BLOCK_S,
        BLOCK_D, BLOCK_DV, 16,
    )  # fmt: skip
    place = (b * T + o_t) * G * GROUP + o_h
    b_dq = (b_dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + place[:, None] * D + o_d[None, :], b_dq, mask=q_mask)
    if dgates_ptr is not None:
        tl.store(dgates_ptr + place, r, mask=inside)


@triton.jit
def walk_packed_rows(
    b_dk, b_dv, lo, hi, b_k, b_v, o_s, q_ptr, do_ptr, gates_ptr, rows_ptr, shift_ptr, norm_ptr, delta_ptr,
    lengths_ptr, first_ptr, last_ptr, b, stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_gates_t,
    stride_gates_h, T, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SEGMENT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the packed rows lo, lo + BLOCK_T, ... < hi of a group; tiles are [keys, rows]."""
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    factor, unit = factor_and_unit(scale, True)
    for start in range(lo, hi, BLOCK_T):
        o_r = start + tl.arange(0, BLOCK_T)
        # Rows from hi on belong to the next walk.
        inside = o_r < hi
        row = tl.load(rows_ptr + o_r, mask=inside, other=T * GROUP)
        token = row // GROUP
        o_t = token.to(tl.int64)
        o_h = (row % GROUP).to(tl.int64)
        q_mask = inside[:, None] & (o_d < D)[None, :]
        q_at = o_t * stride_q_t + o_h * stride_q_h
        b_q = tl.load(q_ptr + q_at[:, None] + o_d[None, :], mask=q_mask, other=0.0)
        s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_S, BLOCK_T]
        first, last = segment_of(b, token, T, T, lengths_ptr, first_ptr, last_ptr)
        s, _ = pair_scores(
            s, token[None, :], o_s[:, None], token[None, :], o_s[:, None], first[None, :], last[None, :],
            None, 0, 0, None, 0, 0, T, T, factor, 0.0, 0.0, 0, 0, True, False, False, False, False, SEGMENT, MASKED,
        )  # fmt: skip
        p = column_weights(s, unit, shift_ptr, norm_ptr, o_r, inside, PRECISION)
        gate = tl.full([BLOCK_T], 1.0, tl.float32)
        if gates_ptr is not None:
            g_at = o_t * stride_gates_t + o_h * stride_gates_h
            gate = tl.load(gates_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
        do_mask = inside[:, None] & (o_dv < DV)[None, :]
        do_at = o_t * stride_do_t + o_h * stride_do_h
        b_do = tl.load(do_ptr + do_at[:, None] + o_dv[None, :], mask=do_mask, other=0.0)
        b_dv = tl.dot((p * gate[None, :]).to(b_do.dtype), b_do, acc=b_dv, input_precision=PRECISION)
        e = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + o_r, mask=inside, other=0.0)
        ds = p * (e * gate[None, :] - delta[None, :])
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, acc=b_dk, input_precision=PRECISION)
    return b_dk, b_dv


# grid (B * G * tiles of T): one program owns BLOCK_S keys of one group and walks the packed rows from the first token
# of its tile on, which are adjacent; a group's gradient is summed in registers.
@triton.jit(do_not_specialize=LENGTHS)
def head_routing_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, start_ptr, rows_ptr, lengths_ptr, first_ptr, last_ptr, do_ptr, shift_ptr, norm_ptr,
    delta_ptr, dk_ptr, dv_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_gates_b, stride_gates_t, stride_gates_h, stride_do_b, stride_do_t, stride_do_h, T, G, scale,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_S)
    s_0 = tl.program_id(0) % tiles * BLOCK_S
    bg = (tl.program_id(0) // tiles).to(tl.int64)
    b = bg // G
    g = bg % G
    s_1 = tl.minimum(s_0 + BLOCK_S, T)
    o_s = s_0 + tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    row = o_s.to(tl.int64)[:, None]
    inside = (o_s < T)[:, None]
    k_mask = inside & (o_d < D)[None, :]
    v_mask = inside & (o_dv < DV)[None, :]
    b_k = tl.load(k_ptr + b * stride_k_b + g * stride_k_g + row * stride_k_s + o_d[None, :], mask=k_mask, other=0.0)
    b_v = tl.load(v_ptr + b * stride_v_b + g * stride_v_g + row * stride_v_s + o_dv[None, :], mask=v_mask, other=0.0)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_DV], tl.float32)
    SEGMENT: tl.constexpr = (lengths_ptr is not None) or (first_ptr is not None)

    start_ptr += bg * (T + 1)
    lo = tl.load(start_ptr + s_0)
    full_lo = tl.load(start_ptr + s_1 - 1)
    hi = tl.load(start_ptr + T)
    full_hi = hi
    if first_ptr is not None:
        hi = tl.load(start_ptr + tl.load(last_ptr + b * T + s_1 - 1))
        full_hi = tl.load(start_ptr + tl.load(last_ptr + b * T + s_0))
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        hi = tl.where(s_0 >= length, lo, hi)
        full_hi = tl.where(s_1 > length, lo, full_hi)
    full_hi = tl.maximum(full_lo, tl.minimum(full_hi, hi))
    full_lo = tl.minimum(full_lo, hi)
    full_hi = tl.minimum(full_hi, hi)
    h_0 = g * GROUP
    q_ptr += b * stride_q_b + h_0 * stride_q_h
    do_ptr += b * stride_do_b + h_0 * stride_do_h
    if gates_ptr is not None:
        gates_ptr += b * stride_gates_b + h_0 * stride_gates_h
    rows_ptr += bg * T * GROUP
    shift_ptr += bg * T * GROUP
    norm_ptr += bg * T * GROUP
    delta_ptr += bg * T * GROUP
    b_dk, b_dv = walk_packed_rows(
        b_dk, b_dv, lo, full_lo, b_k, b_v, o_s, q_ptr, do_ptr, gates_ptr, rows_ptr, shift_ptr, norm_ptr, delta_ptr,
        lengths_ptr, first_ptr, last_ptr, b, stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_gates_t,
        stride_gates_h, T, scale, GROUP, D, DV, SEGMENT, True, PRECISION, BLOCK_T, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    b_dk, b_dv = walk_packed_rows(
        b_dk, b_dv, full_lo, full_hi, b_k, b_v, o_s, q_ptr, do_ptr, gates_ptr, rows_ptr, shift_ptr, norm_ptr, delta_ptr,
        lengths_ptr, first_ptr, last_ptr, b, stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_gates_t,
        stride_gates_h, T, scale, GROUP, D, DV, SEGMENT, False, PRECISION, BLOCK_T, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    if SEGMENT:
        b_dk, b_dv = walk_packed_rows(
            b_dk, b_dv, full_hi, hi, b_k, b_v, o_s, q_ptr, do_ptr, gates_ptr, rows_ptr, shift_ptr, norm_ptr, delta_ptr,
            lengths_ptr, first_ptr, last_ptr, b, stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_gates_t,
            stride_gates_h, T, scale, GROUP, D, DV, SEGMENT, True, PRECISION, BLOCK_T, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    at = (b * T + row) * G + g
    tl.store(dk_ptr + at * D + o_d[None, :], (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + at * DV + o_dv[None, :], b_dv.to(dv_ptr.dtype.element_ty), mask=v_mask)
