"""Attention of a few new tokens over a long cache: launcher, operator and public function.

The mathematics and its kernels are in `attnzoo_kernels.decode_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, library

from attnzoo_kernels import tuning
from attnzoo_kernels.decode_kernels import decode_attention_fwd_kernel, decode_attention_merge_kernel
from attnzoo_kernels.decode_tiles import constants, decode_config, key_range, splits_for, tile_bytes
from attnzoo_kernels.launch import dense_rows, on_device
from attnzoo_kernels.tuning import padded

MAX_TOKENS = 16
"""New tokens a call may have; more belong to the kernel for prefill."""

MAX_WIDTH = 512
"""Widest key, value, or shared part of a key."""

MERGED = 8
"""Splits that the merging kernel takes at a time."""


def is_tied(k: Tensor, v: Tensor) -> bool:
    """Whether k (B, S, G, D) is the first D features of v (B, S, G, Dv) in the same memory."""
    strides = zip(k.shape[:3], k.stride(), v.stride(), strict=False)
    return k.data_ptr() == v.data_ptr() and k.shape[3] <= v.shape[3] and all(n == 1 or a == b for n, a, b in strides)


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_extra: Tensor | None,
    k_extra: Tensor | None,
    *,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    head_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    query_start: int = 0,
    num_splits: int | None = None,
) -> Tensor:
    """Run the kernels; arguments as in `decode_attention`, already checked."""
    B, T, H, D = q.shape
    S, G, DV = k.shape[1], k.shape[2], v.shape[3]
    DX = 0 if q_extra is None else q_extra.shape[3]
    out = torch.empty(B, T, H, DV, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tied = is_tied(k, v)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    qx = dense_rows(q_extra) if q_extra is not None else None
    kx = dense_rows(k_extra) if k_extra is not None else None
    if mask is not None:
        # A ring's mask has a column for every position, so only one of a single column is spread over the keys.
        mask = mask.expand(B, H, T, S if key_positions is None or mask.shape[-1:] in ((), (1,)) else -1)
    if head_scale is not None:
        head_scale = head_scale.expand(B, H)
    slopes, sinks, lengths, positions = (
        None if x is None else x.contiguous() for x in (alibi_slopes, sinks, lengths, key_positions)
    )

    processors, shared_memory, warp_size = tuning.device_limits(q.device)
    rows = H // G * T
    widths = D, DV - D if tied else DV, DX
    config = decode_config(rows, *widths, q.element_size(), shared_memory, warp_size)
    begin, end = key_range(
        S, T, query_start, causal=causal, window=window, sink_tokens=sink_tokens, ring=key_positions is not None
    )
    programs = B * G * triton.cdiv(rows, config.BLOCK_T)
    if num_splits is None:
        resident = 1 if 2 * tile_bytes(config, *widths, q.element_size()) > shared_memory else 2
        num_splits = splits_for(programs, end - begin, config.BLOCK_S, processors * resident)
    chunk = triton.cdiv(triton.cdiv(max(end - begin, 1), num_splits), config.BLOCK_S) * config.BLOCK_S
    splits = max(1, triton.cdiv(end - begin, chunk))

    close = splits == 1
    part, state = out, None
    if not close:
        part = torch.empty(splits, B, T, H, DV, dtype=torch.float32, device=q.device)
        state = torch.empty(splits, B, T, H, 2, dtype=torch.float32, device=q.device)
    scale_strides = (0, 0) if head_scale is None else head_scale.stride()
    with on_device(q):
        decode_attention_fwd_kernel[(programs, splits)](
            q, k, v, qx, kx, slopes, lengths, positions, mask, sinks if close else None,
            head_scale if close else None, part, state,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *((0, 0, 0) if qx is None else qx.stride()[:3]), *((0, 0) if kx is None else kx.stride()[:2]),
            *((0, 0, 0, 0) if mask is None else mask.stride()), *scale_strides,
            B, T, S, H, G, query_start, begin, end, chunk, scale, softcap or 0.0, window or 0, sink_tokens,
            **constants(
                D, DV, DX, tied=tied, causal=causal, softcap=softcap is not None, window=window is not None,
                sink_tokens=sink_tokens > 0, close=close, config=config,
            ),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        if not close:
            decode_attention_merge_kernel[(B * T * H,)](
                part, state, sinks, head_scale, out, *scale_strides, B * T * H, T, H, splits,
                DV=DV, BLOCK_C=MERGED, BLOCK_V=padded(DV), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


@library.custom_op("attnzoo::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_extra: Tensor | None,
    k_extra: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    head_scale: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    key_positions: Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    window: int | None,
    sink_tokens: int,
    query_start: int,
    num_splits: int | None,
) -> Tensor:
    return launch_decode(
        q, k, v, q_extra, k_extra, alibi_slopes=alibi_slopes, sinks=sinks, head_scale=head_scale, lengths=lengths,
        mask=mask, key_positions=key_positions, scale=scale, causal=causal, softcap=softcap, window=window,
        sink_tokens=sink_tokens, query_start=query_start, num_splits=num_splits,
    )  # fmt: skip


@_decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    query_start: int,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | float | None = None,
    q_extra: Tensor | None = None,
    k_extra: Tensor | None = None,
    head_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of 1 to 16 new tokens q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv); returns (B, T, H, Dv).

    Inference only, in float16, bfloat16 or float32, with sums in float32. Query t has index query_start + t, key s
    index s or key_positions[s]; scores, visibility and sink are those of `attnzoo.ops.softmax_attention`. Views of a
    cache are read where they lie, in any layout whose features are side by side; another is copied first. If k is
    the first D features of v in the same memory, each key is loaded once for both.

    Costs one pass over the keys and 4 * num_splits * B * T * H * (Dv + 2) bytes of scratch memory if num_splits > 1.

    Args:
        q: queries (B, T, H, D), T at most 16.
        k: keys (B, S, G, D); G divides H.
        v: values (B, S, G, Dv).
        scale: factor of the products.
        query_start: index of the first query.
        causal: key j is visible to query i if j <= i.
        softcap: positive bound of the scores.
        alibi_slopes: (H,) slopes of the bias -slope |i - j|.
        window: keys with i - j < window are visible (|i - j| < window if not causal).
        sink_tokens: keys j < sink_tokens stay visible outside the window.
        sinks: one more logit in the softmax's denominator, (H,) or one number for all heads.
        q_extra: (B, T, H, R); with k_extra a part of the score whose keys all heads share.
        k_extra: (B, S, 1, R).
        head_scale: factor of each head's output, (H,) or (B, H).
        lengths: (B,) integers; keys j < lengths[b] are visible, and later ones are not read.
        mask: boolean, broadcastable to (B, H, T, S), True = may attend. With key_positions its last axis is looked up
            at the keys' positions, (B, H, T, N) for an N above every position.
        key_positions: (S,) integers, the indices of the keys of a ring buffer.
        num_splits: into how many parts the keys are cut. Default: `splits_for` this device.

    Raises:
        ValueError: for arguments that do not fit each other, or if a gradient is asked for.
    """
    check_decode(q, k, v, q_extra, k_extra, num_splits)
    check_options(
        q, k, alibi_slopes=alibi_slopes, sinks=sinks, head_scale=head_scale, lengths=lengths, mask=mask,
        key_positions=key_positions,
    )  # fmt: skip
    if sinks is not None and not isinstance(sinks, Tensor):
        sinks = torch.full((q.shape[2],), sinks, dtype=torch.float32, device=q.device)
    out: Tensor = _decode_attention(
        q, k, v, q_extra, k_extra, alibi_slopes, sinks, head_scale, lengths, mask, key_positions, scale, causal,
        softcap, window, sink_tokens, query_start, num_splits,
    )  # fmt: skip
    return out


