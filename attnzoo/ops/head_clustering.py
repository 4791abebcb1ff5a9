"""Clusters of heads that attend alike (CHAI, arXiv:2403.08058).

Patterns are (B, H, T, T) or (H, T, T), attention weights of queries over keys; a head's features are the pattern of
the first `probe_tokens` tokens, flattened. All results are float64, on the pattern's device. Nothing is copied to the
host, so no call waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.rules import describe, is_integer

TIE = 1e-12
"""Distances closer than this count as equal: rounding must not separate heads that have the same weights."""


def cosine_distance(pattern: Tensor, probe_tokens: int | None = None) -> Tensor:
    """1 - cosine of the heads' patterns, (B, H, H), or (H, H) for one example.

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        probe_tokens: use the pattern of this many first tokens only. Default: all.
    """
    # A sink leaves weights as small as one likes, so that only zeros count as zeros.
    f = pattern_features(pattern, probe_tokens)
    f = torch.nn.functional.normalize(f, dim=-1, eps=torch.finfo(f.dtype).tiny)
    distance = 1 - f @ f.mT
    return distance if pattern.ndim == 4 else distance[0]


def cluster_heads(pattern: Tensor, num_clusters: int, probe_tokens: int | None = None) -> Tensor:
    """Cluster of each head by average linkage on `cosine_distance`, (B, H) or (H,) integers.

    Each example has clusters of its own. The two nearest clusters are merged until num_clusters are left; among
    equally near pairs, the one whose smallest heads come first. Clusters are numbered by their smallest head. Costs
    O(H^3).

    Args:
        pattern: (B, H, T, T) or (H, T, T).
        num_clusters: between 1 and H.
        probe_tokens: use the pattern of this many first tokens only. Default: all.

    Raises:
        ValueError: for a pattern of another shape, or a number outside its range.
    """
    # Weights that are no numbers are as far as can be from all others: they must not spoil other examples.
    distance = cosine_distance(pattern, probe_tokens).nan_to_num(nan=2.0)
    distance = distance if pattern.ndim == 4 else distance[None]
    heads = distance.shape[-1]
    if not is_integer(num_clusters) or not 1 <= num_clusters <= heads:
        raise ValueError(f"num_clusters must lie between 1 and the {heads} heads, got {num_clusters!r}")
    owner = torch.arange(heads, device=pattern.device).expand(distance.shape[0], heads)
    for keep, drop in average_linkage(distance, heads - num_clusters):
        owner = torch.where(owner == drop[:, None], keep[:, None], owner)
    first = owner == torch.arange(heads, device=pattern.device)
    labels = (first.cumsum(1) - 1).gather(1, owner)
    return labels if pattern.ndim == 4 else labels[0]


def cluster_representatives(labels: Tensor, num_clusters: int) -> Tensor:
    """Smallest head of each cluster, (..., num_clusters), from labels (..., H) as `cluster_heads` gives them."""
    heads = labels.shape[-1]
    head = torch.arange(heads, device=labels.device)
    member = labels[..., None, :] == torch.arange(num_clusters, device=labels.device)[:, None]
    return torch.where(member, head, heads).amin(-1)


def average_linkage(distance: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` merges of average linkage, for every example of distances (B, H, H).

    Yields the cluster that is kept and the one that is joined to it, both (B,), named by their smallest heads.
    """
    # A cluster is in the row of its smallest head, so the first smallest entry in reading order is the pair that the
    # rule for ties asks for.
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


def pattern_features(pattern: Tensor, probe_tokens: int | None = None) -> Tensor:
    """Patterns of the first n = probe_tokens tokens (default: all), (B, H, n n) in float64; B is 1 for one example.

    Raises:
        ValueError: for a pattern of another shape, or more tokens than it has.
    """
    if not isinstance(pattern, Tensor):
        raise ValueError(f"pattern must be a tensor (B, H, T, T) or (H, T, T), got {describe(pattern)}")
    if pattern.ndim not in (3, 4) or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(f"pattern must have shape (B, H, T, T) or (H, T, T), got {tuple(pattern.shape)}")
    n, tokens = probe_tokens, pattern.shape[-1]
    if n is None:
        n = tokens
    if not is_integer(n) or not 1 <= n <= tokens:
        raise ValueError(f"probe_tokens must lie between 1 and the {tokens} tokens of the pattern, got {n!r}")
    f = pattern.detach()[..., :n, :n].double().flatten(-2)
    return f if f.ndim == 3 else f[None]
