"""Another design of composed attention's forward kernels, counted beside the one that runs.

    python benchmarks/composed_unrolled.py [--out benchmarks/results/composed_unrolled.jsonl]
    TRITON_INTERPRET=1 python benchmarks/composed_unrolled.py --check

Heads are unrolled: a tile of one head is a matrix of its own, so that its products are those of warpgroups, and the
low-rank parts of the compositions are multiply-adds in registers, without a matrix of a token. The kernels that run
hold all heads in one tile and mix them on tensor cores. Counted are, on sm_90 in bfloat16, a thread's instructions of
the inner loop per query, key and head, barriers of a tile, and what spills; --check compares with the definition.
"""

# Kernels join tuples with +, which they cannot unpack, and both take the same arguments.
# ruff: noqa: RUF005, ARG001

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from aot_resources import CASES
from timing import append_lines, environment

import attnzoo
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo_kernels import aot, tuning


@triton.jit
def row_of(ptr, at, tokens, WIDTH: tl.constexpr, index):
    """Number `index` of what belongs to each of these tokens."""
    return tl.load(ptr + at * WIDTH + index, mask=at < tokens, other=0.0).to(tl.float32)


@triton.jit
def mixed(x, q_ptr, k_ptr, o_t, o_s, T, S, M: tl.constexpr, R: tl.constexpr):
    """A tile of each head, composed by u (R, M), v (R, M) and g (M) of every query and key."""
    WIDTH: tl.constexpr = (2 * R + 1) * M
    low = ()
    for r in tl.static_range(R):
        of_q = x[0] * row_of(q_ptr, o_t, T, WIDTH, r * M)[:, None]
        of_k = x[0] * row_of(k_ptr, o_s, S, WIDTH, r * M)[None, :]
        for m in tl.static_range(1, M):
            of_q += x[m] * row_of(q_ptr, o_t, T, WIDTH, r * M + m)[:, None]
            of_k += x[m] * row_of(k_ptr, o_s, S, WIDTH, r * M + m)[None, :]
        low = low + (of_q, of_k)
    out = ()
    for m in tl.static_range(M):
        gate_q = row_of(q_ptr, o_t, T, WIDTH, 2 * R * M + m)
        gate_k = row_of(k_ptr, o_s, S, WIDTH, 2 * R * M + m)
        y = x[m] * ((1.0 + gate_q)[:, None] + gate_k[None, :])
        for r in tl.static_range(R):
            y += low[2 * r] * row_of(q_ptr, o_t, T, WIDTH, (R + r) * M + m)[:, None]
            y += low[2 * r + 1] * row_of(k_ptr, o_s, S, WIDTH, (R + r) * M + m)[None, :]
        out = out + (y,)
    return out


@triton.jit
def head_of(ptr, o_r, rows, h, M: tl.constexpr, D: tl.constexpr):
    """Rows of one head, [rows, D]."""
    at = (o_r[:, None] * M + h) * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + at, mask=(o_r < rows)[:, None], other=0.0)


