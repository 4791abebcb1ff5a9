"""What caching static tokens saves: steps of a block with their keys and values cached, against computing them anew.

    python benchmarks/static_context.py [--out benchmarks/results/static_context.jsonl]

A block is attention and a feed-forward of width 4 E, over T dynamic and S static tokens. "cached" runs the static
tokens once and then STEPS steps over the cache, "joint" runs both in every step, and "alone" runs the dynamic tokens
without static ones. The overhead of static tokens is a time or FLOPs beyond "alone"; ratio is the share of joint's
overhead that the cache removes. FLOPs are those of the
matrix products, counted by formula. One thread, interleaved rounds, minima.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment, interleave, once
from torch import Tensor, nn

import attnzoo

STEPS = 10
SHAPES = ((512, 256, 256), (1024, 256, 256), (512, 512, 128), (512, 128, 512))
"""Width E, dynamic tokens T and static tokens S."""
RESULTS = Path(__file__).parent / "results" / "static_context.jsonl"


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); static tokens last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = attnzoo.StaticContextAttention(width, width // 64)
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, num_static: int = 0, cache: object = None) -> Tensor:
        """x (B, T + S, E) -> (B, T + S, E)."""
        x = x + self.attn(self.norm(x), num_static=num_static, cache=cache)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


def main() -> None:
    """Measure every shape, write a row for each, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        row = measured(*shape, options.rounds)
        rows.append({**row, **environment()})
        print(
            f"{row['shape']}: {row['ratio']:.1%} of time, {row['flops_saved']:.1%} of FLOPs, error {row['error']:.1e}"
        )
    options.out.unlink(missing_ok=True)
    append_lines(options.out, rows)


@torch.inference_mode()
def measured(width: int, T: int, S: int, rounds: int) -> dict[str, Any]:
    """The row of one shape."""
    torch.manual_seed(0)
    block = Block(width).eval()
    x, static = torch.randn(1, T, width), torch.randn(1, S, width)
    both = torch.cat([x, static], dim=1)
    cache = block.attn.init_cache(1, S)

    def cached() -> None:
        cache.reset()
        block(static, S, cache)
        for _ in range(STEPS):
            block(x, cache=cache)

    def repeated(call: Callable[[], Tensor]) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(STEPS):
                call()

        return steps

    cached()
    error = float((block(x, cache=cache) - block(both, S)[:, :T]).abs().max())
    timings = interleave(
        {
            "cached": once(cached),
            "joint": once(repeated(lambda: block(both, S))),
            "alone": once(repeated(lambda: block(x))),
        },
        rounds,
    )
    ms = {name: timing.ms for name, timing in timings.items()}
    return {
        "suite": "static_context", "case": "block", "phase": f"{STEPS} steps", "shape": {"E": width, "T": T, "S": S},
        "ms": ms["cached"], "noise": max(timing.noise for timing in timings.values()), "ratio": saved(ms),
        "flops_saved": saved(flops(width, T, S)), "joint_ms": ms["joint"], "alone_ms": ms["alone"], "error": error,
    }  # fmt: skip


def flops(width: int, T: int, S: int) -> dict[str, int]:
    """Of all steps: 24 E^2 for a token, 4 E for a pair of query and key."""
    token, pair = 24 * width**2, 4 * width
    static = token * S + pair * S**2
    step = token * T + pair * T * (T + S)
    return {
        "cached": static + STEPS * step,
        "joint": STEPS * (static + step),
        "alone": STEPS * (token * T + pair * T**2),
    }


def saved(cost: Mapping[str, float]) -> float:
    """Share of the overhead of static tokens that the cache removes."""
    return 1 - (cost["cached"] - cost["alone"]) / (cost["joint"] - cost["alone"])


if __name__ == "__main__":
    main()
