"""Decoding over keys and values that are sums of outer products, from their factors (tensor product attention).

    s_nj = (scale / Rk) sum_r k_a[j, r, h] (q_n . k_b[j, r]),  o_n = (1 / Rv) sum_r sum_j (p_nj v_a[j, r, h]) v_b[j, r]

All heads share the feature factors k_b and v_b, so that heads times new tokens are a tile's rows, and neither keys nor
values are formed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo_kernels.decode import MERGE, Plans
from attnzoo_kernels.decode.kernels import closing_factor, decode_attention_merge_kernel
from attnzoo_kernels.decode.tuning import config_and_slots, key_range
from attnzoo_kernels.launch import (
    Key,
    Operator,
    Plan,
    as_int,
    chip,
    dense_rows,
    find_plan,
    keep_plan,
    layouts,
    on_device,
    positive_scale,
    schema,
    strides,
)
from attnzoo_kernels.primitives import LENGTHS, LOG2E, softmax_step, visible
from attnzoo_kernels.tuning import padded


# grid (B * row blocks, splits): one program owns BLOCK_T rows, row n being head n // T and new token n % T, walks the
# keys of its split left to right and writes its state, or the output if CLOSE.
@triton.jit(do_not_specialize=[name for name in LENGTHS if name != "T"])
def decode_factors_fwd_kernel(
    q_ptr, k_a_ptr, k_b_ptr, v_a_ptr, v_b_ptr, lengths_ptr, positions_ptr, mask_ptr, o_ptr, state_ptr,
    stride_q_b, stride_q_t, stride_q_h, stride_k_a_b, stride_k_a_s, stride_k_a_r, stride_k_a_h, stride_k_b_b,
    stride_k_b_s, stride_k_b_r, stride_v_a_b, stride_v_a_s, stride_v_a_r, stride_v_a_h, stride_v_b_b, stride_v_b_s,
    stride_v_b_r, stride_mask_b, stride_mask_h, stride_mask_t, stride_mask_s,
    B, T, S, H, query_start, begin, end, chunk, scale, window, sink_tokens,
    D: tl.constexpr, DV: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, CLOSE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = H * T
    blocks = tl.cdiv(rows, BLOCK_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1)
    o_n = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = o_n < rows
    t = (o_n % T).to(tl.int64)
    h = (o_n // T).to(tl.int64)
    i = query_start + o_n % T
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    q_row = q_ptr + b * stride_q_b + t * stride_q_t + h * stride_q_h
    b_q = tl.load(q_row[:, None] + o_d, mask=in_rows[:, None] & (o_d < D), other=0.0)  # [BLOCK_T, BLOCK_D]
    lo = begin + split * chunk
    hi = tl.minimum(lo + chunk, end)
    length = S
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b)
        if positions_ptr is None:
            hi = tl.minimum(hi, length)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(lo, hi, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        in_keys = o_s < hi
        s_at = o_s.to(tl.int64)
        ok = in_rows[:, None] & in_keys[None, :]
        s = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for r in tl.static_range(RANK_K):
            k_row = k_b_ptr + b * stride_k_b_b + s_at * stride_k_b_s + r * stride_k_b_r
            b_k = tl.load(k_row[:, None] + o_d, mask=in_keys[:, None] & (o_d < D), other=0.0)
            at = (
                k_a_ptr + b * stride_k_a_b + s_at[None, :] * stride_k_a_s + r * stride_k_a_r + h[:, None] * stride_k_a_h
            )
            weight = tl.load(at, mask=ok, other=0.0).to(tl.float32)
            s += tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * weight
        j = o_s
        if positions_ptr is not None:
            j = tl.load(positions_ptr + o_s, mask=in_keys, other=0)
        seen = ok & visible(
            i[:, None], j[None, :], window, sink_tokens, 0, length, CAUSAL, WINDOW, SINK_TOKENS, lengths_ptr is not None
        )
        if mask_ptr is not None:
            mask_row = mask_ptr + b * stride_mask_b + h * stride_mask_h + t * stride_mask_t
            seen = seen & (tl.load(mask_row[:, None] + s_at[None, :] * stride_mask_s, mask=seen, other=0) != 0)
        p, shrink, m, l = softmax_step(tl.where(seen, s, float("-inf")), scale / RANK_K * LOG2E, m, l)
        acc = acc * shrink[:, None]
        for r in tl.static_range(RANK_V):
            v_row = v_b_ptr + b * stride_v_b_b + s_at * stride_v_b_s + r * stride_v_b_r
            b_v = tl.load(v_row[:, None] + o_v, mask=in_keys[:, None] & (o_v < DV), other=0.0)
            at = (
                v_a_ptr + b * stride_v_a_b + s_at[None, :] * stride_v_a_s + r * stride_v_a_r + h[:, None] * stride_v_a_h
            )
            weight = tl.load(at, mask=ok, other=0.0).to(tl.float32) / RANK_V
            acc = tl.dot((p * weight).to(b_v.dtype), b_v, acc, input_precision="ieee")
    o_row = ((split.to(tl.int64) * B + b) * T + t) * H + h
    if CLOSE:
        acc = acc * closing_factor(m, l, tl.full([BLOCK_T], float("-inf"), tl.float32))[:, None]
    else:
        tl.store(state_ptr + 2 * o_row, m, mask=in_rows)
        tl.store(state_ptr + 2 * o_row + 1, l, mask=in_rows)
    tl.store(o_ptr + o_row[:, None] * DV + o_v, acc, mask=in_rows[:, None] & (o_v < DV))


def decode_factors(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    v_a: Tensor,
    v_b: Tensor,
    *,
    scale: float,
    query_start: int,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of a few new tokens over a cache of factors; returns (B, T, H, Dv). Inference only.

    Scores and values are those of the module's docstring, masks those of `decode_attention`.

    Args:
        q: queries (B, T, H, D).
        k_a: head factors of the keys (B, S, Rk, H).
        k_b: feature factors of the keys (B, S, Rk, D).
        v_a: head factors of the values (B, S, Rv, H).
        v_b: feature factors of the values (B, S, Rv, Dv).
        scale: factor of the products.
        query_start: index of the first query.
        causal: key j is visible to query i if j <= i.
        window: keys with i - j < window are visible (|i - j| < window if not causal).
        sink_tokens: keys j < sink_tokens stay visible outside the window.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        key_positions: (S,) integers, the indices of the keys of a ring buffer.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.
    """
    scale, q, _ = positive_scale(scale, q)
    out: Tensor = _decode(
        q, k_a, k_b, v_a, v_b, as_int(lengths), mask, as_int(key_positions), scale, window or 0, sink_tokens,
        query_start, num_splits or 0, causal,
    )  # fmt: skip
    return out


