"""Operations called with the words of a `Visibility` among their options, for tables of cases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.masks import Visibility, as_mask
from attnzoo.ops.softmax_attention import softmax_attention

WORDS = ("causal", "window", "sink_tokens", "mask", "query_start", "key_positions")


def view_of(options: dict[str, Any]) -> tuple[Visibility, dict[str, Any]]:
    """The view that the options describe, and the rest of them."""
    words = {name: options[name] for name in WORDS if name in options}
    if "mask" in words:
        words["mask"] = as_mask(words["mask"])
    return Visibility(**words), {name: value for name, value in options.items() if name not in WORDS}


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`softmax_attention` with the view's words among the options."""
    view, rest = view_of(options)
    return softmax_attention(q, k, v, view, **rest)
