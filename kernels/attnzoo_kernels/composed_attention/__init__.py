"""Composed attention (talking heads, DCMHA): operators and the public function.

Saved for the backward pass: the inputs and two numbers of each row and head, nothing of size T S. The backward pass
runs three kernels (delta and the queries' second matrices; queries; keys) and is deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.composed_attention.kernels_bwd import (
    composed_attention_bwd_delta_kernel,
    composed_attention_bwd_dq_kernel,
)
from attnzoo_kernels.composed_attention.kernels_bwd_keys import composed_attention_bwd_dkdv_kernel
from attnzoo_kernels.composed_attention.kernels_fwd import (
    composed_attention_fwd_out_kernel,
    composed_attention_fwd_stats_kernel,
)
from attnzoo_kernels.composed_attention.tuning import TABLE, capacity, keys_in_one_launch, sizes, splits_of_keys
from attnzoo_kernels.launch import (
    Key,
    Operator,
    Plan,
    arguments_of,
    as_int,
    chip,
    dense_rows,
    find_plan,
    gradient_buffer,
    keep_plan,
    layouts,
    on_device,
    operator,
    precision,
    prepare,
    row_norm,
    schema,
    strides,
)
from attnzoo_kernels.tuning import Config, cdiv, padded, power_of_two

__all__ = ["capacity", "composed_attention", "sizes"]


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

    Heads form N groups of MI queries' heads, MJ softmax heads and MV outputs:

        a'_j = [a_j] + sum_i a_i (q_pre_t + k_pre_s)[n, i, j],    w_m = [p_m] + sum_j p_j (q_post_t + k_post_s)[n, j, m]

    Gradients go to q, k, v and the four matrices, once.

    Args:
        q: float16, bfloat16 or float32, as are the rest.
        k: G divides Hk.
        v: Gv divides N MV.
        scale: factor of the products.
        groups: N.
        q_pre: (B, T, N, MI, MJ), or (N, MI, MJ) for all tokens; with the residual it excludes the identity.
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
    softmax_heads = _heads_after(q.shape[2], groups, q_pre, k_pre)
    if splits is None:
        splits = 0 if split_keys else 1
    out: Tensor = _forward(
        q, k, v, *matrices, None if mask is None else mask.expand(B, softmax_heads, T, S), as_int(lengths),
        as_int(first), as_int(last), as_int(key_positions), float(scale), groups, window or 0,
        S - T if query_start is None else query_start, splits, causal, residual_pre, residual_post,
    )[0]  # fmt: skip
    return out


def _heads_after(heads: int, groups: int, of_queries: Tensor | None, of_keys: Tensor | None) -> int:
    """Heads behind a composition of `heads` heads."""
    matrix = of_queries if of_queries is not None else of_keys
    return heads if matrix is None else groups * matrix.shape[-1]


class _Inputs(NamedTuple):
    """What the operator takes, under the names of its kernels' arguments; splits is 0 for as many as fill the GPU."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_pre: Tensor | None
    k_pre: Tensor | None
    q_post: Tensor | None
    k_post: Tensor | None
    mask: Tensor | None
    lengths: Tensor | None
    first: Tensor | None
    last: Tensor | None
    positions: Tensor | None
    scale: float
    groups: int
    window: int
    query_start: int
    splits: int
    causal: bool
    residual_pre: bool
    residual_post: bool

    def heads(self) -> tuple[int, int, int]:
        """Heads of the queries, of the softmax and of the output."""
        queries = self.q.shape[2]
        softmax = _heads_after(queries, self.groups, self.q_pre, self.k_pre)
        return queries, softmax, _heads_after(softmax, self.groups, self.q_post, self.k_post)

    def tile_heads(self) -> int:
        """M, the most heads of a group, padded."""
        return power_of_two(max(self.heads()) // self.groups)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers for the output and what is kept of each row."""
        (B, T, _, _), (_, softmax, values) = self.q.shape, self.heads()
        out = torch.empty((B, T, values, self.v.shape[3]), dtype=self.q.dtype, device=self.q.device)
        shift = torch.empty((B, softmax, T), dtype=torch.float32, device=self.q.device)
        return out, shift, row_norm(shift, self.q.dtype)

    def gradients(self, need_queries: bool, need_keys: bool) -> list[Tensor]:
        """Buffers for what `_backward` returns."""
        needed = {name: need_queries if name.startswith("q") else need_keys for name in _Inputs._fields[:7]}
        return [
            gradient_buffer(self.q if given is None else given, wanted and given is not None)
            for given, wanted in zip(self[:7], needed.values(), strict=True)
        ]

    def arguments(self) -> dict[str, Any]:
        """What all kernels share."""
        (B, T, _, D), (_, S, G, _), (_, _, GV, DV) = self.q.shape, self.k.shape, self.v.shape
        N, M = self.groups, self.tile_heads()
        queries, softmax, values = self.heads()
        tensors: dict[str, Any] = dict(zip(_Inputs._fields[:TENSORS], self, strict=False))
        tensors |= {"q": dense_rows(self.q), "k": dense_rows(self.k), "v": dense_rows(self.v)}
        tensors |= {name: _dense_matrices(tensors[name]) for name in MATRICES}
        if self.mask is not None:
            tensors["mask"] = self.mask.view(torch.uint8)
        return {
            **arguments_of(tensors, STRIDES), "B": B, "T": T, "S": S, "N": N, "GROUP": queries // G,
            "VALUE_GROUP": values // GV, "scale": self.scale, "window": self.window, "query_start": self.query_start,
            "D": D, "DV": DV, "MI": queries // N, "MJ": softmax // N, "MV": values // N, "M": M, "W": max(16, M),
            "RESIDUAL_PRE": self.residual_pre, "RESIDUAL_POST": self.residual_post, "CAUSAL": self.causal,
            "WINDOW": self.causal and self.window > 0, "PRECISION": precision(self.q.dtype), "BLOCK_D": padded(D),
            "BLOCK_DV": padded(DV),
        }  # fmt: skip

    def key(self) -> Key:
        """What decides the plan of the forward pass: everything but addresses, the number of keys, and `changing`."""
        of_keys = (self.k, self.v, self.k_pre, self.k_post)
        numbers = (self.lengths, self.first, self.last, self.positions)
        return (
            layouts((self.q, self.q_pre, self.q_post)), self.k.stride(), self.v.stride(), chip(self.q.device),
            *[None if x is None else (x.shape[2:], x.stride()[1:], x.dtype) for x in of_keys], self.mask is None,
            *[x is None for x in numbers], self.groups, self.window > 0, self.causal, self.residual_pre,
            self.residual_post,
        )  # fmt: skip

    def dense(self) -> _Inputs:
        """With tensors as the kernels read them."""
        matrices: dict[str, Any] = {name: _rows_as_stored(getattr(self, name)) for name in MATRICES}
        return self._replace(q=dense_rows(self.q), k=dense_rows(self.k), v=dense_rows(self.v), **matrices)

    def changing(self) -> dict[str, Any]:
        """The arguments of the forward kernels that `key` leaves open."""
        pointers: dict[str, Any] = dict(zip(POINTERS, self, strict=False))
        numbers = {"S": self.k.shape[1], "scale": self.scale, "window": self.window, "query_start": self.query_start}
        for name in ("k_pre", "k_post"):
            matrix = getattr(self, name)
            numbers[f"stride_{name}_b"] = 0 if matrix is None else matrix.stride(0)
        if self.mask is not None:
            pointers["mask_ptr"] = self.mask.view(torch.uint8)
            numbers |= strides(self.mask, "mask", "bhts")
        return pointers | numbers

    def config(self, kernel: str) -> Config:
        size = sizes(self.tile_heads(), max(self.q.shape[3], self.v.shape[3]))
        return TABLE.config(kernel, self.q.dtype, self.q.device, *size)

    def query_programs(self, config: Config) -> int:
        return cdiv(self.q.shape[1], config["BLOCK_T"]) * self.q.shape[0] * self.groups

    def key_programs(self, config: Config) -> int:
        return cdiv(self.k.shape[1], config["BLOCK_S"]) * self.q.shape[0] * self.groups

    def matrix_gradient(self, matrix: Tensor | None, config: Config) -> Tensor | None:
        """A buffer for a matrix's gradient: every token's, or W / M rows of sums for every tile of queries."""
        if matrix is None:
            return None
        shape = matrix.shape
        if matrix.ndim == 3:
            M = self.tile_heads()
            rows = cdiv(self.q.shape[1], config["BLOCK_T"]) * (max(16, M) // M)
            shape = torch.Size((self.q.shape[0], rows, *shape))
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)


TENSORS = _Inputs._fields.index("scale")
POINTERS = [f"{name}_ptr" for name in _Inputs._fields[:TENSORS]]
MATRICES = {"q_pre": "btn", "k_pre": "bsn", "q_post": "btn", "k_post": "bsn"}
STRIDES = {"q": "bth", "k": "bsg", "v": "bsg", "mask": "bhts", **MATRICES}


def _rows_as_stored(matrix: Tensor | None) -> Tensor | None:
    """The matrix, where there is one, with its two last axes contiguous."""
    if matrix is None or (matrix.stride(-1) == 1 and matrix.stride(-2) == matrix.shape[-1]):
        return matrix
    return matrix.contiguous()


def _dense_matrices(matrix: Tensor | None) -> Tensor | None:
    """The same with tokens' strides, 0 for a matrix that all share."""
    matrix = _rows_as_stored(matrix)
    if matrix is None:
        return None
    return matrix.as_strided((1, 1, *matrix.shape), (0, 0, *matrix.stride())) if matrix.ndim == 3 else matrix


class _Plans(NamedTuple):
    """How calls with one key are launched: row statistics and output, by whether the keys are split."""

    stats: dict[bool, Plan]
    out: dict[bool, Plan]


_PLANS: dict[Key, _Plans] = {}


def _plans(inputs: _Inputs) -> _Plans:
    arguments = inputs.arguments()

    def plans(kernel: Any, name: str) -> dict[bool, Plan]:
        config = inputs.config(name)
        return {split: Plan(kernel, config, arguments | {"SPLIT": split}) for split in (False, True)}

    return _Plans(
        plans(composed_attention_fwd_stats_kernel, "composed_attention_fwd_stats"),
        plans(composed_attention_fwd_out_kernel, "composed_attention_fwd_out"),
    )


def _run(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _Inputs(*given)
    out, shift, norm = inputs.outputs()
    if shift.numel() == 0 or inputs.k.shape[1] == 0 or out.numel() == 0:
        return out.zero_(), shift.zero_(), norm.zero_()
    key = inputs.key()
    plans = find_plan(_PLANS, key)
    if plans is None:
        dense = inputs.dense()
        if any(a is not b for a, b in zip(dense, given, strict=True)):
            return _run(*dense)
        plans = keep_plan(_PLANS, key, _plans(inputs))
    programs, splits = inputs.query_programs(plans.stats[False].config), inputs.splits
    if splits == 0:
        splits = splits_of_keys(programs, inputs.k.shape[1], out.device)
    shifts, norms, outs = shift, norm, out
    if splits > 1:
        shifts, norms = (torch.empty((splits, *shift.shape), dtype=torch.float32, device=out.device) for _ in range(2))
        outs = torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)
    changing = inputs.changing() | {"splits": splits}
    first, second = (of[splits > 1] for of in plans)
    with on_device(out):
        launch = first.launch(**changing, shift_ptr=shifts, norm_ptr=norms)
        launch.keep(launch.run[programs * splits, 1, 1](*launch.values, **launch.options))
        if splits > 1:
            _join(shifts, norms, shift, norm if norm.numel() else None)
        programs = inputs.query_programs(second.config)
        launch = second.launch(**changing, shift_ptr=shift, norm_ptr=norm, o_ptr=outs)
        launch.keep(launch.run[programs * splits, 1, 1](*launch.values, **launch.options))
    return (outs.sum(0).to(out.dtype) if splits > 1 else out), shift, norm


def _join(shifts: Tensor, sums: Tensor, shift: Tensor, norm: Tensor | None) -> None:
    """Maxima and denominators of the splits (splits, B, H, T) -> what the first kernel stores without splits."""
    highest = shifts.amax(0)
    highest = highest.masked_fill(highest.isinf(), 0.0)
    total = (sums * torch.exp2(shifts - highest)).sum(0)
    if norm is None:
        shift.copy_(torch.where(total > 0, highest + total.log2(), torch.inf))
    else:
        shift.copy_(highest)
        norm.copy_(torch.where(total > 0, 1.0 / total, 0.0))


_forward = Operator("attnzoo::composed_attention", _run, schema(_Inputs, 3))


@_forward.register_fake
def _forward_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Inputs(*given).outputs()


@operator(
    "attnzoo::composed_attention_backward",
    schema="(Tensor do, Tensor shift, Tensor norm, bool[] needed, Tensor?[] tensors, float scale, SymInt[] integers, "
    "bool[] flags) -> Tensor[]",
)
def _backward(do: Tensor, shift: Tensor, norm: Tensor, needed: list[bool], *given: Any) -> list[Tensor]:
    """Gradients of q, k, v, q_pre, k_pre, q_post, k_post; empty where there is no tensor or no need.

    needed: whether the gradients of q, q_pre and q_post are, and whether the others are.
    """
    inputs = _of_forward(*given)
    gradients = inputs.gradients(*needed)
    if do.numel() == 0 or inputs.k.numel() == 0 or shift.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    (dq, dk, dv, dq_pre, dk_pre, dq_post, dk_post), (need_queries, need_keys) = gradients, needed
    q, k, v, q_pre, k_pre, q_post, k_post = inputs[:7]
    B, S, D, DV = *k.shape[:2], k.shape[3], v.shape[3]
    queries, _, values = inputs.heads()
    do = dense_rows(do)
    arguments = {
        **inputs.arguments(), "do_ptr": do, "shift_ptr": shift, "norm_ptr": norm,
        "delta_ptr": torch.empty(shift.shape, dtype=torch.float32, device=do.device), **strides(do, "do", "bth"),
    }  # fmt: skip
    with on_device(q):
        config = inputs.config("composed_attention_bwd_delta")
        # The gradient of a matrix that all tokens share is stored as one sum per tile of queries.
        post = inputs.matrix_gradient(q_post, config) if need_queries else None
        launch = prepare(
            composed_attention_bwd_delta_kernel, (inputs.query_programs(config),),
            **arguments, dq_post_ptr=post, **strides(post, "dq_post", "btn"),
            SHARED_POST=q_post is not None and q_post.ndim == 3, **config.options(),
        )  # fmt: skip
        launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        if need_queries:
            config = inputs.config("composed_attention_bwd_dq")
            pre = inputs.matrix_gradient(q_pre, config)
            launch = prepare(
                composed_attention_bwd_dq_kernel, (inputs.query_programs(config),),
                **arguments, dq_ptr=dq, dq_pre_ptr=pre, **strides(pre, "dq_pre", "btn"),
                SHARED_PRE=q_pre is not None and q_pre.ndim == 3, **config.options(),
            )  # fmt: skip
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
            dq_pre = _summed(pre, q_pre, dq_pre)
            dq_post = _summed(post, q_post, dq_post)
        if need_keys:
            config = inputs.config("composed_attention_bwd_dkdv")
            # Heads that share a key or value store a gradient each.
            each_k, each_v = dk, dv
            if k.shape[2] != queries:
                each_k = torch.empty((B, S, queries, D), dtype=torch.float32, device=q.device)
            if v.shape[2] != values:
                each_v = torch.empty((B, S, values, DV), dtype=torch.float32, device=q.device)
            pre, post = inputs.matrix_gradient(k_pre, config), inputs.matrix_gradient(k_post, config)
            of_keys = {"dk_ptr": each_k, "dk_pre_ptr": pre}
            of_values = {"dv_ptr": each_v, "dk_post_ptr": post}
            one = keys_in_one_launch(inputs.tile_heads(), q.dtype)
            for written in (of_keys | of_values,) if one else (of_keys, of_values):
                launch = prepare(
                    composed_attention_bwd_dkdv_kernel, (inputs.key_programs(config),),
                    **arguments, **(dict.fromkeys((*of_keys, *of_values)) | written), **strides(pre, "dk_pre", "bsn"),
                    **strides(post, "dk_post", "bsn"), **config.options(),
                )  # fmt: skip
                launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
            dk_pre = _summed(pre, k_pre, dk_pre)
            dk_post = _summed(post, k_post, dk_post)
            if each_k is not dk:
                dk = each_k.view(B, S, k.shape[2], -1, D).sum(3).to(k.dtype)
            if each_v is not dv:
                dv = each_v.view(B, S, v.shape[2], -1, DV).sum(3).to(v.dtype)
    return [dq, dk, dv, dq_pre, dk_pre, dq_post, dk_post]


def _summed(parts: Tensor | None, matrix: Tensor | None, absent: Tensor) -> Tensor:
    """The kernels' float32 gradient of a matrix in its shape and dtype."""
    if parts is None or matrix is None:
        return absent
    return (parts.sum((0, 1)) if matrix.ndim == 3 else parts).to(matrix.dtype)


@_backward.register_fake
def _backward_fake(do: Tensor, shift: Tensor, norm: Tensor, needed: list[bool], *given: Any) -> list[Tensor]:
    return _of_forward(*given).gradients(*needed)


def _of_forward(tensors: list[Any], scale: float, integers: list[int], flags: list[bool]) -> _Inputs:
    """The forward operator's inputs, as the backward operator takes them."""
    return _Inputs._make((*tensors, scale, *integers, *flags))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output[1:])
    ctx.numbers = inputs[TENSORS:]


def _gradients(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, shift, norm = ctx.saved_tensors
    need = ctx.needs_input_grad
    if do is None:
        return (None,) * len(need)
    scale, *others = ctx.numbers
    needed = [need[0] or need[3] or need[5], need[1] or need[2] or need[4] or need[6]]
    gradients = _backward(do, shift, norm, needed, tensors, scale, others[:4], others[4:])
    wanted = [gradient if own else None for gradient, own in zip(gradients, need, strict=False)]
    return (*wanted, *(None,) * (len(need) - len(wanted)))


_forward.register_autograd(_gradients, setup_context=_setup_context)
