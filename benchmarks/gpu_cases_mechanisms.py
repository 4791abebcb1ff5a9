"""Rows of `benchmarks/gpu.py` for mechanisms that have no other kernel: DCMHA, MHLA, mixtures of heads and of experts.

Peers beside plain attention are the formula in plain PyTorch and the same compiled. Where the authors' code costs more
than its formula (a mixture of heads that computes every head and multiplies by a mask), a baseline of that cost
structure, written from the equations, is called "official structure".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from gpu_cases import GRIDS, Bench, Goal, Inputs, Row, Run, compiled, first_row, head_parts, softmax_peers
from torch import Tensor

from attnzoo.ops.expert_projection import Routes, expert_linear, expert_linear_pieces, expert_linear_reference
from attnzoo.ops.softmax_attention import softmax_attention


def composed_formula(x: Inputs) -> Tensor:
    """DCMHA's core, (B, T, M, D): scores and weights of M heads, each mixed by a matrix of its query and of its key."""
    q, k, v = (z.transpose(1, 2) for z in x[:3])
    q_pre, k_pre, q_post, k_post = (z[:, :, 0] for z in x[3:7])
    T = q.shape[2]
    a = q @ k.mT * q.shape[3] ** -0.5
    a = a + torch.einsum("bits,btij->bjts", a, q_pre) + torch.einsum("bits,bsij->bjts", a, k_pre)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    compute_dtype = torch.promote_types(a.dtype, torch.float32)
    p = a.masked_fill(future, -math.inf).softmax(-1, dtype=compute_dtype).to(a.dtype)
    p = p + torch.einsum("bits,btij->bjts", p, q_post) + torch.einsum("bits,bsij->bjts", p, k_post)
    return (p @ v).transpose(1, 2)


def composed_rows(bench: Bench) -> Iterator[Row]:
    """DCMHA, causal, query and key side."""

    def ours(x: Inputs) -> Tensor:
        from attnzoo_kernels.composed_attention import composed_attention

        sides = dict(zip(("q_pre", "k_pre", "q_post", "k_post"), x[3:], strict=True))
        return composed_attention(*x[:3], scale=x[0].shape[3] ** -0.5, **sides)

    peers: dict[str, Run] = {"eager": composed_formula}
    if bench.gpu:
        peers["compile"] = compiled(composed_formula)
    for T, M, D in ((2048, 16, 64), (4096, 8, 128)):
        b, t, m, d = bench.size(4, 1), bench.size(T, 33), bench.size(M, 4), bench.size(D, 16)
        for grad in (False, True):
            goals = (Goal("compile", 1.5 if grad else 2.0), Goal("eager", 4.0 if grad else 5.0))

            def make(seed: int, grad: bool = grad, b: int = b, t: int = t, m: int = m, d: int = d) -> Inputs:
                heads = bench.tensors(seed, *[(b, t, m, d)] * 3, grad=grad)
                mixing = [0.1 * z for z in bench.tensors(seed + 9, *[(b, t, 1, m, m)] * 4)]
                return [*heads, *(z.detach().requires_grad_(grad) for z in mixing)]

            forward = 4.0 * b * m * t * t * (d + m) * 0.5
            yield Row(
                f"dcmha core M={M} D={D} T={T}", "forward+backward" if grad else "forward",
                {"B": b, "T": t, "M": m, "D": d}, make, ours, composed_formula,
                {**peers, **softmax_peers(bench, True, t)}, first_row,
                goals=(*goals, *(() if grad else (Goal("sdpa best", 0.25),))), flops=forward * (3.5 if grad else 1.0),
            )  # fmt: skip


def linear_rows(bench: Bench) -> Iterator[Row]:
    """MHLA's core, causal: blocks of 64 tokens mixed by one lower triangular matrix, D = 128."""
    for T, goals in ((8192, (2.5, 3.5)), (2048, (1.0, 1.0))):
        b, t, h, d = bench.size(2, 1), bench.size(T, 40), bench.size(16, 2), bench.size(128, 16)
        size = bench.size(64, 8)
        n = t // size

        def ours(x: Inputs, size: int = size) -> Tensor:
            from attnzoo_kernels.linear_attention import linear_attention as fused

            return fused(*x[:3], size=size, causal=True, weights=x[3])[0]

        def formula(x: Inputs, size: int = size) -> Tensor:
            wide = torch.promote_types(x[0].dtype, torch.float32)
            q, k, v = (z.transpose(1, 2).to(wide) for z in x[:3])
            weights = x[3].to(wide).repeat_interleave(size, -1).repeat_interleave(size, -2)
            return ((q @ k.mT * weights).tril() @ v).transpose(1, 2)

        for grad in (False, True):

            def make(
                seed: int, grad: bool = grad, b: int = b, t: int = t, h: int = h, d: int = d, n: int = n
            ) -> Inputs:
                x = [z.relu().detach().requires_grad_(grad) for z in bench.tensors(seed, *[(b, t, h, d)] * 2)]
                weights = bench.tensors(seed + 3, (1, 1, n, n))[0].float().tril().requires_grad_(grad)
                return [*x, bench.tensors(seed + 5, (b, t, h, d), grad=grad)[0], weights]

            def one_head(x: Inputs) -> Inputs:
                return [*(z[:1, :, :1] for z in x[:3]), x[3]]

            peers: dict[str, Run] = dict(softmax_peers(bench, True, t))
            if not bench.gpu or t <= 2048:
                peers["eager"] = formula
            yield Row(
                f"mhla core T={T}", "forward+backward" if grad else "forward", {"B": b, "T": t, "H": h, "D": d}, make,
                ours, formula, peers, one_head, goals=(Goal("sdpa best", goals[grad]),),
            )  # fmt: skip


