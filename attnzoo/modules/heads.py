"""Which heads a module has left, which key/value head each of them reads, and how layers lose the others' weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attnzoo.ops.softmax_attention import constant
from attnzoo.rules import numbers_of


@dataclass(frozen=True)
class HeadLayout:
    """The heads of a module, by their original numbers.

    Attributes:
        total: query heads H that the module was made with.
        group_size: query heads that share one key/value head.
        kept: original numbers of the query heads that are left, ascending.
        groups: original numbers of the key/value heads that a query head still reads.
        reads: for each head that is left, the place of its key/value head among `groups`.
        is_regular: whether head h reads key/value head h // (H / G), as operations assume.
    """

    total: int
    group_size: int
    kept: tuple[int, ...]
    groups: tuple[int, ...] = field(init=False, repr=False)
    reads: tuple[int, ...] = field(init=False, repr=False)
    is_regular: bool = field(init=False, repr=False)

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int | None = None) -> HeadLayout:
        """All heads; num_kv_heads defaults to num_heads."""
        return cls(num_heads, num_heads // (num_kv_heads or num_heads), tuple(range(num_heads)))

    def __post_init__(self) -> None:
        groups = tuple(sorted({head // self.group_size for head in self.kept}))
        place = {group: i for i, group in enumerate(groups)}
        reads = tuple(place[head // self.group_size] for head in self.kept)
        size = len(self.kept) // len(groups) if groups else 1
        regular = reads == tuple(i // size for i in range(len(self.kept)))
        for name, value in (("groups", groups), ("reads", reads), ("is_regular", regular)):
            object.__setattr__(self, name, value)

    @property
    def pruned(self) -> tuple[int, ...]:
        """Original numbers of the heads that are gone, ascending."""
        return tuple(head for head in range(self.total) if head not in self.kept)

    def prune(self, indices: Iterable[int]) -> HeadLayout:
        """The layout without these heads.

        Raises:
            ValueError: for a number outside 0 .. total - 1, a repeated one, or a head that is gone already.
        """
        wanted = numbers_of("indices", indices)
        for index in wanted:
            if not 0 <= index < self.total:
                raise ValueError(f"indices must lie between 0 and {self.total - 1}, got {index}")
            if index not in self.kept:
                raise ValueError(f"indices must name heads that are left, but head {index} is pruned already")
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"indices must not repeat a head, got {wanted}")
        return replace(self, kept=tuple(head for head in self.kept if head not in wanted))

    def places(self, smaller: HeadLayout) -> tuple[list[int], list[int]]:
        """Where the heads and the key/value heads of a smaller layout are in this one."""
        return [self.kept.index(h) for h in smaller.kept], [self.groups.index(g) for g in smaller.groups]

    def spread(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Keys or values (B, S, G, D) as operations read them: one of each query head where pruning left gaps."""
        if self.is_regular:
            return tensors
        index = constant(self.reads, tensors[0].device, torch.long)
        return tuple(tensor.index_select(2, index) for tensor in tensors)

    @property
    def groups_read(self) -> int:
        """Number of key/value heads that `spread` gives."""
        return len(self.groups) if self.is_regular else len(self.kept)

    def of_each_head(self, weights: Tensor) -> Tensor:
        """Weights (G, ...) of key/value heads as (H, ...), those that each query head reads."""
        if self.is_regular:
            size = len(self.kept) // max(len(self.groups), 1)
            return weights if size == 1 else weights.repeat_interleave(size, 0)
        return weights.index_select(0, constant(self.reads, weights.device, torch.long))

    def products(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, H, m) of each head times the weights (G, m, n) that it reads: (B, T, H, n).

        Weights that several heads share are not copied for each.
        """
        weights = weights.to(x.dtype)
        if not self.is_regular:
            return torch.einsum("bthm,hmn->bthn", x, self.of_each_head(weights))
        groups = weights.shape[0]
        grouped = x.unflatten(2, (groups, x.shape[2] // max(groups, 1)))
        return torch.einsum("btgsm,gmn->btgsn", grouped, weights).flatten(2, 3)


def head_rows(heads: Iterable[int], width: int) -> Tensor:
    """Rows h * width .. h * width + width - 1 of every head, in order."""
    first = torch.tensor(list(heads), dtype=torch.long, device="cpu")[:, None] * width
    return (first + torch.arange(width, device="cpu")).flatten()


def keep_rows(linear: nn.Linear, heads: Iterable[int], width: int = 1) -> None:
    """Keep the output features of these heads, `width` each."""
    rows = head_rows(heads, width)
    linear.weight = keep_entries(linear.weight, rows)
    if linear.bias is not None:
        linear.bias = keep_entries(linear.bias, rows)
    linear.out_features = rows.numel()


def keep_columns(linear: nn.Linear, heads: Iterable[int], width: int = 1) -> None:
    """Keep the input features of these heads, `width` each; the bias stays."""
    columns = head_rows(heads, width)
    linear.weight = keep_entries(linear.weight, columns, 1)
    linear.in_features = columns.numel()


def keep_entries(parameter: Tensor, entries: Iterable[int] | Tensor, dim: int = 0) -> nn.Parameter:
    """A parameter with these entries of one axis."""
    index = entries if isinstance(entries, Tensor) else torch.tensor(list(entries), dtype=torch.long, device="cpu")
    kept = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def attention_pairs(queries: int, keys: int, *, causal: bool, window: int | None = None, sink_tokens: int = 0) -> int:
    """Number of (query, key) pairs that see each other; query t has index keys - queries + t."""
    pairs, sinks = 0, min(sink_tokens, keys)
    for i in range(keys - queries, keys):
        first, stop = 0, i + 1 if causal else keys
        if window is not None:
            first, stop = max(0, i - window + 1), stop if causal else min(stop, max(0, i + window))
        # Sinks before the window, and without causality those after it.
        pairs += max(0, stop - first) + min(sinks, first) + (0 if causal else max(0, sinks - stop))
    return pairs
