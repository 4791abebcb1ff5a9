"""Attention of routed heads: launchers, registration with torch, and the public function.

Saved for the backward pass: the inputs, the output, the packed lists and two numbers of each (token, head) pair,
nothing of size T S. The backward pass runs three kernels (delta; dk and dv; dq and the gates') and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, library

from attnzoo_kernels import routing_tuning
from attnzoo_kernels.head_routing_kernels import (
    head_routing_bwd_delta_kernel,
    head_routing_bwd_dkdv_kernel,
    head_routing_bwd_dq_kernel,
    head_routing_fwd_kernel,
    head_routing_pack_kernel,
)
from attnzoo_kernels.launch import as_int, dense_rows, on_device, positive_scale, row_norm, strides
from attnzoo_kernels.tuning import Config, padded

PACKED_AT_ONCE = 64
"""Tokens, or packed rows, of a program that packs or sums up; such programs move memory and compute nothing."""


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    scale: float,
    gates: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal self-attention of the active (token, head) pairs alone, times their gates; zeros for the others.

    Gradients go to q, k, v and gates, once; those of inactive pairs are 0. The work grows with the number of active
    pairs, which the host never learns.

    Args:
        q: queries (B, T, H, D), float16, bfloat16 or float32; D and Dv up to 256.
        k: keys (B, T, G, D); G divides H.
        v: values (B, T, G, Dv).
        active: (B, T, H) boolean; any number of heads for a token, and none too.
        scale: of the scores.
        gates: (B, T, H) floating, or None for 1.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        documents: first and last (B, T), integers: query t sees keys first <= j < last.

    Returns:
        (B, T, H, Dv) in q's dtype.
    """
    first, last = (None, None) if documents is None else documents
    scale, q, _ = positive_scale(scale, q)
    out, _, _, _, _ = _forward(q, k, v, active, gates, as_int(lengths), as_int(first), as_int(last), scale)
    return out


