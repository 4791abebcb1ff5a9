"""Linear attention in blocks of tokens: the five kernels of its forward and backward passes.

Blocks i, j; i(t) is the block of token t; w_ij the weight of a pair of blocks, or 1. With widths D and Dv:

    S_j = sum over s in block j of k_s^T v_s                        state     (D, Dv)
    P_i = sum over j < i of w_ij S_j                                 mix
    o_t = q_t P_i + w_ii sum over s <= t in block i of (q_t k_s) v_s tile

and with U_i = sum over t in block i of q_t^T do_t (state again):

    dS_j = sum over i > j of w_ij U_i,  dw_ij = <U_i, S_j>           mix, pair
    dq_t = do_t P_i^T + w_ii sum over s <= t of (do_t v_s) k_s       tile
    dk_s = v_s dS_j^T + w_jj sum over t >= s of (v_s do_t) q_t       tile, reversed
    dv_s = k_s dS_j + w_jj sum over t >= s of (k_s q_t) do_t         tile, reversed

Where every w is 1 state and mix are one kernel, sums, which keeps no S and no U. Without causality j runs over all
blocks and the second term of o, dq, dk and dv is absent. States are bfloat16 for products of bfloat16, which round
them anyway, and else float32; all sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_bounds(starts_ptr, b, block, n, size, T):
    """First token of a block and the end of it: from a table (B, n + 1), or every `size` tokens."""
    lo = block * size
    hi = tl.minimum(lo + size, T)
    if starts_ptr is not None:
        at = starts_ptr + b * (n + 1) + block
        lo = tl.load(at)
        hi = tl.load(at + 1)
    return lo, hi


@triton.jit
def load_tokens(
    ptr, order_ptr, o_t, hi, o_d, stride_t, WIDTH: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Columns o_d of the tokens o_t < hi, [tokens, columns], zeros elsewhere."""
    inside = o_t < hi
    row = o_t.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + o_t, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * stride_t + o_d[None, :], mask=mask, other=0.0).to(KIND)


