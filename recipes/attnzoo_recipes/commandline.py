"""The command line of attnzoo-pretrain: its settings, the objects that every run has, and how errors end it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO, cast

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from attnzoo import BackendUnavailable
from attnzoo.diagnostics.plots import FORMATS
from attnzoo_recipes.allowlist import ALLOWED, SUMMARY, check_arguments
from attnzoo_recipes.callbacks.memory import MemoryEstimate, out_of_memory
from attnzoo_recipes.callbacks.metrics import Metrics, NothingLeft, outlive_failing_disks
from attnzoo_recipes.callbacks.progress import (
    Checkpoints,
    LossCurve,
    ProgressLines,
    Samples,
    StepProgress,
    Throughput,
)
from attnzoo_recipes.callbacks.record import Record
from attnzoo_recipes.callbacks.resilience import GracefulStop, LossGuard, RandomStates, RunStoppedError
from attnzoo_recipes.callbacks.summary import Report, Sizes
from attnzoo_recipes.checkpointing import AtomicCheckpointIO
from attnzoo_recipes.data.module import TextDataModule, check_endless
from attnzoo_recipes.files import Unbreakable, is_failing_disk
from attnzoo_recipes.optimisers import OptimiserMaker, ScheduleMaker
from attnzoo_recipes.options import OUT_OF_MEMORY, is_out_of_memory, one_sentence, take_allowed_imports
from attnzoo_recipes.sharding import ShardedStrategy
from attnzoo_recipes.signals import Stop
from attnzoo_recipes.trainer import LOST_PROCESS, check_strategy, is_lost_process, lost_process
from attnzoo_recipes.training import Pretraining, check_finite

CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")
"""Folders of named configs: in an installed wheel, and in the repository."""

_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # reading a slice of a memory map does not get faster with workers
    ".*LeafSpec.*is deprecated.*",  # Lightning uses a class that torch is about to remove
)
_EPILOG = (
    f"--allow-import PACKAGE,...: packages that configs and checkpoints may name besides {SUMMARY}; "
    "importing runs their code."
)


class PretrainCLI(LightningCLI):
    """LightningCLI with this recipe's loggers, callbacks, checkpoint writer and precision.

    Args:
        allowed: packages that a checkpoint may name.
        stop: the handlers of signals.
        arguments: of LightningCLI.
    """

    def __init__(self, *arguments: Any, allowed: Iterable[str] = ALLOWED, stop: Stop | None = None, **options: Any):
        self.allowed = tuple(allowed)
        self.stop = stop
        super().__init__(*arguments, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, without the base's warning that `args` and a command line are given: main makes one from the other."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: settings of a checkpoint are not used, but compared by `Pretraining.on_load_checkpoint`."""

    def before_instantiate_classes(self) -> None:
        """Check the numbers; choose the precision if the user did not: bf16 on a GPU that supports it."""
        settings = self.config[self.subcommand].as_dict()
        trainer = self.config[self.subcommand]["trainer"]
        if not hasattr(trainer, "as_dict"):
            raise ValueError(f"trainer must be a section of settings, got {trainer!r:.80}")
        check_finite(settings)
        check_trainer(settings["trainer"])
        if self.subcommand == "fit":
            check_end(settings["trainer"])
        check_ckpt_path(settings.get("ckpt_path"))
        if self.subcommand != "fit" and settings["ckpt_path"] is None and settings["model"]["init_from"] is None:
            _warn_of_random_weights()
        if trainer["precision"] is None:
            trainer["precision"] = default_precision(trainer["accelerator"])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add options of the callbacks that every run has, the optimiser and its schedule."""
        parser.add_argument(
            "--progress",
            type=Literal["auto", "bar", "lines", "none"],
            default="auto",
            help="a bar, a line for every entry of the log, or nothing; auto is a bar on a terminal, otherwise lines",
        )
        parser.add_argument(
            "--format", type=Literal[FORMATS], default="png", help="of the learning curve in the run's folder"
        )
        for name, kind in (("optimizer", OptimiserMaker), ("lr_scheduler", ScheduleMaker)):
            text = f"class path and init_args of the {name}, see model.{name}"
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)
            parser.link_arguments(name, f"model.{name}")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(LossGuard, "loss_guard")
        parser.add_lightning_class_args(Samples, "samples")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, which always logs to CSV and writes checkpoints atomically."""
        trainer = self._get(self.config_init, "trainer")
        metrics = Metrics(trainer["default_root_dir"] or "runs")
        loggers = [metrics, *_listed(trainer["logger"])]
        samples, kind = (self._get(self.config_init, name) for name in ("samples", "format"))
        report = Report(samples.prompt, samples.temperature, self.allowed)
        always = [
            RandomStates(), Throughput(), LossCurve(kind), Record(), report, MemoryEstimate(), GracefulStop(self.stop),
            NothingLeft(metrics),
        ]  # fmt: skip
        if trainer["enable_model_summary"] is not False:
            always.append(Sizes())
        progress = self._get(self.config_init, "progress")
        if trainer["enable_progress_bar"] is False:
            progress = "none"
        elif progress == "auto":
            progress = "bar" if sys.stderr.isatty() else "lines"
        if progress != "none":
            always.append(StepProgress(refresh_rate=10) if progress == "bar" else ProgressLines())
        batches = trainer["accumulate_grad_batches"]
        if isinstance(trainer["val_check_interval"], int):
            # Lightning counts batches; this recipe counts optimiser steps.
            kwargs["val_check_interval"] = trainer["val_check_interval"] * batches
        callbacks, plugins = _listed(trainer["callbacks"]), _listed(trainer["plugins"])
        if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            raise ValueError(
                "trainer.callbacks must not hold LearningRateFinder: the schedule goes back to model.lr after a step; "
                "in Python, Tuner(trainer).lr_find(...) before fit sets model.lr"
            )
        if isinstance(trainer["strategy"], ModelParallelStrategy):
            kwargs["strategy"] = ShardedStrategy.of(trainer["strategy"])
            if trainer["precision"] == "64-true":
                # Lightning accepts it by the strategy's name alone.
                kwargs["precision"], plugins = None, [*plugins, DoublePrecision()]
        made = super().instantiate_trainer(
            logger=[outlive_failing_disks(logger) for logger in loggers],
            plugins=[AtomicCheckpointIO(), *plugins],
            callbacks=[*always, *callbacks],
            enable_progress_bar=progress == "bar",
            enable_model_summary=False,
            **kwargs,
        )
        check_strategy(made, self._get(self.config_init, "model").compile_model)
        if self.stop is not None:
            self.stop.launcher = made.strategy.launcher
        return made


