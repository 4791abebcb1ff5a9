"""Attention to mixtures of Gaussian keys: every position has R keys, which share its value."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.feature_maps import elu_plus_one
from attnzoo.ops.observation import Observation, current_observer, observing
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, for_heads
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.tracing import is_traced


def mixture_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility,
    *,
    precision: Tensor,
    log_prior: Tensor | None = None,
    hard: bool = False,
    eps: float = 0.0,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of q (B, T, H, D) with scores that sum over the R keys of a position; returns (B, T, H, Dv).

        g_ijr = -a_r / (2 sqrt(D)) |q_i - k_jr|^2
        e_ij = sum_r pi_jr exp(g_ijr), or max_r exp(g_ijr) if hard
        o_i = sum_j e_ij v_j / (sum_j e_ij + eps)

    "eager" is this definition in logarithms and stores (B, H, T, S, R). Others are those of `softmax_attention` over
    R S keys, each next to its value, with two more features that make a product of the distance:
    (q, 1, -|q|^2 / 2) . (a k, sqrt(D) log pi - a |k|^2 / 2, a). "auto" takes that form for more than one query. Both
    compute in at least float32.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, R, D); G divides H.
        v: values (B, S, G, Dv).
        view: who sees whom; without a window.
        precision: a (R,), positive.
        log_prior: log pi, broadcastable to (B, S, G, R); None: 0.
        hard: the largest score of a position instead of the sum; by the definition only.
        eps: added to the denominator.
        dropout: probability of dropping a weight w_ij; by the definition only.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        BackendUnavailable: if a named backend cannot serve the call.
    """
    if view.shards is not None:
        return _of_shards(
            q, k, v, view, precision=precision, log_prior=log_prior, hard=hard, eps=eps, dropout=dropout,
            backend=backend,
        )  # fmt: skip
    # A size is a tensor while a program is traced, and a power of that is float32.
    T, D, dtype = q.shape[1], int(q.shape[3]), v.dtype
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    if hard or dropout:
        reason = "only the definition takes the larger of two scores" if hard else "only the definition drops weights"
        others = dict.fromkeys(("sdpa", "flash", "triton"), lambda: reason)
        backend = choose(backend, "mixture_attention", {"eager": lambda: None, **others})
    sinks = math.log(eps) if eps else None
    with without_autocast(q):
        q, k, v, a = (x.to(compute_dtype) for x in (q, k, v, precision))
        observer = current_observer()
        defines = backend == "eager" or (backend == "auto" and T == 1)
        if defines or observer is not None:
            scores = mixture_scores(q, k, a, log_prior)
            scores = scores.amax(-1) if hard else scores.logsumexp(-1)
            # The scores are all in the bias; queries and keys have no features left.
            plain = q[..., :0], k[..., 0, :0]
            if observer is not None:
                rules = ScoreRules(1.0, bias=scores, sinks=sinks)
                observer(Observation("softmax_attention", *plain, v, view, rules))
        if defines:
            out = softmax_attention(
                *plain, v, view, scale=1.0, bias=scores, sinks=sinks, dropout=dropout, backend="eager"
            )
            return out.to(dtype)
        a = a[:, None]
        level = -a * k.square().sum(-1, keepdim=True) / 2
        level = level if log_prior is None else level + D**0.5 * log_prior[..., None]
        q = torch.cat([q, torch.ones_like(q[..., :1]), -q.square().sum(-1, keepdim=True) / 2], -1)
        k = torch.cat([a * k, level, a.expand_as(level)], -1)
        view = repeated(view, q.shape[0], T, k.shape[1], k.shape[3], q.device)
        v = v[:, None].expand(-1, k.shape[3], -1, -1, -1).flatten(1, 2)
        k = k.permute(0, 3, 1, 2, 4).flatten(1, 2)
        return softmax_attention(q, k, v, view, scale=D**-0.5, sinks=sinks, backend=backend).to(dtype)


def _of_shards(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, log_prior: Tensor | None, **options: Any
) -> Tensor:  # fmt: skip
    """Runs of a shard's queries over the keys up to each run's end, whose patterns are shown to nobody."""
    outs = []
    for rows, stop, own in view.shards.ops.query_runs(view, k.shape[1], False):
        if own.mask is not None and own.mask.cu_seqlens is not None:
            visible = own.dense((q.shape[0], 1, rows.stop - rows.start, stop), q.device)
            assert visible is not None
            own = Visibility(False, mask=AttentionMask.dense(visible))
        prior = log_prior if log_prior is None or log_prior.shape[1] == 1 else log_prior[:, :stop]
        with observing(None):
            outs.append(mixture_attention(q[:, rows], k[:, :stop], v[:, :stop], own, log_prior=prior, **options))
    return torch.cat(outs, 1)


