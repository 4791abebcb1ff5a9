"""Sigmoid attention of a sharded sequence: form "gather", and new tokens over a sharded cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.masks import Visibility
from attnzoo.ops.distributed_attention.decoding import cached_view
from attnzoo.ops.distributed_attention.gather import query_runs, rows_of
from attnzoo.ops.distributed_attention.merging import summed
from attnzoo.ops.distributed_attention.unobserved import unobserved
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.sigmoid_attention import sigmoid_attention


@unobserved
def sharded_sigmoid(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, chunk_size: int | None, backend: str
) -> Tensor:
    """`sigmoid_attention` where `view.shards` says how the tokens are spread.

    k and v are those of all tokens in form "gather", of this rank's part of the cache in form "cache".
    """
    if view.shards.form == "cache":
        return _cached(q, k, v, view, rules, chunk_size)
    outs = []
    for rows, stop, own in query_runs(view, k.shape[1], rules.alibi_slopes is not None):
        bias = None if rules.bias is None else rows_of(rules.bias, rows)[..., :stop]
        part = q[:, rows], k[:, :stop], v[:, :stop]
        outs.append(_plain(*part, own, replace(rules, bias=bias), chunk_size, backend))
    return torch.cat(outs, 1)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, chunk_size: int | None, backend: str = "auto"
) -> Tensor:
    assert rules.sigmoid_bias is not None
    return sigmoid_attention(
        q, k, v, view, logit_bias=rules.sigmoid_bias, scale=rules.scale, softcap=rules.softcap,
        alibi_slopes=rules.alibi_slopes, bias=rules.bias, dropout=rules.dropout, chunk_size=chunk_size, backend=backend,
    )  # fmt: skip


def _cached(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, chunk_size: int | None) -> Tensor:
    """Outputs of the ranks' parts of the keys add up, once a row's bias counts the keys of all of them."""
    own, bias = cached_view(view, q, rules.alibi_slopes)
    groups, logit_bias = view.shards.sp.groups, rules.sigmoid_bias
    if isinstance(logit_bias, str):
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        counts = summed(own.visible_keys(shape, q.device).contiguous(), groups)
        dtype = torch.promote_types(q.dtype, torch.float32)
        counted = -counts.clamp(min=1).to(dtype).log()[..., None]
        bias, logit_bias = counted if bias is None else bias + counted, 0.0
    rules = replace(rules, alibi_slopes=None, bias=bias, sigmoid_bias=logit_bias)
    return summed(_plain(q, k, v, own, rules, chunk_size), groups)
