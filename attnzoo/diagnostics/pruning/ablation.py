"""What the loss becomes without single heads, without all others, or without whole layers.

After "Are Sixteen Heads Really Better than One?" (Michel, Levy and Neubig 2019, arXiv:1905.10650). Heads are masked,
not removed. In a model that has been pruned structurally, the columns of removed heads stay in every table and hold
nan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import check_choice, check_wanted, layers_of
from attnzoo.diagnostics.pruning.evaluate import LossFn, evaluate, progress_bar
from attnzoo.diagnostics.pruning.masks import head_mask, head_slots
from attnzoo.rules import SWITCH, check

ABLATIONS = ("one", "all_but_one", "kv_group", "layer")


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """Losses with heads removed.

    Attributes:
        mode: "one", "all_but_one", "kv_group" or "layer".
        layers: the layers of the tables' rows.
        base_loss: mean loss of the untouched model.
        losses: mean losses (rows, H), (rows, G) for "kv_group" or (rows, 1) for "layer"; nan where there is no head.
        base_score: mean of the loss function's second scores, or None.
        scores: the same of the second scores, or None.
        base_examples: losses of the examples (N,).
        examples: losses of the examples for every ablation (rows, H, N), for paired tests.
    """

    mode: str
    layers: tuple[int, ...]
    base_loss: float
    losses: Tensor
    base_score: float | None
    scores: Tensor | None
    base_examples: Tensor = field(repr=False)
    examples: Tensor = field(repr=False)

    @property
    def delta(self) -> Tensor:
        """losses - base_loss; negative where the model is better without."""
        return self.losses - self.base_loss

    def best(self) -> list[tuple[int, int, float]]:
        """Per row (layer, column of the smallest loss, its delta): for "all_but_one" the head that does it alone."""
        filled = self.delta.nan_to_num(float("inf"))
        return [(layer, int(row.argmin()), float(row.min())) for layer, row in zip(self.layers, filled, strict=True)]


def ablate_heads(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    mode: str = "one",
    *,
    layers: Sequence[int] | None = None,
    rescale: bool = False,
    num_examples: int | None = None,
    progress: bool = True,
) -> HeadAblation:
    """Losses with heads removed, one run over all batches per table entry, and one for the full model.

    Args:
        model: any model that `attention_layers` knows; runs in eval mode.
        batches: kept in a list.
        loss_fn: see `LossFn`.
        mode: "one" removes one head, "all_but_one" all others of its layer, "kv_group" the query heads of a
            key/value head, "layer" all heads of a layer.
        layers: rows to compute. Default: all.
        rescale: multiply the layer's surviving heads by H / (number of them).
        num_examples: use this many; fewer are an error. Default: all.
        progress: show a bar if this takes more than a few seconds and tqdm is installed.

    Raises:
        ValueError: for an unknown mode or layer, losses that are not finite, or too few examples.
    """
    check_choice("mode", mode, ABLATIONS)
    check("rescale", rescale, SWITCH)
    check("progress", progress, SWITCH)
    check_wanted(num_examples)
    slots = head_slots(model)
    rows = tuple(layers_of(layers, len(slots.layers)))
    size = slots.group_size() if mode == "kv_group" else slots.total if mode == "layer" else 1
    columns = slots.total // size
    batches = list(batches)
    base, base_scores = evaluate(model, slots, batches, loss_fn, None, num_examples)
    examples = torch.full((len(rows), columns, len(base)), torch.nan, dtype=torch.float64)
    scores = None if base_scores is None else examples.clone()
    cases = [(row, column) for row in range(len(rows)) for column in range(columns)]
    for row, column in progress_bar(cases, f"ablation {mode}", progress):
        kept, layer = slots.kept[rows[row]], rows[row]
        chosen = {h for h in kept if h // size == column}
        if not chosen:
            continue
        removed = set(kept) - chosen if mode == "all_but_one" else chosen
        xi = head_mask([(layer, h) for h in removed], slots.shape)
        if rescale and len(removed) < len(kept):
            xi[layer] *= len(kept) / (len(kept) - len(removed))
        examples[row, column], more = evaluate(model, slots, batches, loss_fn, xi, num_examples)
        if scores is not None and more is not None:
            scores[row, column] = more
    return HeadAblation(
        mode, rows, float(base.mean()), examples.mean(-1), None if base_scores is None else float(base_scores.mean()),
        None if scores is None else scores.mean(-1), base, examples,
    )  # fmt: skip
