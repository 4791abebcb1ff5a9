"""Mixture of heads: the sparse form against the dense one, forward and backward, in one run.

    python benchmarks/moh_sparse.py [--out benchmarks/results/scaling.jsonl] [--tokens 2048 4096]

One thread, interleaved rounds, minima. Half of the heads are active. The numbers of both forms are compared first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timing import append_lines, environment, interleave, once

import attnzoo

E, H = 512, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for tokens in options.tokens:
        torch.manual_seed(0)
        layer = attnzoo.MixtureOfHeadAttention(E, H, num_shared_heads=2, num_routed_active=2, sparse=False)
        x = torch.randn(1, tokens, E, requires_grad=True)
        found = {}
        for sparse in (False, True):
            layer.sparse = sparse
            found[sparse] = layer(x).detach()
        error = float((found[True] - found[False]).abs().max() / found[False].abs().max())
        assert error < 1e-4, f"sparse and dense differ by {error}"

        def run(sparse: bool, backward: bool, layer: torch.nn.Module = layer, x: torch.Tensor = x) -> None:
            layer.sparse = sparse
            if not backward:
                with torch.no_grad():
                    layer(x)
                return
            layer(x).sum().backward()
            layer.zero_grad()
            x.grad = None

        for phase, backward in (("forward", False), ("forward+backward", True)):
            timed = interleave(
                {form: once(lambda s=form == "sparse", b=backward: run(s, b)) for form in ("dense", "sparse")},
                options.rounds,
            )
            ratio = timed["dense"].ms / timed["sparse"].ms
            rows.append({
                "suite": "moh", "case": "sparse, 4 of 8 heads", "phase": phase, "ms": round(timed["sparse"].ms, 2),
                "ms_dense": round(timed["dense"].ms, 2), "ratio": round(ratio, 3),
                "noise": round(timed["sparse"].noise, 2), "error": error,
                "shape": {"B": 1, "T": tokens, "E": E, "H": H}, **environment(("attnzoo",)),
            })  # fmt: skip
            print(f"T={tokens:<6} {phase:<17} dense {timed['dense'].ms:8.1f} ms   "
                  f"sparse {timed['sparse'].ms:8.1f} ms   dense/sparse {ratio:.2f}")  # fmt: skip
    if options.out:
        append_lines(options.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
