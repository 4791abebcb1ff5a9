"""attnzoo's softmax attention as an attention function of transformers, without any module replaced.

Importing `attnzoo.hugging_face` registers it with its masks, so that `model.set_attn_implementation("attnzoo")` works
for every family that calls transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from attnzoo.hugging_face.masks import read_mask
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.softmax_attention import softmax_attention

NAME = "attnzoo"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv) -> (B, T, H, Dv), as transformers calls it.

    Args:
        module: the attention module, whose `is_causal` holds where no argument says it.
        query: queries.
        key: keys, of all tokens in the cache.
        value: values.
        attention_mask: (B, 1, T, S), boolean or added to the scores. None with more than one query means causality from
            the first key on if the module is causal: a cache of fixed size hands over keys that are not written yet.
        dropout: probability of dropping a weight.
        scaling: factor of the scores. Default: D ** -0.5.
        softcap: bound of the scores.
        s_aux: (H,) logits of learned sinks.
        is_causal: overrides the module's.
        position_bias: (B, H, T, S), added to the scores.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        view, bias = Visibility(causal and q.shape[1] > 1, query_start=0), None
    else:
        visible, bias = read_mask(attention_mask)
        view = Visibility(False, mask=AttentionMask.dense(visible), query_start=0)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    sinks = None if s_aux is None else s_aux.to(torch.promote_types(q.dtype, torch.float32))
    out = softmax_attention(
        q, k, v, view, scale=scaling, softcap=softcap, sinks=sinks, bias=bias, dropout=dropout, backend="auto",
    )  # fmt: skip
    return out, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
