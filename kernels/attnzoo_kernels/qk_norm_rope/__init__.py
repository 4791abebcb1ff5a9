"""What happens to a head vector between its projection and attention, in one pass over memory.

With x a vector of z (B, T, N, D), n a norm weight and (cos, sin) rotary tables:

    x <- x W^T    or    x <- 2 ((x Wup^T) * sigmoid(x Wgate^T)) Wdown^T     shared head map (arXiv:2510.23052)
    x <- x / sqrt(mean(x^2) + eps) * n                                      RMS norm of queries or keys
    x <- cos x + sin partner(x)   on the first r features                   rotation (arXiv:2104.09864)

Any of the three may be absent. Unfused, each of them reads and writes the whole tensor. Products run in z's dtype,
everything else and every sum in float32.

Saved for the backward pass: z and the weights. It recomputes the map's output where the norm needs it and the hidden
features where the gated map does, and holds one tensor of z's size beside dz where matrices need a gradient after a
norm or a rotation. Gradients of matrices are sums over all B T N vectors, taken by a fixed number of
programs, each over its own tiles in order, and then over the programs: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from attnzoo_kernels.launch import (
    Key,
    Launch,
    Operator,
    Plan,
    chip,
    dense_rows,
    find_plan,
    gradient_buffer,
    keep_plan,
    layouts,
    on_device,
    operator,
    prepare,
    schema,
    strides,
)
from attnzoo_kernels.qk_norm_rope.kernels import (
    qk_norm_rope_bwd_hidden_kernel,
    qk_norm_rope_bwd_input_kernel,
    qk_norm_rope_bwd_out_kernel,
    qk_norm_rope_fwd_kernel,
)
from attnzoo_kernels.qk_norm_rope.pieces import GATED, HALF, INTERLEAVED, LINEAR, NO_MAP, REGROUPED
from attnzoo_kernels.qk_norm_rope.tuning import config_for
from attnzoo_kernels.tuning import Config, cdiv, padded

MAX_WIDTH = 256
MAX_ROWS = 2**31 - 1024
ROW_PROGRAMS = 1024
MATRIX_PROGRAMS = 128

_STYLES = {
    "half": (HALF.value, HALF.value),
    "interleaved": (INTERLEAVED.value, INTERLEAVED.value),
    "interleaved_to_half": (INTERLEAVED.value, REGROUPED.value),
}
_MAPS = {"none": NO_MAP.value, "linear": LINEAR.value, "gated": GATED.value}


def qk_norm_rope(
    z: Tensor,
    *,
    linear: Tensor | None = None,
    mlp: tuple[Tensor, Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    style: str = "half",
) -> Tensor:
    """Head map, RMS norm and rotation of z (B, T, N, D), each of them optional, in one pass; (B, T, N, D) in z's dtype.

    Differentiable once, in z and in every weight. z may have any strides; it is copied only where its last one is
    not 1. The result is contiguous. With no option given z itself comes back.

    Args:
        z: projected heads; float16, bfloat16 or float32, D at most 256.
        linear: (D, D), the map z linear^T (equation 5 of arXiv:2510.23052).
        mlp: instead, up, gate and down, each (D, D): 2 ((z up^T) * sigmoid(z gate^T)) down^T (equation 9).
        norm_weight: (D,), for x / sqrt(mean(x^2) + norm_eps) * norm_weight after the map.
        norm_eps: not negative.
        cos: the first table of `attnzoo.rotary`, a cos of each of the first r features: (T, r), (1, T, r) or (B, T, r)
            in float32. Both members of a pair have the same.
        sin: its second table, a sin with the sign of the feature's place in its pair.
        style: which features pair up: "half", "interleaved" or "interleaved_to_half", as `attnzoo.rotary.Rotary` says.

    Weights may have another dtype than z, as they do under autocast: matrices are rounded to z's. Their gradients come
    in their own.

    Raises:
        ValueError: for an argument outside its rule, naming argument, rule and value.
    """
    if mlp is not None and len(mlp) != 3:
        raise ValueError(f"mlp must hold up, gate and down, got {len(mlp)} entries")
    up, gate, down = (None, None, None) if mlp is None else mlp
    if linear is not None and mlp is not None:
        raise ValueError("mlp must be None when linear is given, got both")
    if z.dim() != 4:
        raise ValueError(f"z must have shape (B, T, N, D), got {tuple(z.shape)}")
    if z.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"z must be float16, bfloat16 or float32, got {z.dtype}")
    B, T, N, D = z.shape
    if not 1 <= D <= MAX_WIDTH:
        raise ValueError(f"z must have a last dimension of 1 to {MAX_WIDTH}, got {D}")
    if B * T * N > MAX_ROWS:
        raise ValueError(f"z must hold at most {MAX_ROWS} head vectors, got {B * T * N}")
    for name, weight in (("linear", linear), ("mlp[0]", up), ("mlp[1]", gate), ("mlp[2]", down)):
        _check_weight(name, weight, (D, D), z)
    _check_weight("norm_weight", norm_weight, (D,), z)
    if norm_eps < 0:
        raise ValueError(f"norm_eps must not be negative, got {norm_eps}")
    if style not in _STYLES:
        raise ValueError(f"style must be one of {', '.join(map(repr, _STYLES))}, got {style!r}")
    _check_tables(z, cos, sin)
    if all(option is None for option in (linear, mlp, norm_weight, cos)):
        return z
    given = z, linear if mlp is None else down, up, gate, norm_weight, cos, sin
    y: Tensor = _forward(*given, float(norm_eps), style)
    return y


class _Inputs(NamedTuple):
    """What the operator takes; out is the matrix that makes the map's output."""

    z: Tensor
    out: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    norm: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    eps: float
    style: str

    def head_map(self) -> str:
        return "none" if self.out is None else "linear" if self.up is None else "gated"

    def pairs(self) -> int:
        """Pairs of features that are rotated."""
        return 0 if self.cos is None else self.cos.shape[-1] // 2

    def config(self, kernel: str) -> Config:
        return config_for(f"{kernel} {self.head_map()}", self.z.shape[3], self.z.dtype, self.z.device)

    def gradients(self, needed: list[bool]) -> list[Tensor]:
        """Buffers for the gradients of z, out, up, gate and norm; empty where not needed."""
        return [
            gradient_buffer(self.z if given is None else given, wanted and given is not None)
            for given, wanted in zip(self[:5], needed, strict=True)
        ]

    def arguments(self, *names: str) -> dict[str, Any]:
        """What all kernels take, with the pointers to these tensors."""
        B, T, N, D = self.z.shape
        tensors = {name: getattr(self, name) for name in names}
        return {
            "z_ptr": self.z, **{f"{name}_ptr": None if x is None else x.contiguous() for name, x in tensors.items()},
            "rows": B * T * N, "T": T, "N": N, **strides(self.z, "z", "btn"), "D": D,
        }  # fmt: skip

    def vector_arguments(self) -> dict[str, Any]:
        """What the kernels of whole vectors take."""
        pairs, cos = self.pairs(), self.cos
        # Without a rotation only the pairing matters, and the order of storage pairs best.
        layout_in, layout_out = _STYLES[self.style if pairs else "half"]
        return {
            **self.arguments("out", "up", "gate", "norm", "cos", "sin"),
            "stride_cos_b": cos.shape[1] * cos.shape[2] if cos is not None and cos.ndim == 3 and len(cos) > 1 else 0,
            "eps": self.eps, "PAIRS": pairs, "IN": layout_in, "OUT": layout_out, "MAP": _MAPS[self.head_map()],
            "NORM": self.norm is not None, "BLOCK_H": max(16, padded(self.z.shape[3]) // 2),
        }  # fmt: skip


TENSORS = _Inputs._fields.index("eps")


_PLANS: dict[Key, Plan] = {}
POINTERS = [f"{name}_ptr" for name in _Inputs._fields[:TENSORS]]


def _run(*given: Any) -> Tensor:
    y: Tensor = _forward_fake(*given)
    if y.numel() == 0:
        return y
    key = layouts(given[:TENSORS]), given[TENSORS:], chip(y.device)
    plan = find_plan(_PLANS, key)
    if plan is None:
        inputs = _Inputs._make([given[0], *(x.contiguous() if isinstance(x, Tensor) else x for x in given[1:])])
        inputs = inputs._replace(z=dense_rows(given[0]))
        _check_runnable(inputs)
        if any(a is not b for a, b in zip(inputs[:TENSORS], given, strict=False)):
            return _run(*inputs)
        config = inputs.config("qk_norm_rope_fwd")
        plan = keep_plan(_PLANS, key, Plan(qk_norm_rope_fwd_kernel, config, inputs.vector_arguments()))
    launch = plan.launch(**dict(zip(POINTERS, given, strict=False)), y_ptr=y)
    rows = y.numel() // y.shape[3]
    with on_device(y):
        launch.keep(launch.run[cdiv(rows, plan.config["BLOCK_M"]), 1, 1](*launch.values, **launch.options))
    return y


_forward = Operator("attnzoo::qk_norm_rope", _run, schema(_Inputs, 1))


@_forward.register_fake
def _forward_fake(z: Tensor, *_options: Any) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _check_runnable(inputs: _Inputs) -> None:
    interpreted = not isinstance(qk_norm_rope_fwd_kernel, triton.JITFunction)
    if interpreted and inputs.out is not None and inputs.z.dtype == torch.bfloat16:
        raise ValueError(f"z must not be bfloat16 with a head map in Triton's interpreter, got {inputs.z.dtype}")


@operator(
    "attnzoo::qk_norm_rope_backward",
    schema="(Tensor dy, bool[] needed, Tensor?[] tensors, float eps, str style) -> Tensor[]",
)
def _backward(dy: Tensor, needed: list[bool], tensors: list[Any], eps: float, style: str) -> list[Tensor]:
    """Gradients of z, out, up, gate and norm; empty where not needed."""
    inputs = _Inputs._make((*tensors, eps, style))
    gradients = inputs.gradients(needed)
    if dy.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    inputs = inputs._replace(z=dense_rows(inputs.z))
    with on_device(dy):
        for kernel, grid, arguments in _backward_launches(inputs, dense_rows(dy), gradients, needed):
            launch = prepare(kernel, grid, **arguments)
            launch.keep(launch.run[launch.grid](*launch.values, **launch.options))
    return gradients


def _backward_launches(inputs: _Inputs, dy: Tensor, gradients: list[Tensor], needed: list[bool]) -> Iterator[Launch]:
    """Fills the gradients that are needed; those of weights are summed over the programs' shares."""
    z, D = inputs.z, inputs.z.shape[3]
    rows = dy.shape[0] * dy.shape[1] * dy.shape[2]
    dz, dout, dup, dgate, dnorm = gradients
    need_z, need_out, need_up, need_gate, need_norm = needed
    # The gradient of the map's output; without norm and rotation the gradient that arrives.
    dx = dy
    need_x = (need_out or need_up or need_gate) and (inputs.norm is not None or inputs.pairs() > 0)
    if need_z or need_x or need_norm:
        config = inputs.config("qk_norm_rope_bwd_input")
        programs = min(ROW_PROGRAMS, cdiv(rows, config["BLOCK_M"]))
        if need_x:
            dx = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        (shares,) = _shares((programs, D), z.device, need_norm)
        yield qk_norm_rope_bwd_input_kernel, (programs,), {
            **inputs.vector_arguments(), "dy_ptr": dy, **strides(dy, "y", "btn"), "dz_ptr": dz if need_z else None,
            "dx_ptr": dx if need_x else None, "dnorm_ptr": shares, "NEED_Z": need_z, "NEED_X": need_x,
            "NEED_NORM": need_norm, **config.options(),
        }  # fmt: skip
        _sum_shares(dnorm, shares)
    if need_out:
        config = inputs.config("qk_norm_rope_bwd_out")
        grid = _matrix_grid(rows, config, cdiv(D, config["BLOCK_I"]), cdiv(D, config["BLOCK_J"]))
        (shares,) = _shares((grid[0], D, D), z.device, True)
        yield qk_norm_rope_bwd_out_kernel, grid, {
            **inputs.arguments("up", "gate"), "dx_ptr": dx, **strides(dx, "x", "btn"), "dout_ptr": shares,
            "MAP": _MAPS[inputs.head_map()], **config.options(),
        }  # fmt: skip
        _sum_shares(dout, shares)
    if need_up or need_gate:
        config = inputs.config("qk_norm_rope_bwd_hidden")
        grid = _matrix_grid(rows, config, cdiv(D, config["BLOCK_J"]), cdiv(D, config["BLOCK_K"]))
        up_shares, gate_shares = _shares((grid[0], D, D), z.device, need_up, need_gate)
        yield qk_norm_rope_bwd_hidden_kernel, grid, {
            **inputs.arguments("out", "up", "gate"), "dx_ptr": dx, **strides(dx, "x", "btn"), "dup_ptr": up_shares,
            "dgate_ptr": gate_shares, "NEED_UP": need_up, "NEED_GATE": need_gate, **config.options(),
        }  # fmt: skip
        _sum_shares(dup, up_shares)
        _sum_shares(dgate, gate_shares)


def _matrix_grid(rows: int, config: Config, *blocks: int) -> tuple[int, ...]:
    """About MATRIX_PROGRAMS programs in all, at least one and at most one a tile for every block of the matrix."""
    programs = max(1, MATRIX_PROGRAMS // math.prod(blocks))
    return (min(programs, cdiv(rows, config["BLOCK_M"])), *blocks)


def _shares(shape: tuple[int, ...], device: torch.device, *needed: bool) -> list[Tensor | None]:
    """A buffer (programs, ...) for each gradient that is needed."""
    return [torch.empty(shape, dtype=torch.float32, device=device) if wanted else None for wanted in needed]


def _sum_shares(gradient: Tensor, shares: Tensor | None) -> None:
    if shares is not None:
        gradient.copy_(shares.sum(0))


@_backward.register_fake
def _backward_fake(dy: Tensor, needed: list[bool], tensors: list[Any], eps: float, style: str) -> list[Tensor]:
    return _Inputs._make((*tensors, eps, style)).gradients(needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.eps, ctx.style = inputs[TENSORS:]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:5])
    gradients = _backward(dy, needed, list(ctx.saved_tensors), ctx.eps, ctx.style)
    wanted = [gradient if own else None for gradient, own in zip(gradients, needed, strict=True)]
    return (*wanted, *(None,) * (len(_Inputs._fields) - len(wanted)))


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _check_weight(name: str, weight: Tensor | None, shape: tuple[int, ...], z: Tensor) -> None:
    if weight is None:
        return
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {weight.dtype}")
    if weight.device != z.device:
        raise ValueError(f"{name} must be on the device of z, got {weight.device} and {z.device}")


def _check_tables(z: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            raise ValueError(f"sin must be given exactly when cos is, got only {'cos' if sin is None else 'sin'}")
        return
    B, T, _, D = z.shape
    width = cos.shape[-1] if cos.dim() else 0
    if width < 2 or width % 2 or width > D:
        raise ValueError(f"cos must have an even last dimension of 2 to {D}, the width of z, got {width}")
    if tuple(cos.shape) not in ((T, width), (1, T, width), (B, T, width)):
        raise ValueError(f"cos must have shape {(T, width)} or {(B, T, width)}, got {tuple(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have the shape of cos, got {tuple(sin.shape)} and {tuple(cos.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {table.dtype}")
        if table.device != z.device:
            raise ValueError(f"{name} must be on the device of z, got {table.device} and {z.device}")
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient, which this kernel does not compute")