class _Inputs(NamedTuple):
    """What the operator takes; num_splits is 0 for a number of its own."""

    q: Tensor
    k_a: Tensor
    k_b: Tensor
    v_a: Tensor
    v_b: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    scale: float
    window: int
    sink_tokens: int
    query_start: int
    num_splits: int
    causal: bool


def _fake(*given: Any) -> Tensor:
    q, v_b = given[0], given[4]
    return torch.empty((*q.shape[:3], v_b.shape[3]), dtype=q.dtype, device=q.device)


_PLANS: dict[Key, Plans] = {}
STRIDES = {"q": "bth", "k_a": "bsrh", "k_b": "bsr", "v_a": "bsrh", "v_b": "bsr"}


def _key(inputs: _Inputs) -> Key:
    """What decides the plan: everything but addresses, the number of keys, and where the queries are."""
    q, k_a, k_b, v_a, v_b, lengths, mask, positions, *_ = inputs
    return (
        layouts((q,)), chip(q.device), *[(x.stride(), x.shape[2], x.dtype) for x in (k_a, k_b, v_a, v_b)],
        v_b.shape[3], lengths is None, mask is None, positions is None, inputs.causal, inputs.window > 0,
        inputs.sink_tokens > 0,
    )  # fmt: skip


def _plans(inputs: _Inputs) -> Plans:
    (B, T, H, D), DV = inputs.q.shape, inputs.v_b.shape[3]
    name, widths = "decode_factors_fwd", (D, DV, 0)
    config, slots = config_and_slots(name, H * T, widths, inputs.q.element_size(), inputs.q.device)
    if config["BLOCK_T"] > 32:
        # Head factors take a register for every pair: larger tiles spill.
        config = config.at_most(BLOCK_S=32)
    arguments: dict[str, Any] = {
        **{name: n for at, axes in STRIDES.items() for name, n in strides(inputs._asdict()[at], at, axes).items()},
        **strides(None, "mask", "bhts"), "B": B, "H": H, "D": D, "DV": DV, "RANK_K": inputs.k_b.shape[2],
        "RANK_V": inputs.v_b.shape[2], "CAUSAL": inputs.causal, "WINDOW": inputs.window > 0,
        "SINK_TOKENS": inputs.window > 0 and inputs.sink_tokens > 0, "BLOCK_D": padded(D), "BLOCK_V": padded(DV),
    }  # fmt: skip
    one, several = (Plan(decode_factors_fwd_kernel, config, arguments | {"CLOSE": close}) for close in (True, False))
    of_merge = {"stride_head_scale_b": 0, "stride_head_scale_h": 0, "H": H, "DV": DV, "BLOCK_V": padded(DV)}
    return Plans(config, slots, one, several, Plan(decode_attention_merge_kernel, MERGE, of_merge))


