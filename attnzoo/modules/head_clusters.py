"""What clusters of heads mean for tensors, and a cache that holds the keys of their representatives only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache import KeyValueCache, TokenCache


@dataclass(frozen=True)
class HeadClusters:
    """Clusters of the heads of every sequence, and where their keys lie.

    Attributes:
        labels: (B, H) cluster of each head, numbered by their smallest head.
        representatives: (B, K) the smallest head of each cluster.
        key_heads: (B, M) key heads that representatives read; a row with fewer than M repeats its first.
        cells: (B, M R) cluster in cell r of key slot m, for a grid of M slots by R clusters; spare cells hold 0. None
            where every cluster c lies in cell c, as in multi-head attention.
        cell_heads: (B, M R) their representatives.
        head_cell: (B, H) cell of each head's cluster.
        clusters: for each sequence and cluster its key slot, its heads, its distinct value heads, and which of
            those each head reads.
        shared: representatives and key heads as numbers if all sequences agree, else None.
        reads: key/value head of each head.
    """

    labels: Tensor
    representatives: Tensor
    key_heads: Tensor
    cells: Tensor | None
    cell_heads: Tensor
    head_cell: Tensor
    clusters: tuple[tuple[tuple[int, list[int], list[int], list[int]], ...], ...]
    shared: tuple[tuple[int, ...], tuple[int, ...]] | None
    reads: tuple[int, ...]

    @classmethod
    def of(cls, labels: Tensor, num_clusters: int, reads: tuple[int, ...], slots: int = 1) -> HeadClusters:
        """From labels (B, H) below num_clusters and the key/value head that each head reads; M is at least slots."""
        heads = range(labels.shape[1])
        rows = labels.tolist()
        all_members, all_keys = [], []
        for row in rows:
            members = [[h for h in heads if row[h] == c] for c in range(num_clusters)]
            all_members.append(members)
            all_keys.append(sorted({reads[m[0]] for m in members}))
        slots = max([slots, *map(len, all_keys)])
        held = [[[c for c, m in enumerate(members) if reads[m[0]] == key] for key in keys]
                for members, keys in zip(all_members, all_keys, strict=True)]  # fmt: skip
        depth = max([1, *(len(found) for row in held for found in row)])
        cells, head_cell, clusters = [], [], []
        for members, row_held in zip(all_members, held, strict=True):
            grid, cell, made = [0] * (slots * depth), [0] * len(heads), {}
            for slot, found in enumerate(row_held):
                for r, c in enumerate(found):
                    grid[slot * depth + r] = c
                    values = sorted({reads[h] for h in members[c]})
                    made[c] = (slot, members[c], values, [values.index(reads[h]) for h in members[c]])
                    for h in members[c]:
                        cell[h] = slot * depth + r
            cells.append(grid)
            head_cell.append(cell)
            clusters.append(tuple(made[c] for c in range(len(members))))
        first = [[m[0] for m in members] for members in all_members]
        padded = [keys + keys[:1] * (slots - len(keys)) for keys in all_keys]
        same = bool(rows) and all(row == rows[0] for row in rows) and slots == len(all_keys[0])
        in_order = slots * depth == num_clusters and all(grid == list(range(num_clusters)) for grid in cells)

        def tensor(values: list[list[int]], width: int) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=labels.device).view(len(rows), width)

        return cls(
            labels, tensor(first, num_clusters), tensor(padded, slots),
            None if in_order else tensor(cells, slots * depth),
            tensor([[f[c] for c in grid] for f, grid in zip(first, cells, strict=True)], slots * depth),
            tensor(head_cell, len(heads)), tuple(clusters),
            (tuple(first[0]), tuple(all_keys[0])) if same else None, reads,
        )  # fmt: skip


class ClusteredCache:
    """Keys of representatives only and all values: M D + G Dv numbers a token instead of G (D + Dv).

    M is the number of distinct key heads that representatives read, K in multi-head attention. Until a batch has
    probe_tokens tokens the queries, keys and values of all heads are held; the buffers for max_length tokens are
    allocated when the heads are clustered, since M is known only then.

    Attributes:
        batch_size: sequences B.
        max_length: tokens it may ever see.
        clusters: of the request, or None while fewer than probe_tokens tokens have been seen.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        probe_tokens: int,
        widths: tuple[tuple[int, int], ...],
        *,
        window: int | None = None,
        sink_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Widths are (heads, width) of queries, keys and values."""
        self.batch_size = batch_size
        self.max_length = max_length
        self.probe_tokens = probe_tokens
        self.clusters: HeadClusters | None = None
        self._widths = widths
        self._window: dict[str, Any] = {"window": window, "sink_tokens": sink_tokens}
        self._made: dict[str, Any] = {"device": device, "dtype": dtype}
        self._held: TokenCache = self._probe()

    def _probe(self) -> TokenCache:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        return ProbeCache(self.batch_size, min(self.probe_tokens, self.max_length), self._widths, **self._made)

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self._held.length

    @property
    def streams(self) -> tuple[Tensor, ...]:
        """The buffers, each (B, heads, capacity, width)."""
        return self._held.streams

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take now."""
        return self._held.nbytes

    def admit(self, x: Tensor) -> None:
        """Refuse new tokens that do not fit, before anything is stored; x (B, T, E)."""
        stream = self._held.streams[0]
        dtype, kind = x.dtype, x.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        if x.shape[0] != self.batch_size or dtype != stream.dtype or x.device != stream.device:
            raise ValueError(
                f"cache was made for states of {self.batch_size} sequences in {stream.dtype} on {stream.device}, got "
                f"{x.shape[0]} in {dtype} on {x.device}"
            )
        if self.length + x.shape[1] > self.max_length:
            raise ValueError(
                f"cache is full: {self.length} cached and {x.shape[1]} new tokens exceed its max_length "
                f"{self.max_length}"
            )

    def probe(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Hold all heads' q (B, T, H, D), k (B, T, G, D) and v (B, T, G, Dv); return keys and values so far."""
        assert isinstance(self._held, ProbeCache)
        return self._held.append(q, k, v)

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, length, heads, width) of the probe so far."""
        q, k, v = (stream[:, :, : self.length].transpose(1, 2) for stream in self._held.streams)
        return q, k, v

    def cluster(self, clusters: HeadClusters) -> None:
        """Keep the representatives' keys only, from now on."""
        _, k, v = self.held()
        heads, width = self._widths[2]
        states = KeyValueCache(
            self.batch_size, self.max_length, ((clusters.key_heads.shape[1], self._widths[1][1]), (heads, width)),
            **self._window, **self._made,
        )  # fmt: skip
        if self.length:
            states.append(take(k, clusters.key_heads), v)
        self._held, self.clusters = states, clusters

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k (B, T, M, D) and v (B, T, G, Dv); return all keys, values and their positions."""
        assert isinstance(self._held, KeyValueCache)
        return self._held.append(k, v)

    def reset(self) -> None:
        """Forget everything, the clusters too: the next tokens are a new request."""
        self._held, self.clusters = self._probe(), None

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was, clusters and all; index (B,) integers."""
        self._held.reorder(index)
        if self.clusters is not None:
            slots = self.clusters.key_heads.shape[1]
            labels = self.clusters.labels.index_select(0, index)
            self.clusters = HeadClusters.of(labels, self.clusters.representatives.shape[1], self.clusters.reads, slots)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on. Clustered heads keep their clusters; length 0 is `reset`."""
        if self.clusters is not None and 0 < length < self.probe_tokens:
            raise ValueError(
                f"length must be 0 or at least the probe_tokens {self.probe_tokens} that the heads were clustered by, "
                f"got {length}"
            )
        self._held.truncate(length)
        if length == 0:
            self.reset()


class ProbeCache(TokenCache):
    """Queries (B, H, S, D), keys (B, G, S, D) and values (B, G, S, Dv) of the first few tokens."""

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store all three, each (B, T, heads, width); return all keys and values."""
        (_, k, v), _ = self._append(q, k, v)
        return k, v


def take(x: Tensor, index: Tensor) -> Tensor:
    """Heads index (B, n) of x (B, T, N, D), (B, T, n, D)."""
    # Not take_along_dim, which costs more than a decoding step's scores.
    return torch.gather(x, 2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
