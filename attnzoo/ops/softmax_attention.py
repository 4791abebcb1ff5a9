"""Softmax attention of grouped heads: one meaning, several ways to run it.

Shapes: q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) give (B, T, H, Dv). Query head h reads key/value head
h // (H / G).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose, kernel_obstacle
from attnzoo.masks import Visibility
from attnzoo.ops.checks import check_rules, check_states
from attnzoo.ops.flash import flash_attention, flash_obstacle
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import (
    HALF,
    ScoreRules,
    added_to_scores,
    for_heads,
    join_decay,
    join_rope,
    masked_softmax,
    scores_of,
)
from attnzoo.tracing import in_forward_mode, is_traced

MAX_HEAD_DIM = 256
"""Widest head that the kernels take."""
MAX_DECODED = 16
"""New tokens up to which a call over a longer cache goes to the decoding kernels."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: Visibility = Visibility(),  # noqa: B008  (frozen)
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | float | None = None,
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
    head_scale: Tensor | None = None,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
    output_gate: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv); returns (B, T, H, Dv).

    With i, j the indices of query and key, in this order (FlashAttention's):

        s = scale * (q_i . k_j + q_rope_i . k_rope_j)
        s = softcap * tanh(s / softcap)
        s = s - alibi_slopes[h] * |i - j| + bias + decay_i - decay_j
        s = -inf where `view` forbids
        o_i = head_scale[h] * sigmoid(output_gate_i) * sum_j exp(s_ij) v_j / (exp(sink_h) + sum_j exp(s_ij))

    A query that sees no key gives zeros. Scores and softmax are computed in float32, or float64 for float64.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D); G divides H.
        v: values (B, S, G, Dv).
        view: which key each query may attend to. Default: causality.
        scale: default (D + R) ** -0.5.
        softcap: positive bound of the logits (Gemma 2, arXiv:2408.00118).
        alibi_slopes: (H,) float32 (Press et al. 2022, arXiv:2108.12409).
        sinks: one more logit in the softmax's denominator, (H,) or one number for all heads.
        q_rope: (B, T, H, R); with k_rope a part of the score whose keys all heads share.
        k_rope: (B, S, 1, R).
        head_scale: factor of each head's output, (H,), (B, H) or (B, T, H).
        bias: floating tensor broadcastable to (B, H, T, S), added to the scores.
        decay: cumulated log forget gates of the keys (B, H, S) in float32 or float64 (Lin et al. 2025,
            arXiv:2503.02130); the queries are among the keys. Not together with sinks.
        output_gate: logits of a sigmoid gate of the outputs, (B, T, H, Dv) or (B, T, H, 1) (Qiu et al. 2025,
            arXiv:2505.06708).
        dropout: probability of dropping a weight.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    if scale is None:
        # Sizes are tensors while a program is traced, and a power of those is float32.
        scale = float(int(q.shape[-1]) + (0 if q_rope is None else int(q_rope.shape[-1]))) ** -0.5
    rules = ScoreRules(
        scale, softcap, alibi_slopes, sinks, bias, q_rope, k_rope, head_scale, dropout, decay, output_gate
    )
    check_states(q, k, v, view)
    check_rules(q, k, v, rules)
    if view.shards is not None:
        return _finished(view.shards.ops.sharded_attention(q, k, v, view, rules, backend), head_scale, output_gate)
    if (observer := current_observer()) is not None:
        observer(Observation("softmax_attention", q, k, v, view, rules))
    # Asked only where kernels may run: a graph for any length must not be tied to few queries or many.
    kernels = bias is None and (q.is_cuda or backend == "triton")
    decoding = kernels and decodes(q, k, view, q, k, v, q_rope, k_rope, sinks, head_scale, decay, output_gate)
    chosen = choose(backend, "softmax_attention", _obstacles(q, k, v, view, rules, decoding), q.device)
    if chosen == "triton":
        per_token = head_scale is not None and head_scale.ndim == 3
        options = {
            "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks, "q_rope": q_rope,
            "k_rope": k_rope, "head_scale": None if per_token else head_scale, "decay": decay,
            **view.for_kernel((*q.shape[:1], q.shape[2], q.shape[1], k.shape[1]), q.device),
        }  # fmt: skip
        if decoding:
            from attnzoo_kernels.decode import decode_attention

            del options["documents"]
            options["decay"] = None if decay is None else decay.float()
            out: Tensor = decode_attention(q, k, v, **options)
            return _finished(out, head_scale if per_token else None, output_gate)
        from attnzoo_kernels.softmax_attention import softmax_attention as kernel

        out = kernel(q, k, v, bias=bias, output_gate=output_gate, **options)[0]
        return _finished(out, head_scale, None) if per_token else out
    if scale <= 0 and chosen in ("flash", "sdpa"):
        # These kernels scale after masking, and -inf times such a scale is inf or nan.
        q, rules = q * scale, replace(rules, scale=1.0, q_rope=None if q_rope is None else q_rope * scale)
    if chosen == "flash":
        out = flash_attention(q, k, v, view, rules)
    elif chosen == "sdpa":
        out = _sdpa(q, k, v, view, rules)
    else:
        out = softmax_attention_reference(q, k, v, view, rules)
    return _finished(out, head_scale, output_gate)


