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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from small_training import batch, decoder, groups, run_cases, texts, train
from timing import ROOT
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


def run(case: str) -> dict[str, Any]:
    """Train one case."""
    mechanism, ratio = case.split()
    model = decoder(MECHANISMS[mechanism])
    start = sizes(model, batch(texts()[0], torch.Generator().manual_seed(1))[0])
    last = {id(p) for name, p in model.named_parameters() if "o_proj" in name}
    parameter_groups = [
        *groups([p for p in model.parameters() if id(p) not in last], RATE),
        *groups([p for p in model.parameters() if id(p) in last], float(ratio) * RATE),
    ]
    curve, ms = train(model, [group for group in parameter_groups if group["params"]])
    return {"start": start, "curve": curve, "ms": ms}


if __name__ == "__main__":
    raise SystemExit(run_cases(__doc__, OUT, H, CASES, run, lambda _: "mha 1"))
