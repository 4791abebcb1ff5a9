"""What the spectrum of a random matrix, or of a product of random matrices, looks like.

Everything is float64. An n_big x n_small matrix with independent entries of mean 0 and variance s2 has
lambda = s^2 / n_big (s its singular values) distributed by the Marchenko-Pastur law with gamma = n_small / n_big;
that normalisation is used throughout. For a product P of such matrices lambda is an eigenvalue of P P^T.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUANTILES = {0.99: 2.0234, 0.95: 0.9793, 0.90: 0.4501}
"""Quantiles of the Tracy-Widom distribution (beta = 1), Johnstone 2001."""


def _check(gamma: float) -> None:
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")


def mp_edges(gamma: float, sigma2: float = 1.0) -> tuple[float, float]:
    """Smallest and largest eigenvalue of the bulk, s2 (1 -+ sqrt(gamma))^2."""
    _check(gamma)
    root = math.sqrt(gamma)
    return sigma2 * (1 - root) ** 2, sigma2 * (1 + root) ** 2


def mp_pdf(x: Tensor, gamma: float, sigma2: float = 1.0) -> Tensor:
    """Density at x, 0 outside of the edges."""
    low, high = mp_edges(gamma, sigma2)
    x = x.double()
    inside = (x > low) & (x < high)
    at = torch.where(inside, x, torch.full_like(x, (low + high) / 2))
    density = torch.sqrt((high - at) * (at - low)) / (2 * math.pi * sigma2 * gamma * at)
    return torch.where(inside, density, torch.zeros_like(x))


def mp_cdf(x: Tensor, gamma: float, sigma2: float = 1.0) -> Tensor:
    """Distribution function at x."""
    low, high = mp_edges(gamma, sigma2)
    at = x.double().clamp(max(low, 1e-300), high)
    middle, width = (low + high) / 2, high - low
    value = torch.sqrt(((high - at) * (at - low)).clamp(min=0))
    value = value + middle * torch.asin(((2 * at - low - high) / width).clamp(-1, 1))
    if low > 0:
        ratio = ((low + high) * at - 2 * low * high) / (at * width)
        value = value - math.sqrt(low * high) * torch.asin(ratio.clamp(-1, 1))
    result = (0.5 + value / (2 * math.pi * sigma2 * gamma)).clamp(0, 1)
    result = torch.where(x <= low, torch.zeros_like(result), result)
    return torch.where(x >= high, torch.ones_like(result), result)


@functools.lru_cache(maxsize=256)
def mp_median(gamma: float) -> float:
    """Median of the law with s2 = 1, by bisection."""
    low, high = mp_edges(gamma)
    for _ in range(100):
        middle = (low + high) / 2
        if float(mp_cdf(torch.tensor(middle, dtype=torch.float64), gamma)) < 0.5:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def tracy_widom_edge(n_big: int, n_small: int, sigma2: float, quantile: float) -> float:
    """Where the largest eigenvalue of a random matrix lies with the quantile's probability (Johnstone 2001)."""
    a, b = math.sqrt(n_big - 1), math.sqrt(n_small)
    mean, spread = (a + b) ** 2, (a + b) * math.cbrt(1 / a + 1 / b)
    return sigma2 / n_big * (mean + quantile * spread)


def product_edge(dims: Sequence[int]) -> tuple[float, float]:
    """Upper edge of P P^T / scale for a product of independent random matrices, and its Tracy-Widom spread.

    P = X_1 ... X_L with X_i of size dims[i - 1] x dims[i], entries of variance s2_i, and scale = prod s2_i dims[i],
    so that the eigenvalues have mean 1. With one factor it is the Marchenko-Pastur edge (Burda et al. 2010).
    """
    if len(dims) < 2 or min(dims) < 1:
        raise ValueError(f"dims must hold at least two sizes of at least 1, got {list(dims)}")
    ratios = [dims[0] / size for size in dims[1:]]

    def slope(m: float) -> float:
        return 1 / (1 + m) + sum(a / (1 + a * m) for a in ratios) - 1 / m

    # The slope of log z is negative near 0 and positive for large m; between them lies the edge.
    low, high = 1e-12, 1.0
    while bool(slope(high) < 0):
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    m = (low + high) / 2
    edge = float((1 + m) / m * math.prod(1 + a * m for a in ratios))
    curvature = 1 / m**2 - 1 / (1 + m) ** 2 - sum(a * a / (1 + a * m) ** 2 for a in ratios)
    return edge, (edge**2 * edge * curvature / (2 * dims[0] ** 2)) ** (1 / 3)


