"""How forward and backward grow when the length doubles: linear attention, multi-head linear attention, softmax.

    python benchmarks/linear_scaling.py [--out benchmarks/results/scaling.jsonl] [--tokens 4096]

One thread, interleaved rounds, minima; ratios of two lengths of one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment, interleave, once

import attnzoo

E, H, G = 128, 4, 4
GOALS = {"linear": 2.3, "mhla": 2.3}


def layers() -> dict[str, torch.nn.Module]:
    """The language-model presets beside softmax attention."""
    rope = attnzoo.Rotary()
    return {
        "linear": attnzoo.LinearAttention(
            E, H, feature_map="relu", normalize=False, output_norm="rmsnorm", gate=True, rope=rope
        ),
        "mhla": attnzoo.MultiHeadLinearAttention(E, H, block_size=128, num_blocks=128),
        "mha": attnzoo.MultiHeadAttention(E, H, bias=False),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="the shorter length (default 4096)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases: dict[str, Any] = {}
    for name, layer in layers().items():
        for tokens in (options.tokens, 2 * options.tokens):
            x = torch.randn(1, tokens, E, requires_grad=True)

            def run(layer: torch.nn.Module = layer, x: torch.Tensor = x) -> None:
                layer(x).sum().backward()
                layer.zero_grad()
                x.grad = None

            cases[f"{name} {tokens}"] = once(run)
    found = interleave(cases, options.rounds)
    rows, failed = [], 0
    for name in layers():
        short, long = (found[f"{name} {tokens}"] for tokens in (options.tokens, 2 * options.tokens))
        ratio = long.ms / short.ms
        goal = GOALS.get(name)
        passed = goal is None or ratio <= goal
        failed += not passed
        rows.append({
            "suite": "scaling", "case": name, "phase": "forward+backward", "ms": round(short.ms, 2),
            "ms_double": round(long.ms, 2), "ratio": round(ratio, 3), "noise": round(long.noise, 2), "error": None,
            "bound": goal, "passed": passed,
            "shape": {"B": 1, "T": options.tokens, "E": E, "H": H}, **environment(("attnzoo",)),
        })  # fmt: skip
        verdict = "" if goal is None else f"  <= {goal}  {'pass' if passed else 'FAIL'}"
        print(f"{name:<8} T={options.tokens}: {short.ms:9.1f} ms   T={2 * options.tokens}: {long.ms:9.1f} ms   "
              f"x{ratio:.2f}{verdict}")  # fmt: skip
    if options.out:
        append_lines(options.out, rows)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
