"""attnzoo-pretrain: fit, validate or test a decoder language model from YAML and the command line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from attnzoo import BackendUnavailable
from attnzoo_recipes.allowlist import ALLOWED, check_arguments, enforce
from attnzoo_recipes.callbacks.progress import Checkpoints, LossCurve, Samples, StepProgress, Throughput
from attnzoo_recipes.callbacks.resilience import GracefulStop, LossGuard, RandomStates, RunStoppedError
from attnzoo_recipes.callbacks.summary import Report
from attnzoo_recipes.checkpointing import AtomicCheckpointIO
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.training import Pretraining

CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")
"""Where named configs lie: in an installed wheel, and in the repository."""

_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # a block is a slice of a memory map, which no worker would make faster
    ".*LeafSpec.*is deprecated.*",  # Lightning's own use of a class that torch is about to remove
)


class PretrainCLI(LightningCLI):
    """LightningCLI with this recipe's loggers, callbacks, checkpoint writer and precision."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Fit, validate and test."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; without the base's warning about a command line beside `args`, which main has made from it."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's settings replace none here: `Pretraining.on_load_checkpoint` compares them instead."""

    def before_instantiate_classes(self) -> None:
        """Choose the precision where the user did not: bf16 on a GPU that has it."""
        trainer = self.config[self.subcommand]["trainer"]
        if trainer["precision"] is None:
            trainer["precision"] = default_precision(trainer["accelerator"])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the callbacks that every run has."""
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(LossGuard, "loss_guard")
        parser.add_lightning_class_args(Samples, "samples")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, which always logs to CSV and writes checkpoints in one piece."""
        trainer = self._get(self.config_init, "trainer")
        csv = CSVLogger(trainer["default_root_dir"] or "runs", name="")
        always = [RandomStates(), Throughput(), LossCurve(), Report(), GracefulStop()]
        if trainer["enable_progress_bar"] is not False:
            always.append(StepProgress(refresh_rate=10))
        return super().instantiate_trainer(
            logger=[csv, *_listed(trainer["logger"])],
            plugins=[AtomicCheckpointIO(), *_listed(trainer["plugins"])],
            callbacks=[*always, *_listed(trainer["callbacks"])],
            **kwargs,
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    words, allowed = take_allowed_imports(list(sys.argv[1:] if args is None else args))
    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    try:
        words = find_configs(words)
        check_arguments(words, allowed)
        enforce(allowed)
        strict: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        PretrainCLI(
            Pretraining,
            TextDataModule,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**strict, **dict.fromkeys(PretrainCLI.subcommands(), strict)},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=words,
        )
    except RunStoppedError as stop:
        sys.stderr.write(f"attnzoo-pretrain: {stop}\n")
        raise SystemExit(stop.exit_code) from None
    except Exception as error:
        if not is_user_mistake(error):
            raise
        sys.stderr.write(f"attnzoo-pretrain: error: {one_sentence(error)}\n")
        raise SystemExit(2) from None


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


def take_allowed_imports(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split `--allow-import PREFIX` (repeatable) off a command line; returns the rest and the whole allow-list."""
    rest, allowed = [], list(ALLOWED)
    pending = iter(words)
    for word in pending:
        name, equals, value = word.partition("=")
        if name == "--allow-import":
            allowed.append(value if equals else next(pending, ""))
        else:
            rest.append(word)
    return rest, tuple(prefix for prefix in allowed if prefix)


def find_configs(words: list[str]) -> list[str]:
    """Replace the name of each `--config` that is no file by the path of the packaged config of that name.

    Raises:
        ValueError: if there is neither.
    """
    found, is_config = [], False
    for word in words:
        name, equals, value = word.partition("=")
        if is_config:
            word = config_path(word)
        elif equals and name in ("--config", "-c"):
            word = f"{name}={config_path(value)}"
        is_config = word in ("--config", "-c")
        found.append(word)
    return found


def config_path(name: str) -> str:
    """The file itself if it exists, else the packaged config of that name (with or without configs/ before it)."""
    if Path(name).is_file() or name.lstrip().startswith("{"):
        return name
    relative = name.removeprefix("configs/")
    for folder in CONFIG_FOLDERS:
        if ".." not in Path(relative).parts and (folder / relative).is_file():
            return str(folder / relative)
    packaged = sorted({str(path.relative_to(folder)) for folder in CONFIG_FOLDERS for path in folder.rglob("*.yaml")})
    raise ValueError(f"config {name!r} is neither a file nor one of {', '.join(packaged)}")


def default_precision(accelerator: str) -> str:
    """bf16-mixed where the run is on a GPU with bfloat16, else 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def is_user_mistake(error: Exception) -> bool:
    """Whether this is a refusal meant for the user: a parser's, Lightning's, or a ValueError that our code raised."""
    if isinstance(error, ArgumentError | MisconfigurationException | BackendUnavailable):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_by = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError | OSError) and raised_by.split(".")[0] in ("attnzoo", "attnzoo_recipes")


def one_sentence(error: Exception) -> str:
    """The message on one line."""
    return " ".join(str(error).split())


def _listed(value: Any) -> list[Any]:
    """A trainer argument that may be absent, single or a list, as a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


if __name__ == "__main__":
    main()
