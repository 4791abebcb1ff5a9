"""Grouped-query attention, the family that multi-head and multi-query attention belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_entries
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.softmax_attention import alibi_slopes, constant, softmax_attention
from attnzoo.ops.submodules import local, start_layer
from attnzoo.rotary import Rotary
from attnzoo.rules import SWITCH, SWITCH_OR_JOINT, check, check_sizes, is_integer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class GroupedQueryAttention(Mechanism):
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
        qk_norm: RMS-normalise each head's query and key before the rotation; "joint": those of all heads together,
            as OLMo 2 does (arXiv:2501.00656).
        qk_norm_eps: added to the mean square; None takes the dtype's machine epsilon.
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

    shown: tuple[str, ...] = ("rope", "logit_softcap", "sliding_window", "sink", "pruned_heads")
    takes_bias = True
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")
    sinks: nn.Parameter | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        qk_norm: bool | str = False,
        qk_norm_eps: float | None = 1e-6,
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
        init_std: float = 0.02, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check("qk_norm", qk_norm, SWITCH_OR_JOINT)
        check("causal", causal, SWITCH)
        if causal and (kdim is not None or vdim is not None):
            raise ValueError(f"kdim and vdim need causal=False, got kdim={kdim} and vdim={vdim}")
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, rope=rope, scale=scale,
            logit_softcap=logit_softcap, sliding_window=sliding_window, sink_tokens=sink_tokens, sink=sink,
            causal=causal, dropout=dropout, init_std=init_std, backend=backend, bias=bias, o_bias=o_bias,
            qk_norm=bool(qk_norm), qk_norm_eps=qk_norm_eps, alibi=alibi, init=init, device=device, dtype=dtype,
        )  # fmt: skip
        if alibi and self.rope is not None:
            raise ValueError(f"alibi needs rope=None, got both alibi=True and {rope}")
        (self.vdim,) = check_sizes(vdim=self.kdim if vdim is None else vdim)
        self.qk_norm = qk_norm
        self.logit_softcap = logit_softcap
        self.alibi_slopes = alibi_slopes(num_heads) if alibi else None
        self.sink = sink
        self.init = init
        H, G, D, Dv = num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(H * D, G * D, G * Dv, H * Dv, bias=bias, o_bias=o_bias, **factory_kwargs)
        widths = (H * D, G * D) if qk_norm == "joint" else (D, D)
        self.q_norm = nn.RMSNorm(widths[0], qk_norm_eps, **factory_kwargs) if qk_norm else None
        self.k_norm = nn.RMSNorm(widths[1], qk_norm_eps, **factory_kwargs) if qk_norm else None
        self.sinks = nn.Parameter(torch.zeros(H, **factory_kwargs)) if sink == "learned" else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (the last with `out_std`), biases and sinks 0, norms 1.

        Without arguments std is the constructor's init_std, or `init="xavier"` does to the four projections what
        torch.nn.MultiheadAttention does, draw by draw.
        """
        if self.init == "xavier" and std is None and out_std is None:
            xavier_projections(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
            for name, module in self.named_children():
                if name not in PROJECTIONS:
                    start_layer(module, self.init_std)
        else:
            super().reset_parameters(std, out_std)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
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
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k, v) as (k, v):
            k, v = self.heads.spread(k, v)
            out = softmax_attention(q, k, v, call.view, bias=call.bias, **self.score_options(q.device))
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def project(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys (B, S, G, D) and values (B, S, G, Dv), before norm and rotation."""
        (B, T, _), S = x.shape, key.shape[1]
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(key).view(B, S, self.num_kv_heads, self.head_dim)
        v = self.v_proj(value).view(B, S, self.num_kv_heads, self.v_head_dim)
        return q, k, v

    def score_options(self, device: torch.device) -> dict[str, Any]:
        """The options of `softmax_attention` that the module was made with."""
        slopes = None if self.alibi_slopes is None else constant(self.alibi_slopes, device)
        return {
            "scale": self.scale, "softcap": self.logit_softcap, "alibi_slopes": slopes,
            "sinks": 0.0 if self.sink == "zero" else local(self.sinks), "dropout": self.weight_dropout,
            "backend": self.backend,
        }  # fmt: skip

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections" and "attention", 2 H (D + Dv) for each visible pair."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        projections = 2 * T * self.embed_dim * H * (D + Dv) + 2 * keys * G * (self.kdim * D + self.vdim * Dv)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window, sink_tokens=self.sink_tokens)
        return {"projections": projections, "attention": 2 * H * (D + Dv) * pairs}

    def tensor_splits(self) -> dict[str, Any]:
        """Projections and sinks by head; norms are of all heads."""
        return {
            "q_proj": "heads", "k_proj": "groups", "v_proj": "groups", "o_proj": "columns", "q_norm": "shared",
            "k_norm": "shared", "sinks": 0,
        }  # fmt: skip

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads.

        Raises:
            ValueError: with qk_norm="joint", whose statistics are those of all heads together.
        """
        if self.qk_norm == "joint":
            raise ValueError("prune_heads needs qk_norm other than 'joint': its statistics are those of all heads")
        self.keep_projections(heads, groups)
        if self.sinks is not None:
            self.sinks = keep_entries(self.sinks, heads)
        if self.alibi_slopes is not None:
            self.alibi_slopes = tuple(self.alibi_slopes[head] for head in heads)


def take_groups(options: dict[str, Any], groups: int, words: str, hint: str = "") -> None:
    """Take num_kv_heads out of the options of a mechanism that has so many, in words; refuses any other number."""
    given = options.pop("num_kv_heads", None)
    if given is not None and not (is_integer(given) and given == groups):
        raise ValueError(f"num_kv_heads must be {words}, got {given!r}{hint}")


def xavier_projections(q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear) -> None:
    """The start of torch.nn.MultiheadAttention: Xavier over the stacked (q, k, v) where all read the same width."""
    out.reset_parameters()
    weights = [q.weight, k.weight, v.weight]
    if q.in_features == k.in_features == v.in_features:
        stacked = torch.cat([w.detach() for w in weights])
        nn.init.xavier_uniform_(stacked)
        with torch.no_grad():
            for weight, drawn in zip(weights, torch.split(stacked, [w.shape[0] for w in weights]), strict=True):
                weight.copy_(drawn)
    else:
        for weight in weights:
            nn.init.xavier_uniform_(weight)
    for linear in (q, k, v, out):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
