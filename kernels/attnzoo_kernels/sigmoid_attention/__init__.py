"""Sigmoid attention of grouped heads: operators and the public function.

Saved for the backward pass: the inputs, nothing else. It runs two kernels (dk and dv; dq) and is deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.launch import (
    Key,
    Operator,
    Plan,
    arguments_of,
    as_int,
    chip,
    dense_rows,
    descriptor,
    empty_if,
    find_plan,
    keep_plan,
    layouts,
    on_device,
    operator,
    positive_scale,
    precision,
    prepare,
    schema,
    stored_as,
    strides,
)
from attnzoo_kernels.sigmoid_attention.kernels import (
    sigmoid_attention_bwd_dkdv_kernel,
    sigmoid_attention_bwd_dq_kernel,
    sigmoid_attention_fwd_kernel,
)
from attnzoo_kernels.sigmoid_attention.tuning import TABLE
from attnzoo_kernels.tuning import Config, cdiv, padded


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    logit_bias: Tensor | float,
    scale: float,
    causal: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    key_positions: Tensor | None = None,
    query_start: int | None = None,
) -> Tensor:
    """Sigmoid attention of q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv); returns (B, T, H, Dv).

    The meaning of the arguments is that of `attnzoo.ops.sigmoid_attention`, and of masks that of
    `attnzoo_kernels.softmax_attention`. Gradients go to q, k, v and logit_bias, once.

    Args:
        q: float16, bfloat16 or float32; D and Dv up to 256.
        k: G divides H.
        v: of q's dtype.
        logit_bias: added to all scores of a query, a number or broadcastable to (B, H, T).
        scale: factor of the products.
        causal: key index j <= query index i.
        softcap: bound of the logits.
        alibi_slopes: (H,).
        window: keys with i - j < window (|i - j| if not causal).
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        documents: first and last (B, T), integers: query t sees keys first <= j < last. Needs T = S.
        key_positions: (S,) index of every key. Default 0 .. S - 1.
        query_start: index of the first query. Default S - T.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    scale, q, _ = positive_scale(scale, q)
    if not isinstance(logit_bias, Tensor):
        logit_bias = torch.full((), logit_bias, device=q.device)
    first, last = (None, None) if documents is None else documents
    out: Tensor = _forward(
        q, k, v, logit_bias.float().expand(B, H, T), None if mask is None else mask.expand(B, H, T, S),
        stored_as(alibi_slopes, torch.float32), as_int(lengths), as_int(first), as_int(last), as_int(key_positions),
        scale, float(softcap or 0.0), window or 0, S - T if query_start is None else query_start, causal,
    )  # fmt: skip
    return out


