"""How strongly the loss responds to each head: derivatives by head masks (Michel et al. 2019, arXiv:1905.10650)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import check_choice, check_mask, check_wanted
from attnzoo.diagnostics.batches import decoder_modules, tokens_and_mask
from attnzoo.diagnostics.pruning.evaluate import LossFn, check_count, evaluating, losses_of, progress_bar
from attnzoo.diagnostics.pruning.masks import (
    UNITS,
    HeadSlots,
    check_seen,
    head_slots,
    hooked,
    layer_scale,
)
from attnzoo.rules import SWITCH, check, describe

GRANULARITIES = ("example", "token", "batch")
NORMALIZATIONS = ("l2", "minmax", None)


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    granularity: str = "example",
    normalize: str | None = "l2",
    unit: str = "head",
    head_mask: Tensor | None = None,
    coupled: bool = False,
    valid: Callable[[Any], Tensor] | None = None,
    num_examples: int | None = None,
    progress: bool = True,
) -> Tensor:
    """How strongly the loss responds to a head: |xi dl/dxi| (Michel et al. 2019, section 4.1), float64 (L, H).

        example   mean_b |s_b|                              s_b = xi dl_b/dxi = sum_t <c_t, dl_b/dc_t>
        token     sum_b,t m |<c_t, dl_b/dc_t>| / sum m      as the paper's code counts
        batch     |mean_b s_b|

    A linearisation: a head may have a large derivative and a small or negative effect when it is removed. Means are
    over all examples (or tokens) together, however they are split into batches. One backward pass per batch; the first
    batch costs one more, which detects whether examples are coupled. With coupled=True one per example, except for
    "batch". The model runs in eval mode, and its mode is restored.

    Args:
        model: any model that `attention_layers` knows.
        batches: what loss_fn takes; read once.
        loss_fn: see `LossFn`; a task loss, since an objective that is smallest at the full model has no gradient there.
        granularity: where the absolute value is taken, see above.
        normalize: "l2" divides each layer by its norm, "minmax" then maps the table to [0, 1], None leaves it.
        unit: "head", or "kv_group" for |sum of s over the query heads of a group|, (L, G).
        head_mask: (L, H) mask at which to measure; masked heads get exactly 0.
        coupled: each loss depends on other examples of its batch, as in-batch contrastive losses do.
        valid: for "token", makes from a batch the boolean (B, T) tokens that count. Default: those of a mapping's
            "attention_mask" or of a pair (tensor, boolean mask (B, T)), else all.
        num_examples: use this many; fewer are an error. Default: all.
        progress: show a bar if this takes more than a few seconds and tqdm is installed.

    Raises:
        ValueError: for an unknown option, losses that are not finite or not one per example, examples that turn out
            to be coupled, too few examples, or an objective without gradient.
    """
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("unit", unit, UNITS)
    check("coupled", coupled, SWITCH)
    check("progress", progress, SWITCH)
    if valid is not None and not callable(valid):
        raise ValueError(f"valid must make a mask from a batch, got {describe(valid)}")
    if coupled and granularity == "token":
        raise ValueError("granularity 'token' needs examples that are not coupled, got coupled=True")
    slots = head_slots(model)
    of_decoder = decoder_modules(model)
    has_both = len({layer.module in of_decoder for layer in slots.layers}) > 1
    size = slots.group_size() if unit == "kv_group" else 1
    summed = torch.zeros(slots.total // size * len(slots.layers), dtype=torch.float64).view(len(slots.layers), -1)
    largest, weight = 0.0, 0.0
    measured = _Gradients(model, slots, loss_fn, head_mask, coupled, together=granularity == "batch")
    with evaluating(model), torch.enable_grad():
        for batch, s, count in measured.over(batches, num_examples, progress):
            largest = max(largest, float(s.abs().max()))
            # (B, T, L, H); of "batch" B = T = 1.
            s = s.view(*s.shape[:-1], -1, size).sum(-1)
            if granularity == "token":
                if has_both or measured.lengths > 1:
                    raise ValueError(
                        "granularity 'token' needs layers that all run over the same tokens, got one with an encoder "
                        "and a decoder"
                    )
                real = _real_tokens(batch, s.shape[:2]) if valid is None else _checked_mask(valid(batch), count)
                if tuple(real.shape) != tuple(s.shape[:2]):
                    raise ValueError(f"valid must give a mask of shape {tuple(s.shape[:2])}, got {tuple(real.shape)}")
                real = real.to("cpu", torch.float64)
                summed += (s.abs() * real[..., None, None]).sum((0, 1))
                weight += float(real.sum())
            else:
                s = s.sum(1)
                summed += s.sum(0) if granularity == "batch" else s.abs().sum(0)
                weight += count
    if not weight:
        raise ValueError("valid must mark at least one token, got none in all batches")
    measured.check_slope(largest)
    return normalize_importance(summed.abs() / weight, normalize)


def _checked_mask(real: Any, count: int) -> Tensor:
    if not isinstance(real, Tensor) or not bool(((real == 0) | (real == 1)).all()):
        raise ValueError(f"valid must give a mask (B, T) of True and False, got {describe(real)}")
    return real[:count]


def _real_tokens(batch: Any, shape: tuple[int, ...]) -> Tensor:
    """Which of the tokens (B, T) are real, by the mask that a batch holds."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if isinstance(batch, Mapping) or (pair and batch[1].dtype == torch.bool):
        mask = tokens_and_mask(batch)[1]
        # Heads may run over other tokens than a batch names, such as those of its images.
        if mask is not None and mask.shape[1] == shape[1]:
            return mask[: shape[0]]
    return torch.ones(shape)


