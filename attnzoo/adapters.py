"""Zoo modules behind other libraries' calls."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.masks import AttentionMask
from attnzoo.rules import describe


class NotFused:
    """Is found where torch's fused encoder path looks for a weight; what carries this method is left to be called."""

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Refused: there is no tensor."""
        raise TypeError(f"in_proj_weight is not a tensor, got a call of {function}")


class TorchMultiheadAttention(nn.Module):
    """Any self- or cross-attention module of the zoo with the call of torch.nn.MultiheadAttention.

    It can be used wherever torch uses that class, for instance as `self_attn` of an nn.TransformerEncoderLayer
    or as `self_attn` and `multihead_attn` of an nn.TransformerDecoderLayer:

        layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
        layer.self_attn = TorchMultiheadAttention(attnzoo.KnockingHeadsAttention(512, 8, causal=False))

    What differs from torch's class:

    - A module built with causal=True is causal with and without a mask. For masks alone to decide, as in
      torch, build it with causal=False; cross-attention needs that anyway, and rope=None.
    - The zoo returns no attention weights. need_weights therefore defaults to False, and True is refused.
    - A query that may attend to nothing gives the output projection's bias, where torch may give NaN.

    nn.TransformerEncoderLayer turns every mask into floats. Reading back that they hold 0 and -inf alone
    costs a synchronisation on a GPU, and a graph break under torch.compile; a direct call with boolean masks
    costs neither. The fused inference paths of nn.TransformerEncoder and its layers are not taken, since they
    would skip the module, and padded tokens keep their places; nn.TransformerEncoder says so in a warning where it is
    built from a layer with the adapter in it and enable_nested_tensor=True. Nested tensors are taken in self-attention.

    Args:
        attn: the module, called as `attn(x, context, mask=...)`.
        batch_first: inputs and outputs are (B, T, E); otherwise (T, B, E).

    Raises:
        ValueError: if attn is not an attention module with `num_heads` and `embed_dim`.
    """

    # What nn.TransformerEncoder and its layers read to see that their fused paths do not fit.
    in_proj_bias: None = None
    in_proj_weight = NotFused()
    out_proj = SimpleNamespace(weight=None, bias=None)
    _qkv_same_embed_dim: bool = False

    attn: Any

    def __init__(self, attn: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        if not isinstance(attn, nn.Module) or not hasattr(attn, "num_heads") or not hasattr(attn, "embed_dim"):
            raise ValueError(f"attn must be an attention module of the zoo, got {type(attn).__name__}")
        self.attn = attn
        self.batch_first = batch_first

    @property
    def embed_dim(self) -> int:
        """Width E of input and output."""
        return int(self.attn.embed_dim)

    @property
    def num_heads(self) -> int:
        """Query heads H."""
        return int(self.attn.num_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: ARG002  (part of the call; has no effect without weights)
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query (B, T, E), key (B, S, kdim), value (B, S, vdim) -> (output (B, T, E), None).

        Without batch_first the first two axes are exchanged; without a batch axis inputs and output are
        (T, E), (S, kdim), (S, vdim). One nested tensor of (T_b, E) for all three, without masks, gives a nested one.

        Args:
            query: what queries are made from.
            key: what keys are made from; the same tensor as query in self-attention.
            value: what values are made from; the same tensor as query in self-attention.
            key_padding_mask: (B, S), or (S,) without a batch axis; boolean with True = blocked, or floats
                0 and -inf.
            need_weights: must be False.
            attn_mask: (T, S) or (B H, T, S), in the same convention; (H, T, S) without a batch axis.
            average_attn_weights: without effect.
            is_causal: promise that attn_mask is the causal mask. A module built with causal=True then needs
                no mask at all.

        Raises:
            ValueError: for need_weights=True, for a mask of another shape, type or content, for is_causal
                without a mask on a module that is not causal, and for what the module itself refuses.
        """
        if need_weights:
            raise ValueError("need_weights must be False, got True: zoo modules return no attention weights")
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name} must be a tensor, got {describe(tensor)}")
        if query.is_nested and key is query and value is query:
            return self._nested(query, key_padding_mask, attn_mask), None
        batched = query.ndim == 3
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim or query.is_nested:
            raise ValueError(
                "query, key and value must all be dense (T, E) or all dense batches of that, or one nested tensor, "
                f"got {query.ndim}, {key.ndim} and {value.ndim} dimensions"
            )
        x, context = self._arrange(query, key, value, batched)
        source = context[0] if isinstance(context, tuple) else x if context is None else context
        mask = self._mask(
            key_padding_mask, attn_mask, is_causal, batched, x.shape[:2], source.shape[1], context is None
        )
        out = self.attn(x, context, mask=mask)
        if not batched:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _nested(self, query: Any, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """Self-attention of a nested tensor, as a padded batch with lengths."""
        if key_padding_mask is not None or attn_mask is not None or not self.batch_first:
            raise ValueError("query must not be nested with masks or batch_first=False, got a nested tensor")
        lengths = [row.shape[0] for row in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        out = self.attn(padded, mask=AttentionMask.padding(torch.tensor(lengths, device=query.device)))
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        if query.layout is torch.jagged:
            # The same offsets, so that the sum of both is defined.
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), query.offsets())
        return torch.nested.as_nested_tensor(rows)

    def _arrange(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor] | None]:
        """Input and context of the module, batch first; None as context means self-attention."""

        def batch_first(tensor: Tensor) -> Tensor:
            if not batched:
                return tensor.unsqueeze(0)
            return tensor if self.batch_first else tensor.transpose(0, 1)

        x = batch_first(query)
        if key is query and value is query:
            return x, None
        if key is value:
            return x, batch_first(key)
        return x, (batch_first(key), batch_first(value))

    def _mask(
        self,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        batched: bool,
        batch_and_queries: tuple[int, ...],
        keys: int,
        own: bool,
    ) -> AttentionMask | None:
        """Both masks as one, True = may attend; own: keys are the queries' tokens, so that padding is theirs too."""
        batch, queries = batch_and_queries
        heads = self.num_heads
        causal = bool(getattr(self.attn, "causal", False))
        if is_causal and attn_mask is None and not causal:
            raise ValueError("is_causal needs attn_mask or a module with causal=True, got neither")
        visible = real = None
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is not None and not isinstance(given, Tensor):
                raise ValueError(f"{name} must be a tensor, got {describe(given)}")
        if attn_mask is not None and not (is_causal and causal):
            per_head = (batch * heads if batched else heads, queries, keys)
            if attn_mask.shape not in ((queries, keys), per_head):
                raise ValueError(
                    f"attn_mask must have shape {(queries, keys)} or {per_head}, got {tuple(attn_mask.shape)}"
                )
            visible = _may_attend("attn_mask", attn_mask)
            if visible.ndim == 3:
                visible = visible.reshape(batch, heads, queries, keys)
        if key_padding_mask is not None:
            expected = (batch, keys) if batched else (keys,)
            if key_padding_mask.shape != expected:
                raise ValueError(f"key_padding_mask must have shape {expected}, got {tuple(key_padding_mask.shape)}")
            real = _may_attend("key_padding_mask", key_padding_mask).reshape(batch, keys)
            keep = real[:, None, None]
            visible = keep if visible is None else visible & keep
        return None if visible is None else AttentionMask(dense_mask=visible, real_queries=real if own else None)


def _may_attend(name: str, mask: Tensor) -> Tensor:
    """torch.nn's mask (True or -inf = blocked) in the zoo's convention (True = may attend)."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be boolean or floating, got {mask.dtype}")
    visible = mask == 0
    if not bool((visible | (mask == -math.inf)).all()):
        raise ValueError(f"{name} must hold 0 and -inf alone: the zoo has no additive masks")
    return visible
