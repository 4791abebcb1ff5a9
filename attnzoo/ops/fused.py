"""The `triton` backend of softmax attention: from the operation's words to the kernels' tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.backends import kernel_obstacle
from attnzoo.masks import AttentionMask

MAX_HEAD_DIM = 256
MAX_DECODED = 16
"""New tokens up to which a call over a longer cache goes to the decoding kernels."""


MAX_LATENT = 512
"""Widest latent that the decoding kernel takes."""


def fused_obstacle(
    q: Tensor, v: Tensor, q_extra: Tensor | None, dropout: float, max_width: int = MAX_HEAD_DIM
) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    obstacle = kernel_obstacle(q.device, q.dtype)
    if obstacle is not None:
        return obstacle
    widest = max(q.shape[3], v.shape[3], 0 if q_extra is None else q_extra.shape[3])
    if widest > max_width:
        return f"the kernels take heads up to {max_width} wide, got {widest}"
    if dropout:
        return f"the kernels have no dropout, got {dropout}"
    return None


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: AttentionMask | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    sink_tokens: int,
    sinks: Tensor | float | None,
    key_positions: Tensor | None,
    q_extra: Tensor | None,
    k_extra: Tensor | None,
    head_scale: Tensor | None,
    bias: Tensor | None,
    query_start: int,
) -> tuple[Tensor, Tensor]:
    """As `attnzoo.ops.softmax_attention`, through the kernels; checked before by `fused_obstacle`.

    Returns the output and the log-sum-exp (B, H, T) of the scores.
    """
    from attnzoo_kernels.softmax_attention import softmax_attention

    B, T, H, _ = q.shape
    S = k.shape[1]
    lengths = documents = dense = None
    if mask is not None:
        mask.check(B, H, T, S if key_positions is None else query_start + T, q.device)
        lengths, dense = mask.lengths, mask.dense_mask
        documents = mask.document_bounds(B, T)
        if dense is not None and key_positions is not None and dense.shape[-1] > 1:
            dense = dense.index_select(-1, key_positions)
    out, lse = softmax_attention(
        q, k, v, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, window=window,
        sink_tokens=sink_tokens, sinks=sinks, q_extra=q_extra, k_extra=k_extra, head_scale=head_scale, bias=bias,
        mask=dense, lengths=lengths, documents=documents, key_positions=key_positions, query_start=query_start,
    )  # fmt: skip
    return out, lse


def decoded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: AttentionMask | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    sink_tokens: int,
    sinks: Tensor | float | None,
    key_positions: Tensor | None,
    q_extra: Tensor | None,
    k_extra: Tensor | None,
    head_scale: Tensor | None,
    query_start: int,
) -> Tensor:
    """The same for a few new tokens over a cache: the keys are split over programs. Without gradients."""
    from attnzoo_kernels.decode import decode_attention

    B, T, H, _ = q.shape
    if mask is not None:
        mask.check(B, H, T, k.shape[1] if key_positions is None else query_start + T, q.device)
    out: Tensor = decode_attention(
        q, k, v, scale=scale, causal=causal, softcap=softcap, alibi_slopes=alibi_slopes, window=window,
        sink_tokens=sink_tokens, sinks=sinks, q_extra=q_extra, k_extra=k_extra, head_scale=head_scale,
        mask=None if mask is None else mask.dense_mask, lengths=None if mask is None else mask.lengths,
        key_positions=key_positions, query_start=query_start,
    )  # fmt: skip
    return out


def latent_decoded(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    *,
    scale: float,
    causal: bool,
    mask: AttentionMask | None,
    query_start: int,
) -> Tensor:
    """Absorbed latent attention of a few new tokens, see `attnzoo.ops.latent_attention`. Without gradients."""
    from attnzoo_kernels.latent_decode import latent_decode

    (B, T, H, R), S = q.shape, latent.shape[1]
    if mask is not None:
        mask.check(B, H, T, S, q.device)
    c, r = latent[:, :, 0, :R], latent[:, :, 0, R:]
    u: Tensor = latent_decode(
        q, q_rope, c, None if q_rope is None else r, scale=scale, query_start=query_start, causal=causal,
        lengths=None if mask is None else mask.lengths, mask=None if mask is None else mask.dense_mask,
    )  # fmt: skip
    return u


def decodes(q: Tensor, k: Tensor, mask: AttentionMask | None, tensors: tuple[Tensor | float | None, ...]) -> bool:
    """Whether a call is one for `decoded_attention`: few queries, more keys, and nobody wants a gradient."""
    T, S = q.shape[1], k.shape[1]
    packed = mask is not None and mask.cu_seqlens is not None
    if not 0 < T <= MAX_DECODED or S <= T or packed:
        return False
    return not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors))