# grid (B * X * n * tiles of A * tiles of Z): one program owns a piece of a block's state and walks the block's tokens,
# for MEMBERS heads of a group one after the other, so that a group's sum is formed in registers.
@triton.jit
def linear_attention_state_kernel(
    a_ptr, b_ptr, s_ptr, starts_ptr, order_ptr,
    stride_a_b, stride_a_t, stride_a_h, stride_b_b, stride_b_t, stride_b_h, T, n, size, X, MEMBERS,
    A: tl.constexpr, Z: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    tiles_a: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    tiles_z: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    piece = tl.program_id(0) % (tiles_a * tiles_z)
    bxn = tl.program_id(0) // (tiles_a * tiles_z)
    block = bxn % n
    b = (bxn // n // X).to(tl.int64)
    x = (bxn // n % X).to(tl.int64)
    o_a = piece // tiles_z * BLOCK_A + tl.arange(0, BLOCK_A)
    o_z = piece % tiles_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    lo, hi = block_bounds(starts_ptr, b, block, n, size, T)
    acc = tl.zeros([BLOCK_A, BLOCK_Z], tl.float32)
    for member in range(MEMBERS):
        h = x * MEMBERS + member
        own_a = a_ptr + b * stride_a_b + h * stride_a_h
        own_b = b_ptr + b * stride_b_b + h * stride_b_h
        for t_0 in range(lo, hi, BLOCK_T):
            o_t = t_0 + tl.arange(0, BLOCK_T)
            b_a = load_tokens(own_a, order_ptr, o_t, hi, o_a, stride_a_t, A, KIND)
            b_b = load_tokens(own_b, order_ptr, o_t, hi, o_z, stride_b_t, Z, KIND)
            acc = tl.dot(tl.trans(b_a), b_b, acc=acc, input_precision=PRECISION)
    at = bxn.to(tl.int64) * A * Z + o_a[:, None] * Z + o_z[None, :]
    tl.store(s_ptr + at, acc.to(s_ptr.dtype.element_ty), mask=(o_a < A)[:, None] & (o_z < Z)[None, :])


# grid (B * X * tiles of A * tiles of Z): one program owns a piece of the state and walks the blocks, from the last to
# the first with REVERSE. It stores the sum of those before each block, and after the last the sum of all. A fresh block
# starts a document.
@triton.jit
def linear_attention_sums_kernel(
    a_ptr, b_ptr, first_ptr, fresh_ptr, p_ptr, end_ptr, starts_ptr, order_ptr,
    stride_a_b, stride_a_t, stride_a_h, stride_b_b, stride_b_t, stride_b_h, T, n, size, X, MEMBERS,
    A: tl.constexpr, Z: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    tiles_a: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    tiles_z: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    piece = tl.program_id(0) % (tiles_a * tiles_z)
    bx = (tl.program_id(0) // (tiles_a * tiles_z)).to(tl.int64)
    b = bx // X
    x = bx % X
    o_a = piece // tiles_z * BLOCK_A + tl.arange(0, BLOCK_A)
    o_z = piece % tiles_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    at = o_a[:, None] * Z + o_z[None, :]
    mask = (o_a < A)[:, None] & (o_z < Z)[None, :]
    acc = tl.zeros([BLOCK_A, BLOCK_Z], tl.float32)
    if first_ptr is not None:
        acc = tl.load(first_ptr + bx * A * Z + at, mask=mask, other=0.0)
    for step in range(n):
        block = step
        if REVERSE:
            block = n - 1 - step
        lo, hi = block_bounds(starts_ptr, b, block, n, size, T)
        if fresh_ptr is not None:
            fresh = tl.load(fresh_ptr + b * n + block) != 0
            if not REVERSE:
                acc = tl.where(fresh, 0.0, acc)
        tl.store(p_ptr + (bx * n + block) * A * Z + at, acc.to(p_ptr.dtype.element_ty), mask=mask)
        for member in range(MEMBERS):
            h = x * MEMBERS + member
            own_a = a_ptr + b * stride_a_b + h * stride_a_h
            own_b = b_ptr + b * stride_b_b + h * stride_b_h
            for t_0 in range(lo, hi, BLOCK_T):
                o_t = t_0 + tl.arange(0, BLOCK_T)
                b_a = load_tokens(own_a, order_ptr, o_t, hi, o_a, stride_a_t, A, KIND)
                b_b = load_tokens(own_b, order_ptr, o_t, hi, o_z, stride_b_t, Z, KIND)
                acc = tl.dot(tl.trans(b_a), b_b, acc=acc, input_precision=PRECISION)
        if fresh_ptr is not None and REVERSE:
            acc = tl.where(fresh, 0.0, acc)
    tl.store(end_ptr + bx * A * Z + at, acc, mask=mask)


# grid (B * X * tiles of n * tiles of E): one program owns BLOCK_I blocks of a slice of the state, E = D Dv numbers, and
# walks the blocks that they sum. In the gradient for a group whose heads have weights of their own it walks the
# heads too. TRIANGLE 1: j < i, 2: j > i, 0: all.
@triton.jit
def linear_attention_mix_kernel(
    s_ptr, w_ptr, p_ptr, stride_w_b, stride_w_h, stride_w_i, stride_w_j, n, E, X, MEMBERS, READERS,
    TRIANGLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles_e = tl.cdiv(E, BLOCK_E)
    tiles_i = tl.cdiv(n, BLOCK_I)
    o_e = tl.program_id(0) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)
    rest = tl.program_id(0) // tiles_e
    i_0 = rest % tiles_i * BLOCK_I
    bx = rest // tiles_i
    b = (bx // X).to(tl.int64)
    x = (bx % X).to(tl.int64)
    heads = X * MEMBERS // READERS
    o_i = i_0 + tl.arange(0, BLOCK_I)
    lo = 0
    hi = n
    if TRIANGLE == 1:
        hi = tl.minimum(n, i_0 + BLOCK_I)
    if TRIANGLE == 2:
        lo = i_0
    acc = tl.zeros([BLOCK_I, BLOCK_E], tl.float32)
    for member in range(MEMBERS):
        h = x * MEMBERS + member
        own_w = w_ptr + b * stride_w_b + h * stride_w_h
        own_s = s_ptr + (b * heads + h // READERS) * n * E
        for j_0 in range(lo, hi, BLOCK_J):
            o_j = j_0 + tl.arange(0, BLOCK_J)
            pairs = (o_i < n)[:, None] & (o_j < n)[None, :]
            if TRIANGLE == 1:
                pairs = pairs & (o_j[None, :] < o_i[:, None])
            if TRIANGLE == 2:
                pairs = pairs & (o_j[None, :] > o_i[:, None])
            at = o_i.to(tl.int64)[:, None] * stride_w_i + o_j.to(tl.int64)[None, :] * stride_w_j
            b_w = tl.load(own_w + at, mask=pairs, other=0.0)
            mask = (o_j < n)[:, None] & (o_e < E)[None, :]
            b_s = tl.load(own_s + o_j.to(tl.int64)[:, None] * E + o_e[None, :], mask=mask, other=0.0)
            acc = tl.dot(b_w, b_s.to(tl.float32), acc=acc, input_precision=PRECISION)
    at = (bx.to(tl.int64) * n + o_i[:, None]) * E + o_e[None, :]
    tl.store(p_ptr + at, acc.to(p_ptr.dtype.element_ty), mask=(o_i < n)[:, None] & (o_e < E)[None, :])


# grid (B * heads of x * n * tiles of a block * tiles of Z): one program owns BLOCK_T tokens of one block and a piece of
# the result's width, o_t = x_t P + w sum_s (x_t y_s) z_s. Scores exist for one tile of the block at a time.
# s <= t and one head of y and z; REVERSE: s >= t and the MEMBERS heads of a group.
# With dw_ptr also the sum of u_t times the second term without its w: the gradient of w.
@triton.jit
def linear_attention_tile_kernel(
    x_ptr, y_ptr, z_ptr, u_ptr, p_ptr, w_ptr, o_ptr, dw_ptr, starts_ptr, order_ptr,
    stride_x_b, stride_x_t, stride_x_h, stride_y_b, stride_y_t, stride_y_h, stride_z_b, stride_z_t, stride_z_h,
    stride_u_b, stride_u_t, stride_u_h, stride_p_b, stride_p_x, stride_p_n, stride_p_a, stride_p_z,
    stride_w_b, stride_w_h, stride_w_i, stride_w_j,
    T, n, size, tiles_t, X, MEMBERS, READERS, STATES,
    A: tl.constexpr, Z: tl.constexpr, WITHIN: tl.constexpr, REVERSE: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_Z: tl.constexpr,
):  # fmt: skip
    tiles_z: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    piece = tl.program_id(0) % tiles_z
    rest = tl.program_id(0) // tiles_z
    tile = rest % tiles_t
    bxn = rest // tiles_t
    block = bxn % n
    b = (bxn // n // X).to(tl.int64)
    x = (bxn // n % X).to(tl.int64)
    lo, hi = block_bounds(starts_ptr, b, block, n, size, T)
    t_0 = lo + tile * BLOCK_T
    o_t = t_0 + tl.arange(0, BLOCK_T)
    o_z = piece * BLOCK_Z + tl.arange(0, BLOCK_Z)
    own_x = x_ptr + b * stride_x_b + x * stride_x_h
    # The whole width if it is one piece: then it is loaded once.
    b_x = load_tokens(own_x, order_ptr, o_t, hi, tl.arange(0, BLOCK_A), stride_x_t, A, KIND)
    acc = tl.zeros([BLOCK_T, BLOCK_Z], tl.float32)
    if WITHIN:
        first = lo
        last = tl.minimum(hi, t_0 + BLOCK_T)
        if REVERSE:
            first = t_0
            last = hi
        for member in range(MEMBERS):
            h = x * MEMBERS + member
            own_y = y_ptr + b * stride_y_b + h // READERS * stride_y_h
            own_z = z_ptr + b * stride_z_b + h // READERS * stride_z_h
            w = 1.0
            if w_ptr is not None:
                w = tl.load(w_ptr + b * stride_w_b + h * stride_w_h + block.to(tl.int64) * (stride_w_i + stride_w_j))
            for s_0 in range(first, last, BLOCK_T):
                o_s = s_0 + tl.arange(0, BLOCK_T)
                scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
                for a_0 in range(0, A, BLOCK_A):
                    o_a = a_0 + tl.arange(0, BLOCK_A)
                    if A > BLOCK_A:
                        b_x = load_tokens(own_x, order_ptr, o_t, hi, o_a, stride_x_t, A, KIND)
                    b_y = load_tokens(own_y, order_ptr, o_s, hi, o_a, stride_y_t, A, KIND)
                    scores = tl.dot(b_x, tl.trans(b_y), acc=scores, input_precision=PRECISION)
                if REVERSE:
                    scores = tl.where(o_s[None, :] >= o_t[:, None], scores, 0.0) * w
                else:
                    scores = tl.where(o_s[None, :] <= o_t[:, None], scores, 0.0)
                b_z = load_tokens(own_z, order_ptr, o_s, hi, o_z, stride_z_t, Z, KIND)
                acc = tl.dot(scores.to(KIND), b_z, acc=acc, input_precision=PRECISION)
            if not REVERSE:
                if dw_ptr is not None:
                    own_u = u_ptr + b * stride_u_b + x * stride_u_h
                    b_u = load_tokens(own_u, order_ptr, o_t, hi, o_z, stride_u_t, Z, tl.float32)
                    tl.store(dw_ptr + tl.program_id(0), tl.sum(acc * b_u))
                acc = acc * w
    own_p = p_ptr + b * stride_p_b + x // STATES * stride_p_x + block.to(tl.int64) * stride_p_n
    for a_0 in range(0, A, BLOCK_A):
        o_a = a_0 + tl.arange(0, BLOCK_A)
        if A > BLOCK_A:
            b_x = load_tokens(own_x, order_ptr, o_t, hi, o_a, stride_x_t, A, KIND)
        at = o_a.to(tl.int64)[:, None] * stride_p_a + o_z.to(tl.int64)[None, :] * stride_p_z
        b_p = tl.load(own_p + at, mask=(o_a < A)[:, None] & (o_z < Z)[None, :], other=0.0)
        acc = tl.dot(b_x, b_p.to(KIND), acc=acc, input_precision=PRECISION)
    row = o_t.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + o_t, mask=o_t < hi, other=0).to(tl.int64)
    at = ((b * T + row[:, None]) * X + x) * Z + o_z[None, :]
    mask = (o_t < hi)[:, None] & (o_z < Z)[None, :]
    tl.store(o_ptr + at, acc.to(o_ptr.dtype.element_ty), mask=mask)


# grid (B * X * SPLITS * tiles of n * tiles of n): one program sums a share of E for BLOCK_I by BLOCK_J pairs of blocks,
# <U_i, S_j>, and the shares are summed afterwards: no atomics, the same result every time.
@triton.jit
def linear_attention_pair_kernel(
    u_ptr, s_ptr, w_ptr, n, E, X, READERS, share, SPLITS,
    TRIANGLE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    tiles_i = tl.cdiv(n, BLOCK_I)
    tiles_j = tl.cdiv(n, BLOCK_J)
    j_0 = tl.program_id(0) % tiles_j * BLOCK_J
    rest = tl.program_id(0) // tiles_j
    i_0 = rest % tiles_i * BLOCK_I
    rest = rest // tiles_i
    split = rest % SPLITS
    bx = (rest // SPLITS).to(tl.int64)
    b = bx // X
    x = bx % X
    o_i = i_0 + tl.arange(0, BLOCK_I)
    o_j = j_0 + tl.arange(0, BLOCK_J)
    own_u = u_ptr + bx * n * E + o_i.to(tl.int64)[:, None] * E
    own_s = s_ptr + (b * (X // READERS) + x // READERS) * n * E + o_j.to(tl.int64)[:, None] * E
    acc = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    first = split * share
    last = tl.minimum(E, first + share)
    if TRIANGLE == 1:
        # A tile above the diagonal holds no pair.
        last = tl.where(j_0 < i_0 + BLOCK_I, last, first)
    for e_0 in range(first, last, BLOCK_E):
        o_e = e_0 + tl.arange(0, BLOCK_E)
        inside = (o_e < last)[None, :]
        b_u = tl.load(own_u + o_e[None, :], mask=(o_i < n)[:, None] & inside, other=0.0)
        b_s = tl.load(own_s + o_e[None, :], mask=(o_j < n)[:, None] & inside, other=0.0)
        acc = tl.dot(b_u.to(KIND), tl.trans(b_s.to(KIND)), acc=acc, input_precision=PRECISION)
    if TRIANGLE == 1:
        acc = tl.where(o_j[None, :] < o_i[:, None], acc, 0.0)
    at = ((bx * SPLITS + split) * n + o_i[:, None]) * n + o_j[None, :]
    tl.store(w_ptr + at, acc, mask=(o_i < n)[:, None] & (o_j < n)[None, :])
