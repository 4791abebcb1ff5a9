"""How scores become attention weights: the options of softmax attention as one object, and the one softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.masks import Visibility
from attnzoo.tracing import is_readable

HALF = (torch.float16, torch.bfloat16)


@dataclass(eq=False)  # Not frozen: one is made in every decoding step, and frozen fields are slow to set.
class ScoreRules:
    """The options of one call of `attnzoo.ops.softmax_attention` beside q, k, v and who sees whom; never changed.

    Attributes:
        scale: factor of the products.
        softcap: positive bound of the logits, or None.
        alibi_slopes: (H,) slopes of the distance, or None.
        sinks: one more logit in the denominator, (H,) or a number, or None.
        bias: (B, H, T, S) by broadcasting, added to the scores, or None.
        q_rope: (B, T, H, R) rotary part of the queries, or None.
        k_rope: (B, S, 1, R) rotary part of the keys, which all heads share, or None.
        decay: (B, H, S) cumulated log gates c of the keys, which add c_i - c_j to a score, or None.
        head_scale: factor of the outputs, (H,), (B, H) or (B, T, H), or None.
        output_gate: logits of a gate of the outputs, (B, T, H, Dv) or (B, T, H, 1), or None.
        dropout: probability of dropping a weight.
        sigmoid_bias: the weights are sigmoids of scores and this bias, as `sigmoid_weights` takes it; None: a softmax.
    """

    scale: float
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | float | None = None
    bias: Tensor | None = None
    q_rope: Tensor | None = None
    k_rope: Tensor | None = None
    head_scale: Tensor | None = None
    dropout: float = 0.0
    decay: Tensor | None = None
    output_gate: Tensor | None = None
    sigmoid_bias: Tensor | float | str | None = None


def for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, S, G, ...) of groups, repeated for each of so many query heads: (B, S, H, ...)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // max(x.shape[2], 1), dim=2)


def scores_of(
    q: Tensor, k: Tensor, view: Visibility, rules: ScoreRules, rows: slice | None = None, keys: slice | None = None
) -> Tensor:
    """Scores (B, H, t, s) of these queries and keys (default: all) before masks and sinks, in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = added_to_scores(q.shape[1], k.shape[1], q.device, view, rules, rows, keys)
    q, k = (q if rows is None else q[:, rows]), (k if keys is None else k[:, keys])
    s = torch.einsum("bthd,bshd->bhts", q.to(dtype), for_heads(k, q.shape[2]).to(dtype))
    if rules.q_rope is not None and rules.k_rope is not None:
        s = s + torch.einsum("bthr,bsr->bhts", rules.q_rope.to(dtype), rules.k_rope[:, :, 0].to(dtype))
    s = s * rules.scale
    if rules.softcap is not None:
        s = rules.softcap * torch.tanh(s / rules.softcap)
    return s if bias is None else s + bias.to(dtype)


def added_to_scores(
    queries: int,
    keys: int,
    device: torch.device,
    view: Visibility,
    rules: ScoreRules,
    at_queries: slice | None = None,
    at_keys: slice | None = None,
) -> Tensor | None:
    """ALiBi's distances, the decay and the bias, broadcastable to (B, H, T, S) or to a tile without decay, or None."""
    at_queries, at_keys = at_queries or slice(None), at_keys or slice(None)
    bias = rules.bias
    if bias is not None:
        if bias.ndim > 1 and bias.shape[-2] > 1:
            bias = bias[..., at_queries, :]
        if bias.ndim and bias.shape[-1] > 1:
            bias = bias[..., at_keys]
    if rules.alibi_slopes is not None:
        i, j = view.indices(queries, keys, device)
        distance = -rules.alibi_slopes[:, None, None] * (i[at_queries, None] - j[at_keys]).abs()
        bias = distance if bias is None else distance + bias
    if rules.decay is not None:
        decay = decay_of_pairs(rules.decay, view, queries)
        bias = decay if bias is None else decay + bias
    return bias


def join_rope(q: Tensor, k: Tensor, rules: ScoreRules) -> tuple[Tensor, Tensor]:
    """Queries and keys with the shared part as further features, for backends that know one key only."""
    if rules.q_rope is None or rules.k_rope is None:
        return q, k
    shared = rules.k_rope.expand(-1, -1, k.shape[2], -1)
    return torch.cat([q, rules.q_rope], dim=-1), torch.cat([k, shared], dim=-1)


