"""WeightWatcher's columns (Martin and Mahoney, arXiv:1810.01075; version 0.7.7) under their own names.

Units are WeightWatcher's: eigenvalues are s^2. For new analyses prefer `spectrum.analyze_matrix`,
whose variance estimate and edge are those of random-matrix theory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import SEED, check_tensor
from attnzoo.diagnostics.spectra.marchenko_pastur import mp_pdf
from attnzoo.rules import SWITCH, check, describe

LEAST = 8
"""Fewer eigenvalues are refused, as WeightWatcher leaves such layers out."""

_RANGE = (1e-140, 1e140)
_BANDWIDTH, _POINTS, _REST = 0.1, 1000, 0.01


def ww_details(matrix: Tensor, *, randomize: bool = False, seed: int = 0, mp_fit: bool = True) -> dict[str, Any]:
    """One layer's record: norms, entropy, power-law fit, and with mp_fit its Marchenko-Pastur fit.

    What is not defined is nan: of a matrix of zeros everything but its sizes, norms and ranks, and the power law of a
    matrix with one singular value that is not 0.

    Args:
        matrix: (n, m).
        randomize: also shuffle the entries once and compare with that spectrum (`rand_*`).
        seed: of the shuffle.
        mp_fit: whether to fit the bulk.

    Raises:
        ValueError: for a matrix that is complex or not finite, has fewer than 8 singular values, or some whose squares
            float64 cannot hold.
    """
    check("randomize", randomize, SWITCH)
    check("seed", seed, SEED)
    check("mp_fit", mp_fit, SWITCH)
    values = eigenvalues(matrix)
    record = spectral_columns(values, max(matrix.shape)) | power_law(values) | determinant_columns(values)
    record["ERG_gap"] = record["detX_num"] - record["num_pl_spikes"]
    alpha = record["alpha"]
    record["alpha_weighted"] = alpha * _log10(record["lambda_max"])
    record["log_alpha_norm"] = math.nan if math.isnan(alpha) else _log10(float(values.pow(alpha).sum()))
    if mp_fit:
        record |= marchenko_pastur_fit(values, max(matrix.shape))
    if randomize:
        order = torch.randperm(matrix.numel(), generator=torch.Generator().manual_seed(seed))
        shuffled = matrix.detach().cpu().flatten()[order].view(matrix.shape)
        record |= randomized_columns(values, eigenvalues(shuffled), max(matrix.shape))
    return record


def eigenvalues(matrix: Tensor) -> Tensor:
    """s^2 of all singular values, ascending, float64 on the CPU."""
    check_tensor("matrix", matrix)
    if matrix.ndim != 2:
        raise ValueError(
            f"matrix must hold real numbers in 2 dimensions, got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if min(matrix.shape) < LEAST:
        raise ValueError(f"matrix must have at least {LEAST} singular values, got shape {tuple(matrix.shape)}")
    high = matrix.detach().cpu().double()
    if not bool(high.isfinite().all()):
        raise ValueError(f"matrix must be finite, got nan or inf in shape {tuple(matrix.shape)}")
    values: Tensor = torch.linalg.svdvals(high).flip(0)
    if not _RANGE[0] < float(values[-1]) < _RANGE[1] and bool(high.any()):
        raise ValueError(f"matrix must have singular values whose squares float64 holds, got one of {values[-1]:.2g}")
    return values.square()


def spectral_columns(values: Tensor, n_big: int) -> dict[str, Any]:
    """Norms, ranks and entropy."""
    n = values.numel()
    singular = values.sqrt()
    norm, largest = float(values.sum()), float(values[-1])
    rank = int((singular > float(singular[-1]) * n_big * 2.0**-52).sum())
    shares = values / norm + 1e-10
    return {
        "N": n_big, "M": n, "Q": n_big / n, "num_evals": n, "norm": norm, "log_norm": _log10(norm),
        "spectral_norm": largest, "lambda_max": largest, "log_spectral_norm": _log10(largest),
        "stable_rank": norm / largest if largest else math.nan, "sv_max": float(singular[-1]),
        "sv_min": float(singular[0]), "matrix_rank": rank, "rank_loss": n - rank,
        "weak_rank_loss": int((values < 1e-6).sum()),
        "entropy": float(-(shares * shares.log()).sum()) / math.log(rank + 1e-10) if rank > 1 else 0.0,
    }  # fmt: skip


def power_law(values: Tensor) -> dict[str, Any]:
    """The exponent of the tail that is closest to a power law (Clauset, Shalizi, Newman 2009)."""
    x = values[values > 1e-5]
    n = x.numel()
    nothing = {"alpha": math.nan, "D": math.nan, "xmin": math.nan, "xmax": math.nan, "sigma": math.nan,
               "num_pl_spikes": 0, "warning": ""}  # fmt: skip
    if n < 2:
        return nothing
    logs = x.log()
    best, chosen = math.inf, 0
    exponent = math.nan
    for i in range(n - 1):
        size = n - i
        if n < 20 and size < 8:
            break
        total = float((logs[i:] - logs[i]).sum())
        if total <= 0:
            continue
        alpha = 1 + (size if n >= 20 else size - 1) / total
        if alpha <= 1:
            distance = 1.0
        else:
            law = 1 - torch.exp((1 - alpha) * (logs[i:] - logs[i]))
            distance = float((law - torch.arange(size, dtype=torch.float64) / size).abs().max())
        if distance < best:
            best, chosen, exponent = distance, i, alpha
    if not math.isfinite(best):
        return nothing
    warning = "over-trained" if exponent < 2 else "under-trained" if exponent > 6 else ""
    return {
        "alpha": exponent, "D": best, "xmin": float(x[chosen]), "xmax": float(x[-1]),
        "sigma": (exponent - 1) / math.sqrt(n - chosen), "num_pl_spikes": int((values >= x[chosen]).sum()),
        "warning": warning,
    }  # fmt: skip


def determinant_columns(values: Tensor) -> dict[str, Any]:
    """Where the product of the largest eigenvalues, rescaled to mean 1, falls below 1, under WeightWatcher's names."""
    n = values.numel()
    if not bool(values.any()):
        return dict.fromkeys(("detX_num", "detX_val_unrescaled", "detX_val"), math.nan)
    scaled = values * n / values.sum()
    tails = scaled.clamp(min=1e-300).log().flip(0).cumsum(0).flip(0)
    for i in range(n - 1, 0, -1):
        if float(tails[i]) < 0:
            return {"detX_num": n - i, "detX_val_unrescaled": float(scaled[i]), "detX_val": float(values[i])}
    return {"detX_num": n, "detX_val_unrescaled": float(scaled[0]), "detX_val": float(values[0])}


