"""HeadMask: heads that are masked for a training step, so that the others learn to do without them.

"Alleviating the Inequality of Attention Heads for Neural Machine Translation" (Sun et al. 2022, arXiv:2009.09672). The
authors' code is not public; what their text leaves open is marked as a choice of this project.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from attnzoo.diagnostics.arguments import SEED
from attnzoo.diagnostics.pruning.masks import HeadSlots, head_slots
from attnzoo.rules import COUNT, SIZE, SWITCH, Rule, check, is_number, numbers_of

_SHARE: Rule = ((lambda value: is_number(value) and 0 <= value < 1, "lie in [0, 1)"),)
MODES = ("random", "important", "bernoulli")


class HeadMask(L.Callback):
    """Zero the outputs of n heads of the whole model in every training step; in eval mode nothing is masked.

        random     n heads drawn uniformly over all layers, so that a layer may lose all its heads
        important  the n heads with the largest |dL/dxi| of this batch's loss at the full model (`head_importance`,
                   granularity "batch", not normalised). Each draw takes an additional forward and backward pass, whose
                   gradients are those of the masks only.
        bernoulli  each head independently with probability p, the others times 1 / (1 - p), as in DropHead
                   (Zhou et al. 2020, arXiv:2004.13342)

    Choices of this project: one mask for the whole batch and for all micro-batches of an optimiser step ("important"
    measures each micro-batch); a mask is used for every_n_steps; importance is not normalised per layer. Masks are
    drawn from a separate generator, which is saved in checkpoints, so that a resumed run masks the same heads; all
    processes mask the same ones. In "important" mode processes average their derivatives; the additional pass leaves
    random states and buffers as they were, and what it logs is dropped.

    Args:
        num_masked: n. Default: by fraction.
        fraction: n as a share of all heads that may be masked, rounded. Default: 0.125, the paper's 18 of 144.
        mode: "random", "important" or "bernoulli".
        p: probability in bernoulli mode.
        rescale: multiply the heads that are not masked by heads / (heads - n).
        every_n_steps: optimiser steps between two draws.
        seed: of the generator.
        exclude_layers: indices of attention layers that are never masked.

    Raises:
        ValueError: for an argument outside its rule; when training starts, for an n that leaves no head, a layer
            that does not exist, a model whose attention takes no hooks, or mode "important" with accumulated gradients
            and every_n_steps above 1, where a mask would come from another micro-batch.
    """

    def __init__(
        self,
        num_masked: int | None = None,
        fraction: float | None = None,
        mode: str = "random",
        p: float | None = None,
        rescale: bool = False,
        every_n_steps: int = 1,
        seed: int = 0,
        exclude_layers: Sequence[int] = (),
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be 'random', 'important' or 'bernoulli', got {mode!r}")
        if num_masked is not None and fraction is not None:
            raise ValueError(f"num_masked and fraction exclude each other, got {num_masked} and {fraction}")
        if num_masked is not None:
            check("num_masked", num_masked, COUNT)
        if fraction is not None:
            check("fraction", fraction, _SHARE)
        check("every_n_steps", every_n_steps, SIZE)
        check("rescale", rescale, SWITCH)
        check("seed", seed, SEED)
        exclude_layers = numbers_of("exclude_layers", exclude_layers)
        if mode == "bernoulli":
            if num_masked is not None or fraction is not None or rescale:
                raise ValueError("mode 'bernoulli' takes p, and neither num_masked, fraction nor rescale")
            if not is_number(p) or not 0 <= p < 1:  # type: ignore[operator]
                raise ValueError(f"p must lie in [0, 1) in mode 'bernoulli', got {p}")
        elif p is not None:
            raise ValueError(f"p needs mode 'bernoulli', got mode {mode!r}")
        self.num_masked, self.fraction, self.mode, self.p = num_masked, fraction, mode, p
        self.rescale, self.every_n_steps, self.exclude_layers = rescale, every_n_steps, tuple(exclude_layers)
        self.mask: Tensor | None = None
        """Factors of the heads in this step (L, H), or None before the first step."""
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn_at = -1
        self._slots: HeadSlots | None = None
        self._active: list[Tensor] = []
        self._handles: list[RemovableHandle] = []

    # what is masked

    def maskable(self) -> Tensor:
        """Heads that may be masked, boolean (L, H)."""
        assert self._slots is not None
        table = self._slots.present()
        for layer in self.exclude_layers:
            if not 0 <= layer < len(table):
                raise ValueError(f"exclude_layers must lie between 0 and {len(table) - 1}, got {layer}")
            table[layer] = False
        return table

    def count(self) -> int:
        """n, checked against the model."""
        total = int(self.maskable().sum())
        if total == 0:
            raise ValueError(f"exclude_layers must leave a layer to mask, got {list(self.exclude_layers)}")
        share = 0.125 if self.fraction is None else self.fraction
        n = round(share * total) if self.num_masked is None else self.num_masked
        if n >= total:
            raise ValueError(f"num_masked must leave a head of the {total} that may be masked, got {n}")
        return n

    @property
    def _off(self) -> bool:
        return self.p == 0 if self.mode == "bernoulli" else self.count() == 0

    # Lightning

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the heads and register hooks on them, before the model is compiled: later ones would have no effect."""
        self._slots = head_slots(pl_module)
        if self._off:
            return
        if self.mode == "important" and trainer.accumulate_grad_batches > 1 and self.every_n_steps > 1:
            raise ValueError(
                "mode 'important' with accumulated gradients needs every_n_steps=1, since a mask comes from its own "
                f"micro-batch, got every_n_steps={self.every_n_steps}"
            )
        self._set(torch.ones(self._slots.shape) if self.mask is None else self.mask, pl_module)
        for index, layer in enumerate(self._slots.layers):
            if self._slots.kept[index] and index not in self.exclude_layers:
                self._handles.append(layer.hook_heads(self._hook(index, layer.module)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw this step's mask."""
        if not self._handles:
            return
        step = trainer.global_step
        new = step != self._drawn_at and (step % self.every_n_steps == 0 or self.mask is None)
        each = self.mode == "important" and trainer.accumulate_grad_batches > 1
        if new or each:
            self._drawn_at = step
            self.mask = self._draw(trainer, pl_module, batch, batch_idx)
            self._set(self.mask, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hooks."""
        self._remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, the mask, and the step that drew it."""
        return {"generator": self._generator.get_state(), "mask": self.mask, "drawn_at": self._drawn_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the masks of a checkpoint."""
        self._generator.set_state(state_dict["generator"].cpu())
        self.mask, self._drawn_at = state_dict["mask"], state_dict["drawn_at"]

    # inside

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._active = [], []

    def _hook(self, index: int, module: torch.nn.Module) -> Any:
        def scaled(heads: Tensor) -> Tensor | None:
            return heads * self._active[index].to(heads.dtype)[:, None] if module.training else None

        return scaled

    def _set(self, mask: Tensor, pl_module: L.LightningModule) -> None:
        """Put the factors where the hooks read them: one tensor per layer, which is an input of a compiled graph."""
        assert self._slots is not None
        chosen = [mask[index, list(heads)] for index, heads in enumerate(self._slots.kept)]
        self._active = [factors.to(pl_module.device, torch.float32) for factors in chosen]

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
        allowed = self.maskable()
        if self.p is not None:
            dropped = torch.rand(allowed.shape, generator=self._generator) < self.p
            scale = 1 / (1 - self.p)
            return torch.where(allowed, torch.where(dropped, 0.0, scale), 1.0)
        if self.mode == "random":
            places = allowed.nonzero()
            chosen = places[torch.randperm(len(places), generator=self._generator)[: self.count()]]
        else:
            chosen = most_important(self._importance(trainer, pl_module, batch, batch_idx), self.count(), allowed)
        return masked(chosen, allowed, rescale=self.rescale)

    def _importance(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Tensor:
        """|dL/dxi| of the batch at the full model, (L, H), the same in all processes."""
        assert self._slots is not None
        device = pl_module.device
        self._active = [torch.ones(len(heads), device=device, requires_grad=True) for heads in self._slots.kept]
        named = inspect.signature(pl_module.training_step).parameters
        call = (batch, batch_idx) if "batch_idx" in named else (batch,)
        with _unnoticed(pl_module), torch.enable_grad(), trainer.precision_plugin.train_step_context():
            output: Any = pl_module.training_step(*call)
            loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            raise ValueError(f"mode 'important' needs a loss in every training step, got None in batch {batch_idx}")
        grads = torch.autograd.grad(loss, self._active, allow_unused=True)
        table = torch.zeros(self._slots.shape, device=device)
        for index, (heads, grad) in enumerate(zip(self._slots.kept, grads, strict=True)):
            if grad is not None:
                table[index, list(heads)] = grad
        mean: Tensor = trainer.strategy.reduce(table, reduce_op="mean")
        return mean.abs().cpu()


def most_important(importance: Tensor, n: int, allowed: Tensor) -> Tensor:
    """The n allowed heads with the largest importance (L, H), descending, as (n, 2); ties by (layer, head)."""
    places = allowed.nonzero()
    order = importance[allowed].argsort(descending=True, stable=True)
    return places[order[:n]]


def masked(heads: Tensor, allowed: Tensor, *, rescale: bool = False) -> Tensor:
    """Factors (L, H): 0 for these heads (n, 2), 1 for others, or with rescale M / (M - n) for the rest of M allowed."""
    mask = torch.ones(allowed.shape)
    if rescale:
        total = int(allowed.sum())
        mask[allowed] = total / (total - len(heads))
    mask[heads[:, 0], heads[:, 1]] = 0
    return mask


@contextlib.contextmanager
def _unnoticed(pl_module: L.LightningModule) -> Iterator[None]:
    """A block that logs nothing and leaves random states and buffers as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    silenced: Any = pl_module
    silenced.log = silenced.log_dict = lambda *_, **__: None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        del silenced.log, silenced.log_dict
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
