"""The module that stands for an attention module of transformers and calls one of attnzoo."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.configs import configs_in
from attnzoo.hugging_face.caches import View, cache_of
from attnzoo.hugging_face.masks import (
    is_padding,
    packed_documents,
    packed_mask,
    read_mask,
    reads_pairs_alone,
    takes_single_pairs,
)
from attnzoo.hugging_face.offloading import is_dispatched, loaded
from attnzoo.masks import AttentionMask, CompleteMask
from attnzoo.tracing import is_readable

KEPT = (
    "layer_idx", "config", "is_causal", "sliding_window", "layer_type", "attention_type", "is_sliding", "head_dim",
    "is_decoder",
)  # fmt: skip
"""Attributes of transformers' modules that the blocks around them read."""

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""What a module calls around its forward, which stays with the place when the module changes."""


class AttentionLayer(nn.Module):
    """A module of attnzoo with the call of transformers' attention modules.

    Args:
        attn: the module.
        original: the attention module of transformers whose place it takes, for its attributes; or another such layer.

    Attributes:
        attn: the module.
        skeleton: `original` without numbers, on the meta device and not registered.
    """

    attn: Any
    resid_dropout: nn.Module | None
    layer_idx: int | None
    config: Any

    def __init__(self, attn: nn.Module, original: Any) -> None:
        super().__init__()
        earlier = isinstance(original, AttentionLayer)
        self._skeleton: tuple[nn.Module] = original._skeleton if earlier else (_without_numbers(original),)
        self.resid_dropout = getattr(original, "resid_dropout", None)
        self.layer_idx = self.config = None
        for name in HOOKS:
            setattr(self, name, getattr(original, name))
        for name in KEPT:
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.attn = attn
        self.train(original.training)

    @property
    def skeleton(self) -> nn.Module:
        """The module of transformers that was here, on the meta device."""
        return self._skeleton[0]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        is_causal: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, E) -> (output (B, T, E), None).

        Args:
            hidden_states: the layer's input.
            attention_mask: (B, 1, T, S) as transformers makes it: boolean, True = may attend, or floats that are added
                to the scores.
            position_ids: (1, T) or (B, T), for modules with a rotary embedding.
            past_key_values: transformers' cache.
            layer_past: the same, as GPT-NeoX calls it.
            is_causal: whether no query sees a later key, where there is no mask. Default: as the layer's attribute of
                that name, which transformers' module had.

        Raises:
            ValueError: for a mask or positions of another form, and for what the module refuses.
        """
        past = layer_past if past_key_values is None else past_key_values
        if not is_dispatched(self.attn):
            return self._attend(hidden_states, attention_mask, position_ids, past, is_causal)
        with loaded(self.attn):
            return self._attend(hidden_states, attention_mask, position_ids, past, is_causal)

    def _attend(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past: Any,
        is_causal: bool | None,
    ) -> tuple[Tensor, None]:
        positions = self._positions(position_ids)
        visible, bias = (None, None) if attention_mask is None else read_mask(attention_mask)
        has_window = self.attn.sliding_window is None or self.attn.sliding_window == self._window
        if self.attn.sink_tokens and self._window is not None:
            raise ValueError(
                f"sink_tokens must be 0 where transformers' masks have a window, here of {self._window}, which hides "
                f"them; got {self.attn.sink_tokens}"
            )
        cache = None
        if past is not None and self.attn.causal and self.layer_idx is not None:
            batch, tokens = hidden_states.shape[:2]
            cache = cache_of(
                self.attn, past, self.layer_idx, batch, tokens, is_masked=visible is not None and has_window,
                limit=getattr(self.config, "max_position_embeddings", tokens),
            )  # fmt: skip
        causal = bool(getattr(self, "is_causal", self.attn.causal) if is_causal is None else is_causal)
        if causal != self.attn.causal:
            self._check_other_causality(causal, hidden_states.shape[1], past, visible is None, has_window)
            if visible is None:
                visible = _all_visible(hidden_states, causal, cache)
        mask = None if visible is None else self._mask(visible, bias, hidden_states, cache, has_window)
        y = self.attn(hidden_states, mask=mask, positions=positions, cache=cache)
        return (y if self.resid_dropout is None else self.resid_dropout(y)), None

    @property
    def _window(self) -> int | None:
        """The window in transformers' masks for this layer."""
        kept: int | None = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        return kept

    def _check_other_causality(self, causal: bool, tokens: int, past: Any, unmasked: bool, has_window: bool) -> None:
        """Refuse to be causal, or not to be, where the module is not, or is, and no mask can say so."""
        reason = None
        if causal and past is not None:
            reason = (
                "with past_key_values, which a module that is not causal does not fill: use_cache=False leaves them out"
            )
        elif unmasked and not takes_single_pairs(self.attn):
            reason = "because no mask of its own can hide or show single pairs"
        elif not causal and not has_window and tokens > 1:
            reason = "with a sliding_window of its own"
        if reason is not None:
            name = type(self.attn).__name__
            raise ValueError(f"is_causal must be {self.attn.causal} for this {name} {reason}, got {causal}")

    def _mask(
        self, visible: Tensor, bias: Tensor | None, x: Tensor, cache: Any, has_window: bool
    ) -> AttentionMask:  # fmt: skip
        """transformers' mask as the module takes it."""
        B, T, _ = x.shape
        start: int | None = 0 if cache is None else cache.length
        if not getattr(cache, "is_exact", True):
            start = None
        if start is not None and not isinstance(cache, View):
            # A cache of the module's own holds no keys that are not written yet.
            visible = visible[..., : start + T]
            bias = None if bias is None else bias[..., : start + T]
        real = None
        if start is not None and visible.shape[-2] == T and visible.shape[-1] >= start + T:
            # The tokens that see themselves are not padding.
            real = visible[:, 0, :, start : start + T].diagonal(dim1=-2, dim2=-1).expand(B, T)
        takes_left = getattr(self.attn, "takes_left_padding", False) and not self.attn.sink_tokens
        if real is not None and not takes_left and start == 0 and not bool(real[:, 0].all()):
            raise ValueError(
                f"attention_mask must not begin with padding for this {type(self.attn).__name__}, whose outputs it "
                "would change: pad on the right"
            )
        if start == 0 and real is not None and T > 1 and is_readable(visible) and not reads_pairs_alone(self.attn):
            starts = packed_documents(visible, real, self._window)
            if starts is not None:
                return self._packed(visible, bias, real, starts, cache)
        if takes_single_pairs(self.attn):
            return CompleteMask(visible, bias, real, has_window)
        if (
            start is None
            or real is None
            or bias is not None
            or not is_padding(visible[..., start:], real, self.attn.causal)
        ):
            raise ValueError(
                f"attention_mask must hold causality, padding and packed documents alone for "
                f"{type(self.attn).__name__}, which mixes the scores of pairs or has none"
            )
        if takes_left:
            return AttentionMask(real_queries=real)
        return AttentionMask.padding(start + real.sum(1), real)

    def _packed(
        self, visible: Tensor, bias: Tensor | None, real: Tensor, starts: Tensor, cache: Any
    ) -> AttentionMask:  # fmt: skip
        """A mask of packed documents for a module that has to know where they begin."""
        name, mask = type(self.attn).__name__, None
        if cache is not None:
            raise ValueError(
                f"attention_mask must not separate documents in a cache for {name}: use_cache=False has none"
            )
        if bias is None:
            mask = packed_mask(
                visible, real, starts, causal=self.attn.causal, window=self._window,
                keep_window=self.attn.sliding_window != self._window,
            )  # fmt: skip
        if mask is None:
            raise ValueError(
                f"attention_mask must hold causality, padding and packed documents alone for {name}, which reads more "
                "of a row than single pairs of tokens"
            )
        return mask

    def _positions(self, position_ids: Tensor | None) -> Tensor | None:
        if self.attn.rope is None:
            return None
        if position_ids is None:
            raise ValueError("position_ids must be given to a layer with a rotary embedding, got None")
        if position_ids.ndim != 2:
            raise ValueError(
                f"position_ids must be (B, T), got shape {tuple(position_ids.shape)}: multimodal positions are not "
                "supported"
            )
        return position_ids


def _all_visible(x: Tensor, causal: bool, cache: Any) -> Tensor:
    """What new tokens x (B, T, E) see where there is no padding: all keys, or those up to their own; (1, 1, T, S)."""
    T, start = x.shape[1], 0 if cache is None else cache.length
    keys = cache.held if isinstance(cache, View) else start + T
    last = torch.arange(start + 1, start + T + 1, device=x.device)[:, None] if causal else start + T
    visible: Tensor = torch.arange(keys, device=x.device) < last
    return visible.expand(1, 1, T, keys)


def _without_numbers(module: nn.Module) -> nn.Module:
    """A copy on the meta device, without hooks and sharing the configuration."""
    memo: dict[int, Any] = configs_in(module)
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = _meta(tensor)
    return without_hooks(copy.deepcopy(module, memo))


def every_module(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, and those of what was replaced in it."""
    for module in model.modules():
        yield module
        if isinstance(module, AttentionLayer):
            yield from module.skeleton.modules()


def without_hooks(module: nn.Module) -> nn.Module:
    """The module, which is a copy, with no hooks of its own."""
    for name in HOOKS:
        setattr(module, name, OrderedDict())
    return module


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
