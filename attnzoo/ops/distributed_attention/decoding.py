"""New tokens over a cache whose tokens are spread over ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.distributed.sequence import Shards
from attnzoo.masks import Visibility
from attnzoo.ops.distributed_attention.merging import summed, with_sinks
from attnzoo.ops.distributed_attention.tiles import positioned
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention_lse


def cached_attention(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """Queries that are the same on all ranks over this rank's part of a cache, merged over the ranks.

    With m the largest L_r of the ranks: o = sum exp(L_r - m) o_r / sum exp(L_r - m), which is B H (Dv + 1) numbers.
    """
    own, bias = cached_view(view, q, rules.alibi_slopes)
    out, lse = softmax_attention_lse(q, k, v, own, replace(rules, alibi_slopes=None, bias=bias, sinks=None))
    groups = view.shards.sp.groups
    m = summed(lse, groups, "max")
    m = m.masked_fill(m == -torch.inf, 0.0)
    share = torch.exp(lse - m)[..., None]
    total = summed(torch.cat([share * out, share], -1), groups)
    out, share = total[..., :-1], total[..., -1]
    seen = share > 0
    out = out / share.masked_fill(~seen, 1.0)[..., None]
    return with_sinks(out, (m + share.log()).masked_fill(~seen, -torch.inf), rules.sinks).to(v.dtype)


def cached_view(view: Visibility, q: Tensor, slopes: Tensor | None) -> tuple[Visibility, Tensor | None]:
    """Who sees whom of new queries and this rank's cached keys, and the bias of their distances."""
    shards: Shards = view.shards
    assert shards.key_positions is not None
    tile = positioned(view, slice(None), slice(None), shards.positions, shards.key_positions, q, slopes)
    return tile.view, tile.bias
