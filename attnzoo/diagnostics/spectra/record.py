"""What is known of one spectrum, and how it is asked for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from attnzoo.diagnostics.arguments import check_choice
from attnzoo.diagnostics.spectra.marchenko_pastur import QUANTILES
from attnzoo.rules import NOT_NEGATIVE, NUMBER, SWITCH, check, describe, is_number

EDGES = ("tw", "mp", "ww")
ESTIMATORS = ("mean", "median", "bulk")


@dataclass(frozen=True)
class Spike:
    """An eigenvalue above the threshold, and the signal that explains it (see `marchenko_pastur.bbp`)."""

    value: float
    theta: float
    overlap_big: float
    overlap_small: float


@dataclass(frozen=True)
class SpectrumRecord:
    """Figures of one spectrum; see `spectrum.analyze_matrix`. None where a figure is not defined.

    Attributes:
        hard_rank: singular values above n_big eps times the largest.
        lambda_max: largest eigenvalue.
        lambda_plus: upper edge of the null's bulk.
        lambda_minus: lower edge, of null "mp".
        sigma2: estimated variance of the entries, of null "mp".
        gamma: hard_rank / n_big.
        threshold: above it an eigenvalue is an outlier.
        mp_gap: lambda_max / lambda_plus - 1.
        mp_softrank: lambda_plus / lambda_max.
        outlier_count: eigenvalues above the threshold.
        outlier_fraction: their share.
        outlier_energy: their share of the sum.
        stable_rank: sum / largest.
        participation_ratio: (sum)^2 / sum of squares.
        effective_rank: exponential of the entropy of the eigenvalues' shares.
        spectral_entropy: that entropy over its largest possible value.
        ks_bulk: Kolmogorov-Smirnov distance of the rest to the law, of null "mp".
        spikes: the outliers, largest first, of null "mp".
        dims: sizes N_0, ..., N_L of the factors, of null "product".
        layer: name of the module, where it came from a model.
        head: query head, or None for a whole layer.
        matrix: which matrix.
        note: a caveat, or "".
        eigenvalues: ascending, if they were requested.
    """

    hard_rank: int
    lambda_max: float
    lambda_plus: float | None = None
    lambda_minus: float | None = None
    sigma2: float | None = None
    gamma: float | None = None
    threshold: float | None = None
    mp_gap: float | None = None
    mp_softrank: float | None = None
    outlier_count: int | None = None
    outlier_fraction: float | None = None
    outlier_energy: float | None = None
    stable_rank: float = math.nan
    participation_ratio: float = math.nan
    effective_rank: float = math.nan
    spectral_entropy: float = math.nan
    ks_bulk: float | None = None
    spikes: tuple[Spike, ...] = ()
    dims: tuple[int, ...] | None = None
    layer: str | None = None
    head: int | None = None
    matrix: str = "weight"
    note: str = ""
    eigenvalues: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Settings:
    """Options of `spectrum.analyze_matrix` that do not depend on the matrix, checked."""

    estimator: str = "bulk"
    edge: str = "tw"
    level: float = 0.99
    quantile: float | None = None
    rank_rtol: float | None = None
    keep_eigenvalues: bool = False
    effective_rank_of: str = "eigenvalues"

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("edge", self.edge, EDGES)
        if self.effective_rank_of not in ("eigenvalues", "sv"):
            raise ValueError(f"effective_rank_of must be 'eigenvalues' or 'sv', got {self.effective_rank_of!r}")
        if self.quantile is None and (not is_number(self.level) or self.level not in QUANTILES):
            raise ValueError(
                f"level must be one of {', '.join(map(str, QUANTILES))} unless quantile is given, got {self.level}"
            )
        if self.quantile is not None:
            check("quantile", self.quantile, NUMBER)
        if self.rank_rtol is not None:
            check("rank_rtol", self.rank_rtol, (*NOT_NEGATIVE, (lambda value: value < 1, "be below 1")))
        check("keep_eigenvalues", self.keep_eigenvalues, SWITCH)

    @property
    def q(self) -> float:
        """The Tracy-Widom quantile."""
        return QUANTILES[self.level] if self.quantile is None else self.quantile


def settings_of(options: dict[str, Any]) -> Settings:
    """`Settings` of options by name; raises ValueError for names that it does not know."""
    names = [option.name for option in dataclasses.fields(Settings)]
    for name, value in options.items():
        if name not in names:
            raise ValueError(f"options must be some of {', '.join(names)}, got {name}={describe(value)}")
    return Settings(**options)
