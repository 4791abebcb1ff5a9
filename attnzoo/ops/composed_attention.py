"""Softmax attention whose heads are mixed before and after the softmax: one meaning, several ways to run it.

Scores of all heads at a pair (t, s) are one vector; a composition maps it to another. Shapes: q (B, T, Hk, D),
k (B, S, G, D), v (B, S, Gv, Dv) give (B, T, Hv, Dv).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose, kernel_obstacle
from attnzoo.masks import Visibility
from attnzoo.ops.checks import check_states
from attnzoo.ops.chunks import in_chunks, is_recomputed, view_now
from attnzoo.ops.observation import Observation, ScoreMap, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, for_heads, masked_softmax
from attnzoo.ops.softmax_attention import MAX_DECODED, constant, softmax_attention
from attnzoo.tracing import is_exported, is_readable

CACHED_SCORES = 2**20
"""Scores of a chunk on a CPU: several copies of them are at work, which have to fit into a cache of 16 MiB or more."""
FEWEST_AT_ONCE = 32
"""Queries of a chunk on a CPU below which products of matrices are slow."""

DynamicProjection = tuple[Tensor, Tensor, Tensor]
"""u (B, L, N, R, M), v (B, L, N, R, M) and gate g (B, L, N, M) of every query, or of every key."""


@dataclass(frozen=True)
class Composition:
    """A map of the M heads of each of N groups at one pair (t, s):

        a'_j = [a_j] + sum_m a_m W[n, m, j] + sum_r (a . u_r) v_rj + a_j g_j      u, v, g of t, and the same of s

    The first term only with `residual`; every branch reads a.

    Attributes:
        matrix: (N, M, J) from source to target heads, or None.
        residual: whether a itself is a term; then J = M.
        query: what belongs to queries, or None.
        key: what belongs to keys, or None.
    """

    matrix: Tensor | None = None
    residual: bool = True
    query: DynamicProjection | None = None
    key: DynamicProjection | None = None

    def at(self, queries: slice, keys: slice | Tensor) -> Composition:
        """The part that a tile of the scores needs."""
        query = None if self.query is None else tuple(x[:, queries] for x in self.query)
        key = None if self.key is None else tuple(x[:, keys] for x in self.key)
        return replace(self, query=query, key=key)  # type: ignore[arg-type]

    def __call__(self, a: Tensor) -> Tensor:
        """a (B, N M, t, s) -> (B, N J, t, s). With no key part s may be anything, such as features of a head."""
        groups = self.groups
        x = a.reshape(a.shape[0], groups, a.shape[1] // groups, *a.shape[2:])
        out = x if self.residual else None
        if self.matrix is not None:
            mixed: Tensor = torch.einsum("bnmts,nmj->bnjts", x, self.matrix.to(x.dtype))
            out = mixed if out is None else out + mixed
        assert out is not None
        if self.query is not None:
            u, v, g = (z.to(x.dtype) for z in self.query)
            low = torch.einsum("bnmts,btnrm->bnrts", x, u)
            out = out + torch.einsum("bnrts,btnrj->bnjts", low, v) + x * g.permute(0, 2, 3, 1)[..., None]
        if self.key is not None:
            u, v, g = (z.to(x.dtype) for z in self.key)
            low = torch.einsum("bnmts,bsnrm->bnrts", x, u)
            out = out + torch.einsum("bnrts,bsnrj->bnjts", low, v) + x * g.permute(0, 2, 3, 1)[..., None, :]
        return out.flatten(1, 2)

    def heads_after(self, heads: int) -> int:
        """How many target heads so many source heads become."""
        return heads if self.matrix is None else self.matrix.shape[0] * self.matrix.shape[2]

    @property
    def groups(self) -> int:
        """Number N of head groups."""
        for projection in (self.query, self.key):
            if projection is not None:
                return projection[0].shape[2]
        return 1 if self.matrix is None else self.matrix.shape[0]


class FoldedComposition(Composition):
    """The same map, with all that does not depend on the key's token in one matrix of each query.

    a' = C_t^T a + key part, where C_t = [I] + W + sum_r u_r v_r^T + diag(g). The products over heads are then one
    batched product of small matrices, and what belongs to keys passes over the scores in the order of their memory.
    """

    def __call__(self, a: Tensor) -> Tensor:
        """As `Composition.__call__`; scores of one query are adjacent in what it returns."""
        B, heads, t, s = a.shape
        x = a.reshape(B, self.groups, heads // self.groups, t, s).transpose(2, 3)  # (B, N, t, M, s), as all below
        folded = self._of_queries(a.dtype)
        out = x if folded is None else folded @ x
        if self.key is not None:
            u, v, g = (z.to(a.dtype).movedim(1, -1).contiguous()[:, :, None] for z in self.key)
            out = torch.addcmul(out, x, g)
            for u_r, v_r in zip(u.unbind(3), v.unbind(3), strict=True):
                out = torch.addcmul(out, (x * u_r).sum(3, keepdim=True), v_r)
        return out.transpose(2, 3).flatten(1, 2)

    def _of_queries(self, dtype: torch.dtype) -> Tensor | None:
        """C_t from source to target (B, N, t, J, M), or a single one by broadcasting; None: the identity."""
        folded = None if self.matrix is None else self.matrix.to(dtype).mT[None, :, None]
        if self.query is not None:
            u, v, g = (z.to(dtype).transpose(1, 2) for z in self.query)
            dynamic = v.mT @ u + torch.diag_embed(g)
            folded = dynamic if folded is None else folded + dynamic
        if folded is not None and self.residual:
            folded = folded + torch.eye(folded.shape[-1], dtype=dtype, device=folded.device)
        return folded


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ScoreMap | None,
    post: Composition | None,
    view: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    chunk_size: int | None = None,
    value_heads: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Tensor:
    """o_n = sum_s post(softmax_s(pre(scale q . k) + visibility))_n v_s, (B, T, Hv, Dv).

    A query that sees no key gives zeros. Scores and softmax are float32, or float64 for float64.

    Where no composition depends on the key's token and all heads of each group read one key and one value, this is
    softmax attention of composed queries whose outputs are composed. Every backend but "eager" computes it so then.

    Args:
        q: queries (B, T, Hk, D).
        k: keys (B, S, G, D); head h reads key h // (Hk / G).
        v: values (B, S, Gv, Dv); target head n reads value n // (targets / Gv).
        pre: on the scores, before the mask; None: nothing. What is no `Composition` has no kernel.
        post: on the normalised weights; None: nothing.
        view: which key each query may attend to.
        scale: factor of the scores.
        dropout: probability of dropping a composed weight.
        chunk_size: queries that the plain form does at once, on a CPU fewer where their scores would not fit into a
            cache. Scores of a chunk are recomputed in the backward pass, so the (B, H, T, S) scores never exist. None,
            and in exported programs: all at once.
        value_heads: the target heads that are wanted, Hv of them. Default: all.
        backend: "auto" (the kernels on GPUs, else in chunks), "eager" (the definition) or "triton"; any where it is
            softmax attention.

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    check_states(q, k, v, view, same_groups=False)
    (B, T, H, _), S = q.shape, k.shape[1]
    softmax_heads = _heads_after(pre, H)
    targets = _heads_after(post, softmax_heads)
    rules = ScoreRules(scale, dropout=dropout)
    wanted = None if value_heads is None else constant(value_heads, q.device, torch.long)
    observer = current_observer() if view.shards is None else None
    if observer is not None:
        reads = None if value_heads is None else tuple(head * v.shape[2] // targets for head in value_heads)
        observer(Observation("composed_attention", q, k, v, view, rules, pre, post, wanted, reads))
    if backend != "eager" and _folds(k, v, pre, post):
        q = _on_heads(pre, q)
        out = softmax_attention(q, k, v, view, scale=scale, dropout=dropout, backend=backend)
        return _chosen(_on_heads(post, out), wanted)
    if view.shards is not None:
        composed: Tensor = view.shards.ops.sharded_composition(
            q, k, v, pre, post, view, scale=scale, chunk_size=chunk_size, value_heads=value_heads, backend=backend
        )
        return composed
    obstacles = {
        "triton": lambda: _kernel_obstacle(q, v, pre, post, view, dropout), "eager": lambda: None,
        "sdpa": lambda: _MIXED, "flash": lambda: _MIXED,
    }  # fmt: skip
    if choose(backend, "composed_attention", obstacles, q.device) == "triton":
        from attnzoo_kernels.composed_attention import composed_attention as kernel

        assert pre is None or isinstance(pre, Composition)
        options = view.for_kernel((B, softmax_heads, T, S), q.device)
        del options["sink_tokens"]
        with without_autocast(q):
            (residual_pre, q_pre, k_pre), (residual_post, q_post, k_post) = (_matrices(c, v.dtype) for c in (pre, post))
        out = kernel(
            q.to(v.dtype), k.to(v.dtype), v, scale=scale, groups=max(_groups(pre, post), default=1), q_pre=q_pre,
            k_pre=k_pre, q_post=q_post, k_post=k_post, residual_pre=residual_pre, residual_post=residual_post,
            split_keys=T <= MAX_DECODED < S, **options,
        )  # fmt: skip
        return _chosen(out, wanted)

    def form(rows: slice | None, k: Tensor, v: Tensor) -> Tensor:
        if rows is None:
            visible = view.dense((B, softmax_heads, T, S), q.device)
            return composed_attention_reference(q, k, v, pre, post, visible, rules, wanted)
        keys = view.keys_of(rows, T, S)
        visible = view.dense((B, softmax_heads, T, S), q.device, rows, keys)
        at_pre = None if pre is None else pre.at(rows, keys)
        at_post = None if post is None else post.at(rows, keys)
        return composed_attention_reference(q[:, rows], k[:, keys], v[:, keys], at_pre, at_post, visible, rules, wanted)

    if backend == "eager" or is_exported():
        return form(None, k, v)
    pre, post = _by_query(pre), _by_query(post)
    if chunk_size is not None and chunk_size < T and is_readable(q):
        of_a_query = B * max(H, softmax_heads, targets) * S
        chunk_size = min(chunk_size, max(FEWEST_AT_ONCE, CACHED_SCORES // max(of_a_query, 1)))
    if is_recomputed(T, chunk_size):
        view = view_now(view)
    return in_chunks(form, T, chunk_size, k, v, view=view)


def composed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ScoreMap | None,
    post: Composition | None,
    visible: Tensor | None,
    rules: ScoreRules,
    wanted: Tensor | None = None,
) -> Tensor:
    """The definition, float64 capable: outputs of the target heads `wanted` for keys that are `visible`."""
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        k = for_heads(k, q.shape[2]).to(compute_dtype)
        a = torch.einsum("bthd,bshd->bhts", q.to(compute_dtype) * rules.scale, k)
        a = a if pre is None else pre(a)
        p = masked_softmax(a, visible)
        p = p if post is None else post(p)
        if wanted is not None:
            p, v = p.index_select(1, wanted), v.index_select(2, wanted // (p.shape[1] // max(v.shape[2], 1)))
        else:
            v = for_heads(v, p.shape[1])
        p = F.dropout(p, rules.dropout) if rules.dropout else p
        return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


_MIXED = "heads are mixed between its score and its softmax; only auto, eager and triton can"


def _by_query(score_map: Any) -> Any:
    """Dynamic compositions with what belongs to a query in one matrix; other maps as they are."""
    if not isinstance(score_map, Composition) or (score_map.query is None and score_map.key is None):
        return score_map
    return FoldedComposition(score_map.matrix, score_map.residual, score_map.query, score_map.key)


def _heads_after(score_map: ScoreMap | None, heads: int) -> int:
    return heads if score_map is None else score_map.heads_after(heads)


def _chosen(out: Tensor, heads: Tensor | None) -> Tensor:
    return out if heads is None else out.index_select(2, heads)


# As softmax attention


def _folds(k: Tensor, v: Tensor, pre: ScoreMap | None, post: Composition | None) -> bool:
    """Whether each group's heads read one key and one value, and nothing depends on the key's token."""
    keys = k.shape[2]
    used = [c for c in (pre, post) if c is not None]
    if not keys == v.shape[2] > 0:
        return False
    return all(isinstance(c, Composition) and c.key is None and c.groups % keys == 0 for c in used)


def _on_heads(composition: ScoreMap | None, x: Tensor) -> Tensor:
    """A composition without key part on the heads' vectors x (B, T, H, D), in their dtype."""
    if composition is None:
        return x
    with without_autocast(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return composition(wide.transpose(1, 2)).transpose(1, 2).to(x.dtype)


# On the kernels


def _kernel_obstacle(
    q: Tensor,
    v: Tensor,
    pre: ScoreMap | None,
    post: Composition | None,
    view: Visibility,
    dropout: float,
) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if pre is not None and not isinstance(pre, Composition):
        return "there is no kernel for score maps that pass through hidden layers or add relative scores"
    obstacle = kernel_obstacle(q.device, q.dtype)
    if obstacle is not None:
        return obstacle
    if dropout:
        return f"the kernels have no dropout, got {dropout}"
    if view.window is not None and (not view.causal or view.sink_tokens):
        return "the kernels have windows of causal attention without sink tokens only"
    groups = _groups(pre, post)
    if len(set(groups)) > 1:
        return f"both compositions must have the same number of head groups, got {groups[0]} and {groups[1]}"
    from attnzoo_kernels.composed_attention import capacity, sizes

    softmax_heads = _heads_after(pre, q.shape[2])
    heads = max(q.shape[2], softmax_heads, _heads_after(post, softmax_heads))
    M, state = sizes(heads // max(groups, default=1), max(q.shape[3], v.shape[3]))
    most, largest = capacity(q.dtype, q.device)
    advice = "(padded): more head_groups make groups smaller"
    if most < M:
        return f"groups may have at most {most} heads of {q.dtype} here, got {M} {advice}"
    if state > largest:
        return f"heads of a group times width may be at most {largest} for {q.dtype} here, got {state} {advice}"
    return None


def _groups(*compositions: Composition | None) -> list[int]:
    """Head groups of each composition that mixes anything."""
    used = [c for c in compositions if c is not None]
    return [c.groups for c in used if any(part is not None for part in (c.matrix, c.query, c.key))]


def _matrices(composition: Composition | None, dtype: torch.dtype) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether there is a residual, and the matrices of queries and of keys from source to target heads, in dtype.

    (B, T, N, M, J) and (B, S, N, M, J), or None; what has no part of the queries is (N, M, J). Their sum, and the
    identity where there is a residual, maps the heads at a pair. Computed in float32.
    """
    if composition is None:
        return True, None, None
    of_queries, of_keys = composition.matrix, None
    if composition.query is not None:
        dynamic = _matrix_of(*composition.query)
        of_queries = dynamic if of_queries is None else dynamic.add_(of_queries)
    if composition.key is not None:
        of_keys = _matrix_of(*composition.key).to(dtype)
    return composition.residual, None if of_queries is None else of_queries.to(dtype), of_keys


def _matrix_of(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """sum_r u_r v_r^T + diag(g) of every token: (B, L, N, R, M) twice and (B, L, N, M) -> (B, L, N, M, M)."""
    matrix = u.float().transpose(-1, -2) @ v.float()
    matrix.diagonal(dim1=-2, dim2=-1).add_(g)
    return matrix
