"""A claim of a paper, the protocol by which it is tried, and the rule that decides."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attnzoo_recipes.allowlist import ALLOWED, check_settings
from attnzoo_recipes.compare.plan import MATCHES, VARIED
from attnzoo_recipes.compare.table import CONFIDENCE, interval
from attnzoo_recipes.evidence.figures import FIGURES

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided at this size"


@dataclass(frozen=True)
class Check:
    """What the prediction says of one figure.

    Attributes:
        arm: whose figure.
        figure: one of `figures.FIGURES`.
        against: an arm whose figure is subtracted, seed by seed; None for the figure itself.
        below: the prediction is that the mean lies below this number.
        above: the prediction is that it lies above this one; exactly one of both is given.
    """

    arm: str
    figure: str
    against: str | None = None
    below: float | None = None
    above: float | None = None

    @property
    def words(self) -> str:
        """The prediction in words."""
        what = f"{FIGURES[self.figure].title} of {self.arm}" + (
            f" minus that of {self.against}" if self.against else ""
        )
        return f"{what} {f'below {self.below:g}' if self.below is not None else f'above {self.above:g}'}"


@dataclass(frozen=True)
class Decision:
    """What the runs say of a check.

    Attributes:
        verdict: `CONFIRMED`, `NOT_CONFIRMED` or `UNDECIDED`.
        mean: over seeds, None without any.
        half: half the confidence interval of the mean, None with fewer than two seeds.
        seeds: how many there are.
    """

    verdict: str
    mean: float | None
    half: float | None
    seeds: int


def decide(check: Check, values: Sequence[float], seeds: int) -> Decision:
    """Apply the rule to the values of a check, one for each seed.

    Confirmed if the whole confidence interval of the mean (Student's, 95 %) lies where the prediction says, not
    confirmed if it lies wholly on the other side, undecided otherwise and with fewer seeds than planned.
    """
    mean = math.fsum(values) / len(values) if values else None
    half = interval(values)
    if mean is None or half is None or len(values) < seeds:
        return Decision(UNDECIDED, mean, half, len(values))
    sign, bound = (1, check.below) if check.below is not None else (-1, check.above)
    assert bound is not None
    distance = sign * (mean - bound)
    verdict = CONFIRMED if distance + half < 0 else NOT_CONFIRMED if distance - half > 0 else UNDECIDED
    return Decision(verdict, mean, half, len(values))


def overall(verdicts: Iterable[str]) -> str:
    """Confirmed if every check is, not confirmed if one is not, otherwise undecided."""
    verdicts = list(verdicts)
    if NOT_CONFIRMED in verdicts:
        return NOT_CONFIRMED
    return CONFIRMED if verdicts and set(verdicts) == {CONFIRMED} else UNDECIDED


@dataclass(frozen=True)
class Preset:
    """At what size a claim is tried.

    Attributes:
        name: for files and titles.
        train: settings over configs/pretrain.yaml, by section.
        lrs: learning rates; the first is the one that all arms have in common, by which the claim is decided.
    """

    name: str
    train: Mapping[str, Any]
    lrs: tuple[float, ...]

    @classmethod
    def read(cls, path: Path, allowed: Iterable[str] = ALLOWED) -> Preset:
        """The preset in a YAML file, named after it."""
        content = _read(path, allowed)
        _fields(content, {"train": dict, "lrs": list}, {}, str(path))
        return cls(path.stem, content["train"], tuple(float(rate) for rate in content["lrs"]))


@dataclass(frozen=True)
class Claim:
    """A claim, as its config states it.

    Attributes:
        name: of the file.
        title: the claim in a sentence.
        source: the paper.
        number: what the paper reports.
        prediction: what should be seen at small scale.
        protocol: what is trained and measured.
        arms: what is trained, by name: the section `model` of a config with its attention or feed-forward layer, or
            None for the packaged file of that name. The first is what the others are matched to.
        checks: the rule.
        seeds: number of runs of each arm.
        run_time: estimates in words: "cpu", on 2 CPU cores, and "gpu", on an H100.
        match: what the MLP's width holds equal.
        vary: "attention" or "feed_forward".
        train: settings over those of the preset.
    """

    name: str
    title: str
    source: str
    number: str
    prediction: str
    protocol: str
    arms: Mapping[str, Mapping[str, Any] | None]
    checks: tuple[Check, ...]
    seeds: int
    run_time: Mapping[str, str]
    match: str = "params"
    vary: str = "attention"
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, allowed: Iterable[str] = ALLOWED) -> Claim:
        """The claim in a YAML file, named after it.

        Raises:
            ImportRefusedError: if it names a class outside `allowed`; nothing is imported.
            ValueError: for anything but these settings.
        """
        return cls.from_dict({"name": path.stem, **_read(path, allowed)}, str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "the claim") -> Claim:
        """A claim from plain values, as `to_dict` gives them."""
        texts = dict.fromkeys(("name", "title", "source", "number", "prediction", "protocol"), str)
        needed = {**texts, "arms": dict, "checks": list, "seeds": int, "run_time": dict}
        _fields(content, needed, {"match": str, "vary": str, "train": dict}, where)
        checks = tuple(_check(check, content["arms"], where) for check in content["checks"])
        claim = cls(**{**content, "checks": checks})
        if claim.seeds < 2:
            raise ValueError(f"seeds of {where} must be at least 2, since intervals need two, got {claim.seeds}")
        for key, value, known in (("match", claim.match, MATCHES), ("vary", claim.vary, VARIED)):
            if value not in known:
                raise ValueError(f"{key} of {where} must be one of {', '.join(known)}, got {value!r}")
        if not claim.checks or set(claim.run_time) != {"cpu", "gpu"}:
            raise ValueError(f"{where} must hold at least one check, and the run time on cpu and gpu")
        return claim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content

    @property
    def rule(self) -> dict[str, Any]:
        """What decides, and what it decides about."""
        return {name: value for name, value in self.to_dict().items() if name in ("arms", "checks", "seeds", "match")}

    @property
    def rule_in_words(self) -> str:
        """The rule, for the page."""
        return (
            f"With {self.seeds} seeds, at the common learning rate, for each of the checks below: confirmed if the "
            f"whole {CONFIDENCE:.0%} confidence interval of the mean over seeds (Student's; differences are paired by "
            "seed) lies where the prediction says, not confirmed if it lies wholly on the other side, otherwise "
            "undecided. "
            "The claim is confirmed if every check is, not confirmed if one is not."
        )


def _check(content: Any, arms: Mapping[str, Any], where: str) -> Check:
    where = f"a check of {where}"
    number = (int, float)
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping, got {content!r:.80}")
    given = {name: value for name, value in content.items() if value is not None}
    _fields(given, {"arm": str, "figure": str}, {"against": str, "below": number, "above": number}, where)
    check = Check(**given)
    for arm in (check.arm, check.against):
        if arm is not None and arm not in arms:
            raise ValueError(f"{where} must name arms among {', '.join(arms)}, got {arm!r}")
    if check.figure not in FIGURES:
        raise ValueError(f"figure of {where} must be one of {', '.join(FIGURES)}, got {check.figure!r}")
    if (check.below is None) == (check.above is None):
        raise ValueError(f"{where} must hold either below or above, got {given}")
    return check


def _fields(content: Mapping[str, Any], needed: Mapping[str, Any], optional: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless these are the keys, with values of these types."""
    known = {**needed, **optional}
    unknown = [name for name in content if name not in known]
    missing = [name for name in needed if name not in content]
    if unknown or missing:
        what = f"got {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ValueError(
            f"{where} must hold {', '.join(needed)} and may hold {', '.join(optional) or 'no more'}, {what}"
        )
    for name, value in content.items():
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise ValueError(f"{name} of {where} is of the wrong type, got {value!r:.80}")


def _read(path: Path, allowed: Iterable[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, got {content!r:.80}")
    check_settings(content, allowed, str(path))
    return content
