"""Facts of a Lightning trainer that its annotations leave out: it gets many of its attributes from its connectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.sharding import ShardedStrategy

LOST_PROCESS = 6
"""Exit code of a process that has lost another one of its run."""

_LOST = ("connection closed by peer", "connection reset by peer", "timed out waiting", "broken pipe", "connectfullmesh")


def is_lost_process(error: BaseException) -> bool:
    """Whether an exception says that another process has ended, or did not answer within the strategy's time-out."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)


def lost_process(error: BaseException) -> str:
    """One sentence about such an exception."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"another process of this run has ended or does not answer ({reason:.200}); --ckpt_path RUN, with the run's "
        "folder, continues from its newest checkpoint"
    )


def check_strategy(trainer: L.Trainer, compiled: bool = False) -> None:
    """Raise ValueError for a strategy under which this recipe has not been shown to train as in one process."""
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy, ShardedStrategy):
        raise ValueError(
            "trainer.strategy must be auto, for one device, one of the forms of ddp, or ModelParallelStrategy (in "
            f"Python, attnzoo_recipes.sharding.ShardedStrategy), got {type(trainer.strategy).__name__}"
        )
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.mesh_shape()
    if compiled and is_sharded(trainer):
        raise ValueError("model.compile must be false where parameters are sharded, got true")


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether each process has only a part of the parameters."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def run_folder(trainer: L.Trainer) -> Path:
    """Where the files of this run are: the first logger's folder, according to the first process.

    `Trainer.log_dir` is the same folder, but all processes have to ask for it together.
    """
    folder = trainer.loggers[0].log_dir if trainer.loggers else None
    return Path(folder or trainer.default_root_dir)


def text_data(trainer: L.Trainer) -> TextDataModule:
    """The data module of the run."""
    untyped: Any = trainer
    data: TextDataModule = untyped.datamodule
    return data


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks, in the order in which they are called."""
    untyped: Any = trainer
    return list(untyped.callbacks)


def weights_are_finite(module: nn.Module) -> bool:
    """Whether no parameter is NaN or infinite, as in runs whose `LossGuard` is switched off."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def log_interval(trainer: L.Trainer) -> int:
    """Optimiser steps between two entries of the log."""
    untyped: Any = trainer
    return int(untyped.log_every_n_steps)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a training batch is the last one of an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or bool(trainer.is_last_batch)


def log_is_due(trainer: L.Trainer, batch_idx: int, step: int) -> bool:
    """Whether a training batch is the last one of optimiser step `step`, counted from 1, and is logged."""
    return ends_step(trainer, batch_idx) and step % log_interval(trainer) == 0


def recount_batches(checkpoint: dict[str, Any], batches_per_step: int) -> None:
    """Make a checkpoint count the batches that its optimiser steps would have had with so many batches each.

    Steps end, and validation begins, at multiples of these counts, which a run that continues with another gradient
    accumulation would miss. Only for data without epochs.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    for counts in (loop.get("total"), loop.get("current")):
        if counts is not None:
            shift = checkpoint["global_step"] * batches_per_step - counts["ready"]
            counts.update({name: count + shift for name, count in counts.items()})


def is_dry_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries a few batches (`fast_dev_run`)."""
    untyped: Any = trainer
    return bool(untyped.fast_dev_run)
