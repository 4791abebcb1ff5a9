"""Which query may attend to which key: the structured mask and its dense form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _readable(tensor: Tensor) -> bool:
    """True if looking at the values costs no device synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class AttentionMask:
    """A mask that kernels understand without a dense tensor; True = may attend.

    It narrows what a module's own rules (causality, window) allow. Make one with `padding`, `packed` or
    `dense`, and combine with `&` (a plain boolean tensor may stand on the right):

        AttentionMask.padding(lengths) & AttentionMask.dense(keep)

    Keys and values of masked positions have to be finite: a NaN there reaches the output, as it does in
    `torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        lengths: (B,) integers or None; row b attends to keys 0 .. lengths[b] - 1.
        cu_seqlens: (n + 1,) int32 or None; cumulated document lengths, see `packed`.
        dense_mask: boolean tensor broadcastable to (B, H, T, S), or None.
    """

    def __init__(
        self,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dense_mask: Tensor | None = None,
    ) -> None:
        if lengths is not None:
            if lengths.ndim != 1 or lengths.dtype == torch.bool or not _is_integer(lengths):
                raise ValueError(f"lengths must be a 1-D integer tensor, got {lengths.dtype} {tuple(lengths.shape)}")
            if _readable(lengths) and bool((lengths < 0).any()):
                raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        if cu_seqlens is not None:
            if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
                raise ValueError(
                    f"cu_seqlens must be a 1-D int32 tensor, got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
                )
            if _readable(cu_seqlens):
                if int(cu_seqlens[0]) != 0:
                    raise ValueError(f"cu_seqlens must start at 0, got {int(cu_seqlens[0])}")
                if bool((cu_seqlens.diff() < 0).any()):
                    raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
        if dense_mask is not None and dense_mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean (True = may attend), got {dense_mask.dtype}")
        self.lengths = lengths
        self.cu_seqlens = cu_seqlens
        self.dense_mask = dense_mask
        self._memo: dict[tuple[object, ...], Tensor | None] = {}

    @classmethod
    def padding(cls, lengths: Tensor | Sequence[int]) -> AttentionMask:
        """Right padding: row b has lengths[b] real keys, (B,); cached keys count."""
        return cls(lengths=lengths if isinstance(lengths, Tensor) else torch.tensor(list(lengths)))

    @classmethod
    def packed(cls, cu_seqlens: Tensor | Sequence[int]) -> AttentionMask:
        """Documents packed in rows: no attention across documents, and positions restart in each.

        cu_seqlens (n + 1,) int32 holds 0, the end of the first document, ..., B * T, counted over the
        tokens of the batch row after row, as flash-attn counts them. The end of a row always ends a
        document, whether it is listed or not. For self-attention without a cache.
        """
        if not isinstance(cu_seqlens, Tensor):
            cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int32)
        return cls(cu_seqlens=cu_seqlens)

    @classmethod
    def dense(cls, mask: Tensor) -> AttentionMask:
        """Any boolean tensor broadcastable to (B, H, T, S)."""
        return cls(dense_mask=mask)

    def __and__(self, other: AttentionMask | Tensor) -> AttentionMask:
        if isinstance(other, Tensor):
            other = AttentionMask.dense(other)
        if not isinstance(other, AttentionMask):
            return NotImplemented
        return AttentionMask(
            lengths=_both(self.lengths, other.lengths, torch.minimum),
            cu_seqlens=_both(self.cu_seqlens, other.cu_seqlens, _union_of_boundaries),
            dense_mask=_both(self.dense_mask, other.dense_mask, torch.logical_and),
        )

    def __repr__(self) -> str:
        parts = {"lengths": self.lengths, "cu_seqlens": self.cu_seqlens, "dense_mask": self.dense_mask}
        shown = ", ".join(f"{k}={tuple(v.shape)}" for k, v in parts.items() if v is not None)
        return f"AttentionMask({shown})"

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return AttentionMask(
            lengths=move(self.lengths), cu_seqlens=move(self.cu_seqlens), dense_mask=move(self.dense_mask)
        )

    def positions(self, batch: int, length: int) -> Tensor | None:
        """Positions (B, T) that restart at every packed document; None without packing."""
        if self.cu_seqlens is None:
            return None
        key = ("positions", batch, length)
        if key not in self._memo or torch.compiler.is_compiling():
            token, document = self._documents(batch, length)
            start = self.cu_seqlens.long()[document]
            row_start = torch.arange(batch, device=token.device)[:, None] * length
            positions = token - torch.maximum(start, row_start)
            if torch.compiler.is_compiling():
                return positions
            self._memo[key] = positions
        return self._memo[key]

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

    def check(self, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> None:
        """Raise ValueError where a part does not fit (B, H, T, S) or lies on another device."""
        for part in (self.lengths, self.cu_seqlens, self.dense_mask):
            if part is not None and part.device != device:
                raise ValueError(f"mask must be on the device of the input {device}, got {part.device}")
        if self.lengths is not None:
            if self.lengths.shape[0] != batch:
                raise ValueError(f"lengths must have one entry a row, got {self.lengths.shape[0]} for {batch}")
            if batch and _readable(self.lengths) and int(self.lengths.max()) > keys:
                raise ValueError(f"lengths must be at most the {keys} keys, got {int(self.lengths.max())}")
        if self.cu_seqlens is not None and queries != keys:
            raise ValueError(f"a packed mask needs as many queries as keys, got {queries} queries and {keys} keys")
        if self.dense_mask is not None:
            check_broadcastable(self.dense_mask, (batch, heads, queries, keys))

    def visible(
        self, batch: int, heads: int, queries: int, keys: int, device: torch.device | None = None
    ) -> Tensor | None:
        """The dense form: boolean, broadcastable to (B, H, T, S); None if everything is visible.

        Raises ValueError where a part does not fit these sizes, or the device if one is named.
        """
        own = (part.device for part in (self.lengths, self.cu_seqlens, self.dense_mask) if part is not None)
        self.check(batch, heads, queries, keys, next(own, torch.device("cpu")) if device is None else device)
        parts = []
        if self.lengths is not None:
            key_index = torch.arange(keys, device=self.lengths.device)
            parts.append((key_index < self.lengths[:, None])[:, None, None, :])
        if self.cu_seqlens is not None:
            _, document = self._documents(batch, queries)
            parts.append((document[:, :, None] == document[:, None, :])[:, None])
        if self.dense_mask is not None:
            parts.append(self.dense_mask)
        if not parts:
            return None
        combined = parts[0]
        for part in parts[1:]:
            combined = combined & part
        return combined

    def _documents(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Token numbers over the whole batch (B, T) and the document that each belongs to (B, T)."""
        cu_seqlens = self.cu_seqlens
        assert cu_seqlens is not None
        if _readable(cu_seqlens) and int(cu_seqlens[-1]) != batch * length:
            raise ValueError(f"cu_seqlens must end at B * T = {batch * length} tokens, got {int(cu_seqlens[-1])}")
        token = torch.arange(batch * length, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
        return token.view(batch, length), document.view(batch, length)


def as_mask(mask: Tensor | AttentionMask | None) -> AttentionMask | None:
    """A boolean tensor becomes `AttentionMask.dense`; anything else that is no mask is refused."""
    if mask is None or isinstance(mask, AttentionMask):
        return mask
    if isinstance(mask, Tensor):
        return AttentionMask.dense(mask)
    raise ValueError(f"mask must be a boolean tensor or an AttentionMask, got {type(mask).__name__}")


def visibility(
    mask: AttentionMask | None,
    shape: tuple[int, int, int, int],
    *,
    causal: bool,
    window: int | None,
    sink_tokens: int,
    query_start: int,
    key_positions: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Everything that decides who sees whom, as one boolean tensor, or None if all is visible.

    shape is (B, H, T, S). Query t stands at index query_start + t; key s at key_positions[s], by default s.
    With a window W the causal rule is 0 <= i - j < W and the bidirectional one |i - j| < W; keys
    j < sink_tokens stay visible (still causal), in packed rows the first of each document. The result
    broadcasts to (B, H, T, S).
    """
    batch, heads, queries, keys = shape
    rules = (queries, keys, causal, window, sink_tokens, query_start)
    memo = key_positions is None and mask is not None and not torch.compiler.is_compiling()
    if memo and mask is not None and (batch, heads, *rules) in mask._memo:
        return mask._memo[batch, heads, *rules]
    visible = None
    last_query_alone = queries == 1 and key_positions is None and query_start >= keys - 1
    if window is not None or (causal and not last_query_alone):
        i = torch.arange(query_start, query_start + queries, device=device)[:, None]
        j = (torch.arange(keys, device=device) if key_positions is None else key_positions)[None, :]
        if window is not None:
            visible = (i - j).abs() < window if not causal else i - j < window
            if sink_tokens:
                first = None if mask is None else mask.positions(batch, queries)
                visible = visible | ((j if first is None else first[:, None, None, :]) < sink_tokens)
        if causal:
            visible = j <= i if visible is None else visible & (j <= i)
    if mask is not None:
        total = keys if key_positions is None else query_start + queries
        allowed = mask.visible(batch, heads, queries, total, device)
        if allowed is not None:
            if key_positions is not None and allowed.shape[-1] > 1:
                allowed = allowed.index_select(-1, key_positions)
            visible = allowed if visible is None else visible & allowed
    if memo and mask is not None:
        mask._memo[batch, heads, *rules] = visible
    return visible


def check_broadcastable(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Refuse a dense mask that does not broadcast to shape (B, H, T, S)."""
    fits = mask.ndim <= 4 and all(size in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"mask must broadcast to (B, H, T, S) = {shape}, got shape {tuple(mask.shape)}")


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _both(a: Tensor | None, b: Tensor | None, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return combine(a, b)


def _union_of_boundaries(a: Tensor, b: Tensor) -> Tensor:
    """Two packings at once: a token sees what both allow, so every boundary of either counts."""
    boundaries: Tensor = torch.unique(torch.cat([a, b]))
    return boundaries
