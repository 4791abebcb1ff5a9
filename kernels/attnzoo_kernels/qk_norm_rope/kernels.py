"""The kernels of `attnzoo_kernels.qk_norm_rope`: one forward, one for the input's gradient, two for the matrices'.

All of them see z (B, T, N, D) as B T N vectors and hold a tile of them in halves, see `pieces`.
IN is the layout in which the map's output pairs up, OUT that in which y is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LENGTHS
from attnzoo_kernels.qk_norm_rope.pieces import (
    GATED,
    INTERLEAVED,
    LINEAR,
    NO_MAP,
    back_through,
    gated_gradient,
    hidden,
    load_block,
    load_columns,
    load_pair_vector,
    load_pairs,
    mapped,
    pair_columns,
    store_pairs,
)


@triton.jit
def locate(
    tile, rows, T, N, stride_b, stride_t, stride_n, stride_cos_b, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Offsets of a tile's vectors [BLOCK_M] in a tensor (B, T, N, D) and of their rows in the tables."""
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_bt = o_m // N
    o_n = (o_m % N).to(tl.int64)
    o_t = (o_bt % T).to(tl.int64)
    o_b = (o_bt // T).to(tl.int64)
    return o_b * stride_b + o_t * stride_t + o_n * stride_n, o_b * stride_cos_b + o_t * (2 * PAIRS), o_m < rows


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, o_table, in_rows, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """cos and sin of every pair [BLOCK_M, BLOCK_H]; 1 and 0 for pairs that are not rotated.

    The tables hold both members of a pair; only the first's cos and the second's sin are read.
    """
    o_i = tl.arange(0, BLOCK_H)
    if LAYOUT == INTERLEAVED:
        o_cos = 2 * o_i
        o_sin = 2 * o_i + 1
    else:
        o_cos = o_i
        o_sin = o_i + PAIRS
    inside = in_rows[:, None] & (o_i < PAIRS)[None, :]
    cos = tl.load(cos_ptr + o_table[:, None] + o_cos[None, :], inside, other=1.0)
    sin = tl.load(sin_ptr + o_table[:, None] + o_sin[None, :], inside, other=0.0)
    return cos, sin


@triton.jit
def inverse_rms(u, v, in_rows, eps, D: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each vector [BLOCK_M]."""
    mean = (tl.sum(u * u, 1) + tl.sum(v * v, 1)) / D + eps
    # Rows past the end are 0, and with eps = 0 their 0 / 0 would reach the sums over rows.
    return tl.rsqrt(tl.where(in_rows, mean, 1.0))


# grid (cdiv(B T N, BLOCK_M),): one program owns BLOCK_M vectors, walks the map's inner features in blocks and keeps
# the output's two halves in registers; hidden features, the map's output and the normed vectors never exist in memory.
@triton.jit(do_not_specialize=LENGTHS)
def qk_norm_rope_fwd_kernel(
    z_ptr, y_ptr, out_ptr, up_ptr, gate_ptr, norm_ptr, cos_ptr, sin_ptr,
    rows, T, N, stride_z_b, stride_z_t, stride_z_n, stride_cos_b, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    MAP: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    o_z, o_table, in_rows = locate(tile, rows, T, N, stride_z_b, stride_z_t, stride_z_n, stride_cos_b, PAIRS, BLOCK_M)
    u, v = mapped(
        z_ptr + o_z, in_rows, out_ptr, up_ptr, gate_ptr, D, PAIRS, IN, MAP, BLOCK_M, BLOCK_H, BLOCK_J, BLOCK_K
    )
    if NORM:
        rstd = inverse_rms(u, v, in_rows, eps, D)
        w_u, w_v = load_pair_vector(norm_ptr, D, PAIRS, IN, BLOCK_H)
        u = u * rstd[:, None] * w_u[None, :]
        v = v * rstd[:, None] * w_v[None, :]
    if PAIRS > 0:
        cos, sin = load_angles(cos_ptr, sin_ptr, o_table, in_rows, PAIRS, OUT, BLOCK_H)
        turned = u * cos - v * sin
        v = v * cos + u * sin
        u = turned
    o_y = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * D
    store_pairs(y_ptr + o_y, u, v, in_rows, D, PAIRS, OUT, BLOCK_H)


# grid (min(ROW_PROGRAMS, tiles),): one program owns every grid-th tile of BLOCK_M vectors. It turns dy back, takes it
# through the norm, whose input it recomputes, and through the map, and writes dz. Where matrices' gradients are needed
# it also writes dx, the gradient of the map's output, once for the kernels below. Its share of the norm weight's
# gradient stays in registers until the end. Matrices are not to be hoisted out of the loop over tiles: they would take
# the registers that the tile needs.
@triton.jit(do_not_specialize=LENGTHS)
def qk_norm_rope_bwd_input_kernel(
    dy_ptr, z_ptr, dz_ptr, dx_ptr, dnorm_ptr, out_ptr, up_ptr, gate_ptr, norm_ptr, cos_ptr, sin_ptr,
    rows, T, N, stride_y_b, stride_y_t, stride_y_n, stride_z_b, stride_z_t, stride_z_n, stride_cos_b, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    MAP: tl.constexpr, NORM: tl.constexpr, NEED_Z: tl.constexpr, NEED_X: tl.constexpr, NEED_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    sum_u = tl.zeros((BLOCK_H,), tl.float32)
    sum_v = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.range(first, tl.cdiv(rows, BLOCK_M), tl.num_programs(0), disable_licm=True):
        o_z, o_table, in_rows = locate(
            tile, rows, T, N, stride_z_b, stride_z_t, stride_z_n, stride_cos_b, PAIRS, BLOCK_M
        )
        o_y, _, _ = locate(tile, rows, T, N, stride_y_b, stride_y_t, stride_y_n, 0, PAIRS, BLOCK_M)
        o_new = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64) * D
        b_du, b_dv = load_pairs(dy_ptr + o_y, in_rows, D, PAIRS, OUT, BLOCK_M, BLOCK_H)
        du = b_du.to(tl.float32)
        dv = b_dv.to(tl.float32)
        if PAIRS > 0:
            cos, sin = load_angles(cos_ptr, sin_ptr, o_table, in_rows, PAIRS, OUT, BLOCK_H)
            turned = du * cos + dv * sin
            dv = dv * cos - du * sin
            du = turned
        if NORM:
            u, v = mapped(
                z_ptr + o_z, in_rows, out_ptr, up_ptr, gate_ptr, D, PAIRS, IN, MAP, BLOCK_M, BLOCK_H, BLOCK_J, BLOCK_K
            )
            rstd = inverse_rms(u, v, in_rows, eps, D)
            w_u, w_v = load_pair_vector(norm_ptr, D, PAIRS, IN, BLOCK_H)
            u = u * rstd[:, None]
            v = v * rstd[:, None]
            sum_u += tl.sum(du * u, 0)
            sum_v += tl.sum(dv * v, 0)
            du = du * w_u[None, :]
            dv = dv * w_v[None, :]
            along = (tl.sum(du * u, 1) + tl.sum(dv * v, 1)) / D
            du = rstd[:, None] * (du - u * along[:, None])
            dv = rstd[:, None] * (dv - v * along[:, None])
        if NEED_X:
            store_pairs(dx_ptr + o_new, du, dv, in_rows, D, PAIRS, IN, BLOCK_H)
        if NEED_Z:
            if MAP == NO_MAP:
                store_pairs(dz_ptr + o_new, du, dv, in_rows, D, PAIRS, IN, BLOCK_H)
            else:
                b_du = du.to(z_ptr.dtype.element_ty)
                b_dv = dv.to(z_ptr.dtype.element_ty)
                for k in range(0, D, BLOCK_K):
                    if MAP == LINEAR:
                        dz = back_through(b_du, b_dv, out_ptr, k, D, PAIRS, IN, BLOCK_H, BLOCK_K)
                    else:
                        dz = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                        for j in range(0, D, BLOCK_J):
                            up, gate = hidden(z_ptr + o_z, in_rows, up_ptr, gate_ptr, j, D, BLOCK_M, BLOCK_J, BLOCK_K)
                            da = 2.0 * back_through(b_du, b_dv, out_ptr, j, D, PAIRS, IN, BLOCK_H, BLOCK_J)
                            dup, dgate = gated_gradient(up, gate, da)
                            b_up = load_block(up_ptr, j, k, b_du.dtype, D, BLOCK_J, BLOCK_K)
                            b_gate = load_block(gate_ptr, j, k, b_du.dtype, D, BLOCK_J, BLOCK_K)
                            dz = tl.dot(dup.to(b_du.dtype), b_up, dz, input_precision="ieee")
                            dz = tl.dot(dgate.to(b_du.dtype), b_gate, dz, input_precision="ieee")
                    o_k = k + tl.arange(0, BLOCK_K)
                    inside = in_rows[:, None] & (o_k < D)[None, :]
                    tl.store(dz_ptr + o_new[:, None] + o_k[None, :], dz.to(dz_ptr.dtype.element_ty), inside)
    if NEED_NORM:
        o_i = tl.arange(0, BLOCK_H)
        o_u, o_v = pair_columns(D, PAIRS, IN, BLOCK_H)
        tl.store(dnorm_ptr + first * D + o_u, sum_u, o_i < (D + 1) // 2)
        tl.store(dnorm_ptr + first * D + o_v, sum_v, o_i < D // 2)


@triton.jit
def store_share(ptr, program, i, j, b, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """One program's block of a sum over all vectors, into a buffer (programs, D, D)."""
    o_i = i + tl.arange(0, BLOCK_I)
    o_j = j + tl.arange(0, BLOCK_J)
    inside = (o_i < D)[:, None] & (o_j < D)[None, :]
    tl.store(ptr + program.to(tl.int64) * D * D + o_i[:, None] * D + o_j[None, :], b, inside)


# grid (programs, cdiv(D, BLOCK_I), cdiv(D, BLOCK_J)): one program owns a block of the gradient of W or Wdown and every
# grid-th tile of vectors; it sums dx^T h over them, h being z or hidden features, recomputed.
@triton.jit(do_not_specialize=LENGTHS)
def qk_norm_rope_bwd_out_kernel(
    dx_ptr, z_ptr, dout_ptr, up_ptr, gate_ptr,
    rows, T, N, stride_x_b, stride_x_t, stride_x_n, stride_z_b, stride_z_t, stride_z_n,
    D: tl.constexpr, MAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first, i, j = tl.program_id(0), tl.program_id(1) * BLOCK_I, tl.program_id(2) * BLOCK_J
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for tile in range(first, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        o_z, _, in_rows = locate(tile, rows, T, N, stride_z_b, stride_z_t, stride_z_n, 0, 0, BLOCK_M)
        o_x, _, _ = locate(tile, rows, T, N, stride_x_b, stride_x_t, stride_x_n, 0, 0, BLOCK_M)
        b_dx = load_columns(dx_ptr + o_x, in_rows, i, D, BLOCK_I)  # [BLOCK_M, BLOCK_I]
        if MAP == LINEAR:
            b_h = load_columns(z_ptr + o_z, in_rows, j, D, BLOCK_J)  # [BLOCK_M, BLOCK_J]
        else:
            up, gate = hidden(z_ptr + o_z, in_rows, up_ptr, gate_ptr, j, D, BLOCK_M, BLOCK_J, BLOCK_K)
            b_h = (up * gate).to(b_dx.dtype)
        total = tl.dot(tl.trans(b_dx), b_h, total, input_precision="ieee")
    if MAP == GATED:
        total *= 2.0
    store_share(dout_ptr, first, i, j, total, D, BLOCK_I, BLOCK_J)


# grid (programs, cdiv(D, BLOCK_J), cdiv(D, BLOCK_K)): one program owns a block of the gradients of Wup and Wgate and
# every grid-th tile of vectors; it recomputes its BLOCK_J hidden features and no others.
@triton.jit(do_not_specialize=LENGTHS)
def qk_norm_rope_bwd_hidden_kernel(
    dx_ptr, z_ptr, dup_ptr, dgate_ptr, out_ptr, up_ptr, gate_ptr,
    rows, T, N, stride_x_b, stride_x_t, stride_x_n, stride_z_b, stride_z_t, stride_z_n,
    D: tl.constexpr, NEED_UP: tl.constexpr, NEED_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first, j, k = tl.program_id(0), tl.program_id(1) * BLOCK_J, tl.program_id(2) * BLOCK_K
    sum_up = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    sum_gate = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    for tile in range(first, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        o_z, _, in_rows = locate(tile, rows, T, N, stride_z_b, stride_z_t, stride_z_n, 0, 0, BLOCK_M)
        o_x, _, _ = locate(tile, rows, T, N, stride_x_b, stride_x_t, stride_x_n, 0, 0, BLOCK_M)
        da = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        for i in range(0, D, BLOCK_I):
            b_dx = load_columns(dx_ptr + o_x, in_rows, i, D, BLOCK_I)
            da = tl.dot(b_dx, load_block(out_ptr, i, j, b_dx.dtype, D, BLOCK_I, BLOCK_J), da, input_precision="ieee")
        up, gate = hidden(z_ptr + o_z, in_rows, up_ptr, gate_ptr, j, D, BLOCK_M, BLOCK_J, BLOCK_K)
        dup, dgate = gated_gradient(up, gate, 2.0 * da)
        b_z = load_columns(z_ptr + o_z, in_rows, k, D, BLOCK_K)
        if NEED_UP:
            sum_up = tl.dot(tl.trans(dup.to(b_z.dtype)), b_z, sum_up, input_precision="ieee")
        if NEED_GATE:
            sum_gate = tl.dot(tl.trans(dgate.to(b_z.dtype)), b_z, sum_gate, input_precision="ieee")
    if NEED_UP:
        store_share(dup_ptr, first, j, k, sum_up, D, BLOCK_J, BLOCK_K)
    if NEED_GATE:
        store_share(dgate_ptr, first, j, k, sum_gate, D, BLOCK_J, BLOCK_K)
