"""What the decoding functions refuse."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TOKENS = 16
"""New tokens a call may have; more belong to the kernel for prefill."""

MAX_WIDTH = 512
"""Widest key, value, or shared part of a key."""


def check_decode(
    q: Tensor, k: Tensor, v: Tensor, q_rope: Tensor | None, k_rope: Tensor | None, num_splits: int | None
) -> None:
    """Refuse shapes that would be read out of bounds, dtypes the kernels lack, and requests for gradients."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    dtype, plain = q.dtype, q_rope is None and k_rope is None and num_splits is None
    if num_splits is None and q_rope is not None and k_rope is not None and not torch.is_grad_enabled():
        R = q_rope.shape[3]
        plain = q_rope.shape == (B, T, H, R) and k_rope.shape == (B, S, 1, R) and 1 <= R <= MAX_WIDTH
        plain = plain and q_rope.dtype == dtype == k_rope.dtype
    if (
        plain and 1 <= T <= MAX_TOKENS and k.shape == (B, S, G, D) and v.shape == (B, S, G, v.shape[3])
        and G and not H % G and 1 <= D <= MAX_WIDTH and 1 <= v.shape[3] <= MAX_WIDTH
        and dtype in DTYPES and k.dtype == dtype == v.dtype and not torch.is_grad_enabled()
    ):  # fmt: skip
        return  # in every step of decoding, where the rest would take as long as the launch
    if not 1 <= T <= MAX_TOKENS:
        raise ValueError(f"q must have 1 to {MAX_TOKENS} tokens, got {T}")
    if k.shape != (B, S, G, D) or v.shape[:3] != (B, S, G):
        raise ValueError(
            f"k must be (B, S, G, D) and v (B, S, G, Dv) for q {tuple(q.shape)}, got {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if H and (not G or H % G):
        raise ValueError(f"num_kv_heads must divide num_heads, got {G} and {H}")
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope must be given together")
    rope = [] if q_rope is None or k_rope is None else [q_rope, k_rope]
    if rope and (rope[0].shape[:3] != (B, T, H) or rope[1].shape != (B, S, 1, rope[0].shape[3])):
        raise ValueError(
            f"q_rope must be (B, T, H, R) and k_rope (B, S, 1, R), got {tuple(rope[0].shape)} "
            f"and {tuple(rope[1].shape)}"
        )
    tensors = [q, k, v, *rope]
    widths = [D, v.shape[3], *(x.shape[3] for x in rope)]
    if not 1 <= min(widths) <= max(widths) <= MAX_WIDTH:
        raise ValueError(f"widths of heads must lie between 1 and {MAX_WIDTH}, got {widths}")
    if q.dtype not in DTYPES or any(x.dtype != q.dtype for x in tensors):
        raise ValueError(
            f"q, k and v must share float16, bfloat16 or float32, got {', '.join(str(x.dtype) for x in tensors)}"
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("decoding has no gradient: call it under torch.no_grad()")


def check_options(
    q: Tensor,
    k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | float | None = None,
    head_scale: Tensor | None = None,
    decay: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> None:
    """Refuse options whose shape does not fit."""
    if alibi_slopes is sinks is head_scale is decay is lengths is mask is key_positions is None:
        return
    B, T, H, _ = q.shape
    S = k.shape[1]
    shapes = {
        "alibi_slopes": (alibi_slopes, (H,)), "sinks": (sinks, (H,)), "lengths": (lengths, (B,)),
        "key_positions": (key_positions, (S,)), "decay": (decay, (B, H, S)),
    }  # fmt: skip
    for name, (given, shape) in shapes.items():
        if isinstance(given, Tensor) and given.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    if head_scale is not None and head_scale.shape not in ((H,), (B, H)):
        raise ValueError(f"head_scale must have shape {(H,)} or {(B, H)}, got {tuple(head_scale.shape)}")
    if decay is not None and decay.dtype != torch.float32:
        raise ValueError(f"decay must be float32, got {decay.dtype}")
    for name, given in (
        ("alibi_slopes", alibi_slopes), ("sinks", sinks), ("head_scale", head_scale), ("decay", decay),
    ):  # fmt: skip
        if isinstance(given, Tensor) and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"decoding has no gradient for {name}: call it under torch.no_grad()")
    if mask is not None:
        full = (B, H, T, S)
        fits = mask.ndim <= 4 and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be boolean and broadcast to (B, H, T, S) = {full}, got {mask.dtype} {tuple(mask.shape)}"
            )
