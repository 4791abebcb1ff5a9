"""Spectra of weights compared with those of random matrices: outliers, gaps, ranks.

Units: lambda = s^2 / n_big for one matrix, eigenvalues of P P^T for a product. Ratios do not depend on them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import check_choice, check_tensor
from attnzoo.diagnostics.layers import Factors, attention_layers
from attnzoo.diagnostics.spectra.marchenko_pastur import (
    QUANTILES,
    bbp,
    bbp_inverse,
    mp_cdf,
    mp_edges,
    product_edge,
    product_pdf,
    tracy_widom_edge,
    variance,
)
from attnzoo.diagnostics.spectra.record import EDGES, ESTIMATORS, Settings, SpectrumRecord, Spike, settings_of
from attnzoo.rules import describe, is_number

__all__ = [
    "EDGES",
    "ESTIMATORS",
    "NULLS",
    "SpectrumRecord",
    "Spike",
    "analyze_attention",
    "analyze_matrix",
    "product_pdf",
    "product_singular_values",
]

NULLS = ("mp", "product", "simulate")
_LEAST = 8
_DRAWS = 8


def analyze_matrix(
    matrix: Tensor | Sequence[Tensor],
    *,
    estimator: str = "bulk",
    edge: str = "tw",
    level: float = 0.99,
    quantile: float | None = None,
    null: str | None = None,
    rank_rtol: float | None = None,
    keep_eigenvalues: bool = False,
    effective_rank_of: str = "eigenvalues",
    draws: Sequence[float] | None = None,
) -> SpectrumRecord:
    """The spectrum of a matrix, or of a product of factors that is never formed, against its null.

    Args:
        matrix: (n, m), or factors X_1 (N0, N1), ..., X_L (N_{L-1}, N_L) of a product.
        estimator: of the variance: "bulk", "median" or "mean" (`marchenko_pastur.variance`).
        edge: what counts as an outlier: above the Tracy-Widom edge ("tw"), the bulk's own edge ("mp"), or of null
            "mp" WeightWatcher's ("ww").
        level: 0.99, 0.95 or 0.90, the probability that noise stays below "tw".
        quantile: of the Tracy-Widom distribution, in place of level.
        null: "mp" (one matrix), "product" (independent factors), or "simulate" (redraw every factor as noise of its
            estimated variance, 8 times). Default: "mp" for a matrix, "product" for factors. A Marchenko-Pastur fit
            of a product of noise calls half of it signal.
        rank_rtol: relative size below which a singular value is zero. Default: n_big times the rounding of float32,
            or of float64 for a float64 matrix.
        keep_eigenvalues: whether the record holds them.
        effective_rank_of: "eigenvalues", or "sv" for the entropy of the singular values (Roy and Vetterli 2007).
        draws: for null "simulate", largest eigenvalues of noise from elsewhere, in place of redrawn factors.

    Raises:
        ValueError: for a matrix that is not finite, or an argument outside its rule.
    """
    if not isinstance(matrix, Tensor | list | tuple):
        raise ValueError(f"matrix must be a tensor or a list of factors, got {describe(matrix)}")
    factors = [matrix] if isinstance(matrix, Tensor) else list(matrix)
    check_factors(factors)
    null = ("mp" if len(factors) == 1 else "product") if null is None else null
    check_choice("null", null, NULLS)
    settings = Settings(estimator, edge, level, quantile, rank_rtol, keep_eigenvalues, effective_rank_of)
    if null == "product" and len(factors) == 1:
        raise ValueError("null 'product' needs the factors, got one matrix")
    if draws is not None:
        draws = _checked_draws(draws, null)
    dims = [factors[0].shape[0], *(factor.shape[1] for factor in factors)]
    exact = all(factor.dtype == torch.float64 for factor in factors)

    def sigma2() -> list[float]:
        return [factor_variance(factor, estimator, settings.q) for factor in factors]

    def largest() -> Sequence[float]:
        variances = sigma2()
        return draws or [float(_redrawn(factors, variances, seed)[0].square()) for seed in range(_DRAWS)]

    return record_of(product_singular_values(factors), dims, exact, null, settings, sigma2, largest)


def _checked_draws(draws: Any, null: str) -> list[float]:
    """Largest eigenvalues of noise; raises ValueError unless null "simulate" can use them."""
    if null != "simulate":
        raise ValueError(f"draws must be None unless null is 'simulate', got {describe(draws)} for null {null!r}")
    given = draws.tolist() if isinstance(draws, Tensor) else draws
    if not isinstance(given, list | tuple) or len(given) < 2 or not all(map(is_number, given)):
        raise ValueError(f"draws must be at least 2 finite numbers, got {describe(draws)}")
    return list(given)


def record_of(
    singular: Tensor,
    dims: Sequence[int],
    exact: bool,
    null: str,
    settings: Settings,
    sigma2: Callable[[], Sequence[float]],
    draws: Callable[[], Sequence[float]],
) -> SpectrumRecord:
    """Singular values, descending, of a product of factors of these sizes against a null.

    sigma2 gives the variances of the factors, of null "product"; draws the largest eigenvalues of noise, of null
    "simulate".
    """
    if settings.edge == "ww" and null != "mp":
        raise ValueError(f"edge must be 'tw' or 'mp' for null {null!r}, got 'ww'")
    n_big = max(dims[0], dims[-1])
    tolerance = n_big * (2.0**-52 if exact else 2.0**-23) if settings.rank_rtol is None else settings.rank_rtol
    top = float(singular.max()) if singular.numel() else 0.0
    singular = singular[singular > top * tolerance].flip(0)
    values = singular.square() / (n_big if null == "mp" else 1)
    record = _ranks(values, singular, settings.effective_rank_of)
    if settings.keep_eigenvalues:
        record = dataclasses.replace(record, eigenvalues=tuple(values.tolist()))
    n = values.numel()
    if n == 0:
        return record
    if n < _LEAST:
        return dataclasses.replace(record, note=f"only {n} non-zero eigenvalues: no fit")
    if null == "mp":
        return _against_mp(record, values, n_big, settings.estimator, settings.edge, settings.q)
    if null == "simulate":
        drawn = torch.tensor(list(draws()), dtype=torch.float64)
        high = float(drawn.mean())
        threshold = high + 3 * float(drawn.std()) if settings.edge == "tw" else high
    else:
        scale = math.prod(s2 * size for s2, size in zip(sigma2(), dims[1:], strict=True))
        edge, spread = _product_edge(tuple(dims))
        high = scale * edge
        threshold = scale * (edge + settings.q * spread) if settings.edge == "tw" else high
        record = dataclasses.replace(record, dims=tuple(dims))
    return dataclasses.replace(_outliers(record, values, high, threshold), gamma=n / n_big)


@functools.cache
def _product_edge(dims: tuple[int, ...]) -> tuple[float, float]:
    """`product_edge`, remembered, since the heads of a model have few sizes."""
    return product_edge(dims)


def product_singular_values(factors: Sequence[Tensor]) -> Tensor:
    """Singular values of X_1 ... X_L, descending, in float64, at most min of all sizes of them.

    The cost does not depend on the outer sizes: tall outer factors are replaced by their triangular parts first.
    """
    chain = [factor.detach().to(torch.float64) for factor in factors]
    if len(chain) > 1:
        if chain[0].shape[0] > chain[0].shape[1]:
            chain[0] = torch.linalg.qr(chain[0], mode="r").R
        if chain[-1].shape[1] > chain[-1].shape[0]:
            chain[-1] = torch.linalg.qr(chain[-1].T, mode="r").R.T
    singular: Tensor = torch.linalg.svdvals(torch.linalg.multi_dot(chain) if len(chain) > 1 else chain[0])
    return singular


def check_factors(factors: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are finite matrices that fit each other."""
    for factor in factors:
        if not isinstance(factor, Tensor) or factor.ndim != 2:
            raise ValueError(f"matrix must have 2 dimensions, got {getattr(factor, 'shape', type(factor).__name__)}")
        check_tensor("matrix", factor)
        sizes = factor.detach().double().abs()
        if not bool(sizes.isfinite().all()):
            raise ValueError("matrix must be finite, got NaN or infinite entries")
        if bool(sizes.any()) and not 1e-140 < float(sizes.max()) < 1e140:
            raise ValueError(
                f"matrix must have entries whose squares float64 holds, got one of {float(sizes.max()):.2g}"
            )
    for left, right in itertools.pairwise(factors):
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"factors must fit each other, got {tuple(left.shape)} and {tuple(right.shape)}")
    if not factors or max(factors[0].shape[0], factors[-1].shape[1]) < 2:
        raise ValueError("matrix must have at least 2 rows or columns")


