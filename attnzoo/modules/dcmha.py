"""Dynamically composable multi-head attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import TokenCache
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
from attnzoo.modules.structure import attention_pairs, head_rows, keep_columns, keep_rows, surviving_heads
from attnzoo.modules.talking_heads import composed_chunk
from attnzoo.ops.composed_attention import Composition, Side, Sight, composed_attention
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotate

ACTIVATIONS = ("gelu", "gelu_tanh")


class ComposedCache(TokenCache):
    """Keys, values, and what belongs to each key in the compositions: G (D + Dv) + P (2 R + 1) H numbers a token."""

    def append(
        self, k: Tensor, v: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Store k (B, T, G, D), v (B, T, G, Dv) and weights (B, T, 1, P (2 R + 1) H); return those of all tokens."""
        if weights is None:
            (k, v), positions = self._append(k, v)
            return k, v, None, positions
        (k, v, weights), positions = self._append(k, v, weights)
        return k, v, weights, positions


class DynamicWeights(nn.Module):
    """What one side of the pairs, queries or keys, brings to the compositions, from the layer's input:

        d = act(X W1^T) W2;   u = d[:R] / sqrt(mean(d[:R]^2) + eps),  v = d[R:],  g = tanh(X Wg^T)

    for each of P places and N groups of M heads; the mean is over the M heads.
    """

    def __init__(
        self,
        width: int,
        places: int,
        groups: int,
        heads: int,
        rank: int,
        hidden: int,
        act: str,
        eps: float,
        **made: Any,
    ) -> None:
        super().__init__()
        self.sizes = (groups, places, hidden, rank, heads)
        self.act = act
        self.eps = eps
        self.w1 = nn.Linear(width, groups * places * hidden, False, **made)
        self.w2 = nn.Parameter(torch.empty(groups, places, hidden, 2 * rank, heads, **made))
        self.gate = nn.Linear(width, groups * places * heads, False, **made)

    def reset_parameters(self) -> None:
        """The official start, close to no composition: u of size 0.7, small v and gates."""
        _, _, hidden, rank, heads = self.sizes
        width = self.w1.in_features
        nn.init.normal_(self.w1.weight, std=math.sqrt(2 / (width + hidden)))
        nn.init.normal_(self.w2, std=0.02 / (math.sqrt(hidden) * (heads + rank)))
        nn.init.normal_(self.gate.weight, std=0.005 * math.sqrt(2 / (width + heads)))

    def forward(self, x: Tensor) -> list[Side]:
        """x (B, L, E) -> for each place u (B, L, N, R, M), v (B, L, N, R, M), g (B, L, N, M), in x's dtype."""
        groups, places, hidden, rank, heads = self.sizes
        high = torch.promote_types(x.dtype, torch.float32)
        raw, gate = self.w1(x), self.gate(x)
        with without_autocast(x):
            raw = raw.to(high).view(*x.shape[:2], groups, places, hidden)
            inner = F.gelu(raw, approximate="tanh" if self.act == "gelu_tanh" else "none")
            d = torch.einsum("blnpk,npkrm->blnprm", inner, self.w2.to(high))
            u, v = d[..., :rank, :], d[..., rank:, :]
            u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps)
            g = torch.tanh(gate.to(high)).view(*x.shape[:2], groups, places, heads)
        return [
            (u[:, :, :, p].to(x.dtype), v[:, :, :, p].to(x.dtype), g[:, :, :, p].to(x.dtype)) for p in range(places)
        ]


