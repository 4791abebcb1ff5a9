"""Clustered head attention: heads that look at the same tokens share one set of scores at inference."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, Visibility, as_mask
from attnzoo.modules.call import Call, Mask, begin
from attnzoo.modules.checks import check_input, counted_tokens
from attnzoo.modules.clustered_cache import ClusteredCache, ClusteredLayout
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import attention_pairs
from attnzoo.modules.hints import HintedCall
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.modules.recorded import Recorded
from attnzoo.ops.clustered_attention import HeadClusters, attention_weights, clustered_attention, first_real
from attnzoo.ops.head_clustering import cluster_heads
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import place_of
from attnzoo.rotary import RotaryTable
from attnzoo.rules import check_options, check_sizes, describe
from attnzoo.tracing import has_values


def _of_wrapped(name: str) -> Any:
    """A property: the wrapped module's."""

    def get(self: ClusteredHeadAttention) -> Any:
        return getattr(self.attn, name)

    get.__doc__ = f"The wrapped module's {name}."
    return property(get)


class ClusteredHeadAttention(Recorded, HintedCall, nn.Module):
    """Clustered head attention around a trained module (CHAI, Agarwal et al. 2024, arXiv:2403.08058).

    The first probe_tokens tokens of each sequence decide which of its heads attend alike; from then on one head of
    each cluster computes queries, keys and scores for all of it, and values stay per head:

        c(h) = average linkage on 1 - cosine of the heads' weights P_h[:n, :n], down to K clusters
        A_h = softmax(scale q_r k_r^T + visibility)      r the smallest head of the cluster c(h)
        y = concat_h(A_h v_h) Wo + bo

    Shared scores apply to the probe tokens of a prompt too. A sequence with fewer than probe_tokens tokens gets
    the module's own attention; if a cache brings the missing ones, heads are clustered then, once, and earlier
    outputs stay as they were. With K = H it is the wrapped module.

    For inference: parameters are the module's own, and nothing is fine-tuned. Scores are computed per cluster and
    never all at once, keys stored per cluster. Its arithmetic is plain PyTorch whatever the module's backend.
    Sequences of one call that cluster alike (one sequence always does) also save the projections of the other
    heads. Unlike the official code it uses causal weights for the probe, and does not mix heads with positions in a
    prompt; dropout is applied with K = H only. Heads, circuits and parameters are those of the wrapped module.

    Args:
        attn: a causal MultiHeadAttention, GroupedQueryAttention or MultiQueryAttention; used, not copied.
        num_clusters: clusters K, at most H. `diagnostics.elbow` proposes one.
        probe_tokens: tokens n that decide.
        probe_causal: False takes weights of the probe over all its n tokens, as the official code does.
        allow_grad: allow training mode with gradients, which is refused otherwise.

    Attributes:
        labels: (B, H) clusters of the last call, or None if it was not clustered.
        representatives: (B, K) their smallest heads, or None.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    has_patterns = True
    factored_circuits = False
    cache_type = ClusteredCache
    input_layer = ""
    sequence_parallel: Any = None
    sequence_forms: tuple[str, ...] = ()
    sequence_reason = "clusters come from a probe of the first tokens"
    depth = _of_wrapped("depth")
    embed_dim = _of_wrapped("embed_dim")
    kdim = _of_wrapped("kdim")
    num_heads = score_heads = _of_wrapped("num_heads")
    num_kv_heads = _of_wrapped("num_kv_heads")
    head_dim = _of_wrapped("head_dim")
    v_head_dim = _of_wrapped("v_head_dim")
    causal = _of_wrapped("causal")
    rope = _of_wrapped("rope")
    rotation_tables = _of_wrapped("rotation_tables")
    sliding_window = _of_wrapped("sliding_window")
    sink_tokens = _of_wrapped("sink_tokens")
    heads = _of_wrapped("heads")
    pruned_heads = _of_wrapped("pruned_heads")
    head_outputs = _of_wrapped("head_outputs")
    observed_heads = _of_wrapped("observed_heads")
    qk_circuit = _of_wrapped("qk_circuit")
    ov_circuit = _of_wrapped("ov_circuit")
    reset_parameters = _of_wrapped("reset_parameters")
    project_parameters = _of_wrapped("project_parameters")

    def __init__(
        self, attn: GroupedQueryAttention, num_clusters: int, probe_tokens: int = 5, probe_causal: bool = True, *,
        allow_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if type(attn) not in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
            raise ValueError(
                "attn must be a MultiHeadAttention, GroupedQueryAttention or MultiQueryAttention, whose heads have "
                f"scores of their own and are all active, got {type(attn).__name__}"
            )
        check_sizes(num_clusters=num_clusters, probe_tokens=probe_tokens)
        check_options(probe_causal=probe_causal, allow_grad=allow_grad)
        if not attn.causal:
            raise ValueError("attn must be causal, got causal=False")
        if attn.qk_norm == "joint":
            raise ValueError("attn must not have qk_norm='joint', which needs the queries and keys of all heads")
        if num_clusters > attn.num_heads:
            raise ValueError(f"num_clusters must be at most num_heads, got {num_clusters} and {attn.num_heads}")
        if attn.num_kv_heads == 1 and attn.num_heads > 1:
            warnings.warn("attn has one key head, so that clusters save no key cache", stacklevel=2)
        self.attn = attn
        self.num_clusters = num_clusters
        self.probe_tokens = probe_tokens
        self.probe_causal = probe_causal
        self.allow_grad = allow_grad
        self.labels: Tensor | None = None
        self.representatives: Tensor | None = None
        self.train(attn.training)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Tensor | None = None, cache: ClusteredCache | KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
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
            raise ValueError(f"context must be None: clusters come from self-attention; got {describe(context)}")
        a = self.attn
        check_input("x", x, a.embed_dim, a.q_proj)
        if self.num_clusters >= a.num_heads:
            y: Tensor = a(x, mask=mask, positions=positions, cache=cache)
            self.labels = torch.arange(a.num_heads, device=x.device).expand(x.shape[0], -1)
            self.representatives = self.labels
            return y
        call = begin(self, x, None, _one_for_all_heads(mask), positions, cache)
        holder = call.cache
        v = a.v_proj(x).unflatten(-1, (-1, a.v_head_dim))
        if holder is not None:
            holder.check_fits(v)
        clusters = self._clusters(x, call)
        q, k = self._project(x, call.q_table, clusters)
        if clusters is None:
            self.labels = self.representatives = None
            return self._attend_alone(q, k, v, call)
        self.labels, self.representatives = clusters.labels, clusters.representatives
        if holder is not None:
            call.cache = holder.clustered(clusters)
        with call.remember(k, v) as (k, v):
            (v,) = a.heads.spread(v)
            y = a.o_proj(clustered_attention(q, k, v, clusters, call.view, self._rules(x.device)).flatten(2))
        if holder is not None:
            holder.states, holder.clusters = call.cache, clusters
        return y

    def tensor_parallel_plan(self) -> dict[str, Any]:
        """There is none."""
        raise ValueError(f"{type(self).__name__} has no tensor-parallel plan: it clusters the heads of all ranks")

    def probe(
        self, x: Tensor, *, mask: Tensor | AttentionMask | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Weights of the first probe_tokens tokens of x (B, T, E), which decide the clusters: (B, H, n, n)."""
        return self._probe(x, begin(self, x, None, _one_for_all_heads(mask), positions))

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ClusteredCache | KeyValueCache:  # fmt: skip
        """A cache for one request of max_length tokens; with K = H the wrapped module's.

        device and dtype default to those of the module's weights.
        """
        if self.num_clusters >= self.num_heads:
            return self.attn.init_cache(batch_size, max_length, device, dtype)  # type: ignore[no-any-return]
        own = place_of(self)
        return ClusteredCache(
            batch_size, max_length, self.cache_layout(), device=own[0] if device is None else device,
            dtype=own[1] if dtype is None else dtype,
        )  # fmt: skip

    def cache_layout(self) -> ClusteredLayout:
        """What a cache must look like to be this module's."""
        widths = ((self.num_heads, self.head_dim), *self.attn.cache_widths())
        sizes = {"num_clusters": self.num_clusters, "probe_tokens": self.probe_tokens}
        return ClusteredLayout(widths, self.sliding_window, self.sink_tokens, **sizes)

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """min(K, G) D + G Dv numbers of that dtype: exact for G = H, else what different key heads take."""
        (groups, width), (_, value_width) = self.attn.cache_widths()
        return (min(self.num_clusters, groups) * width + groups * value_width) * dtype.itemsize

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes that the cache of one clustered sequence holds after so many tokens."""
        kept: int = self.attn.state_bytes(tokens, dtype) // self.attn.cache_bytes_per_token(dtype)
        return kept * self.cache_bytes_per_token(dtype)

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one clustered sequence: T new tokens that look at S keys, T of them new (default S = T).

        The probe's other heads and the clustering are left out.
        """
        return sum(self.flops_by_part(*counted_tokens(T, S, causal=True)).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections" and "attention"."""
        K, E = self.num_clusters, self.embed_dim
        S = T if S is None else S
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        pairs = attention_pairs(T, S, causal=True, window=self.sliding_window, sink_tokens=self.sink_tokens)
        projections = 2 * T * E * (K * D + min(K, G) * D + G * Dv + H * Dv)
        return {"projections": projections, "attention": 2 * (K * D + H * Dv) * pairs}

    def no_weight_decay(self) -> set[str]:
        """Names of the wrapped module's parameters that are not decayed."""
        return {f"attn.{name}" for name in self.attn.no_weight_decay()}

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Refused: without a head the others would cluster differently."""
        raise ValueError(
            f"indices must be pruned from the wrapped module before it is wrapped, got {indices!r}: without these "
            "heads the others would cluster differently"
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"num_clusters={self.num_clusters}, probe_tokens={self.probe_tokens}, probe_causal={self.probe_causal}"

    def _clusters(self, x: Tensor, call: Call) -> HeadClusters | None:
        """Those of the cache, or of the probe tokens that x completes; None while there are fewer."""
        if call.cache is not None and call.cache.clusters is not None:
            return cast(HeadClusters, call.cache.clusters)
        return self._new_clusters(x, call) if call.past + x.shape[1] >= self.probe_tokens else None

    def _new_clusters(self, x: Tensor, call: Call) -> HeadClusters:
        obstacle = (
            f"x must have values where heads are clustered, which the first {self.probe_tokens} tokens decide: trace, "
            "compile or export calls with a cache that holds these tokens"
        )
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=obstacle)
        elif not has_values(x):
            raise ValueError(obstacle)
        labels = cluster_heads(self._probe(x, call), self.num_clusters)
        return HeadClusters.of(labels, self.num_clusters, self.heads.reads)

    def _project(
        self, x: Tensor, table: RotaryTable | None, clusters: HeadClusters | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries and keys, (B, T, heads, D): of all heads, or of what clusters need."""
        a = self.attn
        if clusters is None:
            q, k = (linear(x).unflatten(-1, (-1, a.head_dim)) for linear in (a.q_proj, a.k_proj))
        else:
            q = clusters.queries.projected(a.q_proj, x, a.head_dim)
            k = clusters.keys.projected(a.k_proj, x, a.head_dim)
        q = qk_norm_rope(q, table, norm=a.q_norm, backend=a.backend)
        return q, qk_norm_rope(k, table, norm=a.k_norm, backend=a.backend)

    def _attend_alone(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The wrapped module's own attention, while there are too few tokens to cluster its heads."""
        a = self.attn
        if call.cache is not None:
            call.cache = call.cache.states
        with call.remember(q, k, v) as (_, k, v):
            k, v = a.heads.spread(k, v)
            out = softmax_attention(q, k, v, call.view, **(a.score_options(q.device) | {"dropout": 0.0}))
            return cast(Tensor, a.o_proj(out.flatten(2)))

    def _rules(self, device: torch.device) -> ScoreRules:
        options = self.attn.score_options(device)
        return ScoreRules(options["scale"], options["softcap"], options["alibi_slopes"], options["sinks"])

    def _probe(self, x: Tensor, call: Call) -> Tensor:
        """Weights (B, H, n, n) of the first n real tokens, cached ones and those of x."""
        n, past, table = self.probe_tokens, call.past, call.q_table
        if past + x.shape[1] < n:
            raise ValueError(f"x must have at least the probe_tokens {n}, got {past + x.shape[1]}")
        at = first_real(call.view.mask, x, past + x.shape[1], n)
        new = max([n, *(at[:, -1] + 1).tolist()]) - past
        if table is not None:
            table = RotaryTable(table.cos[..., :new, :], table.sin[..., :new, :], table.style)
        q, k = self._project(x[:, :new], table)
        if past:
            held_q, held_k, _ = call.cache.states.held()
            q, k = torch.cat([held_q, q], 1), torch.cat([held_k, k], 1)
        at = at[:, :, None, None]
        q, k = torch.take_along_dim(q, at, 1), torch.take_along_dim(k, at, 1)
        (k,) = self.heads.spread(k)
        view = (
            replace(call.view, causal=True, mask=None, query_start=0) if self.probe_causal else Visibility(causal=False)
        )
        return attention_weights(q, k, view, self._rules(x.device))


def _one_for_all_heads(mask: Tensor | AttentionMask | None) -> AttentionMask | None:
    """The mask, if it is one that clusters can share."""
    mask = as_mask(mask)
    if mask is not None and mask.cu_seqlens is not None:
        raise ValueError("mask must not be packed: a row has one set of clusters")
    dense = None if mask is None else mask.dense_mask
    if dense is not None and dense.ndim >= 3 and dense.shape[-3] != 1:
        raise ValueError(f"mask must be the same for all heads, got shape {tuple(dense.shape)}")
    return mask