def _run(*given: Any) -> Tensor:
    inputs = _Inputs(*given)
    out: Tensor = _fake(*given)
    if out.numel() == 0:
        return out
    inputs = inputs._replace(q=dense_rows(inputs.q), k_b=dense_rows(inputs.k_b), v_b=dense_rows(inputs.v_b))
    key = _key(inputs)
    plans = find_plan(_PLANS, key) or keep_plan(_PLANS, key, _plans(inputs))
    (B, T, H, _), S = inputs.q.shape, inputs.k_b.shape[1]
    begin, end = key_range(
        S, T, inputs.query_start, causal=inputs.causal, window=inputs.window, sink_tokens=inputs.sink_tokens,
        ring=inputs.positions is not None,
    )  # fmt: skip
    programs, splits, chunk, plan, part, state = plans.split(B, H * T, begin, end, inputs.num_splits, out)
    mask = None if inputs.mask is None else inputs.mask.expand(B, H, T, S).view(torch.uint8)
    launch = plan.launch(
        q_ptr=inputs.q, k_a_ptr=inputs.k_a, k_b_ptr=inputs.k_b, v_a_ptr=inputs.v_a, v_b_ptr=inputs.v_b,
        lengths_ptr=inputs.lengths, positions_ptr=inputs.positions, mask_ptr=mask, o_ptr=part, state_ptr=state, T=T,
        S=S, query_start=inputs.query_start, begin=begin, end=end, chunk=chunk, scale=inputs.scale,
        window=inputs.window, sink_tokens=inputs.sink_tokens,
        **({} if mask is None else strides(mask, "mask", "bhts")),
    )  # fmt: skip
    with on_device(out):
        launch.keep(launch.run[programs, splits, 1](*launch.values, **launch.options))
        if splits > 1:
            merge = plans.merge.launch(part_ptr=part, state_ptr=state, o_ptr=out, rows=B * T * H, T=T, splits=splits)
            merge.keep(merge.run[B * T * H, 1, 1](*merge.values, **merge.options))
    return out


_decode = Operator("attnzoo::decode_factors", _run, schema(_Inputs, 1))
_decode.register_fake(_fake)
