"""Talking-heads attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.base import Factors, Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.checks import derive_head_dim
from attnzoo.modules.heads import HeadLayout, attention_pairs, keep_columns, keep_entries, keep_rows
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_sizes, one_of


class TalkingHeadsAttention(Mechanism):
    """Talking-heads attention (Shazeer et al. 2020, arXiv:2003.02436).

    Heads are mixed by one matrix before the softmax and by another after it:

        J_m = D^-0.5 q_m . k_m                       m = 1 .. Hk
        L_h = sum_m J_m logits_proj[m, h]            h = 1 .. H
        U_n = sum_h softmax(L_h + visibility) weights_proj[h, n]      n = 1 .. Hv
        o_n = sum_s U_n v_n;   y = concat_n(o_n) Wo

    Neither mix has a residual or a bias: identity matrices give multi-head attention, and they are the start where
    all three numbers of heads agree. U may be negative.

    The authors' code scales the queries' start instead of the scores; here scores are scaled.

    Pruning removes value heads. Query-key and softmax heads stay, since each of them reaches all value heads.

    Args:
        embed_dim: width E of input and output.
        num_heads: softmax heads H.
        num_qk_heads: heads Hk of queries and keys. Default: H.
        num_v_heads: heads Hv of values. Default: H.
        head_dim: width D of queries and keys. Default: E / Hk.
        v_head_dim: width Dv of values. Default: E / Hv.
        kdim: width of the context. Default: E.
        bias: whether the projections have one.
        mix_init: "identity" or "fan_in" (normal with std 1 / sqrt(source heads), truncated at two of them). Default:
            the identity where the numbers of heads agree.
        rope: rotary position embedding, or None.
        sliding_window: a query sees this many keys at most, itself included.
        causal: no query sees a later key.
        dropout: probability of dropping an entry of U in training.
        chunk_size: queries done at once at most; longer inputs go chunk by chunk, and scores are recomputed in the
            backward pass. None: all at once.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" ("triton" on GPUs, else chunked for more than chunk_size queries), "eager" (all scores at once)
            or "triton" (fused kernels).

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    sequence_forms: tuple[str, ...] = ("ring", "gather")
    mixes_heads = True
    tensor_reason = "every output mixes the scores of all heads"

    shown = ("num_qk_heads", "num_v_heads", "rope", "sliding_window", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int, *, num_qk_heads: int | None = None,
        num_v_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        kdim: int | None = None,
        bias: bool = False,
        mix_init: str | None = None,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        sliding_window: int | None = None,
        causal: bool = True, dropout: float = 0.0, chunk_size: int | None = 128, init_std: float = 0.02,
        backend: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_sizes(embed_dim=embed_dim, num_heads=num_heads)
        num_qk_heads = num_heads if num_qk_heads is None else num_qk_heads
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        super().__init__(
            embed_dim, num_heads, head_dim=derive_head_dim(embed_dim, num_qk_heads, head_dim, "qk_"),
            v_head_dim=derive_head_dim(embed_dim, num_v_heads, v_head_dim, "v_"), kdim=kdim, rope=rope,
            sliding_window=sliding_window, causal=causal, dropout=dropout, init_std=init_std, backend=backend,
            bias=bias, chunk_size=chunk_size, device=device, dtype=dtype,
        )  # fmt: skip
        if sliding_window is not None and not causal:
            raise ValueError(f"sliding_window needs causal=True, got {sliding_window} and causal=False")
        equal = num_qk_heads == num_heads == num_v_heads
        mix_init = ("identity" if equal else "fan_in") if mix_init is None else mix_init
        check("mix_init", mix_init, one_of("identity", "fan_in", words="be 'identity' or 'fan_in'"))
        if mix_init == "identity" and not equal:
            raise ValueError(
                f"mix_init 'identity' needs equal numbers of heads, got {num_qk_heads}, {num_heads} and {num_v_heads}"
            )
        self.num_kv_heads = self.num_qk_heads = num_qk_heads
        self.num_v_heads = num_v_heads
        self.heads = HeadLayout.of(num_v_heads)
        self.mix_init = mix_init
        self.chunk_size = chunk_size
        K, V, D, Dv = num_qk_heads, num_v_heads, self.head_dim, self.v_head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(K * D, K * D, V * Dv, V * Dv, bias=bias, **factory_kwargs)
        self.logits_proj = nn.Parameter(torch.empty(K, num_heads, **factory_kwargs))
        self.weights_proj = nn.Parameter(torch.empty(num_heads, V, **factory_kwargs))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """Initialise: projections normal with `std` (output projection `out_std`), biases 0, mixes as mix_init says."""
        super().reset_parameters(std, out_std)
        for mix in (self.logits_proj, self.weights_proj):
            if self.mix_init == "identity":
                nn.init.eye_(mix)
            else:
                std_of_mix = mix.shape[0] ** -0.5
                nn.init.trunc_normal_(mix, std=std_of_mix, a=-2 * std_of_mix, b=2 * std_of_mix)

    def no_weight_decay(self) -> set[str]:
        """The mixes: weight decay would pull them to 0 and not to their start."""
        return {"logits_proj", "weights_proj"}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask = None, positions: Positions = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, context as one tensor.

        Masks act after the first mix.
        """
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, call.source)
        q = qk_norm_rope(q, call.q_table, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, backend=self.backend)
        pre, post = (Composition(mix[None], residual=False) for mix in (self.logits_proj, self.weights_proj))
        with call.remember(k, v) as (k, v):
            out = composed_attention(
                q, k, v, pre, post, call.view, scale=self.scale, dropout=self.weight_dropout,
                chunk_size=self.chunk_size, backend=self.backend,
            )  # fmt: skip
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, Hk, D), keys (B, S, Hk, D) and values (B, S, Hv, Dv), before rotation."""
        (B, T, _), S = x.shape, source.shape[1]
        q = self.q_proj(x).view(B, T, self.num_qk_heads, self.head_dim)
        k = self.k_proj(source).view(B, S, self.num_qk_heads, self.head_dim)
        v = self.v_proj(source).view(B, S, self.num_v_heads, self.v_head_dim)
        return q, k, v

    def cache_widths(self) -> tuple[tuple[int, ...], ...]:
        """What the cache holds for a token: (heads, width) of keys and of values."""
        return (self.num_qk_heads, self.head_dim), (self.num_v_heads, self.v_head_dim)

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "attention" and "composition"."""
        S = T if S is None else S
        keys = T if self.causal else S
        K, H, V = self.num_qk_heads, self.num_heads, self.num_v_heads
        width = K * self.head_dim + V * self.v_head_dim
        pairs = attention_pairs(T, S, causal=self.causal, window=self.sliding_window)
        return {
            "projections": 2 * width * (T * self.embed_dim + keys * self.kdim),
            "attention": 2 * width * pairs,
            "composition": 2 * (K * H + H * V) * pairs,
        }

    def qk_circuit(self, part: str = "full") -> Factors:
        """As `Mechanism.qk_circuit`, of each query-key head, before the first mix."""
        rows = self._part_rows(part)
        return [(wq[rows], wk[rows]) for wq, wk in zip(*self.head_weights(), strict=True)]

    def prune_heads(self, indices: Iterable[int]) -> None:
        """Remove value heads by their original numbers, as `Mechanism.prune_heads` removes query heads."""
        others = self.num_heads, self.num_kv_heads
        super().prune_heads(indices)
        self.num_heads, self.num_kv_heads = others
        self.num_v_heads = len(self.heads.kept)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of value heads."""
        keep_rows(self.v_proj, groups, self.v_head_dim)
        keep_columns(self.o_proj, heads, self.v_head_dim)
        self.weights_proj = keep_entries(self.weights_proj, heads, 1)
