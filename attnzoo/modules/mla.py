"""Multi-head latent attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.cache import CacheLayout, LatentCache
from attnzoo.masks import AttentionMask
from attnzoo.modules.call import Call, Mask, Positions, begin, token_positions
from attnzoo.modules.checks import derive_head_dim
from attnzoo.modules.heads import attention_pairs, keep_columns, keep_rows
from attnzoo.modules.latent_circuits import LatentCircuits
from attnzoo.modules.latent_sizes import LatentSizes, check_latent_options, yarn_factor
from attnzoo.ops.latent_attention import latent_attention
from attnzoo.ops.softmax_attention import constant, softmax_attention
from attnzoo.ops.submodules import is_plain, normed
from attnzoo.rotary import Frequencies, Rotary, RotaryTable, layout, put_in_state_dict


class MultiHeadLatentAttention(LatentCircuits):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434 and 2412.19437).

    Keys and values of all heads are expanded from one latent c of width R per token; position enters through one
    more key of width dr, which all heads share:

        [qn | qr] = x Wq, or RMS(x Wqa) Wqb              H heads of width dn + dr
        [a | kr] = x Wkva;  c = RMS(a)                   c (B, T, R)
        [kn | v] = c Wkvb                                G heads of width dn and Dv
        s = (dn + dr)^-0.5 (qn . kn + rotate(qr) . rotate(kr));  o = softmax(s) v;  y = concat_h(o) Wo + bo

    The cache holds c and the rotated kr: R + dr numbers per token. Keys and values need not be expanded from it:
    with Wkvb's blocks Wuk, Wuv of a head, s = (Wuk^T qn) . c + qr . kr and o = Wuv (softmax(s) c). This
    absorbed form is exact, and cheaper while few queries look at many cached tokens.

    With `rope_mode="pre"` (after Jha and Reagen 2025, arXiv:2507.09394; a reading of its abstract, since no code is
    public) full keys are made and rotated first, and then compressed together with the values; dn is the whole
    head and the cache holds R numbers per token. `rope_mode="none"` or `rope=None` has no positions.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        kv_lora_rank: width R of the latent. Default: 4 dn.
        q_lora_rank: width of the queries' own bottleneck. Default: none.
        qk_nope_head_dim: width dn of the expanded key. Default: E / H.
        qk_rope_head_dim: width dr of the shared rotary key; even. Default: half of dn, rounded down to an even
            number. Only for rope_mode "decoupled".
        v_head_dim: width Dv of values. Default: dn.
        rope_mode: "decoupled", "pre" or "none".
        rope: rotary position embedding of width dr ("pre": dn). DeepSeek's layout is "interleaved".
        num_kv_heads: heads G that the latent is expanded to; must divide H. Default: H.
        rope_kv_heads: rotary keys, 1 or G.
        rope_inv_freq: (rope_kv_heads, dr / 2) frequencies of each rotary key in place of rope's, which then has no
            scaling; kept as numbers and in the state dict. For converted models.
        kv_norm: whether the latent is normalised.
        kv_b_bias: whether the expansion has a bias.
        q_bias: whether q_proj has one; needs q_lora_rank=None.
        norm_eps: of both latent norms.
        bias: whether the output projection and the first ones of queries and latents have one.
        scale: factor of the scores. Default: (dn + dr) ** -0.5, with a yarn scaling times (0.1 mscale_all_dim
            ln(factor) + 1) ** 2, as in DeepSeek's models.
        kdim: width of the context. Default: E.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        absorb: "auto" takes the absorbed form with a cache that holds tokens, outside of autograd, while it is
            the cheaper one; True and False decide. An expansion that is not a plain Linear (adapters, hooks,
            quantised) is always called.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = LatentCache
    sequence_forms: tuple[str, ...] = ("heads", "ring", "gather")
    expands_states = True
    one_source_reason = "key and value come from one latent, so they have one input"
    shown = ("rope_mode", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        *,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        rope_mode: str = "decoupled",
        rope: Rotary | None = Rotary(style="interleaved"),  # noqa: B008  (frozen)
        num_kv_heads: int | None = None,
        rope_kv_heads: int = 1,
        rope_inv_freq: Tensor | Frequencies | None = None,
        kv_norm: bool = True,
        kv_b_bias: bool = False,
        q_bias: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        scale: float | None = None,
        kdim: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        absorb: bool | str = "auto",
        backend: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        sizes = LatentSizes.derive(
            derive_head_dim(embed_dim, num_heads, qk_nope_head_dim), rope_mode, rope, kv_lora_rank, qk_rope_head_dim,
            v_head_dim,
        )  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, sizes.nope + sizes.rotary, v_head_dim=sizes.value, kdim=kdim,
            scale=scale, causal=causal, dropout=dropout, init_std=init_std, backend=backend, absorb=absorb, bias=bias,
            kv_norm=kv_norm, kv_b_bias=kv_b_bias, q_bias=q_bias, norm_eps=norm_eps, device=device, dtype=dtype,
        )  # fmt: skip
        check_latent_options(sizes, num_heads, self.num_kv_heads, rope_kv_heads, q_lora_rank, q_bias)
        features = self.num_kv_heads * (sizes.nope + sizes.value)
        if kv_lora_rank is not None and kv_lora_rank >= min(features, self.kdim + 1):
            made = f"keys and values have {features} features, made from {self.kdim}"
            warnings.warn(f"kv_lora_rank {kv_lora_rank} compresses nothing: {made}", stacklevel=2)
        self.rope_mode, self.rope = sizes.mode, sizes.rope
        self.kv_lora_rank, self.q_lora_rank = sizes.rank, q_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = sizes.nope, sizes.rotary
        self.rope_dim = self.head_dim if sizes.mode == "pre" else sizes.rotary
        self.rope_kv_heads = rope_kv_heads
        self.scale = self.head_dim**-0.5 * yarn_factor(self.rope) if scale is None else scale
        self.absorb = absorb

        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        if q_lora_rank is None:
            self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, q_bias, **factory_kwargs)
        else:
            self.input_layer = "q_a_proj"
            self.q_a_proj = nn.Linear(embed_dim, q_lora_rank, bias, **factory_kwargs)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, norm_eps, **factory_kwargs)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * self.head_dim, False, **factory_kwargs)
        if self.rope_mode == "pre":
            self.k_proj = nn.Linear(self.kdim, num_heads * self.head_dim, bias, **factory_kwargs)
            self.v_proj = nn.Linear(self.kdim, num_heads * self.v_head_dim, bias, **factory_kwargs)
            uncompressed = num_heads * (self.head_dim + self.v_head_dim)
            self.kv_a_proj = nn.Linear(uncompressed, self.kv_lora_rank, False, **factory_kwargs)
        else:
            rows = self.kv_lora_rank + rope_kv_heads * self.qk_rope_head_dim
            self.kv_a_proj_with_mqa = nn.Linear(self.kdim, rows, bias, **factory_kwargs)
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, norm_eps, **factory_kwargs) if kv_norm else None
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, features, kv_b_bias, **factory_kwargs)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, embed_dim, bias, **factory_kwargs)
        self.rope_inv_freq = sizes.frequencies(rope_inv_freq, rope_kv_heads)
        put_in_state_dict(self)
        self.reset_parameters()

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: LatentCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor."""
        call = begin(self, x, context, mask, positions, cache)
        q, q_rope, latent = self.compress(self.queries(x), call)
        options: dict[str, Any] = {"scale": self.scale, "dropout": self.weight_dropout, "backend": self.backend}
        with call.remember(latent) as (latent,):
            if call.moves_states:
                from attnzoo.ops.distributed_attention import expanded_attention

                out = expanded_attention(
                    q, (latent,), self.expanded, call.view, groups=self.heads.groups_read, q_rope=q_rope,
                    parameters=self.expansion_parameters(), **options,
                )  # fmt: skip
            elif self.absorbs(x, call.past) and (call.view.shards is None or self.kv_b_proj.bias is None):
                # The same as attention of H queries of width R + Gr dr over one key, which is the value too.
                key, value, bias = self.expansion()
                query = self.heads.products(self.absorbed_queries(q), key)
                u = latent_attention(query, q_rope, latent, call.view, latent_width=self.kv_lora_rank, **options)
                out = self.heads.products(u, value.transpose(1, 2))
                out = self.absorbed_outputs(out if bias is None else out + self._seen_bias(bias, out, latent, call))
            else:
                k, v, *rope = self.expanded(latent)
                k_rope = rope[0] if rope else None
                out = softmax_attention(q, k, v, call.view, q_rope=q_rope, k_rope=k_rope, **options)
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def absorbed_queries(self, q: Tensor) -> Tensor:
        """Queries (B, T, H, dn) as the expansion's keys meet them in the absorbed form."""
        return q

    def absorbed_outputs(self, out: Tensor) -> Tensor:
        """Outputs (B, T, H, Dv) made of the expansion's values in the absorbed form."""
        return out

    def queries(self, x: Tensor) -> Tensor:
        """Queries (B, T, H, dn + dr) before rotation."""
        if self.q_lora_rank is None:
            q: Tensor = self.q_proj(x)
        else:
            q = self.q_b_proj(normed(self.q_a_layernorm, self.q_a_proj(x)))
        return q.view(*x.shape[:2], self.num_heads, self.head_dim)

    def compress(self, q: Tensor, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries (B, T, H, dn), their rotated part (B, T, H, Gr dr) or None, and latents (B, S, 1, R + Gr dr)."""
        if self.rope_mode == "pre":
            # Pruned heads are still compressed: the latent is that of all.
            shape = (*call.source.shape[:2], self.heads.total)
            q, k = call.rotate(q, self.k_proj(call.source).view(*shape, self.head_dim))
            v = self.v_proj(call.source).view(*shape, self.v_head_dim)
            c = self.kv_a_proj(torch.cat([k, v], dim=-1).flatten(2))
            return q, None, normed(self.kv_a_layernorm, c).unsqueeze(2)
        widths = [self.kv_lora_rank, self.rope_kv_heads * self.qk_rope_head_dim]
        c, k_rope = self.kv_a_proj_with_mqa(call.source).split(widths, dim=-1)
        c = normed(self.kv_a_layernorm, c)
        if not self.qk_rope_head_dim:
            return q, None, c.unsqueeze(2)
        q, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        k_rope = self.read_by_all(k_rope)
        q_rope, k_rope = call.rotate(q_rope, k_rope.unflatten(-1, (self.rope_kv_heads, self.qk_rope_head_dim)))
        if self.rope_kv_heads > 1:
            # Each head's rotary query goes to the slot of its key, zeros elsewhere.
            slots = tuple(tuple(float(n == slot) for n in range(self.rope_kv_heads)) for slot in self.rope_slots())
            own = constant(slots, q.device, q.dtype).view(-1, self.rope_kv_heads)
            q_rope = (own[:, :, None] * q_rope[..., None, :]).flatten(-2)
        return q, q_rope, torch.cat([c, k_rope.flatten(2)], dim=-1).unsqueeze(2)

    def expanded(self, latent: Tensor, groups: slice | None = None) -> tuple[Tensor, ...]:
        """Keys, values and the rotary key (if there is one) of latents (B, S, 1, R + Gr dr), of some of the heads."""
        c, own = latent[:, :, 0, : self.kv_lora_rank], groups if self.heads.is_regular else None
        k, v = self.heads.spread(*self.expand(c, own))
        rope = (latent[..., self.kv_lora_rank :],) if self.rope_mode != "pre" and self.qk_rope_head_dim else ()
        return (k, v, *rope) if groups is None or own is not None else (k[:, :, groups], v[:, :, groups], *rope)

    def expand(self, c: Tensor, groups: slice | None = None) -> tuple[Tensor, Tensor]:
        """Keys (B, S, G, dn) and values (B, S, G, Dv) of latents c (B, S, R), of all heads or of these."""
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        if groups is not None and is_plain(self.kv_b_proj):
            rows = slice(groups.start * sum(widths), groups.stop * sum(widths))
            weight, bias = self.kv_b_proj.weight[rows], self.kv_b_proj.bias
            kv, groups = F.linear(c, weight, None if bias is None else bias[rows]), None
        else:
            kv = self.kv_b_proj(c)
        kv = kv.unflatten(-1, (-1, sum(widths)))
        k, v = (kv if groups is None else kv[:, :, groups]).split(widths, dim=-1)
        return k, v

    def expansion_parameters(self) -> tuple[Tensor, ...]:
        """What `expand` reads."""
        return tuple(self.kv_b_proj.parameters())

    def expansion(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Wuk (G, dn, R), Wuv (G, Dv, R) and the values' bias (G, Dv) or None: what `expand` multiplies by."""
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        weight, bias = self.kv_b_proj.weight, self.kv_b_proj.bias
        key, value = weight.view(self.num_kv_heads, sum(widths), self.kv_lora_rank).split(widths, dim=1)
        return key, value, None if bias is None else bias.view(-1, sum(widths))[:, widths[0] :]

    def rotation_tables(
        self, x: Tensor, source: Tensor, positions: Positions, mask: AttentionMask | None, **options: Any
    ) -> tuple[RotaryTable, RotaryTable]:
        """As the other mechanisms', or from this module's own frequencies, one row for each rotary key."""
        if self.rope_inv_freq is None or self.rope is None:
            return super().rotation_tables(x, source, positions, mask, **options)
        del options["limit"]
        tables, slots = [], constant(tuple(self.rope_slots()), x.device, torch.long)
        for at, heads in zip(token_positions(x, source, positions, mask, **options), (True, False), strict=True):
            angles = at[..., None, None].double() * constant(self.rope_inv_freq, x.device)
            cos, sin = layout(angles.index_select(-2, slots) if heads else angles, 1.0, self.rope.style, x.dtype)
            tables.append(RotaryTable(cos, sin, self.rope.style, True))
        return tables[0], tables[1]

    def _seen_bias(self, bias: Tensor, out: Tensor, latent: Tensor, call: Call) -> Tensor:
        """The values' bias (G, Dv) where a query sees anything: weights add up to 1, except in fully masked rows."""
        B, T, H, _ = out.shape
        bias = self.heads.of_each_head(bias).to(out.dtype)
        visible = call.view.dense((B, H, T, latent.shape[1]), out.device)
        return bias if visible is None else bias * visible.any(-1).expand(B, H, T).transpose(1, 2)[..., None]

    def can_absorb(self) -> bool:
        """Whether the expansion is a matrix that may be multiplied into queries and outputs."""
        return is_plain(self.kv_b_proj)

    def absorbs(self, x: Tensor, past: int) -> bool:
        """Whether a call on x after `past` cached tokens takes the absorbed form."""
        if not self.absorb or not self.can_absorb():
            return False
        if self.absorb == "auto":
            no_grad = not torch.is_grad_enabled() or not (x.requires_grad or self.kv_b_proj.weight.requires_grad)
            return past > 0 and no_grad and self.absorbed_is_cheaper(x.shape[1])
        if self.training and self.dropout:
            raise ValueError(f"absorb must not be True in training with dropout, got dropout {self.dropout}")
        return True

    def absorbed_is_cheaper(self, T: int) -> bool:
        """Whether T new queries over a long cache cost fewer FLOPs in the absorbed form."""
        R, expanded = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
        return T * self.num_heads * (2 * R - expanded) < R * self.num_kv_heads * expanded

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """The latent and the rotary keys: R + Gr dr numbers per token."""
        return ((1, self.kv_lora_rank + self.rope_kv_heads * self.qk_rope_head_dim),)

    def cache_layout(self) -> CacheLayout:
        """What a cache must look like to be this module's: latent and rotary keys side by side."""
        return CacheLayout(((1, self.kv_lora_rank), (self.rope_kv_heads, self.qk_rope_head_dim)))

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """FLOPs of "projections", "expansion" and "attention", in the form that `absorb` takes for T of S tokens."""
        S = T if S is None else S
        keys = T if self.causal else S
        E, H, G, R, Rq = self.embed_dim, self.num_heads, self.num_kv_heads, self.kv_lora_rank, self.q_lora_rank
        D, Dv, shared = self.head_dim, self.v_head_dim, self.rope_kv_heads * self.qk_rope_head_dim
        width = self.qk_nope_head_dim + Dv
        projections = 2 * T * (E * H * D if Rq is None else Rq * (E + H * D)) + 2 * T * H * Dv * E
        if self.rope_mode == "pre":
            projections += 2 * keys * self.heads.total * (D + Dv) * (self.kdim + R)
        else:
            projections += 2 * keys * self.kdim * (R + shared)
        pairs = attention_pairs(T, S, causal=self.causal)
        if self.counts_absorbed(T, S):
            expansion, attention = 2 * T * H * R * width, 2 * H * (2 * R + shared) * pairs
        else:
            expansion, attention = 2 * S * R * G * width, 2 * H * (self.qk_nope_head_dim + shared + Dv) * pairs
        return {"projections": projections, "expansion": expansion, "attention": attention}

    def counts_absorbed(self, T: int, S: int) -> bool:
        """Whether FLOPs of T new tokens that look at S are those of the absorbed form."""
        cheaper = self.absorb == "auto" and self.causal and S > T and self.absorbed_is_cheaper(T)
        return self.absorb is True or cheaper

    def tensor_splits(self) -> dict[str, Any]:
        """Queries and the expansion by head; latents are whole."""
        whole = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_proj", "kv_a_layernorm", "k_proj", "v_proj")
        by_head = {"q_proj": "heads", "q_b_proj": "heads", "kv_b_proj": "groups", "o_proj": "columns"}
        return {**by_head, **dict.fromkeys(whole, "whole")}

    def tensor_obstacle(self, parts: int) -> str | None:
        """As the base's."""
        if self.rope_mode == "pre" or self.rope_kv_heads > 1:
            return "its latent is made from the keys of all heads (rope_mode 'pre'), or it has several rotary keys"
        if self.num_kv_heads % parts:
            return f"num_kv_heads must be a multiple of the ranks, got {self.num_kv_heads}"
        return super().tensor_obstacle(parts)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of heads; latents and the cache stay as they are."""
        keep_rows(self.q_proj if self.q_lora_rank is None else self.q_b_proj, heads, self.head_dim)
        keep_rows(self.kv_b_proj, groups, self.qk_nope_head_dim + self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
