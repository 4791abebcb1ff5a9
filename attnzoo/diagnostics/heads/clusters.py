"""Heads that attend alike: clusters, their error, and how many of them to keep (CHAI, arXiv:2403.08058).

Patterns are (B, H, T, T) or (H, T, T), attention weights of queries over keys; a head's features are the pattern of
the first `probe_tokens` tokens, flattened. Everything is float64 and on the pattern's device, and no value is read
back, so a GPU need not be waited for.

The cosine of two causal patterns is high for any two heads: the first row is always (1, 0, 0, ...), and a shared
first-token sink does the rest. Compare with `head_correlation` or a longer probe before trusting few clusters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TIE = 1e-12
"""Distances closer than this are equal: heads with the same weights must not be told apart by rounding."""


def cosine_distance(pattern: Tensor, probe_tokens: int | None = None) -> Tensor:
    """1 - cosine of the heads' patterns, (B, H, H), or (H, H) for one example.

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        probe_tokens: use the pattern of this many first tokens only. Default: all.
    """
    f = torch.nn.functional.normalize(_features(pattern, probe_tokens), dim=-1)
    return _like(pattern, 1 - f @ f.mT)


def head_correlation(pattern: Tensor, probe_tokens: int | None = None) -> Tensor:
    """Pearson correlation of the heads' flattened patterns, (B, H, H), or (H, H) for one example.

    Unlike `similarity.attention_correlation` it is per example and counts the entries above the diagonal, as CHAI's
    features do. A head whose pattern is constant has no correlation: NaN.

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        probe_tokens: use the pattern of this many first tokens only. Default: all.
    """
    f = _features(pattern, probe_tokens)
    f = f - f.mean(-1, keepdim=True)
    size: Tensor = torch.linalg.vector_norm(f, dim=-1, keepdim=True)
    return _like(pattern, (f / size) @ (f / size).mT)


def cluster_heads(pattern: Tensor, num_clusters: int, probe_tokens: int | None = None) -> Tensor:
    """Cluster of each head by average linkage on `cosine_distance`, (B, H) or (H,) integers.

    Examples are clustered apart. The two nearest clusters are merged until num_clusters are left; among equally near
    ones, those whose smallest heads come first. Clusters are numbered by their smallest head. Costs O(H^3).

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        num_clusters: between 1 and H.
        probe_tokens: use the pattern of this many first tokens only. Default: all.

    Raises:
        ValueError: for a pattern of another shape, or a number outside its range.
    """
    distance = cosine_distance(pattern, probe_tokens)
    distance = distance if pattern.ndim == 4 else distance[None]
    heads = distance.shape[-1]
    if not 1 <= num_clusters <= heads:
        raise ValueError(f"num_clusters must lie between 1 and the {heads} heads, got {num_clusters}")
    owner = torch.arange(heads, device=pattern.device).expand(distance.shape[0], heads)
    for keep, drop in _merges(distance, heads - num_clusters):
        owner = torch.where(owner == drop[:, None], keep[:, None], owner)
    first = owner == torch.arange(heads, device=pattern.device)
    return _like(pattern, (first.cumsum(1) - 1).gather(1, owner))


def cluster_representatives(labels: Tensor, num_clusters: int) -> Tensor:
    """Smallest head of each cluster, (..., num_clusters), from labels (..., H) as `cluster_heads` gives them."""
    heads = labels.shape[-1]
    head = torch.arange(heads, device=labels.device)
    member = labels[..., None, :] == torch.arange(num_clusters, device=labels.device)[:, None]
    return torch.where(member, head, heads).amin(-1)


def chai_cluster_error(patterns: Tensor, probe_tokens: int = 5) -> Tensor:
    """What k clusters lose: sum over examples and heads of |f_h - mean of its cluster|^2, (H,); entry k - 1 is for k.

    The clusters are those of `cluster_heads`. It never rises with k and ends at exactly 0, and `elbow` picks a k.

    Args:
        patterns: (B, H, T, T) or (H, T, T), of texts that stand for the model's use.
        probe_tokens: tokens of the probe, at most T.
    """
    f = _features(patterns, probe_tokens)
    B, H, _ = f.shape
    distance = cosine_distance(patterns, probe_tokens).reshape(B, H, H)
    row = torch.arange(B, device=f.device)
    size = f.new_ones(B, H)
    error = f.new_zeros(H)
    for step, (keep, drop) in enumerate(_merges(distance, H - 1)):
        # Ward's identity: a merge adds n m / (n + m) |difference of means|^2, which no rounding makes negative.
        n, m = size[row, keep], size[row, drop]
        a, b = f[row, keep], f[row, drop]
        error[H - 2 - step] = error[H - 1 - step] + (n * m / (n + m) * (a - b).square().sum(-1)).sum()
        f = f.index_put((row, keep), (n[:, None] * a + m[:, None] * b) / (n + m)[:, None])
        size = size.index_put((row, keep), n + m)
    return error


def elbow(error: Tensor) -> int:
    """Number of clusters k at the elbow of the errors (H,) of k = 1 .. H.

    With both axes scaled to [0, 1], the k that lies farthest below the chord from (1, error of 1) to (H, error of H);
    the first such k, and 1 if the error does not change.

    Raises:
        ValueError: unless error is a vector of at least one finite number.
    """
    error = torch.as_tensor(error).detach().double()
    if error.ndim != 1 or not error.numel() or not bool(error.isfinite().all()):
        raise ValueError(f"error must be a vector of finite numbers, got {error.tolist()}")
    heads, drop = error.numel(), error[0] - error[-1]
    if heads == 1 or float(drop.abs()) <= TIE * max(float(error.abs().max()), 1e-300):
        return 1
    along = torch.arange(heads, dtype=torch.float64, device=error.device) / (heads - 1)
    below = 1 - along - (error - error[-1]) / drop
    return int((below >= below.max() - TIE).int().argmax()) + 1


def _merges(distance: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Average linkage of every example, (B, H, H): yields the clusters (B,) to keep and to join to it, by first head.

    A cluster sits in the row of its smallest head, so the first smallest entry in reading order is the pair that the
    rule for ties asks for.
    """
    B, H, _ = distance.shape
    row = torch.arange(B, device=distance.device)
    upper = torch.ones(H, H, dtype=torch.bool, device=distance.device).triu(1)
    size = distance.new_ones(B, H)
    alive = torch.ones(B, H, dtype=torch.bool, device=distance.device)
    for _ in range(count):
        open_pairs = upper & alive[:, :, None] & alive[:, None, :]
        flat = distance.masked_fill(~open_pairs, torch.inf).flatten(1)
        pair = (flat <= flat.amin(1, keepdim=True) + TIE).int().argmax(1)
        keep, drop = pair // H, pair % H
        yield keep, drop
        n, m = size[row, keep][:, None], size[row, drop][:, None]
        mean = (n * distance[row, keep] + m * distance[row, drop]) / (n + m)
        distance = distance.index_put((row, keep), mean)
        distance = distance.transpose(1, 2).index_put((row, keep), mean).transpose(1, 2)
        size = size.index_put((row, keep), (n + m)[:, 0])
        alive = alive.index_put((row, drop), alive.new_zeros(()))


def _features(pattern: Tensor, probe_tokens: int | None) -> Tensor:
    """(B, H, n n) in float64."""
    if pattern.ndim not in (3, 4) or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(f"pattern must have shape (B, H, T, T) or (H, T, T), got {tuple(pattern.shape)}")
    n, tokens = probe_tokens, pattern.shape[-1]
    if n is None:
        n = tokens
    if not 1 <= n <= tokens:
        raise ValueError(f"probe_tokens must lie between 1 and the {tokens} tokens of the pattern, got {n}")
    f = pattern.detach()[..., :n, :n].double().flatten(-2)
    return f if f.ndim == 3 else f[None]


def _like(pattern: Tensor, found: Tensor) -> Tensor:
    return found if pattern.ndim == 4 else found[0]
