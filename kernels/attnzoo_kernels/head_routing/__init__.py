"""Attention of routed heads: operators and the public function.

Saved for the backward pass: the inputs, the output, the packed lists and two numbers of each (token, head) pair,
nothing of size T S. The backward pass runs three kernels (delta; dk and dv; dq and the gates') and is deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.head_routing.kernels import (
    head_routing_bwd_delta_kernel,
    head_routing_bwd_dkdv_kernel,
    head_routing_bwd_dq_kernel,
    head_routing_fwd_kernel,
    head_routing_pack_kernel,
)
from attnzoo_kernels.head_routing.tuning import TABLE
from attnzoo_kernels.launch import (
    arguments_of,
    as_int,
    dense_rows,
    empty_if,
    gradient_buffer,
    on_device,
    operator,
    positive_scale,
    precision,
    prepare,
    row_norm,
    schema,
    strides,
)
from attnzoo_kernels.tuning import Config, cdiv, padded, power_of_two

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
    out: Tensor = _forward(q, k, v, active, gates, as_int(lengths), as_int(first), as_int(last), scale)[0]
    return out


class _Inputs(NamedTuple):
    """What the operator takes, under the names of its kernels' arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    active: Tensor | None
    gates: Tensor | None
    lengths: Tensor | None
    first: Tensor | None
    last: Tensor | None
    scale: float

    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, G and the query heads of a group."""
        (B, T, H, _), G = self.q.shape, self.k.shape[2]
        return B, T, G, H // G

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Buffers for the output, the packed lists, and what is kept of each packed row.

        The lists are of the active rows of each batch row and key/value head: rows (B, G, T H / G) int32,
        token * (H / G) + head within the group, ascending, of which only the first start[..., T] are written; and
        start (B, G, T + 1) int32, the place in the list of each token's first row.
        """
        B, T, G, size = self.sizes()
        out = torch.empty((B, T, G * size, self.v.shape[3]), dtype=self.q.dtype, device=self.q.device)
        rows = torch.empty((B, G, T * size), dtype=torch.int32, device=self.q.device)
        start = torch.empty((B, G, T + 1), dtype=torch.int32, device=self.q.device)
        shift = torch.empty(rows.shape, dtype=torch.float32, device=self.q.device)
        return out, rows, start, shift, row_norm(shift, self.q.dtype)

    def gradients(self, need_queries: bool, need_keys: bool, need_gates: bool) -> list[Tensor]:
        """Buffers for what `_backward` returns."""
        return [
            gradient_buffer(self.q, need_queries or need_gates),
            gradient_buffer(self.k, need_keys),
            gradient_buffer(self.v, need_keys),
            empty_if(need_gates, tuple(self.q.shape[:3]), torch.float32, self.q.device),
        ]

    def arguments(self, rows: Tensor, start: Tensor) -> dict[str, Any]:
        """What the kernels of attention share."""
        _, T, G, size = self.sizes()
        D, DV = self.q.shape[3], self.v.shape[3]
        tensors: dict[str, Any] = dict(zip(_Inputs._fields[:TENSORS], self, strict=False))
        del tensors["active"]
        tensors |= {name: dense_rows(tensors[name]) for name in ("q", "k", "v")} | {"rows": rows, "start": start}
        return {
            **arguments_of(tensors, STRIDES), "T": T, "G": G, "scale": self.scale, "GROUP": size, "D": D, "DV": DV,
            "PRECISION": precision(self.q.dtype), "BLOCK_D": padded(D), "BLOCK_DV": padded(DV),
        }  # fmt: skip

    def config(self, kernel: str) -> Config:
        return TABLE.config(kernel, self.q.dtype, self.q.device, padded(max(self.q.shape[3], self.v.shape[3])))

    def row_grid(self, rows: int) -> tuple[int]:
        B, T, G, size = self.sizes()
        return (cdiv(T * size, rows) * B * G,)


TENSORS = _Inputs._fields.index("scale")
STRIDES = {"q": "bth", "k": "bsg", "v": "bsg", "gates": "bth"}


