"""One new token of linear attention after states that are kept: the recurrent form.

    S_i += k^T v,   o = q ( sum over j < i of w_j S_j + w_i S_i )

with the row w of the token's block i, or without weights o = q S and a single state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from attnzoo_kernels.launch import dense_rows, is_unobserved, on_device
from attnzoo_kernels.tuning import cdiv, padded

BLOCK_V = 16


# grid (B * G * tiles of DV): one program owns columns of a group's states, adds the token to the last of them, and
# answers the group's queries. Every state is read once, with weights of single heads once for each head.
@triton.jit(do_not_specialize=["block"])
def linear_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, s_ptr, w_ptr, o_ptr, stride_q_b, stride_q_h, stride_k_b, stride_k_g, stride_v_b, stride_v_g,
    stride_s_b, stride_s_n, stride_s_g, stride_s_d, stride_w_h, stride_w_j, G, GROUP, block,
    D: tl.constexpr, DV: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(DV, BLOCK_V)
    bg = tl.program_id(0) // tiles
    b = (bg // G).to(tl.int64)
    g = (bg % G).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (o_d < D)[:, None] & (o_v < DV)[None, :]
    at = s_ptr + b * stride_s_b + g * stride_s_g + o_d.to(tl.int64)[:, None] * stride_s_d + o_v[None, :]
    own = at + tl.cast(block, tl.int64) * stride_s_n
    b_k = tl.load(k_ptr + b * stride_k_b + g * stride_k_g + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_v = tl.load(v_ptr + b * stride_v_b + g * stride_v_g + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
    b_s = tl.load(own, mask=mask, other=0.0) + b_k[:, None] * b_v[None, :]
    tl.store(own, b_s, mask=mask)
    seen = b_s
    if w_ptr is not None and not PER_HEAD:
        seen = tl.load(w_ptr + block * stride_w_j) * b_s
        for j in range(block):
            w = tl.load(w_ptr + j * stride_w_j)
            seen += w * tl.load(at + tl.cast(j, tl.int64) * stride_s_n, mask=mask, other=0.0)
    for member in range(GROUP):
        h = g * GROUP + member
        if w_ptr is not None and PER_HEAD:
            row = w_ptr + h * stride_w_h
            seen = tl.load(row + block * stride_w_j) * b_s
            for j in range(block):
                w = tl.load(row + j * stride_w_j)
                seen += w * tl.load(at + tl.cast(j, tl.int64) * stride_s_n, mask=mask, other=0.0)
        b_q = tl.load(q_ptr + b * stride_q_b + h * stride_q_h + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        o = tl.sum(b_q[:, None] * seen, 0)
        tl.store(o_ptr + (b * G * GROUP + h) * DV + o_v, o, mask=o_v < DV)


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, states: Tensor, weights: Tensor | None = None) -> Tensor:
    """Output (B, 1, H, Dv), float32, of one token q (B, 1, H, D), k (B, 1, G, D), v (B, 1, G, Dv). No gradients.

    Args:
        q: float16, bfloat16 or float32, like k and v; all sums are in float32.
        k: the token's key.
        v: the token's value.
        states: float32 (B, i + 1, G, D, Dv), one for each block, the token's own the last; that one is updated in
            place. Without weights (B, 1, G, D, Dv). Its last axis is contiguous.
        weights: (i + 1,) or (H, i + 1), or None for 1.
    """
    weights = None if weights is None else weights.to(torch.float32)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out: Tensor = (_run if is_unobserved(q, k, v, states, weights) else _step)(q, k, v, states, weights)
    return out


def _run(q: Tensor, k: Tensor, v: Tensor, states: Tensor, weights: Tensor | None) -> Tensor:
    out: Tensor = _step_fake(q, k, v)
    B, _, H, D = q.shape
    G, Dv = v.shape[2:]
    if out.numel() == 0:
        return out
    per_head = weights is not None and weights.ndim == 2
    stride_w_h = weights.stride(0) if weights is not None and per_head else 0
    stride_w_j = 0 if weights is None else weights.stride(-1)
    with on_device(q):
        linear_attention_step_kernel[(B * G * cdiv(Dv, BLOCK_V),)](
            q, k, v, states, weights, out, q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2),
            *states.stride()[:4], stride_w_h, stride_w_j, G, H // G, states.shape[1] - 1, D=D, DV=Dv, PER_HEAD=per_head,
            BLOCK_D=padded(D), BLOCK_V=BLOCK_V, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return out


_step = library.custom_op("attnzoo::linear_attention_step", _run, mutates_args=("states",))


@_step.register_fake
def _step_fake(q: Tensor, k: Tensor, v: Tensor, *states_and_weights: Any) -> Tensor:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=torch.float32, device=q.device)
