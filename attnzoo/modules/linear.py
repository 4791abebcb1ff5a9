"""Linear attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from attnzoo.cache_state import StateCache
from attnzoo.masks import AttentionMask
from attnzoo.modules.checks import check_cache, check_sizes, one_source
from attnzoo.modules.linear_base import FeatureAttention, check_normalisable
from attnzoo.ops.fused_linear import continued, fused_linear_attention
from attnzoo.ops.linear_attention import (
    block_weights,
    document_blocks,
    linear_attention_chunked,
    linear_attention_reference,
)
from attnzoo.ops.precision import without_autocast
from attnzoo.rotary import Rotary


class LinearAttention(FeatureAttention):
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236).

    The softmax is replaced by features, so that keys and values can be summed before the query is known:

        S_t = sum_{s <= t} k^_s v_s^T,  z_t = sum_{s <= t} k~_s
        o_t = q^_t^T S_t / (q~_t^T z_t + e_n)

    with q~ = scale phi(q), k~ = phi(k), and q^, k^ the same after the rotation (if there is one); without
    `normalize` there is no denominator. Then, where asked for, o <- RMS(o), o <- o swish(x Wg), and the output
    projection. Time and memory are linear in T; decoding needs S and z alone.

    Two presets are usual: the paper's (the defaults), and that of language models: feature_map "relu",
    normalize=False, output_norm="rmsnorm", gate=True, rope=Rotary(), norm_eps=1e-6.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        v_head_dim: width Dv of values. Default: D.
        kdim: width of the context. Default: E.
        bias: whether the q, k and v projections have one.
        out_bias: whether the output projection has one. Default: bias.
        causal: no query sees a later key.
        feature_map: "elu", "relu", "identity", "hedgehog", "t2r", "elementwise_product" or "dpfp", see `FeatureMap`.
        feature_eps: added to features.
        normalize: divide by q~ . z; needs features that cannot be negative.
        normalizer_eps: e_n.
        scale: of the queries' features. Default: D ** -0.5.
        qk_norm: RMS-normalise queries and keys over all heads together, before the features.
        qk_norm_eps: added to that mean square.
        sum_norm: divide each feature vector by its sum + 1e-4.
        output_norm: "none" or "rmsnorm", over each head's output.
        norm_eps: added to that mean square.
        gate: multiply heads by swish(x Wg).
        rope: rotary position embedding of the features. Rotated features never enter the denominator.
        chunk_size: tokens of a chunk in the chunked form; it changes speed only.
        dropout: of the output, in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked), "eager" (the quadratic definition) or "triton" (chunked, in kernels).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        causal: bool = True,
        feature_map: str = "elu",
        feature_eps: float = 0.0,
        normalize: bool = True,
        normalizer_eps: float = 1e-6,
        scale: float | None = None,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        sum_norm: bool = False,
        output_norm: str = "none",
        norm_eps: float = 1e-5,
        gate: bool = False,
        rope: Rotary | None = None,
        chunk_size: int = 64,
        dropout: float = 0.0,
        init_std: float = 0.02,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = head_dim if head_dim is not None else max(1, embed_dim // max(1, num_heads))
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, bias=bias,
            out_bias=out_bias, causal=causal, feature_map=feature_map, feature_eps=feature_eps,
            scale=max(1, width) ** -0.5 if scale is None else scale, qk_norm=qk_norm, qk_norm_eps=qk_norm_eps,
            output_norm=output_norm, norm_eps=norm_eps, gate=gate, rope=rope, dropout=dropout, init_std=init_std,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        check_sizes(chunk_size=chunk_size)
        if normalize:
            check_normalisable(feature_map, "normalize", normalize)
        elif output_norm == "none":
            warnings.warn(
                "linear attention without normalize and output_norm grows with the length and trains badly",
                stacklevel=2,
            )
        self.normalize = normalize
        self.normalizer_eps = normalizer_eps
        self.sum_norm = sum_norm
        self.chunk_size = chunk_size
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | AttentionMask | None = None,
        positions: Tensor | tuple[Tensor, Tensor] | None = None,
        cache: StateCache | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: (B, S, kdim) for cross-attention; needs causal=False, and positions if rope is set.
            mask: AttentionMask.padding or .packed; a dense mask has no meaning here.
            positions: (T,) or (B, T) integers for the rotation. Default: continue the cache, else 0 .. T-1,
                restarting in each packed document. A pair (queries, keys) in cross-attention.
            cache: from `init_cache`; its sums are updated in place.
        """
        backend, dtype = self.chosen_backend(x), self.product_dtype(x)
        mask = self.checked_mask(mask)
        if not self.num_heads:
            return self.without_heads(x, cache)
        source = one_source(self, x, context)
        past, limit = (0, None) if cache is None else (cache.length, cache.max_length)
        plain_q, plain_k, q, k, v = self.features(x, source, mask, positions, past, limit)
        with without_autocast(x):
            if cache is not None:
                check_cache(cache, StateCache, self.causal, context, mask)
                out = self._continue(cache, plain_q, plain_k, q, k, v, backend, dtype)
            else:
                out = self._attend(q, k, v, mask, backend, dtype)[0]
                if self.normalize:
                    out = out / self._denominator(plain_q, plain_k, mask, backend, dtype)
        return self.finish(out, x, backend)

    def normalised_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features over their sum, with `sum_norm`."""
        if not self.sum_norm:
            return q, k
        return q / (q.sum(-1, keepdim=True) + 1e-4), k / (k.sum(-1, keepdim=True) + 1e-4)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, backend: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Numerators (B, T, H, Dv), and without packing the state after all keys."""
        B, T, S = q.shape[0], q.shape[1], k.shape[1]
        packed = mask is not None and mask.cu_seqlens is not None
        if backend == "eager":
            weights = torch.ones(T, S, dtype=q.dtype, device=q.device)
            weights = weights.tril() if self.causal else weights
            if packed and mask is not None:
                same = AttentionMask(cu_seqlens=mask.cu_seqlens).visible(B, 1, T, S)
                assert same is not None
                weights = weights * same
            return linear_attention_reference(q, k, v, weights), q
        shape: dict[str, Any] = {"size": self.chunk_size, "causal": self.causal}
        if not packed:
            if backend == "triton":
                return fused_linear_attention(q, k, v, dtype=dtype, **shape)
            return linear_attention_chunked(q, k, v, **shape)
        assert mask is not None
        blocks = document_blocks(mask, B, T, self.chunk_size)
        if backend == "triton" and self.causal:
            return fused_linear_attention(q, k, v, dtype=dtype, blocks=blocks, **shape)
        ones = torch.ones(1, 1, dtype=q.dtype, device=q.device)
        weights = block_weights(ones.expand(blocks.count, blocks.count), blocks, blocks.count)
        if backend == "triton":
            return fused_linear_attention(q, k, v, dtype=dtype, blocks=blocks, weights=weights, **shape)
        out, end = linear_attention_chunked(
            blocks.spread(q), blocks.spread(k), blocks.spread(v), weights=weights, **shape
        )
        return blocks.gather(out), end

    def _denominator(
        self, q: Tensor, k: Tensor, mask: AttentionMask | None, backend: str, dtype: torch.dtype
    ) -> Tensor:
        """q~ . z + e_n, (B, T, H, 1)."""
        ones = k.new_ones(*k.shape[:3], 1)
        return self._attend(q, k, ones, mask, backend, dtype)[0] + self.normalizer_eps

    def _continue(
        self,
        cache: StateCache,
        plain_q: Tensor,
        plain_k: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Outputs of new tokens after the cached ones; the cache moves on."""
        cache.admit(q.shape[0], q.shape[1], v)
        states, sums = cache.streams
        if backend == "triton":
            ones = plain_k.new_ones(*plain_k.shape[:3], 1)
            out = continued(q, k, v, states, size=self.chunk_size, dtype=dtype)
            bottom = continued(plain_q, plain_k, ones, sums.unsqueeze(-1), size=self.chunk_size, dtype=dtype)
            if self.normalize:
                out = out / (bottom + self.normalizer_eps)
        elif q.shape[1] == 1:
            k, v, plain_k = k.detach(), v.detach(), plain_k.detach()
            states += torch.einsum("bgd,bgv->bgdv", k[:, 0], v[:, 0])
            sums += plain_k[:, 0]
            B, _, H, D = q.shape
            by_group = (B, states.shape[1], H // max(states.shape[1], 1), D)
            grouped = q[:, 0].view(by_group)
            out = torch.einsum("bgrd,bgdv->bgrv", grouped, states).flatten(1, 2)[:, None]
            if self.normalize:
                plain = plain_q[:, 0].view(by_group)
                out = out / (
                    torch.einsum("bgrd,bgd->bgr", plain, sums).flatten(1)[:, None, :, None] + self.normalizer_eps
                )
        else:
            out, end = linear_attention_chunked(q, k, v, size=self.chunk_size, causal=True, state=states.clone())
            ones = plain_k.new_ones(*plain_k.shape[:3], 1)
            bottom, last = linear_attention_chunked(
                plain_q, plain_k, ones, size=self.chunk_size, causal=True, state=sums.clone()[..., None]
            )
            states.copy_(end.detach())
            sums.copy_(last.detach()[..., 0])
            if self.normalize:
                out = out / (bottom + self.normalizer_eps)
        cache.length += q.shape[1]
        return out

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StateCache:
        """Running sums for up to max_length tokens: float32, or float64 for a float64 module or dtype."""
        weight = self.q_proj.weight
        wanted = torch.promote_types(weight.dtype if dtype is None else dtype, torch.float32)
        groups = self.state_groups()
        return StateCache(
            batch_size, max_length, ((groups, self.feature_dim, self.v_head_dim), (groups, self.feature_dim)),
            device=weight.device if device is None else device, dtype=wanted,
        )  # fmt: skip

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:  # noqa: ARG002
        """0: the state does not grow; see `state_bytes`."""
        return 0

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:  # noqa: ARG002
        """Bytes of one sequence's state, whatever the number of tokens: G Df (Dv + 1) numbers of at least float32."""
        item = torch.promote_types(dtype, torch.float32).itemsize
        return item * self.state_groups() * self.feature_dim * (self.v_head_dim + 1)

    def flops(self, T: int, S: int | None = None) -> int:
        """Forward FLOPs of one sequence: T new tokens; S, with those before them, does not matter if causal."""
        return sum(self.flops_by_part(T, S).values())

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """As `flops`, in the chunked form (recurrent for T = 1): "projections" and "attention"."""
        S = T if S is None else S
        keys = T if self.causal else S
        H, Df, Dv = self.num_heads, self.feature_dim, self.v_head_dim + int(self.normalize)
        states = 2 * keys * self.state_groups() * Df * Dv + 2 * T * H * Df * Dv
        within = 0
        if self.causal and T > 1:
            chunks = -(-T // self.chunk_size)
            padded = chunks * self.chunk_size
            states = 2 * padded * (self.state_groups() + H) * Df * Dv
            within = 2 * padded * self.chunk_size * H * (Df * (1 + int(self.normalize)) + Dv)
        return {"projections": self.projection_flops(T, keys), "attention": states + within}
