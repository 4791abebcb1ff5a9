"""Relative convolutional multi-head attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import CacheLayout, ConvolutionCache
from attnzoo.masks import as_mask
from attnzoo.modules.base import Mechanism
from attnzoo.modules.call import Call, Mask, Positions, begin
from attnzoo.modules.checks import check_input
from attnzoo.modules.heads import attention_pairs, keep_entries
from attnzoo.ops.causal_convolution import CausalConvolution
from attnzoo.ops.composed_attention import composed_attention
from attnzoo.ops.relative_scores import RelativeDistances
from attnzoo.ops.submodules import local
from attnzoo.rules import check_sizes, describe


class RelativeConvAttention(Mechanism):
    """Relative convolutional multi-head attention (Sugiharto et al. 2023, arXiv:2308.03429).

    The relative attention of Transformer-XL with learned tables of distances, after short causal convolutions:

        q, k, v = conv_q(x Wq), conv_k([memory; x] Wk), conv_v([memory; x] Wv + b_v)
        S_h[i, n] = D^-0.5 ((q_i + content_bias_h) . k_n + q_i . rel_key_h[m - r] + rel_bias_h[m - r])
        y = concat_h(softmax_n(S_h + visibility) v_n) Wo + b_o

    with r = M + i - n, M the length of the memory and m = max_distance. The filters of a convolution belong to the
    features and are shared by the heads. They see the past only, with causal=False too, and no other packed document.

    Distances go by the index of a token, so positions change nothing. Right padding is harmless, but tokens that are
    decoded after it see it: their distances and convolutions count it.

    Args:
        embed_dim: width E of input and output.
        num_heads: heads H.
        kernel_size: width K of the convolutions.
        max_distance: longest sequence, with memory and cached tokens.
        head_dim: width D of a head. Default: E / H.
        bias: whether values and output have one.
        conv_query_memory: whether the convolution of the queries sees the memory. The authors' does not.
        causal: no query sees a later key.
        dropout: probability of dropping an attention weight in training.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their scores are recomputed in the
            backward pass. None: all at once.
        init_std: standard deviation of the projections' normal initialisation.
        backend: "auto" or "eager": the scores of chunk_size queries are held at a time, or all. There is no kernel.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    cache_type = ConvolutionCache
    takes_left_padding = False  # The convolution runs over it.
    reads_token_index = True
    shown = ("kernel_size", "max_distance", "conv_query_memory", "pruned_heads")

    def __init__(
        self, embed_dim: int, num_heads: int,
        kernel_size: int = 3,
        max_distance: int = 4096,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        conv_query_memory: bool = False,
        causal: bool = True, dropout: float = 0.1, chunk_size: int | None = 128, init_std: float = 0.02,
        backend: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            embed_dim, num_heads, head_dim=head_dim, bias=bias, conv_query_memory=conv_query_memory, causal=causal,
            dropout=dropout, init_std=init_std, backend=backend, chunk_size=chunk_size, device=device, dtype=dtype,
        )  # fmt: skip
        self.kernel_size, self.max_distance = check_sizes(kernel_size=kernel_size, max_distance=max_distance)
        self.chunk_size = chunk_size
        self.conv_query_memory = conv_query_memory
        H, D = self.num_heads, self.head_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, H * D, False, **factory_kwargs)
        self.k_proj = nn.Linear(embed_dim, H * D, False, **factory_kwargs)
        self.v_proj = nn.Linear(embed_dim, H * D, bias, **factory_kwargs)
        self.o_proj = nn.Linear(H * D, embed_dim, bias, **factory_kwargs)
        self.q_conv, self.k_conv, self.v_conv = (
            CausalConvolution(D, self.kernel_size, **factory_kwargs) for _ in range(3)
        )
        self.rel_key = nn.Parameter(torch.empty(2 * self.max_distance, H, D, **factory_kwargs))
        self.rel_bias = nn.Parameter(torch.empty(2 * self.max_distance, H, **factory_kwargs))
        self.content_bias = nn.Parameter(torch.empty(H, D, **factory_kwargs))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; convolutions as torch.nn.Conv1d, tables and content bias 0."""
        super().reset_parameters(std, out_std)
        for parameter in (self.rel_key, self.rel_bias, self.content_bias):
            nn.init.zeros_(parameter)

    sequence_reason = "its convolutions and tables of distances reach over the border of a shard"

    def forward(
        self, x: Tensor, context: None = None, *, memory: Tensor | None = None, mask: Mask = None,
        positions: Positions = None, cache: ConvolutionCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E).

        Args:
            x: input; with a cache, the new tokens only.
            context: must be None.
            memory: (B, M, E), tokens before x that keys and values are made of too. Not with a cache.
            mask: boolean, broadcastable to (B, H, T, S), True = may attend; or an AttentionMask. It covers memory and
                cached keys.
            positions: checked, and without effect.
            cache: from `init_cache`; filled in place.
        """
        call = self.begin(x, context, memory, mask, positions, cache)
        q, k, v = (self.split(layer) for layer in (self.q_proj(x), self.k_proj(call.source), self.v_proj(call.source)))
        new = q, k, v
        before: tuple[Tensor | None, ...] = (None,) * 3 if cache is None else cache.rows_before(*new)
        if memory is not None and self.conv_query_memory:
            last = memory[:, max(0, memory.shape[1] - self.kernel_size + 1) :]
            before = self.split(self.q_proj(last)), None, None
        places = None if call.view.mask is None else call.view.mask.positions(*x.shape[:2])
        convolutions = zip((self.q_conv, self.k_conv, self.v_conv), new, before, strict=True)
        q, k, v = (conv(z, rows, places) for conv, z, rows in convolutions)
        with call.remember(k, v) as (k, v):
            if cache is not None:
                cache.store_rows(*new)
            offset = call.view.start(x.shape[1], k.shape[1])
            relative = RelativeDistances(q, local(self.rel_key), local(self.rel_bias), self.scale, offset)
            out = composed_attention(
                q + local(self.content_bias).to(q.dtype), k, v, relative, None, call.view, scale=self.scale,
                dropout=self.weight_dropout, chunk_size=self.chunk_size, backend=self.backend,
            )  # fmt: skip
            y: Tensor = self.o_proj(out.flatten(2))
            return y

    def tensor_splits(self) -> dict[str, Any]:
        """Projections and tables by head; convolutions are of all heads."""
        return {
            "q_proj": "heads", "k_proj": "heads", "v_proj": "heads", "o_proj": "columns", "q_conv": "shared",
            "k_conv": "shared", "v_conv": "shared", "rel_key": 1, "rel_bias": 1, "content_bias": 0,
        }  # fmt: skip

    def begin(
        self, x: Tensor, context: None, memory: Tensor | None, mask: Mask, positions: Positions,
        cache: ConvolutionCache | None,
    ) -> Call:  # fmt: skip
        """The call, checked, with the memory before x as the source of keys and values."""
        if context is not None:
            raise ValueError(
                f"context must be None: no distance to other sequences is defined; got {describe(context)}"
            )
        call = begin(self, x, None, mask if memory is None else None, positions, cache)
        if memory is not None:
            check_input("memory", memory, self.embed_dim, self.q_proj)
            if memory.shape[0] != x.shape[0]:
                raise ValueError(f"memory must have the batch of x, got {memory.shape[0]} and {x.shape[0]}")
            if cache is not None:
                raise ValueError(
                    f"memory needs cache=None, got a {type(cache).__name__}, which holds what was before x"
                )
            source, mask = torch.cat([memory, x], 1), as_mask(mask)
            if mask is not None:
                mask.check(x.shape[0], self.num_heads, x.shape[1], source.shape[1], x.device)
            call.sources, call.view = (source, source), replace(call.view, mask=mask)
        if (tokens := call.past + call.source.shape[1]) > self.max_distance:
            raise ValueError(
                f"x must have at most max_distance = {self.max_distance} tokens, with memory and cache, got {tokens}"
            )
        return call

    def split(self, z: Tensor) -> Tensor:
        """(B, T, H D) -> (B, T, H, D)."""
        heads: Tensor = z.unflatten(-1, (self.num_heads, self.head_dim))
        return heads

    def cache_layout(self) -> CacheLayout:
        """As the base's, and the rows before the convolutions."""
        layout = super().cache_layout()
        return layout._replace(widths=(*layout.widths, (self.kernel_size - 1, self.num_heads, self.head_dim)))

    def init_cache(
        self, batch_size: int, max_length: int, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ConvolutionCache:  # fmt: skip
        """As the base's, with the last K - 1 rows before each convolution."""
        cache: ConvolutionCache = super().init_cache(batch_size, max_length, device, dtype)
        cache.make_rows(self.kernel_size - 1, (self.num_heads, self.head_dim))
        return cache

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """As the base's, and the rows before the convolutions."""
        numbers = 3 * (self.kernel_size - 1) * self.num_heads * self.head_dim
        return super().state_bytes(tokens, dtype) + numbers * dtype.itemsize

    def flops_by_part(self, T: int, S: int | None = None) -> dict[str, int]:
        """Forward FLOPs of "projections", "attention" and "distances"; the convolutions are not matrix products."""
        S = T if S is None else S
        width = self.num_heads * self.head_dim
        pairs = attention_pairs(T, S, causal=self.causal)
        rows = pairs if self.causal else T * max(0, T + S - 1)
        parts = {"projections": 4 * T * self.embed_dim, "attention": 2 * pairs, "distances": rows}
        return {part: 2 * width * products for part, products in parts.items()}

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """As the base's, after the convolutions' taps of the token itself."""
        q, k = super().head_weights()
        return q * self.q_conv.weight.detach()[..., -1], k * self.k_conv.weight.detach()[..., -1]

    def value_weights(self) -> Tensor:
        """As the base's, after the convolution's tap of the token itself."""
        return super().value_weights() * self.v_conv.weight.detach()[..., -1]

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:  # noqa: ARG002
        """Cut the weights down to these places of heads."""
        self.keep_projections(heads, heads)
        self.rel_key = keep_entries(self.rel_key, heads, 1)
        self.rel_bias = keep_entries(self.rel_bias, heads, 1)
        self.content_bias = keep_entries(self.content_bias, heads)
