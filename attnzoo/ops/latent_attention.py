"""Attention over compressed keys: every head reads one latent of a token, which is key and value at once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import AttentionMask
from attnzoo.ops.fused import MAX_LATENT, decodes, fused_obstacle, latent_decoded
from attnzoo.ops.softmax_attention import softmax_attention


def latent_attention(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    *,
    latent_width: int,
    scale: float,
    causal: bool = True,
    mask: AttentionMask | None = None,
    dropout: float = 0.0,
    query_start: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Absorbed latent attention (DeepSeek-AI 2024, arXiv:2405.04434): returns the weighted latents (B, T, H, R).

        s_hj = scale * (q_h . c_j + q_rope_h . r_j),  u_h = sum_j softmax_j(s_hj) c_j

    A few new tokens over a cache run in a kernel that loads each latent once; everything else is softmax attention with
    one key/value head.

    Args:
        q: queries multiplied by each head's key projection, (B, T, H, R).
        q_rope: rotary queries (B, T, H, dr), or None.
        latent: latents c and rotary keys r side by side, (B, S, 1, R + dr).
        latent_width: R.
        scale: factor of the products.
        causal: as in `softmax_attention`, like what follows.
        mask: see there.
        dropout: see there.
        query_start: see there.
        backend: see there.

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    R = latent_width
    if decodes(q, latent, mask, (q, q_rope, latent)) and (backend == "triton" or (backend == "auto" and q.is_cuda)):
        # No other kernel takes a head as wide as a latent, so "auto" asks ours first.
        obstacle = fused_obstacle(q, q, q_rope, dropout, MAX_LATENT)
        if obstacle is None:
            start = latent.shape[1] - q.shape[1] if query_start is None else query_start
            return latent_decoded(q, q_rope, latent, scale=scale, causal=causal, mask=mask, query_start=start)
        if backend == "triton":
            choose(backend, "latent_attention", {"triton": lambda: obstacle})
    query = q if q_rope is None else torch.cat([q, q_rope], dim=-1)
    # The latent stands in for the value as a whole: a slice of it would be copied by the fused kernels.
    return softmax_attention(
        query, latent, latent, causal=causal, mask=mask, scale=scale, dropout=dropout, query_start=query_start,
        backend=backend,
    )[..., :R]  # fmt: skip
