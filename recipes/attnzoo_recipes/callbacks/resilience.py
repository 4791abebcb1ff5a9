"""Callbacks for runs that are interrupted, and for steps that go wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from attnzoo_recipes.checkpointing import newest_valid
from attnzoo_recipes.files import training_goes_on, write_atomically
from attnzoo_recipes.random_states import random_states, set_random_states
from attnzoo_recipes.sharding import gradient_norm
from attnzoo_recipes.signals import EXIT_CODES, Stop
from attnzoo_recipes.trainer import ends_step

NOT_FINITE = 3
"""Exit code of a run whose loss is no longer finite."""

NOT_SAVED = 4
"""Exit code of a run whose last checkpoint could not be saved."""

_SEED = "PL_GLOBAL_SEED"  # where Lightning keeps the seed


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
    from the saved states, so that at least it is reproducible. Validation, and what other callbacks do at its end, does
    not advance the states of training: they are restored after it, since a resumed run does not repeat it. Another
    seed (Lightning's `seed_everything`) than that of the checkpoint has no effect, which a warning says. Exact
    resuming also needs batches that are a function of their number, like those of `data.module.TextDataModule`.

    A new run of several processes begins with the same seed in all. Those with tokens of their own draw their own
    numbers from the first batch on, so that dropout is independent.
    """

    def __init__(self) -> None:
        self._begun = False
        self._loaded: dict[str, Any] | None = None
        self._after_batch: dict[str, Any] | None = None
        self._validating = False
        self._seed: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """{"ranks": states of each process, "seed": what they began with}. All processes must call it."""
        own = self._after_batch if self._validating and self._after_batch is not None else random_states()
        states = [own]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            states = [own] * dist.get_world_size()
            dist.all_gather_object(states, own)
        return {"ranks": states, "seed": self._seed or os.environ.get(_SEED)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first step, since setting up draws random numbers."""
        self._loaded = state_dict
        self._seed = state_dict.get("seed")  # which checkpoints before 0.2 do not say

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Restore the loaded states, or those from before a validation.

        Earlier, Lightning would still set up the validation that it skips, and other callbacks would draw after it.
        """
        if self._validating and self._after_batch is not None:
            set_random_states(self._after_batch)
        self._validating = False
        if self._begun:
            return
        self._begun = True
        # Processes that share heads drop the same activations: all draw as the first of them.
        own = trainer.global_rank - trainer.global_rank % getattr(trainer.strategy, "tensor_parallel_size", 1)
        if self._loaded is None:
            if own:
                _seed_process(random_states(), own, trainer.world_size)
            return
        ranks, self._loaded = self._loaded["ranks"], None
        if self._seed is not None and os.environ.get(_SEED, self._seed) != self._seed:
            rank_zero_warn(
                f"seed_everything {os.environ[_SEED]} has no effect: the run continues the random numbers of its "
                f"checkpoint, whose seed was {self._seed}."
            )
        if len(ranks) == trainer.world_size:
            set_random_states(ranks[own])
            return
        rank_zero_warn(
            f"The checkpoint holds the random states of {len(ranks)} processes, but {trainer.world_size} are running: "
            "they are seeded from those, and draw other numbers than the checkpoint's run would have drawn."
        )
        _seed_process(ranks[0], own, trainer.world_size)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run of the same trainer."""
        self._after_batch, self._validating, self._begun = None, False, False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Remember the states of training, in case validation follows."""
        self._after_batch = random_states()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Until the next batch, checkpoints save the states with which training continues."""
        self._validating = True


def _seed_process(states: dict[str, Any], own: int, processes: int) -> None:
    """Seed this process from the random states of another one and its own place."""
    material = states["torch"].numpy().tobytes() + f"{own} of {processes}".encode()
    seed = int.from_bytes(hashlib.sha256(material).digest()[:4], "little")
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


class LossGuard(L.Callback):
    """Skips an optimiser step whose loss or gradient norm is not finite, and stops after too many in a row.

    The gradients are dropped before the optimiser sees them, so that weights and optimiser state do not change; the
    step is counted, also for the learning rate. All processes skip the same steps. With gradient accumulation one bad
    batch drops the whole step. Infinite gradients of a finite loss are left to float16's gradient scaler, if there is
    one, and do not count.

    A loss of validation or testing that is not finite stops the run at once, with exit code 3.

    Every skipped step writes nonfinite-step=N-rank=R.json into the run's folder: the batches (their "index", if they
    have one), their losses, and, where the decision was waited for, statistics of each parameter's gradient.

    Args:
        patience: number of consecutive skipped steps that stops the run, with exit code 3.
        enabled: whether to guard at all.
        wait: whether to wait for the device in each step. Without, the device skips the step by itself, and the report
            and the end of the run come one step later; for the fused AdamW, without float16's gradient scaler. Default:
            no waiting where that is possible on a GPU.

    Raises:
        ValueError: if patience is less than 1.
        RunStoppedError: in training.
    """

    def __init__(self, *, patience: int = 10, enabled: bool = True, wait: bool | None = None) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.enabled = enabled
        self.wait = wait
        self.in_a_row = 0
        self._folder = Path()
        self._batches: list[dict[str, Any]] = []
        self._undecided: tuple[int, list[dict[str, Any]], Tensor, Any] | None = None

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
        """Skip the step if its gradients or losses are not finite."""
        batches, self._batches = self._batches, []
        if not self.enabled:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = gradient_norm(gradients)
        losses = torch.stack([batch["loss"].to(norm) for batch in batches if "loss" in batch] or [norm.new_zeros(())])
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        sound = losses.isfinite().all() & (norm.isfinite() | scaled)
        by_itself = not scaled and isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults.get("fused"))
        by_itself = by_itself and not any(isinstance(gradient, DTensor) for gradient in gradients)  # cannot take a flag
        if by_itself and not (norm.is_cuda if self.wait is None else not self.wait):
            by_itself = False
            optimizer.found_inf = None  # type: ignore[attr-defined]
        if by_itself:
            self._decide(trainer, pl_module)
            skipped = (~sound).float()
            if trainer.world_size > 1:
                dist.all_reduce(skipped, dist.ReduceOp.MAX)
            optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what a gradient scaler would tell it
            self._undecided = trainer.global_step, batches, norm, _to_host(skipped)
        elif trainer.strategy.reduce_boolean_decision(not sound.item(), all=False):
            report = self._report(trainer, pl_module, batches, norm)
            for parameter in parameters:
                parameter.grad = None
            self._skipped(trainer.global_step, report)
        else:
            self.in_a_row = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the last step too."""
        self._decide(trainer, pl_module)

    def _decide(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Report the previous step if the device has skipped it; by now it has decided."""
        if self._undecided is None:
            return
        (step, batches, norm, read), self._undecided = self._undecided, None
        if read():
            self._skipped(step, self._report(trainer, module, batches, norm, step))
        else:
            self.in_a_row = 0

    def _skipped(self, step: int, report: Path) -> None:
        """Warn about a step, or stop the run."""
        self.in_a_row += 1
        rank_zero_warn(
            f"Step {step} is skipped: its loss or gradient is not finite "
            f"({self.in_a_row} in a row, {self.patience} stop the run); see {report}."
        )
        if self.in_a_row >= self.patience:
            raise RunStoppedError(
                f"the loss or its gradient was not finite in {self.patience} steps in a row; no weight has changed "
                f"since step {step + 1 - self.patience}, and {report} says what the last step had",
                NOT_FINITE,
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if the validation loss is not finite."""
        if self.enabled:
            _stop_unless_finite(trainer, "val_loss")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if the test loss is not finite."""
        if self.enabled:
            _stop_unless_finite(trainer, "test_loss")

    def _report(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        batches: list[dict[str, Any]],
        norm: Tensor,
        earlier: int | None = None,
    ) -> Path:
        """Write the file of a step; the gradients of an earlier one are gone."""
        step = trainer.global_step if earlier is None else earlier
        path = self._folder / f"nonfinite-step={step}-rank={trainer.global_rank}.json"
        content = {
            "step": step,
            "rank": trainer.global_rank,
            "in_a_row": self.in_a_row + 1,
            "batches": [{name: _plain(value) for name, value in batch.items()} for batch in batches],
            "gradient_norm": _plain(norm),
            "gradients": {
                name: _statistics(parameter.grad)
                for name, parameter in module.named_parameters()
                if parameter.grad is not None and earlier is None
            },
        }
        with training_goes_on(path):
            write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path


def _to_host(flag: Tensor) -> Callable[[], bool]:
    """Begin to copy a flag; the function that is returned waits for it and for nothing after it."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    copy = torch.empty((), pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> bool:
        event.synchronize()
        return bool(copy)

    return read


def _stop_unless_finite(trainer: L.Trainer, name: str) -> None:
    value = float(trainer.callback_metrics.get(name, 0.0))
    if not math.isfinite(value):
        raise RunStoppedError(f"{name} is not finite after step {trainer.global_step}: it is {value}", NOT_FINITE)


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

    The checkpoint is stopped-step=N.ckpt in the folder of the trainer's checkpoints; if it cannot be saved, exit code 0
    becomes 4. With gradient accumulation, a step is one of the optimiser. Validation is interrupted, and the resumed
    run does not repeat it. A run that has ended its last step saves and reports as usual, and then stops. A second
    signal exits immediately. All processes stop after the same step, whichever of them received the signal.

    Args:
        stop: the handlers of the command that trains. Without it the callback has its own while the trainer fits; they
            replace those of Lightning, which exits with code 0 on SIGTERM.

    Raises:
        RunStoppedError: in training, after a signal.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = Stop() if stop is None else stop
        self._is_own = stop is None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the command's handlers: Lightning would put its own before them."""
        self.stop.launcher = trainer.strategy.launcher
        if not self._is_own:
            lightnings: Any = trainer._signal_connector
            lightnings.register_signal_handlers = lambda: None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal would lose what has been trained."""
        if self._is_own:
            self.stop.received = 0
        if trainer.received_sigterm:
            self.stop.received = signal.SIGTERM
            # Otherwise Lightning ends the run after this step, without a checkpoint and with exit code 0.
            trainer._signal_connector.received_sigterm = False
        self.stop.saving = True
        self.stop.install()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if this was an optimiser step."""
        if ends_step(trainer, batch_idx):
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *arguments: Any, **keywords: Any) -> None:
        """Stop here if this is a validation during training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if a signal came after the last step. Lightning has given the handlers from before back by now."""
        if self._is_own:
            self.stop.forget()
        # Processes do not wait for each other any more, so that each speaks for itself.
        number = self.stop.received
        if number:
            name = signal.Signals(number).name
            raise RunStoppedError(
                f"stopped by {name} after the last step {trainer.global_step}; the run is complete", EXIT_CODES[number]
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers if they are the callback's own."""
        if self._is_own:
            self.stop.restore()

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        number = int(self.stop.received)
        if trainer.world_size > 1:
            heard = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(heard, reduce_op="max"))
        if not number:
            return
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = Path(folder) / f"stopped-step={trainer.global_step}.ckpt"
        code, left = EXIT_CODES[number], f"resume with --ckpt_path {path}"
        try:
            trainer.save_checkpoint(path, weights_only=False)
            reason = ""
        except OSError as error:
            reason = f" ({error})"
        if not path.exists():
            newest = newest_valid(folder, recursive=False)
            left = f"no checkpoint could be saved{reason}, and the newest one is {newest or 'none'}"
            code = code or NOT_SAVED
        name = signal.Signals(number).name
        raise RunStoppedError(f"stopped by {name} after step {trainer.global_step}; {left}", code)