def marchenko_pastur_fit(values: Tensor, n_big: int) -> dict[str, Any]:
    """The bulk by least squares on a density of the eigenvalues rescaled to mean 1.

    NaN where no width is admissible (WeightWatcher then returns an arbitrary one).
    """
    n = values.numel()
    nothing = dict.fromkeys(("W_scale", "sigma_mp", "bulk_max", "bulk_min", "mp_softrank"), math.nan)
    if not bool(values.any()):
        return {**nothing, "num_spikes": None}
    scale = math.sqrt(n / float(values.sum()))
    e = values * scale * scale
    gamma = n / n_big
    square = n == n_big
    data = e.sqrt() if square else e
    x = torch.linspace(0, float(data.max()) + 0.5, _POINTS, dtype=torch.float64)
    y = torch.stack([(1 - (point - data).abs() / _BANDWIDTH).clamp(min=0).mean() / _BANDWIDTH for point in x])
    keep = y > _REST
    x, y = x[keep], y[keep]
    peak = float(x[y.argmax()])

    def loss(sigma: float) -> float:
        high = (sigma * (1 + math.sqrt(gamma))) ** 2
        low = (sigma * (1 - math.sqrt(gamma))) ** 2
        if square:
            # Its quarter circle for singular values, whose radius does not scale with sigma.
            law = (4 - x * x).clamp(min=0).sqrt() / (math.pi * sigma * sigma)
            low, high = 0.0, 2 * sigma
        else:
            law = mp_pdf(x, gamma, sigma * sigma)
        if high < peak or high > float(x[-1]) or low > peak:
            return math.inf
        return float((law - y).square().sum())

    top = math.sqrt(float(e.max())) / (1 + math.sqrt(gamma))
    grid = [top * (0.05 + 0.01 * i) for i in range(195)]
    losses = [loss(sigma) for sigma in grid]
    at = min(range(len(grid)), key=losses.__getitem__)
    if not math.isfinite(losses[at]):
        return {**nothing, "W_scale": scale, "num_spikes": None}
    sigma = _golden_section(loss, grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
    high, low = ((sigma * (1 + side * math.sqrt(gamma))) ** 2 for side in (1, -1))
    edge = high + math.sqrt(math.sqrt(gamma) * high ** (2 / 3) * n ** (-2 / 3))
    return {
        "W_scale": scale, "sigma_mp": sigma, "bulk_max": high / scale**2, "bulk_min": low / scale**2,
        "mp_softrank": high / float(e.max()), "num_spikes": int((e > edge).sum()),
    }  # fmt: skip


def _golden_section(function: Any, low: float, high: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if function(a) <= function(b) else (a, high)
    return (low + high) / 2


def randomized_columns(values: Tensor, shuffled: Tensor, n_big: int) -> dict[str, Any]:
    """Against the spectrum of a shuffled copy, both ascending."""
    largest = float(shuffled[-1])
    if not largest:
        names = ("ww_softrank", "rand_distance", "rand_sigma_mp", "rand_bulk_max")
        counts = dict.fromkeys(("rand_num_spikes", "num_traps"))
        return {"max_rand_eval": 0.0, "ww_maxdist": 0.0, **dict.fromkeys(names, math.nan), **counts}
    p, q = values / values.sum(), shuffled / shuffled.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    fit = marchenko_pastur_fit(shuffled, n_big)
    return {
        "max_rand_eval": largest, "ww_softrank": largest / float(values[-1]),
        "ww_maxdist": float(values[-1]) - largest, "rand_distance": math.sqrt(max(divergence, 0.0)),
        "rand_sigma_mp": fit["sigma_mp"], "rand_bulk_max": fit["bulk_max"], "rand_num_spikes": fit["num_spikes"],
        "num_traps": fit["num_spikes"],
    }  # fmt: skip


def _relative_entropy(p: Tensor, q: Tensor) -> float:
    used = p > 0
    return float((p[used] * (p[used] / q[used]).log()).sum())


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def weight_matrices(module: nn.Module, least: int) -> Iterator[tuple[int, str, Tensor]]:
    """Number, name and matrix of the weights of two dimensions of at least this size, shared ones once.

    Of a weight that torch's parametrisation computes from others, such as `weight_norm`'s, it is the computed one.
    """
    seen: set[str] = set()
    for number, (name, parameter) in enumerate(module.named_parameters()):
        owner, computed, inside = name.rpartition("parametrizations.")
        weight: Tensor = parameter
        if computed:
            name = owner + inside.split(".")[0]
            weight = getattr(module.get_submodule(owner.rstrip(".")), inside.split(".")[0]).detach()
        if name not in seen and weight.ndim == 2 and min(weight.shape) >= least:
            seen.add(name)
            yield number, name, weight


def ww_dataframe(model: nn.Module, **options: Any) -> Any:
    """A pandas DataFrame with a row for each weight matrix of the model that has at least 8 singular values.

    Tied weights have one row, and weights under torch's parametrisation theirs as computed. Options are those of
    `ww_details`. A model without such a matrix gives no rows, but all columns.

    Raises:
        ValueError: as `ww_details`, with the name of the layer.
    """
    import pandas  # type: ignore[import-untyped]

    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {describe(model)}")
    rows = []
    for number, name, weight in weight_matrices(model, LEAST):
        layer = name.removesuffix(".weight")
        try:
            details = ww_details(weight, **options)
        except ValueError as error:
            raise ValueError(f"layer {layer!r} cannot be analysed: {error}") from None
        rows.append({"layer_id": number, "longname": layer, **details})
    columns = None if rows else ["layer_id", "longname", *ww_details(torch.eye(LEAST), **options)]
    return pandas.DataFrame(rows, columns=columns)
