"""Queries in chunks, whose scores are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.tracing import is_exported


def in_chunks(form: Callable[[slice | None], Tensor], queries: int, chunk_size: int | None) -> Tensor:
    """What `form` gives for the queries of a slice, (B, t, ...), for all queries; None stands for all of them.

    Args:
        form: called for one chunk after the other, and in training for each again in the backward pass.
        queries: number T of queries.
        chunk_size: queries at once. None, and in exported programs, which must not count chunks: all.
    """
    if chunk_size is None or is_exported() or chunk_size >= queries:
        return form(None)
    # torch.func allows no checkpoint.
    recomputes = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    chunks = []
    for first in range(0, queries, chunk_size):
        rows = slice(first, min(queries, first + chunk_size))
        chunks.append(checkpoint(form, rows, use_reentrant=False) if recomputes else form(rows))
    return torch.cat(chunks, dim=1)
