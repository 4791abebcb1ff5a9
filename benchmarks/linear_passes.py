"""Passes over memory of linear attention's kernels: launches, and bytes of the tensors that each reads and writes.

    python benchmarks/linear_passes.py [--out benchmarks/results/linear_passes.jsonl]

Counted from the launches without a GPU; a tensor counts once in each launch, whatever is read again through a cache.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment

from attnzoo_kernels import aot
from attnzoo_kernels.linear_attention import linear_attention

B, T, H, G, D, SIZE = 2, 8192, 16, 16, 128, 64
CASES = {"linear": None, "mhla": torch.empty(1, 1, T // SIZE, T // SIZE, requires_grad=True)}


def moved(launches: list[aot.Launch]) -> int:
    """Bytes of the tensors of these launches."""
    total = 0
    for launch in launches:
        tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        own = {(x.data_ptr(), x.dtype, x.numel()): x.numel() * x.element_size() for x in tensors}
        total += sum(own.values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = []
    for case, weights in CASES.items():
        q, k, v = (torch.empty(B, T, h, D, dtype=torch.bfloat16, requires_grad=True) for h in (H, G, G))
        made: list[torch.Tensor] = []
        run = partial(linear_attention, q, k, v, size=SIZE, causal=True, weights=weights)
        forward = aot.record(lambda: made.append(run()[0]))  # noqa: B023
        backward = aot.record(lambda: made[0].sum().backward())  # type: ignore[no-untyped-call]  # noqa: B023
        for phase, launches in (("forward", forward), ("backward", backward)):
            row = {"suite": "linear_passes", "case": case, "phase": phase, "launches": len(launches)}
            row |= {
                "gigabytes": round(moved(launches) / 1e9, 3),
                "ms": None,
                "ratio": None,
                "noise": None,
                "error": None,
            }
            row |= {"shape": {"B": B, "T": T, "H": H, "G": G, "D": D, "block": SIZE}, "dtype": "bfloat16"}
            print(f"{case:<8} {phase:<9} {row['launches']} launches  {row['gigabytes']:.3f} GB")
            rows.append({**row, **environment(("attnzoo", "triton"))})
    if out:
        append_lines(out, rows)


if __name__ == "__main__":
    main()