@triton.jit
def scores_of(
    queries, k_ptr, q_pre_ptr, k_pre_ptr, o_t, o_s, T, scale, M: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Composed scores of each head, -inf where the key is later."""
    a = ()
    for m in tl.static_range(M):
        a = a + (tl.dot(queries[m], tl.trans(head_of(k_ptr, o_s, T, m, M, D)), input_precision="ieee") * scale,)
    seen = (o_s[None, :] <= o_t[:, None]) & (o_s < T)[None, :]
    composed = mixed(a, q_pre_ptr, k_pre_ptr, o_t, o_s, T, T, M, R)
    out = ()
    for m in tl.static_range(M):
        out = out + (tl.where(seen, composed[m], float("-inf")),)
    return out


@triton.jit
def unrolled_stats_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, lse_ptr, o_ptr, T, scale,
    M: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    queries, most, total = (), (), ()
    for m in tl.static_range(M):
        queries = queries + (head_of(q_ptr, o_t, T, m, M, D),)
        most = most + (tl.full([BLOCK_T], float("-inf"), tl.float32),)
        total = total + (tl.zeros([BLOCK_T], tl.float32),)
    for s_0 in range(0, tl.minimum(T, (tl.program_id(0) + 1) * BLOCK_T), BLOCK_S):
        o_s = s_0 + tl.arange(0, BLOCK_S)
        s = scores_of(queries, k_ptr, q_pre_ptr, k_pre_ptr, o_t, o_s, T, scale, M, R, D)
        new_most, new_total = (), ()
        for m in tl.static_range(M):
            top = tl.maximum(most[m], tl.max(s[m], 1))
            new_total = new_total + (total[m] * tl.exp2(most[m] - top) + tl.sum(tl.exp2(s[m] - top[:, None]), 1),)
            new_most = new_most + (top,)
        most, total = new_most, new_total
    for m in tl.static_range(M):
        tl.store(lse_ptr + m * T + o_t, most[m] + tl.log2(total[m]), mask=o_t < T)


@triton.jit
def unrolled_out_kernel(
    q_ptr, k_ptr, v_ptr, q_pre_ptr, k_pre_ptr, q_post_ptr, k_post_ptr, lse_ptr, o_ptr, T, scale,
    M: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    queries, acc, lse = (), (), ()
    for m in tl.static_range(M):
        queries = queries + (head_of(q_ptr, o_t, T, m, M, D),)
        acc = acc + (tl.zeros([BLOCK_T, D], tl.float32),)
        lse = lse + (tl.load(lse_ptr + m * T + o_t, mask=o_t < T, other=0.0),)
    for s_0 in range(0, tl.minimum(T, (tl.program_id(0) + 1) * BLOCK_T), BLOCK_S):
        o_s = s_0 + tl.arange(0, BLOCK_S)
        s = scores_of(queries, k_ptr, q_pre_ptr, k_pre_ptr, o_t, o_s, T, scale, M, R, D)
        p = ()
        for m in tl.static_range(M):
            p = p + (tl.exp2(s[m] - lse[m][:, None]),)
        w = mixed(p, q_post_ptr, k_post_ptr, o_t, o_s, T, T, M, R)
        new_acc = ()
        for m in tl.static_range(M):
            v = head_of(v_ptr, o_s, T, m, M, D)
            new_acc = new_acc + (tl.dot(w[m].to(v.dtype), v, acc=acc[m], input_precision="ieee"),)
        acc = new_acc
    for m in tl.static_range(M):
        at = (o_t[:, None] * M + m) * D + tl.arange(0, D)[None, :]
        tl.store(o_ptr + at, acc[m], mask=(o_t < T)[:, None])


def arguments(M: int, R: int, D: int, T: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row of a batch: queries, keys, values, factors of both sides and stages, and buffers."""
    torch.manual_seed(0)
    wide = (2 * R + 1) * M
    drawn: dict[str, Any] = {f"{name}_ptr": torch.randn(T, M, D).to(dtype) for name in "qkv"}
    drawn |= {f"{name}_ptr": 0.3 * torch.randn(T, wide) for name in ("q_pre", "k_pre", "q_post", "k_post")}
    drawn |= {"lse_ptr": torch.empty(M, T), "o_ptr": torch.empty(T, M, D), "T": T, "M": M, "R": R, "D": D}
    return drawn | {"scale": 1.4426950408889634 * D**-0.5}


def check() -> None:
    """Both kernels against the definition, in Triton's interpreter."""
    M, R, D, T = 4, 2, 16, 37
    given = arguments(M, R, D, T, torch.float32)
    for kernel in (unrolled_stats_kernel, unrolled_out_kernel):
        kernel[(triton.cdiv(T, 16),)](**given, BLOCK_T=16, BLOCK_S=16)

    def side(name: str) -> Any:
        u, v, g = given[f"{name}_ptr"].double().view(1, T, 1, 2 * R + 1, M).split((R, R, 1), 3)
        return u, v, g[..., 0, :]

    pre, post = (Composition(query=side(f"q_{stage}"), key=side(f"k_{stage}")) for stage in ("pre", "post"))
    q, k, v = (given[f"{name}_ptr"].double()[None] for name in "qkv")
    exact = composed_attention(q, k, v, pre, post, attnzoo.masks.Visibility(), scale=D**-0.5, backend="eager")[0]
    error = float((given["o_ptr"] - exact).abs().max() / exact.abs().max())
    print(f"error {error:.1e}")
    if error > 1e-5:
        sys.exit(1)


def count(launch: aot.Launch, M: int, D: int) -> dict[str, Any]:
    """What a launch takes on sm_90."""
    listings: list[str] = []
    length = aot.loop_length
    aot.loop_length = lambda listing: listings.append(listing) or length(listing)  # type: ignore[func-returns-value]
    try:
        found = aot.compile_launch(launch, "sm_90")
    finally:
        aot.loop_length = length
    tile = {name: launch.arguments[name] for name in ("BLOCK_T", "BLOCK_S")}
    pairs, warps = M * tile["BLOCK_T"] * tile["BLOCK_S"], launch.options["num_warps"]
    row = {
        "suite": "composed_unrolled", "case": f"{M} heads of {D}", "phase": found.kernel, "ms": None, "ratio": None,
        "noise": None, "error": None, "shape": {"M": M, "D": D, "R": 2}, **tile, "num_warps": warps,
        "registers": found.registers, "spills": found.spills, "shared": found.shared,
        "instructions_per_pair": round(found.instructions * 32 * warps / pairs, 1),
        "barriers": len(re.findall(r"\bBAR\.SYNC", listings[-1])),
        "warpgroup_products": len(re.findall(r"\bHGMMA\.", listings[-1])), "serialized": found.serialized,
        "seconds": round(found.seconds, 1),
    }  # fmt: skip
    print({name: x for name, x in row.items() if x is not None and name not in ("suite", "shape")}, flush=True)
    return row


def launches() -> Iterator[tuple[aot.Launch, int, int]]:
    """The two kernels that run and the two here, with heads and their width."""
    for M, D in ((8, 64), (16, 64)):
        present = aot.record(lambda: CASES[f"composed {M} heads of {D}"](torch.bfloat16))  # noqa: B023
        yield from ((launch, M, D) for launch in present[:2])
    for M, D, BLOCK_T, BLOCK_S, warps in ((8, 64, 64, 32, 8), (8, 64, 128, 32, 8), (16, 64, 64, 16, 8)):
        given = arguments(M, 2, D, 4096, torch.bfloat16) | {"BLOCK_T": BLOCK_T, "BLOCK_S": BLOCK_S}
        options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
        for kernel in (unrolled_stats_kernel, unrolled_out_kernel):
            # The sums of 16 heads of 64, 64 queries each, are as many numbers as there are registers.
            if M * D * BLOCK_T < 2**16 or kernel is unrolled_stats_kernel:
                yield aot.Launch(kernel, given, options), M, D


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the definition in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    if options.check:
        check()
        return
    tuning.device_limits = lambda _: (132, aot.SHARED_LIMIT["sm_90"], 32)  # type: ignore[assignment]
    rows = [{**count(*launch), **environment(("attnzoo", "triton"))} for launch in launches()]
    if options.out:
        append_lines(options.out, rows)


if __name__ == "__main__":
    main()
