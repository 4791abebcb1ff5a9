"""Removing heads for good: rows and columns of linear layers, and which heads are left."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def surviving_heads(total: int, pruned: tuple[int, ...], indices: Iterable[int]) -> tuple[int, ...]:
    """Original numbers of the heads that are left after pruning `indices`, also original numbers.

    Raises ValueError for a number outside 0 .. total - 1, a repeated one, or one that is gone already.
    """
    wanted = [int(index) for index in indices]
    for index in wanted:
        if not 0 <= index < total:
            raise ValueError(f"indices must lie between 0 and {total - 1}, got {index}")
        if index in pruned:
            raise ValueError(f"indices must name heads that are left, but head {index} is pruned already")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"indices must not repeat a head, got {wanted}")
    return tuple(h for h in range(total) if h not in pruned and h not in wanted)


def head_rows(heads: Iterable[int], width: int) -> Tensor:
    """Rows h * width .. h * width + width - 1 of every head, in order."""
    first = torch.tensor(list(heads), dtype=torch.long)[:, None] * width
    return (first + torch.arange(width)).flatten()


def keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    """Keep these output features of a linear layer."""
    linear.weight = _sliced(linear.weight, rows, 0)
    if linear.bias is not None:
        linear.bias = _sliced(linear.bias, rows, 0)
    linear.out_features = rows.numel()


def keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    """Keep these input features of a linear layer; its bias stays."""
    linear.weight = _sliced(linear.weight, columns, 1)
    linear.in_features = columns.numel()


def keep_entries(parameter: nn.Parameter, entries: Tensor) -> nn.Parameter:
    """A parameter with these entries of the first axis."""
    return _sliced(parameter, entries, 0)


def _sliced(parameter: Tensor, index: Tensor, dim: int) -> nn.Parameter:
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def group_index(heads: tuple[int, ...], group_size: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Key/value heads that surviving query heads still use, and which of them each query head reads.

    The second part is None where the groups stayed regular, so that head h reads h // (H / G) as before.
    """
    groups = tuple(sorted({h // group_size for h in heads}))
    reads = tuple(groups.index(h // group_size) for h in heads)
    size = len(heads) // len(groups) if groups else 1
    regular = reads == tuple(i // size for i in range(len(heads)))
    return groups, None if regular else reads


def attention_pairs(queries: int, keys: int, *, causal: bool, window: int | None, sink_tokens: int = 0) -> int:
    """Number of (query, key) pairs that see each other; query t stands at index keys - queries + t."""
    pairs = 0
    for i in range(keys - queries, keys):
        if not causal:
            last, first = keys - 1, 0
            if window is not None:
                last, first = min(last, i + window - 1), max(0, i - window + 1)
        else:
            last, first = i, 0 if window is None else max(0, i - window + 1)
        pairs += max(0, last - first + 1) + min(sink_tokens, max(first, 0))
    return pairs
