"""Callbacks for runs that are interrupted, and for steps that go wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from attnzoo_recipes.files import write_atomically

NOT_FINITE = 3
"""Exit code of a run whose loss is no longer finite."""

_EXIT_CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}
_SAME_SIGNAL = 0.5  # seconds: timeout(1) and others signal a process and then its group, so it comes twice


class RunStoppedError(Exception):
    """The run ends deliberately; the message is one sentence.

    Args:
        message: what happened, and how to continue.
        exit_code: of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RandomStates(L.Callback):
    """Saves the random states of Python, NumPy, torch and the current CUDA device, and restores them on resuming.

    A checkpoint has those of every process. A run that resumes with another number of processes warns, and seeds them
    from the saved states, so that at least it is reproducible. Validation does not advance the states of training:
    they are restored after it, since a resumed run does not repeat it. Exact resuming also needs batches that are a
    function of their number, like those of `data.module.TextDataModule`.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._after_batch: dict[str, Any] | None = None
        self._validating = False

    def state_dict(self) -> dict[str, Any]:
        """{"ranks": states of each process}, as tensors and plain values. All processes must call it."""
        own = self._after_batch if self._validating and self._after_batch is not None else random_states()
        states = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            states = [own] * dist.get_world_size()
            dist.all_gather_object(states, own)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first step, since setting up draws random numbers."""
        self._loaded = state_dict

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Restore the loaded states; earlier, Lightning would still set up the validation that it skips."""
        if self._loaded is None:
            return
        ranks, self._loaded = self._loaded["ranks"], None
        if len(ranks) == trainer.world_size:
            set_random_states(ranks[trainer.global_rank])
            return
        rank_zero_warn(
            f"The checkpoint holds the random states of {len(ranks)} processes, but {trainer.world_size} are running: "
            "they are seeded from those, and draw other numbers than the checkpoint's run would have drawn."
        )
        material = ranks[0]["torch"].numpy().tobytes() + f"{trainer.global_rank} of {trainer.world_size}".encode()
        seed = int.from_bytes(hashlib.sha256(material).digest()[:4], "little")
        random.seed(seed)
        torch.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run of the same trainer."""
        self._after_batch, self._validating = None, False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Remember the states of training, in case validation follows."""
        self._after_batch = random_states()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on, checkpoints save the states with which training continues."""
        self._validating = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the states from before validation."""
        self._validating = False
        if self._after_batch is not None and not trainer.sanity_checking:
            set_random_states(self._after_batch)


def random_states() -> dict[str, Any]:
    """The states of this process's default generators, as tensors and plain values; NumPy's if it is imported."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [version, torch.tensor(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": None,
    }
    if "numpy" in sys.modules:
        kind, key, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [str(kind), torch.tensor(key.tolist()), int(position), int(has_gauss), float(cached)]
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; states that this process does not have are skipped."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if states["numpy"] is not None and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        kind, key, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(key.tolist(), dtype=numpy.uint32), *rest))


