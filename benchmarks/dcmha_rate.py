"""DCMHA beside multi-head attention by learning rate, and by that of its dynamic weights.

    python benchmarks/dcmha_rate.py                              all cases that the result file lacks; an hour on 1 core
    python benchmarks/dcmha_rate.py --only "dcmha 3e-3 0.1"      one of them: mechanism, rate, ratio of dynamic weights

Trained as `small_training` says, with 6 heads, one seed.

In each row `error` is None, `ms` the mean time of a step, `ratio` the held-out bits per byte over those of `mha` at the
same rate where they are known, and `curve` has (step, training, held-out) bits per byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_training import STEPS, B, E, L, T, decoder, groups, train
from timing import ROOT, append_lines, environment, read_lines

import attnzoo

OUT = ROOT / "benchmarks/results/dcmha_rate.jsonl"
H = 6
CASES = [f"{mechanism} {rate} {ratio}" for rate in ("3e-3", "1e-3", "3e-4") for mechanism, ratio in
         (("mha", "1"), ("dcmha", "1"), ("dcmha", "0.1"))]  # fmt: skip


def run(mechanism: str, rate: float, ratio: float) -> tuple[list[tuple[int, float, float]], float]:
    """The curve, and milliseconds a step."""
    classes = {"mha": attnzoo.GroupedQueryAttention, "dcmha": attnzoo.DynamicallyComposableAttention}
    model = decoder(lambda width: classes[mechanism](width, H))
    dynamic = {id(p) for name, p in model.named_parameters() if "_dyn." in name}
    parameter_groups = groups([p for p in model.parameters() if id(p) not in dynamic], rate)
    if dynamic:
        own = [p for p in model.parameters() if id(p) in dynamic]
        parameter_groups.append({"params": own, "weight_decay": 0.1, "lr": ratio * rate})
    return train(model, parameter_groups)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.only:
        rows = read_lines(arguments.out) if arguments.out.exists() else []
        if any(row["case"] == case for row in rows):
            continue
        mechanism, rate, ratio = case.split()
        curve, ms = run(mechanism, float(rate), float(ratio))
        plain = next((row["curve"][-1][2] for row in rows if row["case"] == f"mha {rate} 1"), None)
        row = {
            "suite": "dcmha_rate", "case": case, "phase": "train",
            "shape": {"L": L, "E": E, "H": H, "T": T, "B": B, "steps": STEPS}, "ms": round(ms, 1), "noise": 1.0,
            "ratio": 1.0 if plain is None else round(curve[-1][2] / plain, 4), "error": None, "curve": curve,
            **environment(["attnzoo"]),
        }  # fmt: skip
        append_lines(arguments.out, [row])
        print(f"{case:<16} {curve[-1][1]:.4f} in training, {curve[-1][2]:.4f} held out", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
