"""Composed attention (talking heads, DCMHA): launchers, registration with torch, and the public function.

Saved for the backward pass: the inputs and two numbers of each row and head, nothing of size T S. The backward pass
runs three kernels (delta and the queries' second matrices; queries; keys) and is deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, library

from attnzoo_kernels import composed_tuning, tuning
from attnzoo_kernels.composed_attention_bwd import (
    composed_attention_bwd_delta_kernel,
    composed_attention_bwd_dq_kernel,
)
from attnzoo_kernels.composed_attention_bwd_keys import composed_attention_bwd_dkdv_kernel
from attnzoo_kernels.composed_attention_fwd import (
    composed_attention_fwd_out_kernel,
    composed_attention_fwd_stats_kernel,
)
from attnzoo_kernels.decode_tiles import splits_for
from attnzoo_kernels.launch import as_int, on_device, row_norm, strides
from attnzoo_kernels.tuning import Config, padded


def composed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    groups: int = 1,
    q_pre: Tensor | None = None,
    k_pre: Tensor | None = None,
    q_post: Tensor | None = None,
    k_post: Tensor | None = None,
    residual_pre: bool = True,
    residual_post: bool = True,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    key_positions: Tensor | None = None,
    query_start: int | None = None,
    split_keys: bool = False,
    splits: int | None = None,
) -> Tensor:
    """Attention of q (B, T, Hk, D) over k (B, S, G, D), v (B, S, Gv, Dv) with heads mixed before and after the softmax.

    Heads lie in N groups of MI queries' heads, MJ softmax heads and MV outputs:

        a'_j = [a_j] + sum_i a_i (q_pre_t + k_pre_s)[n, i, j],    w_m = [p_m] + sum_j p_j (q_post_t + k_post_s)[n, j, m]

    Gradients go to q, k, v and the four matrices, once.

    Args:
        q: float16, bfloat16 or float32, as are the rest.
        k: G divides Hk.
        v: Gv divides N MV.
        scale: factor of the products.
        groups: N.
        q_pre: (B, T, N, MI, MJ), or (N, MI, MJ) for all tokens; with the residual the identity is not in it.
        k_pre: (B, S, N, MI, MJ).
        q_post: (B, T, N, MJ, MV), or (N, MJ, MV).
        k_post: (B, S, N, MJ, MV).
        residual_pre: whether a_j is a term; then MI = MJ. Without matrices it has to be.
        residual_post: whether p_m is a term; then MJ = MV.
        causal: key index j <= query index i.
        window: keys with i - j < window; only with causal.
        mask: boolean, broadcastable to (B, N MJ, T, S), True = may attend.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        documents: first and last (B, T), integers: query t sees keys first <= j < last. Needs T = S.
        key_positions: (S,) index of every key. Default 0 .. S - 1.
        query_start: index of the first query. Default S - T.
        split_keys: whether several programs share the keys of a tile of queries: for few queries over many keys.
        splits: how many, if not as many as fill the GPU.

    Returns:
        (B, T, N MV, Dv) in q's dtype.
    """
    (B, T), S = q.shape[:2], k.shape[1]
    first, last = (None, None) if documents is None else documents
    matrices = [None if x is None else x.to(q.dtype) for x in (q_pre, k_pre, q_post, k_post)]
    softmax_heads = _heads(q.shape[2], groups, q_pre, k_pre)
    if splits is None:
        splits = 0 if split_keys else 1
    out, _, _ = _forward(
        q, k, v, *matrices, None if mask is None else mask.expand(B, softmax_heads, T, S), as_int(lengths),
        as_int(first), as_int(last), as_int(key_positions), groups, scale, window or 0,
        S - T if query_start is None else query_start, splits, causal, residual_pre, residual_post,
    )  # fmt: skip
    return out


def _heads(heads: int, groups: int, of_queries: Tensor | None, of_keys: Tensor | None) -> int:
    """Heads behind a composition of `heads` heads."""
    matrix = of_queries if of_queries is not None else of_keys
    return heads if matrix is None else groups * matrix.shape[-1]


@library.custom_op("attnzoo::composed_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_pre: Tensor | None, k_pre: Tensor | None, q_post: Tensor | None,
    k_post: Tensor | None, mask: Tensor | None, lengths: Tensor | None, first: Tensor | None, last: Tensor | None,
    positions: Tensor | None, groups: int, scale: float, window: int, query_start: int, splits: int, causal: bool,
    residual_pre: bool, residual_post: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, shift, norm = _forward_fake(
        q, k, v, q_pre, k_pre, q_post, k_post, mask, lengths, first, last, positions, groups, scale, window,
        query_start, splits, causal, residual_pre, residual_post,
    )  # fmt: skip
    if shift.numel() == 0 or k.shape[1] == 0 or out.numel() == 0:
        return out.zero_(), shift.zero_(), norm.zero_()
    call = _Call(q, k, v, q_pre, k_pre, q_post, k_post, mask, lengths, first, last, positions, groups)
    numbers = call.numbers(scale, window, query_start, causal, residual_pre, residual_post)
    if splits == 0:
        programs = call.tiles(call.T, call.config("composed_attention_fwd_stats"))
        splits = splits_for(programs, call.S, 32, tuning.device_limits(q.device)[0])
    shifts, norms, outs = shift, norm, out
    if splits > 1:
        shifts, norms = (torch.empty((splits, *shift.shape), dtype=torch.float32, device=q.device) for _ in range(2))
        outs = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    with on_device(q):
        config = call.config("composed_attention_fwd_stats")
        composed_attention_fwd_stats_kernel[(call.tiles(call.T, config) * splits,)](
            **call.tensors,
            shift_ptr=shifts,
            norm_ptr=norms,
            **call.strides,
            **numbers,
            splits=splits,
            SPLIT=splits > 1,
            **config.options(),
        )
        if splits > 1:
            _join(shifts, norms, shift, norm if norm.numel() else None)
        config = call.config("composed_attention_fwd_out")
        composed_attention_fwd_out_kernel[(call.tiles(call.T, config) * splits,)](
            **call.tensors, shift_ptr=shift, norm_ptr=norm, o_ptr=outs, **call.strides, **numbers, splits=splits,
            SPLIT=splits > 1, **config.options(),
        )  # fmt: skip
    return (outs.sum(0).to(out.dtype) if splits > 1 else out), shift, norm


def _join(shifts: Tensor, sums: Tensor, shift: Tensor, norm: Tensor | None) -> None:
    """Maxima and denominators of the splits (splits, B, H, T) -> what the first kernel leaves where there are none."""
    highest = shifts.amax(0)
    highest = highest.masked_fill(highest.isinf(), 0.0)
    total = (sums * torch.exp2(shifts - highest)).sum(0)
    if norm is None:
        shift.copy_(torch.where(total > 0, highest + total.log2(), torch.inf))
    else:
        shift.copy_(highest)
        norm.copy_(torch.where(total > 0, 1.0 / total, 0.0))


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, q_pre: Tensor | None, k_pre: Tensor | None, q_post: Tensor | None,
    k_post: Tensor | None, mask: Tensor | None, lengths: Tensor | None, first: Tensor | None, last: Tensor | None,
    positions: Tensor | None, groups: int, scale: float, window: int, query_start: int, splits: int, causal: bool,
    residual_pre: bool, residual_post: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, heads, _ = q.shape
    softmax_heads = _heads(heads, groups, q_pre, k_pre)
    value_heads = _heads(softmax_heads, groups, q_post, k_post)
    out = torch.empty((B, T, value_heads, v.shape[3]), dtype=q.dtype, device=q.device)
    shift = torch.empty((B, softmax_heads, T), dtype=torch.float32, device=q.device)
    return out, shift, row_norm(shift, q.dtype)


@library.custom_op("attnzoo::composed_attention_backward", mutates_args=())
def _backward(
    do: Tensor, shift: Tensor, norm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_pre: Tensor | None, k_pre: Tensor | None, q_post: Tensor | None,
    k_post: Tensor | None, mask: Tensor | None, lengths: Tensor | None, first: Tensor | None, last: Tensor | None,
    positions: Tensor | None, groups: int, scale: float, window: int, query_start: int, causal: bool,
    residual_pre: bool, residual_post: bool, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, q_pre, k_pre, q_post, k_post; empty where there is no tensor or nobody needs them."""
    call = _Call(q, k, v, q_pre, k_pre, q_post, k_post, mask, lengths, first, last, positions, groups)
    B, T, S, N = call.B, call.T, call.S, groups
    numbers = call.numbers(scale, window, query_start, causal, residual_pre, residual_post)
    made = _backward_fake(
        do, shift, norm, q, k, v, q_pre, k_pre, q_post, k_post, mask, lengths, first, last, positions, groups, scale,
        window, query_start, causal, residual_pre, residual_post, need_q, need_kv,
    )  # fmt: skip
    if do.numel() == 0 or k.numel() == 0 or shift.numel() == 0:
        for gradient in made:
            gradient.zero_()
        return made
    dq, dk, dv, dq_pre, dk_pre, dq_post, dk_post = made
    do = do if do.stride(-1) == 1 else do.contiguous()
    high = {"dtype": torch.float32, "device": q.device}
    delta = torch.empty(shift.shape, **high)
    shared = {**call.strides, **strides(do, "do", "bth")}
    rows = {"do_ptr": do, "shift_ptr": shift, "norm_ptr": norm, "delta_ptr": delta}
    with on_device(q):
        config = call.config("composed_attention_bwd_delta")
        # The gradient of a matrix that all tokens share is left as one sum for every tile of queries.
        post = call.room(q_post, config) if need_q else None
        composed_attention_bwd_delta_kernel[(call.tiles(T, config),)](
            **call.tensors, **rows, dq_post_ptr=post, **shared, **strides(post, "dq_post", "btn"), **numbers,
            SHARED_POST=q_post is not None and q_post.ndim == 3, **config.options(),
        )  # fmt: skip
        if need_q:
            config = call.config("composed_attention_bwd_dq")
            pre = call.room(q_pre, config)
            composed_attention_bwd_dq_kernel[(call.tiles(T, config),)](
                **call.tensors, **rows, dq_ptr=dq, dq_pre_ptr=pre, **shared, **strides(pre, "dq_pre", "btn"),
                **numbers, SHARED_PRE=q_pre is not None and q_pre.ndim == 3, **config.options(),
            )  # fmt: skip
            dq_pre = _summed(pre, q_pre, dq_pre)
            dq_post = _summed(post, q_post, dq_post)
        if need_kv:
            config = call.config("composed_attention_bwd_dkdv")
            each_k = dk if k.shape[2] == call.MI * N else torch.empty((B, S, call.MI * N, call.D), **high)
            each_v = dv if v.shape[2] == call.MV * N else torch.empty((B, S, call.MV * N, call.DV), **high)
            pre, post = call.room(k_pre, config), call.room(k_post, config)
            keys = {"dk_ptr": each_k, "dk_pre_ptr": pre}
            values = {"dv_ptr": each_v, "dk_post_ptr": post}
            one = composed_tuning.keys_in_one_launch(call.M, q.dtype)
            for wanted in (keys | values,) if one else (keys, values):
                written = dict.fromkeys((*keys, *values)) | wanted
                composed_attention_bwd_dkdv_kernel[(call.tiles(S, config, keys=True),)](
                    **call.tensors, **rows, **written, **shared, **strides(pre, "dk_pre", "bsn"),
                    **strides(post, "dk_post", "bsn"), **numbers, **config.options(),
                )  # fmt: skip
            dk_pre = _summed(pre, k_pre, dk_pre)
            dk_post = _summed(post, k_post, dk_post)
            if each_k is not dk:
                dk = each_k.view(B, S, k.shape[2], -1, call.D).sum(3).to(k.dtype)
            if each_v is not dv:
                dv = each_v.view(B, S, v.shape[2], -1, call.DV).sum(3).to(v.dtype)
    return dq, dk, dv, dq_pre, dk_pre, dq_post, dk_post


