"""What follows linear attention in one pass over its output: RMS norm of each head and gate.

    r = (mean(o^2) + eps)^(-1/2),  y = o r w sigmoid(g) g

Saved for the backward pass: o, w and g; r is computed again. Without a norm r w is 1, without a gate the last factors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo_kernels.launch import on_device, operator
from attnzoo_kernels.primitives import LENGTHS, LOG2E
from attnzoo_kernels.tuning import cdiv, power_of_two

ROWS = 16
"""Heads of tokens that one program takes at a time."""
WAVES = 528
"""Programs of the backward pass, each of which stores one partial gradient of the norm's weight."""


@triton.jit
def sigmoid(x):
    """Without an overflow on either side."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def inverse_rms(x, in_rows, eps, DV: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row."""
    # Rows past the end are 0, and with eps = 0 their 0 / 0 would reach the sums over rows.
    return tl.rsqrt(tl.where(in_rows, tl.sum(x * x, 1) / DV + eps, 1.0))


# grid (tiles of N): one program owns BLOCK_N rows of Dv numbers, all in registers.
@triton.jit(do_not_specialize=[*LENGTHS, "N"])
def linear_attention_finish_fwd_kernel(
    o_ptr, w_ptr, g_ptr, y_ptr, N, eps, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr
):  # fmt: skip
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_v = tl.arange(0, BLOCK_DV)
    mask = (o_n < N)[:, None] & (o_v < DV)[None, :]
    at = o_n[:, None] * DV + o_v[None, :]
    y = tl.load(o_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if w_ptr is not None:
        r = inverse_rms(y, o_n < N, eps, DV)
        w = tl.load(w_ptr + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
        y = y * r[:, None] * w[None, :]
    if g_ptr is not None:
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = y * g * sigmoid(g)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


# grid (programs): one program takes every `programs`-th tile of rows and sums the weight's gradient over them.
@triton.jit(do_not_specialize=[*LENGTHS, "N"])
def linear_attention_finish_bwd_kernel(
    o_ptr, w_ptr, g_ptr, dy_ptr, do_ptr, dw_ptr, dg_ptr, N, eps, programs,
    DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    o_v = tl.arange(0, BLOCK_DV)
    dw = tl.zeros([BLOCK_DV], tl.float32)
    w = dw
    if w_ptr is not None:
        w = tl.load(w_ptr + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), programs):
        o_n = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (o_n < N)[:, None] & (o_v < DV)[None, :]
        at = o_n[:, None] * DV + o_v[None, :]
        o = tl.load(o_ptr + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        n = o
        r = tl.zeros([BLOCK_N], tl.float32)
        if w_ptr is not None:
            r = inverse_rms(o, o_n < N, eps, DV)
            n = o * r[:, None]
        if g_ptr is not None:
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            s = sigmoid(g)
            scaled = n
            if w_ptr is not None:
                scaled = n * w[None, :]
            dg = d * scaled * s * (1.0 + g * (1.0 - s))
            tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=mask)
            d = d * g * s
        if w_ptr is not None:
            dw += tl.sum(d * n, 0)
            d = d * w[None, :]
            d = (d - n * (tl.sum(d * n, 1) / DV)[:, None]) * r[:, None]
        tl.store(do_ptr + at, d.to(do_ptr.dtype.element_ty), mask=mask)
    if w_ptr is not None:
        tl.store(dw_ptr + tl.program_id(0) * DV + o_v, dw, mask=o_v < DV)


def linear_attention_finish(
    out: Tensor, weight: Tensor | None, gate: Tensor | None, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """RMS norm and gate of heads out (..., Dv), in dtype; gradients go to out, weight and gate, once.

    Args:
        out: float32.
        weight: (Dv,) of the norm, or None for no norm.
        gate: of out's shape, before the swish, or None for no gate.
        eps: added to the mean square.
        dtype: of the result.
    """
    weight = None if weight is None else weight.contiguous()
    gate = None if gate is None else gate.reshape(out.shape).contiguous()
    y: Tensor = _forward(out.contiguous(), weight, gate, float(eps), dtype)
    return y


@operator("attnzoo::linear_attention_finish")
def _forward(out: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(out, dtype=dtype)
    if out.numel():
        rows, width = out.numel() // out.shape[-1], out.shape[-1]
        with on_device(out):
            linear_attention_finish_fwd_kernel[(cdiv(rows, ROWS),)](
                out, weight, gate, y, rows, eps, DV=width, BLOCK_N=ROWS, BLOCK_DV=power_of_two(width),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return y


@_forward.register_fake
def _forward_fake(out: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(out, dtype=dtype)


@operator("attnzoo::linear_attention_finish_backward")
def _backward(
    dy: Tensor, out: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    do, dw, dg = _backward_fake(dy, out, weight, gate, eps)
    if not out.numel():
        return do, dw.zero_(), dg
    rows, width = out.numel() // out.shape[-1], out.shape[-1]
    programs = min(WAVES, cdiv(rows, ROWS))
    partial = torch.empty((programs, width), dtype=torch.float32, device=out.device)
    with on_device(out):
        linear_attention_finish_bwd_kernel[(programs,)](
            out, weight, gate, dy.contiguous(), do, partial, dg, rows, eps, programs, DV=width, BLOCK_N=ROWS,
            BLOCK_DV=power_of_two(width), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if weight is not None:
        dw.copy_(partial.sum(0))
    return do, dw, dg


@_backward.register_fake
def _backward_fake(
    dy: Tensor, out: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty((0,), dtype=torch.float32, device=out.device)
    return (
        torch.empty_like(out),
        none if weight is None else torch.empty_like(weight),
        torch.empty((0,), dtype=torch.float32, device=out.device) if gate is None else torch.empty_like(gate),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    out, weight, gate, ctx.eps, _ = inputs
    ctx.save_for_backward(out, weight, gate)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    out, weight, gate = ctx.saved_tensors
    do, dw, dg = _backward(dy, out, weight, gate, ctx.eps)
    return do, None if weight is None else dw, None if gate is None else dg, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
