"""Projections by experts: every (token, slot) pair is multiplied by the matrix of its own expert.

    y_p = gate_p W[e_p] x_p
    dx_p = gate_p W[e_p]^T dy_p,  dgate_p = x_p W[e_p]^T dy_p,  dW[e] = sum_p gate_p dy_p x_p^T

Pairs are visited in the order of their experts, and each tile belongs to one expert. Rows are read and written in
place: no sorted copy of the input or of the output exists. The host does not know how many pairs an expert has: it
launches as many tiles as there can be, and surplus programs return at once. Experts have no capacity limit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnzoo_kernels.launch import (
    dense_rows,
    empty_if,
    gradient_buffer,
    on_device,
    operator,
    precision,
    prepare,
    strides,
)
from attnzoo_kernels.primitives import LENGTHS
from attnzoo_kernels.tuning import Lines, Table, cdiv, power_of_two

# Tiles of BLOCK_T rows by BLOCK_S columns, whatever the width.
LINES: Lines = {
    "expert_projection_rows": {
        ("cuda", 2): {0: (128, 128, 8, 3)},
        ("cuda", 4): {0: (64, 64, 4, 2)},
        ("hip", 2): {0: (128, 128, 8, 1)},
        ("hip", 4): {0: (64, 64, 4, 1)},
    },
    "expert_projection_bwd_weights": {
        ("cuda", 2): {0: (128, 128, 8, 3)},
        ("cuda", 4): {0: (64, 64, 4, 2)},
        ("hip", 2): {0: (128, 128, 8, 1)},
        ("hip", 4): {0: (64, 64, 4, 1)},
    },
}

TABLE = Table(("BLOCK_T", "BLOCK_S"), LINES)

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

    A row's features are stored in g pieces: x (n, g, k, C) is token n, slot k of g C features, so that a kernel reads
    queries and outputs in the layout of attention, where a key/value head's slots are adjacent. An input that all slots
    share is expanded along k, not copied. Gradients go to x, weight and gates, once; deterministic.

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
    y: Tensor = _forward(x, weight, order, ends, gates, out_groups)
    return y


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
    """Offsets of the features o of a row of WIDTH features in pieces of PIECE."""
    if WIDTH == PIECE:
        at = o.to(tl.int64)
    else:
        at = (o // PIECE).to(tl.int64) * stride_g + o % PIECE
    return at


# grid (tiles of pairs * tiles of columns): one program owns BLOCK_T pairs of one expert and BLOCK_S of the OUT columns
# of y. With dot_ptr it also stores its columns' part of sum_o z_o (W x)_o, (column tiles, pairs).
@triton.jit(do_not_specialize=LENGTHS)
def expert_projection_rows_kernel(
    x_ptr, w_ptr, order_ptr, ends_ptr, gates_ptr, y_ptr, z_ptr, dot_ptr,
    stride_x_n, stride_x_g, stride_x_k, stride_w_e, stride_w_o, stride_w_i, stride_y_n, stride_y_g, stride_y_k,
    stride_z_n, stride_z_g, stride_z_k, stride_gates_n, stride_gates_k, N, SLOTS, pairs,
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
    x_row = x_ptr + o_n * stride_x_n + o_slot * stride_x_k
    w_ptr += e.to(tl.int64) * stride_w_e + o_o.to(tl.int64)[None, :] * stride_w_o
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for first in range(0, IN, BLOCK_K):
        o_i = first + tl.arange(0, BLOCK_K)
        at = feature_offsets(o_i, stride_x_g, IN, IN_PIECE)
        b_x = tl.load(x_row[:, None] + at[None, :], mask=inside[:, None] & (o_i < IN)[None, :], other=0.0)
        w_mask = (o_i < IN)[:, None] & (o_o < OUT)[None, :]
        b_w = tl.load(w_ptr + o_i.to(tl.int64)[:, None] * stride_w_i, mask=w_mask, other=0.0)
        acc = tl.dot(b_x, b_w, acc=acc, input_precision=PRECISION)
    mask = inside[:, None] & (o_o < OUT)[None, :]
    at = feature_offsets(o_o, stride_y_g, OUT, OUT_PIECE)
    if dot_ptr is not None:
        z_at = feature_offsets(o_o, stride_z_g, OUT, OUT_PIECE)
        z_row = z_ptr + o_n * stride_z_n + o_slot * stride_z_k
        b_z = tl.load(z_row[:, None] + z_at[None, :], mask=mask, other=0.0)
        dot = tl.sum(acc * b_z.to(tl.float32), 1)
        tl.store(dot_ptr + column.to(tl.int64) * pairs + pair, dot, mask=inside)
    if gates_ptr is not None:
        gate_at = o_n * stride_gates_n + o_slot * stride_gates_k
        gate = tl.load(gates_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
        acc *= gate[:, None]
    y_row = y_ptr + o_n * stride_y_n + o_slot * stride_y_k
    tl.store(y_row[:, None] + at[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


# grid (N * tiles of OUT * tiles of IN): one program owns a tile of one expert's gradient and walks that expert's pairs
# in order. An expert without pairs gets zeros.
@triton.jit
def expert_projection_bwd_weights_kernel(
    x_ptr, dy_ptr, order_ptr, ends_ptr, gates_ptr, dw_ptr,
    stride_x_n, stride_x_g, stride_x_k, stride_y_n, stride_y_g, stride_y_k, stride_gates_n, stride_gates_k, SLOTS,
    IN: tl.constexpr, IN_PIECE: tl.constexpr, OUT: tl.constexpr, OUT_PIECE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(IN, BLOCK_S)
    tiles = tl.cdiv(OUT, BLOCK_T) * columns
    e = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    o_o = tile // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    o_i = tile % columns * BLOCK_S + tl.arange(0, BLOCK_S)
    x_at = feature_offsets(o_i, stride_x_g, IN, IN_PIECE)
    y_at = feature_offsets(o_o, stride_y_g, OUT, OUT_PIECE)
    lo = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    hi = tl.load(ends_ptr + e)
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for start in range(lo, hi, BLOCK_K):
        o_p = start + tl.arange(0, BLOCK_K)
        inside = o_p < hi
        pair = tl.load(order_ptr + o_p, mask=inside, other=0)
        o_n = pair // SLOTS
        o_slot = pair % SLOTS
        x_row = x_ptr + o_n * stride_x_n + o_slot * stride_x_k
        y_row = dy_ptr + o_n * stride_y_n + o_slot * stride_y_k
        b_x = tl.load(x_row[:, None] + x_at[None, :], mask=inside[:, None] & (o_i < IN)[None, :], other=0.0)
        b_dy = tl.load(y_row[:, None] + y_at[None, :], mask=inside[:, None] & (o_o < OUT)[None, :], other=0.0)
        if gates_ptr is not None:
            gate_at = o_n * stride_gates_n + o_slot * stride_gates_k
            gate = tl.load(gates_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
            b_dy = (b_dy.to(tl.float32) * gate[:, None]).to(b_x.dtype)
        acc = tl.dot(tl.trans(b_dy), b_x, acc=acc, input_precision=PRECISION)
    at = e.to(tl.int64) * OUT * IN + o_o.to(tl.int64)[:, None] * IN + o_i[None, :]
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=(o_o < OUT)[:, None] & (o_i < IN)[None, :])


@operator("attnzoo::expert_linear")
def _forward(
    x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, out_groups: int
) -> Tensor:  # fmt: skip
    y: Tensor = _forward_fake(x, weight, order, ends, gates, out_groups)
    if y.numel():
        grid, arguments, _ = _rows(x, weight, order, ends, gates, y)
        with on_device(x):
            launch = prepare(expert_projection_rows_kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return y


@_forward.register_fake
def _forward_fake(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    out_groups = others[-1]
    shape = (x.shape[0], out_groups, x.shape[2], weight.shape[1] // out_groups)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


@operator("attnzoo::expert_linear_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None,
    need_x: bool, need_weight: bool, need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (of every slot, also where they share x), weight and, in float32, gates; empty if unneeded."""
    dx, dw, dgates = gradients = _gradient_buffers(x, weight, need_x, need_weight, need_gates)
    if dy.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    with on_device(x):
        if need_x or need_gates:
            grid, arguments, dot = _rows(dy, weight.transpose(1, 2), order, ends, gates, dx, x if need_gates else None)
            launch = prepare(expert_projection_rows_kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
            if dot is not None:
                dgates.copy_(dot.sum(0).view(dgates.shape))
        if need_weight:
            x, dy = dense_rows(x), dense_rows(dy)
            N, OUT, IN = weight.shape
            config = TABLE.config("expert_projection_bwd_weights", x.dtype, x.device)
            grid = (N * cdiv(OUT, config["BLOCK_T"]) * cdiv(IN, config["BLOCK_S"]),)
            launch = prepare(
                expert_projection_bwd_weights_kernel, grid,
                x_ptr=x, dy_ptr=dy, order_ptr=order, ends_ptr=ends, gates_ptr=gates, dw_ptr=dw,
                **strides(x, "x", "ngk"), **strides(dy, "y", "ngk"), **strides(gates, "gates", "nk"), SLOTS=x.shape[2],
                IN=IN, IN_PIECE=x.shape[3], OUT=OUT, OUT_PIECE=dy.shape[3], PRECISION=precision(x.dtype),
                BLOCK_K=PAIRS, **config.options(),
            )  # fmt: skip
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return gradients


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_buffers(x, weight, *others[-3:])


def _gradient_buffers(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gradient_buffer(x, need_x or need_gates),
        gradient_buffer(weight, need_weight),
        empty_if(need_gates, (x.shape[0], x.shape[2]), torch.float32, x.device),
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


def _rows(
    x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, y: Tensor, z: Tensor | None = None
) -> tuple[tuple[int], dict[str, Any], Tensor | None]:
    """Grid and arguments of the kernel that fills y.

    With z, laid out like y, it also fills the third, the parts (column tiles, pairs) of the sums of z and ungated y.
    """
    x, z = dense_rows(x), dense_rows(z)
    N, OUT, IN = weight.shape
    pairs = order.shape[0]
    config = TABLE.config("expert_projection_rows", x.dtype, x.device)
    columns = cdiv(OUT, config["BLOCK_S"])
    dot = None if z is None else torch.empty((columns, pairs), dtype=torch.float32, device=x.device)
    arguments = {
        "x_ptr": x, "w_ptr": weight, "order_ptr": order, "ends_ptr": ends, "gates_ptr": gates, "y_ptr": y, "z_ptr": z,
        "dot_ptr": dot, **strides(x, "x", "ngk"), **strides(weight, "w", "eoi"), **strides(y, "y", "ngk"),
        **strides(z, "z", "ngk"), **strides(gates, "gates", "nk"), "N": N, "SLOTS": x.shape[2], "pairs": pairs,
        "IN": IN, "IN_PIECE": x.shape[3], "OUT": OUT, "OUT_PIECE": y.shape[3], "PRECISION": precision(x.dtype),
        "BLOCK_E": power_of_two(N), "BLOCK_K": STEP[x.element_size()], **config.options(),
    }  # fmt: skip
    return ((cdiv(pairs, config["BLOCK_T"]) + N) * columns,), arguments, dot
