"""Attention over compressed keys: every head reads one latent of a token, which is key and value at once."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import Visibility
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.ops.softmax_attention import decodes, softmax_attention, softmax_kernel_obstacle

MAX_LATENT = 512
"""Widest latent that the decoding kernel takes."""


def latent_attention(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    view: Visibility,
    *,
    latent_width: int,
    scale: float,
    dropout: float = 0.0,
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
        view: which key each query may attend to.
        latent_width: R.
        scale: factor of the products.
        dropout: probability of dropping a weight.
        backend: as in `softmax_attention`.

    Raises:
        ValueError: for arguments that do not fit each other.
        BackendUnavailable: if a named backend cannot serve the call.
    """
    R = latent_width
    if (
        view.shards is None
        and decodes(q, latent, view, q, q_rope, latent)
        and (backend == "triton" or (backend == "auto" and q.is_cuda))
    ):
        # No other kernel takes a head as wide as a latent, so "auto" asks ours first.
        obstacle = softmax_kernel_obstacle(q, q, q_rope, dropout, MAX_LATENT)
        if obstacle is None:
            if (observer := current_observer()) is not None:
                observer(Observation("latent_attention", _joined(q, q_rope), latent, latent, view, ScoreRules(scale)))
            from attnzoo_kernels.decode import latent_decode

            options = view.for_kernel((q.shape[0], q.shape[2], q.shape[1], latent.shape[1]), q.device)
            shared = None if q_rope is None else latent[:, :, 0, R:]
            u: Tensor = latent_decode(
                q, q_rope, latent[:, :, 0, :R], shared, scale=scale, query_start=options["query_start"],
                causal=options["causal"], lengths=options["lengths"], mask=options["mask"],
            )  # fmt: skip
            return u
        if backend == "triton":
            choose(backend, "latent_attention", {"triton": lambda: obstacle})
    # The whole latent is passed as the value: a slice of it would be copied by the fused kernels.
    query = _joined(q, q_rope)
    return softmax_attention(query, latent, latent, view, scale=scale, dropout=dropout, backend=backend)[..., :R]


def _joined(q: Tensor, q_rope: Tensor | None) -> Tensor:
    return q if q_rope is None else torch.cat([q, q_rope], dim=-1)
