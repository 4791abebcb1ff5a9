"""Muon beside AdamW, and schedules of the learning rate, as classes that a YAML names."""

from __future__ import annotations

import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

OptimiserMaker = Callable[[Iterable[Any]], Optimizer]
ScheduleMaker = Callable[[Optimizer], LRScheduler]


class MuonWithAdamW(Optimizer):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for the rest.

    Muon, which is `torch.optim.Muon`, takes the matrices of parameter groups named "decay"; embeddings, output weights,
    head maps, stacks of matrices and vectors are AdamW's. With adjust_lr_fn="match_rms_adamw" (Liu et al. 2025,
    arXiv:2502.16982) the updates of both have the same size, so that one learning rate and one decay serve both.

    Args:
        params: parameter groups.
        lr: learning rate of groups that have none.
        weight_decay: of groups that have none.
        momentum: of Muon.
        nesterov: whether Muon uses Nesterov momentum.
        ns_steps: Newton-Schulz iterations of Muon.
        adjust_lr_fn: "match_rms_adamw", or "original" for a Muon whose learning rate is far larger than AdamW's.
        betas: AdamW's moment factors.
        eps: AdamW's epsilon.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        given = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in given:
            members = list(group["params"])
            hidden = [p for p in members if p.ndim == 2] if group.get("name") == "decay" else []
            rest = [p for p in members if all(p is not h for h in hidden)]
            matrices += [{**group, "params": hidden, "name": "muon"}] if hidden else []
            others += [{**group, "params": rest}] if rest else []
        makers: list[tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], Optimizer]]] = [
            (matrices, lambda groups: torch.optim.Muon(
                groups, lr, weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )),
            (others, lambda groups: torch.optim.AdamW(groups, lr, betas, eps, weight_decay)),
        ]  # fmt: skip
        self._parts = [make(groups) for groups, make in makers if groups]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The groups and states of both parts are this optimiser's own: one schedule and one state dict for all."""
        self.state = defaultdict(dict, self.state)
        first = 0
        for part in self._parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state_dict)
        self._share()


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine down to a fraction of the peak, at which it stays.

    Args:
        optimizer: whose learning rates are the peaks.
        warmup_steps: of the linear warm-up.
        steps: at which the cosine ends. Default in the recipe: the last step of the run.
        min_ratio: the fraction.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 100, steps: int | None = None, min_ratio: float = 0.1):
        _check_schedule(warmup_steps, steps, min_ratio)
        super().__init__(optimizer, warmup_cosine(warmup_steps, steps or 0, min_ratio))


class WarmupStableDecay(LambdaLR):
    """Linear warm-up, a constant rate, and a decay at the end (Hu et al. 2024, arXiv:2404.06395, section 4.2).

    A checkpoint from before the decay can be continued for any number of steps.

    Args:
        optimizer: whose learning rates are the constant ones.
        warmup_steps: of the linear warm-up.
        decay_steps: of the decay.
        steps: at which the decay ends. Default in the recipe: the last step of the run.
        min_ratio: fraction of the rate at which the decay ends, and which is kept after it.
        form: "linear" or "sqrt", 1 minus the square root of the share of the decay (Hägele et al. 2024,
            arXiv:2405.18392).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 100,
        decay_steps: int = 100,
        steps: int | None = None,
        min_ratio: float = 0.0,
        form: str = "linear",
    ) -> None:
        _check_schedule(warmup_steps, steps, min_ratio)
        if decay_steps < 0:
            raise ValueError(f"decay_steps must not be negative, got {decay_steps}")
        if form not in ("linear", "sqrt"):
            raise ValueError(f"form must be linear or sqrt, got {form!r}")
        if steps is None or warmup_steps + decay_steps > steps:
            raise ValueError(
                f"warmup_steps and decay_steps must fit into the {steps} steps of the schedule, got {warmup_steps} and "
                f"{decay_steps}"
            )
        begin = steps - decay_steps

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = min(1.0, max(0.0, (step - begin) / max(1, decay_steps)))
            left = 1 - (done if form == "linear" else math.sqrt(done))
            return min_ratio + (1 - min_ratio) * left

        super().__init__(optimizer, factor)


def _check_schedule(warmup_steps: int, steps: int | None, min_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if steps is None or steps < 1:
        raise ValueError(f"steps must be at least 1 outside the recipe, which gives its own length, got {steps}")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio must lie in [0, 1], got {min_ratio}")


def warmup_cosine(warmup_steps: int, last_step: int, min_ratio: float) -> Callable[[int], float]:
    """Factor of the learning rate at each step: (step + 1) / warmup_steps, then half a cosine from 1 to min_ratio."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, last_step - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def default_schedule(warmup_steps: int, min_lr_ratio: float) -> ScheduleMaker:
    """The recipe's schedule if none is named."""
    return functools.partial(WarmupCosine, warmup_steps=warmup_steps, min_ratio=min_lr_ratio)