def pack_rows(active: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Lists of the active rows of each batch row and key/value head, made without waiting for the device.

    Args:
        active: (B, T, H) boolean.
        groups: G, divides H.

    Returns:
        rows (B, G, T H / G) int32, token * (H / G) + head within the group, ascending; only the first start[..., T] of
        a list are written. start (B, G, T + 1) int32, the place in the list of each token's first row.
    """
    B, T, H = active.shape
    size = H // groups
    counts = active.unflatten(2, (groups, size)).sum(-1, dtype=torch.int32).transpose(1, 2)
    start = torch.zeros((B, groups, T + 1), dtype=torch.int32, device=active.device)
    torch.cumsum(counts, -1, dtype=torch.int32, out=start[..., 1:])
    rows = torch.empty((B, groups, T * size), dtype=torch.int32, device=active.device)
    if rows.numel():
        with on_device(active):
            head_routing_pack_kernel[(-(-T // PACKED_AT_ONCE) * B * groups,)](
                active.view(torch.uint8), start, rows, *active.stride(), T, groups,
                GROUP=size, BLOCK_T=PACKED_AT_ONCE, BLOCK_M=triton.next_power_of_2(size),
            )  # fmt: skip
    return rows, start


@library.custom_op("attnzoo::routed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the packed lists (see `pack_rows`), and what is kept of each packed row."""
    B, T, H, _ = q.shape
    G = k.shape[2]
    out = torch.zeros((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device)
    rows, start = pack_rows(active, G)
    shift = torch.empty(rows.shape, dtype=torch.float32, device=q.device)
    norm = row_norm(shift, q.dtype)
    if out.numel():
        call = _Call(q, k, v, gates, start, rows, lengths, first, last, scale)
        config = call.config("head_routing_fwd")
        with on_device(q):
            head_routing_fwd_kernel[call.row_grid(config.BLOCK_T)](
                **call.tensors, o_ptr=out, shift_ptr=shift, norm_ptr=norm, **call.strides, **call.numbers,
                **config.options(),
            )  # fmt: skip
    return out, rows, start, shift, norm


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gates: Tensor | None, lengths: Tensor | None,
    first: Tensor | None, last: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, _ = q.shape
    G = k.shape[2]
    lists = (B, G, T * (H // G))
    shift = torch.empty(lists, dtype=torch.float32, device=q.device)
    return (
        torch.empty((B, T, H, v.shape[3]), dtype=q.dtype, device=q.device),
        torch.empty(lists, dtype=torch.int32, device=q.device),
        torch.empty((B, G, T + 1), dtype=torch.int32, device=q.device),
        shift,
        row_norm(shift, q.dtype),
    )


@library.custom_op("attnzoo::routed_attention_backward", mutates_args=())
def _backward(
    do: Tensor, out: Tensor, rows: Tensor, start: Tensor, shift: Tensor, norm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, lengths: Tensor | None, first: Tensor | None,
    last: Tensor | None, scale: float, need_q: bool, need_kv: bool, need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, in float32, of gates; empty where not needed."""
    made = _backward_fake(
        do, out, rows, start, shift, norm, q, k, v, gates, lengths, first, last, scale, need_q, need_kv, need_gates
    )
    dq, dk, dv, dgates = made
    # Inactive pairs are never visited.
    dq.zero_()
    dgates.zero_()
    if do.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dgates
    call = _Call(q, k, v, gates, start, rows, lengths, first, last, scale)
    do = dense_rows(do)
    strides = {"stride_dob": do.stride(0), "stride_dot": do.stride(1), "stride_doh": do.stride(2)}
    delta = torch.empty_like(shift)
    with on_device(q):
        head_routing_bwd_delta_kernel[call.row_grid(PACKED_AT_ONCE)](
            out, do, start, rows, delta, **strides, T=call.T, G=call.G, GROUP=call.GROUP, DV=call.DV,
            BLOCK_DV=padded(call.DV), BLOCK_T=PACKED_AT_ONCE,
        )  # fmt: skip
        shared = {
            **call.tensors, "do_ptr": do, "shift_ptr": shift, "norm_ptr": norm, "delta_ptr": delta, **call.strides,
            **strides, **call.numbers,
        }  # fmt: skip
        if need_kv:
            config = call.config("head_routing_bwd_dkdv")
            grid = (-(-call.T // config.BLOCK_S) * call.B * call.G,)
            head_routing_bwd_dkdv_kernel[grid](**shared, dk_ptr=dk, dv_ptr=dv, **config.options())
        if need_q or need_gates:
            config = call.config("head_routing_bwd_dq")
            head_routing_bwd_dq_kernel[call.row_grid(config.BLOCK_T)](
                **shared, dq_ptr=dq, dgates_ptr=dgates if need_gates else None, **config.options()
            )
    return made


@_backward.register_fake
def _backward_fake(
    do: Tensor, out: Tensor, rows: Tensor, start: Tensor, shift: Tensor, norm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, lengths: Tensor | None, first: Tensor | None,
    last: Tensor | None, scale: float, need_q: bool, need_kv: bool, need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def made(shape: torch.Size, wanted: bool, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=dtype, device=q.device)

    return (
        made(q.shape, need_q or need_gates, q.dtype),
        made(k.shape, need_kv, k.dtype),
        made(v.shape, need_kv, v.dtype),
        made(q.shape[:3], need_gates, torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, gates, lengths, first, last, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, gates, lengths, first, last, *output)


def _gradients(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, gates, lengths, first, last, out, rows, start, shift, norm = ctx.saved_tensors
    need = ctx.needs_input_grad
    dq, dk, dv, dgates = _backward(
        torch.zeros_like(out) if do is None else do, out, rows, start, shift, norm, q, k, v, gates, lengths, first,
        last, ctx.scale, need[0], need[1] or need[2], need[4],
    )  # fmt: skip
    return (
        dq if need[0] else None,
        dk if need[1] else None,
        dv if need[2] else None,
        None,
        dgates.to(gates.dtype) if need[4] else None,
        *(None,) * 4,
    )


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Call:
    """One call's tensors, strides and numbers under the names that the kernels give them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None,
        start: Tensor,
        rows: Tensor,
        lengths: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        scale: float,
    ) -> None:
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        self.B, self.T, self.G = q.shape[0], q.shape[1], k.shape[2]
        self.GROUP, self.DV = q.shape[2] // self.G, v.shape[3]
        self.width, self.dtype, self.device = padded(max(q.shape[3], self.DV)), q.dtype, q.device
        self.tensors = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "gates_ptr": gates, "start_ptr": start, "rows_ptr": rows,
            "lengths_ptr": lengths, "first_ptr": first, "last_ptr": last,
        }  # fmt: skip
        self.strides = {
            **strides(q, "q", "bth"), **strides(k, "k", "bsg"), **strides(v, "v", "bsg"),
            **strides(gates, "g", "bth"),
        }  # fmt: skip
        self.numbers = {
            "T": self.T, "G": self.G, "scale": scale, "GROUP": self.GROUP, "D": q.shape[3], "DV": self.DV,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "BLOCK_D": padded(q.shape[3]),
            "BLOCK_DV": padded(self.DV),
        }  # fmt: skip

    def config(self, kernel: str) -> Config:
        return routing_tuning.config(kernel, self.dtype, self.device, self.width)

    def row_grid(self, rows: int) -> tuple[int]:
        return (-(-self.T * self.GROUP // rows) * self.B * self.G,)