class _Inputs(NamedTuple):
    """What the operator takes, under the names of its kernels' arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    lengths: Tensor | None
    first: Tensor | None
    last: Tensor | None
    positions: Tensor | None
    scale: float
    softcap: float
    window: int
    query_start: int
    causal: bool

    def output(self) -> Tensor:
        """A buffer for the output."""
        return torch.empty((*self.q.shape[:3], self.v.shape[3]), dtype=self.q.dtype, device=self.q.device)

    def gradients(self, need_queries: bool, need_keys: bool, need_bias: bool) -> list[Tensor]:
        """Buffers for what `_backward` returns."""
        (B, T, H, D), (_, S, G, DV) = self.q.shape, self.v.shape
        dtype, device = self.q.dtype, self.q.device
        return [
            empty_if(need_queries or need_bias, (B, T, H, D), dtype, device),
            empty_if(need_keys, (B, S, G, D), dtype, device),
            empty_if(need_keys, (B, S, G, DV), dtype, device),
            empty_if(need_bias, (B, H, T), torch.float32, device),
        ]

    def arguments(self) -> dict[str, Any]:
        """What all kernels share."""
        (_, T, H, D), (_, S, G, DV) = self.q.shape, self.v.shape
        tensors: dict[str, Any] = dict(zip(_Inputs._fields[:TENSORS], self, strict=False))
        for name in ("q", "k", "v"):
            tensors[name] = dense_rows(tensors[name])
        if self.mask is not None:
            tensors["mask"] = self.mask.view(torch.uint8)
        return {
            **arguments_of(tensors, STRIDES), **dict(zip(_Inputs._fields[TENSORS:-1], self[TENSORS:-1], strict=True)),
            "T": T, "S": S, "H": H, "GROUP": H // G, "D": D, "DV": DV, "CAUSAL": self.causal,
            "SOFTCAP": self.softcap != 0.0, "WINDOW": self.window > 0, "PRECISION": precision(self.q.dtype),
            "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        }  # fmt: skip

    def key(self) -> Key:
        """What decides the plan of the forward kernel: everything but addresses and the numbers of keys and queries."""
        k, v = self.k, self.v
        return (
            layouts((self.q,)), k.shape[2], k.stride(), v.shape[3], v.stride(), self.bias.stride(), chip(k.device),
            *[x is None for x in self[:TENSORS]], k.shape[1] == 1, self.softcap != 0.0, self.window > 0, self.causal,
        )  # fmt: skip

    def config(self, kernel: str) -> Config:
        """Tiles of a kernel."""
        kernel += " dense" if self.mask is not None else ""
        return TABLE.config(kernel, self.q.dtype, self.q.device, padded(max(self.q.shape[3], self.v.shape[3])))


TENSORS = _Inputs._fields.index("scale")
STRIDES = {"q": "bth", "k": "bsg", "v": "bsg", "bias": "bht", "mask": "bhts"}


_PLANS: dict[Key, Plan] = {}


def _run(*given: Any) -> Tensor:
    inputs = _Inputs(*given)
    out = inputs.output()
    (B, T, H, _), S = out.shape, inputs.k.shape[1]
    if S == 0 or out.numel() == 0:
        return out.zero_()
    inputs = inputs._replace(**{name: dense_rows(getattr(inputs, name)) for name in ("q", "k", "v")})
    key = inputs.key()
    plan = find_plan(_PLANS, key)
    if plan is None:
        plan = Plan(sigmoid_attention_fwd_kernel, inputs.config("sigmoid_attention_fwd"), inputs.arguments())
        plan = keep_plan(_PLANS, key, plan)
    changing: dict[str, Any] = {f"{name}_ptr": x for name, x in zip(_Inputs._fields[:TENSORS], inputs, strict=False)}
    changing |= dict(zip(_Inputs._fields[TENSORS:-1], inputs[TENSORS:-1], strict=True))
    if inputs.mask is not None:
        changing |= {"mask_ptr": inputs.mask.view(torch.uint8), **strides(inputs.mask, "mask", "bhts")}
    elif inputs.positions is None:
        changing |= {f"{name}_desc": descriptor(changing[f"{name}_ptr"], plan.config["BLOCK_S"]) for name in "kv"}
    launch = plan.launch(**changing, S=S, o_ptr=out)
    with on_device(out):
        launch.keep(launch.run[cdiv(T, plan.config["BLOCK_T"]) * B * H, 1, 1](*launch.values, **launch.options))
    return out


_forward = Operator("attnzoo::sigmoid_attention", _run, schema(_Inputs, 1))


@_forward.register_fake
def _forward_fake(*given: Any) -> Tensor:
    return _Inputs(*given).output()


@operator(
    "attnzoo::sigmoid_attention_backward",
    schema="(Tensor do, bool[] needed, Tensor?[] tensors, float[] floats, SymInt[] sizes, bool causal) -> Tensor[]",
)
def _backward(do: Tensor, needed: list[bool], *given: Any) -> list[Tensor]:
    """Gradients of q, k, v and of the bias; needed: whether those of queries, of keys and values, of the bias are."""
    inputs = _of_forward(*given)
    gradients = dq, dk, dv, dbias = inputs.gradients(*needed)
    (B, T, H, _), (S, G) = inputs.q.shape, inputs.k.shape[1:3]
    if do.numel() == 0 or inputs.k.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    do = dense_rows(do)
    arguments = {**inputs.arguments(), "do_ptr": do, **strides(do, "do", "bth")}
    need_queries, need_keys, need_bias = needed
    with on_device(do):
        if need_keys:
            config = inputs.config("sigmoid_attention_bwd_dkdv")
            launch = prepare(
                sigmoid_attention_bwd_dkdv_kernel,
                (cdiv(S, config["BLOCK_S"]) * B * G,),
                **arguments,
                dk_ptr=dk,
                dv_ptr=dv,
                **config.options(),
            )
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        if need_queries or need_bias:
            config = inputs.config("sigmoid_attention_bwd_dq")
            launch = prepare(
                sigmoid_attention_bwd_dq_kernel,
                (cdiv(T, config["BLOCK_T"]) * B * H,),
                **arguments,
                dq_ptr=dq,
                dbias_ptr=dbias if need_bias else None,
                **config.options(),
            )
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return gradients


@_backward.register_fake
def _backward_fake(do: Tensor, needed: list[bool], *given: Any) -> list[Tensor]:
    return _of_forward(*given).gradients(*needed)


def _of_forward(tensors: list[Any], floats: list[float], sizes: list[int], causal: bool) -> _Inputs:
    """The forward operator's inputs, as the backward operator takes them."""
    return _Inputs._make((*tensors, *floats, *sizes, causal))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def _gradients(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    need = dict(zip(_Inputs._fields, ctx.needs_input_grad, strict=True))
    scale, softcap, *sizes, causal = ctx.numbers
    needed = [need["q"], need["k"] or need["v"], need["bias"]]
    found = _backward(do, needed, list(ctx.saved_tensors), [scale, softcap], sizes, causal)
    gradients = dict(zip(("q", "k", "v", "bias"), found, strict=True))
    return tuple(gradients[name] if wanted else None for name, wanted in need.items())


_forward.register_autograd(_gradients, setup_context=_setup_context)
