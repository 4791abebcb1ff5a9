"""Pieces of qk_norm_rope: a tile of head vectors as two half tiles, and the map that all heads share.

A tile of BLOCK_M vectors of width D is held as two tiles [BLOCK_M, BLOCK_H], BLOCK_H >= D / 2, the first and the
second members of feature pairs. A rotation then is arithmetic between two tiles and moves nothing, whatever its
style: the style only says which columns pair up. Where a map comes before the rotation, its matrix's rows are read in
that order, so the product arrives in halves. Features that are not rotated pair up too and pass through.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the members of pair i; the first PAIRS pairs are rotated.
HALF = tl.constexpr(0)  # i and i + PAIRS; among the rest the first half with the second
INTERLEAVED = tl.constexpr(1)  # 2 i and 2 i + 1
REGROUPED = tl.constexpr(2)  # as HALF where rotated, as INTERLEAVED in the rest

NO_MAP = tl.constexpr(0)
LINEAR = tl.constexpr(1)
GATED = tl.constexpr(2)


@triton.jit
def pair_columns(D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr):
    """Columns [BLOCK_H] of the first and second members."""
    o_i = tl.arange(0, BLOCK_H)
    if LAYOUT == INTERLEAVED:
        o_u = 2 * o_i
        o_v = 2 * o_i + 1
    elif PAIRS == 0:
        o_u = o_i
        o_v = o_i + (D + 1) // 2
    elif 2 * PAIRS == D:
        o_u = o_i
        o_v = o_i + PAIRS
    elif LAYOUT == HALF:
        o_u = tl.where(o_i < PAIRS, o_i, o_i + PAIRS)
        o_v = tl.where(o_i < PAIRS, o_i + PAIRS, o_i + (D + 1) // 2)
    else:
        o_u = tl.where(o_i < PAIRS, o_i, 2 * o_i)
        o_v = tl.where(o_i < PAIRS, o_i + PAIRS, 2 * o_i + 1)
    return o_u, o_v


@triton.jit
def load_pairs(
    row_ptr, in_rows,
    D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Both halves [BLOCK_M, BLOCK_H] of the vectors that the pointers row_ptr [BLOCK_M] start; 0 outside."""
    if LAYOUT == INTERLEAVED:
        # One contiguous load, split in registers, instead of two that skip every other element.
        o_d = tl.arange(0, 2 * BLOCK_H)
        b = tl.load(row_ptr[:, None] + o_d[None, :], in_rows[:, None] & (o_d < D)[None, :], other=0.0)
        b_u, b_v = tl.split(tl.reshape(b, (BLOCK_M, BLOCK_H, 2)))
    else:
        o_i = tl.arange(0, BLOCK_H)
        o_u, o_v = pair_columns(D, PAIRS, LAYOUT, BLOCK_H)
        in_u, in_v = (o_i < (D + 1) // 2)[None, :], (o_i < D // 2)[None, :]
        b_u = tl.load(row_ptr[:, None] + o_u[None, :], in_rows[:, None] & in_u, other=0.0)
        b_v = tl.load(row_ptr[:, None] + o_v[None, :], in_rows[:, None] & in_v, other=0.0)
    return b_u, b_v


@triton.jit
def store_pairs(
    row_ptr, b_u, b_v, in_rows,
    D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_pairs`."""
    if LAYOUT == INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_H)
        b = tl.interleave(b_u, b_v).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr[:, None] + o_d[None, :], b, in_rows[:, None] & (o_d < D)[None, :])
    else:
        o_i = tl.arange(0, BLOCK_H)
        o_u, o_v = pair_columns(D, PAIRS, LAYOUT, BLOCK_H)
        in_u, in_v = (o_i < (D + 1) // 2)[None, :], (o_i < D // 2)[None, :]
        tl.store(row_ptr[:, None] + o_u[None, :], b_u.to(row_ptr.dtype.element_ty), in_rows[:, None] & in_u)
        tl.store(row_ptr[:, None] + o_v[None, :], b_v.to(row_ptr.dtype.element_ty), in_rows[:, None] & in_v)


@triton.jit
def load_pair_vector(ptr, D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves [BLOCK_H] of a vector [D], in float32."""
    o_i = tl.arange(0, BLOCK_H)
    o_u, o_v = pair_columns(D, PAIRS, LAYOUT, BLOCK_H)
    b_u = tl.load(ptr + o_u, o_i < (D + 1) // 2, other=0.0).to(tl.float32)
    b_v = tl.load(ptr + o_v, o_i < D // 2, other=0.0).to(tl.float32)
    return b_u, b_v


@triton.jit
def load_pair_rows(
    w_ptr, k, dtype,
    D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns k .. k + BLOCK - 1 of a matrix [D, D], its rows in halves: twice [BLOCK_H, BLOCK]."""
    o_i = tl.arange(0, BLOCK_H)
    o_k = k + tl.arange(0, BLOCK)
    o_u, o_v = pair_columns(D, PAIRS, LAYOUT, BLOCK_H)
    in_u, in_v = (o_i < (D + 1) // 2)[:, None], (o_i < D // 2)[:, None]
    in_k = (o_k < D)[None, :]
    b_u = tl.load(w_ptr + o_u[:, None] * D + o_k[None, :], in_u & in_k, other=0.0).to(dtype)
    b_v = tl.load(w_ptr + o_v[:, None] * D + o_k[None, :], in_v & in_k, other=0.0).to(dtype)
    return b_u, b_v


@triton.jit
def load_block(w_ptr, j, k, dtype, D: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows from j and columns from k of a matrix [D, D]: [BLOCK_J, BLOCK_K]."""
    o_j = j + tl.arange(0, BLOCK_J)
    o_k = k + tl.arange(0, BLOCK_K)
    inside = (o_j < D)[:, None] & (o_k < D)[None, :]
    return tl.load(w_ptr + o_j[:, None] * D + o_k[None, :], inside, other=0.0).to(dtype)


@triton.jit
def load_columns(row_ptr, in_rows, k, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns k .. k + BLOCK - 1 of the vectors: [BLOCK_M, BLOCK]."""
    o_k = k + tl.arange(0, BLOCK)
    return tl.load(row_ptr[:, None] + o_k[None, :], in_rows[:, None] & (o_k < D)[None, :], other=0.0)


@triton.jit
def hidden(
    z_row_ptr, in_rows, up_ptr, gate_ptr, j,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Hidden features j .. j + BLOCK_J - 1 of the gated map: z up^T and sigmoid(z gate^T), [BLOCK_M, BLOCK_J]."""
    up = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for k in range(0, D, BLOCK_K):
        b_z = load_columns(z_row_ptr, in_rows, k, D, BLOCK_K)  # [BLOCK_M, BLOCK_K]
        b_up = load_block(up_ptr, j, k, b_z.dtype, D, BLOCK_J, BLOCK_K)
        b_gate = load_block(gate_ptr, j, k, b_z.dtype, D, BLOCK_J, BLOCK_K)
        up = tl.dot(b_z, tl.trans(b_up), up, input_precision="ieee")
        gate = tl.dot(b_z, tl.trans(b_gate), gate, input_precision="ieee")
    return up, tl.sigmoid(gate)


@triton.jit
def mapped(
    z_row_ptr, in_rows, out_ptr, up_ptr, gate_ptr,
    D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, MAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The map's output in halves, float32: z, z out^T or 2 (z up^T * sigmoid(z gate^T)) out^T."""
    if MAP == NO_MAP:
        b_u, b_v = load_pairs(z_row_ptr, in_rows, D, PAIRS, LAYOUT, BLOCK_M, BLOCK_H)
        u = b_u.to(tl.float32)
        v = b_v.to(tl.float32)
    else:
        u = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        v = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        dtype = z_row_ptr.dtype.element_ty
        if MAP == LINEAR:
            for k in range(0, D, BLOCK_K):
                b_z = load_columns(z_row_ptr, in_rows, k, D, BLOCK_K)
                b_wu, b_wv = load_pair_rows(out_ptr, k, dtype, D, PAIRS, LAYOUT, BLOCK_H, BLOCK_K)
                u = tl.dot(b_z, tl.trans(b_wu), u, input_precision="ieee")
                v = tl.dot(b_z, tl.trans(b_wv), v, input_precision="ieee")
        else:
            for j in range(0, D, BLOCK_J):
                up, gate = hidden(z_row_ptr, in_rows, up_ptr, gate_ptr, j, D, BLOCK_M, BLOCK_J, BLOCK_K)
                b_a = (up * gate).to(dtype)
                b_wu, b_wv = load_pair_rows(out_ptr, j, dtype, D, PAIRS, LAYOUT, BLOCK_H, BLOCK_J)
                u = tl.dot(b_a, tl.trans(b_wu), u, input_precision="ieee")
                v = tl.dot(b_a, tl.trans(b_wv), v, input_precision="ieee")
            u *= 2.0
            v *= 2.0
    return u, v


@triton.jit
def back_through(
    b_du, b_dv, w_ptr, k,
    D: tl.constexpr, PAIRS: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns k .. of d w, d given in halves: [BLOCK_M, BLOCK] in float32."""
    b_wu, b_wv = load_pair_rows(w_ptr, k, b_du.dtype, D, PAIRS, LAYOUT, BLOCK_H, BLOCK)
    return tl.dot(b_dv, b_wv, tl.dot(b_du, b_wu, input_precision="ieee"), input_precision="ieee")


@triton.jit
def gated_gradient(up, gate, da):
    """From the gradient da of up * gate, gate = sigmoid(g): the gradients of up and of g."""
    return da * gate, da * up * gate * (1.0 - gate)
