"""What a run was in fact, as it measured it itself, for comparisons of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from attnzoo_recipes.data.module import MAIN
from attnzoo_recipes.files import training_goes_on, write_atomically
from attnzoo_recipes.model_config import figures
from attnzoo_recipes.trainer import is_dry_run, run_folder, text_data

FILE = "record.json"


def marked_steps(last: int) -> list[int]:
    """Optimiser steps, counted from 0, whose learning rate a record has."""
    return sorted({0, last // 8, last // 4, last // 2, 3 * last // 4, 7 * last // 8, last - 1}) if last > 0 else []


class Record(L.Callback):
    """Write record.json into the run's folder when training has ended.

    It holds what the run had: figures of the model (`model_config.figures`), steps, tokens (with those of the runs that
    it continued), identities of the training and validation data, and the learning rate at `marked_steps`.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self._marked: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        """The rates so far."""
        return {"rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of a checkpoint."""
        self.rates = dict(state_dict["rates"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the steps."""
        self._marked = set(marked_steps(trainer.max_steps))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rate with which a marked step is made."""
        if trainer.global_step in self._marked:
            self.rates[str(trainer.global_step)] = float(trainer.optimizers[0].param_groups[0]["lr"])

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the record."""
        if is_dry_run(trainer):
            return
        data = text_data(trainer)
        tokens = data.block_size
        packed, split = data.validation[MAIN]
        record = {
            **figures(pl_module.whole_model(), tokens),
            "steps": trainer.global_step,
            "tokens": data.samples_drawn * tokens,
            "data": data.key,
            **({"tokens_by_source": drawn} if (drawn := data.tokens_drawn) else {}),
            "val_data": f"{packed.key}/{split}",
            "rates": {step: rate for step, rate in self.rates.items() if int(step) in self._marked},
        }
        path: Path = run_folder(trainer) / FILE
        with training_goes_on(path):
            write_atomically(path, json.dumps(record, indent=1) + "\n")
