"""What the loss and the packed mask of the recipe cost.

    python benchmarks/recipe_costs.py [--parts loss,mask] [--out benchmarks/results/recipe_costs.jsonl]

"loss" is forward and backward of 16,384 hidden states against 50,304 output weights, with all logits at once (plain)
and as the recipe does it, float32 and bfloat16 autocast, each in a process of its own: peak memory beyond that before
the call, and seconds of one call. "mask" is forward and backward of grouped-query attention at T = 2048 with a packed
mask, and without one, as the recipe calls it where no document begins inside a row. One thread; a ratio is the recipe's
figure over the plain one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import append_lines, environment, interleave, once

import attnzoo
from attnzoo_recipes.losses import linear_cross_entropy

RESULTS = Path(__file__).parent / "results" / "recipe_costs.jsonl"
N, V, E = 16_384, 50_304, 256
B, T, H, G, WIDTH = 2, 2048, 8, 2, 256


def main() -> None:
    """Measure, write a row for each case, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", default="loss,mask")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one_loss(*options.one.split(","))))
        return
    rows = []
    if "loss" in options.parts:
        rows += losses()
    if "mask" in options.parts:
        rows += masks()
    for row in rows:
        print({name: row[name] for name in ("case", "phase", "ms", "ratio", "noise", "mib") if name in row})
    append_lines(options.out, [{**row, **environment()} for row in rows])


def one_loss(form: str, precision: str) -> dict[str, float]:
    """Seconds and peak MiB of one forward and backward pass, and the loss."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, E, requires_grad=True), torch.randn(V, E).mul_(0.1).requires_grad_()
    targets = torch.randint(0, V, (N,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        if form == "plain":
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        else:
            loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "mib": peak, "loss": float(loss)}


def losses() -> list[dict[str, Any]]:
    """Two rows for each precision."""
    rows = []
    for precision in ("32-true", "bf16-mixed"):
        found = {}
        for form in ("plain", "recipe"):
            command = [sys.executable, __file__, "--one", f"{form},{precision}"]
            found[form] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for form, result in found.items():
            rows.append({
                "suite": "recipe_costs", "case": f"loss {form}", "phase": f"forward+backward {precision}",
                "shape": {"N": N, "V": V, "E": E}, "ms": result["seconds"] * 1e3, "mib": round(result["mib"]),
                "ratio": result["mib"] / found["plain"]["mib"], "noise": None,
                "error": abs(result["loss"] - found["plain"]["loss"]),
            })  # fmt: skip
    return rows


def masks() -> list[dict[str, Any]]:
    """A row with the mask and one without, for one border in the batch."""
    torch.manual_seed(0)
    module = attnzoo.GroupedQueryAttention(WIDTH, H, G)
    x = torch.randn(B, T, WIDTH, requires_grad=True)
    borders = torch.tensor([0, 700, T, B * T], dtype=torch.int32)
    packed = attnzoo.AttentionMask.packed(borders)
    calls = {
        "packed mask": once(lambda: module(x, mask=packed).sum().backward()),
        "no mask": once(lambda: module(x).sum().backward()),
    }
    timings = interleave(calls, rounds=5, warmup=1)
    return [
        {
            "suite": "recipe_costs", "case": name, "phase": "forward+backward",
            "shape": {"B": B, "T": T, "H": H, "G": G, "E": WIDTH}, "ms": timing.ms, "noise": timing.noise,
            "ratio": timing.ms / timings["packed mask"].ms, "error": None,
        }
        for name, timing in timings.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
