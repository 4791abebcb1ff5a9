"""Softmax attention of grouped heads: launchers, registration with torch, and the public function.

Saved for the backward pass: the inputs, the output and two numbers of each row, nothing of size T S. The backward pass
runs three kernels (delta; dk and dv; dq) and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from attnzoo_kernels import tuning
from attnzoo_kernels.launch import as_int, dense_rows, on_device, positive_scale, row_norm, stored_as, strides
from attnzoo_kernels.softmax_attention_bwd import (
    softmax_attention_bwd_delta_kernel,
    softmax_attention_bwd_dkdv_kernel,
    softmax_attention_bwd_dq_kernel,
)
from attnzoo_kernels.softmax_attention_fwd import softmax_attention_fwd_kernel
from attnzoo_kernels.tuning import padded

LOG2E = 1.4426950408889634


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
    sinks: Tensor | float | None = None,
    q_extra: Tensor | None = None,
    k_extra: Tensor | None = None,
    head_scale: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    key_positions: Tensor | None = None,
    query_start: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv).

    The meaning of the arguments is that of `attnzoo.ops.softmax_attention`. Gradients go to q, k, v, q_extra, k_extra,
    bias, sinks and head_scale, once.

    Args:
        q: float16, bfloat16 or float32; D and Dv up to 256.
        k: G divides H.
        v: of q's dtype.
        scale: factor of the products.
        causal: key index j <= query index i.
        softcap: bound of the logits.
        alibi_slopes: (H,).
        window: keys with i - j < window (|i - j| if not causal).
        sink_tokens: leading keys, of each document, that stay visible outside the window.
        sinks: (H,) or a number, one more logit in the denominator.
        q_extra: (B, T, H, R), and k_extra (B, S, 1, R), the part of the key that heads share.
        head_scale: (H,) or (B, H).
        bias: added to the scores, broadcastable to (B, H, T, S). Its gradient takes float32 (B, H, T, S).
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        documents: first and last (B, T), integers: query t sees keys first <= j < last. Needs T = S.
        key_positions: (S,) index of every key. Default 0 .. S - 1.
        query_start: index of the first query. Default S - T.

    Returns:
        out (B, T, H, Dv) in q's dtype, and the log-sum-exp (B, H, T) of every query's scores in float32, with the sink,
        -inf where nothing is visible.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    scale, q, q_extra = positive_scale(scale, q, q_extra)
    if sinks is not None and not isinstance(sinks, Tensor):
        sinks = torch.full((H,), float(sinks), device=q.device)
    if head_scale is not None:
        head_scale = head_scale.float().expand(B, H)
    first, last = (None, None) if documents is None else documents
    out, lse, _, _ = _forward(
        q, k, v, q_extra, k_extra, None if bias is None else bias.expand(B, H, T, S),
        None if mask is None else mask.expand(B, H, T, S), stored_as(alibi_slopes, torch.float32),
        stored_as(sinks, torch.float32), head_scale, as_int(lengths), as_int(first), as_int(last),
        as_int(key_positions), scale, softcap or 0.0, window or 0, sink_tokens,
        S - T if query_start is None else query_start, causal,
    )  # fmt: skip
    return out, lse


@library.custom_op("attnzoo::softmax_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, gain: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, positions: Tensor | None, scale: float, softcap: float, window: int,
    sink_tokens: int, query_start: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, shift, norm = _forward_fake(
        q, k, v, q_extra, k_extra, bias, mask, slopes, sinks, gain, lengths, first, last, positions, scale, softcap,
        window, sink_tokens, query_start, causal,
    )  # fmt: skip
    if lse.numel() == 0:
        return out, lse, shift, norm
    call = _Call(q, k, v, q_extra, k_extra, bias, mask, slopes, gain, lengths, first, last, positions)
    numbers = call.numbers(scale, softcap, window, sink_tokens, query_start, causal)
    config = call.config("softmax_attention_fwd")
    with on_device(q):
        softmax_attention_fwd_kernel[call.query_grid(config)](
            **call.tensors, sinks_ptr=sinks, o_ptr=out, lse_ptr=lse, shift_ptr=shift, norm_ptr=norm, **call.strides,
            **numbers, **config.options(),
        )  # fmt: skip
    return out, lse, shift, norm


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, gain: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, positions: Tensor | None, scale: float, softcap: float, window: int,
    sink_tokens: int, query_start: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    out = torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    lse, shift = (torch.empty((B, H, T), dtype=torch.float32, device=q.device) for _ in range(2))
    return out, lse, shift, row_norm(shift, q.dtype)


@library.custom_op("attnzoo::softmax_attention_backward", mutates_args=())
def _backward(
    do: Tensor, out: Tensor, shift: Tensor, norm: Tensor, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, slopes: Tensor | None, gain: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, positions: Tensor | None, scale: float, softcap: float, window: int,
    sink_tokens: int, query_start: int, causal: bool, need_q: bool, need_kv: bool, need_bias: bool, need_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, q_extra, k_extra (per group, float32), bias (full size), of gain's rows, and delta."""
    made = _backward_fake(
        do, out, shift, norm, dlse, q, k, v, q_extra, k_extra, bias, mask, slopes, gain, lengths, first, last,
        positions, scale, softcap, window, sink_tokens, query_start, causal, need_q, need_kv, need_bias, need_gain,
    )  # fmt: skip
    dq, dk, dv, dqx, dkx, dbias, r, delta = made
    if do.numel() == 0 or k.numel() == 0:
        for gradient in made:
            gradient.zero_()
        return made
    call = _Call(q, k, v, q_extra, k_extra, bias, mask, slopes, gain, lengths, first, last, positions)
    numbers = call.numbers(scale, softcap, window, sink_tokens, query_start, causal)
    do = dense_rows(do)
    value = {"DV": numbers["DV"], "BLOCK_DV": numbers["BLOCK_DV"], "BLOCK_T": 32}
    shared = dict(call.strides)
    shared |= {"stride_dob": do.stride(0), "stride_dot": do.stride(1), "stride_doh": do.stride(2)}
    with on_device(q):
        softmax_attention_bwd_delta_kernel[(-(-call.T // 32) * call.B * call.H,)](
            out, do, delta, *out.stride()[:3], *do.stride()[:3], call.T, call.H, **value
        )
        if dlse is not None:
            delta -= dlse
        if need_kv:
            config = call.config("softmax_attention_bwd_dkdv", grouped=call.G < call.H)
            grid = (-(-call.S // config.BLOCK_S) * call.B * call.G,)
            softmax_attention_bwd_dkdv_kernel[grid](
                **call.tensors, do_ptr=do, shift_ptr=shift, norm_ptr=norm, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv,
                dkx_ptr=None if k_extra is None else dkx, **shared, **numbers, **config.options(),
            )  # fmt: skip
        if need_q or need_bias or need_gain:
            config = call.config("softmax_attention_bwd_dq")
            if need_bias:
                dbias.zero_()
            softmax_attention_bwd_dq_kernel[call.query_grid(config)](
                **call.tensors, do_ptr=do, shift_ptr=shift, norm_ptr=norm, delta_ptr=delta, dq_ptr=dq,
                dqx_ptr=None if q_extra is None else dqx, dbias_ptr=dbias if need_bias else None,
                r_ptr=r if need_gain else None, **shared, **numbers, **config.options(),
            )  # fmt: skip
    return made


@_backward.register_fake
def _backward_fake(
    do: Tensor, out: Tensor, shift: Tensor, norm: Tensor, dlse: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, bias: Tensor | None,
    mask: Tensor | None, slopes: Tensor | None, gain: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, positions: Tensor | None, scale: float, softcap: float, window: int,
    sink_tokens: int, query_start: int, causal: bool, need_q: bool, need_kv: bool, need_bias: bool, need_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    S, G = k.shape[1:3]

    def made(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)

    query = need_q or need_bias or need_gain
    R = 0 if q_extra is None else q_extra.shape[3]
    return (
        made((B, T, H, q.shape[3]), query, q.dtype),
        made((B, S, G, k.shape[3]), need_kv, k.dtype),
        made((B, S, G, v.shape[3]), need_kv, v.dtype),
        made((B, T, H, R), query and R > 0, q.dtype),
        made((B, G, S, R), need_kv and R > 0, torch.float32),
        made((B, H, T, S), need_bias, torch.float32),
        made((B, H, T), need_gain, torch.float32),
        made((B, H, T), True, torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.window, ctx.sink_tokens, ctx.query_start, ctx.causal = inputs
    out, _, shift, norm = output
    ctx.save_for_backward(*tensors, out, shift, norm)


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, shift, norm = ctx.saved_tensors
    q, k, v, q_extra, k_extra, bias, mask, slopes, sinks, gain, lengths, first, last, positions = tensors
    if do is None:
        do = torch.zeros_like(out)
    need = ctx.needs_input_grad
    dq, dk, dv, dqx, dkx, dbias, r, delta = _backward(
        do, out, shift, norm, dlse, q, k, v, q_extra, k_extra, bias, mask, slopes, gain, lengths, first, last,
        positions, ctx.scale, ctx.softcap, ctx.window, ctx.sink_tokens, ctx.query_start, ctx.causal,
        need[0] or need[3], need[1] or need[2] or need[4], need[5], need[9],
    )  # fmt: skip
    dsinks = None
    if need[8]:
        # The sink has a weight like a key's and no value: it only takes weight from the others.
        taken = torch.exp2(sinks[:, None] * LOG2E - shift) * delta
        if norm.numel():
            taken *= norm
        dsinks = -taken.sum((0, 2), dtype=torch.float64).to(sinks.dtype)
    return (
        dq if need[0] else None,
        dk if need[1] else None,
        dv if need[2] else None,
        dqx if need[3] else None,
        dkx.sum(1).unsqueeze(2).to(k.dtype) if need[4] else None,
        dbias.to(bias.dtype) if need[5] else None,
        None,
        None,
        dsinks,
        r.sum(-1, dtype=torch.float64).to(gain.dtype) if need[9] else None,
        *(None,) * 10,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Call:
    """One call's tensors, strides and numbers under the names that the kernels give them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_extra: Tensor | None,
        k_extra: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        slopes: Tensor | None,
        gain: Tensor | None,
        lengths: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        q_extra, k_extra = (None if x is None or x.shape[3] == 0 else dense_rows(x) for x in (q_extra, k_extra))
        mask = None if mask is None else mask.view(torch.uint8)
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.G, self.DV = k.shape[1], k.shape[2], v.shape[3]
        self.R = 0 if q_extra is None else q_extra.shape[3]
        self.dtype, self.device = q.dtype, q.device
        self.tensors = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "qx_ptr": q_extra, "kx_ptr": k_extra, "bias_ptr": bias,
            "mask_ptr": mask, "slopes_ptr": slopes, "gain_ptr": gain, "lengths_ptr": lengths, "first_ptr": first,
            "last_ptr": last, "positions_ptr": positions,
        }  # fmt: skip
        self.strides = {
            **strides(q, "q", "bth"), **strides(k, "k", "bsg"), **strides(v, "v", "bsg"),
            **strides(q_extra, "qx", "bth"), **strides(k_extra, "kx", "bs"), **strides(bias, "b", "bhts"),
            **strides(mask, "m", "bhts"), **strides(gain, "g", "bh"),
        }  # fmt: skip

    def numbers(
        self, scale: float, softcap: float, window: int, sink_tokens: int, query_start: int, causal: bool
    ) -> dict[str, Any]:
        return {
            "T": self.T, "S": self.S, "H": self.H, "GROUP": self.H // self.G, "scale": scale, "softcap": softcap,
            "window": window, "sink_tokens": sink_tokens, "query_start": query_start,
            "D": self.D, "DV": self.DV, "R": self.R, "CAUSAL": causal, "SOFTCAP": softcap != 0.0,
            "WINDOW": window > 0, "SINK_TOKENS": window > 0 and sink_tokens > 0,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "BLOCK_D": padded(self.D), "BLOCK_DV": padded(self.DV), "BLOCK_R": padded(self.R) if self.R else 16,
        }  # fmt: skip

    def config(self, kernel: str, grouped: bool = False) -> tuning.Config:
        if self.tensors["bias_ptr"] is not None or self.tensors["mask_ptr"] is not None:
            kernel += " dense"
        elif grouped:
            kernel += " grouped"
        width = padded(max(self.D, self.DV)) + (padded(self.R) if self.R else 0)
        return tuning.config(kernel, width, self.dtype, self.device)

    def query_grid(self, config: tuning.Config) -> tuple[int]:
        return (-(-self.T // config.BLOCK_T) * self.B * self.H,)
