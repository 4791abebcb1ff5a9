"""transformers' masks (B, 1, T, S) as masks of this library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import AttentionMask
from attnzoo.modules.forgetting import ForgettingAttention
from attnzoo.modules.mae import MixtureOfAttentiveExperts
from attnzoo.tracing import is_readable


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


def is_padding(visible: Tensor, real: Tensor, causal: bool) -> bool:
    """Whether all heads see real keys (B, H, T, T) alone, and real queries all of them, if causal up to their own."""
    T = real.shape[1]
    expected = real[:, None].expand(-1, T, -1)
    expected = expected.tril() if causal else expected
    return bool(((visible[..., :T] == expected[:, None]) | _of_padding(visible[..., :T], real)).all())


def _of_padding(visible: Tensor, real: Tensor) -> Tensor:
    """The rows of queries that are padding (B, H, T, T), where they see no key that is."""
    return ~real[:, None, :, None] & (real[:, None, None] | ~visible)


def takes_single_pairs(attn: Any) -> bool:
    """Whether a mask may hide any pair of a query and a key, with or without a cache."""
    return attn.has_patterns and getattr(attn, "takes_pair_masks", True)


def reads_pairs_alone(attn: Any) -> bool:
    """Whether what a query gets of a key it sees depends on no token that it does not see, nor on where a row begins.

    Others have to be told where packed documents begin: sink tokens, means, convolutions, shifts, states and whatever
    goes by the index of a token.
    """
    if not takes_single_pairs(attn) or attn.sink_tokens or not getattr(attn, "takes_left_padding", False):
        return False
    # ALiBi goes by distances, which are the same in a document of its own.
    by_index = getattr(attn, "reads_token_index", True) and getattr(attn, "alibi_slopes", None) is None
    return not (by_index or isinstance(attn, MixtureOfAttentiveExperts | ForgettingAttention))


def packed_documents(visible: Tensor, real: Tensor, window: int | None) -> Tensor | None:
    """Which tokens (B, T) begin a packed document or a run of padding; None where each row is one document.

    A document begins at a real token that does not see the real token before it, where that is in the window.

    Args:
        visible: (B, 1, T, S) with S >= T, whose keys are the queries first.
        real: (B, T), which tokens are not padding.
        window: of the mask.
    """
    B, T = real.shape
    index = torch.arange(T, device=real.device)
    last = torch.where(real, index, -1).cummax(1).values
    before = F.pad(last, (1, -1), value=-1)
    sees = visible[:, 0].expand(B, -1, -1).gather(2, before.clamp(min=0)[..., None])[..., 0]
    starts = real & (before >= 0) & ~sees
    if window is not None:
        starts &= index - before < window
    if not bool(starts.any()):
        return None
    starts[:, 1:] |= real[:, 1:] != real[:, :-1]
    starts[:, 0] = True
    return starts


def packed_mask(
    visible: Tensor, real: Tensor, starts: Tensor, *, causal: bool, window: int | None, keep_window: bool
) -> AttentionMask | None:
    """The mask of documents that begin at these tokens; None where transformers' mask is another.

    Args:
        visible: (B, H, T, T).
        real: (B, T), which tokens are not padding.
        starts: from `packed_documents`.
        causal: of the module.
        window: of the mask.
        keep_window: whether the module has no window of its own that would hide the same.
    """
    document = starts.cumsum(1)
    expected = (document[:, :, None] == document[:, None]) & real[:, None]
    if causal:
        expected = expected.tril()
    if window is not None:
        index = torch.arange(real.shape[1], device=real.device)
        expected = expected & ((index[:, None] - index).abs() < window)
    if not bool(((visible == expected[:, None]) | _of_padding(visible, real)).all()):
        return None
    ends = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel())
    return AttentionMask(
        cu_seqlens=ends.int(), dense_mask=visible if window is not None and keep_window else None, real_queries=real
    )
