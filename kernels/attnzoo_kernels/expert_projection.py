"""Projections by experts: every (token, slot) pair is multiplied by the matrix of its own expert.

    y_p = gate_p W[e_p] x_p
    dx_p = gate_p W[e_p]^T dy_p,  dgate_p = x_p W[e_p]^T dy_p,  dW[e] = sum_p gate_p dy_p x_p^T

Pairs are visited in the order of their experts, and each tile belongs to one expert. Rows are read from and written to
where they lie: no sorted copy of the input or of the output exists. The host does not know how many pairs an expert
has: it launches as many tiles as there can be, and the surplus returns at once. No expert has a capacity.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from attnzoo_kernels.launch import dense_rows, on_device
from attnzoo_kernels.routing_tuning import config

STEP = {2: 64, 4: 32}
"""Bytes of an element -> features that one step of a program adds to a product of rows."""

PAIRS = 32
"""Pairs that one step adds to the gradient of a weight."""


def expert_linear(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    *,
    out_groups: int = 1,
    gates: Tensor | None = None,
) -> Tensor:
    """Each row of x times the matrix of its expert, and its gate.

    A row's features lie in g pieces: x (n, g, k, C) is token n, slot k of g C features, so that a kernel reads queries
    and outputs where attention keeps a key/value head's slots side by side. An input that all slots share is expanded
    along k, not copied. Gradients go to x, weight and gates, once; deterministic.

    Args:
        x: (n, g, k, C), float16, bfloat16 or float32.
        weight: (N, out, g C) of x's dtype.
        order: (n k,) int64, the pairs token * k + slot sorted by expert.
        ends: (N,) int32, end of each expert's pairs in order.
        out_groups: pieces of an output row; divides out.
        gates: (n, k) floating, or None for 1.

    Returns:
        (n, out_groups, k, out / out_groups) in x's dtype.
    """
    return _forward(x, weight, order, ends, gates, out_groups)


@triton.jit
def tile_of_expert(number, ends_ptr, N, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Expert of the tile of that number, its first place in the order and the end of the expert's; expert N if none."""
    o_e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + o_e, mask=o_e < N, other=0)
    begin = tl.load(ends_ptr + o_e - 1, mask=(o_e > 0) & (o_e < N), other=0)
    tiles = (end - begin + BLOCK_T - 1) // BLOCK_T
    behind = tl.cumsum(tiles, 0)
    e = tl.sum(((behind <= number) & (o_e < N)).to(tl.int32), 0)
    own = o_e == e
    first = tl.sum(tl.where(own, begin + (number - behind + tiles) * BLOCK_T, 0), 0)
    return e, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def feature_offsets(o, stride_g, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Where the features o of a row of WIDTH features in pieces of PIECE lie."""
    if WIDTH == PIECE:
        at = o.to(tl.int64)
    else:
        at = (o // PIECE).to(tl.int64) * stride_g + o % PIECE
    return at


# grid (tiles of pairs * tiles of columns): one program owns BLOCK_T pairs of one expert and BLOCK_S of the OUT columns
# of y. With dot_ptr it also leaves the part of sum_o z_o (W x)_o that its columns bring, (column tiles, pairs).
@triton.jit
def expert_projection_rows_kernel(
    x_ptr, w_ptr, order_ptr, ends_ptr, gates_ptr, y_ptr, z_ptr, dot_ptr,
    stride_xn, stride_xg, stride_xk, stride_we, stride_wo, stride_wi, stride_yn, stride_yg, stride_yk,
    stride_zn, stride_zg, stride_zk, stride_gn, stride_gk, N, SLOTS, pairs,
    IN: tl.constexpr, IN_PIECE: tl.constexpr, OUT: tl.constexpr, OUT_PIECE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(OUT, BLOCK_S)
    column = tl.program_id(0) % columns
    e, start, end = tile_of_expert(tl.program_id(0) // columns, ends_ptr, N, BLOCK_E, BLOCK_T)
    if e >= N:
        return
    o_p = start + tl.arange(0, BLOCK_T)
    inside = o_p < end
    pair = tl.load(order_ptr + o_p, mask=inside, other=0)
    o_n = pair // SLOTS
    o_slot = pair % SLOTS
    o_o = column * BLOCK_S + tl.arange(0, BLOCK_S)
    x_row = x_ptr + o_n * stride_xn + o_slot * stride_xk
    w_ptr += e.to(tl.int64) * stride_we + o_o.to(tl.int64)[None, :] * stride_wo
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for first in range(0, IN, BLOCK_K):
        o_i = first + tl.arange(0, BLOCK_K)
        at = feature_offsets(o_i, stride_xg, IN, IN_PIECE)
        b_x = tl.load(x_row[:, None] + at[None, :], mask=inside[:, None] & (o_i < IN)[None, :], other=0.0)
        w_mask = (o_i < IN)[:, None] & (o_o < OUT)[None, :]
        b_w = tl.load(w_ptr + o_i.to(tl.int64)[:, None] * stride_wi, mask=w_mask, other=0.0)
        acc = tl.dot(b_x, b_w, acc=acc, input_precision=PRECISION)
    mask = inside[:, None] & (o_o < OUT)[None, :]
    at = feature_offsets(o_o, stride_yg, OUT, OUT_PIECE)
    if dot_ptr is not None:
        z_at = feature_offsets(o_o, stride_zg, OUT, OUT_PIECE)
        z_row = z_ptr + o_n * stride_zn + o_slot * stride_zk
        b_z = tl.load(z_row[:, None] + z_at[None, :], mask=mask, other=0.0)
        dot = tl.sum(acc * b_z.to(tl.float32), 1)
        tl.store(dot_ptr + column.to(tl.int64) * pairs + pair, dot, mask=inside)
    if gates_ptr is not None:
        gate = tl.load(gates_ptr + o_n * stride_gn + o_slot * stride_gk, mask=inside, other=0.0).to(tl.float32)
        acc *= gate[:, None]
    y_row = y_ptr + o_n * stride_yn + o_slot * stride_yk
    tl.store(y_row[:, None] + at[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


# grid (N * tiles of OUT * tiles of IN): one program owns a tile of one expert's gradient and walks that expert's pairs
# in order. An expert without pairs gets zeros.
@triton.jit
def expert_projection_bwd_weights_kernel(
    x_ptr, dy_ptr, order_ptr, ends_ptr, gates_ptr, dw_ptr,
    stride_xn, stride_xg, stride_xk, stride_yn, stride_yg, stride_yk, stride_gn, stride_gk, SLOTS,
    IN: tl.constexpr, IN_PIECE: tl.constexpr, OUT: tl.constexpr, OUT_PIECE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(IN, BLOCK_S)
    tiles = tl.cdiv(OUT, BLOCK_T) * columns
    e = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    o_o = tile // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    o_i = tile % columns * BLOCK_S + tl.arange(0, BLOCK_S)
    x_at = feature_offsets(o_i, stride_xg, IN, IN_PIECE)
    y_at = feature_offsets(o_o, stride_yg, OUT, OUT_PIECE)
    lo = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    hi = tl.load(ends_ptr + e)
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for start in range(lo, hi, BLOCK_K):
        o_p = start + tl.arange(0, BLOCK_K)
        inside = o_p < hi
        pair = tl.load(order_ptr + o_p, mask=inside, other=0)
        o_n = pair // SLOTS
        o_slot = pair % SLOTS
        x_row = x_ptr + o_n * stride_xn + o_slot * stride_xk
        y_row = dy_ptr + o_n * stride_yn + o_slot * stride_yk
        b_x = tl.load(x_row[:, None] + x_at[None, :], mask=inside[:, None] & (o_i < IN)[None, :], other=0.0)
        b_dy = tl.load(y_row[:, None] + y_at[None, :], mask=inside[:, None] & (o_o < OUT)[None, :], other=0.0)
        if gates_ptr is not None:
            gate = tl.load(gates_ptr + o_n * stride_gn + o_slot * stride_gk, mask=inside, other=0.0).to(tl.float32)
            b_dy = (b_dy.to(tl.float32) * gate[:, None]).to(b_x.dtype)
        acc = tl.dot(tl.trans(b_dy), b_x, acc=acc, input_precision=PRECISION)
    at = e.to(tl.int64) * OUT * IN + o_o.to(tl.int64)[:, None] * IN + o_i[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(o_o < OUT)[:, None] & (o_i < IN)[None, :])


@library.custom_op("attnzoo::expert_linear", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, out_groups: int
) -> Tensor:  # fmt: skip
    y = _forward_fake(x, weight, order, ends, gates, out_groups)
    if y.numel():
        _launch_rows(x, weight, order, ends, gates, y)
    return y


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, out_groups: int
) -> Tensor:  # fmt: skip
    shape = (x.shape[0], out_groups, x.shape[2], weight.shape[1] // out_groups)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@library.custom_op("attnzoo::expert_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None,
    need_x: bool, need_weight: bool, need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (of every slot, also where they share x), weight and, in float32, gates; empty if unneeded."""
    dx, dw, dgates = made = _backward_fake(dy, x, weight, order, ends, gates, need_x, need_weight, need_gates)
    if dy.numel() == 0:
        for gradient in made:
            gradient.zero_()
        return made
    if need_x or need_gates:
        dot = _launch_rows(dy, weight.transpose(1, 2), order, ends, gates, dx, x if need_gates else None)
        if dot is not None:
            dgates.copy_(dot.sum(0).view(dgates.shape))
    if need_weight:
        x, dy = dense_rows(x), dense_rows(dy)
        N, OUT, IN = weight.shape
        tiles = config("expert_projection_bwd_weights", x.dtype, x.device)
        grid = (N * -(-OUT // tiles.BLOCK_T) * -(-IN // tiles.BLOCK_S),)
        with on_device(x):
            expert_projection_bwd_weights_kernel[grid](
                x, dy, order, ends, gates, dw, *x.stride()[:3], *dy.stride()[:3], *_gate_strides(gates), x.shape[2],
                IN=IN, IN_PIECE=x.shape[3], OUT=OUT, OUT_PIECE=dy.shape[3], PRECISION=_precision(x), BLOCK_K=PAIRS,
                **tiles.options(),
            )  # fmt: skip
    return made


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None,
    need_x: bool, need_weight: bool, need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def made(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=x.device)

    return (
        made(tuple(x.shape), need_x or need_gates, x.dtype),
        made(tuple(weight.shape), need_weight, weight.dtype),
        made((x.shape[0], x.shape[2]), need_gates, torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, order, ends, gates = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dw, dgates = _backward(dy, x, weight, order, ends, gates, need[0], need[1], need[4])
    return (
        dx if need[0] else None,
        dw if need[1] else None,
        None,
        None,
        dgates.to(gates.dtype) if need[4] else None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _launch_rows(
    x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, y: Tensor, z: Tensor | None = None
) -> Tensor | None:
    """Fills y; with z, laid out like y, also returns the parts (column tiles, pairs) of the sums of z and ungated y."""
    x, z = dense_rows(x), None if z is None else dense_rows(z)
    N, OUT, IN = weight.shape
    pairs = order.shape[0]
    tiles = config("expert_projection_rows", x.dtype, x.device)
    columns = -(-OUT // tiles.BLOCK_S)
    grid = ((-(-pairs // tiles.BLOCK_T) + N) * columns,)
    dot = None if z is None else torch.empty((columns, pairs), dtype=torch.float32, device=x.device)
    with on_device(x):
        expert_projection_rows_kernel[grid](
            x, weight, order, ends, gates, y, z, dot, *x.stride()[:3], *weight.stride(), *y.stride()[:3],
            *((0, 0, 0) if z is None else z.stride()[:3]), *_gate_strides(gates), N, x.shape[2], pairs,
            IN=IN, IN_PIECE=x.shape[3], OUT=OUT, OUT_PIECE=y.shape[3], PRECISION=_precision(x),
            BLOCK_E=triton.next_power_of_2(N), BLOCK_K=STEP[x.element_size()], **tiles.options(),
        )  # fmt: skip
    return dot


def _gate_strides(gates: Tensor | None) -> tuple[int, int]:
    return (0, 0) if gates is None else (gates.stride(0), gates.stride(1))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"
