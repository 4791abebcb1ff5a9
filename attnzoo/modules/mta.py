"""Multi-token attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import CacheLayout, RecentQueriesCache
from attnzoo.modules.base import Mechanism
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.heads import attention_pairs, keep_entries
from attnzoo.ops.multi_token_attention import TokenMaps, multi_token_attention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.submodules import normed
from attnzoo.rotary import Rotary
from attnzoo.rules import check, check_sizes, describe, one_of


class MultiTokenAttention(Mechanism):
    """Multi-token attention (Golovneva et al. 2025, arXiv:2504.00927).

    Weights depend on the scores of neighbouring queries and keys, and of other heads:

        s = scale q_i . k_j                       0 where j is not visible to i
        s = mix(conv(s, pre_kernel), pre_heads)
        p = softmax_j(s);  p = mix(conv(p, post_kernel), post_heads)
        o_h = RMS(sum_j p_ij v_j) subln           with head_norm
        o_h = (1 - lambda_init) o_h               with depth: lambda_init = 0.8 - 0.6 exp(-0.3 depth)
        o_h = o_h sigmoid(o_h Wg^T + bg)          with gate
        y = concat_h(o_h) Wo + bo

        conv(s, K)[i, j] = sum_ab K[a, b] s[i - (Cq - 1) + a, j - l + b]        one kernel (Cq, Ck) for each head

    Convolutions see earlier queries of the same document only. Kernels and mixes start at the identity. The authors
    convolve in every fourth layer and mix heads in all of them; the other layers have pre_kernel=None.

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of a head. Default: E / H.
        pre_kernel: queries Cq and keys Ck of the convolution before the softmax, or None.
        post_kernel: those of the convolution after it, or None.
        pre_head_group: neighbouring heads C that are mixed before the softmax, or None.
        post_head_group: those that are mixed after it, or None.
        key_alignment: "both" (Ck odd), "left" or "right": on which sides of its key a kernel reads.
        head_norm: RMS-normalise each head's output; the gain is shared by the heads.
        head_norm_eps: added to the mean square.
        depth: number of the layer, from 0, which gives lambda_init; the recipe's decoder sets it. None: no such factor.
        gate: None, "headwise" (one number a head) or "elementwise": a gate of each head by itself, shared by the heads.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are recomputed in the
            backward pass. None: all at once.
        rope: rotary position embedding, or None.
        scale: factor of the scores. Default: D ** -0.5.
        sliding_window: a query sees this many keys at most, itself included. Caches keep all keys.
        bias: whether the projections have one.
        dropout: probability of dropping a weight in training.
        causal: must be True.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" (chunked for more than chunk_size queries) or "eager" (all scores at once); without kernels
            those of `ops.composed_attention`.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    pre_kernel: nn.Parameter | None
    post_kernel: nn.Parameter | None
    pre_heads: nn.Parameter | None
    post_heads: nn.Parameter | None
    cache_type = RecentQueriesCache
    sequence_reason = "its convolutions reach over the border of a shard"
    caches_all_tokens = True  # Earlier queries read keys that have left the window of the last.
    takes_pair_masks = False  # Convolutions read the scores of earlier queries too.
    takes_left_padding = False
    shown = ("pre_kernel_size", "post_kernel_size", "gate_type", "rope", "sliding_window", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        pre_kernel: tuple[int, int] | None = (6, 11),
        post_kernel: tuple[int, int] | None = None,
        pre_head_group: int | None = None,
        post_head_group: int | None = 2,
        key_alignment: str = "both",
        head_norm: bool = True,
        head_norm_eps: float = 1e-5,
        depth: int | None = None,
        gate: str | None = None,
        chunk_size: int | None = 128,
        rope: Rotary | None = Rotary(),  # noqa: B008  (frozen)
        scale: float | None = None,
        sliding_window: int | None = None,
        bias: bool = False,
        dropout: float = 0.0, causal: bool = True, init_std: float = 0.02, backend: str = "auto",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, num_kv_heads, head_dim, rope=rope, scale=scale, sliding_window=sliding_window,
            causal=causal, dropout=dropout, init_std=init_std, backend=backend, bias=bias, head_norm=head_norm,
            head_norm_eps=head_norm_eps, depth=0 if depth is None else depth, chunk_size=chunk_size, device=device,
            dtype=dtype,
        )  # fmt: skip
        if not causal:
            raise ValueError("causal must be True: no convolution over queries is defined without it, got causal=False")
        check("key_alignment", key_alignment, one_of("both", "left", "right"))
        if gate is not None:
            check("gate", gate, one_of("headwise", "elementwise", words="be None, 'headwise' or 'elementwise'"))
        if depth is not None and not head_norm:
            raise ValueError(f"depth needs head_norm=True, got depth={depth} and head_norm=False")
        self.chunk_size = chunk_size
        self.key_alignment = key_alignment
        self.pre_kernel_size = self._kernel_size("pre_kernel", pre_kernel)
        self.post_kernel_size = self._kernel_size("post_kernel", post_kernel)
        self.gate_type = gate
        self.scales_by_depth = depth is not None
        self.depth = 0 if depth is None else depth
        H, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.make_projections(H * D, G * D, G * D, H * D, bias=bias, **factory_kwargs)
        for name, size in (("pre_kernel", self.pre_kernel_size), ("post_kernel", self.post_kernel_size)):
            made = None if size is None else nn.Parameter(torch.empty(H, *size, **factory_kwargs))
            self.register_parameter(name, made)
        for name, group in (("pre_head", pre_head_group), ("post_head", post_head_group)):
            if group is not None:
                check_sizes(**{f"{name}_group": group})
                if H % group:
                    raise ValueError(f"{name}_group must divide num_heads, got {group} and {H}")
            made = None if group is None else nn.Parameter(torch.empty(H // group, group, group, **factory_kwargs))
            self.register_parameter(f"{name}s", made)
        self.subln = nn.RMSNorm(D, head_norm_eps, **factory_kwargs) if head_norm else None
        self.gate = None if gate is None else nn.Linear(D, 1 if gate == "headwise" else D, **factory_kwargs)
        self.reset_parameters()

    def _kernel_size(self, name: str, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """The size of a kernel, checked."""
        if size is None:
            return None
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise ValueError(f"{name} must be two sizes (queries, keys) or None, got {size!r}")
        queries, keys = check_sizes(**{f"{name} (queries)": size[0], f"{name} (keys)": size[1]})
        if self.key_alignment == "both" and keys % 2 == 0:
            raise ValueError(f"{name} must have an odd number of keys with key_alignment 'both', got {keys}")
        return queries, keys

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; kernels and mixes are the identity."""
        super().reset_parameters(std, out_std)
        with torch.no_grad():
            for kernel in (self.pre_kernel, self.post_kernel):
                if kernel is not None:
                    last = kernel.shape[2] - 1
                    kernel.zero_()[:, -1, {"left": last, "right": 0}.get(self.key_alignment, last // 2)] = 1
            for mix in (self.pre_heads, self.post_heads):
                if mix is not None:
                    mix.copy_(torch.eye(mix.shape[1]))

    @property
    def maps(self) -> TokenMaps:
        """The convolutions and the mixes."""
        return TokenMaps(self.pre_kernel, self.pre_heads, self.post_kernel, self.post_heads, self.key_alignment)

    @property
    def lambda_init(self) -> float:
        """The constant of the factor 1 - lambda_init, which follows `depth`; 0 without a depth."""
        return 0.8 - 0.6 * math.exp(-0.3 * self.depth) if self.scales_by_depth else 0.0

    def no_weight_decay(self) -> set[str]:
        """Kernels and mixes, which weight decay would pull to 0 and not to their start, and the norm's gain."""
        names = ("pre_kernel", "pre_heads", "post_kernel", "post_heads", "subln")
        return {name for name, _ in self.named_parameters() if name.startswith(names)}

    def forward(
        self, x: Tensor, context: None = None, *, mask: Mask = None, positions: Positions = None,
        cache: RecentQueriesCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`, without context.

        With a filled cache a mask must be the same for all queries.
        """
        if context is not None:
            raise ValueError(f"context must be None: its scores have no earlier queries; got {describe(context)}")
        call = begin(self, x, None, mask, positions, cache)
        q, k, v = (
            layer(x).view(*x.shape[:2], heads, self.head_dim)
            for layer, heads in (
                (self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads), (self.v_proj, self.num_kv_heads),
            )
        )  # fmt: skip
        q = qk_norm_rope(q, call.q_table, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, backend=self.backend)
        with call.remember(k, v) as (k, v):
            earlier = None if cache is None else cache.recent()
            if cache is not None:
                cache.follow(q)
            k, v = self.heads.spread(k, v)
            out = multi_token_attention(
                q, k, v, self.maps, call.view, scale=self.scale, earlier=earlier, dropout=self.weight_dropout,
                chunk_size=self.chunk_size, backend=self.backend,
            )  # fmt: skip
            out = (1 - self.lambda_init) * normed(self.subln, out)
            out = out if self.gate is None else out * torch.sigmoid(self.gate(out))
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def gate_layers(self) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
        """The gate, if there is one."""
        return {} if self.gate is None else {"gate": (self.gate, tuple(range(self.num_heads)))}

    # Caches

    def cache_layout(self) -> CacheLayout:
        """As the base's, and the queries."""
        layout = super().cache_layout()
        return layout._replace(widths=(*layout.widths, (self.maps.earlier, self.num_heads, self.head_dim)))

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RecentQueriesCache:  # fmt: skip
        """As the base's for all tokens, with the last queries that convolutions read, and some spare."""
        cache: RecentQueriesCache = super().init_cache(batch_size, max_length, device, dtype)
        cache.make_rows(self.maps.earlier, (self.num_heads, self.head_dim))
        return cache

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """As the base's, and the last queries."""
        rows = RecentQueriesCache.rows_for(self.maps.earlier)
        return super().state_bytes(tokens, dtype) + rows * self.num_heads * self.head_dim * dtype.itemsize

    # Costs and pruning

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "attention", "convolution", "composition" and "gate"."""
        S = T if S is None else S
        E, H, G, D = self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim
        pairs = attention_pairs(T, S, causal=True, window=self.sliding_window)
        kernels = [size for size in (self.pre_kernel_size, self.post_kernel_size) if size is not None]
        groups = [mix.shape[1] for mix in (self.pre_heads, self.post_heads) if mix is not None]
        return {
            "projections": 4 * T * E * (H + G) * D,
            "attention": 4 * H * D * pairs,
            "convolution": 2 * H * sum(queries * keys for queries, keys in kernels) * pairs,
            "composition": 2 * H * sum(groups) * pairs,
            "gate": 0 if self.gate is None else 2 * T * H * D * self.gate.out_features,
        }

    def prune_heads(self, indices: Iterable[int]) -> None:
        """As the base's. Mixed heads cannot be told apart, and are refused."""
        for name in ("pre_heads", "post_heads"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"indices cannot be pruned, since {name} mixes heads: set their columns of o_proj to 0 instead"
                )
        super().prune_heads(indices)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads."""
        self.keep_projections(heads, groups)
        for name in ("pre_kernel", "post_kernel"):
            if (kernel := getattr(self, name)) is not None:
                setattr(self, name, keep_entries(kernel, heads))