def _ranks(values: Tensor, singular: Tensor, of: str) -> SpectrumRecord:
    """The figures that need no null, from ascending eigenvalues."""
    n = values.numel()
    if n == 0:
        return SpectrumRecord(hard_rank=0, lambda_max=0.0, note="a matrix of zeros")
    total = values.sum()
    shares = values / total if of == "eigenvalues" else singular / singular.sum()
    entropy = float(-(shares * shares.log()).sum())
    return SpectrumRecord(
        hard_rank=n,
        lambda_max=float(values[-1]),
        stable_rank=float(total / values[-1]),
        participation_ratio=float(total.square() / values.square().sum()),
        effective_rank=math.exp(entropy),
        spectral_entropy=entropy / math.log(n) if n > 1 else 0.0,
    )


def _against_mp(
    record: SpectrumRecord, values: Tensor, n_big: int, estimator: str, edge: str, quantile: float
) -> SpectrumRecord:
    n = values.numel()
    gamma = n / n_big
    sigma2 = variance(values, n_big, estimator, quantile)
    low, high = mp_edges(gamma, sigma2)
    if edge == "tw":
        threshold = tracy_widom_edge(n_big, n, sigma2, quantile)
    elif edge == "mp":
        threshold = high
    else:
        mean = float(values.mean())
        threshold = high + mean * math.sqrt(math.sqrt(gamma) * (high / mean) ** (2 / 3) * n ** (-2 / 3))
    record = _outliers(record, values, high, threshold)
    rest = values[values <= threshold]
    m = rest.numel()
    distance = None
    if m:
        law = mp_cdf(rest, gamma, sigma2)
        steps = torch.arange(m + 1, dtype=torch.float64, device=rest.device) / m
        distance = float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())
    tau2 = n_big * sigma2
    spikes = []
    for value in values[values > threshold].flip(0).tolist():
        theta = bbp_inverse(value * n_big, gamma, tau2)
        _, big, small, _ = bbp(theta, gamma, tau2)
        spikes.append(Spike(value, theta, big, small))
    return dataclasses.replace(
        record, gamma=gamma, sigma2=sigma2, lambda_minus=low, ks_bulk=distance, spikes=tuple(spikes)
    )


