"""Linear attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache_state import StateCache
from attnzoo.modules.call import Mask, Positions
from attnzoo.modules.linear_base import FeatureAttention, check_normalisable
from attnzoo.ops.linear_attention import linear_attention, normalised
from attnzoo.ops.precision import without_autocast
from attnzoo.rotary import Rotary
from attnzoo.rules import check_sizes


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
        qk_norm_eps: added to that mean square; None takes the dtype's machine epsilon.
        sum_norm: divide each feature vector by its sum + 1e-4.
        output_norm: "none" or "rmsnorm", over each head's output.
        norm_eps: added to that mean square.
        gate: multiply heads by swish(x Wg).
        rope: rotary position embedding of the features. Rotated features never enter the denominator.
        chunk_size: tokens of a chunk in the chunked form; it changes speed only.
        dropout: of the output, in training.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked, on GPUs as "triton"), "eager" (the quadratic definition) or "triton" (chunked, in
            kernels).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    sequence_forms: tuple[str, ...] = ("state",)
    norm: nn.RMSNorm | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
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
        qk_norm_eps: float | None = 1e-6,
        sum_norm: bool = False,
        output_norm: str = "none",
        norm_eps: float = 1e-5,
        gate: bool = False,
        rope: Rotary | None = None,
        chunk_size: int = 64, dropout: float = 0.0, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, v_head_dim=v_head_dim, kdim=kdim, bias=bias,
            out_bias=out_bias, causal=causal, feature_map=feature_map, feature_eps=feature_eps, scale=scale,
            qk_norm=qk_norm, qk_norm_eps=qk_norm_eps, output_norm=output_norm, norm_eps=norm_eps, gate=gate, rope=rope,
            dropout=dropout, init_std=init_std, backend=backend, device=device, dtype=dtype, normalize=normalize,
            normalizer_eps=normalizer_eps, sum_norm=sum_norm,
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
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: StateCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor.

        Masks are `AttentionMask.padding` or `.packed`; a dense one has no meaning here.
        """
        call = self.begin(x, context, mask, positions, cache)
        plain_q, plain_k, q, k, v = self.features(x, call)
        state, sums = (None, None) if cache is None else cache.current()
        options: dict[str, Any] = {
            "size": self.chunk_size, "causal": self.causal, "mask": call.view.mask, "shards": call.view.shards,
            "backend": self.backend,
        }  # fmt: skip
        with without_autocast(x):
            out, state = linear_attention(q, k, v, state=state, **options)
            if self.normalize:
                sums = None if sums is None else sums[..., None]
                bottom, _ = linear_attention(plain_q, plain_k, v.new_ones(*v.shape[:3], 1), state=sums, **options)
                out = normalised(out, bottom, self.normalizer_eps)
        y = self.project_heads(out, x, v.dtype)
        if cache is not None and state is not None:
            if call.view.shards is None:
                cache.store(state, plain_k)
            else:
                cache.fill(state, call.view.shards.summed(plain_k.sum(1)), call.view.shards.tokens)
        return y

    def normalised_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Features over their sum, with `sum_norm`."""
        if not self.sum_norm:
            return q, k
        return q / (q.sum(-1, keepdim=True) + 1e-4), k / (k.sum(-1, keepdim=True) + 1e-4)

    def state_numbers(self, tokens: int) -> int:  # noqa: ARG002
        """Numbers of the states that a rank with so many tokens shares, whatever their number."""
        groups, width = self.cache_widths()[1]
        return groups * width * (self.v_head_dim + int(self.normalize))

    def cache_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16) -> int:  # noqa: ARG002
        """0: the state does not grow; see `state_bytes`."""
        return 0

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections" and "attention", in the chunked form (recurrent for T = 1)."""
        S = T if S is None else S
        keys = T if self.causal else S
        groups, Df = self.cache_widths()[1]
        H, Dv = self.num_heads, self.v_head_dim + int(self.normalize)
        states = 2 * keys * groups * Df * Dv + 2 * T * H * Df * Dv
        within = 0
        if self.causal and T > 1:
            chunks = -(-T // self.chunk_size)
            padded = chunks * self.chunk_size
            states = 2 * padded * (groups + H) * Df * Dv
            within = 2 * padded * self.chunk_size * H * (Df * (1 + int(self.normalize)) + Dv)
        return {"projections": self.projection_flops(T, keys), "attention": states + within}
