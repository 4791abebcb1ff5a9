"""Form "gather": this rank's queries over the keys of all tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.distributed.sequence import Shards
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import softmax_attention


def query_runs(view: Visibility, keys: int, splits: bool = True) -> Iterator[tuple[slice, int, Visibility]]:
    """The ordinary calls that one over all keys of a sequence, in their order, consists of.

    Yields the rows of this rank's queries, how many of the first keys they need, and who sees whom.

    Args:
        view: with shards.
        keys: S.
        splits: whether the distance of tokens counts other than by causality, windows and masks.
    """
    shards: Shards = view.shards
    mask = view.mask
    packed = mask is not None and mask.cu_seqlens is not None
    dense = None if mask is None else mask.dense_mask
    runs = shards.sp.runs(shards.tokens)
    placed = view.window is not None or packed or splits
    if not (view.causal or placed):
        # Every query sees the same, whatever the layout.
        runs = ((0, shards.positions.shape[0]),)
    at = 0
    for start, length in runs:
        rows, stop = slice(at, at + length), start + length if view.causal and not packed else keys
        at += length
        own = None
        if mask is not None:
            lengths = None if mask.lengths is None else mask.lengths.clamp(max=stop)
            some = None if dense is None else rows_of(dense, rows)
            some = some[..., :stop] if some is not None and some.ndim and some.shape[-1] > 1 else some
            own = AttentionMask(lengths=lengths, cu_seqlens=mask.cu_seqlens, dense_mask=some)
        query_start = start if packed or (placed and not view.causal) else None
        yield rows, stop, Visibility(view.causal, view.window, view.sink_tokens, own, query_start)


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """These queries of a tensor that broadcasts to (B, H, T, S)."""
    return tensor[..., rows, :] if tensor.ndim > 1 and tensor.shape[-2] > 1 else tensor


def gather_attention(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, backend: str) -> Tensor:
    """This rank's queries over the keys of all tokens: an ordinary call for each run of them."""
    outs = []
    for rows, stop, own in query_runs(view, k.shape[1], rules.alibi_slopes is not None):
        q_rope = None if rules.q_rope is None else rules.q_rope[:, rows]
        k_rope = None if rules.k_rope is None else rules.k_rope[:, :stop]
        bias = None if rules.bias is None else rows_of(rules.bias, rows)[..., :stop]
        decay = None if rules.decay is None else rules.decay[..., :stop]
        outs.append(
            softmax_attention(
                q[:, rows], k[:, :stop], v[:, :stop], own, scale=rules.scale, softcap=rules.softcap,
                alibi_slopes=rules.alibi_slopes, sinks=rules.sinks, q_rope=q_rope, k_rope=k_rope, bias=bias,
                decay=decay, dropout=rules.dropout, backend=backend,
            )
        )  # fmt: skip
    return torch.cat(outs, 1)