@operator("attnzoo::routed_attention", schema(_Inputs, 5))
def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the packed lists, and what is kept of each packed row; the host never waits for the device."""
    inputs = _Inputs(*given)
    out, rows, start, shift, norm = inputs.outputs()
    out.zero_()
    start.zero_()
    if rows.numel() == 0:
        return out, rows, start, shift, norm
    B, T, G, size = inputs.sizes()
    active = given[3]
    counts = active.unflatten(2, (G, size)).sum(-1, dtype=torch.int32).transpose(1, 2)
    torch.cumsum(counts, -1, dtype=torch.int32, out=start[..., 1:])
    with on_device(out):
        head_routing_pack_kernel[(cdiv(T, PACKED_AT_ONCE) * B * G,)](
            active.view(torch.uint8), start, rows, *active.stride(), T, G, GROUP=size, BLOCK_T=PACKED_AT_ONCE,
            BLOCK_M=power_of_two(size),
        )  # fmt: skip
        if out.numel():
            config = inputs.config("head_routing_fwd")
            launch = prepare(
                head_routing_fwd_kernel,
                inputs.row_grid(config["BLOCK_T"]),
                **inputs.arguments(rows, start),
                o_ptr=out,
                shift_ptr=shift,
                norm_ptr=norm,
                **config.options(),
            )
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return out, rows, start, shift, norm


@_forward.register_fake
def _forward_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _Inputs(*given).outputs()


@operator(
    "attnzoo::routed_attention_backward",
    schema="(Tensor do, Tensor out, Tensor rows, Tensor start, Tensor shift, Tensor norm, bool[] needed, "
    "Tensor?[] tensors, float scale) -> Tensor[]",
)
def _backward(
    do: Tensor, out: Tensor, rows: Tensor, start: Tensor, shift: Tensor, norm: Tensor, needed: list[bool],
    tensors: list[Any], scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v and, in float32, of gates.

    needed: whether the gradients of q, of k and v, and of gates are.
    """
    inputs = _Inputs._make((*tensors, scale))
    gradients = dq, dk, dv, dgates = inputs.gradients(*needed)
    need_queries, need_keys, need_gates = needed
    # Inactive pairs are never visited.
    dq.zero_()
    dgates.zero_()
    if do.numel() == 0:
        return [dq, dk.zero_(), dv.zero_(), dgates]
    B, T, G, size = inputs.sizes()
    do, DV, delta = dense_rows(do), do.shape[3], torch.empty_like(shift)
    arguments = {
        **inputs.arguments(rows, start), "do_ptr": do, "shift_ptr": shift, "norm_ptr": norm, "delta_ptr": delta,
        **strides(do, "do", "bth"),
    }  # fmt: skip
    with on_device(out):
        head_routing_bwd_delta_kernel[inputs.row_grid(PACKED_AT_ONCE)](
            out, do, start, rows, delta, *do.stride()[:3], T=T, G=G, GROUP=size, DV=DV, BLOCK_DV=padded(DV),
            BLOCK_T=PACKED_AT_ONCE,
        )  # fmt: skip
        if need_keys:
            config = inputs.config("head_routing_bwd_dkdv")
            launch = prepare(
                head_routing_bwd_dkdv_kernel,
                (cdiv(T, config["BLOCK_S"]) * B * G,),
                **arguments,
                dk_ptr=dk,
                dv_ptr=dv,
                **config.options(),
            )
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
        if need_queries or need_gates:
            config = inputs.config("head_routing_bwd_dq")
            launch = prepare(
                head_routing_bwd_dq_kernel,
                inputs.row_grid(config["BLOCK_T"]),
                **arguments,
                dq_ptr=dq,
                dgates_ptr=dgates if need_gates else None,
                **config.options(),
            )
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return gradients


@_backward.register_fake
def _backward_fake(*given: Any) -> list[Tensor]:
    *_, needed, tensors, scale = given
    return _Inputs._make((*tensors, scale)).gradients(*needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.scale = _Inputs(*inputs)._replace(active=None)
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, do: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, rows, start, shift, norm = ctx.saved_tensors
    need = dict(zip(_Inputs._fields, ctx.needs_input_grad, strict=True))
    dq, dk, dv, dgates = _backward(
        torch.zeros_like(out) if do is None else do, out, rows, start, shift, norm,
        [need["q"], need["k"] or need["v"], need["gates"]], tensors, ctx.scale,
    )  # fmt: skip
    gradients = {"q": dq, "k": dk, "v": dv}
    if need["gates"]:
        gradients["gates"] = dgates.to(tensors[_Inputs._fields.index("gates")].dtype)
    return tuple(gradients[name] if wanted else None for name, wanted in need.items())


_forward.register_autograd(_gradients, setup_context=_setup_context)