def check_decode(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, num_splits: int | None
) -> None:
    """Refuse shapes that would be read out of bounds, dtypes the kernels lack, and a wish for gradients."""
    B, T, H, D = q.shape
    S, G = k.shape[1:3]
    if not 1 <= T <= MAX_TOKENS:
        raise ValueError(f"q must have 1 to {MAX_TOKENS} tokens, got {T}")
    if k.shape != (B, S, G, D) or v.shape[:3] != (B, S, G):
        raise ValueError(
            f"k must be (B, S, G, D) and v (B, S, G, Dv) for q {tuple(q.shape)}, got {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    if H and (not G or H % G):
        raise ValueError(f"num_kv_heads must divide num_heads, got {G} and {H}")
    if (q_extra is None) != (k_extra is None):
        raise ValueError("q_extra and k_extra must be given together")
    extra = [] if q_extra is None or k_extra is None else [q_extra, k_extra]
    if extra and (extra[0].shape[:3] != (B, T, H) or extra[1].shape != (B, S, 1, extra[0].shape[3])):
        raise ValueError(
            f"q_extra must be (B, T, H, R) and k_extra (B, S, 1, R), got {tuple(extra[0].shape)} "
            f"and {tuple(extra[1].shape)}"
        )
    tensors = [q, k, v, *extra]
    widths = [D, v.shape[3], *(x.shape[3] for x in extra)]
    if not 1 <= min(widths) <= max(widths) <= MAX_WIDTH:
        raise ValueError(f"widths of heads must lie between 1 and {MAX_WIDTH}, got {widths}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or any(x.dtype != q.dtype for x in tensors):
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
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> None:
    """Refuse options whose shape does not fit."""
    B, T, H, _ = q.shape
    S = k.shape[1]
    shapes = {
        "alibi_slopes": (alibi_slopes, (H,)), "sinks": (sinks, (H,)), "lengths": (lengths, (B,)),
        "key_positions": (key_positions, (S,)),
    }  # fmt: skip
    for name, (given, shape) in shapes.items():
        if isinstance(given, Tensor) and given.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(given.shape)}")
    if head_scale is not None and head_scale.shape not in ((H,), (B, H)):
        raise ValueError(f"head_scale must have shape {(H,)} or {(B, H)}, got {tuple(head_scale.shape)}")
    for name, given in (("alibi_slopes", alibi_slopes), ("sinks", sinks), ("head_scale", head_scale)):
        if isinstance(given, Tensor) and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"decoding has no gradient for {name}: call it under torch.no_grad()")
    if mask is not None:
        keys = S if key_positions is None else max(mask.shape[-1:], default=1)
        full = (B, H, T, keys)
        fits = mask.ndim <= 4 and all(n in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be boolean and broadcast to (B, H, T, S) = {full}, got {mask.dtype} {tuple(mask.shape)}"
            )
