"""Whether two models differ on the same examples: paired bootstrap and paired t-test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.diagnostics.arguments import SEED
from attnzoo.diagnostics.pruning.ablation import HeadAblation
from attnzoo.rules import SIZE, check, describe, is_integer_tensor, is_number

_BLOCK = 1 << 22  # sampled numbers at once


@dataclass(frozen=True)
class PairedBootstrap:
    """Result of `paired_bootstrap`.

    Attributes:
        p: share of resamples in which a is not better than b.
        p_two_sided: min(1, 2 min(share of mean d <= 0, share of mean d >= 0)).
        mean_difference: mean of d = a - b.
        n_resamples: R.
    """

    p: float
    p_two_sided: float
    mean_difference: float
    n_resamples: int


@dataclass(frozen=True)
class PairedTTest:
    """Result of `paired_t_test`.

    Attributes:
        t: mean(d) / (std(d) / sqrt(N)), d = a - b.
        p: two-sided, by Student's distribution with N - 1 degrees of freedom.
        degrees_of_freedom: N - 1.
    """

    t: float
    p: float
    degrees_of_freedom: int


@dataclass(frozen=True, eq=False)
class AblationTests:
    """Paired tests of every entry of an ablation table.

    Attributes:
        p: two-sided p values, shaped as the table; nan where there is no head.
        significant: p < threshold, boolean.
        threshold: as given.
        num_tests: entries that were tested.
        expected_false_alarms: num_tests * threshold, what chance alone would flag.
    """

    p: Tensor
    significant: Tensor
    threshold: float
    num_tests: int
    expected_false_alarms: float


def paired_bootstrap(
    a: Tensor, b: Tensor, n_resamples: int = 1000, seed: int = 0, *, resamples: Tensor | None = None
) -> PairedBootstrap:
    """Paired bootstrap of scores for "a is better than b" (Koehn 2004); give negated losses.

    Args:
        a: scores of N examples, larger is better (N,).
        b: scores of the same examples.
        n_resamples: R samples of N examples with replacement.
        seed: of the sampling.
        resamples: (R, N) indices to use instead.

    Raises:
        ValueError: for scores of other shapes or that are not finite, or R below 1.
    """
    d = _differences(a, b)
    N = len(d)
    if resamples is None:
        check("n_resamples", n_resamples, SIZE)
        check("seed", seed, SEED)
        generator, rows = torch.Generator().manual_seed(seed), max(1, _BLOCK // N)
        sizes = [min(rows, n_resamples - at) for at in range(0, n_resamples, rows)]
        means = torch.cat([d[torch.randint(N, (size, N), generator=generator)].mean(1) for size in sizes])
    else:
        if not is_integer_tensor(resamples):
            raise ValueError(f"resamples must be a tensor of indices, got {describe(resamples)}")
        if resamples.ndim != 2 or resamples.shape[1] != N or not len(resamples):
            raise ValueError(f"resamples must have shape (R, {N}), got {tuple(resamples.shape)}")
        if not bool(((resamples >= 0) & (resamples < N)).all()):
            raise ValueError(f"resamples must lie between 0 and {N - 1}, got one outside")
        means = d[resamples.long()].mean(1)
    below, above = float((means <= 0).double().mean()), float((means >= 0).double().mean())
    return PairedBootstrap(below, min(1.0, 2 * min(below, above)), float(d.mean()), len(means))


def paired_t_test(a: Tensor, b: Tensor) -> PairedTTest:
    """Paired t-test of scores a and b of the same N examples, each (N,). Needs scipy.

    Differences that are all equal give t = 0 and p = 1 if they are 0, else an infinite t and p = 0.

    Raises:
        ValueError: for scores of other shapes or that are not finite, or fewer than 2.
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]

    d = _differences(a, b)
    if len(d) < 2:
        raise ValueError(f"a and b must hold at least 2 scores, got {len(d)}")
    mean, spread = float(d.mean()), float(d.std())
    if spread == 0:
        statistic = 0.0 if mean == 0 else math.copysign(math.inf, mean)
    else:
        statistic = mean / (spread / math.sqrt(len(d)))
    return PairedTTest(statistic, float(2 * student.sf(abs(statistic), len(d) - 1)), len(d) - 1)


def ablation_tests(
    ablation: HeadAblation, *, test: str = "t_test", threshold: float = 0.01, n_resamples: int = 1000, seed: int = 0
) -> AblationTests:
    """Whether each ablation changes the losses, example by example, against the full model.

    Args:
        ablation: from `ablate_heads`.
        test: "t_test" or "bootstrap", two-sided both.
        threshold: of significance; no correction for the number of tests, which is reported instead.
        n_resamples: of the bootstrap.
        seed: of the bootstrap, the same for every entry.

    Raises:
        ValueError: for an unknown test or a threshold outside (0, 1).
    """
    if test not in ("t_test", "bootstrap"):
        raise ValueError(f"test must be 't_test' or 'bootstrap', got {test!r}")
    if not is_number(threshold) or not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {describe(threshold)}")
    check("n_resamples", n_resamples, SIZE)
    check("seed", seed, SEED)
    if not isinstance(ablation, HeadAblation):
        raise ValueError(f"ablation must be what ablate_heads returns, got {describe(ablation)}")
    p = torch.full(ablation.losses.shape, torch.nan, dtype=torch.float64)
    for at in (~ablation.losses.isnan()).nonzero().tolist():
        # Scores are larger if better.
        full, removed = -ablation.base_examples, -ablation.examples[tuple(at)]
        if test == "t_test":
            p[tuple(at)] = paired_t_test(full, removed).p
        else:
            p[tuple(at)] = paired_bootstrap(full, removed, n_resamples, seed).p_two_sided
    tested = int((~p.isnan()).sum())
    return AblationTests(p, p < threshold, threshold, tested, tested * threshold)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    try:
        a, b = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (a, b))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a and b must hold numbers, got {describe(a)} and {describe(b)}") from None
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"a and b must hold a score for each of the same examples, got {a.shape} and {b.shape}")
    d = a - b
    if not bool(d.isfinite().all()):
        raise ValueError(f"a and b must be finite, got {int((~d.isfinite()).sum())} differences that are not")
    return d
