"""What a norm on the outputs of heads does to a short training, and what the learning rate has to do with it.

    python benchmarks/head_norm_rate.py                     all cases that the result file lacks; 40 minutes on 1 core
    python benchmarks/head_norm_rate.py --only "diff 0.1"   one: mechanism, ratio of the learning rate of `o_proj`

"mha_norm" is multi-head attention with the norm of differential and multi-token attention and nothing else of theirs,
"mta_plain" multi-token attention without it. Sigmoid attention has no such norm: "sigmoid" normalises queries and keys,
as in configs/attention, "sigmoid_plain" does not. Trained as `small_training` says at a rate of 3e-3, 8 heads, one
seed.

In each row `start` has the root mean square of each layer's attention output over that of the embedding, before
training; `error` is None, `ms` the mean time of a step, `ratio` the held-out bits per byte over those of "mha 1" where
they are known, and `curve` has (step, training, held-out) bits per byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_training import STEPS, B, E, L, T, batch, decoder, groups, texts, train
from timing import ROOT, append_lines, environment, read_lines
from torch import Tensor, nn

import attnzoo

OUT = ROOT / "benchmarks/results/head_norm_rate.jsonl"
H, RATE = 8, 3e-3
MultiToken = partial(attnzoo.MultiTokenAttention, num_heads=H)
MECHANISMS: dict[str, Callable[[int], nn.Module]] = {
    "mha": partial(attnzoo.MultiHeadAttention, num_heads=H),
    "mha_norm": partial(MultiToken, pre_kernel=None, post_head_group=None),
    "diff": partial(attnzoo.DifferentialAttention, num_heads=H // 2),
    "mta": partial(MultiToken, gate="headwise"),
    "mta_plain": partial(MultiToken, gate="headwise", head_norm=False),
    "sigmoid": partial(attnzoo.SigmoidAttention, num_heads=H, qk_norm=True),
    "sigmoid_plain": partial(attnzoo.SigmoidAttention, num_heads=H),
}
SLOWER = ("mha", "mha_norm", "diff", "mta")
CASES = [*(f"{name} 1" for name in MECHANISMS), *(f"{name} 0.1" for name in SLOWER)]


def sizes(model: Any, tokens: Tensor) -> list[float]:
    """Root mean square of the output of attention, layer by layer, over that of the embedding."""
    found: list[float] = []
    hooks = [block.attn.register_forward_hook(lambda _module, _args, out: found.append(rms(out)))
             for block in model.layers]  # fmt: skip
    with torch.no_grad():
        model(tokens)
        first = rms(model.embedding(tokens))
    for hook in hooks:
        hook.remove()
    return [round(size / first, 3) for size in found]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def run(mechanism: str, ratio: float) -> dict[str, Any]:
    """Train one case."""
    model = decoder(MECHANISMS[mechanism])
    start = sizes(model, batch(texts()[0], torch.Generator().manual_seed(1))[0])
    last = {id(p) for name, p in model.named_parameters() if "o_proj" in name}
    parameter_groups = [
        *groups([p for p in model.parameters() if id(p) not in last], RATE),
        *groups([p for p in model.parameters() if id(p) in last], ratio * RATE),
    ]
    curve, ms = train(model, [group for group in parameter_groups if group["params"]])
    return {"start": start, "curve": curve, "ms": round(ms, 1)}


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
        mechanism, ratio = case.split()
        found = run(mechanism, float(ratio))
        plain = next((row["curve"][-1][2] for row in rows if row["case"] == "mha 1"), None)
        held_out = found["curve"][-1][2]
        row = {
            "suite": "head_norm_rate", "case": case, "phase": "train",
            "shape": {"L": L, "E": E, "H": H, "T": T, "B": B, "steps": STEPS}, "noise": 1.0,
            "ratio": 1.0 if plain is None else round(held_out / plain, 4), "error": None, **found,
            **environment(["attnzoo"]),
        }  # fmt: skip
        append_lines(arguments.out, [row])
        print(f"{case:<14} {sum(found['start']) / L:6.2f} at the start, {held_out:.4f} held out", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
