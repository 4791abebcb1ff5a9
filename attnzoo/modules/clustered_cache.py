"""The cache of clustered heads: keys of their representatives only."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attnzoo.cache import CacheLayout, KeyValueCache, TokenCache, check_held, checked_rows
from attnzoo.ops.clustered_attention import HeadClusters
from attnzoo.rules import check_options


class ClusteredLayout(NamedTuple):
    """The layout of queries, keys and values of all heads, and how heads are clustered.

    Attributes:
        widths: (heads, width) of queries, keys and values.
        window: keys that a query sees at most, or None.
        sink_tokens: leading keys that stay.
        num_clusters: clusters K.
        probe_tokens: tokens that decide.
    """

    widths: tuple[tuple[int, ...], ...]
    window: int | None
    sink_tokens: int
    num_clusters: int
    probe_tokens: int

    def __str__(self) -> str:
        layout = CacheLayout(self.widths, self.window, self.sink_tokens)
        return f"{layout}, {self.num_clusters} clusters by {self.probe_tokens} probe tokens"


class ProbeCache(TokenCache):
    """Queries (B, H, S, D), keys (B, G, S, D) and values (B, G, S, Dv) of the first few tokens."""

    def held(self) -> tuple[Tensor, ...]:
        """Queries, keys and values so far, (B, length, heads, width)."""
        return tuple(buffer[:, :, : self.length].transpose(1, 2) for buffer in self.buffers)


class ClusteredCache:
    """Keys of representatives only and all values: M D + G Dv numbers per token instead of G (D + Dv).

    M is the number of distinct key heads that representatives read, K in multi-head attention. Until a batch has
    probe_tokens tokens the queries, keys and values of all heads are held; the buffers for max_length tokens are
    allocated when the heads are clustered, since M is known only then.

    Attributes:
        batch_size: sequences B.
        max_length: tokens it may ever see.
        layout: what modules it fits.
        states: of the tokens so far, a `ProbeCache` until the heads are clustered.
        clusters: of the request, or None while fewer than probe_tokens tokens have been seen.
    """

    states: ProbeCache | KeyValueCache
    clusters: HeadClusters | None

    def __init__(self, batch_size: int, max_length: int, layout: ClusteredLayout, **factory_kwargs: Any) -> None:
        """factory_kwargs are device and dtype of the buffers."""
        check_options(batch_size=batch_size, max_length=max_length, **factory_kwargs)
        self.batch_size = batch_size
        self.max_length = max_length
        self.layout = layout
        self._factory_kwargs = factory_kwargs
        self.reset()

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.states.length

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers, each (B, heads, capacity, width)."""
        return self.states.buffers

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take now."""
        return self.states.nbytes

    def check_fits(self, v: Tensor) -> None:
        """Refuse values (B, T, G, Dv) of another batch, dtype or device."""
        own = self.buffers[0]
        if (v.shape[0], v.dtype, v.device) != (self.batch_size, own.dtype, own.device):
            raise ValueError(
                f"cache was made for states of {self.batch_size} sequences in {own.dtype} on {own.device}, got "
                f"{v.shape[0]} in {v.dtype} on {v.device}"
            )

    def clustered(self, clusters: HeadClusters) -> KeyValueCache:
        """The states of clustered heads: those of the cache, or new ones that start with what a probe holds."""
        if isinstance(self.states, KeyValueCache):
            return self.states
        (_, k, v), layout = self.states.held(), self.layout
        k = clusters.keys.of(k)
        states = KeyValueCache(
            self.batch_size, self.max_length, ((k.shape[2], k.shape[3]), (v.shape[2], v.shape[3])),
            window=layout.window, sink_tokens=layout.sink_tokens, **self._factory_kwargs,
        )  # fmt: skip
        if self.length:
            states.append(k, v)
        return states

    def reset(self) -> None:
        """Forget everything, the clusters too: the next tokens are a new request."""
        tokens, widths = min(self.layout.probe_tokens, self.max_length), self.layout.widths
        self.states = ProbeCache(self.batch_size, tokens, widths, **self._factory_kwargs)  # type: ignore[arg-type]
        self.clusters = None

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] was, clusters and all; index (B,) integers."""
        index = checked_rows(index, self.batch_size)
        self.states.reorder(index)
        self.clusters = None if self.clusters is None else self.clusters.reorder(index)

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on. Clustered heads keep their clusters; length 0 is `reset`."""
        check_held(length, self.length)
        probe = self.layout.probe_tokens
        if self.clusters is not None and 0 < length < probe:
            raise ValueError(
                f"length must be 0 or at least the probe_tokens {probe} that the heads were clustered by, got {length}"
            )
        self.states.truncate(length)
        if length == 0:
            self.reset()