class _Settings(PretrainCLI):
    """Parses the settings of a run, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Check nothing."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _set_seed(self) -> None:
        """Leave random states alone."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def configurations(commands: Sequence[Sequence[str]], allowed: Iterable[str] = ALLOWED) -> list[dict[str, Any]]:
    """The complete settings that attnzoo-pretrain would have with these words, the first of which is "fit".

    Nothing is built. The rules of imports are those of a run.

    Raises:
        ImportRefusedError: for an import path outside `allowed`.
        ArgumentError: for a setting that does not exist or does not fit.
    """
    found: list[dict[str, Any]] = []
    parsing: _Settings | None = None
    for command in commands:
        words = find_configs(list(command))
        check_arguments(words, allowed)
        if parsing is None:
            parsing = _made(_Settings, words, allowed, None)
        parser = parsing._parser("fit")
        dumped = parser.dump(parsing.parser.parse_args(words)["fit"], skip_none=False)
        settings: dict[str, Any] = yaml.safe_load(dumped)
        found.append(settings)
    return found


def _made(cls: type[PretrainCLI], words: list[str], allowed: Iterable[str], stop: Stop | None) -> Any:
    """A command line of the recipe's classes."""
    strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "epilog": _EPILOG}
    return cls(
        Pretraining,
        TextDataModule,
        allowed=allowed,
        stop=stop,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={**strict, **dict.fromkeys(PretrainCLI.subcommands(), strict)},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=words,
    )


