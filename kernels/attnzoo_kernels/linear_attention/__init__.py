"""Linear attention with weights of block pairs: operators and public functions.

Saved for the backward pass: the inputs. Block states are computed again in it; nothing of size T T exists in either
pass, and both are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels.launch import as_int, dense_rows, on_device, operator, prepare, schema, stored_as
from attnzoo_kernels.linear_attention.finish import linear_attention_finish
from attnzoo_kernels.linear_attention.launches import Inputs, Passes
from attnzoo_kernels.linear_attention.step import linear_attention_step
from attnzoo_kernels.tuning import cdiv

__all__ = ["linear_attention", "linear_attention_finish", "linear_attention_states", "linear_attention_step"]

TENSORS = Inputs._fields.index("size")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    causal: bool,
    weights: Tensor | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    fresh: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_s w (q_t . k_s) v_s of q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) in blocks of `size` tokens.

    The meaning of q, k, v, size, causal, weights and state is that of
    `attnzoo.ops.linear_attention.linear_attention_chunked`. Gradients go to q, k, v, weights and state, once.

    Args:
        q: float16, bfloat16 or float32; k and v too, of the same dtype. Products of half precision go through tensor
            cores (float16 as TF32, whose range sums of features need), those of float32 are exact.
        k: S = T unless neither causal nor weights is given.
        v: values.
        size: tokens of a block.
        causal: no query sees a later key.
        weights: (1 or B, 1 or H, n, n) of pairs of n blocks, or None for 1.
        state: (B, G, D, Dv) of everything before; for weights None without starts.
        starts: (B, n + 1) integers, ascending: block i of row b holds tokens starts[b, i] .. starts[b, i + 1] - 1, at
            most `size`. Default: every `size` tokens. For not causal it needs weights.
        fresh: (B, n) boolean, with starts and weights None: blocks that see none before them.
        order: (T,) integers, a permutation: blocks go by it, token p of them is order[p] of the tensors.

    Returns:
        out (B, T, H, Dv) in float32, whatever the inputs are: these sums have no bound. For weights None and no starts
        the state after all keys (B, G, D, Dv), float32; else an empty tensor.

    Raises:
        ValueError: where a table's size is not that of the blocks, which the kernels would read beyond.
    """
    n = starts.shape[1] - 1 if starts is not None else max(1, cdiv(q.shape[1], size))
    if weights is not None and weights.shape[2:] != (n, n):
        raise ValueError(f"weights must be of {n} by {n} blocks, got {tuple(weights.shape)}")
    if (causal or weights is not None) and q.shape[1] != k.shape[1]:
        raise ValueError(f"k must have the {q.shape[1]} tokens of q, got {k.shape[1]}")
    if starts is not None and (starts.shape[0] != q.shape[0] or state is not None or (weights is None and not causal)):
        raise ValueError(
            f"starts must be (B, n + 1), without state and for not causal with weights, got {tuple(starts.shape)}"
        )
    if weights is not None:
        weights = weights.to(torch.float32)
    if state is not None:
        state = state.to(torch.float32).contiguous()
    out: tuple[Tensor, Tensor] = _forward(
        dense_rows(q), dense_rows(k), dense_rows(v), weights, state, as_int(starts), stored_as(fresh, torch.uint8),
        as_int(order), size, causal,
    )  # fmt: skip
    return out


def linear_attention_states(k: Tensor, v: Tensor, size: int) -> Tensor:
    """sum k_s^T v_s over each block of `size` tokens of k (B, S, G, D), v (B, S, G, Dv): (B, G, n, D, Dv), float32.

    No gradients.
    """
    states: Tensor = _states(dense_rows(k.detach()), dense_rows(v.detach()), size)
    return states


@operator("attnzoo::linear_attention_states")
def _states(k: Tensor, v: Tensor, size: int) -> Tensor:
    passes = Passes(Inputs(k, k, v, *(None,) * 5, size, True))
    states, (kernel, grid, arguments) = passes.states(k, v, dtype=torch.float32)
    if states.numel():
        with on_device(k):
            launch = prepare(kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return states


@_states.register_fake
def _states_fake(k: Tensor, v: Tensor, size: int) -> Tensor:
    return Passes(Inputs(k, k, v, *(None,) * 5, size, True)).states(k, v, dtype=torch.float32)[0]


@operator("attnzoo::linear_attention", schema(Inputs, 2))
def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*given)
    out, end = inputs.outputs()
    if inputs.q.shape[0] == 0 or inputs.q.shape[2] == 0:
        return out.zero_(), end.zero_()
    with on_device(out):
        for kernel, grid, arguments in Passes(inputs).forward(out, end):
            launch = prepare(kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return out, end


@_forward.register_fake
def _forward_fake(*given: Any) -> tuple[Tensor, Tensor]:
    return Inputs(*given).outputs()


@operator(
    "attnzoo::linear_attention_backward",
    schema="(Tensor do, Tensor? dend, bool[] needed, Tensor?[] tensors, SymInt size, bool causal) -> Tensor[]",
)
def _backward(
    do: Tensor, dend: Tensor | None, needed: list[bool], tensors: list[Any], size: int, causal: bool
) -> list[Tensor]:
    """Gradients of q, k, v, weights and state; empty where not needed."""
    inputs = Inputs._make((*tensors, size, causal))
    gradients = inputs.gradients(needed)
    if inputs.q.shape[0] == 0 or inputs.q.shape[2] == 0:
        return [gradient.zero_() for gradient in gradients]
    with on_device(do):
        for kernel, grid, arguments in Passes(inputs).backward(dense_rows(do), dend, gradients, needed):
            launch = prepare(kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return gradients


@_backward.register_fake
def _backward_fake(
    do: Tensor, dend: Tensor | None, needed: list[bool], tensors: list[Any], size: int, causal: bool
) -> list[Tensor]:
    return Inputs._make((*tensors, size, causal)).gradients(needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.size, ctx.causal = inputs[TENSORS:]


def _gradients(ctx: Any, do: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = Inputs._make((*ctx.saved_tensors, ctx.size, ctx.causal))
    need = [bool(wanted) for wanted in ctx.needs_input_grad[:5]]
    if do is None:
        do = torch.zeros((*inputs.q.shape[:3], inputs.v.shape[3]), dtype=torch.float32, device=inputs.q.device)
    if not (inputs.weights is None and inputs.starts is None):
        dend = None
    gradients = _backward(do, dend, need, list(inputs[:TENSORS]), inputs.size, inputs.causal)
    wanted = [gradient if own else None for gradient, own in zip(gradients, need, strict=True)]
    return (*wanted, *(None,) * (len(inputs) - len(wanted)))


_forward.register_autograd(_gradients, setup_context=_setup_context)