def factor_variance(factor: Tensor, estimator: str, quantile: float) -> float:
    """Estimated variance of one factor's entries."""
    return variance_of(torch.linalg.svdvals(factor.detach().double()), max(factor.shape), estimator, quantile)


def variance_of(singular: Tensor, n_big: int, estimator: str, quantile: float) -> float:
    """Estimated variance of a factor's entries from its singular values, descending."""
    values = singular.square().flip(0) / n_big
    return variance(values[values > 0], n_big, estimator, quantile) if bool((values > 0).any()) else 0.0


def _redrawn(factors: Sequence[Tensor], sigma2: Sequence[float], seed: int) -> Tensor:
    """Singular values of a product of noise with these sizes and variances, descending."""
    generator = torch.Generator().manual_seed(seed)
    return product_singular_values(
        [
            math.sqrt(s2) * torch.randn(factor.shape, generator=generator, dtype=torch.float64)
            for factor, s2 in zip(factors, sigma2, strict=True)
        ]
    )


def _outliers(record: SpectrumRecord, values: Tensor, high: float, threshold: float) -> SpectrumRecord:
    outside = values > threshold
    count = int(outside.sum())
    return dataclasses.replace(
        record,
        lambda_plus=high,
        threshold=threshold,
        mp_gap=record.lambda_max / high - 1 if high else math.inf,
        mp_softrank=high / record.lambda_max,
        outlier_count=count,
        outlier_fraction=count / values.numel(),
        outlier_energy=float(values[outside].sum() / values.sum()),
    )


def analyze_attention(
    module: nn.Module,
    *,
    form: str = "circuit",
    per: str = "head",
    part: str = "full",
    null: str | None = None,
    preset: str | None = None,
    layer: str | None = None,
    **options: Any,
) -> list[SpectrumRecord]:
    """Spectra of the query-key form of an attention module, by `qk_circuit`.

    With WQ_h and WK_h the effective factors (d, E) of a head, "circuit" is WQ_h^T WK_h (E, E), the bilinear form
    of the logits, and "gram" is WQ_h WK_h^T (d, d). Neither is formed. Mechanisms that mix heads or compose scores
    give their factors before that.

    Args:
        module: a mechanism with `qk_circuit`.
        form: "circuit" or "gram".
        per: "head", or "layer" for the sum over heads ("circuit") and the block matrix of all heads ("gram").
        part: "full", or "nope" or "rope" where the module tells them apart.
        null: as in `analyze_matrix`; "simulate" redraws the module's matrices as noise of their variances. Default:
            "product", or "simulate" for latent attention, whose keys are products and sums of products themselves.
        preset: "jha_reagen": form gram, per layer, estimator mean, edge mp, null mp, for comparison with
            arXiv:2507.09394 as far as its abstract tells; compare variants only with their own first step.
        layer: name for the records.
        options: of `analyze_matrix`, except draws.

    Raises:
        ValueError: for an argument outside its rule, a part that the module has no features of, or weights that are
            not finite.
    """
    if preset is not None:
        if preset != "jha_reagen":
            raise ValueError(f"preset must be 'jha_reagen', got {preset!r}")
        form, per, null = "gram", "layer", "mp"
        options = {"estimator": "mean", "edge": "mp", **options}
    check_form(form, per)
    settings_of(options)
    factors: Factors = module.qk_circuit(part)  # type: ignore[operator]
    if any(query.shape[0] == 0 for query, _ in factors):
        raise ValueError(f"part must be one that {type(module).__name__} has features of, got {part!r}")
    if null is None:
        null = default_null(module)
    noise = functools.partial(redrawn_factors, module, "qk", part) if null == "simulate" else None
    name = "qk" if part == "full" else f"qk {part}"
    return [
        dataclasses.replace(record, layer=layer, matrix=name)
        for record in factor_records(factors, noise, form, per, null, options)
    ]


