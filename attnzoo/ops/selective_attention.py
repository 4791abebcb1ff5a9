"""Softmax attention whose queries let later ones forget keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import Visibility
from attnzoo.ops.checks import check_states
from attnzoo.ops.chunks import chunks_of, is_recomputed, recomputed, tensor_now, view_now
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, for_heads, masked_softmax
from attnzoo.tracing import is_traced


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility,
    *,
    head: int,
    scale: float,
    removed: Tensor | None = None,
    real: Tensor | None = None,
    protect_first: bool = True,
    threshold: float | None = None,
    kept: int = 0,
    dropout: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Selective attention (Leviathan et al. 2024, arXiv:2410.02703, section 3): outputs (B, T, H, Dv) and F.

        s_hij = scale q_i . k_j
        S_ij = relu(s_mij) for j < i, 0 for the first token of a document, and where j is not visible to i
        F_ij = sum_{l < i} S_lj                          m is the selection head; F is subtracted in all heads
        o_h = softmax_j(s_hij - F_ij where `view` allows and F_ij <= threshold) v_j

    A query that sees no key gives zeros. Scores, F and softmax are float32, or float64 for float64.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D) in the order of their tokens; query head h reads key/value head h // (H / G).
        v: values (B, S, G, Dv).
        view: which key each query may attend to; causal.
        head: the selection head m.
        scale: factor of the scores.
        removed: F of the first query, (B, S). Default: 0.
        real: which queries are tokens and not padding, (B, T); the others drop nothing. None: all.
        protect_first: whether the first token stays.
        threshold: keys from which more was taken have no weight; no query after that sees them. None: all have.
        kept: of how many last queries F is returned.
        dropout: probability of dropping a weight.
        chunk_size: queries that the plain form does at once; the scores of a chunk are recomputed in the backward
            pass, which keeps one F (B, S) for each. None, and in exported programs: all at once.
        backend: "auto" (in chunks) or "eager" (all at once). There is no kernel.

    Returns:
        The outputs, and F of the last `kept` queries, or of all if there are fewer, and of the query after the last:
        (B, n + 1, S).

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    check_states(q, k, v, view)
    choose(backend, "selective_attention", {"eager": lambda: None}, q.device)
    (B, T, H, _), S = q.shape, k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    start = q.new_zeros(B, S, dtype=dtype) if removed is None else removed
    if not is_traced() and start.is_inference():
        # Gradients could not pass what a cache was given in inference mode.
        start = start.clone()
    # Keys of packed rows are their queries.
    places = None if view.mask is None else view.mask.positions(B, T)

    def scores(rows: slice, keys: slice) -> Tensor:
        return torch.einsum("bthd,bshd->bhts", q[:, rows].to(dtype), for_heads(k[:, keys], H).to(dtype)) * scale

    def choices(s: Tensor, visible: Tensor | None, rows: slice, keys: slice) -> Tensor:
        """S (B, t, s) of the selection head's scores (B, H, t, s)."""
        i, j = view.indices(T, S, q.device)
        may = j[keys] < i[rows, None]
        if protect_first:
            may = may & ((j if places is None else places)[..., keys] > 0)[..., None, :]
        if visible is not None:
            may = may & visible.expand(torch.broadcast_shapes(visible.shape, s.shape))[:, head]
        if real is not None:
            may = may & real[:, rows, None]
        return torch.relu(s[:, head]) * may

    def before(chosen: Tensor, start: Tensor) -> Tensor:
        """F (B, t + 1, s) of the queries with choices S (B, t, s), and of the query after them."""
        return start[:, None] + F.pad(chosen.cumsum(1), (0, 0, 1, 0))

    def left(visible: Tensor | None, removed: Tensor) -> Tensor | None:
        """Who sees whom where keys are dropped."""
        if threshold is None:
            return visible
        seen = (removed <= threshold)[:, None]
        return seen if visible is None else visible & seen

    def form(rows: slice | None, start: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(0, T) if rows is None else rows
        keys = view.keys_of(rows, T, S)
        with without_autocast(q):
            s, visible = scores(rows, keys), view.dense((B, H, T, S), q.device, rows, keys)
            chosen = choices(s, visible, rows, keys)
            removed = before(chosen, start[:, keys])
            p = masked_softmax(s - removed[:, None, :-1], left(visible, removed[:, :-1]))
            out = torch.einsum("bhts,bshd->bthd", F.dropout(p, dropout).to(v.dtype), for_heads(v[:, keys], H))
            last = removed[:, -min(kept, removed.shape[1] - 1) - 1 :]
            rest = start[:, None].expand(-1, last.shape[1], -1)
            # A copy, since a slice would keep all rows alive.
            return out, torch.cat([rest[..., : keys.start], last, rest[..., keys.stop :]], -1)

    if (observer := current_observer()) is not None:
        every, all_keys = slice(0, T), slice(0, S)
        with without_autocast(q):
            chosen = choices(scores(every, all_keys), view.dense((B, H, T, S), q.device), every, all_keys)
            taken = before(chosen, start)[:, None, :-1]
            bias = -taken if threshold is None else (-taken).masked_fill(taken > threshold, -torch.inf)
            rules = ScoreRules(scale, bias=bias, dropout=dropout)
        observer(Observation("selective_attention", q, k, v, view, rules))
    outs, ends = [], [start[:, None]]
    chunk_size = None if backend == "eager" else chunk_size
    if is_recomputed(T, chunk_size):
        k, v, view = tensor_now(k), tensor_now(v), view_now(view)
        real = None if real is None else tensor_now(real)
    for rows in chunks_of(T, chunk_size):
        out, after = recomputed(form, rows, ends[-1][:, -1])
        outs.append(out)
        ends[-1:] = [ends[-1][:, :-1], after] if kept else [after]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), torch.cat(ends, 1)[:, -min(kept, T) - 1 :]
