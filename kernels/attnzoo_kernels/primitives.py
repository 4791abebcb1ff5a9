"""Pieces that several kernels share: scores, visibility, and the running softmax.

Indices i of queries and j of keys are int32 tensors that broadcast to the tile, so that a kernel may hold its tile
as [queries, keys] or as [keys, queries].
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = [
    "T", "S", "n", "rows", "pairs", "tiles_t", "share", "query_start", "begin", "end", "chunk", "splits", "window",
    "sink_tokens", "stride_mask_b", "stride_mask_h", "stride_mask_t", "stride_mask_s",
]  # fmt: skip
"""Arguments that change from call to call: no kernel is compiled again because one is 1 or a multiple of 16."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh with a relative error of a few float32 steps, also near 0, where 1 - exp would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = 1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835 - y * (1382.0 / 155925)))))
    return tl.where(tl.abs(x) < 0.3, x * near, tl.where(x < 0, -far, far))


@triton.jit
def finish_scores(s, i, j, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """Products of queries and keys -> scores before any mask, and the capped scores (whose tanh' backward needs)."""
    s = s * scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    capped = s
    if ALIBI:
        s -= slope * tl.abs(i - j).to(tl.float32)
    return s, capped


@triton.jit
def powers(s, unit, top):
    """2 to the power of s unit - top. Nothing is rounded before large numbers cancel, and it costs one instruction."""
    return tl.exp2(tl.fma(s, unit, -top))


@triton.jit
def shift_and_norm(m, l, EXACT: tl.constexpr):
    """What is kept of a row with maximum m and denominator l: its weights are powers(s, unit, shift) [norm].

    With EXACT, for float32, the shift is the maximum and norm a factor, as exact as a softmax. Without, it is the
    log-sum-exp in base 2, whose rounding is far below half precision's. A row that has seen nothing gets weights 0.
    """
    norm = tl.where(l > 0, 1.0 / tl.where(l > 0, l, 1.0), 0.0)
    if EXACT:
        shift = tl.where(l > 0, m, 0.0)
    else:
        shift = tl.where(l > 0, m + tl.log2(tl.where(l > 0, l, 1.0)), float("inf"))
    return shift, norm


@triton.jit
def visible(
    i, j, window, sink_tokens, first, last,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK_TOKENS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Which pairs the structured rules allow, as in `attnzoo.masks.visibility`.

    first and last bound the keys that a query may see, first <= j < last: its packed document, or 0 and the row's
    length. Only with SEGMENT are they looked at. Sink tokens count from first.
    """
    ok = i - j == i - j
    if SEGMENT:
        ok = ok & (j >= first) & (j < last)
    if CAUSAL:
        ok = ok & (j <= i)
    if WINDOW:
        if CAUSAL:
            near = i - j < window
        else:
            near = tl.abs(i - j) < window
        if SINK_TOKENS:
            if SEGMENT:
                near = near | (j - first < sink_tokens)
            else:
                near = near | (j < sink_tokens)
        ok = ok & near
    return ok


@triton.jit
def softmax_step(s, unit, m, l):
    """One step of the online softmax over the last axis of s, in base 2.

    s holds scores, -inf where masked, that become base 2 times unit > 0; m is the running maximum in base 2, l the
    running denominator. Returns the tile's weights, the factor for what was summed so far, and the new m and l. Rows
    that have seen nothing keep m = -inf, l = 0 and get weights 0.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * unit)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = powers(s, unit, base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, m_new, l * shrink + tl.sum(p, 1)
