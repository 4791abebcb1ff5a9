"""Softmax attention with a decay that leaves out the keys that forget gates have hidden."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.chunks import recomputed, view_now
from attnzoo.ops.observation import current_observer
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.tracing import has_values

CHUNK = 256
"""Queries that look at their keys from the same one on."""


def pruned_attention(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, decay: Tensor, scale: float, tolerance: float, **options: Any
) -> Tensor:
    """Attention of q (B, T, H, D) over the keys that forget gates have left (Lin et al. 2025, arXiv:2504.06949).

    `softmax_attention` with a decay c, without the keys j for which, in all queries i of a chunk,

        c_i - c_j < tolerance - 2 |scale| max |q| max |k| - log(2 S)

    What is left out of a query's weights is exp(tolerance) / 2 at most, so its output changes by less than
    exp(tolerance) max |v|. Each key/value head has a first key of its own in each chunk of CHUNK queries; it is the
    same in all rows of a batch. The search reads values: exported, compiled and observed calls, sharded sequences, and
    masks other than that of packed documents, which might hide a token from itself, leave nothing out.

    Args:
        q: queries.
        k: keys (B, S, G, D) in the order of their tokens.
        v: values (B, S, G, Dv).
        view: who sees whom; causal and without a window.
        decay: c (B, H, S), as in `softmax_attention`; in packed rows from the start of each document.
        scale: factor of the products.
        tolerance: logarithm of the share of the weights that may be lost, negative.
        options: further options of `softmax_attention`, dropout and backend.
    """
    (B, T, H, _), (S, G), mask = q.shape, k.shape[1:3], view.mask
    searches = view.shards is None and current_observer() is None and has_values(decay) and B * T * H > 0
    hides = mask is not None and (mask.lengths is not None or mask.dense_mask is not None)
    if hides or not searches or tolerance == -math.inf:
        return softmax_attention(q, k, v, view, decay=decay, scale=scale, **options)
    start = view.start(T, S)
    chunks = [slice(t, min(t + CHUNK, T)) for t in range(0, T, CHUNK)]
    firsts = [first_keys(q, k, view, rows, decay.detach(), scale, tolerance) for rows in chunks]
    if not any(map(any, firsts)):
        return softmax_attention(q, k, v, view, decay=decay, scale=scale, **options)
    if mask is not None and torch.is_grad_enabled():
        view = view_now(view)
    groups = 1 if all(len(set(of_chunk)) == 1 for of_chunk in firsts) else G
    # Split once, since each slice has a gradient of the size of what it is taken from.
    parts = zip(*(x.chunk(groups, 2) for x in (q, k, v)), decay.chunk(groups, 1), strict=True)

    def form(rows: slice, first: int, q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        """Outputs of some heads for some queries, over the keys from `first` on."""
        keys = slice(first, start + rows.stop)
        own = Visibility(True, query_start=start + rows.start - first)
        if mask is not None and (seen := view.dense((B, H, T, S), q.device, rows, keys)) is not None:
            own = replace(own, causal=False, mask=AttentionMask.dense(seen))
        return softmax_attention(
            q[:, rows], k[:, keys], v[:, keys], own, decay=c[..., keys], scale=scale, **options
        )  # fmt: skip

    outs = []
    for g, tensors in enumerate(parts):
        heads = [
            recomputed(lambda rows, *tensors, first=first[g]: form(rows, first, *tensors), rows, *tensors)
            for rows, first in zip(chunks, firsts, strict=True)
        ]
        outs.append(heads[0] if len(heads) == 1 else torch.cat(heads, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


@torch.no_grad()
def first_keys(
    q: Tensor, k: Tensor, view: Visibility, rows: slice, decay: Tensor, scale: float, tolerance: float
) -> list[int]:
    """The first key of each key/value head that queries `rows` need; arguments as in `pruned_attention`."""
    (B, T, H, _), (S, G) = q.shape, k.shape[1:3]
    i = view.start(T, S) + rows.start
    stop = i + rows.stop - rows.start
    lengths = [torch.linalg.vector_norm(x, dim=-1, dtype=decay.dtype).amax(1) for x in (q[:, rows], k[:, :stop])]
    limit = tolerance - 2 * abs(scale) * lengths[0].view(B, G, -1) * lengths[1][..., None] - math.log(2 * stop)
    # The first query is the one that sees furthest.
    c = decay[..., : i + 1].view(B, G, H // G, i + 1)
    needed = c[..., -1:] - c >= limit[..., None]
    bounds = None if view.mask is None else view.mask.document_bounds(B, S)
    if bounds is not None:
        needed &= torch.arange(i + 1, device=q.device) >= bounds[0][:, i, None, None, None]
    firsts: list[int] = needed.any(0).any(1).to(torch.uint8).argmax(1).tolist()
    return firsts
