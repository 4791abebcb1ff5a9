"""The `triton` backend of composed attention: compositions become one matrix of each query and one of each key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnzoo.backends import kernel_obstacle
from attnzoo.ops.precision import without_autocast

if TYPE_CHECKING:
    from attnzoo.ops.composed_attention import Composition, Sight

MAX_DECODED = 16
"""New tokens up to which the keys of a longer cache are split over programs."""


def composed_obstacle(
    q: Tensor, v: Tensor, pre: Composition | None, post: Composition | None, dropout: float
) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    obstacle = kernel_obstacle(q.device, q.dtype)
    if obstacle is not None:
        return obstacle
    if dropout:
        return f"the kernels have no dropout, got {dropout}"
    groups = _groups(pre, post)
    if len(groups) > 1 and groups[0] != groups[1]:
        return f"both compositions must have the same number of head groups, got {groups[0]} and {groups[1]}"
    from attnzoo_kernels.composed_tuning import room, sizes

    heads = [q.shape[2], *_heads_after(q.shape[2], pre, post)]
    M, state = sizes(max(heads) // (groups[0] if groups else 1), max(q.shape[3], v.shape[3]))
    most, largest = room(q.dtype, q.device)
    advice = "(padded): more head_groups make groups smaller"
    if most < M:
        return f"groups may have at most {most} heads of {q.dtype} here, got {M} {advice}"
    if state > largest:
        return f"heads of a group times width may be at most {largest} for {q.dtype} here, got {state} {advice}"
    return None


def fused_composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: Composition | None,
    post: Composition | None,
    sight: Sight,
    *,
    scale: float,
    value_heads: Tensor | None = None,
    value_groups: tuple[int, ...] | None = None,
) -> Tensor:
    """As `attnzoo.ops.composed_attention`, through the kernels; checked before by `composed_obstacle`."""
    from attnzoo_kernels.composed_attention import composed_attention

    (B, T, H, _), S = q.shape, k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)
    groups = _groups(pre, post)
    softmax_heads, targets = _heads_after(H, pre, post)
    with without_autocast(q):
        residual_pre, q_pre, k_pre = matrices(pre, v.dtype)
        residual_post, q_post, k_post = matrices(post, v.dtype)
    if value_groups is not None and value_heads is not None:
        # Heads that are not wanted read values of zero.
        room = v.new_zeros(B, S, targets, v.shape[3])
        v = room.index_copy(2, value_heads, v.index_select(2, torch.tensor(value_groups, device=v.device)))
    lengths = documents = dense = None
    mask = sight.mask
    if mask is not None:
        mask.check(B, softmax_heads, T, S if sight.positions is None else sight.start + T, q.device)
        lengths, dense = mask.lengths, mask.dense_mask
        documents = mask.document_bounds(B, T)
        if dense is not None and sight.positions is not None and dense.shape[-1] > 1:
            dense = dense.index_select(-1, sight.positions)
    out: Tensor = composed_attention(
        q, k, v, scale=scale, groups=groups[0] if groups else 1, q_pre=q_pre, k_pre=k_pre, q_post=q_post, k_post=k_post,
        residual_pre=residual_pre, residual_post=residual_post, causal=sight.causal, window=sight.window, mask=dense,
        lengths=lengths, documents=documents, key_positions=sight.positions, query_start=sight.start,
        split_keys=T <= MAX_DECODED < S,
    )  # fmt: skip
    return out if value_heads is None else out.index_select(2, value_heads)


def matrices(composition: Composition | None, dtype: torch.dtype) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether there is a residual, and the matrices of queries and of keys from source to target heads, in dtype.

    (B, T, N, M, J) and (B, S, N, M, J), or None; what has no part of the queries is (N, M, J). Their sum, and the
    identity where there is a residual, maps the heads at a pair. Made in float32.
    """
    if composition is None:
        return True, None, None
    of_queries: Tensor | None = None if composition.matrix is None else composition.matrix.float()
    if composition.query is not None:
        dynamic = _matrix_of(*composition.query)
        of_queries = dynamic if of_queries is None else dynamic + of_queries
    of_keys = None if composition.key is None else _matrix_of(*composition.key)
    return (
        composition.residual,
        None if of_queries is None else of_queries.to(dtype),
        None if of_keys is None else of_keys.to(dtype),
    )


def _matrix_of(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """sum_r u_r v_r^T + diag(g) of every token: (B, L, N, R, M) twice and (B, L, N, M) -> (B, L, N, M, M)."""
    return u.float().transpose(-1, -2) @ v.float() + torch.diag_embed(g.float())


def _groups(*compositions: Composition | None) -> list[int]:
    """Head groups of each composition that mixes anything."""
    found = []
    for c in compositions:
        if c is not None and any(part is not None for part in (c.matrix, c.query, c.key)):
            found.append(c._groups())
    return found


def _heads_after(heads: int, pre: Composition | None, post: Composition | None) -> tuple[int, int]:
    """Softmax heads and target heads of so many query heads."""
    found = []
    for composition in (pre, post):
        if composition is not None and composition.matrix is not None:
            heads = composition.matrix.shape[0] * composition.matrix.shape[2]
        found.append(heads)
    return found[0], found[1]
