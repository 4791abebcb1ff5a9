"""Attention of a few new tokens over a long cache.

    s_rj = scale * (q_r . k_j + q_rope_r . k_rope_j) - decay_j, soft-capped, biased and masked as in training
    o_r = head_scale * sum_j exp(s_rj) v_j / (exp(sink) + sum_j exp(s_rj))

The rows r are the new tokens of all query heads that share one key/value head, so each key is read once for them all.
The keys are cut into splits, since a few sequences alone would leave most of a GPU idle. A split stores its state, the
running maximum m, the denominator l and the numerator sum_j exp(s_rj - m) v_j, and the states are merged:

    m = max_c m_c,  l = sum_c exp(m_c - m) l_c,  and so the numerator;  the sink joins l once, at the end.

Where the key is the first features of the value in the same memory (grouped-tied and latent attention) it is loaded
once and serves as both: the numerator is held in two parts, one of the key's width and one of the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LENGTHS, LOG2E, finish_scores, softmax_step, visible


@triton.jit
def closing_factor(m, l, sink):
    """What turns a numerator into an output, once: 1 / (l + exp2(sink - m)), 0 for a row that has seen nothing."""
    top = tl.maximum(m, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(m - base)
    total = l * shrink + tl.exp2(sink - base)
    return tl.where(l > 0, shrink / tl.where(total > 0, total, 1.0), 0.0)


# grid (B * G * row blocks, splits): one program owns BLOCK_T rows of one key/value head, walks the keys of its split
# left to right and writes its state, or the output if CLOSE. Row n of the H / G * T rows is query head n // T of the
# group and new token n % T. Programs that read the same keys are neighbours. Scores never reach memory, nor does a
# key that is repeated for its heads.
@triton.jit(do_not_specialize=[name for name in LENGTHS if name != "T"])  # one new token is the usual case
def decode_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_rope_ptr, k_rope_ptr, decay_ptr, slopes_ptr, lengths_ptr, positions_ptr, mask_ptr, start_ptr,
    sinks_ptr, head_scale_ptr, o_ptr, state_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g,
    stride_q_rope_b, stride_q_rope_t, stride_q_rope_h, stride_k_rope_b, stride_k_rope_s,
    stride_decay_b, stride_decay_h, stride_decay_s, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    stride_head_scale_b, stride_head_scale_h,
    B, T, S, H, G, query_start, begin, end, chunk, scale, softcap, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, TIED: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, CLOSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    ROPE: tl.constexpr = R > 0
    # The value's features that are not the key's.
    REST: tl.constexpr = DV - D if TIED else DV
    FROM: tl.constexpr = DV - REST
    rows = H // G * T
    blocks = tl.cdiv(rows, BLOCK_T)
    owner = tl.program_id(0) // blocks
    split = tl.program_id(1)
    if start_ptr is not None:
        # Splits share the keys that are visible now, however many the host has counted on.
        query_start = tl.load(start_ptr).to(tl.int32)
        if positions_ptr is None:
            if CAUSAL:
                end = tl.minimum(end, query_start + T)
            if WINDOW and not SINK_TOKENS:
                begin = tl.maximum(begin, query_start - window + 1)
            chunk = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), tl.num_programs(1)), BLOCK_S) * BLOCK_S
    b = (owner // G).to(tl.int64)
    g = (owner % G).to(tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = o_n < rows
    t = (o_n % T).to(tl.int64)
    h = g * (H // G) + o_n // T
    i = query_start + o_n % T
    o_d = tl.arange(0, BLOCK_D)
    o_v = FROM + tl.arange(0, BLOCK_V)
    o_r = tl.arange(0, BLOCK_R)

    q_row = q_ptr + b * stride_q_b + t * stride_q_t + h * stride_q_h
    b_q = tl.load(q_row[:, None] + o_d, mask=in_rows[:, None] & (o_d < D), other=0.0)  # [BLOCK_T, BLOCK_D]
    if ROPE:
        q_rope_row = q_rope_ptr + b * stride_q_rope_b + t * stride_q_rope_t + h * stride_q_rope_h
        # [BLOCK_T, BLOCK_R]
        b_q_rope = tl.load(q_rope_row[:, None] + o_r, mask=in_rows[:, None] & (o_r < R), other=0.0)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + h, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if decay_ptr is not None:
        decay_row = decay_ptr + b * stride_decay_b + h * stride_decay_h
        # A row's gate changes no weight. It keeps differences small where its place among the keys is known.
        c_i = tl.zeros([BLOCK_T], tl.float32)
        if positions_ptr is None:
            newest = tl.maximum(tl.minimum(query_start + T, S) - 1, 0).to(tl.int64)
            c_i = tl.load(decay_row + newest * stride_decay_s, mask=in_rows, other=0.0)
    lo = begin + split * chunk
    hi = tl.minimum(lo + chunk, end)
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b).to(tl.int32)
        if positions_ptr is None:
            hi = tl.minimum(hi, length)

    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    if TIED:
        b_ok = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if REST > 0:
        b_ov = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(lo, hi, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        in_keys = o_s < hi
        s_at = o_s.to(tl.int64)
        k_row = k_ptr + b * stride_k_b + g * stride_k_g + s_at * stride_k_s
        b_k = tl.load(k_row[:, None] + o_d, mask=in_keys[:, None] & (o_d < D), other=0.0)  # [BLOCK_S, BLOCK_D]
        s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        if ROPE:
            k_rope_row = k_rope_ptr + b * stride_k_rope_b + s_at * stride_k_rope_s
            b_k_rope = tl.load(k_rope_row[:, None] + o_r, mask=in_keys[:, None] & (o_r < R), other=0.0)
            s = tl.dot(b_q_rope, tl.trans(b_k_rope), s, input_precision="ieee")
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=in_keys, other=0).to(tl.int32)
        s, _ = finish_scores(s, i[:, None], j[None, :], scale, softcap, slope, SOFTCAP, slopes_ptr is not None)
        ok = in_rows[:, None] & in_keys[None, :]
        if decay_ptr is not None:
            s += c_i[:, None] - tl.load(decay_row[:, None] + s_at[None, :] * stride_decay_s, mask=ok, other=0.0)
        ok = ok & visible(
            i[:, None], j[None, :], window, sink_tokens, 0, length, CAUSAL, WINDOW, SINK_TOKENS, lengths_ptr is not None
        )
        if mask_ptr is not None:
            mask_row = mask_ptr + b * stride_mask_b + h * stride_mask_h + t * stride_mask_t
            at = mask_row[:, None] + s_at[None, :] * stride_mask_s
            ok = ok & (tl.load(at, mask=ok, other=0) != 0)
        p, shrink, m, l = softmax_step(tl.where(ok, s, float("-inf")), LOG2E, m, l)
        p = p.to(b_k.dtype)
        if TIED:
            b_ok = tl.dot(p, b_k, b_ok * shrink[:, None], input_precision="ieee")
        if REST > 0:
            v_row = v_ptr + b * stride_v_b + g * stride_v_g + s_at * stride_v_s
            b_v = tl.load(v_row[:, None] + o_v, mask=in_keys[:, None] & (o_v < DV), other=0.0)  # [BLOCK_S, BLOCK_V]
            b_ov = tl.dot(p, b_v, b_ov * shrink[:, None], input_precision="ieee")

    # Rows of the output and of the states have the same numbers, b, t, h, with the splits in front.
    o_row = ((split.to(tl.int64) * B + b) * T + t) * H + h
    factor = tl.full([BLOCK_T], 1.0, tl.float32)
    if CLOSE:
        sink = tl.full([BLOCK_T], float("-inf"), tl.float32)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + h, mask=in_rows, other=0.0).to(tl.float32) * LOG2E
        factor = closing_factor(m, l, sink)
        if head_scale_ptr is not None:
            at = head_scale_ptr + b * stride_head_scale_b + h * stride_head_scale_h
            factor *= tl.load(at, mask=in_rows, other=0.0).to(tl.float32)
    else:
        tl.store(state_ptr + 2 * o_row, m, mask=in_rows)
        tl.store(state_ptr + 2 * o_row + 1, l, mask=in_rows)
    if TIED:
        tl.store(o_ptr + o_row[:, None] * DV + o_d, b_ok * factor[:, None], mask=in_rows[:, None] & (o_d < D))
    if REST > 0:
        tl.store(o_ptr + o_row[:, None] * DV + o_v, b_ov * factor[:, None], mask=in_rows[:, None] & (o_v < DV))


# grid (B * T * H): one program owns one row of the output and merges the row's states, BLOCK_C splits at a time.
@triton.jit(do_not_specialize=LENGTHS)
def decode_attention_merge_kernel(
    part_ptr, state_ptr, sinks_ptr, head_scale_ptr, o_ptr, stride_head_scale_b, stride_head_scale_h, rows, T, H, splits,
    DV: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // H // T
    h = row % H
    o_v = tl.arange(0, BLOCK_V)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.zeros([], tl.float32)
    b_o = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, splits, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        at = o_c.to(tl.int64) * rows + row
        b_m = tl.load(state_ptr + 2 * at, mask=o_c < splits, other=float("-inf"))
        b_l = tl.load(state_ptr + 2 * at + 1, mask=o_c < splits, other=0.0)
        b_part = tl.load(part_ptr + at[:, None] * DV + o_v, mask=(o_c < splits)[:, None] & (o_v < DV), other=0.0)
        m_new = tl.maximum(m, tl.max(b_m, 0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(b_m - base)
        shrink = tl.exp2(m - base)
        b_o = b_o * shrink + tl.sum(weight[:, None] * b_part, 0)
        l = l * shrink + tl.sum(weight * b_l, 0)
        m = m_new
    sink = tl.full([], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
    factor = closing_factor(m, l, sink)
    if head_scale_ptr is not None:
        factor *= tl.load(head_scale_ptr + b * stride_head_scale_b + h * stride_head_scale_h).to(tl.float32)
    tl.store(o_ptr + row * DV + o_v, b_o * factor, mask=o_v < DV)
