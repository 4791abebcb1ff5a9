"""Differential attention, versions 1 and 2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Factors, Mechanism, per_head
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_rows
from attnzoo.ops.differential_attention import differential_attention
from attnzoo.ops.norm_and_gate import norm_and_gate
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.rotary import Rotary
from attnzoo.rules import INTEGER, check, check_sizes

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


class DifferentialAttention(Mechanism):
    """Differential attention (Ye et al. 2024, arXiv:2410.05258, and version 2 by the same group, January 2026).

    Each head subtracts one softmax map from another, so that what both give to irrelevant tokens cancels:

        o_h = (softmax(scale q_2h k^T + visibility) - lambda softmax(scale q_(2h+1) k'^T + visibility)) v_g(h)

    Version 1: k and k' are the two key parts of key/value head g(h) = h // (H / G), values are 2 D wide, and

        lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init,    one number for the layer
        lambda_init = 0.8 - 0.6 exp(-0.3 depth)                                            depth 0 is the first layer
        y = concat_h((1 - lambda_init) RMS(o_h) subln) Wo

    Version 2: k = k', twice the query heads over the keys and values of grouped-query attention, and

        lambda_h = sigmoid(x Wlambda)_h,    y = concat_h(o_h) Wo

    A version-1 layer with H heads has the parameters of multi-head attention with 2 H heads; version 2 is compared
    with H heads. Rows of the difference add up to 1 - lambda and may be negative. In version 2 `depth` means nothing.

    Args:
        embed_dim: width E of input and output.
        num_heads: differential heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a query part. Default: E / (2 H) in version 1, E / H in version 2.
        version: 1 or 2.
        depth: number of the layer in its model, from 0. It may be set later: a decoder does.
        lambda_init: a constant in place of the formula.
        kdim: width of the context. Default: E.
        bias: whether the projections have one, that of the output excepted.
        o_bias: whether the output projection has one. Default: bias.
        qk_norm: RMS-normalise the query and key parts before the rotation.
        rope: rotary position embedding of every part, or None. The authors' code has style "interleaved".
        scale: factor of the scores. Default: D ** -0.5.
        logit_softcap: bound c of the scores of each map.
        sliding_window: a query sees this many keys at most, itself included (|i - j| < W if not causal).
        causal: no query sees a later key.
        dropout: probability of dropping a weight in training; each map drops its own.
        norm_eps: added to the mean squares in all norms.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    takes_bias = True
    sequence_forms: tuple[str, ...] = ("gather",)
    shown = ("version", "depth", "rope", "logit_softcap", "sliding_window", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        version: int = 1,
        depth: int = 0,
        lambda_init: float | None = None,
        kdim: int | None = None,
        bias: bool = False,
        o_bias: bool | None = None,
        qk_norm: bool = False,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        logit_softcap: float | None = None,
        sliding_window: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02, backend: str = "auto", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check("version", version, (*INTEGER, (lambda value: value in (1, 2), "be 1 or 2")))
        if version == 1 and head_dim is None:
            check_sizes(embed_dim=embed_dim, num_heads=num_heads)
            if embed_dim % (2 * num_heads):
                raise ValueError(
                    "num_heads must divide embed_dim / 2 in version 1 unless head_dim is given, "
                    f"got {num_heads} and {embed_dim}"
                )
            head_dim = embed_dim // (2 * num_heads)
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, kdim=kdim, rope=rope, scale=scale, causal=causal,
            sliding_window=sliding_window, logit_softcap=logit_softcap, dropout=dropout, init_std=init_std,
            backend=backend, bias=bias, o_bias=o_bias, qk_norm=qk_norm, norm_eps=norm_eps, depth=depth,
            lambda_init=lambda_init, device=device, dtype=dtype,
        )  # fmt: skip
        if version == 2 and (depth != 0 or lambda_init is not None):
            raise ValueError(
                f"depth and lambda_init mean nothing in version 2, got depth={depth} and lambda_init={lambda_init}"
            )
        self.version = version
        self.depth = depth
        self.constant_lambda_init = lambda_init
        self.logit_softcap = logit_softcap
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        H, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        self.key_parts = 2 if version == 1 else 1
        self.v_head_dim = Dv = D * self.key_parts
        keys = G * self.key_parts * D
        self.make_projections(2 * H * D, keys, G * Dv, H * Dv, bias=bias, o_bias=o_bias, **factory_kwargs)
        self.q_norm = nn.RMSNorm(D, norm_eps, **factory_kwargs) if qk_norm else None
        self.k_norm = nn.RMSNorm(D, norm_eps, **factory_kwargs) if qk_norm else None
        if version == 1:
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.empty(D, **factory_kwargs)))
            self.subln = nn.RMSNorm(Dv, norm_eps, **factory_kwargs)
        else:
            self.lambda_proj = nn.Linear(embed_dim, H, bias, **factory_kwargs)
        self.reset_parameters()

    @property
    def lambda_init(self) -> float:
        """The constant in lambda of version 1, which follows `depth` unless it was given."""
        given = self.constant_lambda_init
        return 0.8 - 0.6 * math.exp(-0.3 * self.depth) if given is None else given

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; the vectors of lambda are normal with standard deviation 0.1."""
        super().reset_parameters(std, out_std)
        for name in LAMBDAS if self.version == 1 else ():
            nn.init.normal_(getattr(self, name), std=0.1)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor.

        Masks act on both maps.
        """
        call = begin(self, x, context, mask, positions, cache)
        (B, T, _), S, H, G, D = x.shape, call.source.shape[1], self.num_heads, self.num_kv_heads, self.head_dim
        q = self.q_proj(x).view(B, T, 2 * H, D)
        k = self.k_proj(call.source).view(B, S, G * self.key_parts, D)
        v = self.v_proj(call.source).view(B, S, G, self.v_head_dim)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k.reshape(B, S, G, self.key_parts * D), v) as (k, v):
            k, v = self.heads.spread(k, v)
            out = differential_attention(
                q, k, v, self.factor(x), call.view, scale=self.scale, softcap=self.logit_softcap, bias=call.bias,
                dropout=self.weight_dropout, backend=self.backend,
            )  # fmt: skip
            if self.version == 1:
                heads = norm_and_gate(out, self.subln, None, dtype=out.dtype, backend=self.backend)
                y: Tensor = self.o_proj((1 - self.lambda_init) * heads)
            else:
                y = self.o_proj(out.flatten(2))
            return y

    def factor(self, x: Tensor) -> Tensor:
        """lambda: one number in version 1, (B, T, H) in version 2."""
        if self.version == 2:
            return torch.sigmoid(self.lambda_proj(x))
        with without_autocast(x):
            q1, k1, q2, k2 = (getattr(self, name) for name in LAMBDAS)
            dtype = torch.promote_types(q1.dtype, torch.float32)
            first, second = ((q.to(dtype) * k.to(dtype)).sum().exp() for q, k in ((q1, k1), (q2, k2)))
            factor: Tensor = self.read_by_all(first - second) + self.lambda_init
            return factor

    def tensor_splits(self) -> dict[str, Any]:
        """Projections by head; norms and the vectors of lambda are of all heads."""
        return {
            "q_proj": "heads", "k_proj": "groups", "v_proj": "groups", "o_proj": "columns", "lambda_proj": "heads",
            **dict.fromkeys(("q_norm", "k_norm", "subln"), "shared"), **dict.fromkeys(LAMBDAS, "whole"),
        }  # fmt: skip

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """The key of each part, side by side, and the value."""
        return (self.num_kv_heads, self.key_parts * self.head_dim), (self.num_kv_heads, self.v_head_dim)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections" and "attention", 4 H (D + Dv) for each visible pair."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        projections = 2 * T * self.embed_dim * H * (2 * D + Dv) + 2 * keys * self.kdim * G * (self.key_parts * D + Dv)
        if self.version == 2:
            projections += 2 * T * self.embed_dim * H
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        return {"projections": projections, "attention": 4 * H * (D + Dv) * pairs}

    def head_weights(self, part: int = 0) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E) and key weights (G, D, kdim) of the first or second map with their norms' gains."""
        q, k = per_head(self.q_proj, self.head_dim, self.q_norm), per_head(self.k_proj, self.head_dim, self.k_norm)
        return q[part::2], k[part::2] if self.version == 1 else k

    def qk_circuit(self, part: str = "full") -> Factors:
        """Factors as in the base of one map. part: "first" or "second"; "full", "rope" and "nope" are of the first."""
        if part not in ("first", "second"):
            return super().qk_circuit(part)
        wq, wk = self.head_weights(("first", "second").index(part))
        return [(wq[h], wk[g]) for h, g in enumerate(self.heads.reads)]

    def no_weight_decay(self) -> set[str]:
        """The vectors of lambda and the gain of the norm."""
        return {*LAMBDAS, "subln.weight"} if self.version == 1 else set()

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of heads, both parts of each, and of key/value heads."""
        keep_rows(self.q_proj, heads, 2 * self.head_dim)
        keep_rows(self.k_proj, groups, self.key_parts * self.head_dim)
        keep_rows(self.v_proj, groups, self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
        if self.version == 2:
            keep_rows(self.lambda_proj, heads)