def mixture_scores(q: Tensor, k: Tensor, precision: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """g_ijr + log pi_jr of q (B, T, H, D) and k (B, S, G, R, D): (B, H, T, S, R)."""
    D, level = int(q.shape[3]), -precision / 2 * k.square().sum(-1)
    level = level if log_prior is None else level + D**0.5 * log_prior
    k, level = for_heads(k, q.shape[2]), for_heads(level, q.shape[2])
    products = torch.einsum("bthd,bshrd->bhtsr", q, k)
    own = q.square().sum(-1).transpose(1, 2)[..., None, None]
    scores: Tensor = (precision * (products - own / 2) + level.transpose(1, 2)[:, :, None]) * D**-0.5
    return scores


def mixture_features(q: Tensor, k: Tensor, weights: Tensor, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """phi(q) (B, T, H, D) and sum_r w_jr phi(k_jr) (B, S, G, D), phi = elu + 1, for the linear form.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, R, D).
        weights: w, broadcastable to (B, S, G, R).
        normalise: whether phi is divided by its sum over D.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = elu_plus_one(q.to(dtype)), elu_plus_one(k.to(dtype))
    if normalise:
        q, k = q / q.sum(-1, keepdim=True), k / k.sum(-1, keepdim=True)
    return q, (k * weights.to(dtype)[..., None]).sum(3)


def repeated(view: Visibility, batch: int, queries: int, keys: int, times: int, device: torch.device) -> Visibility:
    """Who sees whom if all keys come `times` times, one run after the other."""
    mask = view.mask
    if mask is not None and mask.cu_seqlens is not None:
        together = AttentionMask(cu_seqlens=mask.cu_seqlens).visible(batch, 1, queries, keys, device)
        assert together is not None
        mask = AttentionMask(lengths=mask.lengths, dense_mask=mask.dense_mask) & together
    bare = not view.causal and view.window is None and view.key_positions is None
    if bare and mask is not None and mask.lengths is None and mask.dense_mask is not None:
        dense = mask.dense_mask
        return Visibility(False, mask=AttentionMask.dense(dense.expand(*dense.shape[:-1], keys).tile(times)))
    positions = torch.arange(keys, device=device) if view.key_positions is None else view.key_positions
    return Visibility(
        view.causal, view.window, view.sink_tokens, mask, view.start(queries, keys), positions.repeat(times)
    )


@torch.no_grad()
def mean_responsibilities(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    prior: Tensor,
    precision: Tensor,
    *,
    reads: tuple[int, ...],
    places: Tensor | None = None,
    real: tuple[Tensor | None, Tensor | None] = (None, None),
    group: Any = None,
) -> Tensor:
    """The next prior, of the shape of this one: how responsible each key is for the queries, on average.

        gamma_ijr = pi_jr exp(g_ijr) / (sum_r pi_jr exp(g_ijr) + 1e-6)

    averaged over all pairs of a row, later keys among them, over rows and what shares a prior. For R = 2 the second is
    1 minus the first. Places without a key keep their prior.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, R, D).
        weights: pi, broadcastable to (B, S, G, R).
        prior: (R,), (R, G) or (R, G, P).
        precision: a (R,).
        reads: the group that each query head reads.
        places: (1 or B, S) index of each key in the last axis of prior, where it has one.
        real: which queries (B, T) and which keys (B, S) count; None: all.
        group: processes to sum over.

    Raises:
        ValueError: in a backward pass, where a checkpoint repeats a forward pass that has moved the prior already.
    """
    if not is_traced() and torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "assignment 'soft' must not be recomputed in the backward pass, since its prior has moved on: switch "
            "activation checkpointing off"
        )
    B, T = q.shape[:2]
    S, G, R = k.shape[1:4]
    dtype = torch.promote_types(q.dtype, torch.float32)
    index = torch.tensor(reads, device=q.device)
    k, weights = k.to(dtype).index_select(2, index), weights.expand(-1, -1, G, -1).index_select(2, index)
    e = (mixture_scores(q.to(dtype), k, precision.to(dtype)).exp()) * weights.permute(0, 2, 1, 3)[:, :, None]
    gamma = e / (e.sum(-1, keepdim=True) + 1e-6)
    queries, keys = (None if own is None else own.to(dtype) for own in real)
    gamma = gamma if queries is None else gamma * queries[:, None, :, None, None]
    seen = q.new_full((B,), T, dtype=dtype) if queries is None else queries.sum(1)
    count = seen[:, None].expand(B, S)
    sums = gamma.sum(2).transpose(1, 2)
    if keys is not None:
        sums, count = sums * keys[..., None, None], count * keys
    # Heads of a group share its prior.
    shared = torch.zeros(B, S, G, R, dtype=dtype, device=q.device).index_add_(2, index, sums)
    members = torch.zeros(G, dtype=dtype, device=q.device).index_add_(0, index, torch.ones_like(index, dtype=dtype))
    shared = shared / members[:, None]
    shared = shared if prior.ndim > 1 else shared.mean(2, keepdim=True)
    slots = prior.shape[2] if prior.ndim == 3 else 1
    place = torch.zeros(B * S, dtype=torch.long, device=q.device) if places is None else places.expand(B, S).flatten()
    total = shared.new_zeros(slots, *shared.shape[2:]).index_add_(0, place, shared.flatten(0, 1))
    counts = count.new_zeros(slots).index_add_(0, place, count.flatten())
    if group is not None:
        both = torch.cat([total.flatten(), counts])
        dist.all_reduce(both, group=group)
        total, counts = both[: total.numel()].view(total.shape), both[total.numel() :]
    floor = 0.0 if keys is None else 1e-6
    mean = total / (counts + floor).clamp(min=1e-6)[:, None, None]
    if R == 2:
        mean = torch.stack([mean[..., 0], 1 - mean[..., 0]], -1)
    mean = mean.permute(2, 1, 0).reshape(prior.shape)
    return torch.where(counts > 0, mean, prior.to(dtype)).to(prior.dtype)
