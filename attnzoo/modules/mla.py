"""Multi-head latent attention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.backends import check_name
from attnzoo.cache import LatentCache
from attnzoo.masks import AttentionMask, as_mask, visibility
from attnzoo.modules.checks import (
    check_cache,
    check_groups,
    check_input,
    check_options,
    check_sizes,
    derive_head_dim,
    one_source,
)
from attnzoo.modules.latent_sizes import LatentSizes
from attnzoo.modules.positions import rotary_tables, token_positions
from attnzoo.modules.structure import (
    attention_pairs,
    group_index,
    head_rows,
    keep_columns,
    keep_rows,
    surviving_heads,
)
from attnzoo.ops.latent_attention import latent_attention
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, layout, rotate


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434 and 2412.19437).

    Keys and values of all heads are expanded from one latent c of width R a token; position enters through one
    more key of width dr, which all heads share:

        [qn | qr] = x Wq, or RMS(x Wqa) Wqb              H heads of width dn + dr
        [a | kr] = x Wkva;  c = RMS(a)                   c (B, T, R)
        [kn | v] = c Wkvb                                G heads of width dn and Dv
        s = (dn + dr)^-0.5 (qn . kn + rotate(qr) . rotate(kr));  o = softmax(s) v;  y = concat_h(o) Wo + bo

    The cache holds c and the rotated kr: R + dr numbers a token. Keys and values need not be expanded from it:
    with Wkvb's blocks Wuk, Wuv of a head, s = (Wuk^T qn) . c + qr . kr and o = Wuv (softmax(s) c). This
    absorbed form is exact, and cheaper while few queries look at many cached tokens.

    With `rope_mode="pre"` (after Jha and Reagen 2025, arXiv:2507.09394; a reading of its abstract, since no code is
    public) full keys are made and rotated first, and then compressed together with the values; dn is the whole
    head and the cache holds R numbers a token. `rope_mode="none"` or `rope=None` has no positions.

    With a yarn scaling the scores are multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2, as in DeepSeek's models.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        kv_lora_rank: width R of the latent. Default: 4 E / H.
        q_lora_rank: width of the queries' own bottleneck. Default: none.
        qk_nope_head_dim: width dn of the expanded key. Default: E / H.
        qk_rope_head_dim: width dr of the shared rotary key; even. Default: half of dn, rounded down to an even
            number. Only for rope_mode "decoupled".
        v_head_dim: width Dv of values. Default: dn.
        rope_mode: "decoupled", "pre" or "none".
        rope: rotary position embedding of width dr ("pre": dn). DeepSeek's layout is "interleaved".
        num_kv_heads: heads G that the latent is expanded to; must divide H. Default: H.
        rope_kv_heads: rotary keys, 1 or G.
        rope_inv_freq: (rope_kv_heads, dr / 2) frequencies of each rotary key in place of rope's; they become a
            buffer of that name. For converted models.
        kv_norm: whether the latent is normalised.
        kv_b_bias: whether the expansion has a bias.
        q_bias: whether q_proj has one.
        norm_eps: of both latent norms.
        bias: whether the first projections of queries and latents, and the output projection, have one.
        scale: factor of the scores. Default: (dn + dr) ** -0.5, with the yarn factor.
        kdim: width of the context. Default: E.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        init_std: standard deviation of the projections' normal initialisation.
        absorb: "auto" takes the absorbed form with a cache that holds tokens, outside of autograd, while it is
            the cheaper one; True and False decide.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    aux_loss: Tensor | None = None
    rope_inv_freq: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
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
        rope_inv_freq: Tensor | None = None,
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
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = LatentSizes.derive(
            derive_head_dim(embed_dim, num_heads, None if qk_nope_head_dim is None else qk_nope_head_dim),
            rope_mode, rope, kv_lora_rank, qk_rope_head_dim, v_head_dim,
        )  # fmt: skip
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kdim = embed_dim if kdim is None else kdim
        check_sizes(
            embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, kdim=self.kdim,
            q_lora_rank=1 if q_lora_rank is None else q_lora_rank,
        )  # fmt: skip
        check_groups(num_heads, num_kv_heads)
        check_options(
            dropout=dropout, logit_softcap=None, sliding_window=None, sink_tokens=0, sink=None, scale=scale
        )  # fmt: skip
        if rope_kv_heads not in (1, num_kv_heads):
            raise ValueError(f"rope_kv_heads must be 1 or num_kv_heads {num_kv_heads}, got {rope_kv_heads}")
        if sizes.mode == "pre" and (num_kv_heads < num_heads or rope_kv_heads > 1):
            raise ValueError(
                f"num_kv_heads and rope_kv_heads must be left alone with rope_mode 'pre', got {num_kv_heads} "
                f"and {rope_kv_heads}"
            )
        if absorb not in (True, False, "auto"):
            raise ValueError(f"absorb must be True, False or 'auto', got {absorb!r}")
        if causal and kdim is not None:
            raise ValueError(f"kdim needs causal=False, got kdim={kdim}")
        features = num_kv_heads * (sizes.nope + sizes.value)
        if kv_lora_rank is not None and kv_lora_rank >= min(features, self.kdim + 1):
            warnings.warn(
                f"kv_lora_rank {kv_lora_rank} compresses nothing: keys and values have {features} features, made "
                f"from {self.kdim}",
                stacklevel=2,
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rope_mode, self.rope = sizes.mode, sizes.rope
        self.kv_lora_rank, self.q_lora_rank = sizes.rank, q_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = sizes.nope, sizes.rotary
        self.v_head_dim = sizes.value
        self.head_dim = sizes.nope + sizes.rotary
        self.rope_kv_heads = rope_kv_heads
        self.scale = self.head_dim**-0.5 * _yarn_factor(self.rope) if scale is None else scale
        self.causal = causal
        self.dropout = dropout
        self.init_std = init_std
        self.absorb = absorb
        self.backend = check_name(backend)
        self._total_heads, self._group_size = num_heads, num_heads // num_kv_heads
        self._kept_heads, self._kept_groups = tuple(range(num_heads)), tuple(range(num_kv_heads))
        self._kv_index: tuple[int, ...] | None = None

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if q_lora_rank is None:
            self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, q_bias, **made)
        else:
            self.q_a_proj = nn.Linear(embed_dim, q_lora_rank, bias, **made)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, norm_eps, **made)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * self.head_dim, False, **made)
        if self.rope_mode == "pre":
            self.k_proj = nn.Linear(self.kdim, num_heads * self.head_dim, bias, **made)
            self.v_proj = nn.Linear(self.kdim, num_heads * self.v_head_dim, bias, **made)
            uncompressed = num_heads * (self.head_dim + self.v_head_dim)
            self.kv_a_proj = nn.Linear(uncompressed, self.kv_lora_rank, False, **made)
        else:
            rows = self.kv_lora_rank + rope_kv_heads * self.qk_rope_head_dim
            self.kv_a_proj_with_mqa = nn.Linear(self.kdim, rows, bias, **made)
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, norm_eps, **made) if kv_norm else None
        expanded = num_kv_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, expanded, kv_b_bias, **made)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, embed_dim, bias, **made)
        if rope_inv_freq is not None:
            wanted = (rope_kv_heads, self.qk_rope_head_dim // 2)
            if self.rope_mode != "decoupled" or tuple(rope_inv_freq.shape) != wanted:
                raise ValueError(
                    f"rope_inv_freq must have shape (rope_kv_heads, qk_rope_head_dim / 2) = {wanted} with "
                    f"rope_mode 'decoupled', got {tuple(rope_inv_freq.shape)} with {self.rope_mode!r}"
                )
            rope_inv_freq = rope_inv_freq.detach().to(device=device, dtype=torch.float64)
        self.register_buffer("rope_inv_freq", rope_inv_freq)
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, norms 1."""
        std = self.init_std if std is None else std
        for name, module in self.named_children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=out_std if name == "o_proj" and out_std is not None else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: LatentCache | None = None,
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
        source = one_source(self, x, context, "key and value come from one latent, so they have one input")
        past = 0 if cache is None else cache.length
        if cache is not None:
            check_cache(cache, LatentCache, self.causal, context, mask)
        q = self.queries(x)
        limit = None if cache is None else cache.max_length
        latent, q_rope = self._latent(q, source, positions, mask, context is not None, past, limit)
        if self.rope_mode == "pre":
            q_nope = q_rope
            q_rope = q_rope[..., :0]
        else:
            q_nope = q[..., : self.qk_nope_head_dim]
        if cache is not None:
            latent = cache.append(latent)
        absorbed = self._absorbs(x, past)
        attend = self._attend_absorbed if absorbed else self._attend_expanded
        out = attend(q_nope, q_rope, latent, mask, past if cache is not None else None)
        y: Tensor = self.o_proj(out.flatten(2))
        return y

    def queries(self, x: Tensor) -> Tensor:
        """Queries (B, T, H, dn + dr) before rotation."""
        if self.q_lora_rank is None:
            q: Tensor = self.q_proj(x)
        else:
            q = self.q_b_proj(_normed(self.q_a_layernorm, self.q_a_proj(x)))
        return q.view(*x.shape[:2], self.num_heads, self.head_dim)

    def expand(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, G, dn) and values (B, S, G, Dv) of latents c (B, S, R)."""
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        kv: Tensor = self.kv_b_proj(c)
        k, v = torch.split(kv.view(*c.shape[:2], self.num_kv_heads, sum(widths)), widths, dim=-1)
        return k, v

    def expansion(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Wuk (G, dn, R), Wuv (G, Dv, R) and the values' bias (G, Dv) or None: what `expand` multiplies by."""
        widths = [self.qk_nope_head_dim, self.v_head_dim]
        weight = self.kv_b_proj.weight.view(self.num_kv_heads, sum(widths), self.kv_lora_rank)
        key, value = torch.split(weight, widths, dim=1)
        if self.kv_b_proj.bias is None:
            return key, value, None
        return key, value, self.kv_b_proj.bias.view(self.num_kv_heads, -1)[:, widths[0] :]

    def _latent(
        self,
        q: Tensor,
        source: Tensor,
        positions: Tensor | tuple[Tensor, Tensor] | None,
        mask: AttentionMask | None,
        cross: bool,
        past: int,
        limit: int | None,
    ) -> tuple[Tensor, Tensor]:
        """What the cache holds, (B, S, 1, R + Gr dr), and the rotated queries (B, T, H, dr), or (.., dn) for "pre"."""
        B, S = source.shape[:2]
        like = source.unsqueeze(2)
        if self.rope_mode == "pre" and self.rope is not None:
            # Pruned heads are still compressed: the latent is that of all.
            k = self.k_proj(source).view(B, S, self._total_heads, self.head_dim)
            v = self.v_proj(source).view(B, S, self._total_heads, self.v_head_dim)
            q_table, k_table = rotary_tables(
                self.rope, self.head_dim, q, k, positions, mask, cross=cross, past=past, limit=limit
            )
            k = rotate(k, *k_table, self.rope.style)
            joined = torch.cat([k, v], dim=-1).flatten(2)
            c = self._norm(self.kv_a_proj(joined))
            return c.unsqueeze(2), rotate(q, *q_table, self.rope.style)
        a = self.kv_a_proj_with_mqa(source)
        c, k_rope = a[..., : self.kv_lora_rank], a[..., self.kv_lora_rank :]
        c = self._norm(c)
        q_rope = q[..., self.qk_nope_head_dim :]
        if self.rope is None:
            return c.unsqueeze(2), q_rope
        k_rope = k_rope.unflatten(-1, (self.rope_kv_heads, self.qk_rope_head_dim))
        if self.rope_inv_freq is None:
            q_table, k_table = rotary_tables(
                self.rope, self.qk_rope_head_dim, q, like, positions, mask, cross=cross, past=past, limit=limit
            )
            q_rope = rotate(q_rope, *q_table, self.rope.style)
            k_rope = rotate(k_rope, *k_table, self.rope.style)
        else:
            at_q, at_k = token_positions(q, like, positions, mask, cross=cross, past=past)
            k_table = self._own_tables(at_k, k_rope.dtype)
            q_table = k_table if at_q is at_k else self._own_tables(at_q, q.dtype)
            slots = torch.tensor(self._rope_slots(), device=q.device)
            q_table = (q_table[0].index_select(-2, slots), q_table[1].index_select(-2, slots))
            q_rope = rotate(q_rope, *q_table, self.rope.style, per_head=True)
            k_rope = rotate(k_rope, *k_table, self.rope.style, per_head=True)
        return torch.cat([c, k_rope.flatten(2)], dim=-1).unsqueeze(2), q_rope

    def _norm(self, c: Tensor) -> Tensor:
        return c if self.kv_a_layernorm is None else _normed(self.kv_a_layernorm, c)

    def _own_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Tables (T, Gr, dr) or (B, T, Gr, dr) from this module's own frequencies."""
        assert self.rope_inv_freq is not None
        assert self.rope is not None
        angles = positions[..., None, None].double() * self.rope_inv_freq.double()
        return layout(angles, 1.0, self.rope.style, dtype)

    def _rope_slots(self) -> list[int]:
        """Which rotary key each query head reads."""
        return [h // self._group_size if self.rope_kv_heads > 1 else 0 for h in self._kept_heads]

    def _placed(self, q_rope: Tensor) -> Tensor:
        """Rotary queries (B, T, H, Gr dr): each head's in the slot of its key, zeros elsewhere."""
        if self.rope_kv_heads == 1:
            return q_rope
        slots = torch.tensor(self._rope_slots(), device=q_rope.device)
        own = torch.nn.functional.one_hot(slots, self.rope_kv_heads).to(q_rope.dtype)
        return (own[:, :, None] * q_rope[..., None, :]).flatten(-2)

    def _attend_expanded(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, mask: AttentionMask | None, start: int | None
    ) -> Tensor:
        """Outputs (B, T, H, Dv) with keys and values of every token made from its latent."""
        R = self.kv_lora_rank
        k, v = self.expand(latent[:, :, 0, :R])
        if self._kv_index is not None:
            index = torch.tensor(self._kv_index, device=k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        has_rope = q_rope.shape[-1] > 0
        return softmax_attention(
            q, k, v, causal=self.causal, mask=mask, scale=self.scale,
            q_extra=self._placed(q_rope) if has_rope else None, k_extra=latent[..., R:] if has_rope else None,
            dropout=self.dropout if self.training else 0.0, query_start=start, backend=self.backend,
        )  # fmt: skip

    def _attend_absorbed(
        self, q: Tensor, q_rope: Tensor, latent: Tensor, mask: AttentionMask | None, start: int | None
    ) -> Tensor:
        """The same as attention of H queries of width R + Gr dr over one key, which is the value too."""
        key, value, bias = self.expansion()
        reads = torch.tensor(self._reads(), device=q.device)
        key, value = key.index_select(0, reads).to(q.dtype), value.index_select(0, reads).to(q.dtype)
        query = torch.einsum("bthd,hdr->bthr", q, key)
        u = latent_attention(
            query, self._placed(q_rope) if q_rope.shape[-1] else None, latent, latent_width=self.kv_lora_rank,
            causal=self.causal, mask=mask, scale=self.scale, dropout=self.dropout if self.training else 0.0,
            query_start=start, backend=self.backend,
        )  # fmt: skip
        out = torch.einsum("bthr,hdr->bthd", u, value)
        if bias is None:
            return out
        B, T, H, _ = q.shape
        seen = visibility(
            mask, (B, H, T, latent.shape[1]), causal=self.causal, window=None, sink_tokens=0,
            query_start=latent.shape[1] - T if start is None else start, key_positions=None, device=q.device,
        )  # fmt: skip
        bias = bias.index_select(0, reads).to(out.dtype)
        # Weights add up to 1, except in a row that sees nothing.
        return out + (bias if seen is None else bias * seen.any(-1).expand(B, H, T).transpose(1, 2)[..., None])

    def _reads(self) -> list[int]:
        """Which expanded head each query head reads."""
        return list(self._kv_index or [h * self.num_kv_heads // self.num_heads for h in range(self.num_heads)])

    def _absorbs(self, x: Tensor, past: int) -> bool:
        """Whether this call takes the absorbed form."""
        if self.absorb == "auto":
            no_grad = not torch.is_grad_enabled() or not (x.requires_grad or self.kv_b_proj.weight.requires_grad)
            return past > 0 and no_grad and self.absorbed_is_cheaper(x.shape[1])
        if self.absorb and self.training and self.dropout:
            raise ValueError(f"absorb must not be True in training with dropout, got dropout {self.dropout}")
        return bool(self.absorb)

    def absorbed_is_cheaper(self, T: int) -> bool:
        """Whether T new queries over a long cache cost fewer FLOPs in the absorbed form."""
        R, expanded = self.kv_lora_rank, self.qk_nope_head_dim + self.v_head_dim
        return T * self.num_heads * (2 * R - expanded) < R * self.num_kv_heads * expanded

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentCache:
        """A cache for max_length tokens; device and dtype default to those of the module's weights."""
        weight = self.kv_b_proj.weight
        return LatentCache(
            batch_size,
            max_length,
            ((1, self.kv_lora_rank + self.rope_kv_heads * self.qk_rope_head_dim),),
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """R + Gr dr numbers of that dtype."""
        return (self.kv_lora_rank + self.rope_kv_heads * self.qk_rope_head_dim) * dtype.itemsize

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens that look at S keys, T of them new (default S = T).

        With cached tokens (S > T, causal) in the form that absorb="auto" takes, else expanded.
        """
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`: "projections", "expansion" of latents (or of queries and outputs) and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        E, H, G, R = self.embed_dim, self.num_heads, self.num_kv_heads, self.kv_lora_rank
        D, Dv, shared = self.head_dim, self.v_head_dim, self.rope_kv_heads * self.qk_rope_head_dim
        width = self.qk_nope_head_dim + Dv
        Rq = self.q_lora_rank
        projections = 2 * T * (E * H * D if Rq is None else Rq * (E + H * D))
        if self.rope_mode == "pre":
            projections += 2 * keys * self._total_heads * (D + Dv) * (self.kdim + R)
        else:
            projections += 2 * keys * self.kdim * (R + shared)
        pairs = attention_pairs(T, S, causal=self.causal, window=None)
        absorbed = self.absorb is True or (
            self.absorb == "auto" and self.causal and S > T and self.absorbed_is_cheaper(T)
        )
        if absorbed:
            expansion, core = 2 * T * H * R * width, 2 * H * (2 * R + shared) * pairs
        else:
            expansion, core = 2 * S * R * G * width, 2 * H * (self.qk_nope_head_dim + shared + Dv) * pairs
        return {"projections": projections + 2 * T * H * Dv * E, "expansion": expansion, "attention": core}

    def qk_circuit(self, part: str = "full") -> list[tuple[Tensor, Tensor]]:
        """Per query head the factors (WQ_h, WK_h), each (d, E), of the logits' bilinear form at offset 0.

        Norm gains are folded in; RMS statistics and biases are left out. part: "full", the expanded features
        "nope" or the shared key's features "rope".
        """
        parts = {"full": slice(None), "nope": slice(self.qk_nope_head_dim), "rope": slice(self.qk_nope_head_dim, None)}
        if part not in parts:
            raise ValueError(f"part must be 'full', 'nope' or 'rope', got {part!r}")
        if part != "full" and not self.qk_rope_head_dim:
            raise ValueError(f"part must be 'full' for a module without a rotary key of its own, got {part!r}")
        wq = self.query_weights()
        key = self.expansion()[0].detach()
        if self.kv_a_layernorm is not None:
            key = key * self.kv_a_layernorm.weight.detach()
        if self.rope_mode == "pre":
            shape = (self._total_heads, -1, self.kdim)
            kv = [p.weight.detach().view(shape) for p in (self.k_proj, self.v_proj)]
            down, rope = self.kv_a_proj.weight.detach() @ torch.cat(kv, dim=1).flatten(0, 1), None
        else:
            weight = self.kv_a_proj_with_mqa.weight.detach()
            down = weight[: self.kv_lora_rank]
            rope = weight[self.kv_lora_rank :].view(self.rope_kv_heads, self.qk_rope_head_dim, self.kdim)
        factors = []
        for h, (g, slot) in enumerate(zip(self._reads(), self._rope_slots(), strict=True)):
            wk = key[g] @ down
            if rope is not None:
                wk = torch.cat([wk, rope[slot]])
            factors.append((wq[h, parts[part]], wk[parts[part]]))
        return factors

    def query_weights(self) -> Tensor:
        """Query weights per head, (H, dn + dr, E), through the queries' bottleneck if there is one; detached."""
        if self.q_lora_rank is None:
            weight = self.q_proj.weight.detach()
        else:
            gain = self.q_a_layernorm.weight.detach()
            weight = (self.q_b_proj.weight.detach() * gain) @ self.q_a_proj.weight.detach()
        return weight.view(self.num_heads, self.head_dim, self.embed_dim)

    @property
    def pruned_heads(self) -> tuple[int, ...]:
        """Original numbers of the query heads that are gone, ascending."""
        return tuple(h for h in range(self._total_heads) if h not in self._kept_heads)

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove query heads as `GroupedQueryAttention.prune_heads` does; latents and the cache stay as they are."""
        old_heads, old_groups = self._kept_heads, self._kept_groups
        heads = surviving_heads(self._total_heads, self.pruned_heads, indices)
        groups, self._kv_index = group_index(heads, self._group_size)
        at = [old_heads.index(h) for h in heads]
        at_group = [old_groups.index(g) for g in groups]
        keep_rows(self.q_proj if self.q_lora_rank is None else self.q_b_proj, head_rows(at, self.head_dim))
        keep_rows(self.kv_b_proj, head_rows(at_group, self.qk_nope_head_dim + self.v_head_dim))
        keep_columns(self.o_proj, head_rows(at, self.v_head_dim))
        self._kept_heads, self._kept_groups = heads, groups
        self.num_heads, self.num_kv_heads = len(heads), len(groups)

    def extra_repr(self) -> str:
        """The sizes and the options that are not at their defaults."""
        shown = [f"{self.embed_dim}, {self.num_heads}, kv_lora_rank={self.kv_lora_rank}, rope_mode={self.rope_mode!r}"]
        sizes = ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "pruned_heads")
        shown += [f"{name}={getattr(self, name)}" for name in sizes if getattr(self, name)]
        return ", ".join([*shown, f"causal={self.causal}", f"backend={self.backend}"])


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the gain's dtype: under autocast x is half precision and the gain is float32."""
    y: Tensor = norm(x.to(norm.weight.dtype)).to(x.dtype)
    return y


def _yarn_factor(rope: Rotary | None) -> float:
    """m^2 with m = 0.1 mscale_all_dim ln(factor) + 1, the factor that DeepSeek's yarn puts on the scores."""
    if rope is None or rope.scaling is None or rope.kind != "yarn":
        return 1.0
    factor, weight = rope.scaling_factor, rope.scaling.get("mscale_all_dim") or 0.0
    m: float = 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
    return m * m
