"""Attention whose weights depend on the scores of neighbouring queries and keys, and of other heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.checks import check_states
from attnzoo.ops.chunks import in_chunks, is_recomputed, tensor_now, view_now
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, for_heads, masked_softmax


@dataclass(frozen=True, eq=False)
class TokenMaps:
    """What happens to the scores of a layer before and after its softmax; every part may be None.

    Attributes:
        pre_kernel: convolution of the scores over queries and keys, (H, Cq, Ck).
        pre_heads: mix of the scores of neighbouring heads, (H / C, C, C) from source to target.
        post_kernel: convolution of the weights.
        post_heads: mix of the weights.
        alignment: which keys a kernel reads: "both" sides of the key, "left" or "right", the key itself included.
    """

    pre_kernel: Tensor | None = None
    pre_heads: Tensor | None = None
    post_kernel: Tensor | None = None
    post_heads: Tensor | None = None
    alignment: str = "both"

    @property
    def earlier(self) -> int:
        """How many queries before its own a row of weights depends on."""
        return sum(kernel.shape[1] - 1 for kernel in (self.pre_kernel, self.post_kernel) if kernel is not None)

    def convolved(self, a: Tensor, kernel: Tensor | None, places: Tensor | None) -> Tensor:
        """Maps (B, H, t, s) after a convolution, as if there was nothing before the first row.

            out[i, j] = sum_ab kernel[a, b] maps[i - (Cq - 1) + a, j - l + b]

        places (B, t): how many tokens of the row's document come before it; those of other documents count as 0.
        """
        if kernel is None or 0 in a.shape[1:]:
            return a
        H, Cq, Ck = kernel.shape
        left = {"left": Ck - 1, "right": 0}.get(self.alignment, Ck // 2)
        padded = F.pad(a, (left, Ck - 1 - left))
        out = torch.zeros_like(a)
        for back in range(Cq):
            # Rows moved down by `back`, zeros above.
            rows = F.pad(padded, (0, 0, back, 0))[..., : a.shape[2], :]
            term = F.conv2d(rows, kernel[:, None, Cq - 1 - back, None].to(a.dtype), groups=H)
            out = out + (term if places is None else term * (places >= back)[:, None, :, None])
        return out


@dataclass(frozen=True, eq=False)
class _Shown:
    """The weights that the operation has made, for observers: a score map that reads no scores."""

    weights: Callable[[slice], Tensor]
    rows: slice | None = None

    def at(self, queries: slice, keys: slice | Tensor) -> _Shown:  # noqa: ARG002
        return replace(self, rows=queries)

    def heads_after(self, heads: int) -> int:
        return heads

    def __call__(self, a: Tensor) -> Tensor:
        return self.weights(slice(None) if self.rows is None else self.rows).to(a.dtype)


def multi_token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: TokenMaps,
    view: Visibility,
    *,
    scale: float,
    earlier: Tensor | None = None,
    dropout: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-token attention (Golovneva et al. 2025, arXiv:2504.00927, section 3): (B, T, H, Dv).

        s = mix(conv(scale q_i . k_j, pre_kernel), pre_heads)          scores are 0 where `view` forbids
        p = softmax_j(s) where `view` allows, else 0
        o = mix(conv(p, post_kernel) where `view` allows, post_heads) v

    A convolution reads earlier queries of the same document, each with the keys that it sees itself. Rows of weights do
    not add up to 1 and may be negative. Without kernels this is `composed_attention`, with its backends, unless
    `pre_heads` mixes scores that a mask hides from some heads. Scores and weights are float32, or float64 for float64.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D) in the order of their tokens; query head h reads key/value head h // (H / G).
        v: values (B, S, G, Dv).
        maps: the convolutions and the mixes.
        view: which key each query may attend to; causal.
        scale: factor of the scores.
        earlier: up to `maps.earlier` queries before the first, (B, L, H, D). A mask must be the same for all queries
            then, and it holds for the earlier ones.
        dropout: probability of dropping a weight.
        chunk_size: queries that the plain form does at once, beside the earlier ones that they depend on; their scores
            are recomputed in the backward pass, so the (B, H, T, S) scores never exist. None, and in exported programs:
            all at once.
        backend: "auto" (in chunks) or "eager" (all at once); without kernels as in `composed_attention`.

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    pre, post = (None if mix is None else Composition(mix, residual=False) for mix in (maps.pre_heads, maps.post_heads))
    kernels = maps.pre_kernel is not None or maps.post_kernel is not None
    if not kernels and not (pre is not None and _tells_heads_apart(view.mask)):
        return composed_attention(
            q, k, v, pre, post, view, scale=scale, dropout=dropout, chunk_size=chunk_size, backend=backend
        )
    check_states(q, k, v, view)
    choose(backend, "multi_token_attention", {"eager": lambda: None}, q.device)
    T, L = q.shape[1], 0 if earlier is None else earlier.shape[1]
    rules, own_view = ScoreRules(scale, dropout=dropout), view
    if earlier is not None and L:
        view = replace(view, query_start=view.start(T, k.shape[1]) - L, mask=_of_all_queries(view.mask))
    queries = q if earlier is None else torch.cat([earlier, q], dim=1)
    (B, N, H, _), S = queries.shape, k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)

    def weights(rows: slice, keys: slice) -> Tensor:
        """Final weights (B, H, t, s) of these queries and keys, before dropout; rows count the earlier ones."""
        every = slice(max(0, rows.start - maps.earlier), rows.stop)
        after = max(0, rows.start - (0 if maps.post_kernel is None else maps.post_kernel.shape[1] - 1)) - every.start
        places = None if view.mask is None else view.mask.positions(B, N)
        places = None if places is None else places[:, every]
        visible = view.dense((B, H, N, S), q.device, every, keys)
        s = torch.einsum("bthd,bshd->bhts", queries[:, every].to(dtype), for_heads(k[:, keys], H).to(dtype)) * scale
        hidden = None if visible is None else ~visible
        s = maps.convolved(s if hidden is None else s.masked_fill(hidden, 0.0), maps.pre_kernel, places)[:, :, after:]
        s = s if pre is None else pre(s)
        if visible is not None and hidden is not None and visible.ndim > 1 and visible.shape[-2] > 1:
            visible, hidden = visible[..., after:, :], hidden[..., after:, :]
        p = masked_softmax(s, visible)
        if maps.post_kernel is not None:
            p = maps.convolved(p, maps.post_kernel, None if places is None else places[:, after:])
            p = p if hidden is None else p.masked_fill(hidden, 0.0)
        return (p if post is None else post(p))[:, :, rows.start - every.start - after :]

    if (observer := current_observer()) is not None:

        def shown(rows: slice) -> Tensor:
            first, last, _ = rows.indices(T)
            with without_autocast(q):
                return weights(slice(first + L, last + L), slice(0, S))

        observer(Observation("multi_token_attention", q, k, v, own_view, rules, None, _Shown(shown)))

    def form(rows: slice | None) -> Tensor:
        wanted = slice(L, N) if rows is None else slice(rows.start + L, rows.stop + L)
        keys = view.keys_of(slice(max(0, wanted.start - maps.earlier), wanted.stop), N, S)
        with without_autocast(q):
            p = F.dropout(weights(wanted, keys), dropout).to(v.dtype)
            return torch.einsum("bhts,bshd->bthd", p, for_heads(v[:, keys], H))

    chunk_size = None if backend == "eager" else chunk_size
    if is_recomputed(T, chunk_size):
        k, v, view = tensor_now(k), tensor_now(v), view_now(view)
    return in_chunks(form, T, chunk_size)


def _tells_heads_apart(mask: AttentionMask | None) -> bool:
    """Whether a mask may hide a pair from some heads only: no mask of the mixed scores says so."""
    dense = None if mask is None else mask.dense_mask
    return dense is not None and dense.ndim > 2 and dense.shape[-3] > 1


def _of_all_queries(mask: AttentionMask | None) -> AttentionMask | None:
    """A mask that says the same of all queries, without what belongs to single ones."""
    if mask is None:
        return None
    dense = mask.dense_mask
    if dense is not None and dense.ndim > 1 and dense.shape[-2] > 1:
        raise ValueError(
            "mask must be the same for all queries with a cache, since convolutions read the scores of earlier queries "
            f"too: its dimension -2 must be 1, got shape {tuple(dense.shape)}"
        )
    return AttentionMask(lengths=mask.lengths, dense_mask=dense)