def head_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    head_mask: Tensor | None = None,
    coupled: bool = False,
    num_examples: int | None = None,
    progress: bool = True,
) -> Tensor:
    """s = xi dl/dxi of every example and head with its sign, float64 (N, L, H); arguments as `head_importance`."""
    check("coupled", coupled, SWITCH)
    check("progress", progress, SWITCH)
    slots = head_slots(model)
    measured = _Gradients(model, slots, loss_fn, head_mask, coupled)
    with evaluating(model), torch.enable_grad():
        signed = [s.sum(1) for _, s, _ in measured.over(batches, num_examples, progress)]
    return torch.cat(signed)


class _Gradients:
    """s batch by batch, (B, T, L, H) on the CPU.

    T is 1 for coupled examples and where layers run over different tokens (`lengths` is the number of their lengths),
    and B is 1 if examples are summed.
    """

    def __init__(self, model: nn.Module, slots: HeadSlots, loss_fn: LossFn, mask: Tensor | None, coupled: bool,
                 together: bool = False) -> None:  # fmt: skip
        if mask is not None:
            check_mask("head_mask", mask, "(L, H)")
            if tuple(mask.shape) != slots.shape:
                raise ValueError(f"head_mask must have shape {slots.shape}, got {tuple(mask.shape)}")
        self.model, self.slots, self.loss_fn = model, slots, loss_fn
        self.mask, self.coupled, self.together = mask, coupled, together
        self.first: Any = None
        self.mean_loss = 0.0
        self.lengths = 1

    def over(self, batches: Iterable[Any], wanted: int | None, progress: bool) -> Iterator[tuple[Any, Tensor, int]]:
        """Batch, its s, and how many of its examples count."""
        done, unchecked = 0, True
        check_wanted(wanted)
        for number, batch in enumerate(progress_bar(batches, "head importance", progress)):
            if wanted is not None and done >= wanted:
                break
            if number == 0:
                self.first = batch
            leaves, losses = self._forward(batch, number)
            left = losses.numel() if wanted is None else min(losses.numel(), wanted - done)
            if self.coupled or self.together:
                s = self._summed(leaves, losses[:left], progress)
            else:
                unchecked = unchecked and not self._uncoupled(leaves, losses)
                s = self._by_token(leaves, losses)[:left]
            self.mean_loss = float(losses.detach().mean())
            done += left
            yield batch, s, left
        check_count(done, wanted)

    def _forward(self, batch: Any, number: int) -> tuple[list[list[Tensor]], Tensor]:
        """Losses, and per layer the factors 1 (B, T, H) of its calls, whose gradients are s by token."""
        leaves: list[list[Tensor]] = [[] for _ in self.slots.layers]

        def gated(index: int, heads: Tensor) -> Tensor:
            high = torch.promote_types(heads.dtype, torch.float32)
            leaf = torch.ones(heads.shape[:-1], dtype=high, device=heads.device, requires_grad=True)
            leaves[index].append(leaf)
            if self.mask is not None:
                heads = heads * layer_scale(self.mask, self.slots, index, heads)
            return heads * leaf[..., None].to(heads.dtype)

        with hooked(self.slots, gated) as seen:
            losses, _ = losses_of(self.loss_fn, self.model, batch, number)
        check_seen(self.slots, seen)
        if not losses.requires_grad:
            raise ValueError("loss_fn must return losses that depend on the heads, got some without a gradient")
        return leaves, losses

    def _grad(self, value: Tensor, leaves: list[list[Tensor]], *, again: bool = False) -> list[list[Tensor]]:
        flat = [leaf for calls in leaves for leaf in calls]
        grads = iter(torch.autograd.grad(value, flat, retain_graph=again, materialize_grads=True))
        return [[next(grads).double().cpu() for _ in calls] for calls in leaves]

    def _summed(self, leaves: list[list[Tensor]], losses: Tensor, progress: bool) -> Tensor:
        """(B, 1, L, H) by a backward pass for each loss, or (1, 1, L, H) by one for their sum."""
        values = [losses.sum()] if self.together else list(losses)
        table = torch.zeros(len(values), 1, *self.slots.shape, dtype=torch.float64)
        for row, value in zip(table[:, 0], progress_bar(values, "examples", progress), strict=True):
            for index, grads in enumerate(self._grad(value, leaves, again=True)):
                for grad in grads:
                    row[index, list(self.slots.kept[index])] += grad.flatten(0, -2).sum(0)
        return table

    def _by_token(self, leaves: list[list[Tensor]], losses: Tensor) -> Tensor:
        shape = leaves[0][0].shape if leaves[0] else next(calls for calls in leaves if calls)[0].shape
        self.lengths = len({leaf.shape[1:-1] for calls in leaves for leaf in calls})
        tokens = shape[1] if self.lengths == 1 else 1
        table = torch.zeros(shape[0], tokens, *self.slots.shape, dtype=torch.float64)
        for index, grads in enumerate(self._grad(losses.sum(), leaves)):
            for grad in grads:
                if grad.shape[0] != shape[0] or grad.ndim != 3 or shape[0] != losses.numel():
                    raise ValueError(
                        "loss_fn must run the model once on as many sequences as it returns losses, or else be called "
                        f"with coupled=True, got heads {tuple(grad.shape)} for {losses.numel()} losses"
                    )
                table[:, :, index, list(self.slots.kept[index])] += grad if self.lengths == 1 else grad.sum(1, True)
        return table

    def _uncoupled(self, leaves: list[list[Tensor]], losses: Tensor) -> bool:
        """Whether the first of several losses depends on the first sequence alone; raises ValueError if not."""
        if losses.numel() < 2:
            return False
        for grads in self._grad(losses[0], leaves, again=True):
            if any(bool(grad[1:].any()) for grad in grads):
                raise ValueError(
                    "coupled must be True where a loss depends on other examples of its batch, got coupled=False"
                )
        return True

    def check_slope(self, largest: float) -> None:
        """Raise ValueError for an objective that is stationary at the full model, exactly or up to rounding."""
        reason = "loss_fn must have a gradient at the measured mask: an objective that is smallest there (a distance "
        reason += "to the unpruned model) gives importance 0; use a task loss, or `ablate_heads`"
        if largest == 0:
            raise ValueError(f"{reason}, got a gradient of 0 for every head")
        if largest > 1e-5 * max(1.0, abs(self.mean_loss)):
            return
        with evaluating(self.model), torch.no_grad(), hooked(self.slots, lambda _, heads: heads * 0):
            removed, _ = losses_of(self.loss_fn, self.model, self.first, 0)
        if float(removed.double().mean()) - self.mean_loss > 1e4 * largest:
            raise ValueError(f"{reason}, got a largest gradient of {largest:.1e}")


def normalize_importance(table: Tensor, how: str | None) -> Tensor:
    """Importance (L, H) unchanged (None), over its layer's norm ("l2"), or that mapped to [0, 1] ("minmax")."""
    check_choice("normalize", how, NORMALIZATIONS)
    if how is None:
        return table
    table = table / (table.square().sum(1, keepdim=True).sqrt() + 1e-20)
    if how == "minmax":
        low, high = table.min(), table.max()
        table = (table - low) / (high - low).clamp(min=1e-20)
    return table