class DynamicallyComposableAttention(nn.Module):
    """Dynamically composable multi-head attention (Xiao et al. 2024, arXiv:2405.08553).

    The vector of all heads' scores at a pair (t, s) passes through a composition before the softmax, and that of
    their weights through another after it:

        a'_j = a_j + sum_m a_m Base[m, j] + sum_r (a . uq_r) vq_rj + a_j gq_j + sum_r (a . uk_r) vk_rj + a_j gk_j

    uq, vq, gq are made from the input at t and uk, vk, gk from that at s (`DynamicWeights`). Masks act after the
    first composition. Composed weights may be negative, and rows need not sum to 1.

    With key_wise=False and one key/value head for all heads of a composition group, the function is plain softmax
    attention of composed queries whose outputs are composed; it is computed so, and then every backend serves it.

    Pruning a head removes its value half: what it attends with stays, since other heads read it.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        kdim: width of the context. Default: E.
        bias: whether the four projections have one.
        rank: R of the projections; at most M = H / head_groups.
        head_groups: N groups of consecutive heads that are composed among themselves.
        dyn_hidden_dim: width K between the two layers that make u and v. Default: 2 R M.
        pre_compose: whether scores are composed.
        post_compose: whether weights are composed.
        query_wise: whether what belongs to queries takes part.
        key_wise: whether what belongs to keys takes part.
        static_base: whether there is a learned Base of each place.
        dyn_act: "gelu" or "gelu_tanh".
        dyn_norm_eps: added to the mean square of u.
        qk_norm: RMS-normalise each head's query and key before the rotation.
        qk_norm_eps: added to that mean square.
        rope: rotary position embedding, or None.
        sliding_window: a query sees this many keys at most, itself included.
        causal: no query sees a later key.
        dropout: probability of dropping a composed weight in training.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are made anew in the
            backward pass.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (folded where that is possible, chunked for more than chunk_size queries), "eager" (all
            scores at once) or "triton" (fused kernels, by name only); others where it folds.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    q_dyn: DynamicWeights | None
    k_dyn: DynamicWeights | None
    pre_base: nn.Parameter | None
    post_base: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        kdim: int | None = None,
        bias: bool = False,
        rank: int = 2,
        head_groups: int = 1,
        dyn_hidden_dim: int | None = None,
        pre_compose: bool = True,
        post_compose: bool = True,
        query_wise: bool = True,
        key_wise: bool = True,
        static_base: bool = False,
        dyn_act: str = "gelu",
        dyn_norm_eps: float = 1e-6,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        sliding_window: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        chunk_size: int = 128,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = derive_head_dim(embed_dim, num_heads, head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kdim = embed_dim if kdim is None else kdim
        check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, kdim=self.kdim,
            head_groups=head_groups, rank=rank, chunk_size=chunk_size,
        )  # fmt: skip
        check_groups(num_heads, num_kv_heads)
        check_options(
            dropout=dropout, logit_softcap=None, sliding_window=sliding_window, sink_tokens=0, sink=None, scale=None
        )  # fmt: skip
        if num_heads % head_groups:
            raise ValueError(f"head_groups must divide num_heads, got {head_groups} and {num_heads}")
        heads = num_heads // head_groups
        if rank > heads:
            raise ValueError(f"rank must be at most the {heads} heads of a group, got {rank}")
        hidden = 2 * rank * heads if dyn_hidden_dim is None else dyn_hidden_dim
        check_sizes(dyn_hidden_dim=hidden)
        if sliding_window is not None and not causal:
            raise ValueError(f"sliding_window needs causal=True, got {sliding_window} and causal=False")
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        if not (pre_compose or post_compose):
            raise ValueError("pre_compose or post_compose must be True, got neither: that is multi-head attention")
        if not (query_wise or key_wise or static_base):
            raise ValueError(
                "query_wise, key_wise or static_base must be True, got none of them: that is multi-head attention"
            )
        if dyn_act not in ACTIVATIONS:
            raise ValueError(f"dyn_act must be one of {', '.join(map(repr, ACTIVATIONS))}, got {dyn_act!r}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = self.v_head_dim = head_dim
        self.head_groups = head_groups
        self.rank = rank
        self.places = tuple(name for name, used in (("pre", pre_compose), ("post", post_compose)) if used)
        self.static_base = static_base
        self.rope = rope
        self.rope_dim = 0 if rope is None else rope.width(head_dim)
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self.sink_tokens = 0
        self.causal = causal
        self.dropout = dropout
        self.chunk_size = chunk_size
        self.init_std = init_std
        self.backend = check_name(backend)
        self.score_heads = num_heads
        self._total_heads, self._kept_heads = num_heads, tuple(range(num_heads))
        self._kept_groups = tuple(range(num_kv_heads))

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.v_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, bias, **made)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias, **made)
        self.q_norm = nn.RMSNorm(head_dim, qk_norm_eps, **made) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, qk_norm_eps, **made) if qk_norm else None
        sizes = (len(self.places), head_groups, heads, rank, hidden, dyn_act, dyn_norm_eps)
        self.q_dyn = DynamicWeights(embed_dim, *sizes, **made) if query_wise else None
        self.k_dyn = DynamicWeights(self.kdim, *sizes, **made) if key_wise else None
        bases = [
            nn.Parameter(torch.empty(head_groups, heads, heads, **made)) if static_base and used else None
            for used in (pre_compose, post_compose)
        ]
        self.pre_base, self.post_base = bases
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`); compositions near to none."""
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
        for dynamic in (self.q_dyn, self.k_dyn):
            if dynamic is not None:
                dynamic.reset_parameters()
        for base in (self.pre_base, self.post_base):
            if base is not None:
                nn.init.normal_(base, std=0.1 / math.sqrt(base.shape[1]))

    @property
    def folds(self) -> bool:
        """Whether the compositions move into queries and outputs of plain attention."""
        heads = self.score_heads // self.head_groups
        return self.k_dyn is None and (self.score_heads // self._all_groups) % heads == 0

    @property
    def _all_groups(self) -> int:
        return self.k_proj.out_features // self.head_dim

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: ComposedCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention; needs causal=False, and positions if rope is set.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. With a
                cache it covers cached and new keys. It acts after the first composition.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; filled in place.
        """
        check_input("x", x, self.embed_dim)
        mask = as_mask(mask)
        past = 0 if cache is None else cache.length
        source = one_source(self, x, context)
        B, T, S = x.shape[0], x.shape[1], source.shape[1]
        if cache is not None:
            check_cache(cache, ComposedCache, self.causal, context, mask)
        q = self.q_proj(x).view(B, T, self.score_heads, self.head_dim)
        k = self.k_proj(source).view(B, S, self._all_groups, self.head_dim)
        v = self.v_proj(source).view(B, S, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            own = self.q_norm.weight.dtype
            q, k = self.q_norm(q.to(own)).to(q.dtype), self.k_norm(k.to(own)).to(k.dtype)
        if self.rope is not None:
            q_table, k_table = rotary_tables(
                self.rope, self.rope_dim, q, k, positions, mask, cross=context is not None, past=past,
                limit=None if cache is None else cache.max_length,
            )  # fmt: skip
            q, k = rotate(q, *q_table, self.rope.style), rotate(k, *k_table, self.rope.style)
        of_queries = None if self.q_dyn is None else self.q_dyn(x)
        of_keys = None if self.k_dyn is None else self.k_dyn(source)
        key_positions = None
        if cache is not None:
            packed = None if of_keys is None else _packed(of_keys).to(v.dtype)
            k, v, packed, key_positions = cache.append(k, v, packed)
            of_keys = None if packed is None else self._unpacked(packed)
        pre, post = (self._composition(place, of_queries, of_keys) for place in ("pre", "post"))
        start = past if cache is not None else k.shape[1] - T
        if not self._kept_heads:
            out = x.new_zeros(B, T, 0, self.head_dim)
        elif self.folds and self.backend != "eager":
            out = self._folded(q, k, v, pre, post, mask, start if cache is not None else None, key_positions)
        else:
            out = composed_attention(
                q, k, v, pre, post, Sight(self.causal, self.sliding_window, mask, start, key_positions),
                scale=self.scale, dropout=self.dropout if self.training else 0.0,
                chunk_size=composed_chunk(self.backend, self.chunk_size), value_heads=self._value_heads(q.device),
                value_groups=self._value_groups(), backend=self.backend,
            )  # fmt: skip
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def _composition(self, place: str, of_queries: list[Side] | None, of_keys: list[Side] | None) -> Composition | None:
        if place not in self.places:
            return None
        at = self.places.index(place)
        return Composition(
            self.pre_base if place == "pre" else self.post_base,
            True,
            None if of_queries is None else of_queries[at],
            None if of_keys is None else of_keys[at],
        )

    def _folded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pre: Composition | None,
        post: Composition | None,
        mask: AttentionMask | None,
        start: int | None,
        key_positions: Tensor | None,
    ) -> Tensor:
        """Plain attention of composed queries, its outputs composed: heads of a group share key and value."""
        dtype = q.dtype
        if pre is not None:
            with without_autocast(q):
                q = _heads_composed(pre, q).to(dtype)
        if self._kept_groups != tuple(range(self._all_groups)):
            # Values of groups that are pruned: their outputs are not wanted, any value does.
            room = v.new_zeros(*v.shape[:2], self._all_groups, v.shape[3])
            v = room.index_copy(2, torch.tensor(self._kept_groups, device=v.device), v)
        out = softmax_attention(
            q, k, v, causal=self.causal, mask=mask, scale=self.scale, window=self.sliding_window,
            dropout=self.dropout if self.training else 0.0, key_positions=key_positions, query_start=start,
            backend=self.backend,
        )  # fmt: skip
        if post is not None:
            with without_autocast(q):
                out = _heads_composed(post, out).to(dtype)
        wanted = self._value_heads(out.device)
        return out if wanted is None else out.index_select(2, wanted)

    def _value_heads(self, device: torch.device) -> Tensor | None:
        if len(self._kept_heads) == self._total_heads:
            return None
        return torch.tensor(self._kept_heads, dtype=torch.long, device=device)

    def _value_groups(self) -> tuple[int, ...] | None:
        """Which value head every kept head reads, where that is no longer regular."""
        if len(self._kept_heads) == self._total_heads:
            return None
        size = self._total_heads // self._all_groups
        return tuple(self._kept_groups.index(h // size) for h in self._kept_heads)

    def _unpacked(self, packed: Tensor) -> list[Side]:
        """The inverse of `_packed`."""
        B, S = packed.shape[:2]
        N, R, M = self.head_groups, self.rank, self.score_heads // self.head_groups
        sides = packed.view(B, S, len(self.places), N, (2 * R + 1) * M)
        found = []
        for place in range(len(self.places)):
            side = sides[:, :, place]
            u, v = (side[..., i * R * M : (i + 1) * R * M].reshape(B, S, N, R, M) for i in range(2))
            found.append((u, v, side[..., 2 * R * M :]))
        return found

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ComposedCache:
        """A cache for max_length tokens, or for the window; device and dtype default to those of the weights."""
        weight = self.q_proj.weight
        widths: tuple[tuple[int, int], ...] = ((self._all_groups, self.head_dim), (self.num_kv_heads, self.head_dim))
        if self.k_dyn is not None:
            widths = (*widths, (1, self._numbers_of_a_key()))
        return ComposedCache(
            batch_size,
            max_length,
            widths,
            window=self.sliding_window,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def _numbers_of_a_key(self) -> int:
        return 0 if self.k_dyn is None else len(self.places) * (2 * self.rank + 1) * self.score_heads

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """G 2 D numbers of that dtype, and P (2 R + 1) H with key_wise."""
        heads = (self._all_groups + self.num_kv_heads) * self.head_dim
        return (heads + self._numbers_of_a_key()) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T)."""
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections", "attention", "dynamic weights" and "composition" (of pairs, or folded)."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, V, D, E = self.score_heads, self.num_heads, self.head_dim, self.embed_dim
        projections = 2 * T * E * (H + V) * D + 2 * keys * self.kdim * (self._all_groups + self.num_kv_heads) * D
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        dynamic, per_pair = 0, 0
        for side, tokens in ((self.q_dyn, T), (self.k_dyn, keys)):
            if side is None:
                continue
            groups, places, hidden, rank, heads = side.sizes
            made = side.w1.in_features * groups * places * (hidden + heads) + side.w2.numel()
            dynamic += 2 * tokens * made
            per_pair += places * 4 * rank * H
        if self.static_base:
            per_pair += len(self.places) * 2 * H * H // self.head_groups
        folded = self.folds and self.backend != "eager"
        composition = per_pair * (T * D if folded else pairs)
        core = 2 * D * (H + (H if folded else V)) * pairs
        return {
            "projections": projections, "attention": core, "dynamic weights": dynamic, "composition": composition
        }  # fmt: skip

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query head the factors (WQ_h, WK_h), each (d, E), before the composition; norm gains folded in.

        part: "full", or of a module with rope the "rope" features or the rest, "nope".
        """
        if part not in ("full", "rope", "nope") or (part != "full" and self.rope is None):
            raise ValueError(f"part must be 'full', or with rope 'rope' or 'nope', got {part!r}")
        rows = {"full": slice(None), "rope": slice(self.rope_dim), "nope": slice(self.rope_dim, None)}[part]
        wq = self.q_proj.weight.detach().view(self.score_heads, self.head_dim, -1)
        wk = self.k_proj.weight.detach().view(self._all_groups, self.head_dim, -1)
        if self.q_norm is not None and self.k_norm is not None:
            wq, wk = wq * self.q_norm.weight.detach()[:, None], wk * self.k_norm.weight.detach()[:, None]
        size = self.score_heads // self._all_groups
        return [(wq[h, rows], wk[h // size, rows]) for h in range(self.score_heads)]

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the heads whose value half is gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove the value half of heads; the rest computes what it did with these heads' outputs set to 0.

        Numbers are original ones. A value head goes when no head reads it any more; keys stay.
        """
        old_heads, old_groups = self._kept_heads, self._kept_groups
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        size = self._total_heads // self._all_groups
        groups = tuple(sorted({h // size for h in heads}))
        keep_rows(self.v_proj, head_rows([old_groups.index(g) for g in groups], self.head_dim))
        keep_columns(self.o_proj, head_rows([old_heads.index(h) for h in heads], self.head_dim))
        self._kept_heads, self._kept_groups = heads, groups
        self.num_heads, self.num_kv_heads = len(heads), len(groups)

    def extra_repr(self) -> str:
        """The sizes and the options."""
        sizes = f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{sizes}, rank={self.rank}, places={self.places}, rope={self.rope}, causal={self.causal}"


def _packed(sides: list[Side]) -> Tensor:
    """What belongs to keys as one tensor (B, S, 1, P N (2 R + 1) M) for the cache."""
    places = [torch.cat([u.flatten(-2), v.flatten(-2), g], dim=-1).flatten(2) for u, v, g in sides]
    return torch.cat(places, dim=-1).unsqueeze(2)


def _heads_composed(composition: Composition, heads: Tensor) -> Tensor:
    """A composition without key part on vectors of heads (B, T, H, D)."""
    high = torch.promote_types(heads.dtype, torch.float32)
    return composition(heads.to(high).transpose(1, 2)).transpose(1, 2)
