"""Differential attention: the difference of two softmax attentions over the same values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention


@dataclass(frozen=True, eq=False)
class MapDifference:
    """Maps of adjacent parts (B, 2 H, t, s) as those of heads (B, H, t, s): p_2h - factor p_(2h+1).

    Attributes:
        factor: one number, or (B, T, H).
    """

    factor: Tensor

    def at(self, queries: slice, keys: slice | Tensor) -> MapDifference:  # noqa: ARG002
        """The part that a tile needs."""
        return self if self.factor.ndim == 0 else replace(self, factor=self.factor[:, queries])

    def heads_after(self, heads: int) -> int:
        """Half as many."""
        return heads // 2

    def __call__(self, a: Tensor) -> Tensor:
        """a (B, 2 H, t, s) -> (B, H, t, s)."""
        factor = self.factor if self.factor.ndim == 0 else self.factor.transpose(1, 2)[..., None]
        return a[:, 0::2] - factor.to(a.dtype) * a[:, 1::2]


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factor: Tensor,
    view: Visibility = Visibility(),  # noqa: B008  (frozen)
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of the first queries minus `factor` times that of the second: (B, T, H, Dv).

        o_h = (softmax(q_2h k_1^T) - factor softmax(q_(2h+1) k_2^T)) v

    Both softmaxes are those of `softmax_attention`, with the same rules. A query that sees no key gives zeros.

    Args:
        q: queries (B, T, 2 H, D), both parts of a head side by side.
        k: keys (B, S, G, D) for both parts, or (B, S, G, 2 D) with a key for each.
        v: values (B, S, G, Dv).
        factor: one number, or (B, T, H).
        view: which key each query may attend to.
        scale: of the scores.
        softcap: positive bound of the logits.
        bias: broadcastable to (B, H, T, S), added to the scores.
        dropout: probability of dropping a weight; each part drops its own.
        backend: "auto", "eager", "sdpa", "flash" or "triton".
    """
    D, is_shared = q.shape[3], k.shape[3] == q.shape[3]
    if (observer := current_observer()) is not None:
        keys = k
        if not is_shared:
            # As operations read keys: one for each query.
            keys = k.unflatten(3, (2, D)).repeat_interleave(q.shape[2] // (2 * max(k.shape[2], 1)), 2).flatten(2, 3)
        rules = ScoreRules(scale, softcap, bias=_of_parts(bias))
        observer(Observation("differential_attention", q, keys, v, _of_both(view), rules, post=MapDifference(factor)))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout, "backend": backend}
    if is_shared:
        out = softmax_attention(q, k, v, _of_both(view), bias=_of_parts(bias), **options)
        first, second = out[:, :, 0::2], out[:, :, 1::2]
    else:
        first, second = (
            softmax_attention(q[:, :, part::2], k[..., part * D : part * D + D], v, view, bias=bias, **options)
            for part in (0, 1)
        )
    factor = factor if factor.ndim == 0 else factor[..., None]
    return first - factor.to(first.dtype) * second


def _of_parts(by_head: Tensor | None) -> Tensor | None:
    """What is broadcastable to (B, H, T, S) for both parts of each head."""
    if by_head is None or by_head.ndim < 3 or by_head.shape[-3] == 1:
        return by_head
    return by_head.repeat_interleave(2, -3)


def _of_both(view: Visibility) -> Visibility:
    """The view of a call with both parts of each head."""
    mask = view.mask
    if mask is None or (dense := _of_parts(mask.dense_mask)) is mask.dense_mask:
        return view
    return replace(view, mask=AttentionMask(lengths=mask.lengths, cu_seqlens=mask.cu_seqlens, dense_mask=dense))
