"""Softmax attention of grouped heads: one meaning, several ways to run it.

Shapes: q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) give (B, T, H, Dv). Query head h reads key/value head
h // (H / G).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask, as_mask, visibility
from attnzoo.ops.flash import flash_attention, flash_obstacle
from attnzoo.ops.fused import decoded_attention, decodes, fused_attention, fused_obstacle
from attnzoo.ops.precision import without_autocast


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | float | None = None,
    q_extra: Tensor | None = None,
    k_extra: Tensor | None = None,
    head_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    key_positions: Tensor | None = None,
    query_start: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv); returns (B, T, H, Dv).

    With i, j the indices of query and key, in this order (FlashAttention's):

        s = scale * (q_i . k_j + q_extra_i . k_extra_j)
        s = softcap * tanh(s / softcap)
        s = s - alibi_slopes[h] * |i - j| + bias
        s = -inf where causality, window or mask forbid
        o_i = head_scale[h] * sum_j exp(s_ij) v_j / (exp(sink_h) + sum_j exp(s_ij))

    A query that sees no key gives zeros. Scores and softmax are computed in float32, or float64 for float64.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, S, G, D); G divides H.
        v: values (B, S, G, Dv).
        causal: key j is visible to query i if j <= i.
        mask: boolean tensor broadcastable to (B, H, T, S) or AttentionMask; True = may attend.
        scale: default (D + width of q_extra) ** -0.5.
        softcap: positive bound of the logits (Gemma 2, arXiv:2408.00118).
        alibi_slopes: (H,) float32 (Press et al. 2022, arXiv:2108.12409).
        window: keys with i - j < window are visible (|i - j| < window if not causal).
        sink_tokens: keys j < sink_tokens stay visible outside the window (arXiv:2309.17453).
        sinks: one more logit in the softmax's denominator, (H,) or one number for all heads.
        q_extra: (B, T, H, R); with k_extra a part of the score whose keys all heads share.
        k_extra: (B, S, 1, R).
        head_scale: factor of each head's output, (H,) or (B, H).
        bias: floating tensor broadcastable to (B, H, T, S), added to the scores.
        dropout: probability of dropping a weight.
        key_positions: (S,) indices of the keys, for a ring buffer. Default: 0 .. S - 1.
        query_start: index of the first query. Default: S - T, so a cached prefix needs no special case.
        backend: "auto", "eager", "sdpa", "flash" or "triton".

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    mask = as_mask(mask)
    _check(q, k, v, q_extra, k_extra, causal and query_start is None)
    B, T, H, D = q.shape
    S = k.shape[1]
    _check_factors(head_scale, bias, (B, H, T, S))
    if query_start is None:
        query_start = S - T
    if scale is None:
        scale = (D + (0 if q_extra is None else q_extra.shape[-1])) ** -0.5
    features: dict[str, Any] = {
        "causal": causal, "mask": mask, "softcap": softcap, "alibi_slopes": alibi_slopes, "window": window,
        "sink_tokens": sink_tokens, "sinks": sinks, "dropout": dropout, "key_positions": key_positions,
    }  # fmt: skip
    chosen = choose(backend, "softmax_attention", _obstacles(q, k, v, q_extra, bias, features))
    if chosen == "triton":
        del features["dropout"]
        fused = {**features, "q_extra": q_extra, "k_extra": k_extra, "head_scale": head_scale}
        if bias is None and decodes(q, k, mask, (q, k, v, q_extra, k_extra, sinks, head_scale)):
            return decoded_attention(q, k, v, scale=scale, query_start=query_start, **fused)
        return fused_attention(q, k, v, scale=scale, query_start=query_start, bias=bias, **fused)[0]
    if scale <= 0 and chosen in ("flash", "sdpa"):
        # These kernels scale after masking, and -inf times such a scale is inf or nan.
        q, q_extra, scale = q * scale, None if q_extra is None else q_extra * scale, 1.0
    if chosen == "flash":
        q, k = _join(q, k, q_extra, k_extra)
        out = flash_attention(
            q, k, v, causal=causal, mask=mask, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
            window=window, sinks=sinks, dropout=dropout,
        )  # fmt: skip
    else:
        device = q.device
        # torch's own causal rule is aligned to the top left, so it serves only square calls.
        square = chosen == "sdpa" and causal and T == S and query_start == 0 and key_positions is None
        plain = mask is None and window is None and alibi_slopes is None and sinks is None and bias is None
        is_causal = square and plain
        visible = None
        if not is_causal:
            visible = visibility(
                mask, (B, H, T, S), causal=causal, window=window, sink_tokens=sink_tokens,
                query_start=query_start, key_positions=key_positions, device=device,
            )  # fmt: skip
        if alibi_slopes is not None:
            i = torch.arange(query_start, query_start + T, device=device)[:, None]
            j = torch.arange(S, device=device) if key_positions is None else key_positions
            distance = -alibi_slopes[:, None, None] * (i - j).abs()
            bias = distance if bias is None else distance + bias
        if chosen == "sdpa":
            q, k = _join(q, k, q_extra, k_extra)
            out = _sdpa(q, k, v, scale, is_causal, visible, bias, sinks, dropout)
        else:
            out = softmax_attention_reference(
                q, k, v, scale=scale, softcap=softcap, bias=bias, visible=visible, sinks=sinks,
                q_extra=q_extra, k_extra=k_extra, dropout=dropout,
            )  # fmt: skip
    if head_scale is not None:
        out = out * head_scale.to(out.dtype)[..., None, :, None]
    return out


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    sinks: Tensor | float | None = None,
    q_extra: Tensor | None = None,
    k_extra: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition: plain PyTorch, float64 capable, differentiable twice.

    bias, broadcastable to (B, H, T, S), is added to the scores and visible, boolean and as broadcastable, selects
    them; the rest is as in `softmax_attention`. Stores (B, H, T, S) for the backward pass.
    """
    high = torch.promote_types(q.dtype, torch.float32)
    repeats = q.shape[2] // max(k.shape[2], 1)
    with without_autocast(q):
        k = k.repeat_interleave(repeats, dim=2) if repeats > 1 else k
        v = v.repeat_interleave(repeats, dim=2) if repeats > 1 else v
        s = torch.einsum("bthd,bshd->bhts", q.to(high), k.to(high))
        if q_extra is not None and k_extra is not None:
            s = s + torch.einsum("bthr,bsr->bhts", q_extra.to(high), k_extra[:, :, 0].to(high))
        s = s * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if bias is not None:
            s = s + bias.to(high)
        blind = None
        if visible is not None:
            # A row without a visible key gets finite scores here and zero weights below: no NaN either way.
            blind = ~visible.any(-1, keepdim=True)
            s = s.masked_fill(~(visible | blind), -math.inf)
        if sinks is None:
            p = torch.softmax(s, dim=-1)
        else:
            sink = torch.as_tensor(sinks, dtype=high, device=s.device)
            p = torch.softmax(torch.cat([s, sink.reshape(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1), -1)
            p = p[..., :-1]
        if blind is not None:
            p = p.masked_fill(blind, 0.0)
        p = F.dropout(p, dropout)
        return torch.einsum("bhts,bshd->bthd", p.to(v.dtype), v)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    is_causal: bool,
    visible: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | float | None,
    dropout: float,
) -> Tensor:
    """The same through torch.nn.functional.scaled_dot_product_attention."""
    B, T, H, _ = q.shape
    G, value_width = k.shape[2], v.shape[3]
    if sinks is not None:
        k, v, visible, bias = _append_sink(k, v, visible, bias, sinks, (B, H, T))
    attn_mask = visible
    blind = None
    if visible is not None and q.device.type != "cpu":
        # The CPU kernel returns zeros for a row without keys; elsewhere let it see all and clear it after.
        blind = ~visible.any(-1, keepdim=True)
        attn_mask = visible | blind
        blind = blind[None] if blind.ndim == 2 else blind
    if bias is not None:
        # float32 next to half-precision queries: a distance of hundreds would be rounded in bfloat16.
        bias = bias.to(torch.promote_types(q.dtype, torch.float32))
        attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, -math.inf)
    width = max(q.shape[3], value_width)
    if q.device.type == "cpu" and q.shape[3] != value_width:
        # The fused CPU kernel wants equal widths; without it (B, H, T, S) would be stored.
        q, k, v = (F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
    folded = T == 1 and G != H and (attn_mask is None or attn_mask.shape[-3:-2] in ((), (1,)))
    # One new token: the heads of a group stand in as its queries, and each key is read once.
    q = q.view(B, G, H // G, q.shape[3]) if folded else q.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal,
        scale=scale, enable_gqa=G != H and not folded,
    )  # fmt: skip
    out = out.reshape(B, 1, H, -1) if folded else out.transpose(1, 2)
    if out.shape[3] != value_width:
        out = out[..., :value_width]
    return out if blind is None else out.masked_fill(blind.transpose(-3, -2), 0.0)


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
        column = torch.as_tensor(sinks, dtype=bias.dtype, device=bias.device).reshape(-1, 1, 1)
        column = column.expand(*bias.shape[:-3], heads, queries, 1)
        bias = torch.cat([bias[..., :-1].expand(*column.shape[:-1], S), column], dim=-1)
    return k, v, visible, bias


def _join(q: Tensor, k: Tensor, q_extra: Tensor | None, k_extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and keys with the shared part as further features, for backends that know one key only."""
    if q_extra is None or k_extra is None:
        return q, k
    shared = k_extra.expand(-1, -1, k.shape[2], -1)
    return torch.cat([q, q_extra], dim=-1), torch.cat([k, shared], dim=-1)


def _obstacles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_extra: Tensor | None,
    bias: Tensor | None,
    features: dict[str, Any],
) -> dict[str, Callable[[], str | None]]:
    """The backends in the order in which "auto" asks them, each with why it cannot serve this call."""

    def flash() -> str | None:
        if not q.is_cuda:
            return f"needs CUDA tensors, got {q.device.type}"
        if bias is not None:
            return "flash-attn adds no bias tensor"
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        joined = q if q_extra is None else torch.cat([q, q_extra], dim=-1)
        return flash_obstacle(joined, k, v, head_scale=None, needs_grad=needs_grad, **features)

    def triton() -> str | None:
        return fused_obstacle(q, v, q_extra, features["dropout"])

    def sdpa() -> str | None:
        sinks = features["sinks"]
        if features["softcap"] is not None:
            return "scaled_dot_product_attention has no soft-cap"
        if isinstance(sinks, Tensor) and sinks.requires_grad and torch.is_grad_enabled():
            return "scaled_dot_product_attention gives no gradient to learned sinks without storing all scores"
        if 0 in q.shape or 0 in k.shape:
            return f"an empty call is left to eager, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        return None

    if not q.is_cuda:
        # On a CPU the kernels run in Triton's interpreter, which is for tests: only by name.
        return {"flash": flash, "sdpa": sdpa, "eager": lambda: None, "triton": triton}
    return {"flash": flash, "sdpa": sdpa, "triton": triton, "eager": lambda: None}


def _check_factors(head_scale: Tensor | None, bias: Tensor | None, shape: tuple[int, int, int, int]) -> None:
    """Refuse a head scale or a bias that does not fit (B, H, T, S)."""
    B, H = shape[:2]
    if head_scale is not None and tuple(head_scale.shape) not in ((H,), (B, H)):
        raise ValueError(f"head_scale must be ({H},) or ({B}, {H}), got shape {tuple(head_scale.shape)}")
    if bias is None:
        return
    if not bias.is_floating_point():
        raise ValueError(f"bias must be a floating tensor, got {bias.dtype}")
    fits = bias.ndim <= 4 and all(size in (1, full) for size, full in zip(bias.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise ValueError(f"bias must broadcast to (B, H, T, S) = {shape}, got shape {tuple(bias.shape)}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, aligned_causal: bool
) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {q.ndim}, {k.ndim} and {v.ndim}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in (B, S, G), got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and width, got {tuple(q.shape)} and {tuple(k.shape)}")
    heads, groups = q.shape[2], k.shape[2]
    if heads and (not groups or heads % groups):
        raise ValueError(f"num_kv_heads must divide num_heads, got {groups} and {heads}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if aligned_causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"causal attention needs T <= S, got {q.shape[1]} queries and {k.shape[1]} keys")
    if (q_extra is None) != (k_extra is None):
        raise ValueError("q_extra and k_extra must be given together")
    if q_extra is not None and k_extra is not None:
        queries, keys = (*q.shape[:3], q_extra.shape[-1]), (*k.shape[:2], 1, q_extra.shape[-1])
        if q_extra.shape != queries or k_extra.shape != keys:
            raise ValueError(
                f"q_extra must be (B, T, H, R) and k_extra (B, S, 1, R), got {tuple(q_extra.shape)} "
                f"and {tuple(k_extra.shape)}"
            )


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slope of each head (Press et al. 2022, arXiv:2108.12409); odd steps beyond a power of two."""
    n = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    return (*slopes, *(2.0 ** (-4 * (2 * h + 1) / n) for h in range(num_heads - n)))


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float64 tensor that stays on its device between calls and that `module.to(dtype)` cannot round."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device=device)
    return _constant(values, device)