class LossGuard(L.Callback):
    """Skips an optimiser step whose loss or gradient norm is not finite, and stops after too many in a row.

    The gradients are dropped before the optimiser sees them, so that weights and optimiser state do not change; the
    step is counted, also for the learning rate. All processes skip the same steps. With gradient accumulation one bad
    batch drops the whole step. Infinite gradients of a finite loss are left to float16's gradient scaler, if there is
    one, and do not count.

    Every skipped step writes nonfinite-step=N-rank=R.json into the run's folder: the batches (their "index", if they
    have one), their losses, and statistics of each parameter's gradient. The decision synchronises with the device
    once per step.

    Args:
        patience: number of consecutive skipped steps that stops the run, with exit code 3.

    Raises:
        ValueError: if patience is less than 1.
        RunStoppedError: in training.
    """

    def __init__(self, *, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.in_a_row = 0
        self._folder = Path()
        self._batches: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the run's folder."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which batch this is."""
        index = batch.get("index") if isinstance(batch, Mapping) else None
        self._batches.append({"batch_idx": batch_idx, "index": index})

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the loss, without synchronising."""
        self._batches[-1]["loss"] = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop the gradients if they or their losses are not finite."""
        batches, self._batches = self._batches, []
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        losses = torch.stack([batch["loss"].to(norm) for batch in batches if "loss" in batch] or [norm.new_zeros(())])
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        sound = losses.isfinite().all() & (norm.isfinite() | scaled)
        if not trainer.strategy.reduce_boolean_decision(not sound.item(), all=False):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        report = self._report(trainer, pl_module, batches, norm)
        for parameter in parameters:
            parameter.grad = None
        rank_zero_warn(
            f"Step {trainer.global_step} is skipped: its loss or gradient is not finite "
            f"({self.in_a_row} in a row, {self.patience} stop the run); see {report}."
        )
        if self.in_a_row >= self.patience:
            raise RunStoppedError(
                f"the loss or its gradient was not finite in {self.patience} steps in a row; no weight has changed "
                f"since step {trainer.global_step + 1 - self.patience}, and {report} says what the last step had",
                NOT_FINITE,
            )

    def _report(
        self, trainer: L.Trainer, module: L.LightningModule, batches: list[dict[str, Any]], norm: Tensor
    ) -> Path:
        path = self._folder / f"nonfinite-step={trainer.global_step}-rank={trainer.global_rank}.json"
        content = {
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "in_a_row": self.in_a_row,
            "batches": [{name: _plain(value) for name, value in batch.items()} for batch in batches],
            "gradient_norm": _plain(norm),
            "gradients": {
                name: _statistics(parameter.grad)
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            },
        }
        write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path


def _statistics(gradient: Tensor) -> dict[str, Any]:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    finite = local.isfinite()
    largest = torch.where(finite, local.abs(), 0).max() if local.numel() else local.new_zeros(())
    return {"elements": local.numel(), "not_finite": int((~finite).sum()), "largest_finite": float(largest)}


def _plain(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    value = value.tolist() if isinstance(value, Tensor) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class GracefulStop(L.Callback):
    """On SIGTERM, SIGINT or SIGUSR1: finish the step, save a checkpoint, and stop with exit code 143, 130 or 0.

    The checkpoint is stopped-step=N.ckpt in the folder of the trainer's checkpoints. With gradient accumulation, a
    step is one of the optimiser. Validation is interrupted, and the resumed run does not repeat it. A second signal
    exits immediately. All processes stop after the same step, whichever of them received the signal. During fitting
    these handlers replace those of Lightning, which exits with code 0 on SIGTERM.

    Raises:
        RunStoppedError: in training, after a signal.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers, which it has just installed."""
        self._trainer = trainer
        self.received = 0
        if trainer.received_sigterm:
            self.received = signal.SIGTERM
            # Otherwise Lightning ends the run after this step, without a checkpoint and with exit code 0.
            trainer._signal_connector.received_sigterm = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _EXIT_CODES}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if this was an optimiser step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *arguments: Any, **keywords: Any) -> None:
        """Stop here if this is a validation during training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the previous handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            _say(f"{name}: stopping after this step, once a checkpoint is saved; a second signal exits at once")
        elif now - self._received_at > _SAME_SIGNAL:
            _say(f"{name} again: exiting at once")
            launcher = self._trainer.strategy.launcher if self._trainer is not None else None
            if launcher is not None:
                launcher.kill(signal.SIGKILL)
            os._exit(128 + number)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        number = int(self.received)
        if trainer.world_size > 1:
            heard = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(heard, reduce_op="max"))
        if not number:
            return
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = Path(folder) / f"stopped-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        left = f"resume with --ckpt_path {path}" if path.exists() else "no checkpoint could be saved"
        name = signal.Signals(number).name
        raise RunStoppedError(f"stopped by {name} after step {trainer.global_step}; {left}", _EXIT_CODES[number])

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # A handler that was not installed from Python cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


def _say(sentence: str) -> None:
    """Write to stderr without Python's buffers, which may be locked in a signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, f"attnzoo-pretrain: {sentence}\n".encode())
