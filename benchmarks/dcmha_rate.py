"""DCMHA beside multi-head attention by learning rate, and by that of its dynamic weights.

    python benchmarks/dcmha_rate.py                              all cases that the result file lacks; an hour on 1 core
    python benchmarks/dcmha_rate.py --only "dcmha 3e-3 0.1"      one of them: mechanism, rate, ratio of dynamic weights

Trained as `small_training` says, with 6 heads, one seed.

In each row `error` is None, `ms` the mean time of a step, `ratio` the held-out bits per byte over those of `mha` at the
same rate where they are known, and `curve` has (step, training, held-out) bits per byte.
"""

from __future__ import annotations

from typing import Any

from small_training import decoder, groups, run_cases, train
from timing import ROOT

import attnzoo

OUT = ROOT / "benchmarks/results/dcmha_rate.jsonl"
H = 6
CASES = [f"{mechanism} {rate} {ratio}" for rate in ("3e-3", "1e-3", "3e-4") for mechanism, ratio in
         (("mha", "1"), ("dcmha", "1"), ("dcmha", "0.1"))]  # fmt: skip


def run(case: str) -> dict[str, Any]:
    """Train one case."""
    mechanism, rate, ratio = case.split()[0], *map(float, case.split()[1:])
    classes = {"mha": attnzoo.GroupedQueryAttention, "dcmha": attnzoo.DynamicallyComposableAttention}
    model = decoder(lambda width: classes[mechanism](width, H))
    dynamic = {id(p) for name, p in model.named_parameters() if "_dyn." in name}
    parameter_groups = groups([p for p in model.parameters() if id(p) not in dynamic], rate)
    if dynamic:
        own = [p for p in model.parameters() if id(p) in dynamic]
        parameter_groups.append({"params": own, "weight_decay": 0.1, "lr": ratio * rate})
    curve, ms = train(model, parameter_groups)
    return {"curve": curve, "ms": ms}


if __name__ == "__main__":
    raise SystemExit(run_cases(__doc__, OUT, H, CASES, run, lambda case: f"mha {case.split()[1]} 1"))
