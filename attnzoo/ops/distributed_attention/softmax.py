"""Softmax attention of a sharded sequence, in the form that its call has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnzoo.distributed.sequence import Shards
from attnzoo.masks import Visibility
from attnzoo.ops.distributed_attention.decoding import cached_attention
from attnzoo.ops.distributed_attention.gather import gather_attention
from attnzoo.ops.distributed_attention.heads import heads_attention
from attnzoo.ops.distributed_attention.ring import Expand, ring_attention
from attnzoo.ops.distributed_attention.unobserved import unobserved
from attnzoo.ops.score_rules import ScoreRules


@unobserved
def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility,
    rules: ScoreRules,
    backend: str = "auto",
) -> Tensor:
    """`softmax_attention` where `view.shards` says how the tokens are spread; without its factors of the outputs.

    k and v are those of all tokens in form "gather", of this rank's part of the cache in form "cache", else its own.
    """
    shards: Shards = view.shards
    if shards.form != "gather" and (rules.decay is not None or rules.bias is not None):
        raise ValueError(
            "this operation has no form for a sequence that is spread over processes but 'gather': its scores have a "
            "bias or a decay"
        )
    if shards.form == "cache":
        return cached_attention(q, k, v, view, rules)
    if shards.form == "gather":
        return gather_attention(q, k, v, view, rules, backend)
    states = (k, v) if rules.k_rope is None else (k, v, rules.k_rope)
    if shards.form == "ring":
        return ring_attention(q, states, view, rules)
    return heads_attention(q, states, view, rules, backend)


@unobserved
def expanded_attention(
    q: Tensor,
    states: tuple[Tensor, ...],
    expand: Expand,
    view: Visibility,
    *,
    groups: int,
    parameters: Sequence[Tensor] = (),
    scale: float,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Softmax attention whose keys and values are expanded on arrival, so that only states travel; forms but "gather".

    Args:
        q: queries (B, t, H, D).
        states: (B, t, ...) each, of this rank's tokens.
        expand: makes keys and values of states; called with `groups`, a slice of key/value heads, in form "heads".
        view: who sees whom.
        groups: number of key/value heads that `expand` gives.
        parameters: tensors that `expand` reads and that want a gradient.
        scale: factor of the scores.
        backend: of the form "heads".
        options: of `ScoreRules`.
    """
    rules = ScoreRules(scale, **options)
    if view.shards.form == "ring":
        return ring_attention(q, states, view, rules, expand, parameters)
    return heads_attention(q, states, view, rules, backend, expand, groups, parameters)