def run(args: Sequence[str] | None, stop: Stop) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2.

    Args:
        args: the words, or those of the process.
        stop: the handlers of signals, which are installed.
    """
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    with (
        contextlib.redirect_stdout(cast(TextIO, Unbreakable(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Unbreakable(sys.stderr))),
        _errors_in_one_sentence(),
    ):
        words, allowed = take_allowed_imports(list(sys.argv[1:] if args is None else args))
        words = find_configs(words)
        check_arguments(words, allowed)
        _made(PretrainCLI, words, allowed, stop)


@contextlib.contextmanager
def _errors_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, RunStoppedError):
            code, sentence = error.exit_code, str(error)
        elif is_out_of_memory(error):
            code, sentence = OUT_OF_MEMORY, out_of_memory(error)
        elif is_lost_process(error):
            code, sentence = LOST_PROCESS, lost_process(error)
        elif (unreadable := unreadable_checkpoint(error)) is not None:
            code, sentence = 2, f"error: {unreadable}"
        elif is_user_mistake(error) or is_failing_disk(error):
            code, sentence = 2, f"error: {one_sentence(error)}"
        else:
            raise
        sys.stderr.write(f"attnzoo-pretrain: {sentence}\n")
        raise SystemExit(code) from None


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def find_configs(words: list[str]) -> list[str]:
    """Replace the name of each `--config` that is not a file by the path of the packaged config of that name.

    Raises:
        ValueError: if there is neither.
    """
    replaced, is_config = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if is_config:
            word = config_path(word)
        elif equals and name in ("--config", "-c"):
            word = f"{name}={config_path(value)}"
        is_config = word in ("--config", "-c")
        replaced.append(word)
    return replaced


def config_path(name: str) -> str:
    """The file itself if it exists, otherwise the packaged config of that name, with or without the prefix configs/."""
    with contextlib.suppress(OSError):  # of names that no file can have
        if name.lstrip().startswith("{"):
            return name
        if "\0" not in name and Path(name).is_file():
            _check_settings(Path(name))
            return name
    relative = name.removeprefix("configs/")
    for folder in CONFIG_FOLDERS:
        with contextlib.suppress(OSError, ValueError):
            if ".." not in Path(relative).parts and (folder / relative).is_file():
                return str(folder / relative)
    packaged = sorted({str(path.relative_to(folder)) for folder in CONFIG_FOLDERS for path in folder.rglob("*.yaml")})
    raise ValueError(f"config {name!r:.200} is neither a file nor one of {', '.join(packaged)}")


def _check_settings(path: Path) -> None:
    """Raise ValueError for a config without a line that is neither blank nor a comment."""
    with path.open("rb") as file:
        if all(not line.strip() or line.lstrip().startswith(b"#") for line in file):
            raise ValueError(f"config {str(path)!r:.200} must hold settings, got an empty file")


def default_precision(accelerator: str) -> str:
    """bf16-mixed for a run on a GPU with bfloat16, otherwise 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a trainer that Lightning takes, and with which a run would break later."""
    for name in ("accumulate_grad_batches", "log_every_n_steps", "val_check_interval"):
        value = trainer[name]
        if isinstance(value, int) and value < 1:
            raise ValueError(f"trainer.{name} must be at least 1, got {value}")
    if (trainer["gradient_clip_val"] or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_val must not be negative, got {trainer['gradient_clip_val']}")
    root = Path(trainer["default_root_dir"] or "runs").absolute()
    nearest = next(place for place in (root, *root.parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"trainer.default_root_dir must be a folder, got {str(root)!r}, but {str(nearest)!r} is none")


def check_end(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for settings of a trainer that do not say where training ends: its data have no end."""
    if trainer["fast_dev_run"]:
        return
    check_endless(trainer["limit_train_batches"], trainer["overfit_batches"])
    if trainer["max_epochs"] == 0:
        raise ValueError("trainer.max_epochs must be left out, since the training data have no epochs, got 0")
    if trainer["max_steps"] < 1:
        raise ValueError(
            "trainer.max_steps must be given and be at least 1, since the training data have no end and the learning "
            f"rate's cosine ends there, got {trainer['max_steps']}"
        )


def check_ckpt_path(path: str | None) -> None:
    """Raise ValueError for a word in place of a path, of which Lightning would make another start or none."""
    if path is not None and (str(path) in ("best", "last", "hpc") or str(path).startswith("registry")):
        raise ValueError(
            f"ckpt_path must be a checkpoint, or the folder of a run for its newest valid one, got {str(path)!r}"
        )


@rank_zero_only
def _warn_of_random_weights() -> None:
    sys.stderr.write(
        "attnzoo-pretrain: warning: the figures are those of random weights, since neither --ckpt_path nor "
        "--model.init_from is given\n"
    )


def is_user_mistake(error: Exception) -> bool:
    """Whether an exception is meant for the user: a parser's, or a ValueError or OSError of who checks settings."""
    if isinstance(error, ArgumentError | MisconfigurationException | BackendUnavailable):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_by = frames[-1].f_globals.get("__name__", "") if frames else ""
    if not raised_by.startswith("attnzoo") and any(_builds(frame) for frame in frames):
        return True  # such as a value that Lightning or torch refuses in a way of its own
    if raised_by == "torch.cuda" and isinstance(error, AssertionError | RuntimeError):
        return True  # there is no GPU, or torch is built without
    checks = ("attnzoo", "attnzoo_recipes", "jsonargparse", "lightning")
    return isinstance(error, ValueError | OSError) and raised_by.split(".")[0] in checks


def _builds(frame: FrameType) -> bool:
    """Whether a frame makes a trainer or an optimiser from the settings, and does nothing else."""
    return frame.f_code in (PretrainCLI.instantiate_trainer.__code__, Pretraining.configure_optimizers.__code__)


def unreadable_checkpoint(error: Exception) -> str | None:
    """What is wrong with a checkpoint if Lightning failed while it restored one that lacks what it looks for."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        is_restoring = frame.f_code.co_name in ("resume_start", "restore_model", "restore_training_state")
        if is_restoring and frame.f_globals.get("__name__", "").endswith("checkpoint_connector"):
            path = frame.f_locals["self"].trainer.ckpt_path
            reason = one_sentence(error)
            if str(path) in reason:
                return reason
            reason = reason if is_user_mistake(error) else f"{type(error).__name__}: {reason}"
            return f"checkpoint {path} cannot be continued: {reason}"
    return None


def _listed(value: Any) -> list[Any]:
    """A trainer argument, which may be absent, a single value or a list, as a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
