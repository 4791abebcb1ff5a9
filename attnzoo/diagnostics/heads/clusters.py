"""How many clusters of similar heads a layer has (CHAI, arXiv:2403.08058): their error, and the elbow of its curve.

The clusters are those of `attnzoo.ops.head_clustering`, whose functions are available here too. Patterns are
(B, H, T, T) or (H, T, T), attention weights of queries over keys. All results are float64, on the pattern's device.

The cosine of two causal patterns is high for any two heads: the first row is always (1, 0, 0, ...), and most heads
share a sink at the first token. Compare with `head_correlation` or a longer probe before trusting few clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.diagnostics.arguments import check_tensor
from attnzoo.ops.head_clustering import (
    TIE,
    average_linkage,
    cluster_heads,
    cluster_representatives,
    cosine_distance,
    pattern_features,
)
from attnzoo.rules import INTEGER, check, describe, is_real

__all__ = [
    "chai_cluster_error",
    "cluster_heads",
    "cluster_representatives",
    "cosine_distance",
    "elbow",
    "head_correlation",
]


def head_correlation(pattern: Tensor, probe_tokens: int | None = None) -> Tensor:
    """Pearson correlation of the heads' flattened patterns, (B, H, H), or (H, H) for one example.

    Unlike `similarity.attention_correlation` it is per example and counts the entries above the diagonal, as CHAI's
    features do. A head whose pattern is constant has no correlation: NaN.

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        probe_tokens: use the pattern of this many first tokens only. Default: all.
    """
    _check(pattern, probe_tokens)
    f = pattern_features(pattern, probe_tokens)
    f = f - f.mean(-1, keepdim=True)
    size: Tensor = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    correlation = (f / size) @ (f / size).mT
    return correlation if pattern.ndim == 4 else correlation[0]


def _check(pattern: object, probe_tokens: object) -> None:
    """Raise ValueError unless these are a finite tensor and a number of tokens."""
    check_tensor("pattern", pattern)
    if not bool(pattern.isfinite().all()):  # type: ignore[attr-defined]
        raise ValueError("pattern must be finite, got NaN or infinite entries")
    if probe_tokens is not None:
        check("probe_tokens", probe_tokens, INTEGER)


def chai_cluster_error(patterns: Tensor, probe_tokens: int = 5) -> Tensor:
    """What k clusters lose: sum over examples and heads of |f_h - mean of its cluster|^2, (H,); entry k - 1 is for k.

    The clusters are those of `cluster_heads`. The error never rises with k and ends at exactly 0; `elbow` picks a k.

    Args:
        patterns: (B, H, T, T) or (H, T, T), of texts that are typical of the model's use.
        probe_tokens: tokens of the probe, at most T.
    """
    _check(patterns, probe_tokens)
    f = pattern_features(patterns, probe_tokens)
    B, H, _ = f.shape
    distance = cosine_distance(patterns, probe_tokens).reshape(B, H, H)
    row = torch.arange(B, device=f.device)
    size = f.new_ones(B, H)
    error = f.new_zeros(H)
    for step, (keep, drop) in enumerate(average_linkage(distance, H - 1)):
        # Ward's identity: a merge adds n m / (n + m) |difference of means|^2, which no rounding makes negative.
        n, m = size[row, keep], size[row, drop]
        a, b = f[row, keep], f[row, drop]
        error[H - 2 - step] = error[H - 1 - step] + (n * m / (n + m) * (a - b).square().sum(-1)).sum()
        f = f.index_put((row, keep), (n[:, None] * a + m[:, None] * b) / (n + m)[:, None])
        size = size.index_put((row, keep), n + m)
    return error


def elbow(error: Tensor) -> int:
    """Number of clusters k at the elbow of the errors (H,) of k = 1 .. H.

    With both axes scaled to [0, 1], the k that is farthest below the chord from (1, error of 1) to (H, error of H);
    the first such k, and 1 if the error does not change.

    Raises:
        ValueError: unless error is a vector of at least one finite number.
    """
    numbers = isinstance(error, Tensor) or (hasattr(error, "__len__") and all(map(is_real, error)))
    error = torch.as_tensor(error).detach().double() if numbers else error
    if not isinstance(error, Tensor) or error.is_meta:
        raise ValueError(f"error must be a vector of finite numbers, got {describe(error)}")
    if error.ndim != 1 or not error.numel() or not bool(error.isfinite().all()):
        raise ValueError(f"error must be a vector of finite numbers, got {error.tolist()}")
    heads, drop = error.numel(), error[0] - error[-1]
    if heads == 1 or float(drop.abs()) <= TIE * max(float(error.abs().max()), 1e-300):
        return 1
    along = torch.arange(heads, dtype=torch.float64, device=error.device) / (heads - 1)
    below = 1 - along - (error - error[-1]) / drop
    return int((below >= below.max() - TIE).int().argmax()) + 1
