"""Figures of finished runs besides the validation loss: what trained heads attend to, prune to and look like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.diagnostics.heads.report import head_report
from attnzoo.diagnostics.pruning.curves import head_pruning_curve
from attnzoo.diagnostics.training_records import read_records
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.diagnose.losses import next_token_losses
from attnzoo_recipes.lm import DecoderLM

SAMPLES = 64
"""Validation samples, from the beginning, that a trained model is measured on."""
PERCENT = 20
"""Share of the heads that pruning removes."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its folder, its model in eval mode, and its data."""

    folder: Path
    model: DecoderLM
    data: TextDataModule


@dataclass(frozen=True)
class Figure:
    """A figure of a run.

    Attributes:
        title: in words, with its unit.
        measure: computes it; None where the comparison has it.
    """

    title: str
    measure: Callable[[TrainedRun], float] | None


def sink(run: TrainedRun) -> float:
    """Mean weight on the first key that a query sees, over heads, layers and queries."""
    batch = _batch(run.data)
    packed = attnzoo.AttentionMask.packed(batch["cu_seqlens"]) if "cu_seqlens" in batch else None
    report = head_report(run.model, [batch["tokens"]], forward=lambda model, ids: model(ids, mask=packed))
    return float(report.table("sink").nanmean())


def pruned(run: TrainedRun) -> float:
    """Increase of the loss without the least important heads; importance is measured on samples of its own."""
    return _losses_without_heads(run)[0]


def pruned_at_random(run: TrainedRun) -> float:
    """How much more the loss increases without as many heads at random, the mean of ten draws."""
    chosen, random = _losses_without_heads(run)
    return random - chosen


def spectral_outliers(run: TrainedRun) -> float:
    """Mean share of the energy above the random-matrix edge, over heads, layers and recorded steps."""
    files = sorted(run.folder.glob("version_*/spectrum.jsonl"), key=lambda path: int(path.parent.name.split("_")[1]))
    if not files:
        raise ValueError(f"{run.folder} must hold the records of SpectrumCallback, got none")
    shares = [row["outlier_energy"] for row in read_records(files[-1]) if row["matrix"].startswith("qk")]
    defined = [share for share in shares if share is not None]
    if not defined:
        raise ValueError(f"heads must be wide enough for a fit of their spectra, got none in {files[-1]}")
    return statistics.fmean(defined)


FIGURES: Mapping[str, Figure] = {
    "val_bits_per_byte": Figure("validation bits per byte", None),
    "sink": Figure("mean attention weight on the first token", sink),
    "pruned": Figure(f"increase of bits per token without the {PERCENT} % least important heads", pruned),
    "pruned_at_random": Figure(
        f"bits per token by which {PERCENT} % of the heads at random cost more than the least important ones",
        pruned_at_random,
    ),
    "spectral_outliers": Figure("mean energy share of outliers in query-key spectra over training", spectral_outliers),
}
"""Figures by the name that a check has."""


def _batch(data: TextDataModule) -> dict[str, Tensor]:
    blocks = data.blocks("val")
    return blocks.__getitems__(list(range(min(SAMPLES, len(blocks)))))


def _losses_without_heads(run: TrainedRun) -> tuple[float, float]:
    """Bits per token by which the loss increases without the least important heads, and without random ones."""
    for_importance, for_losses = _batch(run.data)["tokens"].tensor_split(2)
    options: dict[str, Any] = {"progress": False, "percents": (PERCENT,)}
    order = head_pruning_curve(run.model, [for_importance], next_token_losses, baselines=(), **options).order
    curve = head_pruning_curve(
        run.model, [for_losses], next_token_losses, order=order, baselines=("random",), seeds=range(10), **options
    )
    random = torch.stack([each.losses for each in curve.baselines.values()])
    chosen_losses, random_losses = (float(losses.mean()) - curve.base_loss for losses in (curve.losses, random))
    return chosen_losses / math.log(2), random_losses / math.log(2)
