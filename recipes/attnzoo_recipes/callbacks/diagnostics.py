"""Callbacks that record, while a model trains, the spectra of its heads and what the heads attend to.

Each writes JSON lines into the run's folder, logs means and pictures to the run's loggers, and writes pictures of all
layers and steps at the end. Only the first process does so, and the random states of training are not used.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

import attnzoo
from attnzoo.diagnostics.heads.measures import MEASURES
from attnzoo.diagnostics.heads.report import head_report
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.spectra.spectrum import analyze_attention
from attnzoo.diagnostics.training_records import read_records, to_line
from attnzoo.rules import SIZE, check, numbers_of
from attnzoo_recipes.files import Appender, training_goes_on, write_atomically
from attnzoo_recipes.trainer import is_dry_run, run_folder, text_data, weights_are_finite

PRESETS = ("jha_reagen",)


class Recorder(L.Callback, ABC):
    """Base of both callbacks: when a record is due, the file of JSON lines, loggers, pictures, resuming.

    Checkpoints contain the path of the file. A resumed run copies the lines up to its step from there, so that its own
    file has the whole training exactly once; if the file is missing, it warns. Weights that are not finite are not
    recorded, which a warning says.

    Args:
        every_n_steps: optimiser steps between two records.
        also_at: further steps; 0 is before the first.
        path: of the JSON lines, relative to the run's folder.
        drawn: figures of the rows that are drawn as layers by steps.

    Raises:
        ValueError: for an argument outside its rule; when training starts, if parameters are sharded over processes,
            or if the file exists although the run does not resume.
    """

    name = "records"

    def __init__(self, every_n_steps: int, also_at: Sequence[int], path: str, drawn: Sequence[str]) -> None:
        check("every_n_steps", every_n_steps, SIZE)
        also_at = numbers_of("also_at", also_at)
        if any(step < 0 for step in also_at):
            raise ValueError(f"also_at must not hold negative steps, got {also_at}")
        self.every_n_steps = every_n_steps
        self.also_at = tuple(also_at)
        self.path = path
        self.drawn = tuple(drawn)
        self.seconds = 0.0
        """Time spent on records and pictures."""
        self.seconds_at_end = 0.0
        """The part of it after the last step."""
        self._rows: list[dict[str, Any]] = []
        self._file: Path | None = None
        self._lines = Appender()
        self._last = -1
        self._resumed: dict[str, Any] | None = None

    @abstractmethod
    def rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        """One record's rows, each with "layer"; the step is added."""

    @abstractmethod
    def scalars(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The scalars of one record's rows for the loggers."""

    def groups(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """The rows of each picture, by name."""
        return {self.name: list(rows)}

    # state

    def state_dict(self) -> dict[str, Any]:
        """The path of the file and the last recorded step."""
        return {"file": None if self._file is None else str(self._file.resolve()), "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the file, which is continued when training starts."""
        self._resumed = dict(state_dict)

    # hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise ValueError if parameters are sharded over processes."""
        sharded = isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy)
        if stage == "fit" and sharded:
            raise ValueError(
                f"{type(self).__name__} needs all parameters in one process, got {type(trainer.strategy).__name__}"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open or continue the file, and record step 0."""
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        self._file = run_folder(trainer) / self.path
        self._begin(trainer.global_step)
        if trainer.global_step == 0 and self._due(0):
            self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record if this was the last batch of a step at which a record is due."""
        step = trainer.global_step
        if self._file is not None and step != self._last and self._due(step):
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write pictures next to the file."""
        if self._file is None or not self._rows:
            return
        from attnzoo.diagnostics import plots

        began = time.perf_counter()
        for name, figure in self._figures().items():
            path = self._file.with_name(f"{name.replace('/', '_')}.png")
            with training_goes_on(path):
                plots.save(figure, path)
        self.seconds_at_end += time.perf_counter() - began
        self.seconds += self.seconds_at_end

    def _due(self, step: int) -> bool:
        return step in self.also_at or (step > 0 and step % self.every_n_steps == 0)

    def _begin(self, step: int) -> None:
        """Start the file, with the lines of the resumed run if there is one."""
        assert self._file is not None
        before, self._resumed = self._resumed, None
        self._rows, self._last = [], -1
        if before is None:
            if self._file.exists():
                raise ValueError(f"path must not exist unless the run resumes, got {self._file}")
            return
        source = Path(before["file"]) if before["file"] else None
        if source is None or not source.is_file():
            rank_zero_warn(f"{type(self).__name__} cannot find {source}: its records start at step {step}.")
            return
        self._rows = [row for row in read_records(source) if row["step"] <= step]
        self._last = int(before["last"])
        with training_goes_on(self._file):
            write_atomically(self._file, "".join(to_line(row) for row in self._rows))

    @torch.no_grad()
    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._file is not None
        began = time.perf_counter()
        step = trainer.global_step
        if not weights_are_finite(pl_module):
            rank_zero_warn(f"{type(self).__name__} records nothing at step {step}: weights are not finite.")
            return
        rows = [{"step": step, **row} for row in self.rows(trainer, pl_module)]
        self._lines.append(self._file, "".join(to_line(row) for row in rows))
        self._rows += [{key: value for key, value in row.items() if key != "eigenvalues"} for row in rows]
        self._last = step
        scalars = self.scalars(rows)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
        self._log_pictures(trainer, step)
        self.seconds += time.perf_counter() - began

    def _log_pictures(self, trainer: L.Trainer, step: int) -> None:
        """Log the pictures where that is possible: Weights & Biases has log_image, TensorBoard's writer add_image."""
        loggers: list[Any] = list(trainer.loggers)
        takers = [
            logger for logger in loggers if hasattr(logger, "log_image") or hasattr(logger.experiment, "add_image")
        ]
        if not takers:
            return
        from attnzoo.diagnostics import plots

        for name, figure in self._figures().items():
            pixels = plots.to_array(figure).numpy()
            for logger in takers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[pixels], step=step)
                else:
                    logger.experiment.add_image(name, pixels, step, dataformats="HWC")

    def _figures(self) -> dict[str, Any]:
        """A picture, layers by steps, of every drawn figure that has values."""
        from attnzoo.diagnostics import plots

        return {
            f"{group}/{metric}": plots.heatmap(rows, metric)
            for group, rows in self.groups(self._rows).items()
            for metric in self.drawn
            if any(_is_number(row.get(metric)) for row in rows)
        }


class SpectrumCallback(Recorder):
    """Records the spectra of all heads: one line for each (step, layer, head, matrix), see `SpectrumRecord.to_dict`.

    With the model of configs/quickstart.yaml a record takes a fraction of a second; `benchmarks/spectrum.py callbacks`
    measures the share of the training time.

    Args:
        every_n_steps: optimiser steps between two records.
        also_at: further steps; 0 is before the first.
        matrices: as in `analyze_model`: some of "qk", "ov", "weights".
        per: "head" or "layer".
        part: of "qk".
        presets: for further records of "qk" by `analyze_attention(preset=...)`, with the entry "preset".
        path: of the JSON lines.
        save_eigenvalues: whether lines contain them.
        drawn: figures that are drawn as layers by steps.
    """

    name = "spectrum"

    def __init__(
        self,
        every_n_steps: int = 500,
        also_at: tuple[int, ...] = (0, 10, 100),
        matrices: tuple[str, ...] = ("qk",),
        per: str = "head",
        part: str = "full",
        presets: tuple[str, ...] = (),
        path: str = "spectrum.jsonl",
        save_eigenvalues: bool = False,
        drawn: tuple[str, ...] = ("stable_rank", "mp_softrank", "outlier_count"),
    ) -> None:
        super().__init__(every_n_steps, also_at, path, drawn)
        unknown = [preset for preset in presets if preset not in PRESETS]
        if unknown:
            raise ValueError(f"presets must be some of {', '.join(map(repr, PRESETS))}, got {unknown}")
        self.matrices = tuple(matrices)
        self.per = per
        self.part = part
        self.presets = tuple(presets)
        self.save_eigenvalues = save_eigenvalues

    def rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        """Spectra of the model, and of its layers with each preset."""
        model = decoder(pl_module)
        keep: dict[str, Any] = {"keep_eigenvalues": self.save_eigenvalues}
        records = analyze_model(model, matrices=self.matrices, per=self.per, part=self.part, **keep)
        rows = [{**record.to_dict(), "preset": None} for record in records]
        for preset in self.presets:
            for layer in attention_layers(model):
                for record in analyze_attention(layer.module, preset=preset, layer=layer.name, **keep):
                    rows.append({**record.to_dict(), "preset": preset})
        if not self.save_eigenvalues:
            for row in rows:
                del row["eigenvalues"]
        return rows

    def groups(self, rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """By matrix and preset."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            preset = "" if row["preset"] is None else f"_{row['preset']}"
            groups.setdefault(f"spectrum_{row['matrix'].replace(' ', '_')}{preset}", []).append(row)
        return groups

    def scalars(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Means over all heads, and the largest gap."""
        scalars: dict[str, float] = {}
        for group, own in self.groups([dict(row) for row in rows]).items():
            for metric in ("stable_rank", "participation_ratio", "outlier_count", "outlier_energy"):
                scalars |= _mean(f"{group}/{metric}", own, metric)
            gaps = [row["mp_gap"] for row in own if _is_number(row["mp_gap"])]
            scalars |= {f"{group}/mp_gap_max": max(gaps)} if gaps else {}
        return scalars


class HeadStatisticsCallback(Recorder):
    """Records what heads attend to on the same validation samples: one line for each (step, layer, head).

    A line has the measures of `head_report`, those of gates among them, and "pair_cosine", the mean cosine with the
    patterns of the layer's other heads. Attention stays within the documents of a sample.

    Args:
        every_n_steps: optimiser steps between two records.
        also_at: further steps; 0 is before the first.
        num_sequences: number of samples, the first ones of the validation split.
        path: of the JSON lines.
        drawn: figures that are drawn as layers by steps.
    """

    name = "heads"

    def __init__(
        self,
        every_n_steps: int = 500,
        also_at: tuple[int, ...] = (0, 10, 100),
        num_sequences: int = 4,
        path: str = "heads.jsonl",
        drawn: tuple[str, ...] = ("normalized_entropy", "distance", "sink", "previous_token", "pair_cosine"),
    ) -> None:
        super().__init__(every_n_steps, also_at, path, drawn)
        check("num_sequences", num_sequences, SIZE)
        self.num_sequences = num_sequences

    def rows(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        """Measures of every head on the samples."""
        blocks = text_data(trainer).blocks("val")
        if not len(blocks):
            raise ValueError("the validation split must hold at least one block, got none")
        batch = blocks.__getitems__(list(range(min(self.num_sequences, len(blocks)))))
        tokens = batch["tokens"].to(pl_module.device)
        starts = batch.get("cu_seqlens")
        mask = None if starts is None else attnzoo.AttentionMask.packed(starts.to(pl_module.device))
        report = head_report(decoder(pl_module), [tokens], forward=lambda model, ids: model(ids, mask=mask))
        rows = []
        for layer in report.layers:
            itself = torch.eye(layer.num_heads, dtype=torch.bool)
            others = layer.pair_cosine.masked_fill(itself, math.nan).nanmean(1)
            for head in range(layer.num_heads):
                figures = {name: float(values[head]) for name, values in layer.measures.items()}
                rows.append({"layer": layer.name, "head": head, **figures, "pair_cosine": float(others[head])})
        return rows

    def scalars(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Means over all heads."""
        scalars: dict[str, float] = {}
        gates = dict.fromkeys(name for row in rows for name in row if "gate_" in name)
        for metric in (*MEASURES, "pair_cosine", *gates):
            scalars |= _mean(f"heads/{metric}", rows, metric)
        return scalars


def decoder(pl_module: L.LightningModule) -> nn.Module:
    """The `model` of a module of this recipe, or the module itself."""
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module


def _mean(name: str, rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    values = [float(row[metric]) for row in rows if _is_number(row.get(metric))]
    return {name: statistics.fmean(values)} if values else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
