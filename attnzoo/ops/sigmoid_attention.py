"""Attention by sigmoids: every pair has a weight of its own, and nothing is normalised over keys."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import Visibility
from attnzoo.ops.checks import check_rules, check_states
from attnzoo.ops.chunks import in_chunks, is_recomputed, tensor_now, view_now
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import ScoreRules, for_heads, scores_of, sigmoid_weights
from attnzoo.ops.softmax_attention import softmax_kernel_obstacle


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility = Visibility(),  # noqa: B008  (frozen)
    *,
    logit_bias: Tensor | float | str = "visible",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sigmoid attention (Ramapuram et al. 2024, arXiv:2409.04431): q (B, T, H, D) gives (B, T, H, Dv).

        s_ij = scale q_i . k_j;  s = softcap tanh(s / softcap);  s = s - alibi_slopes[h] |i - j| + bias
        a_ij = sigmoid(s_ij + logit_bias) where `view` allows, else 0
        o_i = sum_j a_ij v_j

    Outputs of two sets of keys add up, since no weight depends on another, unless logit_bias counts keys. A query that
    sees no key gives zeros. Scores and weights are float32, or float64 for float64.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D); query head h reads key/value head h // (H / G).
        v: values (B, S, G, Dv).
        view: which key each query may attend to. Default: causality.
        logit_bias: a number, one of each head (H,), or "visible": minus the logarithm of the number of keys that the
            query sees, with which weights of zero scores add up to about 1.
        scale: default D ** -0.5.
        softcap: positive bound of the scores.
        alibi_slopes: (H,).
        bias: floating tensor broadcastable to (B, H, T, S).
        dropout: probability of dropping a weight.
        chunk_size: queries that the plain form does at once; the weights of a chunk are recomputed in the backward
            pass, so the (B, H, T, S) weights never exist. None, and in exported programs: all at once.
        backend: "auto" (our kernels on a GPU, else in chunks), "eager" (the definition) or "triton".

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    scale = float(int(q.shape[-1])) ** -0.5 if scale is None else scale
    rules = ScoreRules(scale, softcap, alibi_slopes, bias=bias, dropout=dropout, sigmoid_bias=logit_bias)
    check_states(q, k, v, view)
    check_rules(q, k, v, rules)
    if view.shards is not None:
        out: Tensor = view.shards.ops.sharded_sigmoid(q, k, v, view, rules, chunk_size, backend)
        return out
    if (observer := current_observer()) is not None:
        observer(Observation("sigmoid_attention", q, k, v, view, rules))

    def triton() -> str | None:
        if bias is not None:
            return "the kernels of sigmoid attention add no bias tensor"
        if view.sink_tokens:
            return f"the kernels of sigmoid attention have no sink tokens, got {view.sink_tokens}"
        return softmax_kernel_obstacle(q, v, None, dropout)

    if choose(backend, "sigmoid_attention", {"triton": triton, "eager": lambda: None}, q.device) == "triton":
        from attnzoo_kernels.sigmoid_attention import sigmoid_attention as kernel

        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        options = view.for_kernel(shape, q.device)
        del options["sink_tokens"]
        if isinstance(logit_bias, str):
            logit_bias = -view.visible_keys(shape, q.device).clamp(min=1).to(torch.float32).log()
        elif isinstance(logit_bias, Tensor):
            logit_bias = logit_bias[:, None]
        return kernel(
            q, k, v, logit_bias=logit_bias, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, **options
        )

    chunk_size = None if backend == "eager" else chunk_size
    if is_recomputed(q.shape[1], chunk_size):
        k, v, view = tensor_now(k), tensor_now(v), view_now(view)
        rules = rules if bias is None else replace(rules, bias=tensor_now(bias))

    def form(rows: slice | None) -> Tensor:
        return sigmoid_attention_reference(q, k, v, view, rules, rows)

    return in_chunks(form, q.shape[1], chunk_size)


def sigmoid_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, rows: slice | None = None
) -> Tensor:
    """The definition, float64 capable: outputs for the queries `rows` (default: all)."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    keys = None if rows is None else view.keys_of(rows, q.shape[1], k.shape[1])
    with without_autocast(q):
        visible = view.dense(shape, q.device, rows, keys)
        a = sigmoid_weights(scores_of(q, k, view, rules, rows, keys), visible, rules.sigmoid_bias)
        v = for_heads(v if keys is None else v[:, keys], q.shape[2])
        return torch.einsum("bhts,bshd->bthd", F.dropout(a, rules.dropout).to(v.dtype), v)
