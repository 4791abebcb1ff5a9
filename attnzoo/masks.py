"""Which query may attend to which key: what callers say (`AttentionMask`) and what holds in a call (`Visibility`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.rules import is_integer, is_integer_tensor
from attnzoo.tracing import is_readable


class AttentionMask:
    """A mask that kernels understand without a dense tensor; True = may attend.

    It narrows what a module's own rules (causality, window) allow. Make one with `padding`, `packed` or
    `dense`, and combine with `&` (a plain boolean tensor may be the right operand):

        AttentionMask.padding(lengths) & AttentionMask.dense(keep)

    Keys and values of masked positions have to be finite: a NaN there reaches the output, as it does in
    `torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        lengths: (B,) integers or None; row b attends to keys 0 .. lengths[b] - 1.
        cu_seqlens: (n + 1,) int32 or None; cumulated document lengths, see `packed`.
        dense_mask: boolean tensor broadcastable to (B, H, T, S), or None.
        real_queries: (B, T) boolean or None; which queries are tokens and not padding. It hides nothing: the routers of
            mixtures leave the others out of their losses and statistics. Default: in self-attention by `lengths`, in
            cross-attention, where keys say nothing about queries, all.
    """

    def __init__(
        self,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dense_mask: Tensor | None = None,
        real_queries: Tensor | None = None,
    ) -> None:
        given = {"lengths": lengths, "cu_seqlens": cu_seqlens, "mask": dense_mask, "real_queries": real_queries}
        for name, part in given.items():
            if part is not None and not isinstance(part, Tensor):
                raise ValueError(f"{name} must be a tensor, got {part!r}")
        if lengths is not None:
            if lengths.ndim != 1 or not is_integer_tensor(lengths):
                raise ValueError(f"lengths must be a 1-D integer tensor, got {lengths.dtype} {tuple(lengths.shape)}")
            if is_readable(lengths) and bool((lengths < 0).any()):
                raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        if cu_seqlens is not None:
            if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(
                    f"cu_seqlens must be a 1-D int32 tensor, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
                )
            if is_readable(cu_seqlens):
                if int(cu_seqlens[0]) != 0:
                    raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
                if bool((cu_seqlens.diff() < 0).any()):
                    raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
        if dense_mask is not None and dense_mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = may attend), got {dense_mask.dtype}{_way(dense_mask)}")
        if real_queries is not None and (real_queries.dtype != torch.bool or real_queries.ndim != 2):
            raise ValueError(
                f"real_queries must be a boolean (B, T) tensor, got {real_queries.dtype} {tuple(real_queries.shape)}"
            )
        self.lengths = lengths
        self.cu_seqlens = cu_seqlens
        self.dense_mask = dense_mask
        self.real_queries = real_queries

    @classmethod
    def padding(cls, lengths: Tensor | Sequence[int], real_queries: Tensor | None = None) -> AttentionMask:
        """Right padding: row b has lengths[b] real keys, (B,); cached keys count. real_queries as in the class."""
        return cls(lengths=_integers("lengths", lengths), real_queries=real_queries)

    @classmethod
    def packed(cls, cu_seqlens: Tensor | Sequence[int]) -> AttentionMask:
        """Documents packed in rows: no attention across documents, and positions restart in each.

        cu_seqlens (n + 1,) int32 holds 0, the end of the first document, ..., B * T, counted over the
        tokens of the batch row after row, as flash-attn counts them. The end of a row always ends a
        document, whether it is listed or not. For self-attention without a cache.
        """
        return cls(cu_seqlens=_integers("cu_seqlens", cu_seqlens, torch.int32))

    @classmethod
    def dense(cls, mask: Tensor) -> AttentionMask:
        """Any boolean tensor broadcastable to (B, H, T, S)."""
        if mask is None:
            raise ValueError("mask must be a tensor, got None")
        return cls(dense_mask=mask)

    def __and__(self, other: AttentionMask | Tensor) -> AttentionMask:
        if isinstance(other, Tensor):
            other = AttentionMask.dense(other)
        if not isinstance(other, AttentionMask):
            return NotImplemented
        _check_alike(self, other)
        return AttentionMask(
            lengths=_both(self.lengths, other.lengths, torch.minimum),
            cu_seqlens=_both(self.cu_seqlens, other.cu_seqlens, _union_of_boundaries),
            dense_mask=_both(self.dense_mask, other.dense_mask, torch.logical_and),
            real_queries=_both(self.real_queries, other.real_queries, torch.logical_and),
        )

    def __repr__(self) -> str:
        return f"AttentionMask({', '.join(f'{k}={tuple(v.shape)}' for k, v in self._parts().items() if v is not None)})"

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""
        return AttentionMask(
            **{name: None if part is None else part.to(device) for name, part in self._parts().items()}
        )

    def _parts(self) -> dict[str, Tensor | None]:
        names = ("lengths", "cu_seqlens", "dense_mask", "real_queries")
        return {name: getattr(self, name) for name in names}

    def positions(self, batch: int, length: int) -> Tensor | None:
        """Positions (B, T) that restart at every packed document; None without packing."""
        if self.cu_seqlens is None:
            return None
        token, document = self._documents(batch, length)
        start = self.cu_seqlens.long()[document]
        row_start = torch.arange(batch, device=token.device)[:, None] * length
        return token - torch.maximum(start, row_start)

    def document_bounds(self, batch: int, length: int) -> tuple[Tensor, Tensor] | None:
        """First key and end of the keys, both (B, T) int32, of every token's packed document; None without packing."""
        if self.cu_seqlens is None:
            return None
        token, document = self._documents(batch, length)
        row_start = torch.arange(batch, device=token.device)[:, None] * length
        ends = self.cu_seqlens.long()
        first = torch.maximum(ends[document], row_start) - row_start
        last = torch.minimum(ends[document + 1], row_start + length) - row_start
        return first.int(), last.int()

    def check(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device, start: int | None = None
    ) -> None:
        """Raise ValueError where a part does not fit (B, H, T, S) or is on another device.

        start is the index of the first query where queries are some of the tokens of packed rows.
        """
        for part in self._parts().values():
            # "cuda" is the device that a tensor there calls cuda:0.
            if part is not None and part.device != device and part.device != torch.empty(0, device=device).device:
                raise ValueError(f"mask must be on the device of the input {device}, got {part.device}")
        if self.lengths is not None:
            if self.lengths.shape[0] != batch:
                raise ValueError(f"lengths must have one entry a row, got {self.lengths.shape[0]} for {batch}")
            if batch and is_readable(self.lengths) and int(self.lengths.max()) > keys:
                raise ValueError(f"lengths must be at most the {keys} keys, got {int(self.lengths.max())}")
        if self.real_queries is not None and self.real_queries.shape != (batch, queries):
            raise ValueError(
                f"real_queries must have shape {(batch, queries)}, got shape {tuple(self.real_queries.shape)}"
            )
        if self.cu_seqlens is not None and (queries != keys if start is None else start + queries > keys):
            raise ValueError(f"a packed mask needs as many queries as keys, got {queries} queries and {keys} keys")
        shape = (batch, heads, queries, keys)
        if self.dense_mask is not None and not broadcasts(self.dense_mask, shape):
            got = tuple(self.dense_mask.shape)
            hint = "; of the keys of each row, give mask[:, None, None]" if got == (batch, keys) else ""
            raise ValueError(f"mask must broadcast to (B, H, T, S) = {shape}, got shape {got}{hint}")

    def visible(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device | None = None
    ) -> Tensor | None:
        """The dense form: boolean, broadcastable to (B, H, T, S); None if everything is visible.

        Raises ValueError where a part does not fit these sizes, or the device if one is named.
        """
        own = (part.device for part in (self.lengths, self.cu_seqlens, self.dense_mask) if part is not None)
        device = next(own, torch.device("cpu")) if device is None else device
        whole = Visibility(causal=False, mask=self)
        return whole.dense((batch, heads, queries, keys), device)

    def parts(
        self, batch: int, tokens: int, start: int, rows: slice, keys: slice, key_positions: Tensor | None
    ) -> Iterator[Tensor]:
        """What each part allows at these rows and keys, boolean tensors broadcastable to (B, H, rows, keys).

        tokens is the length of packed rows, start the index of the first query in them.
        """
        if self.lengths is not None:
            index = torch.arange(keys.start, keys.stop, device=self.lengths.device)
            index = index if key_positions is None else key_positions[keys]
            yield (index < self.lengths[:, None])[:, None, None, :]
        if self.cu_seqlens is not None:
            _, document = self._documents(batch, tokens)
            own = document[:, start + rows.start : start + rows.stop]
            yield (own[:, :, None] == document[:, None, keys])[:, None]
        if self.dense_mask is not None:
            dense = self.dense_mask
            dense = dense[..., rows, :] if dense.ndim > 1 and dense.shape[-2] > 1 else dense
            if dense.ndim and dense.shape[-1] > 1:
                dense = dense[..., keys] if key_positions is None else dense.index_select(-1, key_positions[keys])
            # torch's own attention asks for rows and columns.
            yield torch.atleast_2d(dense)

    def _documents(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Token numbers over the whole batch (B, T) and the document that each belongs to (B, T)."""
        cu_seqlens = self.cu_seqlens
        assert cu_seqlens is not None
        if is_readable(cu_seqlens) and int(cu_seqlens[-1]) != batch * length:
            raise ValueError(f"cu_seqlens must end at B * T = {batch * length} tokens, got {int(cu_seqlens[-1])}")
        token = torch.arange(batch * length, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
        return token.view(batch, length), document.view(batch, length)


class CompleteMask(AttentionMask):
    """A dense mask that already holds causality, as transformers' do, so that a module adds no rule of its own.

    Args:
        dense_mask: boolean tensor broadcastable to (B, H, T, S).
        bias: added to the scores, floating and broadcastable to (B, H, T, S); for modules with `takes_bias`.
        real_queries: as in `AttentionMask`.
        has_window: whether it holds the module's window too; otherwise the module adds that.
    """

    def __init__(
        self,
        dense_mask: Tensor,
        bias: Tensor | None = None,
        real_queries: Tensor | None = None,
        has_window: bool = True,
    ) -> None:
        super().__init__(dense_mask=dense_mask, real_queries=real_queries)
        self.bias = bias
        self.has_window = has_window


def _way(mask: Tensor) -> str:
    """How to make a boolean mask of one that is added to scores."""
    return "; of a mask of 0 and -inf that is added to scores, give mask == 0" if mask.is_floating_point() else ""


def as_mask(mask: Tensor | AttentionMask | None) -> AttentionMask | None:
    """A boolean tensor becomes `AttentionMask.dense`; anything that is not a mask is refused."""
    if mask is None or isinstance(mask, AttentionMask):
        return mask
    if isinstance(mask, Tensor):
        return AttentionMask.dense(mask)
    raise ValueError(f"mask must be a boolean tensor or an AttentionMask, got {type(mask).__name__}")


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which key each query of one call may attend to: the only answer to "who sees whom".

    Query t of a call has index i = start + t, key s has index j = key_positions[s], by default s. Causality allows
    j <= i. A window W allows i - j < W (|i - j| < W if not causal), and keys j < sink_tokens outside it, in packed
    rows the first of each document. The mask narrows what is left. Nothing derived from the mask is kept, so a mask
    whose tensors are refilled in place says what they say now.

    Attributes:
        causal: no query sees a later key.
        window: width of the sliding window, or None.
        sink_tokens: leading keys that stay visible outside the window.
        mask: what the caller allows, or None. With a ring buffer it covers all tokens so far.
        query_start: index of the first query. Default: S - T, so a cached prefix needs no special case.
        key_positions: (S,) indices of the keys in a ring buffer. Default: 0 .. S - 1.
        shards: the `attnzoo.distributed.sequence.Shards` of a call whose tokens are spread over processes, or None.
            Such a view is for operations that know them, and answers no other question.
    """

    causal: bool = True
    window: int | None = None
    sink_tokens: int = 0
    mask: AttentionMask | None = None
    query_start: int | None = None
    key_positions: Tensor | None = None
    shards: Any = None

    def start(self, queries: int, keys: int) -> int:
        """Index of the first of T queries over S keys."""
        if self.shards is not None:
            raise ValueError("this operation has no form for a sequence that is spread over processes")
        return keys - queries if self.query_start is None else self.query_start

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether it is causality of a square call and nothing else, as `is_causal` of PyTorch means it."""
        bare = self.mask is None and self.window is None and self.key_positions is None
        return self.causal and bare and queries == keys and self.start(queries, keys) == 0

    def indices(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices (T,) of the queries and (S,) of the keys."""
        start = self.start(queries, keys)
        i = torch.arange(start, start + queries, device=device)
        return i, torch.arange(keys, device=device) if self.key_positions is None else self.key_positions

    def keys_of(self, rows: slice, queries: int, keys: int) -> slice:
        """The range of keys outside which the queries `rows` see nothing, by causality and window alone."""
        if self.key_positions is not None:
            return slice(0, keys)
        start = self.start(queries, keys)
        first, last = 0, min(keys, start + rows.stop) if self.causal else keys
        # Sink tokens may be on either side of the window.
        if self.window is not None and not self.sink_tokens:
            first = max(0, start + rows.start - self.window + 1)
            last = min(last, start + rows.stop + self.window - 1)
        return slice(min(first, last), last)

    def dense(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        rows: slice | None = None,
        keys: slice | None = None,
    ) -> Tensor | None:
        """A boolean tensor broadcastable to (B, H, rows, keys), or None if these queries see all of these keys.

        Args:
            shape: (B, H, T, S) of the whole call.
            device: of the queries.
            rows: queries that are wanted. Default: all.
            keys: keys that are wanted. Default: all.

        Raises:
            ValueError: where the mask does not fit the shape or the device.
        """
        B, H, T, S = shape
        # Not compared with None, by which torch.compile would tie a graph to the bounds of the slice.
        rows = rows if isinstance(rows, slice) else slice(0, T)
        keys = keys if isinstance(keys, slice) else slice(0, S)
        start = self.start(T, S)
        # A single last query, as in decoding, sees all keys without a comparison.
        later = self.causal and (self.key_positions is not None or keys.stop - 1 > start + rows.start)
        visible = None
        if later or self.window is not None:
            i = torch.arange(start + rows.start, start + rows.stop, device=device)[:, None]
            j = torch.arange(keys.start, keys.stop, device=device)
            j = (j if self.key_positions is None else self.key_positions[keys])[None]
            if self.window is not None:
                visible = (i - j if self.causal else (i - j).abs()) < self.window
                if self.sink_tokens:
                    place = None if self.mask is None else self.mask.positions(B, self._packed_tokens(T, S))
                    sinks = (j if place is None else place[:, None, None, keys]) < self.sink_tokens
                    visible = visible | sinks
            if later:
                visible = j <= i if visible is None else visible & (j <= i)
        if self.mask is not None:
            self.mask.check(B, H, T, self._total(T, S), device, self.query_start)
            packed = self._packed_tokens(T, S)
            for part in self.mask.parts(B, packed, start if packed != T else 0, rows, keys, self.key_positions):
                visible = part if visible is None else visible & part
        return visible

    def for_kernel(self, shape: tuple[int, int, int, int], device: torch.device) -> dict[str, Any]:
        """The same as keyword arguments of the kernels, whose tensors are never (T, S) unless the mask is dense.

        Raises:
            ValueError: where the mask does not fit the shape or the device.
        """
        B, H, T, S = shape
        lengths = documents = dense = None
        if self.mask is not None:
            self.mask.check(B, H, T, self._total(T, S), device, self.query_start)
            documents = self.mask.document_bounds(B, self._packed_tokens(T, S))
            lengths, dense = self.mask.lengths, self.mask.dense_mask
            dense = None if dense is None else torch.atleast_2d(dense)
            if documents is not None and self._packed_tokens(T, S) != T:
                rows = slice(self.start(T, S), self.start(T, S) + T)
                documents = documents[0][:, rows].contiguous(), documents[1][:, rows].contiguous()
            if dense is not None and self.key_positions is not None and dense.shape[-1] > 1:
                dense = dense.index_select(-1, self.key_positions)
        return {
            "causal": self.causal, "window": self.window, "sink_tokens": self.sink_tokens, "mask": dense,
            "lengths": lengths, "documents": documents, "key_positions": self.key_positions,
            "query_start": self.start(T, S),
        }  # fmt: skip

    def visible_keys(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """How many keys each query sees, broadcastable to (B, H, T) of a shape (B, H, T, S).

        Counted without a tensor of (T, S) numbers, except for a dense mask, sink tokens or a ring buffer.
        """
        _, _, T, S = shape
        rules = self.for_kernel(shape, device)
        if self.sink_tokens or self.key_positions is not None or rules["mask"] is not None:
            seen = self.dense(shape, device)
            return torch.full((1, 1, T), S, device=device) if seen is None else seen.expand(*shape[:3], S).sum(-1)
        i = rules["query_start"] + torch.arange(T, device=device)
        first, last = (torch.zeros_like(i), torch.full_like(i, S)) if (d := rules["documents"]) is None else d
        if rules["lengths"] is not None:
            last = torch.minimum(last, rules["lengths"][:, None])
        if self.causal:
            last = torch.minimum(last, i + 1)
        if self.window is not None:
            first = torch.maximum(first, i - self.window + 1)
            last = last if self.causal else torch.minimum(last, i + self.window)
        seen = (last - first).clamp(min=0)
        return seen if seen.ndim == 1 else seen[:, None]

    def _packed_tokens(self, queries: int, keys: int) -> int:
        """Tokens of packed rows: as many as keys where the queries are some of them."""
        return queries if self.query_start is None else keys

    def _total(self, queries: int, keys: int) -> int:
        """Keys that the mask covers: those of the call, or with a ring buffer all tokens so far."""
        return keys if self.key_positions is None else self.start(queries, keys) + queries


def broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to that shape."""
    if tensor.ndim > len(shape):
        return False
    # torch.compile of 2.9 cannot trace zip() of other lengths.
    return not [axis for axis in range(-tensor.ndim, 0) if tensor.shape[axis] not in (1, shape[axis])]


def _integers(name: str, values: Tensor | Sequence[int], dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor as it is, and anything else that holds integers as a tensor."""
    if isinstance(values, Tensor):
        return values
    numbers = list(values) if isinstance(values, Iterable) else [None]
    if not all(map(is_integer, numbers)):
        raise ValueError(f"{name} must hold integers, got {values!r}")
    most = torch.iinfo(dtype).max
    if any(abs(number) > most for number in numbers):
        raise ValueError(f"{name} must hold integers of at most {most}, got {values!r}")
    return torch.tensor(numbers, dtype=dtype)


def _check_alike(a: AttentionMask, b: AttentionMask) -> None:
    """Refuse to combine masks of other batches, shapes or devices."""
    for name in ("lengths", "real_queries"):
        one, other = getattr(a, name), getattr(b, name)
        if one is not None and other is not None and one.shape != other.shape:
            raise ValueError(f"{name} of masks must have one shape, got {tuple(one.shape)} and {tuple(other.shape)}")
    if (one := a.dense_mask) is not None and (other := b.dense_mask) is not None:
        axes = zip(one.shape[::-1], other.shape[::-1], strict=False)
        if any(n != m and 1 not in (n, m) for n, m in axes):
            raise ValueError(f"masks must broadcast to one shape, got {tuple(one.shape)} and {tuple(other.shape)}")
    packed = [mask.cu_seqlens for mask in (a, b) if mask.cu_seqlens is not None and is_readable(mask.cu_seqlens)]
    if len(packed) == 2 and (ends := [int(one[-1]) for one in packed])[0] != ends[1]:
        raise ValueError(f"cu_seqlens of masks must have one end, got {ends[0]} and {ends[1]}")


def _both(a: Tensor | None, b: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return combine(a, b)


def _union_of_boundaries(a: Tensor, b: Tensor) -> Tensor:
    """Two packings at once: a token sees what both allow, so every boundary of either counts."""
    boundaries: Tensor = torch.unique(torch.cat([a, b]))
    return boundaries