def made_schedule(maker: ScheduleMaker, optimizer: Optimizer, steps: int) -> LRScheduler:
    """A schedule; if its class has an argument `steps` that is not given, it gets the length of the run."""
    cls, given = _class_of(maker), getattr(maker, "keywords", {})
    known = inspect.signature(cls if cls is not None else maker).parameters
    maker_options = {"steps": steps} if "steps" in known and given.get("steps") is None else {}
    return maker(optimizer, **maker_options)


def check_optimiser(maker: OptimiserMaker, lr: float, weight_decay: float) -> None:
    """Raise ValueError for an optimiser that cannot train a decoder, or a class path that gives a learning rate or
    decay that the parameter groups would override."""
    cls, given = _class_of(maker), getattr(maker, "keywords", {})
    if cls in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise ValueError(f"optimizer must take parameter groups and dense gradients, got {cls.__name__}")
    defaults = {} if cls is None else inspect.signature(cls).parameters
    for name, used in (("lr", lr), ("weight_decay", weight_decay)):
        if name in given and given[name] != used and name in defaults and given[name] != defaults[name].default:
            raise ValueError(
                f"optimizer.init_args.{name} must be left out, since model.{name} is {used}, got {given[name]}"
            )


def continued_settings(
    optimiser: OptimiserMaker | None, schedule: ScheduleMaker, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings that a continued run takes from its checkpoint, whatever it is given, as plain types by option.

    They are those of the optimiser, whose groups a checkpoint holds, and those of a schedule that is restored as a
    whole. A `LambdaLR`, such as the recipe's schedules, is not: its function is that of the settings given.

    Args:
        optimiser: makes it. None is AdamW.
        schedule: makes it.
        options: further settings of the optimiser.
    """
    found = {name: _plain(value) for name, value in options.items()}
    found |= _described("optimizer", torch.optim.AdamW if optimiser is None else optimiser, optimiser is not None)
    schedule_class = _class_of(schedule)
    restored = schedule_class is not None and not issubclass(schedule_class, LambdaLR)
    return found | (_described("lr_scheduler", schedule) if restored else {"lr_scheduler.class_path": None})


def check_continued(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of `continued_settings` that is not that of the checkpoint."""
    for name, value in now.items():
        if name in before and before[name] != value:
            raise ValueError(
                f"{name} must be {before[name]}, as in the checkpoint that is continued, got {value}; "
                "--model.init_from starts a run with other settings from its weights"
            )


def settings_of_groups(states: Any) -> dict[str, Any]:
    """Learning rate and decay from the optimiser's states in a checkpoint that does not say its settings."""
    first = states[0] if isinstance(states, list) and states else None
    groups = first.get("param_groups") if isinstance(first, dict) else None
    found = {}
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, dict) and group.get("name") in ("decay", "muon"):
            for name, key in (("model.lr", "initial_lr"), ("model.weight_decay", "weight_decay")):
                if isinstance(group.get(key), float):
                    found[name] = group[key]
    return found


def _described(option: str, maker: Any, with_arguments: bool = True) -> dict[str, Any]:
    """Class and arguments, defaults included, that a maker has; of a plain function nothing."""
    cls = _class_of(maker)
    if cls is None:
        return {}
    found: dict[str, Any] = {f"{option}.class_path": f"{cls.__module__}.{cls.__qualname__}"}
    if not with_arguments:
        return found
    # The parameter groups carry the first two, and the others say how a step is computed, not which.
    left_out = ("lr", "weight_decay", "steps", "last_epoch", "fused", "foreach", "capturable", "differentiable")
    given = getattr(maker, "keywords", {})
    for name, parameter in list(inspect.signature(cls).parameters.items())[1:]:
        value = given.get(name, parameter.default)
        if name not in left_out and value is not parameter.empty and _plain(value) is not _OBJECT:
            found[f"{option}.init_args.{name}"] = _plain(value)
    return found


_OBJECT = object()


def _plain(value: Any) -> Any:
    """A value of plain types, tuples as lists, or `_OBJECT` for another one."""
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _OBJECT if _OBJECT in items else items
    return value if value is None or isinstance(value, bool | int | float | str) else _OBJECT


def rates_at(
    steps: Sequence[int], lr: float, schedule: ScheduleMaker, last_step: int, optimiser: OptimiserMaker | None = None
) -> list[float]:
    """Learning rates that a schedule gives at these steps, in ascending order."""
    # Some schedules also move other settings, such as a momentum, so that the optimiser has to be of the same class.
    group: Mapping[str, Any] = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "lr": lr, "name": "decay"}
    optimizer = torch.optim.SGD([dict(group)]) if optimiser is None else optimiser([dict(group)])
    scheduler = made_schedule(schedule, optimizer, last_step)
    found, wanted = [], set(steps)
    for step in range(max(steps, default=-1) + 1):
        if step in wanted:
            found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def _class_of(maker: Any) -> type | None:
    """The class that a maker from YAML, or a functools.partial, makes."""
    parts = [maker.func, *maker.args] if isinstance(maker, functools.partial) else [maker]
    classes = [part for part in parts if isinstance(part, type)]
    return classes[0] if len(classes) == 1 else None
