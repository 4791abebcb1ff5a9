"""Clustered head attention: heads that look at the same tokens share one set of scores at inference."""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, as_mask, visibility
from attnzoo.modules.checks import check_cache, check_input, check_sizes
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.head_clusters import ClusteredCache, HeadClusters, take
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.modules.positions import rotary_tables
from attnzoo.modules.structure import attention_pairs
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import constant, softmax_attention
from attnzoo.rotary import rotate

_FEW_QUERIES = 8
_BLOCK = 128
Table = tuple[Tensor, Tensor]


class ClusteredHeadAttention(nn.Module):
    """Clustered head attention around a trained module (CHAI, Agarwal et al. 2024, arXiv:2403.08058).

    The first probe_tokens tokens of each sequence decide which of its heads attend alike; from then on one head of
    each cluster computes queries, keys and scores for all of it, and values stay per head:

        c(h) = average linkage on 1 - cosine of the heads' weights P_h[:n, :n], down to K clusters
        A_h = softmax(scale q_r k_r^T + visibility)      r the smallest head of the cluster c(h)
        y = concat_h(A_h v_h) Wo + bo

    Shared scores apply to the probe tokens of a prompt too. A sequence with fewer than probe_tokens tokens gets
    the module's own attention; if a cache brings the missing ones, heads are clustered then, once, and earlier
    outputs stay as they were. With K = H it is the wrapped module.

    For inference: parameters are the module's own, and nothing is fine-tuned. Scores are computed once a cluster
    and never all at once, keys stored once a cluster. Its arithmetic is plain PyTorch whatever the module's
    backend. Sequences of one call that cluster alike (one sequence always does) also save the projections of the
    other heads. Unlike the official code it uses causal weights for the probe, and does not mix heads with
    positions in a prompt; dropout is never applied.

    Args:
        attn: a causal MultiHeadAttention, GroupedQueryAttention or MultiQueryAttention; used, not copied.
        num_clusters: clusters K, at most H. `diagnostics.clustering.elbow` proposes one.
        probe_tokens: tokens n that decide.
        probe_causal: False takes weights of the probe over all its n tokens, as the official code does.
        linkage: "average" is the only one.
        allow_grad: run in training mode with gradients all the same.

    Attributes:
        labels: (B, H) clusters of the last call, or None if it was not clustered.
        representatives: (B, K) their smallest heads, likewise.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None

    def __init__(
        self,
        attn: nn.Module,
        num_clusters: int,
        probe_tokens: int = 5,
        probe_causal: bool = True,
        linkage: str = "average",
        *,
        allow_grad: bool = False,
    ) -> None:
        super().__init__()
        if type(attn) not in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
            raise ValueError(
                "attn must be a MultiHeadAttention, GroupedQueryAttention or MultiQueryAttention, whose heads have "
                f"scores of their own and are all active, got {type(attn).__name__}"
            )
        assert isinstance(attn, GroupedQueryAttention)
        check_sizes(num_clusters=num_clusters, probe_tokens=probe_tokens)
        if not attn.causal:
            raise ValueError("attn must be causal, got causal=False")
        if num_clusters > attn.num_heads:
            raise ValueError(f"num_clusters must be at most num_heads, got {num_clusters} and {attn.num_heads}")
        if linkage != "average":
            raise ValueError(f"linkage must be 'average', got {linkage!r}")
        if attn.num_kv_heads == 1 and attn.num_heads > 1:
            warnings.warn("attn has one key head, so that clusters save no key cache", stacklevel=2)
        self.attn = attn
        self.num_clusters = num_clusters
        self.probe_tokens = probe_tokens
        self.probe_causal = probe_causal
        self.linkage = linkage
        self.allow_grad = allow_grad
        self.labels: Tensor | None = None
        self.representatives: Tensor | None = None
        self.train(attn.training)

    @property
    def embed_dim(self) -> int:
        """Width E of input and output."""
        return self.attn.embed_dim

    @property
    def num_heads(self) -> int:
        """Query heads H."""
        return self.attn.num_heads

    @property
    def causal(self) -> bool:
        """True."""
        return self.attn.causal

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: ClusteredCache | KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: has to be None.
            mask: boolean, broadcastable to (B, 1, T, S), True = may attend; or an AttentionMask, not packed. With a
                cache it covers cached and new keys. Keys that no query may attend to are padding, and the probe is
                the first probe_tokens keys of each row that are not.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1.
            cache: from `init_cache`; filled in place.
        """
        if self.training and torch.is_grad_enabled() and not self.allow_grad:
            raise ValueError(
                "ClusteredHeadAttention is for inference: call it in eval mode or under torch.no_grad(), or set "
                "allow_grad=True"
            )
        if context is not None:
            raise ValueError("context must be None: clusters come from self-attention")
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        if self.num_clusters == self.num_heads:
            self.labels = torch.arange(self.num_heads, device=x.device).expand(x.shape[0], -1)
            self.representatives = self.labels
            return self.attn(x, mask=mask, positions=positions, cache=cache)  # type: ignore[no-any-return]
        _check_mask(mask)
        past, limit = 0, None
        if cache is not None:
            check_cache(cache, ClusteredCache, True, None, mask)
            assert isinstance(cache, ClusteredCache)
            cache.admit(x)
            past, limit = cache.length, cache.max_length
        clusters = None if cache is None else cache.clusters
        total = past + x.shape[1]
        if clusters is None and total < self.probe_tokens:
            self.labels = self.representatives = None
            if cache is None:
                return self.attn(x, mask=mask, positions=positions)  # type: ignore[no-any-return]
        table = None
        if self.attn.rope is not None:
            table, _ = rotary_tables(
                self.attn.rope, self.attn.rope_dim, x, x, positions, mask, cross=False, past=past, limit=limit
            )
        v = self.attn.v_proj(x).view(*x.shape[:2], self.attn.num_kv_heads, self.attn.v_head_dim)
        if clusters is None and total < self.probe_tokens:
            assert cache is not None
            q, k = self._project(x, table)
            out = self._plain(q, *cache.probe(q, k, v), mask, past)
        else:
            if clusters is None:
                clusters = self._cluster(x, table, mask, cache)
                if cache is not None:
                    cache.cluster(clusters)
            self.labels, self.representatives = clusters.labels, clusters.representatives
            q, k = self._project(x, table, clusters)
            key_positions = None
            if cache is not None:
                k, v, key_positions = cache.append(k, v)
            out = self._attend(q, k, v, clusters, mask, past, key_positions)
        y: Tensor = self.attn.o_proj(out.flatten(2))
        return y

    def probe(
        self, x: Tensor, *, mask: Tensor | AttentionMask | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Weights of the first probe_tokens tokens of x (B, T, E), which decide the clusters: (B, H, n, n)."""
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        _check_mask(mask)
        table = None
        if self.attn.rope is not None:
            table, _ = rotary_tables(self.attn.rope, self.attn.rope_dim, x, x, positions, mask, cross=False)
        return self._probe_pattern(x, table, mask, None)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ClusteredCache | KeyValueCache:
        """A cache for one request of max_length tokens; with K = H the wrapped module's.

        device and dtype default to those of the module's weights.
        """
        a = self.attn
        if self.num_clusters == self.num_heads:
            return a.init_cache(batch_size, max_length, device, dtype)
        weight = a.q_proj.weight
        return ClusteredCache(
            batch_size,
            max_length,
            self.probe_tokens,
            ((a.num_heads, a.head_dim), (a.num_kv_heads, a.head_dim), (a.num_kv_heads, a.v_head_dim)),
            window=a.sliding_window,
            sink_tokens=a.sink_tokens,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """min(K, G) D + G Dv numbers of that dtype: exact for G = H, else what different key heads take."""
        a = self.attn
        return (min(self.num_clusters, a.num_kv_heads) * a.head_dim + a.num_kv_heads * a.v_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one clustered sequence: T new tokens that look at S keys, T of them new (default S = T).

        The probe's other heads and the clustering are left out.
        """
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections" and "attention"."""
        a, K, E = self.attn, self.num_clusters, self.embed_dim
        S = T if S is None else S
        H, G, D, Dv = a.num_heads, a.num_kv_heads, a.head_dim, a.v_head_dim
        pairs = attention_pairs(T, S, causal=True, window=a.sliding_window, sink_tokens=a.sink_tokens)
        projections = 2 * T * E * (K * D + min(K, G) * D + G * Dv + H * Dv)
        return {"projections": projections, "attention": 2 * (K * D + H * Dv) * pairs}

    def extra_repr(self) -> str:
        """The options."""
        return f"num_clusters={self.num_clusters}, probe_tokens={self.probe_tokens}, probe_causal={self.probe_causal}"

    @property
    def _reads(self) -> tuple[int, ...]:
        """Key/value head of each query head."""
        a = self.attn
        regular = tuple(h * a.num_kv_heads // a.num_heads for h in range(a.num_heads))
        return regular if a._kv_index is None else a._kv_index

    def _project(self, x: Tensor, table: Table | None, clusters: HeadClusters | None = None) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries and keys, (B, T, heads, D): of all heads, or of what clusters need."""
        a, made = self.attn, []
        for i, (linear, norm) in enumerate(((a.q_proj, a.q_norm), (a.k_proj, a.k_norm))):
            D = a.head_dim
            if clusters is not None and clusters.shared is not None and type(linear) is nn.Linear:
                # Slices of the weight are views: a decoding step reads no other head's rows.
                parts = [
                    F.linear(x, linear.weight[h * D : (h + 1) * D],
                             None if linear.bias is None else linear.bias[h * D : (h + 1) * D])
                    for h in clusters.shared[i]
                ]  # fmt: skip
                z = torch.stack(parts, dim=2)
            else:
                z = linear(x).view(*x.shape[:2], (a.num_heads, a.num_kv_heads)[i], D)
                if clusters is not None:
                    z = take(z, (clusters.representatives, clusters.key_heads)[i])
            if norm is not None:
                z = norm(z.to(norm.weight.dtype)).to(z.dtype)
            if table is not None and a.rope is not None:
                z = rotate(z, *table, a.rope.style)
            made.append(z)
        return made[0], made[1]

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, past: int) -> Tensor:
        """The wrapped module's own attention."""
        a = self.attn
        if a._kv_index is not None:
            index = torch.tensor(a._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        return softmax_attention(
            q, k, v, mask=mask, scale=a.scale, softcap=a.logit_softcap,
            alibi_slopes=None if a.alibi_slopes is None else constant(a.alibi_slopes, q.device),
            window=a.sliding_window, sink_tokens=a.sink_tokens, sinks=0.0 if a.sink == "zero" else a.sinks,
            query_start=past, backend=a.backend,
        )  # fmt: skip

    def _cluster(
        self, x: Tensor, table: Table | None, mask: AttentionMask | None, cache: ClusteredCache | None
    ) -> HeadClusters:
        # Diagnostics import modules, so this module can import them only when it runs.
        from attnzoo.diagnostics.heads.clusters import cluster_heads

        labels = cluster_heads(self._probe_pattern(x, table, mask, cache), self.num_clusters)
        return HeadClusters.of(labels, self.num_clusters, self._reads)

    def _probe_pattern(
        self, x: Tensor, table: Table | None, mask: AttentionMask | None, cache: ClusteredCache | None
    ) -> Tensor:
        """Weights (B, H, n, n) of the first n real tokens, cached ones and those of x."""
        n, past = self.probe_tokens, 0 if cache is None else cache.length
        if past + x.shape[1] < n:
            raise ValueError(f"x must have at least the probe_tokens {n}, got {past + x.shape[1]}")
        real = self._first_real(mask, (x.shape[0], x.shape[1], past + x.shape[1]))
        if real is None:
            x = x[:, : n - past]
            table = None if table is None else (table[0][..., : n - past, :], table[1][..., : n - past, :])
        q, k = self._project(x, table)
        if past and cache is not None:
            held_q, held_k, _ = cache.held()
            q, k = torch.cat([held_q, q], 1), torch.cat([held_k, k], 1)
        if real is not None:
            at = real[:, :, None, None]
            q, k = torch.take_along_dim(q, at, 1), torch.take_along_dim(k, at, 1)
        a = self.attn
        k = k[:, :, list(self._reads)]
        index = torch.arange(self.num_heads, device=x.device)
        visible = None
        if self.probe_causal:
            visible = visibility(
                None, (1, 1, n, n), causal=True, window=a.sliding_window, sink_tokens=a.sink_tokens, query_start=0,
                key_positions=None, device=x.device,
            )  # fmt: skip
        high = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q):
            scores = torch.einsum("bthd,bshd->bhts", q.to(high) * a.scale, k.to(high))
            at = torch.arange(n, device=x.device)
            return self._weights(scores, index, at[:, None] - at, visible)

    def _first_real(self, mask: AttentionMask | None, sizes: tuple[int, int, int]) -> Tensor | None:
        """Which n keys (B, n) the probe of each row is; None if it is the first n everywhere."""
        B, T, S = sizes
        allowed = None if mask is None else mask.visible(B, 1, T, S)
        if allowed is None:
            return None
        seen = allowed.expand(B, 1, T, S).any(2)[:, 0]
        n = self.probe_tokens
        fewest = int(seen.sum(1).min()) if B else n
        if fewest < n:
            raise ValueError(f"mask must leave every row at least the probe_tokens {n}, got a row with {fewest}")
        first = seen.int().argsort(dim=1, descending=True, stable=True)[:, :n]
        return None if bool((first == torch.arange(n, device=first.device)).all()) else first

    def _weights(
        self,
        scores: Tensor,
        heads: Tensor,
        ahead: Tensor | None,
        visible: Tensor | None,
        later: Tensor | None = None,
    ) -> Tensor:
        """Attention weights from scaled scores (..., N, T, S) of N heads, numbers (..., N), by the module's options.

        ahead (T, S) are the queries' indices minus the keys', which ALiBi needs; visible broadcasts to the scores;
        later (T, T) hides some of the last T keys, and leaves every query one. The scores are written over.
        """
        a, blind = self.attn, None
        if a.logit_softcap is not None:
            scores = a.logit_softcap * torch.tanh(scores / a.logit_softcap)
        if a.alibi_slopes is not None and ahead is not None:
            slopes = constant(a.alibi_slopes, scores.device)[heads][..., None, None]
            scores = scores - (slopes * ahead.abs()).to(scores.dtype)
        if visible is not None:
            blind = ~visible.any(-1, keepdim=True)
            scores = scores.masked_fill_(~(visible | blind), -math.inf)
        if later is not None:
            scores[..., -later.shape[-1] :].masked_fill_(later, -math.inf)
        if a.sink is None:
            p = torch.softmax(scores, dim=-1)
        else:
            sink = scores.new_zeros(heads.shape) if a.sinks is None else a.sinks.to(scores.dtype)[heads]
            column = sink[..., None, None].expand(*scores.shape[:-1], 1)
            p = torch.softmax(torch.cat([scores, column], -1), dim=-1)[..., :-1]
        return p if blind is None else p.masked_fill(blind, 0.0)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        clusters: HeadClusters,
        mask: AttentionMask | None,
        start: int,
        key_positions: Tensor | None,
    ) -> Tensor:
        """q (B, T, K, D), k (B, S, M, D), v (B, S, G, Dv) -> (B, T, H, Dv)."""
        a = self.attn
        B, T, S = q.shape[0], q.shape[1], k.shape[1]
        ahead = visible = None
        if a.alibi_slopes is not None:
            j = torch.arange(S, device=q.device) if key_positions is None else key_positions
            ahead = torch.arange(start, start + T, device=q.device)[:, None] - j
        if mask is not None or a.sliding_window is not None or T <= _FEW_QUERIES:
            visible = visibility(
                mask, (B, 1, T, S), causal=True, window=a.sliding_window, sink_tokens=a.sink_tokens, query_start=start,
                key_positions=key_positions, device=q.device,
            )  # fmt: skip
        high = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(high) * a.scale, k.to(high)
        with without_autocast(q):
            if T <= _FEW_QUERIES:
                return self._attend_few(q, k, v, clusters, ahead, visible)
            return self._attend_many(q, k, v, clusters, ahead, visible)

    def _attend_few(
        self, q: Tensor, k: Tensor, v: Tensor, clusters: HeadClusters, ahead: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """A few queries: each key and value is read once, and weights are copied to the heads of a cluster."""
        B, T, D = q.shape[0], q.shape[1], q.shape[3]
        S, M, G, Dv = k.shape[1], k.shape[2], v.shape[2], v.shape[3]
        heads = clusters.cell_heads
        grid = q if clusters.cells is None else take(q, clusters.cells)
        grid = grid.transpose(1, 2).reshape(B, M, heads.shape[1] // M * T, D)
        scores = (grid @ k.permute(0, 2, 3, 1)).view(B, heads.shape[1], T, S)
        p = self._weights(scores, heads, ahead, visible).to(v.dtype)
        p = torch.gather(p, 1, clusters.head_cell[:, :, None, None].expand(-1, -1, T, S))
        if self.attn._kv_index is not None:
            v = v[:, :, list(self._reads)]
            G = v.shape[2]
        H = self.num_heads
        out = p.view(B, G, H // G * T, S) @ v.transpose(1, 2)
        return out.view(B, H, T, Dv).transpose(1, 2)

    def _attend_many(
        self, q: Tensor, k: Tensor, v: Tensor, clusters: HeadClusters, ahead: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """Many queries: a block of one cluster's weights at a time, times the values of all its heads side by side."""
        B, T, S = q.shape[0], q.shape[1], k.shape[1]
        out = v.new_empty(B, T, self.num_heads, v.shape[3])
        later = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=q.device).triu(1)
        for b, row in enumerate(clusters.clusters):
            for c, (slot, heads, values, columns) in enumerate(row):
                keys = k[b, :, slot].t()
                wide = v[b][:, values].flatten(1)
                head = clusters.representatives[b, c : c + 1]
                into, column = (torch.tensor(part, device=q.device) for part in (heads, columns))
                for first in range(0, T, _BLOCK):
                    last = min(first + _BLOCK, T)
                    end, seen, cut = S, None, None
                    if visible is None:
                        end, cut = S - T + last, later[: last - first, : last - first]
                    else:
                        seen = visible.expand(B, 1, T, S)[b, :, first:last]
                    scores = q[b, first:last, c] @ keys[:, :end]
                    away = None if ahead is None else ahead[first:last, :end]
                    p = self._weights(scores[None], head, away, seen, cut)[0].to(v.dtype)
                    found = (p @ wide[:end]).view(last - first, len(values), -1)
                    out[b, first:last].index_copy_(1, into, found.index_select(1, column))
        return out


def _check_mask(mask: AttentionMask | None) -> None:
    if mask is None:
        return
    if mask.cu_seqlens is not None:
        raise ValueError("mask must not be packed: a row has one set of clusters")
    dense = mask.dense_mask
    if dense is not None and dense.ndim >= 3 and dense.shape[-3] != 1:
        raise ValueError(f"mask must be the same for all heads, got shape {tuple(dense.shape)}")
