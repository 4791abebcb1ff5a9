"""Selective attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache import CacheLayout, KeyValueCache, SelectionCache
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.selective_attention import selective_attention
from attnzoo.rules import COUNT, POSITIVE, SWITCH, check, check_options, describe, numbers_of


class SelectiveAttention(GroupedQueryAttention):
    """Selective attention (Leviathan, Kalman and Matias 2024, arXiv:2410.02703), without new parameters.

    Queries of one head, the selection head m, say which keys later tokens no longer need:

        S_ij = relu(s_mij)              for j < i; 0 for a document's first token and where j is not visible to i
        F_ij = sum_{l < i} S_lj         what tokens before i have taken from j
        o_h = softmax_j(s_hij - F_ij + visibility) v_j          in all heads, m included

    with the scores s of `GroupedQueryAttention`. No code was released; the equations follow the paper's listing.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        selection_head: the head m. It cannot be pruned.
        protect_first: whether nothing is taken from a document's first token.
        prune_threshold: keys of which F exceeds it have weight 0. It changes the weight of such a key by
            exp(-prune_threshold) at most, relative to what it would be without F, and caches evict it. None: all keys
            stay.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are recomputed in the
            backward pass. None: all at once.
        options: the keyword options of `GroupedQueryAttention` but sink, sink_tokens, alibi, logit_softcap, kdim and
            vdim; causal must be True, and backend is "auto" or "eager" (all scores at once). Caches keep all keys, with
            a window too.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type: type[SelectionCache] = SelectionCache
    caches_all_tokens = True  # F covers all keys.
    takes_bias = False
    takes_left_padding = False  # The first token of a row is protected.
    shown = ("selection_head", "prune_threshold", "rope", "sliding_window", "pruned_heads")
    sequence_reason = "what tokens drop for later ones is summed over the border of a shard"

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        selection_head: int = 0,
        protect_first: bool = True,
        prune_threshold: float | None = None,
        chunk_size: int | None = 128,
        **options: Any,
    ) -> None:  # fmt: skip
        for name in ("sink", "sink_tokens", "alibi", "logit_softcap", "kdim", "vdim"):
            if options.get(name):
                raise ValueError(f"{name} is not defined for selective attention, got {options[name]!r}")
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, **options)
        if not self.causal:
            raise ValueError("causal must be True: queries choose for later ones, got causal=False")
        check("selection_head", selection_head, COUNT)
        check("protect_first", protect_first, SWITCH)
        if prune_threshold is not None:
            check("prune_threshold", prune_threshold, POSITIVE)
        if selection_head >= num_heads:
            raise ValueError(f"selection_head must be below num_heads, got {selection_head} and {num_heads}")
        check_options(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        self.selection_head = int(selection_head)
        self.protect_first = protect_first
        self.prune_threshold = None if prune_threshold is None else float(prune_threshold)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, without context."""
        if context is not None:
            raise ValueError(f"context must be None: its tokens choose nothing; got {describe(context)}")
        call = begin(self, x, None, mask, positions, cache)
        assert cache is None or isinstance(cache, SelectionCache)
        q, k, v = self.project(x, *call.sources)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k, v) as (k, v):
            k, v = self.heads.spread(k, v)
            out, removed = selective_attention(
                q, k, v, call.view, head=self.heads.kept.index(self.selection_head), scale=self.scale,
                removed=None if cache is None else cache.removed(), real=call.real_tokens(x),
                protect_first=self.protect_first, threshold=self.prune_threshold,
                kept=0 if cache is None else cache.ROWS, dropout=self.weight_dropout, chunk_size=self.chunk_size,
                backend=self.backend,
            )  # fmt: skip
            if cache is not None:
                cache.store_removed(removed, x.shape[1])
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SelectionCache:  # fmt: skip
        """As the base's for all tokens, with what was taken from each."""
        cache: SelectionCache = super().init_cache(batch_size, max_length, device, dtype)
        cache.make_sums(self.prune_threshold)
        return cache

    def cache_layout(self) -> CacheLayout:
        """As the base's, and the threshold, beyond which tokens are evicted."""
        layout = super().cache_layout()
        evicts = () if self.prune_threshold is None else ((self.prune_threshold,),)
        return layout._replace(widths=(*layout.widths, *evicts))

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Keys, values, and F for the next query and the last 16, in numbers of at least 32 bits."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return super().cache_bytes_per_token(dtype) + (self.cache_type.ROWS + 1) * wide

    def prune_heads(self, indices: Iterable[int]) -> None:
        """As the base's; the selection head, which all others need, is refused."""
        indices = numbers_of("indices", indices)
        if self.selection_head in indices:
            raise ValueError(f"indices must not name the selection head {self.selection_head}, got {indices}")
        super().prune_heads(indices)