def factor_records(
    factors: Factors,
    noise: Callable[[int], Factors] | None,
    form: str,
    per: str,
    null: str,
    options: dict[str, Any],
) -> list[SpectrumRecord]:
    """One record per head, or one of the layer. noise draws factors without signal for a seed, of null "simulate"."""
    if per == "layer":
        pairs: list[tuple[int | None, tuple[Tensor, Tensor]]] = [(None, pair_of(*_layer(factors, form), form))]
    else:
        pairs = [(head, pair_of(query, key, form)) for head, (query, key) in enumerate(factors)]
    largest: list[list[float]] = [[] for _ in pairs]
    for seed in range(_DRAWS) if noise is not None else ():
        drawn = noise(seed) if noise is not None else []
        whole = [_layer(drawn, form)] if per == "layer" else drawn
        for values, (query, key) in zip(largest, whole, strict=True):
            values.append(float(product_singular_values(pair_of(query, key, form))[0].square()))
    records = []
    for (head, pair), draws in zip(pairs, largest, strict=True):
        # A single matrix against the Marchenko-Pastur law has to be formed; products stay factored.
        matrix: Tensor | Sequence[Tensor] = pair[0] @ pair[1] if null == "mp" else pair
        record = analyze_matrix(matrix, null=null, draws=draws or None, **options)
        records.append(dataclasses.replace(record, head=head))
    return records


def default_null(module: nn.Module) -> str:
    """The null of an attention module's products."""
    # A Hugging Face module's factors are matrices of its own.
    return "simulate" if getattr(module, "factored_circuits", False) else "product"


def check_form(form: str, per: str) -> None:
    """Raise ValueError for an unknown form or level."""
    if form not in ("circuit", "gram"):
        raise ValueError(f"form must be 'circuit' or 'gram', got {form!r}")
    if per not in ("head", "layer"):
        raise ValueError(f"per must be 'head' or 'layer', got {per!r}")


def redrawn_factors(module: nn.Module, name: str, part: str, seed: int) -> Factors:
    """Factors of the module with its matrices redrawn."""
    layer = attention_layers(_noise_like(module, seed))[0]
    return layer.qk_factors(part) if name == "qk" else [(out.T, value) for value, out in layer.ov_factors()]


@torch.no_grad()
def _noise_like(module: nn.Module, seed: int) -> Any:
    """A copy of the module with every matrix redrawn as noise of its estimated variance."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        if parameter.ndim == 2:
            sigma = math.sqrt(factor_variance(parameter, "bulk", QUANTILES[0.99]))
            parameter.copy_(sigma * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return copied


def pair_of(query: Tensor, key: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The two factors of "circuit" or "gram"."""
    return (query.T, key) if form == "circuit" else (query, key.T)


def _layer(factors: Sequence[tuple[Tensor, Tensor]], form: str) -> tuple[Tensor, Tensor]:
    """All heads' factors as one pair, with each key of a group once, so that independent entries stay independent.

    The sum over heads of "circuit" adds the queries of a group; the blocks of "gram" with a key n times have the
    singular values of those with it once, times the root of n.
    """
    groups: list[tuple[list[Tensor], Tensor]] = []
    for query, key in factors:
        for queries, known in groups:
            if torch.equal(known, key):
                queries.append(query)
                break
        else:
            groups.append(([query], key))
    if form == "circuit":
        return torch.cat([torch.stack(queries).sum(0) for queries, _ in groups]), torch.cat([key for _, key in groups])
    keys = torch.cat([key * math.sqrt(len(queries)) for queries, key in groups])
    return torch.cat([query for query, _ in factors]), keys
