"""DCMHA beside multi-head attention by learning rate, and by that of its dynamic weights.

    python benchmarks/dcmha_rate.py                              all cases that the result file lacks; an hour on 1 core
    python benchmarks/dcmha_rate.py --only "dcmha 3e-3 0.1"      one of them: mechanism, rate, ratio of dynamic weights

A decoder of 4 layers of width 192 with 6 heads on the bytes of the standard library's top-level modules, of which every
tenth is held out: 400 steps of AdamW on 8 x 256 bytes, warm-up of 40 steps, cosine to a tenth, one seed.

In each row `error` is None, `ms` the mean time of a step, `ratio` the held-out bits per byte over those of `mha` at the
same rate where they are known, and `curve` has (step, training, held-out) bits per byte.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import ROOT, append_lines, environment, read_lines
from torch import Tensor

import attnzoo
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.optimisers import warmup_cosine

OUT = ROOT / "benchmarks/results/dcmha_rate.jsonl"
E, L, H, T, B, STEPS, WARMUP = 192, 4, 6, 256, 8, 400, 40
CASES = [f"{mechanism} {rate} {ratio}" for rate in ("3e-3", "1e-3", "3e-4") for mechanism, ratio in
         (("mha", "1"), ("dcmha", "1"), ("dcmha", "0.1"))]  # fmt: skip


def texts() -> tuple[Tensor, Tensor]:
    """Bytes for training and held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [[path for i, path in enumerate(files) if (i % 10 == 0) == held] for held in (False, True)]
    train, held_out = (b"".join(path.read_bytes() for path in part) for part in parts)
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in (train, held_out))  # type: ignore[return-value]


def batch(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T)."""
    starts = torch.randint(0, len(text) - T - 1, (B,), generator=generator)
    rows = torch.stack([text[i : i + T + 1] for i in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def train(mechanism: str, rate: float, ratio: float) -> tuple[list[tuple[int, float, float]], float]:
    """The curve, and milliseconds a step."""
    train_text, held_out = texts()
    batches = [batch(held_out, torch.Generator().manual_seed(7 + i)) for i in range(12)]
    torch.manual_seed(0)
    classes = {"mha": attnzoo.GroupedQueryAttention, "dcmha": attnzoo.DynamicallyComposableAttention}
    model = DecoderLM(256, lambda width: classes[mechanism](width, H), embed_dim=E, num_layers=L)
    dynamic = {id(p) for name, p in model.named_parameters() if "_dyn." in name}
    rest = [p for p in model.parameters() if id(p) not in dynamic]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1, "lr": rate},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "lr": rate},
    ]
    if dynamic:
        own = [p for p in model.parameters() if id(p) in dynamic]
        groups.append({"params": own, "weight_decay": 0.1, "lr": ratio * rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(WARMUP, STEPS, 0.1))
    generator = torch.Generator().manual_seed(0)
    curve, total, seconds = [], 0.0, 0.0
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        tokens, targets = batch(train_text, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        seconds += time.perf_counter() - start
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() for x, y in batches]
            model.train()
            nats = total / 100, sum(losses) / len(losses)
            curve.append((step, *(round(value / math.log(2), 4) for value in nats)))
            total = 0.0
    return curve, seconds * 1e3 / STEPS


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
        curve, ms = train(mechanism, float(rate), float(ratio))
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