def product_pdf(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Density at x of the non-zero eigenvalues of P P^T / scale, in the units of `product_edge`; 0 outside the bulk.

    With M(z) = z G(z) - 1, G the resolvent's mean, z M = (1 + M) prod_i (1 + a_i M), a_i = N_0 / N_i; inside the bulk
    one pair of the roots is complex, and the density over all N_0 eigenvalues is |Im M| / (pi z) (Burda et al. 2010).
    The product has min(dims) non-zero ones, over which it integrates to 1. With one factor it is `mp_pdf`.
    """
    ratios = [dims[0] / size for size in dims[1:]]
    coefficients = torch.ones(1, dtype=torch.float64)
    for a in (1.0, *ratios):
        longer = torch.zeros(coefficients.numel() + 1, dtype=torch.float64)
        longer[:-1] += coefficients
        longer[1:] += a * coefficients
        coefficients = longer
    degree = coefficients.numel() - 1
    at = x.detach().double().flatten()
    usable = at > 0
    z = torch.where(usable, at, torch.ones_like(at))
    # Companion matrices of the monic polynomials sum_k c_k M^k - z M, one per point.
    polynomial = coefficients.expand(z.numel(), -1).clone()
    polynomial[:, 1] -= z
    companion = torch.zeros(z.numel(), degree, degree, dtype=torch.float64)
    companion[:, range(1, degree), range(degree - 1)] = 1
    companion[:, :, -1] = -polynomial[:, :-1] / polynomial[:, -1:]
    roots = torch.linalg.eigvals(companion)
    # Several pairs may be complex; the resolvent's is the one to the right, which starts at -min(dims) / N_0.
    is_complex = roots.imag.abs() > 1e-9 * roots.abs()
    rightmost = torch.where(is_complex, roots.real, -math.inf).argmax(-1, keepdim=True)
    imaginary = torch.where(is_complex, roots.imag.abs(), 0.0).gather(-1, rightmost)[:, 0]
    density = imaginary / (math.pi * z) * (dims[0] / min(dims))
    high, low = product_edge(dims)[0], _product_lower_edge(dims)
    return torch.where((at > low) & (at < high), density, torch.zeros_like(density)).view(x.shape)


def _product_lower_edge(dims: Sequence[int]) -> float:
    """Smallest non-zero eigenvalue in the units of `product_edge`; 0 if no factor is the narrowest alone.

    It is where the real roots that start at -r and -r', the two smallest of N_i / N_0, meet: the largest z between.
    """
    ends = sorted(size / dims[0] for size in dims)[:2]
    left, right = -ends[1], -ends[0]
    if left == right:
        return 0.0
    ratios = [dims[0] / size for size in dims[1:]]

    def z(m: float) -> float:
        return (1 + m) / m * math.prod(1 + a * m for a in ratios)

    for _ in range(200):
        third = (right - left) / 3
        left, right = (left + third, right) if z(left + third) < z(right - third) else (left, right - third)
    return z((left + right) / 2)


def bbp(theta: float, gamma: float, tau2: float = 1.0) -> tuple[float, float, float, bool]:
    """Where a spike of strength theta shows: its s^2, the overlaps on the big and the small side, and whether it does.

    W = noise + theta u v^T, u and v of length 1, tau2 = n_big s2 (Baik, Ben Arous, Peche 2005; Benaych-Georges,
    Nadakuditi 2012). Below the threshold theta = sqrt(tau2) gamma^(1/4) the largest s^2 stays at the edge and the
    overlaps are 0.
    """
    _check(gamma)
    y = theta * theta / tau2
    if y <= math.sqrt(gamma):
        return tau2 * (1 + math.sqrt(gamma)) ** 2, 0.0, 0.0, False
    position = tau2 * (1 + y) * (gamma + y) / y
    return position, 1 - (gamma + y) / (y * (y + 1)), 1 - gamma * (1 + y) / (y * (y + gamma)), True


def bbp_inverse(s2: float, gamma: float, tau2: float = 1.0) -> float:
    """The strength theta of a spike that shows at s^2; 0 for one inside the bulk."""
    _check(gamma)
    level = s2 / tau2 - 1 - gamma
    root = level * level - 4 * gamma
    if level <= 0 or root < 0:
        return 0.0
    return math.sqrt(tau2 * (level + math.sqrt(root)) / 2)


def variance(eigenvalues: Tensor, n_big: int, estimator: str, quantile: float = QUANTILES[0.99]) -> float:
    """Variance s2 of the noise from the non-zero eigenvalues lambda = s^2 / n_big.

    estimator: "mean" (biased up by spikes), "median" (Gavish and Donoho 2014), or "bulk": from the median on, the
    mean of those below the Tracy-Widom edge, until they are the same ones.
    """
    if estimator not in ("mean", "median", "bulk"):
        raise ValueError(f"estimator must be 'mean', 'median' or 'bulk', got {estimator!r}")
    if estimator == "mean":
        return float(eigenvalues.mean())
    n = eigenvalues.numel()
    # The mean of the two middle ones where their number is even.
    sigma2 = float(eigenvalues.quantile(0.5)) / mp_median(n / n_big)
    if estimator == "median":
        return sigma2
    kept: Tensor | None = None
    for _ in range(50):
        below = eigenvalues <= tracy_widom_edge(n_big, n, sigma2, quantile)
        if not below.any() or (kept is not None and torch.equal(below, kept)):
            break
        kept, sigma2 = below, float(eigenvalues[below].mean())
    return sigma2
