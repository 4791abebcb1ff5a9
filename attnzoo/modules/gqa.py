"""Grouped-query attention, the family that multi-head and multi-query attention belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import KeyValueCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import (
    check_cache,
    check_groups,
    check_input,
    check_options,
    check_sizes,
    derive_head_dim,
    split_context,
)
from attnzoo.modules.positions import rotary_tables
from attnzoo.modules.structure import (
    attention_pairs,
    group_index,
    head_rows,
    keep_columns,
    keep_entries,
    keep_rows,
    surviving_heads,
)
from attnzoo.ops.qk_norm_rope import head_prologue
from attnzoo.ops.softmax_attention import alibi_slopes, constant, softmax_attention
from attnzoo.rotary import Rotary


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    H query heads share G key/value heads; query head h reads key/value head h // (H / G). G = H is multi-head
    attention, G = 1 multi-query attention.

        q = x Wq + bq, k = c Wk + bk, v = c Wv + bv          c is x, or the context in cross-attention
        q, k = rotate(norm(q)), rotate(norm(k))              both optional
        o_h = softmax(scale q_h k_g(h)^T + visibility) v_g(h)
        y = concat_h(o_h) Wo + bo

    The options of `ops.softmax_attention` (soft-cap, ALiBi, window, sinks) apply to the scores in the order
    that its docstring gives. Causality, window and ALiBi go by token index; `positions` steers the rotation.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context that keys are made from. Default: E.
        vdim: width of the context that values are made from. Default: kdim.
        bias: whether the q, k and v projections have one.
        o_bias: whether the output projection has one. Default: bias.
        qk_norm: RMS-normalise each head's query and key before the rotation.
        qk_norm_eps: added to the mean square.
        rope: rotary position embedding, or None.
        scale: factor of the scores. Default: D ** -0.5.
        logit_softcap: bound c of the scores, c tanh(s / c) (arXiv:2408.00118).
        alibi: subtract slope_h |i - j| (arXiv:2108.12409); needs rope=None.
        sliding_window: a query sees this many keys at most, itself included (|i - j| < W if not causal).
        sink_tokens: this many first keys stay visible outside the window (arXiv:2309.17453).
        sink: None, "zero" (add 1 to the softmax's denominator) or "learned" (a logit `sinks` per head).
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init: "normal", or "xavier" as torch.nn.MultiheadAttention does it.
        init_std: standard deviation of the normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        logit_softcap: float | None = None,
        alibi: bool = False,
        sliding_window: int | None = None,
        sink_tokens: int = 0,
        sink: str | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        init: str = "normal",
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
            v_head_dim=v_head_dim,
        )  # fmt: skip
        check_groups(num_heads, num_kv_heads)
        check_options(
            dropout=dropout, logit_softcap=logit_softcap, sliding_window=sliding_window,
            sink_tokens=sink_tokens, sink=sink, scale=scale,
        )  # fmt: skip
        if alibi and rope is not None:
            raise ValueError(f"alibi needs rope=None, got both alibi=True and {rope}")
        if causal and (kdim is not None or vdim is not None):
            raise ValueError(f"kdim and vdim need causal=False, got kdim={kdim} and vdim={vdim}")
        if init not in ("normal", "xavier"):
            raise ValueError(f"init must be 'normal' or 'xavier', got {init!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = self.kdim if vdim is None else vdim
        check_sizes(kdim=self.kdim, vdim=self.vdim)
        self.rope = rope
        self.rope_dim = 0 if rope is None else rope.width(head_dim)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.logit_softcap = logit_softcap
        self.alibi_slopes = alibi_slopes(num_heads) if alibi else None
        self.sliding_window = sliding_window
        self.sink_tokens = sink_tokens
        self.sink = sink
        self.causal = causal
        self.dropout = dropout
        self.init = init
        self.init_std = init_std
        self.backend = check_name(backend)
        self._total_heads, self._group_size = num_heads, num_heads // num_kv_heads
        self._kept_heads, self._kept_groups = tuple(range(num_heads)), tuple(range(num_kv_heads))
        self._kv_index: tuple[int, ...] | None = None

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(self.vdim, num_kv_heads * v_head_dim, bias, **made)
        o_bias = bias if o_bias is None else o_bias
        self.o_proj = nn.Linear(num_heads * v_head_dim, embed_dim, o_bias, **made)
        self.q_norm = nn.RMSNorm(head_dim, qk_norm_eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, qk_norm_eps, **made) if qk_norm else None
        learned = sink == "learned"
        self.sinks = nn.Parameter(torch.zeros(num_heads, **made)) if learned else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (the last with `out_std`), biases and sinks 0, norms 1.

        Without arguments std is the constructor's init_std, or `init="xavier"` does what
        torch.nn.MultiheadAttention does, draw by draw.
        """
        if self.init == "xavier" and std is None and out_std is None:
            self.o_proj.reset_parameters()
            self._xavier_projections()
        else:
            std = self.init_std if std is None else std
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                nn.init.normal_(projection.weight, std=std)
            nn.init.normal_(self.o_proj.weight, std=std if out_std is None else out_std)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def _xavier_projections(self) -> None:
        """Xavier-uniform, over the stacked (q, k, v) matrix where all three read the same width."""
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        if self.kdim == self.vdim == self.embed_dim:
            stacked = torch.cat([w.detach() for w in weights])
            rows = [w.shape[0] for w in weights]
            nn.init.xavier_uniform_(stacked)
            with torch.no_grad():
                for weight, drawn in zip(weights, torch.split(stacked, rows), strict=True):
                    weight.copy_(drawn)
        else:
            for weight in weights:
                nn.init.xavier_uniform_(weight)

    def forward(
        self,
        x: Tensor,
        context: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention, or a pair (key input, value input). Needs causal=False.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. With a
                cache it covers cached and new keys.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; filled in place.
        """
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        q, k, v = self.project(x, context)
        if cache is not None:
            check_cache(cache, KeyValueCache, self.causal, context, mask)
        q_table = k_table = None
        if self.rope is not None:
            limit = None if cache is None else cache.max_length
            q_table, k_table = rotary_tables(
                self.rope, self.rope_dim, q, k, positions, mask, cross=context is not None, past=past, limit=limit
            )
        style = "half" if self.rope is None else self.rope.style
        q = head_prologue(q, norm=self.q_norm, table=q_table, style=style, backend=self.backend)
        k = head_prologue(k, norm=self.k_norm, table=k_table, style=style, backend=self.backend)
        key_positions = None
        if cache is not None:
            k, v, key_positions = cache.append(k, v)
        if self._kv_index is not None:
            index = torch.tensor(self._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        out = softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            softcap=self.logit_softcap,
            alibi_slopes=None if self.alibi_slopes is None else constant(self.alibi_slopes, q.device),
            window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            sinks=0.0 if self.sink == "zero" else self.sinks,
            dropout=self.dropout if self.training else 0.0,
            key_positions=key_positions,
            query_start=past if cache is not None else None,
            backend=self.backend,
        )
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def project(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys (B, S, G, D) and values (B, S, G, Dv), before norm and rotation."""
        key, value = self.sources(x, context)
        B, T, S = x.shape[0], x.shape[1], key.shape[1]
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(key).view(B, S, self.num_kv_heads, self.head_dim)
        v = self.v_proj(value).view(B, S, self.num_kv_heads, self.v_head_dim)
        return q, k, v

    def sources(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """What keys (B, S, kdim) and values (B, S, vdim) are made from; refuses a wrong context."""
        if context is None:
            if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
                raise ValueError(
                    f"context must be given, since kdim and vdim are not embed_dim: {self.kdim}, {self.vdim} "
                    f"and {self.embed_dim}"
                )
            return x, x
        if self.causal:
            raise ValueError("context needs a module with causal=False, got causal=True")
        return split_context(context, x, self.kdim, self.vdim)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """A cache for max_length tokens, or for the window and the sink tokens where the module has a window.

        device and dtype default to those of the module's weights.
        """
        weight = self.q_proj.weight
        return KeyValueCache(
            batch_size,
            max_length,
            ((self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)),
            window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """G (D + Dv) numbers of that dtype."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T).

        Projections of T tokens, and 2 H (D + Dv) for each pair of query and visible key. A cross-attending
        module projects S context tokens.
        """
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections" and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        projections = 2 * T * self.embed_dim * H * (D + Dv) + 2 * keys * G * (self.kdim * D + self.vdim * Dv)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window, sink_tokens=self.sink_tokens)
        return {"projections": projections, "attention": 2 * H * (D + Dv) * pairs}

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query head the factors (WQ_h, WK_h), each (d, E), of the logits' bilinear form at offset 0.

        Norm gains are folded in; RMS statistics and biases are left out. part: "full", or of a module with
        rope the "rope" features or the rest, "nope".
        """
        rows = self._part_rows(part)
        wq, wk = self.head_weights()
        if self.q_norm is not None and self.k_norm is not None:
            wq = wq * self.q_norm.weight.detach()[:, None]
            wk = wk * self.k_norm.weight.detach()[:, None]
        reads = self._kv_index or [h * self.num_kv_heads // self.num_heads for h in range(self.num_heads)]
        return [(wq[h, rows], wk[g, rows]) for h, g in enumerate(reads)]

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E) and key weights (G, D, kdim) per head, detached."""
        wq = rearrange(self.q_proj.weight.detach(), "(h d) e -> h d e", h=self.num_heads)
        wk = rearrange(self.k_proj.weight.detach(), "(h d) e -> h d e", h=self.num_kv_heads)
        return wq, wk

    def _part_rows(self, part: str) -> slice:
        if part == "full":
            return slice(None)
        if part not in ("rope", "nope"):
            raise ValueError(f"part must be 'full', 'rope' or 'nope', got {part!r}")
        if self.rope is None:
            raise ValueError(f"part must be 'full' for a module without rope, got {part!r}")
        return slice(self.rope_dim) if part == "rope" else slice(self.rope_dim, None)

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the query heads that are gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove query heads for good; the rest computes what it did with these heads' outputs set to 0.

        indices are original head numbers, and calls add up. A key/value head goes when no query head reads it
        any more. With no head left the module returns the output bias, or zeros. Optimisers and caches have
        to be made anew. To load a pruned state dict, prune a new module by `pruned_heads` first.

        Raises:
            ValueError: for a number out of range, a repeated one, or a head that is gone already.
        """
        old_heads, old_groups = self._kept_heads, self._kept_groups
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        groups, self._kv_index = group_index(heads, self._group_size)
        at = torch.tensor([old_heads.index(h) for h in heads], dtype=torch.long)
        at_group = [old_groups.index(g) for g in groups]
        keep_rows(self.q_proj, head_rows(at.tolist(), self.head_dim))
        keep_rows(self.k_proj, head_rows(at_group, self.head_dim))
        keep_rows(self.v_proj, head_rows(at_group, self.v_head_dim))
        keep_columns(self.o_proj, head_rows(at.tolist(), self.v_head_dim))
        if self.sinks is not None:
            self.sinks = keep_entries(self.sinks, at)
        if self.alibi_slopes is not None:
            self.alibi_slopes = tuple(self.alibi_slopes[int(i)] for i in at)
        self._kept_heads, self._kept_groups = heads, groups
        self.num_heads, self.num_kv_heads = len(heads), len(groups)

    def extra_repr(self) -> str:
        """The sizes and the options that are not at their defaults."""
        shown = [f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"]
        options = ("rope", "logit_softcap", "sliding_window", "sink", "pruned_heads")
        shown += [f"{name}={getattr(self, name)}" for name in options if getattr(self, name)]
        return ", ".join([*shown, f"causal={self.causal}", f"backend={self.backend}"])
