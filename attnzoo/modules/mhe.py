"""Multiple-head-embedding attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.masks import Visibility
from attnzoo.modules.base import Factors, per_head
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention, take_groups
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_entries, keep_rows
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.ops.submodules import local, matrix_of
from attnzoo.rotary import Rotary, join_pairs, rotate, split_pairs
from attnzoo.rules import check, check_options, one_of

EMBEDDINGS = ("q_head_embed", "k_head_embed", "v_head_embed")


class MultipleHeadEmbeddingAttention(GroupedQueryAttention):
    """Multiple-head-embedding attention (Xue and Aletras 2023, arXiv:2310.07911).

    All heads share one projection each for queries, keys and values; a head differs by three vectors.

        Q, K, V = x Wq, c Wk, c Wv                             (B, T, D) each; c is x, or the context
        q_h, k_h, v_h = psi(Q, eq_h), psi(K, ek_h), psi(V, ev_h)
        psi(a, e) = a (1 + e) feature by feature ("mul"), or a + e ("add")
        o_h = softmax(scale rotate(q_h) rotate(k_h)^T + visibility) v_h;   y = concat_h(o_h) Wo

    It is computed as multi-query attention over the seeds K and V, exactly: no key or value of a single head exists.
    Without a rotation ek_h goes into the queries, and in mode "add" it cancels in the softmax, so its gradient is 0.
    With one, of width r, keys get r more features that all heads share, since for a pair of features turned by R

        R diag(s, t) = (s + t) / 2 R + (s - t) / 2 diag(1, -1) R^-1        ("mul": R K and R^-1 K)
        q . R e = cos (q1 e1 + q2 e2) + sin (q2 e1 - q1 e2)                ("add": R K, cos and sin)

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H.
        head_dim: width D of a head. Default: E / H.
        mode: "mul" or "add".
        rope: rotary position embedding, or None as in the paper.
        embed_init_std: standard deviation of the embeddings' normal initialisation.
        options: the keyword options of `GroupedQueryAttention` but qk_norm, and in mode "add" logit_softcap and sink.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    takes_bias = False
    sequence_forms: tuple[str, ...] = ("ring", "heads", "gather")

    q_head_embed: nn.Parameter
    k_head_embed: nn.Parameter
    v_head_embed: nn.Parameter

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int | None = None, *,
        mode: str = "mul",
        rope: Rotary | None = None,
        embed_init_std: float = 0.02,
        **options: Any,
    ) -> None:  # fmt: skip
        check("mode", mode, one_of("mul", "add", words="be 'mul' or 'add'"))
        check_options(embed_init_std=embed_init_std)
        for name in ("qk_norm",) if mode == "mul" else ("qk_norm", "logit_softcap", "sink"):
            if (given := options.get(name)) is not None and given is not False:
                raise ValueError(f"{name} cannot be had with mode {mode!r}, got {given!r}")
        take_groups(options, 1, "1")
        super().__init__(embed_dim, num_heads, 1, head_dim, rope=rope, **options)
        self.mode = mode
        self.embed_init_std = embed_init_std
        factory_kwargs: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.q_proj = nn.Linear(embed_dim, self.head_dim, self.q_proj.bias is not None, **factory_kwargs)
        for name, width in zip(EMBEDDINGS, (self.head_dim, self.head_dim, self.v_head_dim), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(num_heads, width, **factory_kwargs)))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; embeddings are normal with the constructor's embed_init_std."""
        super().reset_parameters(std, out_std)
        for name in EMBEDDINGS:
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=self.embed_init_std)

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        q, k = self.embedded_keys(q, k, call)
        with call.remember(k, v) as (k, v):
            y: Tensor = self.o_proj(self.embedded_values(q, k, v, call.view).flatten(2))
            return y

    def project(self, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D) with their embeddings, and the seeds of keys (B, S, 1, D) and values (B, S, 1, Dv)."""
        (B, T, _), S = x.shape, key.shape[1]
        q = self.q_proj(x).view(B, T, 1, self.head_dim)
        e = local(self.q_head_embed).to(q.dtype)
        k = self.k_proj(key).view(B, S, self.num_kv_heads, self.head_dim)
        v = self.v_proj(value).view(B, S, self.num_kv_heads, self.v_head_dim)
        return q * (1 + e) if self.mode == "mul" else q + e, k, v

    def embedded_keys(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys (.., D + r) whose products are those with the keys of each head."""
        e, multiplies = local(self.k_head_embed).to(q.dtype), self.mode == "mul"
        if call.q_table is None or call.k_table is None:
            # Adding 0 gives the parameter a gradient, of 0, as wrappers expect of every parameter.
            return q * (1 + e) if multiplies else q + 0 * e, k
        r, (cos, sin, style, _) = self.rope_dim, call.k_table
        turned = "half" if style == "interleaved_to_half" else style
        (q, rotated), (e1, e2) = call.rotate(q, k), split_pairs(e[:, :r], style)
        q1, q2 = split_pairs(q[..., :r], turned)
        if multiplies:
            rest = q[..., r:] * (1 + e[:, r:])
            mean, half = 1 + (e1 + e2) / 2, (e1 - e2) / 2
            q = torch.cat([join_pairs(q1 * mean, q2 * mean, turned), rest], -1)
            more, shared = join_pairs(q1 * half, -q2 * half, turned), rotate(k[..., :r], cos, -sin, style)
        else:
            more = join_pairs(q1 * e1 + q2 * e2, q2 * e1 - q1 * e2, turned)
            unit = join_pairs(torch.ones_like(k[..., : r // 2]), torch.zeros_like(k[..., : r // 2]), style)
            shared = rotate(unit, cos, sin, style)
        return torch.cat([q, more], -1), torch.cat([rotated, shared], -1)

    def embedded_values(self, q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """Outputs (B, T, H, Dv) of attention over seeds, with the values' embeddings."""
        options, e = self.score_options(q.device), local(self.v_head_embed).to(v.dtype)
        if self.mode == "mul":
            return softmax_attention(q, k, v, view, **options) * (1 + e)
        hides = view.mask is not None and (view.mask.lengths is not None or view.mask.dense_mask is not None)
        # A query of cross-attention that lies before all keys may have none in its window.
        hides = hides or (not view.causal and view.window is not None and q.shape[1] > k.shape[1])
        if not hides and not self.weight_dropout and v.shape[1]:
            return softmax_attention(q, k, v, view, **options) + e
        # Where weights may not add up to 1, one more value counts them.
        out = softmax_attention(q, k, F.pad(v, (0, 1), value=1.0), view, **options)
        return out[..., :-1] + out[..., -1:] * e

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """One key of D + r and one value of Dv numbers a token."""
        return (self.num_kv_heads, self.head_dim + self.rope_dim), (self.num_kv_heads, self.v_head_dim)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Query weights (H, D, E), in mode "mul" with the embeddings of query and key, and the one key (1, D, kdim)."""
        q, k = per_head(self.q_proj, self.head_dim), per_head(self.k_proj, self.head_dim)
        factor = (1 + self.q_head_embed) * (1 + self.k_head_embed)
        return q * (factor if self.mode == "mul" else torch.ones_like(factor)).detach()[..., None], k

    def ov_circuit(self) -> Factors:
        """As the base's, in mode "mul" with the embeddings; what is added is a bias and left out."""
        factor = (1 + self.v_head_embed).detach()
        wo = matrix_of(self.o_proj).unflatten(1, (-1, self.v_head_dim))
        wo = wo * factor if self.mode == "mul" else wo
        return [(self.value_weights()[0], wo[:, h]) for h in range(self.num_heads)]

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", one query for all heads, and "attention", 2 H (D + r + Dv) a visible pair."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, G, D, Dv = self.num_heads, self.num_kv_heads, self.head_dim, self.v_head_dim
        projections = 2 * T * self.embed_dim * (D + H * Dv) + 2 * keys * G * (self.kdim * D + self.vdim * Dv)
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window, sink_tokens=self.sink_tokens)
        return {"projections": projections, "attention": 2 * H * (D + self.rope_dim + Dv) * pairs}

    def no_weight_decay(self) -> set[str]:
        """The embeddings: decay would make the heads equal."""
        return set(EMBEDDINGS)

    def tensor_splits(self) -> dict[str, Any]:
        """Embeddings by head; all heads read the seeds."""
        seeds = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "read by all")
        return {**super().tensor_splits(), **seeds, **dict.fromkeys(EMBEDDINGS, 0)}

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut down to these heads: embeddings, columns of the output; the seeds of keys and values go with the last."""
        keep_rows(self.k_proj, groups, self.head_dim)
        keep_rows(self.v_proj, groups, self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
        for name in (*EMBEDDINGS, "sinks"):
            if getattr(self, name) is not None:
                setattr(self, name, keep_entries(getattr(self, name), heads))
        if self.alibi_slopes is not None:
            self.alibi_slopes = tuple(self.alibi_slopes[head] for head in heads)
