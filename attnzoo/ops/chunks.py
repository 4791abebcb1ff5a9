"""Queries in chunks, whose scores are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.tracing import is_exported

Result = TypeVar("Result")


def chunks_of(queries: int, chunk_size: int | None) -> Iterator[slice | None]:
    """Slices of so many queries at most, or one None that stands for all of them.

    Args:
        queries: number T of queries.
        chunk_size: queries at once. None, and in exported programs, which must not count chunks: all.
    """
    if chunk_size is None or is_exported() or chunk_size >= queries:
        yield None
        return
    for first in range(0, queries, chunk_size):
        yield slice(first, min(queries, first + chunk_size))


def recomputed(form: Callable[..., Result], rows: slice | None, *carried: Tensor) -> Result:
    """form(rows, *carried), called again in the backward pass if rows are a chunk of a training step."""
    # torch.func allows no checkpoint.
    if rows is None or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return form(rows, *carried)
    result: Result = checkpoint(form, rows, *carried, use_reentrant=False)
    return result


def in_chunks(form: Callable[[slice | None], Tensor], queries: int, chunk_size: int | None) -> Tensor:
    """What `form` gives for the queries of a slice, (B, t, ...), for all queries, chunk by chunk."""
    chunks = [recomputed(form, rows) for rows in chunks_of(queries, chunk_size)]
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)
