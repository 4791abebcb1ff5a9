"""Composed attention, the part that all its kernels share: tiles of all heads, and products with mixing matrices.

A tile holds the M heads of one group at BLOCK_T queries and BLOCK_S keys as [queries, M, keys]. A mixing matrix of a
token maps its M heads; those of a tile's tokens are one batch of small products. Tensor cores want matrices of at least
16 x 16, so for M < 16 the matrices of W / M neighbouring tokens, W = 16, are the blocks of one block-diagonal matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.primitives import LOG2E, powers, visible


@triton.jit
def load_heads(
    ptr, stride_row, stride_head, head_0, GROUP, row_0, rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads head_0 .. of rows row_0 .. as [M, BLOCK, BLOCK_D], zeros beyond HEADS, rows and WIDTH.

    GROUP consecutive heads read the same head of the tensor.
    """
    m = tl.arange(0, M)
    row = row_0 + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (m < HEADS)[:, None, None] & (row < rows)[None, :, None] & (d < WIDTH)[None, None, :]
    head = ((head_0 + m) // GROUP).to(tl.int64)
    at = head[:, None, None] * stride_head + row.to(tl.int64)[None, :, None] * stride_row + d[None, None, :]
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def store_heads(
    ptr, x, stride_row, stride_head, head_0, row_0, rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_heads` with GROUP = 1."""
    m = tl.arange(0, M)
    row = row_0 + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (m < HEADS)[:, None, None] & (row < rows)[None, :, None] & (d < WIDTH)[None, None, :]
    head = (head_0 + m).to(tl.int64)
    at = head[:, None, None] * stride_head + row.to(tl.int64)[None, :, None] * stride_row + d[None, None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def block_places(
    token_0, tokens, stride_token,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, M: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets and validity, [BLOCK M / W, W, W], of the block-diagonal matrices of tokens token_0 .."""
    e = tl.arange(0, W)
    head = e % M
    of = e // M
    token = token_0 + tl.arange(0, BLOCK * M // W)[:, None] * (W // M) + of[None, :]  # of the source's rows
    inside = (of[:, None] == of[None, :]) & (head < SOURCES)[:, None] & (head < TARGETS)[None, :]
    at = token.to(tl.int64)[:, :, None] * stride_token + (head[:, None] * TARGETS + head[None, :])[None, :, :]
    return at, inside[None, :, :] & (token < tokens)[:, :, None]


@triton.jit
def load_matrices(
    ptr, token_0, tokens, stride_token,
    SOURCES: tl.constexpr, TARGETS: tl.constexpr, M: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """Matrices (SOURCES, TARGETS) of tokens token_0 .. as [BLOCK M / W, W, W], sources on the middle axis.

    AGAIN reads them even where they were read before: for groups of more than 16 heads they do not fit in registers,
    and the compiler, which would keep them there, may neither move nor merge such loads.
    """
    at, inside = block_places(token_0, tokens, stride_token, SOURCES, TARGETS, M, W, BLOCK)
    return tl.load(ptr + at, mask=inside, other=0.0, volatile=AGAIN)


@triton.jit
def store_matrices(
    ptr, c, token_0, tokens, stride_token, tile,
    SHARED: tl.constexpr, SOURCES: tl.constexpr, TARGETS: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_matrices`; of a matrix that all tokens share, the sums over the tile as rows of W / M."""
    if SHARED:
        at, inside = block_places(tile * (W // M), (tile + 1) * (W // M), stride_token, SOURCES, TARGETS, M, W, W // M)
        tl.store(ptr + at, tl.sum(c, 0)[None, :, :], mask=inside)
    else:
        at, inside = block_places(token_0, tokens, stride_token, SOURCES, TARGETS, M, W, BLOCK)
        tl.store(ptr + at, c, mask=inside)


@triton.jit
def mix_rows(c, x, acc, W: tl.constexpr, PRECISION: tl.constexpr):
    """acc + c x for every token of the first axis: x, acc [tokens, M, n], c [tokens M / W, targets, sources]."""
    R: tl.constexpr = x.shape[0] * x.shape[1] // W
    n: tl.constexpr = x.shape[2]
    y = tl.dot(c, tl.reshape(x, (R, W, n)), acc=tl.reshape(acc, (R, W, n)), input_precision=PRECISION)
    return tl.reshape(y, (x.shape[0], x.shape[1], n))


@triton.jit
def compose(
    x, low, c_q, c_k,
    RESIDUAL: tl.constexpr, BY_QUERY: tl.constexpr, BY_KEY: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[x] + c_q low + c_k low of a tile x [queries, M, keys], float32; low is x in the products' dtype.

    Matrices have targets on the middle axis; with the sources there it is the transposed map.
    """
    if RESIDUAL:
        out = x
    else:
        out = tl.zeros_like(x)
    if BY_KEY:
        turned = tl.permute(low, (2, 1, 0))
        of_keys = mix_rows(c_k, turned, tl.zeros(turned.shape, tl.float32), W, PRECISION)
        out += tl.permute(of_keys, (2, 1, 0))
    if BY_QUERY:
        out = mix_rows(c_q, low, out, W, PRECISION)
    return out


@triton.jit
def transposed(c):
    """Matrices with sources and targets exchanged."""
    return tl.permute(c, (0, 2, 1))


@triton.jit
def outer_rows(x, y, acc, W: tl.constexpr, PRECISION: tl.constexpr):
    """acc + sum over the last axis of x_i y_j for every token of the first: x, y [tokens, M, n]."""
    R: tl.constexpr = x.shape[0] * x.shape[1] // W
    n: tl.constexpr = x.shape[2]
    right = tl.permute(tl.reshape(y, (R, W, n)), (0, 2, 1))
    return tl.dot(tl.reshape(x, (R, W, n)), right, acc=acc, input_precision=PRECISION)


@triton.jit
def outer_columns(x, y, acc, W: tl.constexpr, PRECISION: tl.constexpr):
    """The same for every token of the last axis."""
    return outer_rows(tl.permute(x, (2, 1, 0)), tl.permute(y, (2, 1, 0)), acc, W, PRECISION)


@triton.jit
def products(x, y, PRECISION: tl.constexpr):
    """x [M, queries, D] . y [M, keys, D] -> [queries, M, keys], float32."""
    return tl.permute(tl.dot(x, tl.permute(y, (0, 2, 1)), input_precision=PRECISION), (1, 0, 2))


@triton.jit
def mask_scores(
    s, o_t, o_s, i, j, first, last, mask_ptr, stride_mask_h, stride_mask_t, stride_mask_s, T, S, window,
    HEADS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """-inf where a pair is invisible, after the first composition. The mask tensor is the batch row's and group's."""
    inside = (o_t < T)[:, None] & (o_s < S)[None, :]
    ok = inside & visible(
        i[:, None], j[None, :], window, 0, first[:, None], last[:, None], CAUSAL, WINDOW, False, SEGMENT
    )
    if mask_ptr is not None:
        m = tl.arange(0, s.shape[1])
        at = o_t.to(tl.int64)[:, None] * stride_mask_t + o_s.to(tl.int64)[None, :] * stride_mask_s
        at = at[:, None, :] + m.to(tl.int64)[None, :, None] * stride_mask_h
        given = tl.load(mask_ptr + at, mask=inside[:, None, :] & (m < HEADS)[None, :, None], other=0)
        return tl.where(ok[:, None, :] & (given != 0), s, float("-inf"))
    return tl.where(ok[:, None, :], s, float("-inf"))


@triton.jit
def load_rows(ptr, base, head_0, T, t_0, HEADS: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, other=0.0):
    """A number of every query and head, stored (heads, T) from base, as [BLOCK_T, M]; other where there is none."""
    m = tl.arange(0, M)
    o_t = t_0 + tl.arange(0, BLOCK_T)
    at = base + (head_0 + m).to(tl.int64)[None, :] * T + o_t[:, None]
    return tl.load(ptr + at, mask=(o_t < T)[:, None] & (m < HEADS)[None, :], other=other)


@triton.jit
def store_rows(ptr, x, base, head_0, T, t_0, HEADS: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr):
    """The inverse of `load_rows`."""
    m = tl.arange(0, M)
    o_t = t_0 + tl.arange(0, BLOCK_T)
    at = base + (head_0 + m).to(tl.int64)[None, :] * T + o_t[:, None]
    tl.store(ptr + at, x, mask=(o_t < T)[:, None] & (m < HEADS)[None, :])


@triton.jit
def normalised(s, shift, norm, EXACT: tl.constexpr):
    """Softmax weights of scores [queries, M, keys] from what is kept of each row; see `shift_and_norm`."""
    p = powers(s, LOG2E, shift[:, :, None])
    if EXACT:
        p *= norm[:, :, None]
    return p