def softmax_attention_reference(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """The definition: plain PyTorch, float64 capable, differentiable twice; stores (B, H, T, S) for the backward pass.

    `head_scale` and `output_gate` are left to `softmax_attention`; everything else is as there.
    """
    with without_autocast(q):
        s, v = scores_of(q, k, view, rules), for_heads(v, q.shape[2])
        sinks = rules.sinks.reshape(1, -1, 1, 1) if isinstance(rules.sinks, Tensor) else rules.sinks
        p = masked_softmax(s, view.dense(s.shape, q.device), sinks)  # type: ignore[arg-type]
        p = F.dropout(p, rules.dropout)
        return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


def softmax_attention_lse(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules
) -> tuple[Tensor, Tensor]:
    """The definition over a part of the keys: outputs (B, T, H, Dv), and the log-sum-exp (B, T, H) of the scores.

    Both in at least float32, and differentiable; `ops.distributed_attention.merge_partials` merges them. A query that
    sees none of the keys has output 0 and log-sum-exp -inf. Sinks, factors of the outputs and dropout are left out.
    """
    if k.shape[1] == 0:
        s = q[..., 0].to(torch.promote_types(q.dtype, torch.float32))
        return s[..., None].new_zeros(*q.shape[:3], v.shape[3]), torch.full_like(s, -math.inf)
    with without_autocast(q):
        s, v = scores_of(q, k, view, rules), for_heads(v, q.shape[2])
        visible = view.dense(s.shape, q.device)  # type: ignore[arg-type]
        if visible is None:
            lse = s.logsumexp(-1, keepdim=True)
            p = torch.exp(s - lse)
        else:
            seen = visible.any(-1, keepdim=True)
            s = s.masked_fill(~(visible | ~seen), -math.inf)
            lse = s.logsumexp(-1, keepdim=True)
            p = torch.exp(s - lse).masked_fill(~seen, 0.0)
            lse = lse.masked_fill(~seen, -math.inf)
        return torch.einsum("bhts,bshd->bthd", p, v.to(p.dtype)), lse[..., 0].transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> Tensor:
    """The same through torch.nn.functional.scaled_dot_product_attention."""
    B, T, H, _ = q.shape
    S, G, value_width = k.shape[1], k.shape[2], v.shape[3]
    q, k = join_rope(q, k, rules)
    if rules.decay is not None:
        q, k, rules = *join_decay(q, k, rules.decay, view, rules.scale), replace(rules, decay=None)
    bias = added_to_scores(T, S, q.device, view, rules)
    # PyTorch's own causal rule is aligned to the top left, so it serves only square calls.
    # Decided by a branch: in a graph for any length a comparison is a symbol, which the function does not take.
    is_causal, visible = True, None
    if not view.is_plain_causal(T, S) or bias is not None or rules.sinks is not None:
        is_causal, visible = False, view.dense((B, H, T, S), q.device)
    if rules.sinks is not None:
        k, v, visible, bias = _append_sink(k, v, visible, bias, rules.sinks, (B, H, T))
    attn_mask = visible
    fully_masked = None
    if visible is not None and q.device.type != "cpu":
        # The CPU kernel returns zeros for a fully masked row; elsewhere let it see all and clear it after.
        fully_masked = ~visible.any(-1, keepdim=True)
        attn_mask = visible | fully_masked
        fully_masked = fully_masked[None] if fully_masked.ndim == 2 else fully_masked
    if bias is not None:
        # float32 next to half-precision queries: a distance of hundreds would be rounded in bfloat16.
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -math.inf)
    width = max(q.shape[3], value_width)
    if q.device.type == "cpu" and q.shape[3] != value_width:
        # The fused CPU kernel wants equal widths; without it (B, H, T, S) would be stored.
        q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    # One new token: the heads of a group are passed as its queries, and each key is read once. GPUs' kernels do so.
    folded = T == 1 and G != H and not q.is_cuda and (attn_mask is None or attn_mask.shape[-3:-2] in ((), (1,)))
    q = q.view(B, G, H // G, q.shape[3]) if folded else q.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_mask, dropout_p=rules.dropout, is_causal=is_causal,
        scale=rules.scale, enable_gqa=bool(G != H and not folded),
    )  # fmt: skip
    out = out.reshape(B, 1, H, -1) if folded else out.transpose(1, 2)
    if out.shape[3] != value_width:
        out = out[..., :value_width]
    return out if fully_masked is None else out.masked_fill(fully_masked.transpose(-3, -2), 0.0)


