"""BlockCoordinateDescent: attentive experts and their gates are trained in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import nn


class BlockCoordinateDescent(L.Callback):
    """Train experts and responsibilities of `MixtureOfAttentiveExperts` layers in turn (Peng et al. 2020).

    In a step of the experts each layer takes one expert, drawn by its gate, and the gates are fixed. In every
    every_n_steps-th step, one of the responsibilities, layers take the whole mixture and everything but the gates
    is fixed. What is fixed has no gradient, so that neither moments nor weight decay move it. Outside training
    steps layers take the mixture.

    The paper alternates epochs, about one in five for the gates; steps are a choice of this project.

    Args:
        every_n_steps: optimiser steps from one for the gates to the next.

    Raises:
        ValueError: for an argument outside its rule; when training starts, for a model without a layer of
            training_scheme "bcd".
    """

    def __init__(self, every_n_steps: int = 5) -> None:
        if every_n_steps < 2:
            raise ValueError(f"every_n_steps must be at least 2, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a model that there is nothing to alternate in."""
        if not any(True for _ in alternating(pl_module)):
            raise ValueError("BlockCoordinateDescent needs attention layers with training_scheme 'bcd', got none")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the layers into the phase of this step."""
        set_phases(pl_module, "mixture" if self.trains_gates(trainer.global_step) else "expert")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Drop the gradients of what is fixed."""
        gates = {id(parameter) for layer in alternating(pl_module) for parameter in layer.gate_parameters()}
        for parameter in pl_module.parameters():
            if (id(parameter) in gates) != self.trains_gates(trainer.global_step):
                parameter.grad = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take the mixture until the next step."""
        set_phases(pl_module, "mixture")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the mixture."""
        set_phases(pl_module, "mixture")

    def trains_gates(self, step: int) -> bool:
        """Whether the optimiser step of that number is one of the responsibilities."""
        return step % self.every_n_steps == self.every_n_steps - 1


def alternating(model: nn.Module) -> Iterator[Any]:
    """Layers that are trained in turn with their gates."""
    return (module for module in model.modules() if getattr(module, "training_scheme", None) == "bcd")


def set_phases(model: nn.Module, phase: str) -> None:
    """Put all those layers into a phase."""
    for layer in alternating(model):
        layer.set_phase(phase)
