"""The training that the small experiments share: 400 steps of a decoder on the bytes of the standard library.

A decoder of 4 layers of width 192 on the bytes of the standard library's top-level modules, of which every tenth is
held out: 8 x 256 bytes a step, warm-up of 40 steps, cosine to a tenth, gradients clipped at 1.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import append_lines, environment, read_lines
from torch import Tensor, nn

from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.optimisers import warmup_cosine

E, L, T, B, STEPS, WARMUP = 192, 4, 256, 8, 400, 40


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


def decoder(attention: Callable[[int], nn.Module], seed: int = 0) -> DecoderLM:
    """A decoder of bytes with newly drawn weights."""
    torch.manual_seed(seed)
    return DecoderLM(256, attention, embed_dim=E, num_layers=L)


def groups(parameters: list[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: matrices decay, vectors do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1, "lr": rate},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": rate},
    ]


def train(
    model: nn.Module, parameter_groups: list[dict[str, Any]], seed: int = 0
) -> tuple[list[tuple[int, float, float]], float]:
    """Train by AdamW; return (step, training, held-out) bits per byte at every 100th step, and milliseconds a step."""
    train_text, held_out = texts()
    batches = [batch(held_out, torch.Generator().manual_seed(7 + i)) for i in range(12)]
    optimizer = torch.optim.AdamW(parameter_groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(WARMUP, STEPS, 0.1))
    generator = torch.Generator().manual_seed(seed)
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
    return curve, round(seconds * 1e3 / STEPS, 1)


def run_cases(
    description: str | None,
    out: Path,
    heads: int,
    cases: list[str],
    run: Callable[[str], dict[str, Any]],
    reference: Callable[[str], str],
) -> int:
    """The command line of an experiment: append a row for every case that the result file lacks.

    Args:
        description: of the command, in which it is named.
        out: the result file, whose name is that of the suite, unless --out names another.
        heads: of attention.
        cases: all of them, in order.
        run: trains a case; returns "curve", "ms" and what else a row has.
        reference: the case whose held-out loss a case is divided by.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--only", nargs="+", choices=cases, default=cases)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for case in arguments.only:
        rows = read_lines(arguments.out) if arguments.out.exists() else []
        if any(row["case"] == case for row in rows):
            continue
        found = run(case)
        _, in_training, held_out = found["curve"][-1]
        plain = next((row["curve"][-1][2] for row in rows if row["case"] == reference(case)), held_out)
        row = {
            "suite": out.stem, "case": case, "phase": "train",
            "shape": {"L": L, "E": E, "H": heads, "T": T, "B": B, "steps": STEPS}, "noise": 1.0,
            "ratio": round(held_out / plain, 4), "error": None, **found, **environment(["attnzoo"]),
        }  # fmt: skip
        append_lines(arguments.out, [row])
        print(f"{case:<16} {in_training:.4f} in training, {held_out:.4f} held out", flush=True)
    return 0
