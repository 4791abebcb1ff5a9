"""Softmax attention of grouped heads: operators and the public function.

Saved for the backward pass: the inputs, the output and two numbers of each row, nothing of size T S. The backward pass
runs three kernels (delta; dk and dv; dq) and is deterministic.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.launch import (
    Key,
    Launch,
    Operator,
    Plan,
    arguments_of,
    as_int,
    chip,
    dense_rows,
    descriptor,
    empty_if,
    find_plan,
    gradient_buffer,
    keep_plan,
    layouts,
    on_device,
    operator,
    positive_scale,
    precision,
    prepare,
    row_norm,
    schema,
    stored_as,
    strides,
)
from attnzoo_kernels.softmax_attention.kernels_bwd import (
    softmax_attention_bwd_delta_kernel,
    softmax_attention_bwd_dkdv_kernel,
    softmax_attention_bwd_dq_kernel,
)
from attnzoo_kernels.softmax_attention.kernels_fwd import softmax_attention_decay_kernel, softmax_attention_fwd_kernel
from attnzoo_kernels.softmax_attention.pieces import DECAY_WIDTH
from attnzoo_kernels.softmax_attention.tuning import LINES, TABLE
from attnzoo_kernels.tuning import Config, cdiv, padded

LOG2E = 1.4426950408889634
ROWS = 32
"""Queries of a program that computes delta."""


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
    q_rope: Tensor | None = None,
    k_rope: Tensor | None = None,
    head_scale: Tensor | None = None,
    bias: Tensor | None = None,
    decay: Tensor | None = None,
    output_gate: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    key_positions: Tensor | None = None,
    query_start: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, H, D) over k (B, S, G, D), v (B, S, G, Dv).

    The meaning of the arguments is that of `attnzoo.ops.softmax_attention`. Gradients go to q, k, v, q_rope, k_rope,
    bias, decay, output_gate, sinks and head_scale, once.

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
        q_rope: (B, T, H, R), with k_rope a part of the score whose keys all heads share.
        k_rope: (B, S, 1, R).
        head_scale: (H,) or (B, H).
        bias: added to the scores, broadcastable to (B, H, T, S). Its gradient takes float32 (B, H, T, S).
        decay: (B, H, S) cumulated log gates c of the keys, float32: c_i - c_j is added to scores. The queries are among
            the keys. Not with a softcap or sinks.
        output_gate: logits of a gate of the outputs, (B, T, H, Dv) or (B, T, H, 1).
        mask: boolean, broadcastable to (B, H, T, S), True = may attend.
        lengths: (B,) integers; keys j < lengths[b] are visible.
        documents: first and last (B, T), integers: query t sees keys first <= j < last. Needs T = S.
        key_positions: (S,) index of every key. Default 0 .. S - 1.
        query_start: index of the first query. Default S - T.

    Returns:
        out (B, T, H, Dv) in q's dtype, and the log-sum-exp (B, H, T) of every query's scores in float32, with the sink,
        -inf where nothing is visible. With a decay it leaves the query's own c_i out.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    scale, q, q_rope = positive_scale(scale, q, q_rope)
    if sinks is not None and not isinstance(sinks, Tensor):
        sinks = torch.full((H,), float(sinks), device=q.device)
    if head_scale is not None:
        head_scale = head_scale.float().expand(B, H)
    first, last = (None, None) if documents is None else documents
    out, lse, *_ = _forward(
        q, k, v, q_rope, k_rope, output_gate, stored_as(decay, torch.float32) if k.shape[1] else None,
        None if bias is None else bias.expand(B, H, T, S), None if mask is None else mask.expand(B, H, T, S),
        stored_as(alibi_slopes, torch.float32), stored_as(sinks, torch.float32), head_scale, as_int(lengths),
        as_int(first), as_int(last), as_int(key_positions), scale, float(softcap or 0.0), window or 0, sink_tokens,
        S - T if query_start is None else query_start, causal,
    )  # fmt: skip
    return out, lse


class _Inputs(NamedTuple):
    """What the operator takes, under the names of its kernels' arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Tensor | None
    k_rope: Tensor | None
    output_gate: Tensor | None
    decay: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    head_scale: Tensor | None
    lengths: Tensor | None
    first: Tensor | None
    last: Tensor | None
    positions: Tensor | None
    scale: float
    softcap: float
    window: int
    sink_tokens: int
    query_start: int
    causal: bool

    def sizes(self) -> tuple[int, ...]:
        """B, T, S, H, G, D, Dv and R."""
        (B, T, H, D), (_, S, G, _) = self.q.shape, self.k.shape
        return B, T, S, H, G, D, self.v.shape[3], 0 if self.q_rope is None else self.q_rope.shape[3]

    def outputs(self, trains: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Buffers for the output, the log-sum-exp, what is kept of each row, and the output before a gate."""
        B, T, H, _ = self.q.shape
        out = torch.empty((B, T, H, self.v.shape[3]), dtype=self.q.dtype, device=self.q.device)
        lse, shift = (torch.empty((B, H, T), dtype=torch.float32, device=self.q.device) for _ in range(2))
        plain = empty_if(trains and self.output_gate is not None, tuple(out.shape), out.dtype, out.device)
        return out, lse, shift, row_norm(shift, self.q.dtype), plain

    def gradients(
        self, need_queries: bool, need_keys: bool, need_bias: bool, need_head_scale: bool, need_decay: bool,
        need_gate: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Buffers for what `_backward` returns."""
        B, T, S, H, G, D, DV, R = self.sizes()
        dtype, device = self.q.dtype, self.q.device
        queries = need_queries or need_bias or need_head_scale or need_decay
        return [
            empty_if(queries, (B, T, H, D), dtype, device),
            empty_if(need_keys or need_decay, (B, S, G, D), dtype, device),
            empty_if(need_keys or need_decay, (B, S, G, DV), dtype, device),
            empty_if(queries and R > 0, (B, T, H, R), dtype, device),
            empty_if((need_keys or need_decay) and R > 0, (B, G, S, R), torch.float32, device),
            empty_if(need_bias, (B, H, T, S), torch.float32, device),
            empty_if(need_head_scale or need_decay, (B, H, T), torch.float32, device),
            empty_if(True, (B, H, T), torch.float32, device),
            empty_if(need_decay, (B, H, S), torch.float32, device),
            torch.empty(0, device=device) if self.output_gate is None else gradient_buffer(self.output_gate, need_gate),
        ]

    def arguments(self) -> dict[str, Any]:
        """What the forward kernel and the two large backward kernels share: all but sinks and gate."""
        _, T, S, H, G, D, DV, R = self.sizes()
        tensors: dict[str, Any] = dict(zip(_Inputs._fields[:TENSORS], self, strict=False))
        del tensors["sinks"], tensors["output_gate"]
        for name in ("q", "k", "v", "q_rope", "k_rope"):
            tensors[name] = dense_rows(tensors[name])
        if self.mask is not None:
            tensors["mask"] = self.mask.view(torch.uint8)
        return {
            **arguments_of(tensors, STRIDES), **dict(zip(_Inputs._fields[TENSORS:-1], self[TENSORS:-1], strict=True)),
            "T": T, "S": S, "H": H, "GROUP": H // G, "decay_factor": self.decay_factor(), "D": D, "DV": DV, "R": R,
            "CAUSAL": self.causal,
            "SOFTCAP": self.softcap != 0.0, "WINDOW": self.window > 0,
            "SINK_TOKENS": self.window > 0 and self.sink_tokens > 0, "PRECISION": precision(self.q.dtype),
            "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "BLOCK_R": padded(R),
        }  # fmt: skip

    def decay_factor(self) -> float:
        """What turns a decay's features into parts of products, or in float32 the decay itself.

        In half precision a power of two that keeps the features in float16's range, whatever the scale.
        """
        if self.q.dtype == torch.float32:
            return 1 / self.scale
        return 2.0 ** max(-14, min(15, round(math.log2(16 / self.scale))))

    def features(self) -> tuple[Tensor | None, list[Launch]]:
        """In half precision, a buffer (B, S, H, DECAY_WIDTH) of what the decay adds to scores, and what fills it."""
        if self.decay is None or self.q.dtype == torch.float32:
            return None, []
        B, H, S = self.decay.shape
        features = torch.empty((B, H, S, DECAY_WIDTH.value), dtype=self.q.dtype, device=self.q.device)
        arguments = {
            "decay_ptr": self.decay, "features_ptr": features, "S": S,
            "factor": 1 / (self.scale * self.decay_factor()), "BLOCK_S": DECAY_BLOCK,
        }  # fmt: skip
        fill = softmax_attention_decay_kernel, (cdiv(S, DECAY_BLOCK) * B * H,), arguments
        return features.transpose(1, 2), [fill]

    def gate(self) -> dict[str, Any]:
        """The gate as arguments of a kernel, and its numbers a head: 0 without one."""
        gate = dense_rows(self.output_gate)
        width = 0 if gate is None else gate.shape[3]
        return {"output_gate_ptr": gate, **strides(gate, "output_gate", "bth"), "GATES": width}

    def config(self, kernel: str, grouped: bool = False) -> Config:
        _, _, _, _, _, D, DV, R = self.sizes()
        if self.bias is not None or self.mask is not None:
            kernel += " dense"
        elif self.decay is not None and f"{kernel} decay" in LINES:
            kernel += " decay"
        elif grouped:
            kernel += " grouped"
        return TABLE.config(kernel, self.q.dtype, self.q.device, padded(max(D, DV)) + (padded(R) if R else 0))


TENSORS = _Inputs._fields.index("scale")
READ_DENSE = _Inputs._fields.index("decay")
DECAY_BLOCK = 128
"""Keys of a program that prepares the decay."""

STRIDES = {
    "q": "bth", "k": "bsg", "v": "bsg", "q_rope": "bth", "k_rope": "bs", "bias": "bhts", "mask": "bhts",
    "head_scale": "bh",
}  # fmt: skip


_PLANS: dict[Key, Plan] = {}
POINTERS = [f"{name}_ptr" for name in _Inputs._fields[:TENSORS]]


def _run(*given: Any, trains: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _Inputs(*given)
    outputs = out, lse, shift, norm, plain = inputs.outputs(trains)
    if lse.numel() == 0:
        return outputs
    key = layouts(given[:TENSORS]), given[TENSORS:], chip(out.device)
    plan = find_plan(_PLANS, key)
    if plan is None:
        dense = [dense_rows(x) for x in given[:READ_DENSE]]
        if any(a is not b for a, b in zip(dense, given, strict=False)):
            return _run(*dense, *given[READ_DENSE:], trains=trains)
        config = inputs.config("softmax_attention_fwd")
        plan = keep_plan(_PLANS, key, Plan(softmax_attention_fwd_kernel, config, inputs.arguments() | inputs.gate()))
    B, T, H = out.shape[:3]
    pointers: dict[str, Any] = dict(zip(POINTERS, given, strict=False))
    features, fills = inputs.features()
    pointers["features_ptr"] = features
    if inputs.bias is None and inputs.mask is None and inputs.positions is None:
        # Beside a tensor that is read for every pair, descriptors save nothing.
        block_s = plan.config["BLOCK_S"]
        of = {"k_desc": inputs.k, "v_desc": inputs.v, "features_desc": features}
        pointers |= {name: None if x is None else descriptor(x, block_s) for name, x in of.items()}
    if inputs.mask is not None:
        pointers["mask_ptr"] = inputs.mask.view(torch.uint8)
    kept = plain if plain.numel() else None
    launch = plan.launch(**pointers, o_ptr=out, plain_ptr=kept, lse_ptr=lse, shift_ptr=shift, norm_ptr=norm)
    with on_device(out):
        for kernel, grid, arguments in fills:
            fill = prepare(kernel, grid, **arguments)
            fill.keep(fill.run[fill.grid](*fill.values, **fill.options))
        launch.keep(launch.run[cdiv(T, plan.config["BLOCK_T"]) * B * H, 1, 1](*launch.values, **launch.options))
    return outputs


_forward = Operator("attnzoo::softmax_attention", _run, schema(_Inputs, 5), alone=partial(_run, trains=False))


@_forward.register_fake
def _forward_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _Inputs(*given).outputs()


@operator(
    "attnzoo::softmax_attention_backward",
    schema="(Tensor do, Tensor out, Tensor shift, Tensor norm, Tensor? dlse, bool[] needed, Tensor?[] tensors, "
    "float[] floats, SymInt[] sizes, bool causal) -> Tensor[]",
)
def _backward(
    do: Tensor, out: Tensor, shift: Tensor, norm: Tensor, dlse: Tensor | None, needed: list[bool], *given: Any
) -> list[Tensor]:
    """Gradients of q, k, v, q_rope, k_rope (per group, float32), bias (full size) and of head_scale's rows, and more.

    The last three are delta and the gradients of decay and gate. out is the output before a gate. needed: whether the
    gradients of queries, of keys and values, of the bias, of head_scale, of the decay and of the gate are.
    """
    inputs = _of_forward(*given)
    gradients = inputs.gradients(*needed)
    dq, dk, dv, dq_rope, dk_rope, dbias, r, delta, ddecay, dgate = gradients
    B, T, S, H, G, _, DV, R = inputs.sizes()
    if do.numel() == 0 or inputs.k.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    need_queries, need_keys, need_bias, need_head_scale, need_decay, need_gate = needed
    given_do = dense_rows(do)
    do = given_do if inputs.output_gate is None else torch.empty_like(out)
    with on_device(out):
        launch = prepare(
            softmax_attention_bwd_delta_kernel, (cdiv(T, ROWS) * B * H,),
            **arguments_of({"o": out, "do": given_do}, {"o": "bth", "do": "bth"}), **inputs.gate(), delta_ptr=delta,
            da_ptr=None if do is given_do else do, dgate_ptr=dgate if need_gate else None, T=T, H=H, DV=DV,
            BLOCK_DV=padded(DV), BLOCK_T=ROWS,
        )  # fmt: skip
        launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        features, fills = inputs.features()
        for kernel, grid, arguments in fills:
            launch = prepare(kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        arguments = {
            **inputs.arguments(), "features_ptr": features, "do_ptr": do, "shift_ptr": shift, "norm_ptr": norm,
            "delta_ptr": delta, **strides(do, "do", "bth"),
        }  # fmt: skip
        if dlse is not None:
            delta -= dlse
        if need_keys or need_decay:
            config = inputs.config("softmax_attention_bwd_dkdv", grouped=G < H)
            launch = prepare(
                softmax_attention_bwd_dkdv_kernel, (cdiv(S, config["BLOCK_S"]) * B * G,),
                **arguments, dk_ptr=dk, dv_ptr=dv, dk_rope_ptr=dk_rope if R else None,
                ddecay_ptr=ddecay if need_decay else None, **config.options(),
            )  # fmt: skip
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        if need_queries or need_bias or need_head_scale or need_decay:
            config = inputs.config("softmax_attention_bwd_dq")
            if need_bias:
                dbias.zero_()
            launch = prepare(
                softmax_attention_bwd_dq_kernel, (cdiv(T, config["BLOCK_T"]) * B * H,),
                **arguments, dq_ptr=dq, dq_rope_ptr=dq_rope if R else None, dbias_ptr=dbias if need_bias else None,
                r_ptr=r if need_head_scale or need_decay else None, **config.options(),
            )  # fmt: skip
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    if need_decay and inputs.positions is None:
        # A row's sum is 0, but for the rounding of out in delta, which the keys' part alone would add up over rows.
        rows = (r if inputs.head_scale is None else r * inputs.head_scale[..., None]) - delta
        ddecay[..., inputs.query_start : inputs.query_start + T] += rows if dlse is None else rows - dlse
    return gradients


@_backward.register_fake
def _backward_fake(
    do: Tensor, out: Tensor, shift: Tensor, norm: Tensor, dlse: Tensor | None, needed: list[bool], *given: Any
) -> list[Tensor]:
    return _of_forward(*given).gradients(*needed)


def _of_forward(tensors: list[Any], floats: list[float], sizes: list[int], causal: bool) -> _Inputs:
    """The forward operator's inputs, as the backward operator takes them."""
    return _Inputs._make((*tensors, *floats, *sizes, causal))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    out, _, shift, norm, plain = output
    ctx.save_for_backward(*inputs[:TENSORS], out if plain.numel() == 0 else plain, shift, norm)
    ctx.numbers = inputs[TENSORS:]


def _gradients(ctx: Any, do: Tensor | None, dlse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, shift, norm = ctx.saved_tensors
    inputs = _Inputs._make((*tensors, *ctx.numbers))
    scale, softcap, *sizes, causal = ctx.numbers
    need = dict(zip(_Inputs._fields, ctx.needs_input_grad, strict=True))
    keys = need["k"] or need["v"] or need["k_rope"]
    others = [need[name] for name in ("bias", "head_scale", "decay", "output_gate")]
    needed = [need["q"] or need["q_rope"], keys, *others]
    dq, dk, dv, dq_rope, dk_rope, dbias, r, delta, ddecay, dgate = _backward(
        torch.zeros_like(out) if do is None else do, out, shift, norm, dlse, needed, tensors, [scale, softcap], sizes,
        causal,
    )  # fmt: skip
    gradients = {"q": dq, "k": dk, "v": dv, "q_rope": dq_rope, "decay": ddecay, "output_gate": dgate}
    if need["k_rope"]:
        gradients["k_rope"] = dk_rope.sum(1).unsqueeze(2).to(inputs.k.dtype)
    if inputs.bias is not None:
        gradients["bias"] = dbias.to(inputs.bias.dtype)
    if inputs.head_scale is not None and need["head_scale"]:
        gradients["head_scale"] = r.sum(-1, dtype=torch.float64).to(inputs.head_scale.dtype)
    if inputs.sinks is not None and need["sinks"]:
        # The sink has a weight like a key's and no value: it only takes weight from the others.
        taken = torch.exp2(inputs.sinks[:, None] * LOG2E - shift) * delta
        if norm.numel():
            taken *= norm
        gradients["sinks"] = -taken.sum((0, 2), dtype=torch.float64).to(inputs.sinks.dtype)
    return tuple(gradients[name] if wanted else None for name, wanted in need.items())


_forward.register_autograd(_gradients, setup_context=_setup_context)
