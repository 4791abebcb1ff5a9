"""Queries in chunks, whose scores are recomputed in the backward pass instead of kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.masks import Visibility
from attnzoo.rules import SIZE, check
from attnzoo.tracing import is_exported, is_traced

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
    check("chunk_size", chunk_size, SIZE)
    for first in range(0, queries, chunk_size):
        yield slice(first, min(queries, first + chunk_size))


def is_recomputed(queries: int, chunk_size: int | None) -> bool:
    """Whether the backward pass will do again what is done in these chunks."""
    # Asked first, since an exported program must not compare its lengths.
    if is_traced() or not torch.is_grad_enabled():
        return False
    return chunk_size is not None and chunk_size < queries


def view_now(view: Visibility) -> Visibility:
    """The view with a mask of its own: until the backward pass, callers may refill the tensors of theirs."""
    mask = view.mask
    if mask is None:
        return view
    own = copy.copy(mask)
    for name in ("lengths", "cu_seqlens", "dense_mask"):
        if (part := getattr(mask, name)) is not None:
            setattr(own, name, tensor_now(part))
    return replace(view, mask=own)


def tensor_now(tensor: Tensor) -> Tensor:
    """A tensor with what it holds now, which nobody overwrites until the backward pass.

    What has a gradient is left as it is: autograd watches over it.
    """
    if tensor.requires_grad:
        return tensor
    # Not larger than what is stored, where a mask was expanded.
    stored = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor[stored].clone().expand_as(tensor)


def recomputed(form: Callable[..., Result], rows: slice | None, *carried: Tensor) -> Result:
    """form(rows, *carried), called again in the backward pass if rows are a chunk of a training step."""
    # torch.func allows no checkpoint.
    if rows is None or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return form(rows, *carried)
    result: Result = checkpoint(form, rows, *carried, use_reentrant=False)
    return result


def in_chunks(
    form: Callable[..., Tensor],
    queries: int,
    chunk_size: int | None,
    *states: Tensor,
    view: Visibility | None = None,
) -> Tensor:
    """What `form` gives for the queries of a slice, (B, t, ...), for all queries, chunk by chunk.

    Args:
        form: called with the slice, None for all queries, and with the states.
        queries: number T of queries.
        chunk_size: as in `chunks_of`.
        states: tensors (B, S, ...) of the keys. A chunk gets them up to the last key that its queries see, as a slice
            of those of the next chunk, so that gradients are added up over no more keys than that.
        view: which key each query may attend to, with states.
    """
    outs = []
    keys = states[0].shape[1] if states else 0
    for rows in reversed(list(chunks_of(queries, chunk_size))):
        if rows is not None and view is not None:
            stop = view.keys_of(rows, queries, keys).stop
            states = tuple(x[:, :stop] for x in states)
        outs.append(recomputed(form, rows, *states))
    return outs[0] if len(outs) == 1 else torch.cat(outs[::-1], dim=1)