def join_decay(q: Tensor, k: Tensor, decay: Tensor, view: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys with further features whose products are c_i - c_j, for backends that add nothing to scores.

    Each of the H / G heads that share a key has a feature of its own, which its queries select, so that keys are not
    repeated. Numbers of 16 bits take three such features, whose sum is exact in float32, and leave out c_i, which is
    constant in a row of the softmax. Others have it as one more feature: without it the rounding of a row's gradient,
    which adds up to 0, would add up over the rows.
    """
    groups, shared, unit = k.shape[2], q.shape[2] // k.shape[2], 256.0
    places = _places(view, q.shape[1], k.shape[1], decay.device)
    # Any other constant does as well; the first query's keeps numbers small and depends on no later token.
    c = decay - decay.index_select(2, places[:1]).detach()
    of_keys = (c / (-scale * unit)).transpose(1, 2).unflatten(2, (groups, shared))
    parts = [of_keys.to(k.dtype)]
    rest = of_keys.detach()
    for _ in range(2 if k.dtype in HALF else 0):
        rest = rest - parts[-1].detach().to(rest.dtype)
        parts.append(rest.to(k.dtype))
    select = unit * torch.eye(shared, dtype=q.dtype, device=q.device).repeat(groups, len(parts))
    features = [select.expand(*q.shape[:2], -1, -1)]
    if k.dtype not in HALF:
        features.append((c.index_select(2, places) / scale).transpose(1, 2)[..., None].to(q.dtype))
        parts.append(torch.ones_like(k[..., :1]))
    return torch.cat([q, *features], dim=-1), torch.cat([k, *parts], dim=-1)


def decay_of_pairs(decay: Tensor, view: Visibility, queries: int) -> Tensor:
    """c_i - c_j (B, H, T, S) of cumulated log gates (B, H, S); the queries are among the keys."""
    keys = decay.shape[2]
    if not keys:
        return decay[:, :, None].expand(-1, -1, queries, -1)
    return decay.index_select(2, _places(view, queries, keys, decay.device))[..., None] - decay[:, :, None]


def _places(view: Visibility, queries: int, keys: int, device: torch.device) -> Tensor:
    """Where the T queries are among the S keys."""
    i, j = view.indices(queries, keys, device)
    return i if view.key_positions is None else (j == i[:, None]).long().argmax(1)


def masked_softmax(scores: Tensor, visible: Tensor | None, sinks: Tensor | float | None = None) -> Tensor:
    """Softmax over the last axis of scores (..., T, S); a fully masked row gets zero weights and zero gradients.

    Args:
        scores: in the dtype to compute in.
        visible: boolean, broadcastable to the scores, True = may attend; None: everything.
        sinks: one more logit in the denominator, a number or broadcastable to (..., T, 1).
    """
    seen = None
    if visible is not None:
        seen = visible.any(-1, keepdim=True)
        if is_readable(seen) and bool(seen.all()):
            seen = None
        # Fully masked rows keep finite scores here and get zero weights below, so that neither way gives NaN.
        hidden = ~visible if seen is None else ~visible & seen
        # Added, which is faster than filling the scores of all heads.
        scores = scores + torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, -math.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        # A number is written on the device: one that is copied there could not be captured in a CUDA graph.
        sink = sinks.to(scores.dtype) if isinstance(sinks, Tensor) else scores.new_full((), sinks)
        sink = sink.expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, sink], -1), dim=-1)[..., :-1]
    return weights if seen is None else weights.masked_fill(~seen, 0.0)


def sigmoid_weights(scores: Tensor, visible: Tensor | None, bias: Tensor | float | str | None) -> Tensor:
    """sigmoid(scores + bias) of scores (B, H, T, S) where visible, and 0 elsewhere.

    Args:
        scores: in the dtype to compute in.
        visible: boolean, broadcastable to the scores, True = may attend; None: everything.
        bias: a number, (H,), or "visible": minus the logarithm of the number of keys that a row sees.
    """
    if isinstance(bias, Tensor):
        scores = scores + bias.to(scores.dtype)[:, None, None]
    elif isinstance(bias, str):
        seen = torch.ones_like(scores[..., :1, :], dtype=torch.bool) if visible is None else visible
        seen = seen.expand(torch.broadcast_shapes(seen.shape, scores.shape[-1:]))
        scores = scores - seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype).log()
    elif bias is not None:
        scores = scores + bias
    return torch.sigmoid(scores if visible is None else scores.masked_fill(~visible, -math.inf))
