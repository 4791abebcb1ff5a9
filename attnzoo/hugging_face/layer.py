"""The module that stands for an attention module of transformers and calls one of attnzoo."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hugging_face.caches import View, cache_of
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

        Raises:
            ValueError: for a mask or positions of another form, and for what the module refuses.
        """
        past = layer_past if past_key_values is None else past_key_values
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
        mask = None if visible is None else self._mask(visible, bias, hidden_states, cache, has_window)
        y = self.attn(hidden_states, mask=mask, positions=positions, cache=cache)
        return (y if self.resid_dropout is None else self.resid_dropout(y)), None

    @property
    def _window(self) -> int | None:
        """The window in transformers' masks for this layer."""
        kept: int | None = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        return kept

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
        if self.attn.has_patterns and getattr(self.attn, "takes_pair_masks", True):
            return CompleteMask(visible, bias, real, has_window)
        if (
            start is None
            or real is None
            or bias is not None
            or not _is_padding(visible[..., start:], real, self.attn.causal)
        ):
            raise ValueError(
                f"attention_mask must hold causality and padding alone for {type(self.attn).__name__}, which mixes "
                "the scores of pairs or has none"
            )
        if takes_left:
            return AttentionMask(real_queries=real)
        return AttentionMask.padding(start + real.sum(1), real)

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


def read_mask(mask: Any) -> tuple[Tensor, Tensor | None]:
    """Which keys transformers' mask shows, boolean, and what it adds to the scores, or None.

    Args:
        mask: (B, H, T, S), boolean with True = may attend, or floats of which the lowest numbers hide a key.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        got = f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask must be 4-D: load the model with attn_implementation 'sdpa' or 'eager'; got {got}"
        )
    if not mask.is_floating_point():
        return mask.bool(), None
    visible = mask > torch.finfo(mask.dtype).min / 2
    bias = mask.masked_fill(~visible, 0)
    return visible, None if is_readable(bias) and not bool(bias.any()) else bias


def _is_padding(visible: Tensor, real: Tensor, causal: bool) -> bool:
    """Whether real queries see the real ones of these keys (B, 1, T, T), and if causal only those up to their own."""
    expected = real[:, None].expand(-1, real.shape[1], -1)
    expected = expected.tril() if causal else expected
    return bool((visible[:, 0, :, : real.shape[1]] == expected)[real].all())


def _without_numbers(module: nn.Module) -> nn.Module:
    """A copy on the meta device, without hooks and sharing the configuration."""
    memo = {id(config): config for config in [getattr(module, "config", None)] if config is not None}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = _meta(tensor)
    return without_hooks(copy.deepcopy(module, memo))


def without_hooks(module: nn.Module) -> nn.Module:
    """The module, which is a copy, with no hooks of its own."""
    for name in HOOKS:
        setattr(module, name, OrderedDict())
    return module


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
