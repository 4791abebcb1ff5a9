"""What removing heads gains over masking them: wall-clock time of both."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import pairs_of
from attnzoo.diagnostics.pruning.evaluate import evaluating
from attnzoo.diagnostics.pruning.masks import Head, head_mask, head_slots, masked_heads
from attnzoo.diagnostics.pruning.structural import prune_heads
from attnzoo.rules import COUNT, INTEGER, SIZE, check, describe, is_number


@dataclass(frozen=True)
class PruningSpeed:
    """Time of one call with heads masked and with the same heads removed, by share of heads.

    Attributes:
        fractions: of all heads.
        removed: number of heads.
        masked_ms: milliseconds with the heads masked, minimum over rounds.
        structural_ms: milliseconds with the heads removed, minimum over rounds.
        structural_noise: median over minimum of the latter; 1 on a quiet machine.
        tokens_per_second: of the pruned models; nan if the number of tokens was not given.
        parameters: number of parameters of the pruned models.
        error: largest difference of the outputs, over the largest output.
    """

    fractions: tuple[float, ...]
    removed: tuple[int, ...]
    masked_ms: tuple[float, ...]
    structural_ms: tuple[float, ...]
    structural_noise: tuple[float, ...]
    tokens_per_second: tuple[float, ...]
    parameters: tuple[int, ...]
    error: tuple[float, ...]

    @property
    def speedup(self) -> tuple[float, ...]:
        """Time with nothing removed over that of the pruned models; the first fraction is the reference if it is 0."""
        whole = self.structural_ms[0] if self.fractions[0] == 0 else self.masked_ms[0]
        return tuple(whole / ms for ms in self.structural_ms)


def pruning_speed(
    model: nn.Module,
    call: Callable[[nn.Module], Tensor],
    *,
    fractions: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    order: Sequence[Head] | None = None,
    tokens: int | None = None,
    rounds: int = 10,
    warmup: int = 2,
    seed: int = 0,
) -> PruningSpeed:
    """Wall-clock time of masked and of structurally pruned copies of a model.

    All cases run once per round, in a new random order each time, so that a slow spell hits all of them; the minima
    count. The model itself is not changed; the copies for all fractions are in memory at once.

    Args:
        model: what `prune_heads` takes.
        call: runs the model once, prefill or decoding, and returns what to compare; gradients are off.
        fractions: shares of heads to remove, each from 0 to 1.
        order: (layer, head) pairs. Default: the same number in each layer, starting with the last heads.
        tokens: tokens that a call takes, for tokens_per_second.
        rounds: measurements of each case.
        warmup: rounds before those.
        seed: of the order.

    Raises:
        ValueError: for fractions outside [0, 1], too short an order, rounds below 1, or a call that returns no tensor.
    """
    fractions = _shares(fractions)
    check("rounds", rounds, SIZE)
    check("warmup", warmup, COUNT)
    check("seed", seed, INTEGER)
    if tokens is not None:
        check("tokens", tokens, SIZE)
    if not callable(call):
        raise ValueError(f"call must run the model, got {describe(call)}")
    order = None if order is None else pairs_of("order", order)
    slots = head_slots(model)
    present = slots.present()
    if order is None:
        # The same number in each layer, the last ones first.
        order = [(layer, h) for h, layer in present.T.nonzero().flip(0).tolist()]
    counts = [int(int(present.sum()) * share + 1e-9) for share in fractions]  # 0.7 of 90 is 63
    if max(counts) > len(order):
        raise ValueError(f"order must name at least {max(counts)} heads, got {len(order)}")
    copies, masks, errors = [], [], []
    with evaluating(model), torch.no_grad():
        for count in counts:
            pruned = copy.deepcopy(model)
            prune_heads(pruned, order[:count])
            copies.append(pruned)
            masks.append(head_mask(order[:count], slots.shape))
        runs = {("structural", i): (pruned, None) for i, pruned in enumerate(copies)}
        runs |= {("masked", i): (model, xi) for i, xi in enumerate(masks)}  # type: ignore[misc]
        taken: dict[tuple[str, int], list[float]] = {case: [] for case in runs}
        outputs: dict[tuple[str, int], Tensor] = {}
        draw, cases = random.Random(seed), list(runs)
        for number in range(warmup + rounds):
            draw.shuffle(cases)
            for case in cases:
                ms, output = _timed(*runs[case], call)
                outputs.setdefault(case, output)
                if number >= warmup:
                    taken[case].append(ms)
    for i in range(len(counts)):
        masked = outputs["masked", i].double()
        largest = float(masked.abs().max())
        difference = float((outputs["structural", i].double() - masked).abs().max())
        errors.append(difference / largest if largest else difference)
    best = {case: min(values) for case, values in taken.items()}
    structural = tuple(best["structural", i] for i in range(len(counts)))
    return PruningSpeed(
        fractions, tuple(counts), tuple(best["masked", i] for i in range(len(counts))), structural,
        tuple(statistics.median(taken["structural", i]) / best["structural", i] for i in range(len(counts))),
        tuple(float("nan") if tokens is None else tokens / ms * 1e3 for ms in structural),
        tuple(sum(p.numel() for p in pruned.parameters()) for pruned in copies), tuple(errors),
    )  # fmt: skip


def _shares(fractions: Any) -> tuple[float, ...]:
    """The fractions as Python's numbers; raises ValueError unless they are several of [0, 1]."""
    several = isinstance(fractions, Iterable) and not isinstance(fractions, str)
    given = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in fractions] if (
        several
    ) else []  # fmt: skip
    if not given or any(not is_number(share) or not 0 <= share <= 1 for share in given):
        raise ValueError(f"fractions must lie between 0 and 1, got {given if several else describe(fractions)}")
    return tuple(map(float, given))


def _timed(model: nn.Module, xi: Tensor | None, call: Callable[[nn.Module], Tensor]) -> tuple[float, Tensor]:
    if xi is not None:
        with masked_heads(model, xi):
            return _timed(model, None, call)
    cuda = any(p.is_cuda for p in model.parameters())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    output = call(model)
    if cuda:
        torch.cuda.synchronize()
    if not isinstance(output, Tensor) or not output.numel():
        raise ValueError(f"call must return a tensor to compare, got {describe(output)}")
    return (time.perf_counter() - start) * 1e3, output
