"""Sigmoid attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cache import KeyValueCache
from attnzoo.modules.call import Mask, Positions, begin
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import head_rows, keep_entries
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.submodules import normed
from attnzoo.rules import SWITCH, check, check_options, check_sizes, is_number


class SigmoidAttention(GroupedQueryAttention):
    """Sigmoid attention (Ramapuram et al. 2024, arXiv:2409.04431): grouped-query attention without a softmax.

        a_ij = sigmoid(s_ij + b)              s as in `GroupedQueryAttention`, with soft-cap and ALiBi; 0 where masked
        o_h = sum_j a_ij v_j
        y = concat_h(o_h) Wo + bo

    Weights do not add up to 1. The authors advise b = -log(n) for training sequences of n tokens, since then they do at
    the start. "visible" (the default, and not the authors') takes the number of keys that each query sees in place of
    n, which no longer depends on a length that is fixed in advance, nor on padding and windows.

    For stable training the authors add a norm to queries and keys (`qk_norm`) or after attention (`output_norm`).

    Args:
        embed_dim: width E of input and output.
        num_heads: query heads H.
        num_kv_heads: key/value heads G; must divide H. Default: H.
        head_dim: width D of queries and keys. Default: E / H.
        logit_bias: b, "visible" or "learned": a parameter (H,) that starts at -log(context_length).
        context_length: tokens of a training sequence, for "learned".
        output_norm: RMS-normalise the outputs of all heads together before the output projection.
        chunk_size: queries done at once; longer inputs go chunk by chunk, and their weights are recomputed in the
            backward pass. None: all at once.
        options: the keyword options of `GroupedQueryAttention` but sink and sink_tokens; backend is "auto", "eager"
            (all weights at once) or "triton".

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """

    shown = ("logit_bias", "rope", "logit_softcap", "sliding_window", "pruned_heads")
    sequence_forms: tuple[str, ...] = ("gather",)
    context_length: int | None = None
    logit_bias: nn.Parameter | float | str
    output_norm: nn.RMSNorm | None

    def __init__(
        self, embed_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        logit_bias: float | str = "visible",
        context_length: int | None = None,
        output_norm: bool = False,
        chunk_size: int | None = 128,
        **options: Any,
    ) -> None:  # fmt: skip
        for name in ("sink", "sink_tokens"):
            if options.get(name):
                raise ValueError(
                    f"{name} needs a softmax, which sigmoid attention does not have, got {options[name]!r}"
                )
        super().__init__(embed_dim, num_heads, num_kv_heads, head_dim, **options)
        named = isinstance(logit_bias, str) and logit_bias in ("visible", "learned")
        if not named and not is_number(logit_bias):
            raise ValueError(f"logit_bias must be a finite number, 'visible' or 'learned', got {logit_bias!r}")
        if (context_length is None) == (logit_bias == "learned"):
            raise ValueError(
                f"context_length must be given with logit_bias 'learned' and only then, got {context_length} and "
                f"{logit_bias!r}"
            )
        check("output_norm", output_norm, SWITCH)
        check_options(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        factory_kwargs: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        width = self.num_heads * self.v_head_dim
        self.output_norm = nn.RMSNorm(width, 1e-6, **factory_kwargs) if output_norm else None
        if context_length is None:
            self.logit_bias = logit_bias if isinstance(logit_bias, str) else float(logit_bias)
        else:
            (self.context_length,) = check_sizes(context_length=context_length)
            self.logit_bias = nn.Parameter(torch.full((self.num_heads,), -math.log(context_length), **factory_kwargs))

    def reset_parameters(self, std: float | None = None, out_std: float | None = None) -> None:
        """As the base's; a learned bias is -log(context_length)."""
        super().reset_parameters(std, out_std)
        if self.context_length is not None:
            nn.init.constant_(self.get_parameter("logit_bias"), -math.log(self.context_length))

    def forward(
        self, x: Tensor, context: Tensor | tuple[Tensor, Tensor] | None = None, *, mask: Mask = None,
        positions: Positions = None, cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, E) -> (B, T, E); arguments as in `GroupedQueryAttention.forward`."""
        call = begin(self, x, context, mask, positions, cache)
        q, k, v = self.project(x, *call.sources)
        q = qk_norm_rope(q, call.q_table, norm=self.q_norm, backend=self.backend)
        k = qk_norm_rope(k, call.k_table, norm=self.k_norm, backend=self.backend)
        with call.remember(k, v) as (k, v):
            k, v = self.heads.spread(k, v)
            options = self.score_options(q.device)
            del options["sinks"]
            out = sigmoid_attention(
                q, k, v, call.view, logit_bias=self.logit_bias, bias=call.bias, chunk_size=self.chunk_size, **options
            )
            y: Tensor = self.o_proj(normed(self.output_norm, out.flatten(2)))
            return y

    @property
    def head_outputs(self) -> nn.Module:
        """The norm of all heads together, or the output projection."""
        return self.o_proj if self.output_norm is None else self.output_norm

    def no_weight_decay(self) -> set[str]:
        """The bias, which weight decay would pull to 0 and not to its start."""
        return {"logit_bias"} & set(self._parameters)

    def keep_heads(self, heads: list[int], groups: list[int]) -> None:
        """Cut the weights down to these places of query heads and of key/value heads.

        The norm of all heads continues as if the others' outputs were 0: its mean square is over the width it had.
        """
        super().keep_heads(heads, groups)
        if isinstance(self.logit_bias, nn.Parameter):
            self.logit_bias = keep_entries(self.logit_bias, heads)
        if (norm := self.output_norm) is not None:
            features = head_rows(heads, self.v_head_dim).tolist()
            share = len(features) / max(norm.weight.numel(), 1)
            norm.weight = keep_entries(norm.weight, features)
            norm.normalized_shape = (len(features),)
            if features:
                norm.eps = (norm.eps or 0.0) / share
                with torch.no_grad():
                    norm.weight.mul_(share**-0.5)