def _summed(parts: Tensor | None, matrix: Tensor | None, absent: Tensor) -> Tensor:
    """The kernels' float32 gradient of a matrix in its shape and dtype."""
    if parts is None or matrix is None:
        return absent
    return (parts.sum((0, 1)) if matrix.ndim == 3 else parts).to(matrix.dtype)


@_backward.register_fake
def _backward_fake(
    do: Tensor, shift: Tensor, norm: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_pre: Tensor | None, k_pre: Tensor | None, q_post: Tensor | None,
    k_post: Tensor | None, mask: Tensor | None, lengths: Tensor | None, first: Tensor | None, last: Tensor | None,
    positions: Tensor | None, groups: int, scale: float, window: int, query_start: int, causal: bool,
    residual_pre: bool, residual_post: bool, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        shape = tensor.shape if tensor is not None and wanted else (0,)
        return torch.empty(shape, dtype=q.dtype, device=q.device)

    return (
        like(q, need_q), like(k, need_kv), like(v, need_kv), like(q_pre, need_q), like(k_pre, need_kv),
        like(q_post, need_q), like(k_post, need_kv),
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, groups, scale, window, query_start, _, causal, residual_pre, residual_post = inputs
    ctx.numbers = (groups, scale, window, query_start, causal, residual_pre, residual_post)
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, shift, norm = ctx.saved_tensors
    need = ctx.needs_input_grad
    if do is None:
        return (None,) * 20
    found = _backward(
        do, shift, norm, *tensors, *ctx.numbers, need[0] or need[3] or need[5], need[1] or need[2] or need[4] or need[6]
    )
    return (*(gradient if wanted else None for gradient, wanted in zip(found, need, strict=False)), *(None,) * 13)


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _Call:
    """One call's tensors, strides and numbers under the names that the kernels give them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_pre: Tensor | None,
        k_pre: Tensor | None,
        q_post: Tensor | None,
        k_post: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        first: Tensor | None,
        last: Tensor | None,
        positions: Tensor | None,
        groups: int,
    ) -> None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        q_pre, k_pre, q_post, k_post = (_tight(x) for x in (q_pre, k_pre, q_post, k_post))
        mask = None if mask is None else mask.view(torch.uint8)
        self.N = groups
        self.B, self.T, heads, self.D = q.shape
        self.S, self.G, self.DV, self.GV = k.shape[1], k.shape[2], v.shape[3], v.shape[2]
        self.MI = heads // groups
        self.MJ = _heads(heads, groups, q_pre, k_pre) // groups
        self.MV = _heads(groups * self.MJ, groups, q_post, k_post) // groups
        self.M = triton.next_power_of_2(max(self.MI, self.MJ, self.MV))
        self.W = max(16, self.M)
        self.dtype, self.device = q.dtype, q.device
        self.tensors = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "q_pre_ptr": q_pre, "k_pre_ptr": k_pre, "q_post_ptr": q_post,
            "k_post_ptr": k_post, "mask_ptr": mask, "lengths_ptr": lengths, "first_ptr": first, "last_ptr": last,
            "positions_ptr": positions,
        }  # fmt: skip
        self.strides = {
            **strides(q, "q", "bth"), **strides(k, "k", "bsg"), **strides(v, "v", "bsg"),
            **strides(q_pre, "q_pre", "btn"), **strides(k_pre, "k_pre", "bsn"),
            **strides(q_post, "q_post", "btn"), **strides(k_post, "k_post", "bsn"), **strides(mask, "m", "bhts"),
        }  # fmt: skip

    def numbers(
        self, scale: float, window: int, query_start: int, causal: bool, residual_pre: bool, residual_post: bool
    ) -> dict[str, Any]:
        return {
            "B": self.B, "T": self.T, "S": self.S, "N": self.N, "GROUP": self.MI * self.N // self.G,
            "VALUE_GROUP": self.MV * self.N // self.GV, "scale": scale, "window": window, "query_start": query_start,
            "D": self.D, "DV": self.DV, "MI": self.MI, "MJ": self.MJ, "MV": self.MV, "M": self.M, "W": self.W,
            "RESIDUAL_PRE": residual_pre, "RESIDUAL_POST": residual_post, "CAUSAL": causal,
            "WINDOW": causal and window > 0, "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "BLOCK_D": padded(self.D), "BLOCK_DV": padded(self.DV),
        }  # fmt: skip

    def config(self, kernel: str) -> Config:
        return composed_tuning.config(kernel, self.M, max(self.D, self.DV), self.dtype, self.device)

    def tiles(self, rows: int, config: Config, keys: bool = False) -> int:
        return triton.cdiv(rows, config.BLOCK_S if keys else config.BLOCK_T) * self.B * self.N

    def room(self, matrix: Tensor | None, config: Config) -> Tensor | None:
        """Where a kernel leaves a matrix' gradient: every token's, or W / M rows of sums for every tile of queries."""
        if matrix is None:
            return None
        shape = matrix.shape
        if matrix.ndim == 3:
            shape = (self.B, triton.cdiv(self.T, config.BLOCK_T) * (self.W // self.M), *shape)
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _tight(matrix: Tensor | None) -> Tensor | None:
    """A matrix with tokens' strides, 0 for one that all share, and its two last axes contiguous."""
    if matrix is None:
        return None
    if matrix.stride(-1) != 1 or matrix.stride(-2) != matrix.shape[-1]:
        matrix = matrix.contiguous()
    return matrix.as_strided((1, 1, *matrix.shape), (0, 0, *matrix.stride())) if matrix.ndim == 3 else matrix