def _append_sink(
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | float,
    shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One more key with score 0 and value 0; a sink logit other than 0 comes through the bias."""
    S = k.shape[1]
    heads, queries = shape[1:]
    k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
    if visible is not None:
        visible = F.pad(visible.expand(*visible.shape[:-1], S), (0, 1), value=True)
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:-1], S), (0, 1))
    if isinstance(sinks, Tensor) or sinks != 0.0:
        if bias is None:
            bias = k.new_zeros(heads, queries, S + 1, dtype=torch.promote_types(k.dtype, torch.float32))
        column = sinks.to(bias.dtype) if isinstance(sinks, Tensor) else bias.new_full((), sinks)
        column = column.reshape(-1, 1, 1)
        column = column.expand(*bias.shape[:-3], heads, queries, 1)
        bias = torch.cat([bias[..., :-1].expand(*column.shape[:-1], S), column], dim=-1)
    return k, v, visible, bias


def _finished(out: Tensor, head_scale: Tensor | None, output_gate: Tensor | None) -> Tensor:
    """Each head's output (B, T, H, Dv) times its factor, (H,), (B, H) or (B, T, H), and its gate."""
    if head_scale is not None:
        factor = head_scale if head_scale.ndim == 3 else head_scale[..., None, :]
        out = out * factor.to(out.dtype)[..., None]
    return out if output_gate is None else out * torch.sigmoid(output_gate).to(out.dtype)


def _obstacles(
    q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules, decoding: bool
) -> dict[str, Callable[[], str | None]]:
    """The backends in the order in which "auto" asks them on a GPU, each with why it cannot serve this call."""

    def flash() -> str | None:
        if not q.is_cuda:
            return f"needs CUDA tensors, got {q.device.type}"
        if rules.bias is not None:
            return "flash-attn adds no bias tensor"
        if rules.decay is not None:
            return "flash-attn adds no decay"
        return flash_obstacle(q, k, v, view, rules)

    def triton() -> str | None:
        if rules.decay is not None and rules.softcap is not None:
            return f"the kernels add no decay to soft-capped scores, got softcap {rules.softcap}"
        return softmax_kernel_obstacle(q, v, rules.q_rope, rules.dropout)

    def sdpa() -> str | None:
        if rules.softcap is not None:
            return "scaled_dot_product_attention has no soft-cap"
        # With dropout whether gradients are wanted now or not: a checkpoint has to draw the same weights both times.
        trained = isinstance(rules.sinks, Tensor) and rules.sinks.requires_grad
        if trained and (torch.is_grad_enabled() or rules.dropout):
            return "scaled_dot_product_attention gives no gradient to learned sinks without storing all scores"
        if q.is_cuda and q.dtype in HALF and _needs_bias(rules):
            return f"scaled_dot_product_attention reads a float32 bias beside {q.dtype} queries wrongly on a GPU"
        if 0 in q.shape or 0 in k.shape:
            return f"an empty call is left to eager, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        if in_forward_mode():
            return "scaled_dot_product_attention has no forward-mode derivative"
        return None

    plain = _is_plain(q, k, v, view, rules)
    if decoding:
        order = {"triton": triton, "flash": flash, "sdpa": sdpa, "eager": lambda: None}
        # On an H200 torch's kernel takes as long as ours there, and the host a quarter of the time.
        return {"sdpa": sdpa, **order} if plain else order
    if plain:
        return {"flash": flash, "sdpa": sdpa, "triton": triton, "eager": lambda: None}
    return {"flash": flash, "triton": triton, "sdpa": sdpa, "eager": lambda: None}


def _needs_bias(rules: ScoreRules) -> bool:
    """Whether SDPA needs an additive mask, which holds (T, S) numbers in float32."""
    return (
        rules.bias is not None or rules.alibi_slopes is not None or isinstance(rules.sinks, Tensor) or bool(rules.sinks)
    )


def _is_plain(q: Tensor, k: Tensor, v: Tensor, view: Visibility, rules: ScoreRules) -> bool:
    """Whether torch's own fused kernels serve the call as it is: no (T, S) mask, no repeated or joined keys."""
    repeats = q.shape[2] != k.shape[2] and q.dtype not in HALF
    if repeats or q.shape[3] != v.shape[3] or rules.q_rope is not None or rules.sinks is not None:
        return False
    if rules.decay is not None:
        return False
    if view.mask is not None or view.window is not None or view.key_positions is not None or _needs_bias(rules):
        return False
    T, S = q.shape[1], k.shape[1]
    return not view.causal or view.is_plain_causal(T, S) or (T == 1 and view.start(T, S) == S - 1)


def softmax_kernel_obstacle(
    q: Tensor, v: Tensor, q_rope: Tensor | None = None, dropout: float = 0.0, max_width: int = MAX_HEAD_DIM
) -> str | None:
    """Why the kernels of the softmax family cannot serve this call, or None."""
    obstacle = kernel_obstacle(q.device, q.dtype)
    if obstacle is not None:
        return obstacle
    widest = max(q.shape[3], v.shape[3], 0 if q_rope is None else q_rope.shape[3])
    if widest > max_width:
        return f"the kernels take heads up to {max_width} wide, got {widest}"
    return f"the kernels have no dropout, got {dropout}" if dropout else None


def decodes(q: Tensor, k: Tensor, view: Visibility, *tensors: Tensor | float | None) -> bool:
    """Whether a call is one for the decoding kernels: few queries, more keys, and nobody wants a gradient."""
    T, S = q.shape[1], k.shape[1]
    packed = view.mask is not None and view.mask.cu_seqlens is not None
    if not 0 < T <= MAX_DECODED or S <= T or packed:
        return False
    return not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors))


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slope of each head (Press et al. 2022, arXiv:2108.12409); odd steps beyond a power of two."""
    n = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    return (*slopes, *(2.0 ** (-4 * (2 * h + 1) / n) for h in range(num_heads - n)))


@cache
def _constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # What is made in inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor that stays on its device between calls, where CUDA graphs find it, and that `module.to` cannot round."""
    if is_traced():
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, device, dtype)
