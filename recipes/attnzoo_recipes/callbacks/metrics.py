"""Metrics as CSV that outlive a full disk and a kill."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from attnzoo_recipes import files

_WRITING = ("log_hyperparams", "log_metrics", "log_graph", "save", "after_save_checkpoint", "finalize")


class MetricsWriter(ExperimentWriter):
    """Writes rows whole or not at all; those that a failing disk does not take are written with later ones.

    Lightning's own empties the file before it rewrites it for another column.
    """

    def save(self) -> None:
        """Write the rows that have not been written, with a warning if the disk does not take them."""
        if not self.metrics:
            return
        path, columns = Path(self.metrics_file_path), sorted({*self.metrics_keys, *set().union(*self.metrics)})
        with files.training_goes_on(path):
            if columns != self.metrics_keys or not path.is_file():
                earlier: list[dict[str, Any]] = []
                if path.is_file():
                    with path.open(newline="", encoding="utf-8") as file:
                        earlier = list(csv.DictReader(file))
                files.write_atomically(path, _table(columns, [*earlier, *self.metrics], header=True))
            else:
                files.append(path, _table(columns, self.metrics, header=False))
            self.metrics_keys, self.metrics = columns, []


class Metrics(CSVLogger):
    """metrics.csv in the run's folder, by `MetricsWriter`.

    Args:
        folder: of the runs; each gets a folder version_N in it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="")
        self._made: Path | None = None

    @property
    def version(self) -> int | str:
        """N of the run's folder, which the first process creates: no other run has it, nor one that starts now.

        Raises:
            OSError: if it cannot be created.
        """
        if self._version is None:
            number, untyped = self._get_next_version(), cast(Any, rank_zero_only)
            while untyped.rank == 0 and not _created(Path(self.root_dir) / f"version_{number}"):
                number += 1
            self._version = number
            if untyped.rank == 0:
                self._made = Path(self.log_dir)
        return self._version

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, in the first process, and a dummy in the others."""
        if self._experiment is None:
            self._experiment = MetricsWriter(log_dir=self.log_dir)
        return self._experiment

    def discard(self) -> None:
        """Remove the folder of this run if nothing but its configuration is in it."""
        if self._made is None or not self._made.is_dir():
            return
        written = list(self._made.iterdir())
        if all(path.name == "config.yaml" for path in written):
            with contextlib.suppress(OSError):  # such as a file that another process has put there in the meantime
                for path in written:
                    path.unlink()
                self._made.rmdir()


class NothingLeft(L.Callback):
    """Remove the folder of a run that ends before its first batch, such as one with a checkpoint that is refused.

    Args:
        logger: whose folder it is.
    """

    def __init__(self, logger: Metrics) -> None:
        self._logger = logger
        self._began = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the folder."""
        self._began = True

    on_validation_start = on_test_start = on_train_start

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the folder if nothing has begun."""
        if not self._began:
            self._logger.discard()


def _created(folder: Path) -> bool:
    """Create a folder, and say whether it was not there."""
    with files.naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            return False
        return True


def outlive_failing_disks(logger: Logger) -> Logger:
    """The logger itself, whose methods warn from now on if a disk fails, and do not end the training."""

    def forgiving(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> None:
            try:
                method(*arguments, **keywords)
            except OSError as error:
                with files.training_goes_on(Path(error.filename or logger.log_dir or logger.save_dir or ".")):
                    raise error

        return call

    for name in _WRITING:
        setattr(logger, name, forgiving(getattr(logger, name)))
    return logger


def _table(columns: list[str], rows: Iterable[dict[str, Any]], header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
