"""Attention whose heads share weights in clusters (CHAI, arXiv:2403.08058): scores per cluster, values per head."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.head_clustering import cluster_representatives
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, masked_softmax
from attnzoo.ops.submodules import is_plain

FEW_QUERIES = 8
"""Queries up to which the weights of all heads are stored at once, as decoding wants it."""
BLOCK = 128
"""Queries whose weights are stored at once otherwise, one cluster at a time."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of every sequence.

    Attributes:
        index: (B, n) their numbers.
        shared: the same as integers if all sequences have the same, else None.
    """

    index: Tensor
    shared: tuple[int, ...] | None = None

    def of(self, x: Tensor) -> Tensor:
        """These heads of x (B, T, N, D), (B, T, n, D)."""
        # Not take_along_dim, which costs more than a decoding step's scores.
        return torch.gather(x, 2, self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def projected(self, linear: nn.Module, x: Tensor, width: int) -> Tensor:
        """Their outputs (B, T, n, width) of a projection; the others are not computed if it is plain and all agree."""
        if self.shared is None or not is_plain(linear):
            return self.of(linear(x).unflatten(-1, (-1, width)))
        assert isinstance(linear, nn.Linear)
        # Slices of the weight are views, so a decoding step reads no other head's rows.
        rows = [slice(head * width, (head + 1) * width) for head in self.shared]
        weight, bias = linear.weight, linear.bias
        return torch.stack([F.linear(x, weight[r], None if bias is None else bias[r]) for r in rows], dim=2)


@dataclass(frozen=True, eq=False)
class HeadClusters:
    """Clusters of the heads of every sequence, and the grouped-query scores of their representatives.

    C query heads share M key heads evenly, C / M each. Every cluster has a query head; where key heads have fewer
    clusters than others, query heads that no head reads fill up their group.

    Attributes:
        labels: (B, H) cluster of each head, numbered by their smallest head.
        representatives: (B, K) the smallest head of each cluster.
        queries: the C heads whose queries are needed.
        keys: the M key heads that representatives read; a sequence with fewer repeats its first.
        source: (B, H) which of the C query heads each head takes its weights from.
        rows: source as integers.
        reads: key/value head of each head.
    """

    labels: Tensor
    representatives: Tensor
    queries: Heads
    keys: Heads
    source: Tensor
    rows: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...]

    @classmethod
    def of(cls, labels: Tensor, num_clusters: int, reads: tuple[int, ...], slots: int = 1) -> HeadClusters:
        """From labels (B, H) below num_clusters and the key/value head that each head reads; M is at least slots."""
        first = cluster_representatives(labels, num_clusters)
        # Representatives ascend, so those that read one key head are neighbours.
        read = torch.tensor(reads, device=labels.device)[first]
        slot = F.pad(read.diff(dim=1).sign(), (1, 0)).cumsum(1)
        rank = torch.arange(num_clusters, device=labels.device) - torch.searchsorted(slot, slot)
        slots = max([slots, *(slot[:, -1] + 1).tolist()])
        depth = max([1, *(rank.amax(1) + 1).tolist()])
        place = slot * depth + rank
        queries = first[:, :1].repeat(1, slots * depth).scatter(1, place, first)
        keys = read[:, :1].repeat(1, slots).scatter(1, slot, read)
        source = place.gather(1, labels)
        rows = tuple(tuple(row) for row in source.tolist())
        alike = len(set(rows)) == 1
        needed = [Heads(part, tuple(part[0].tolist()) if alike else None) for part in (queries, keys)]
        return cls(labels, first, needed[0], needed[1], source, rows, reads)

    @property
    def depth(self) -> int:
        """Query heads C / M of a key head."""
        return self.queries.index.shape[1] // self.keys.index.shape[1]

    def reorder(self, index: Tensor) -> HeadClusters:
        """Clusters of the sequences index (B,), with as many key heads."""
        labels = self.labels.index_select(0, index)
        return self.of(labels, self.representatives.shape[1], self.reads, self.keys.index.shape[1])


def clustered_attention(
    q: Tensor, k: Tensor, v: Tensor, clusters: HeadClusters, view: Visibility, rules: ScoreRules
) -> Tensor:
    """Attention of H heads that take the weights of their clusters' representatives, (B, T, H, Dv).

    Args:
        q: queries (B, T, C, D) of `clusters.queries`.
        k: keys (B, S, M, D) of `clusters.keys`.
        v: values (B, S, G, Dv); G divides H.
        clusters: of the heads.
        view: which key each query may attend to; its mask is the same for all heads.
        rules: scale, soft-cap, and ALiBi slopes and sinks of all H heads.
    """
    T, S = q.shape[1], k.shape[1]
    scores = _Scores(rules, view, (q.shape[0], 1, T, S))
    if (observer := current_observer()) is not None:
        # As attention of all heads, each with the query, key, slope and sink of its representative.
        heads = clusters.representatives.gather(1, clusters.labels)
        bias, sinks = scores.bias(heads, slice(T), slice(S)), None if rules.sinks is None else 0.0
        each = Heads(clusters.source).of(q), Heads(clusters.source // clusters.depth).of(k)
        shown = ScoreRules(rules.scale, rules.softcap, bias=bias, sinks=sinks)
        observer(Observation("softmax_attention", *each, v, view, shown))
    attend = _attend_few if T <= FEW_QUERIES else _attend_many
    with without_autocast(q):
        return attend(*_scaled(q, k, rules), v, clusters, scores)


def attention_weights(q: Tensor, k: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """Weights (B, H, T, S) of queries (B, T, H, D) over keys (B, S, G, D); G divides H. Arguments as above."""
    B, T, H, _ = q.shape
    scores = _Scores(rules, view, (B, 1, T, k.shape[1]))
    with without_autocast(q):
        return scores.all_weights(*_scaled(q, k, rules), torch.arange(H, device=q.device))


def _scaled(q: Tensor, k: Tensor, rules: ScoreRules) -> tuple[Tensor, Tensor]:
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(compute_dtype) * rules.scale, k.to(compute_dtype)


@dataclass(frozen=True, eq=False)
class _Scores:
    """How the scores of one call become weights, for any of its heads; shape is (B, 1, T, S)."""

    rules: ScoreRules
    view: Visibility
    shape: tuple[int, int, int, int]

    def bias(self, heads: Tensor, rows: slice, keys: slice) -> Tensor | None:
        """What is added to scores (..., N, t, s) of these heads (..., N): ALiBi, and learned sinks, which become 0."""
        bias = None
        if self.rules.alibi_slopes is not None:
            i, j = self.view.indices(*self.shape[2:], heads.device)
            bias = -self.rules.alibi_slopes[heads][..., None, None] * (i[rows, None] - j[keys]).abs()
        if isinstance(self.rules.sinks, Tensor):
            sinks = self.rules.sinks[heads][..., None, None]
            bias = -sinks if bias is None else bias - sinks
        return bias

    def weights(
        self,
        scores: Tensor,
        heads: Tensor,
        rows: slice,
        keys: slice,
        visible: Tensor | None,
        later: Tensor | None = None,
    ) -> Tensor:
        """Weights (..., N, t, s) from the scaled products of these heads (..., N), rows and keys.

        later (t, t) hides some of the last t keys, in place; every query must see one.
        """
        cap, bias = self.rules.softcap, self.bias(heads, rows, keys)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if later is not None:
            scores[..., -later.shape[-1] :].masked_fill_(later, -math.inf)
        return masked_softmax(scores, visible, None if self.rules.sinks is None else 0.0)

    def all_weights(self, q: Tensor, k: Tensor, heads: Tensor) -> Tensor:
        """Weights (B, C, T, S) of scaled queries (B, T, C, D) that share keys (B, S, M, D) evenly."""
        (B, T, C, D), (S, M) = q.shape, k.shape[1:3]
        grouped = q.transpose(1, 2).reshape(B, M, C // M * T, D)
        scores = (grouped @ k.permute(0, 2, 3, 1)).view(B, C, T, S)
        return self.weights(scores, heads, slice(T), slice(S), self.view.dense(self.shape, q.device))

    def blocks(self, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None, Tensor | None]]:
        """Blocks of queries, the keys in their reach, and for `weights` visible (B, 1, t, s) and later."""
        (B, _, T, S), view = self.shape, self.view
        # Causality alone hides but the last keys of a block; a mask of all its scores would take time.
        bare = view.mask is None and view.window is None and view.key_positions is None
        triangle = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=device).triu(1)
        for first in range(0, T, BLOCK):
            rows = slice(first, min(first + BLOCK, T))
            keys, size = view.keys_of(rows, T, S), rows.stop - first
            visible = None if bare else view.dense(self.shape, device, rows, keys)
            visible = None if visible is None else visible.expand(B, 1, *visible.shape[-2:])
            yield rows, keys, visible, triangle[:size, :size] if bare else None


def _attend_few(q: Tensor, k: Tensor, v: Tensor, clusters: HeadClusters, scores: _Scores) -> Tensor:
    """Every key and value is read once, and weights are copied to the heads of a cluster."""
    (B, T), (S, G, Dv), H = q.shape[:2], v.shape[1:], len(clusters.reads)
    p = scores.all_weights(q, k, clusters.queries.index).to(v.dtype)
    p = torch.gather(p, 1, clusters.source[:, :, None, None].expand(-1, -1, T, S))
    out = p.view(B, G, H // G * T, S) @ v.transpose(1, 2)
    return out.view(B, H, T, Dv).transpose(1, 2)


def _attend_many(q: Tensor, k: Tensor, v: Tensor, clusters: HeadClusters, scores: _Scores) -> Tensor:
    """A block of one cluster's weights at a time, times the values of all its heads side by side."""
    out = v.new_empty(*q.shape[:2], len(clusters.reads), v.shape[3])
    share, blocks = out.shape[2] // v.shape[2], list(scores.blocks(q.device))
    for b, query in [(b, query) for b, row in enumerate(clusters.rows) for query in sorted(set(row))]:
        heads = [head for head, source in enumerate(clusters.rows[b]) if source == query]
        groups = sorted({head // share for head in heads})
        columns = [groups.index(head // share) for head in heads]
        into, read = (torch.tensor(numbers, device=v.device) for numbers in (heads, columns))
        values, keys_t = v[b][:, groups].flatten(1), k[b, :, query // clusters.depth].t()
        head = clusters.queries.index[b, query, None]
        for rows, keys, visible, later in blocks:
            seen = None if visible is None else visible[b]
            p = scores.weights((q[b, rows, query] @ keys_t[:, keys])[None], head, rows, keys, seen, later)[0]
            outputs = (p.to(v.dtype) @ values[keys]).view(len(p), len(groups), -1)
            out[b, rows].index_copy_(1, into, outputs.index_select(1, read))
    return out


def first_real(mask: AttentionMask | None, x: Tensor, keys: int, n: int) -> Tensor:
    """Which n keys (B, n), in order, the probe of each row is: those that some query of x may attend to."""
    B, T, _ = x.shape
    allowed = None if mask is None else mask.visible(B, 1, T, keys, x.device)
    if allowed is None:
        return torch.arange(n, device=x.device).expand(B, n)
    seen = allowed.expand(B, 1, T, keys).any(2)[:, 0]
    fewest = min([n, *seen.sum(1).tolist()])
    if fewest < n:
        raise ValueError(f"mask must leave every row at least the probe_tokens {n}, got a row with {fewest}")
    return seen.int().argsort(dim=1, descending=True, stable=True)[:, :n]
