"""Grouped-tied attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import TiedCache, TokenCache
from attnzoo.modules.base import Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_entries, keep_rows
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import local, matrix_of
from attnzoo.rotary import Rotary, as_rotary


class GroupedTiedAttention(Mechanism):
    """Grouped-tied attention (Zadouri, Strauss, Dao 2025, arXiv:2505.21487).

    Key and value of a group are one state; only a small rotary key, one for all heads, is added.

        [q_n | q_r] = x Wq + bq        H heads of width D = Dn + Dr
        kv = c Wkv + bkv               G heads of width D, never rotated; c is x, or the context
        k_r = c Wkr + bkr              one head of width Dr
        k_g = [kv_g[:Dn] | rotate(k_r)], v_g = kv_g
        o_h = softmax(D^-0.5 [q_n | rotate(q_r)]_h k_g(h)^T + visibility) v_g(h);  y = concat_h(o_h) Wo + bo

    The cache holds kv and the rotated k_r: G D + Dr numbers per token, about half of grouped-query attention's
    2 G D. The authors' code caches k_r once for every head; here there is one copy.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: tied states G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        rope_head_dim: width Dr of the rotary part; even, less than D. Default: D // 2, or 0 if rope is None.
        bias: whether the q, kv and output projections have one.
        o_bias: whether the output projection has one. Default: bias.
        k_rope_bias: whether the rotary key, which needs rope, has one. Default: bias. The authors' code always has it.
        v_head_dim: refused unless D: the value is the tied state.
        qk_norm: refused: normalising the key would break the tie.
        kdim: width of the context. Default: E.
        rope: rotary position embedding of width Dr; None makes k = v = kv.
        scale: factor of the scores. Default: D ** -0.5.
        logit_softcap: this and the following options are those of `GroupedQueryAttention`.
        sliding_window: a query sees this many keys at most, itself included.
        sink_tokens: this many first keys stay visible outside the window.
        sink: None, "zero" or "learned".
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type: type[TokenCache] = TiedCache
    one_source_reason = "key and value are tied, so they have one input"
    shown = ("rope_head_dim", "rope", "logit_softcap", "sliding_window", "sink", "pruned_heads")
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")
    expands_states = True
    k_rope_proj: nn.Linear | None
    sinks: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
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
        causal: bool = True, dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, kdim=kdim, scale=scale, logit_softcap=logit_softcap,
            sliding_window=sliding_window, sink_tokens=sink_tokens, sink=sink, causal=causal, dropout=dropout,
            init_std=init_std, backend=backend, v_head_dim=v_head_dim, qk_norm=qk_norm, bias=bias, o_bias=o_bias,
            k_rope_bias=k_rope_bias, rope_head_dim=rope_head_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if self.v_head_dim != self.head_dim:
            raise ValueError(f"v_head_dim must equal head_dim, the tied width, got {v_head_dim} and {self.head_dim}")
        if qk_norm:
            raise ValueError("qk_norm must be False: normalising the key would break its tie to the value")
        self.rope = as_rotary(rope)
        self.rope_head_dim = self.rope_dim = _rope_width(self.rope, rope_head_dim, self.head_dim)
        if k_rope_bias and not self.rope_head_dim:
            raise ValueError("k_rope_bias needs rope, got k_rope_bias=True and rope=None")
        self.nope_head_dim = self.head_dim - self.rope_head_dim
        self.logit_softcap = logit_softcap
        self.sink = sink
        H, G, D, Dr = num_heads, self.num_kv_heads, self.head_dim, self.rope_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        k_rope_bias = bias if k_rope_bias is None else k_rope_bias
        self.q_proj = nn.Linear(embed_dim, H * D, bias, **factory_kwargs)
        self.kv_proj = nn.Linear(self.kdim, G * D, bias, **factory_kwargs)
        self.k_rope_proj = nn.Linear(self.kdim, Dr, k_rope_bias, **factory_kwargs) if Dr else None
        self.o_proj = nn.Linear(H * D, embed_dim, bias if o_bias is None else o_bias, **factory_kwargs)
        self.sinks = nn.Parameter(torch.zeros(H, **factory_kwargs)) if sink == "learned" else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases and sinks 0."""
        super().reset_parameters(std, out_std)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: TokenCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v, k_rope = self.project(x, call.source)
        q_rope = qk_norm_rope(q[..., self.nope_head_dim :], call.q_table, backend=self.backend)
        k_rope = qk_norm_rope(k_rope, call.k_table, backend=self.backend)
        options: dict[str, Any] = {
            "scale": self.scale, "softcap": self.logit_softcap, "dropout": self.weight_dropout,
            "sinks": 0.0 if self.sink == "zero" else local(self.sinks), "backend": self.backend,
        }  # fmt: skip
        q = q[..., : self.nope_head_dim]
        rotary: dict[str, Any] = {"q_rope": q_rope} if self.rope_head_dim else {}
        with call.remember(k, v, k_rope) as states:
            if call.moves_states:
                from attnzoo.ops.distributed_attention import expanded_attention

                stored = self.cache_type.stored(*states)
                groups = self.heads.groups_read
                out = expanded_attention(q, stored, self.untied, call.view, groups=groups, **rotary, **options)
            else:
                k, v, k_rope = states
                k, v = self.heads.spread(k, v)
                rotary |= {"k_rope": k_rope} if self.rope_head_dim else {}
                out = softmax_attention(q, k, v, call.view, **rotary, **options)
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def untied(self, *stored: Tensor, groups: slice = slice(None)) -> tuple[Tensor, ...]:
        """Keys, values and the rotary key (if there is one) of what a cache holds of tokens, of some of the heads."""
        *own, v, k_rope = stored
        k, v = self.heads.spread(own[0] if own else v[..., : self.nope_head_dim], v)
        rope = (k_rope,) if self.rope_head_dim else ()
        return k[:, :, groups], v[:, :, groups], *rope

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, T, H, D), k (B, S, G, Dn), v (B, S, G, D) and k_rope (B, S, 1, Dr), before rotation.

        k is the first Dn features of v.
        """
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        v = self.kv_proj(source).view(*source.shape[:2], self.num_kv_heads, self.head_dim)
        return q, v[..., : self.nope_head_dim], v, self.rotary_key(source, v)

    def rotary_key(self, source: Tensor, like: Tensor) -> Tensor:
        """The key part that all heads share, (B, S, 1, Dr), before rotation; Dr may be 0, in the dtype of `like`."""
        if self.k_rope_proj is None:
            return like.new_zeros(*source.shape[:2], 1, 0)
        k_rope: Tensor = self.k_rope_proj(source)
        return k_rope.unsqueeze(2)

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """The tied states and one rotary key: G D + Dr numbers per token."""
        return (self.num_kv_heads, self.head_dim), (1, self.rope_head_dim)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections" and "attention", counted as in `GroupedQueryAttention`."""
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
        rows = {"full": slice(None), "nope": slice(nope), "rope": slice(nope, None)}[part]
        wq, wkv = self.head_weights()
        shared = wkv.new_zeros(0, self.kdim) if self.k_rope_proj is None else matrix_of(self.k_rope_proj)
        keys = [torch.cat([wkv[g, :nope], shared])[rows] for g in range(self.num_kv_heads)]
        return [(wq[h, rows], keys[g]) for h, g in enumerate(self.heads.reads)]

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E) and weights (G, D, kdim) of the tied state, detached."""
        wq, wkv = (matrix_of(linear) for linear in (self.q_proj, self.kv_proj))
        return wq.view(-1, self.head_dim, self.embed_dim), wkv.view(-1, self.head_dim, self.kdim)

    def value_weights(self) -> Tensor:
        """Weights (G, D, kdim) of the tied state, detached."""
        return self.head_weights()[1]

    def tensor_splits(self) -> dict[str, Any]:
        """Projections and sinks by head; all heads read the rotary key."""
        return {
            "q_proj": "heads", "kv_proj": "groups", "k_rope_proj": "read by all", "o_proj": "columns", "sinks": 0,
        }  # fmt: skip

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of tied states; the shared rotary key stays."""
        keep_rows(self.q_proj, heads, self.head_dim)
        keep_rows(self.kv_proj, groups, self.head_dim)
        keep_columns(self.o_proj, heads, self.head_dim)
        if self.sinks is not None:
            self.sinks = keep_entries(self.sinks, heads)


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
