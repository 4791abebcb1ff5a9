"""Grouped-tied attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import TiedCache, TokenCache, UntiedCache
from attnzoo.masks import AttentionMask, as_mask
from attnzoo.modules.checks import (
    check_cache,
    check_groups,
    check_input,
    check_options,
    check_sizes,
    derive_head_dim,
    one_source,
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
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary


class GroupedTiedAttention(nn.Module):
    """Grouped-tied attention (Zadouri, Strauss, Dao 2025, arXiv:2505.21487).

    Key and value of a group are one state; only a small rotary key, one for all heads, comes beside it.

        [q_n | q_r] = x Wq + bq        H heads of width D = Dn + Dr
        kv = c Wkv + bkv               G heads of width D, never rotated; c is x, or the context
        k_r = c Wkr + bkr              one head of width Dr
        k_g = [kv_g[:Dn] | rotate(k_r)], v_g = kv_g
        o_h = softmax(D^-0.5 [q_n | rotate(q_r)]_h k_g(h)^T + visibility) v_g(h);  y = concat_h(o_h) Wo + bo

    The cache holds kv and the rotated k_r: G D + Dr numbers a token, about half of grouped-query attention's
    2 G D. The authors' code caches k_r once for every head; here there is one copy.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: tied states G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        rope_head_dim: width Dr of the rotary part; even, less than D. Default: D // 2, or 0 if rope is None.
        bias: whether the q, kv and output projections have one.
        o_bias: whether the output projection has one. Default: bias.
        k_rope_bias: whether the rotary key has one. Default: bias. The authors' code always has it.
        v_head_dim: refused unless D: the value is the tied state.
        qk_norm: refused: normalising the key would break the tie.
        kdim: width of the context. Default: E.
        rope: rotary position embedding of width Dr; None makes k = v = kv.
        scale: factor of the scores. Default: D ** -0.5.
        logit_softcap: as in `GroupedQueryAttention`; so are the options below.
        sliding_window: see there.
        sink_tokens: see there.
        sink: see there.
        causal: see there.
        dropout: see there.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    k_rope_proj: nn.Linear | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_head_dim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        k_rope_bias: bool | None = None,
        v_head_dim: int | None = None,
        qk_norm: bool = False,
        kdim: int | None = None,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        logit_softcap: float | None = None,
        sliding_window: int | None = None,
        sink_tokens: int = 0,
        sink: str | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        check_groups(num_heads, num_kv_heads)
        check_options(
            dropout=dropout, logit_softcap=logit_softcap, sliding_window=sliding_window,
            sink_tokens=sink_tokens, sink=sink, scale=scale,
        )  # fmt: skip
        if v_head_dim not in (None, head_dim):
            raise ValueError(f"v_head_dim must equal head_dim, the tied width, got {v_head_dim} and {head_dim}")
        if qk_norm:
            raise ValueError("qk_norm must be False: normalising the key would break its tie to the value")
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = self.v_head_dim = head_dim
        self.kdim = embed_dim if kdim is None else kdim
        check_sizes(kdim=self.kdim)
        self.rope = rope
        self.rope_head_dim = _rope_width(rope, rope_head_dim, head_dim)
        self.nope_head_dim = head_dim - self.rope_head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.logit_softcap = logit_softcap
        self.sliding_window = sliding_window
        self.sink_tokens = sink_tokens
        self.sink = sink
        self.causal = causal
        self.dropout = dropout
        self.init_std = init_std
        self.backend = check_name(backend)
        self._total_heads, self._group_size = num_heads, num_heads // num_kv_heads
        self._kept_heads, self._kept_groups = tuple(range(num_heads)), tuple(range(num_kv_heads))
        self._kv_index: tuple[int, ...] | None = None

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        o_bias = bias if o_bias is None else o_bias
        k_rope_bias = bias if k_rope_bias is None else k_rope_bias
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **made)
        self.kv_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.k_rope_proj = nn.Linear(self.kdim, self.rope_head_dim, k_rope_bias, **made) if self.rope_head_dim else None
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, o_bias, **made)
        learned = sink == "learned"
        self.sinks = nn.Parameter(torch.zeros(num_heads, **made)) if learned else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases and sinks 0."""
        std = self.init_std if std is None else std
        for projection in (self.q_proj, self.kv_proj, self.k_rope_proj):
            if projection is not None:
                nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std if out_std is None else out_std)
        for projection in (self.q_proj, self.kv_proj, self.k_rope_proj, self.o_proj):
            if projection is not None and projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention; needs causal=False, and positions if rope is set.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. With a
                cache it covers cached and new keys.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; filled in place.
        """
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        q, k, v, k_rope = self.project(x, context)
        if cache is not None:
            check_cache(cache, self.cache_type, self.causal, context, mask)
        q_rope = None
        if self.rope is not None:
            limit = None if cache is None else cache.max_length
            q_table, k_table = rotary_tables(
                self.rope, self.rope_head_dim, q, k, positions, mask, cross=context is not None, past=past,
                limit=limit,
            )  # fmt: skip
            turn: dict[str, Any] = {"style": self.rope.style, "backend": self.backend}
            q_rope = head_prologue(q[..., self.nope_head_dim :], table=q_table, **turn)
            k_rope = head_prologue(k_rope, table=k_table, **turn)
        else:
            # Empty, and made in the input's dtype, which under autocast is not that of the projections.
            k_rope = k_rope.to(v.dtype)
        key_positions = None
        if isinstance(cache, TiedCache | UntiedCache):
            k, v, k_rope, key_positions = cache.append(k, v, k_rope)
        if self._kv_index is not None:
            index = torch.tensor(self._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        out = softmax_attention(
            q[..., : self.nope_head_dim],
            k,
            v,
            causal=self.causal,
            mask=mask,
            scale=self.scale,
            softcap=self.logit_softcap,
            window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            sinks=0.0 if self.sink == "zero" else self.sinks,
            q_extra=q_rope,
            k_extra=None if q_rope is None else k_rope,
            dropout=self.dropout if self.training else 0.0,
            key_positions=key_positions,
            query_start=past if cache is not None else None,
            backend=self.backend,
        )
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k (B, S, G, Dn), v (B, S, G, D) and k_rope (B, S, 1, Dr), before rotation.

        k is the first Dn features of v.
        """
        source = self.source(x, context)
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        v = self.kv_proj(source).view(B, S, self.num_kv_heads, self.head_dim)
        return q, v[..., : self.nope_head_dim], v, self.rotary_key(source)

    def rotary_key(self, source: Tensor) -> Tensor:
        """The key part that all heads share, (B, S, 1, Dr), before rotation; Dr may be 0."""
        if self.k_rope_proj is None:
            return source.new_zeros(*source.shape[:2], 1, 0)
        k_rope: Tensor = self.k_rope_proj(source)
        return k_rope.unsqueeze(2)

    def source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What the tied state is made from, (B, S, kdim); refuses a context that does not fit."""
        return one_source(self, x, context, "key and value are tied, so they have one input")

    @property
    def cache_type(self) -> type[TokenCache]:
        """The class of this module's caches; no other is taken."""
        return TiedCache

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TokenCache:
        """A `TiedCache` for max_length tokens, or for the window and the sink tokens.

        device and dtype default to those of the module's weights.
        """
        weight = self.q_proj.weight
        return TiedCache(
            batch_size,
            max_length,
            ((self.num_kv_heads, self.head_dim), (1, self.rope_head_dim)),
            window=self.sliding_window,
            sink_tokens=self.sink_tokens,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """G D + Dr numbers of that dtype."""
        return (self.num_kv_heads * self.head_dim + self.rope_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T).

        Counted as in `GroupedQueryAttention.flops`.
        """
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections" and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        projections = 4 * T * self.embed_dim * H * D + 2 * keys * self.kdim * (G * D + self.rope_head_dim)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window, sink_tokens=self.sink_tokens)
        return {"projections": projections, "attention": 4 * H * D * pairs}

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query head the factors (WQ_h, WK_h), each (d, E), of the logits' bilinear form at offset 0.

        part: "full" (d = D), the tied features "nope" (d = Dn) or the shared key's features "rope" (d = Dr).
        """
        if part not in ("full", "nope", "rope"):
            raise ValueError(f"part must be 'full', 'nope' or 'rope', got {part!r}")
        nope = self.nope_head_dim
        wq, wkv = self.head_weights()
        shared = wkv.new_zeros(0, self.kdim) if self.k_rope_proj is None else self.k_rope_proj.weight.detach()
        rows = {"full": slice(None), "nope": slice(nope), "rope": slice(nope, None)}[part]
        reads = self._kv_index or [h * self.num_kv_heads // self.num_heads for h in range(self.num_heads)]
        return [(wq[h, rows], torch.cat([wkv[g, :nope], shared])[rows]) for h, g in enumerate(reads)]

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E) and weights (G, D, kdim) of the tied state, detached."""
        wq = rearrange(self.q_proj.weight.detach(), "(h d) e -> h d e", h=self.num_heads)
        wkv = rearrange(self.kv_proj.weight.detach(), "(h d) e -> h d e", h=self.num_kv_heads)
        return wq, wkv

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the query heads that are gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove query heads as `GroupedQueryAttention.prune_heads` does; the shared rotary key stays."""
        old_heads, old_groups = self._kept_heads, self._kept_groups
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        groups, self._kv_index = group_index(heads, self._group_size)
        at = [old_heads.index(h) for h in heads]
        at_group = [old_groups.index(g) for g in groups]
        keep_rows(self.q_proj, head_rows(at, self.head_dim))
        keep_rows(self.kv_proj, head_rows(at_group, self.head_dim))
        keep_columns(self.o_proj, head_rows(at, self.head_dim))
        if self.sinks is not None:
            self.sinks = keep_entries(self.sinks, torch.tensor(at, dtype=torch.long))
        self._kept_heads, self._kept_groups = heads, groups
        self.num_heads, self.num_kv_heads = len(heads), len(groups)

    def extra_repr(self) -> str:
        """The sizes and the options that are not at their defaults."""
        sizes = f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"
        shown = [f"{sizes}, rope_head_dim={self.rope_head_dim}"]
        options = ("rope", "logit_softcap", "sliding_window", "sink", "pruned_heads")
        shown += [f"{name}={getattr(self, name)}" for name in options if getattr(self, name)]
        return ", ".join([*shown, f"causal={self.causal}", f"backend={self.backend}"])


def _rope_width(rope: Rotary | None, rope_head_dim: int | None, head_dim: int) -> int:
    """Dr, checked against the head and the rotary embedding."""
    if rope is None:
        if rope_head_dim not in (None, 0):
            raise ValueError(f"rope_head_dim must be 0 when rope is None, got {rope_head_dim}")
        return 0
    width = head_dim // 2 if rope_head_dim is None else rope_head_dim
    if width < 2 or width % 2 or width >= head_dim:
        raise ValueError(f"rope_head_dim must be even, at least 2 and below head_dim {head_dim}, got {width}")
    if rope.width(head_dim if rope.dim is not None else width) != width:
        raise ValueError(f"rope.dim must equal rope_head_dim, got {rope.dim} and {width}")
    return width