def routed_rows(bench: Bench) -> Iterator[Row]:
    """Mixture of heads: half of all (token, head) pairs active."""

    def ours(x: Inputs) -> Tensor:
        from attnzoo_kernels.head_routing import routed_attention

        return routed_attention(*x[:4], scale=x[0].shape[3] ** -0.5)

    def official(x: Inputs, backend: str = "auto") -> Tensor:
        return softmax_attention(*x[:3], backend=backend) * x[3][..., None]

    def dense(x: Inputs) -> Tensor:
        return softmax_attention(*x[:3], backend="triton")

    peers: dict[str, Run] = {"dense kernel": dense, "official structure": official}
    for share, goal in ((0.5, 1.5), (0.75, 1.15)):
        b, t, h, d = bench.size(2, 1), bench.size(4096, 33), bench.size(16, 4), bench.size(128, 16)
        for grad in (False, True):

            def make(
                seed: int, grad: bool = grad, b: int = b, t: int = t, h: int = h, d: int = d, share: float = share
            ) -> Inputs:
                # The same number of heads for every token, other ones for each.
                order = bench.tensors(seed + 7, (b, t, h))[0].argsort(-1).argsort(-1)
                return [*bench.tensors(seed, *[(b, t, h, d)] * 3, grad=grad), order < round(share * h)]

            yield Row(
                f"moh core {share:.0%} active", "forward+backward" if grad else "forward",
                {"B": b, "T": t, "H": h, "D": d}, make, ours, partial(official, backend="eager"), peers,
                parts=head_parts(b, h, h, 1), goals=(Goal("dense kernel", goal),),
            )  # fmt: skip


def expert_rows(bench: Bench) -> Iterator[Row]:
    """Mixture of attention heads: query projections of 16k tokens, 8 of 32 experts each."""
    n, slots, experts = bench.size(16384, 20), bench.size(8, 2), bench.size(32, 5)
    e, d = bench.size(2048, 32), bench.size(128, 16)

    def routes(x: Inputs) -> Routes:
        return Routes.of(x[2].flatten(), experts)

    def rows(x: Inputs) -> Tensor:
        return x[0][:, None].expand(-1, slots, -1).reshape(-1, e)

    def ours(x: Inputs) -> Tensor:
        pieces = x[0][:, None, None].expand(-1, 1, slots, -1)
        return expert_linear_pieces(pieces, x[1], routes(x), backend="triton").reshape(-1, d)

    def loop(x: Inputs) -> Tensor:
        chosen, given = x[2].flatten(), rows(x)
        out = given.new_zeros(given.shape[0], d)
        for expert in range(experts):
            at = (chosen == expert).nonzero().squeeze(-1)
            out = out.index_copy(0, at, given[at] @ x[1][expert].mT)
        return out

    def grouped(x: Inputs) -> Tensor:
        return expert_linear(rows(x), x[1], routes(x))

    def formula(x: Inputs) -> Tensor:
        return expert_linear_reference(rows(x), x[1], routes(x))

    def few(x: Inputs) -> Inputs:
        return [x[0][:512], x[1], x[2][:512]]

    for grad in (False, True):

        def make(seed: int, grad: bool = grad) -> Inputs:
            x, weight = bench.tensors(seed, (n, e), (experts, d, e), grad=grad)
            return [x, weight, bench.tensors(seed + 3, (n, experts))[0].topk(slots, -1).indices]

        yield Row(
            "moa projection", "forward+backward" if grad else "forward", {"n": n, "slots": slots, "E": e}, make, ours,
            formula, {"loop over experts": loop, "torch grouped": grouped}, few,
            goals=(Goal("loop over experts", 3.0),), flops=2.0 * n * slots * e * d * (3.0 if grad else 1.0),
        )  # fmt: skip


MECHANISMS = (composed_rows, linear_rows, routed_rows, expert_rows)
GRIDS["mechanisms"] = MECHANISMS
GRIDS["standard"] = (*MECHANISMS, *GRIDS["train"], *GRIDS["decode"], *GRIDS["others"])

FIRST = (
    *(f"softmax D={D} T=4096 {view}" for D in (64, 128) for view in ("causal", "full")),
    *(f"decode G=8 B={B} S=8192" for B in (1, 8, 64)), "latent decode H=16 B=8", "latent decode H=128 B=8",
    "qk_norm_rope norm", "dcmha core M=16", "mhla core T=8192", "moh core 50%", "moa projection",
    *(f"{case} D=128 T=4096" for case in ("decay", "gated", "sigmoid")), "factors H=47 B=8", "latent 128",
)  # fmt: skip
"""Rows of one short session on a GPU, by the beginning of their names: every kernel once, in the shape that matters."""


def first_rows(bench: Bench) -> Iterator[Row]:
    """The rows of `FIRST`, in its order."""
    rows = [row for rows_of in GRIDS["standard"] for row in rows_of(bench)]
    for name in FIRST:
        yield from (row for row in rows if row.case.startswith(name))


GRIDS["first"] = (first_rows,)
