"""What a run shows and writes: progress, checkpoints, tokens per second, the loss curve, and samples."""

from __future__ import annotations

import datetime
import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from attnzoo.costs import DEVICES
from attnzoo.diagnostics.plots import to_bytes
from attnzoo_recipes.callbacks.resilience import NOT_SAVED, RunStoppedError
from attnzoo_recipes.data.module import TextDataModule, data_place
from attnzoo_recipes.files import Appender, free_space, training_goes_on, write_atomically
from attnzoo_recipes.sampling import check_sampling, continue_text
from attnzoo_recipes.sharding import whole_sequences
from attnzoo_recipes.trainer import ends_step, is_dry_run, is_sharded, log_is_due, run_folder, text_data

_KEPT = ("current_score", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score")


class StepProgress(TQDMProgressBar):
    """A progress bar over the optimiser steps of the run, since the training data have no end."""

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else math.inf

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Make the bar; a run that continues begins where its checkpoint was."""
        super().on_train_start()
        self._begin(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the bar; Lightning leaves this out where a run continues."""
        super().on_train_epoch_start(trainer)
        self._begin(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar at the end of a step."""
        if ends_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _begin(self, trainer: L.Trainer) -> None:
        bar = self.train_progress_bar
        bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        bar.n = bar.initial = trainer.global_step
        bar.set_description("training")

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics, without the version number of the logger."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class ProgressLines(L.Callback):
    """A line on stderr for every entry of the log, for files and schedulers in which a bar would be noise."""

    def __init__(self) -> None:
        self._began = 0.0
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._began, self._first = time.perf_counter(), trainer.global_step

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print step, loss, learning rate, speed and the time left."""
        step, last = trainer.global_step, trainer.max_steps
        if not log_is_due(trainer, batch_idx, step) and step != last:
            return
        seconds = (time.perf_counter() - self._began) / max(1, step - self._first)
        words = [f"step {step}/{last}" if last > 0 else f"step {step}"]
        for name, form in (("train_loss", ".4f"), ("lr", ".3g"), ("tokens_per_second", ",.0f"), ("mfu", ".1%")):
            if name in trainer.callback_metrics:
                words.append(f"{name} {float(trainer.callback_metrics[name]):{form}}")
        if last > 0:
            words.append(f"left {datetime.timedelta(seconds=round(seconds * (last - step)))}")
        sys.stderr.write("  ".join(words) + "\n")
        sys.stderr.flush()

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the bits per byte of every validation set."""
        named = {name: value for name, value in trainer.callback_metrics.items() if name.endswith("_bits_per_byte")}
        if named and trainer.state.fn == "fit":
            words = [f"{name} {float(value):.4f}" for name, value in named.items()]
            sys.stderr.write("  ".join([f"validation after step {trainer.global_step}", *words]) + "\n")
            sys.stderr.flush()


class Checkpoints(ModelCheckpoint):
    """Save at regular intervals and at the end, and keep the newest checkpoints.

    A save that fails is none: it does not count towards `keep`, and removes nothing.

    Args:
        every_n_train_steps: optimiser steps between two checkpoints.
        keep: number of checkpoints to keep.

    Raises:
        ValueError: for an argument less than 1.
        RunStoppedError: in training, with exit code 4, if the last save fails or too many in a row do.
    """

    def __init__(self, every_n_train_steps: int = 250, keep: int = 2) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("keep", keep)):
            if value < 1:
                raise ValueError(f"checkpoints.{name} must be at least 1, got {value}")
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: a resumed run has its own folder, and does not touch the checkpoints of the previous run."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step if it has not been saved."""
        if is_dry_run(trainer):
            return
        if trainer.global_step != self._last_global_step_saved and trainer.global_step > 0:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            if trainer.global_step != self._last_global_step_saved:
                newest = self.best_model_path or "none"
                raise RunStoppedError(
                    f"the checkpoint of the last step, {trainer.global_step}, could not be saved in {self.dirpath} "
                    f"({free_space(Path(self.dirpath or '.') / 'any')}); the newest one is {newest}",
                    NOT_SAVED,
                )
        super().on_train_end(trainer, pl_module)

    def _update_best_and_save(self, current: Tensor, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = {name: getattr(self, name) for name in _KEPT} | {"best_k_models": dict(self.best_k_models)}
        super()._update_best_and_save(current, trainer, monitor_candidates)
        if trainer.global_step != self._last_global_step_saved:
            for name, value in before.items():
                setattr(self, name, value)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Save the metrics, then the checkpoint; a step that could not be saved is not noted as saved."""
        for logger in trainer.loggers:
            logger.save()
        noted = self._last_global_step_saved, self._last_checkpoint_saved
        try:
            super()._save_checkpoint(trainer, filepath)
        except OSError as error:
            raise RunStoppedError(f"{error}; too many checkpoints in a row could not be saved", NOT_SAVED) from error
        if not self.file_exists(filepath, trainer):
            self._last_global_step_saved, self._last_checkpoint_saved = noted

    def _should_remove_checkpoint(self, trainer: L.Trainer, previous: str, current: str) -> bool:
        saved = trainer.global_step == self._last_global_step_saved
        return saved and super()._should_remove_checkpoint(trainer, previous, current)


class Throughput(L.Callback):
    """Log tokens_per_second over all devices, including the time for data and checkpoints but not for validation.

    Of a mixture also tokens_NAME, the tokens of each source since the beginning of the run. On a GPU that
    `attnzoo.costs.DEVICES` knows, also mfu: training FLOPs per second over the peak of all devices.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._mark = 0.0
        self._validation_began = 0.0
        self._pending = 0
        self._flops_per_token = 0.0
        self._peak: float | None = None

    @property
    def average(self) -> float:
        """Tokens per second so far, in this process."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._peak = peak_flops(pl_module.device, str(trainer.precision))
        tokens = text_data(trainer).block_size if self._peak else 1
        self._flops_per_token = 3 * pl_module.whole_model().flops(tokens) / tokens if self._peak else 0.0
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every log_every_n_steps, log the rate since the previous entry."""
        self._pending += batch["tokens"].numel() * data_place(trainer)[1]
        if not log_is_due(trainer, batch_idx, trainer.global_step):
            return
        rate = self._count(pl_module.device)
        pl_module.log("tokens_per_second", rate, prog_bar=True)
        pl_module.log_dict({f"tokens_{name}": float(n) for name, n in text_data(trainer).tokens_drawn.items()})
        if self._peak is not None:
            pl_module.log("mfu", rate * self._flops_per_token / (self._peak * trainer.world_size), prog_bar=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps after the last entry of the log, which may be all."""
        if self._pending:
            self._count(pl_module.device)

    def _count(self, device: torch.device) -> float:
        """Add the pending tokens and their time; returns their rate."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        seconds, tokens = now - self._mark, self._pending
        self.seconds += seconds
        self.tokens += tokens
        self._mark, self._pending = now, 0
        return tokens / seconds

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue the clock."""
        self._mark += time.perf_counter() - self._validation_began


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in that precision of a trainer; None if the cost model does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    dtype = torch.bfloat16 if "16" in precision else torch.float32
    # Other forms of the same chips are slower.
    known = [
        known for chip, known in DEVICES.items() if chip in name.split() and not {"PCIe", "NVL"} & set(name.split())
    ]
    return known[0].flops.get(dtype) if known else None


class LossCurve(L.Callback):
    """Draw training and validation loss into loss_curve in the run's folder, at each validation and at the end.

    Both are in bits per byte; for training losses, by the mean number of bytes of a training token. The points are
    saved in checkpoints, so that a resumed run draws the whole curve.

    Args:
        kind: of the file: png, pdf or svg.
    """

    def __init__(self, kind: str = "png") -> None:
        self.kind = kind
        self.file = f"loss_curve.{kind}"
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"train": self.train, "val_bits_per_byte": self.val}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of a checkpoint."""
        # Before 0.2 the second were nats per token, under another name.
        self.train, self.val = state_dict["train"], state_dict.get("val_bits_per_byte", [])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the training loss every log_every_n_steps."""
        if log_is_due(trainer, batch_idx, trainer.global_step) and "train_loss" in trainer.callback_metrics:
            self.train.append([trainer.global_step, float(trainer.callback_metrics["train_loss"])])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the validation loss, and draw."""
        if "val_bits_per_byte" in trainer.callback_metrics and trainer.state.fn == "fit":
            self.val.append([trainer.global_step, float(trainer.callback_metrics["val_bits_per_byte"])])
            self._draw(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the whole curve."""
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if not is_dry_run(trainer):
            self.draw(run_folder(trainer) / self.file, bytes_per_token(text_data(trainer)))

    @rank_zero_only
    def draw(self, path: Path, length: float) -> None:
        """Write the picture, in one piece; `length` is the mean number of bytes of a token."""
        from matplotlib.figure import Figure

        if not self.train:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        steps, nats = zip(*self.train, strict=True)
        axes.plot(steps, [value / length / math.log(2) for value in nats], linewidth=1, label="training batch")
        if self.val:
            axes.plot(*zip(*self.val, strict=True), marker="o", markersize=4, label="validation")
        axes.set(xlabel="optimiser step", ylabel="cross-entropy (bits per byte)", title="Learning curve")
        axes.grid(alpha=0.3)
        axes.legend()
        with training_goes_on(path):
            write_atomically(path, to_bytes(figure, self.kind, dpi=150))


def bytes_per_token(data: TextDataModule) -> float:
    """Mean number of bytes of the first million training tokens."""
    tokens = torch.from_numpy(data.packed.tokens("train")[:1_000_000].astype("int64"))
    return max(float(data.token_bytes[tokens].double().mean()), 1e-9)


class Samples(L.Callback):
    """Append a text written by the model to samples.txt in the run's folder, at each validation with a finite loss.

    Args:
        prompt: the text to continue.
        max_new_tokens: length of the continuation.
        temperature: divides the logits.

    Raises:
        ValueError: for an argument outside its rule.
    """

    def __init__(self, prompt: str = "def ", max_new_tokens: int = 200, temperature: float = 0.8) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"samples.max_new_tokens must be at least 1, got {max_new_tokens}")
        check_sampling(temperature, None, None)
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self._file = Appender()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write one sample; sampling has its own random state, and needs all processes that hold parameters."""
        if trainer.state.fn != "fit" or is_dry_run(trainer) or not (trainer.is_global_zero or is_sharded(trainer)):
            return
        if not math.isfinite(trainer.callback_metrics.get("val_loss", 0.0)):
            return
        with whole_sequences(pl_module.model):
            text = continue_text(
                pl_module.model,
                text_data(trainer).tokenizer,
                self.prompt,
                self.max_new_tokens,
                temperature=self.temperature,
            )
        if not trainer.is_global_zero:
            return
        text = f"--- step {trainer.global_step}\n{self.prompt}{text}\n"
        self._file.append(run_folder(trainer) / "samples.txt", text)
