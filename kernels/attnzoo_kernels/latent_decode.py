"""Attention of a few new tokens over cached latents: multi-head latent attention, absorbed.

    s_hj = scale * (q_h . c_j + q_rope_h . k_rope_j),  u_h = sum_j softmax_j(s_hj) c_j

c_j is the latent of token j, which is key and value of all heads at once (DeepSeek-AI 2024, arXiv:2405.04434). So this
is `decode_attention` with one key/value head whose key is the whole of its value: the heads are the tile's rows and a
latent is loaded once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, library

from attnzoo_kernels.decode import check_decode, check_options, launch_decode


@library.custom_op("attnzoo::latent_decode", mutates_args=())
def _latent_decode(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    query_start: int,
    num_splits: int | None,
) -> Tensor:
    state = latent[:, :, None]
    shared = None if k_rope is None else k_rope[:, :, None]
    return launch_decode(
        q, state, state, q_rope, shared, lengths=lengths, mask=mask, scale=scale, causal=causal,
        query_start=query_start, num_splits=num_splits,
    )  # fmt: skip


@_latent_decode.register_fake
def _(q: Tensor, *options: Any) -> Tensor:
    return q.new_empty(q.shape)


def latent_decode(
    q: Tensor,
    q_rope: Tensor | None,
    latent: Tensor,
    k_rope: Tensor | None,
    *,
    scale: float,
    query_start: int,
    causal: bool = True,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Latents weighted for 1 to 16 new tokens, u (B, T, H, R); the value projection of each head comes after.

    Inference only. latent and k_rope may be two slices of one cache (B, S, R + dr); they are read where they lie.

    Args:
        q: queries (B, T, H, R), multiplied by each head's key projection.
        q_rope: rotary queries (B, T, H, dr), or None without a rotary key.
        latent: (B, S, R), R at most 512.
        k_rope: rotary keys (B, S, dr), one for all heads; given together with q_rope.
        scale: factor of the products.
        query_start: index of the first query; query t sees keys 0 .. query_start + t if causal.
        causal: whether it does.
        lengths: (B,) integers; keys j < lengths[b] are visible, and later ones are not read.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.

    Raises:
        ValueError: for arguments that do not fit each other, or if a gradient is asked for.
    """
    if latent.ndim != 3 or (k_rope is not None and k_rope.ndim != 3):
        raise ValueError(
            f"latent must be (B, S, R) and k_rope (B, S, dr), got {tuple(latent.shape)} "
            f"and {None if k_rope is None else tuple(k_rope.shape)}"
        )
    state, shared = latent[:, :, None], None if k_rope is None else k_rope[:, :, None]
    check_decode(q, state, state, q_rope, shared, num_splits)
    check_options(q, state, lengths=lengths, mask=mask)
    u: Tensor = _latent_decode(q, q_rope, latent, k_rope, lengths, mask, scale, causal, query_start, num_splits)
    return u
