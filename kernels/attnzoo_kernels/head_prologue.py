"""What happens to a head vector between its projection and attention, in one pass over memory.

With x a vector of z (B, T, N, D), n a norm weight and (own, other) rotary tables:

    x <- x W^T    or    x <- 2 ((x Wup^T) * sigmoid(x Wgate^T)) Wdown^T     shared head map (arXiv:2510.23052)
    x <- x / sqrt(mean(x^2) + eps) * n                                      RMS norm of queries or keys
    x <- own x + other partner(x)   on the first r features                 rotation (arXiv:2104.09864)

any of the three may be absent. Unfused, each of them reads and writes the whole tensor. Products run in z's dtype,
everything else and every sum in float32.

Saved for the backward pass: z and the weights. It recomputes the map's output where the norm needs it and the hidden
features where the gated map does, and holds one tensor of z's size beside dz where matrices need a gradient after a
norm or a rotation. Gradients of matrices are sums over all B T N vectors, taken by a fixed number of
programs, each over its own tiles in order, and then over the programs: no atomics, the same bits every time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, library

from attnzoo_kernels.head_map import GATED, HALF, INTERLEAVED, LINEAR, NO_MAP, REGROUPED
from attnzoo_kernels.head_prologue_kernels import (
    head_prologue_bwd_hidden_kernel,
    head_prologue_bwd_input_kernel,
    head_prologue_bwd_out_kernel,
    head_prologue_fwd_kernel,
)
from attnzoo_kernels.launch import dense_rows, on_device, strides

MAX_WIDTH = 256
MAX_ROWS = 2**31 - 1024
ROW_PROGRAMS = 1024
MATRIX_PROGRAMS = 128

_STYLES = {
    "half": (HALF.value, HALF.value),
    "interleaved": (INTERLEAVED.value, INTERLEAVED.value),
    "interleaved_to_half": (INTERLEAVED.value, REGROUPED.value),
}


class _Tiles(NamedTuple):
    """BLOCK_M vectors; blocks of output, hidden and inner features; how a program is run."""

    BLOCK_M: int
    BLOCK_I: int
    BLOCK_J: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (kernel, map) -> tiles for elements of 2 and of 4 bytes. None has been timed.
_TILES: dict[tuple[str, int], tuple[_Tiles, _Tiles]] = {
    ("fwd", NO_MAP.value): (_Tiles(32, 16, 16, 16, 4, 1), _Tiles(32, 16, 16, 16, 4, 1)),
    ("fwd", LINEAR.value): (_Tiles(128, 16, 16, 64, 8, 2), _Tiles(32, 16, 16, 32, 8, 2)),
    ("fwd", GATED.value): (_Tiles(128, 16, 64, 64, 8, 2), _Tiles(32, 16, 32, 32, 8, 2)),
    ("input", NO_MAP.value): (_Tiles(32, 16, 16, 16, 4, 1), _Tiles(32, 16, 16, 16, 4, 1)),
    ("input", LINEAR.value): (_Tiles(64, 16, 16, 64, 8, 1), _Tiles(32, 16, 16, 16, 8, 1)),
    ("input", GATED.value): (_Tiles(32, 16, 64, 128, 8, 1), _Tiles(16, 16, 32, 32, 8, 1)),
    ("out", LINEAR.value): (_Tiles(64, 128, 128, 16, 8, 2), _Tiles(32, 64, 64, 16, 8, 1)),
    ("out", GATED.value): (_Tiles(64, 128, 64, 64, 8, 1), _Tiles(32, 64, 32, 32, 8, 1)),
    ("hidden", GATED.value): (_Tiles(64, 64, 64, 128, 8, 1), _Tiles(32, 32, 32, 64, 8, 1)),
}


def _tiles(kernel: str, head_map: int, D: int, element_size: int) -> dict[str, int]:
    """Block sizes and launch options of a kernel, under the names of its arguments."""
    width = max(16, triton.next_power_of_2(D))
    tiles = _TILES[kernel, head_map][element_size > 2]._asdict()
    tiles |= {name: min(width, tiles[name]) for name in ("BLOCK_I", "BLOCK_J", "BLOCK_K")}
    if kernel in ("fwd", "input"):
        # These hold whole vectors, which otherwise spill.
        tiles["BLOCK_M"] //= 2 if width > 128 else 1
        tiles["BLOCK_H"] = max(16, width // 2)
        del tiles["BLOCK_I"]
    return tiles


def _common(
    z: Tensor, out: Tensor | None, up: Tensor | None, gate: Tensor | None, norm_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm_eps: float, style: str,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels share."""
    B, T, N, D = z.shape
    pairs = 0 if cos is None else cos.shape[-1] // 2
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    # Without a rotation only the pairing matters, and the order of storage pairs best.
    layout_in, layout_out = _STYLES[style] if pairs else _STYLES["half"]
    return {
        "z_ptr": z,
        "out_ptr": None if out is None else out.contiguous(),
        "up_ptr": None if up is None else up.contiguous(),
        "gate_ptr": None if gate is None else gate.contiguous(),
        "norm_ptr": None if norm_weight is None else norm_weight.contiguous(),
        "cos_ptr": cos,
        "sin_ptr": sin,
        "rows": B * T * N,
        "T": T,
        "N": N,
        **strides(z, "z", "btn"),
        "stride_cb": cos.stride(0) if cos is not None and cos.dim() == 3 and cos.shape[0] > 1 else 0,
        "eps": norm_eps,
        "D": D,
        "PAIRS": pairs,
        "IN": layout_in,
        "OUT": layout_out,
        "MAP": NO_MAP.value if out is None else LINEAR.value if up is None else GATED.value,
        "NORM": norm_weight is not None,
        # The default changes between versions of Triton.
        "enable_fp_fusion": True,
    }


def _shared(common: dict[str, Any], *names: str) -> dict[str, Any]:
    """What the matrices' kernels take of the common arguments."""
    names += ("z_ptr", "rows", "T", "N", "stride_zb", "stride_zt", "stride_zn", "D", "enable_fp_fusion")
    return {name: common[name] for name in names}


def _check_runnable(z: Tensor, has_map: bool) -> None:
    interpreted = not isinstance(head_prologue_fwd_kernel, triton.JITFunction)
    if interpreted and has_map and z.dtype == torch.bfloat16:
        raise ValueError(f"z must not be bfloat16 with a head map in Triton's interpreter, got {z.dtype}")


def _matrix_grid(rows: int, tiles: dict[str, int], *blocks: int) -> tuple[int, ...]:
    """About MATRIX_PROGRAMS programs in all, at least one and at most one a tile for every block of the matrix."""
    programs = max(1, MATRIX_PROGRAMS // math.prod(blocks))
    return (min(programs, triton.cdiv(rows, tiles["BLOCK_M"])), *blocks)


@library.custom_op(
    "attnzoo::head_prologue",
    mutates_args=(),
    schema="(Tensor z, Tensor? out, Tensor? up, Tensor? gate, Tensor? norm_weight, Tensor? cos, Tensor? sin, "
    "float norm_eps, str style) -> Tensor",
)
def _head_prologue(z: Tensor, *options: Any) -> Tensor:
    _check_runnable(z, options[0] is not None)
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return y
    common = _common(dense_rows(z), *options)
    tiles = _tiles("fwd", common["MAP"], z.shape[3], z.element_size())
    grid = (triton.cdiv(common["rows"], tiles["BLOCK_M"]),)
    with on_device(z):
        head_prologue_fwd_kernel[grid](y_ptr=y, **common, **tiles)
    return y


@_head_prologue.register_fake
def _(z: Tensor, *_options: Any) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


@library.custom_op(
    "attnzoo::head_prologue_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor z, Tensor? out, Tensor? up, Tensor? gate, Tensor? norm_weight, Tensor? cos, "
    "Tensor? sin, float norm_eps, str style, bool[] needed) -> Tensor[]",
)
def _head_prologue_backward(dy: Tensor, z: Tensor, *options: Any) -> list[Tensor]:
    """Gradients of those of (z, out, up, gate, norm_weight) that are needed."""
    *weights_and_tables, needed = options
    need_z, need_out, need_up, need_gate, need_norm = needed
    out, up, gate, norm_weight = weights_and_tables[:4]
    if z.numel() == 0:
        inputs = (z, out, up, gate, norm_weight)
        return [torch.zeros_like(x) for x, need in zip(inputs, needed, strict=True) if need]
    dy, z = dense_rows(dy), dense_rows(z)
    common = _common(z, *weights_and_tables)
    with on_device(z):
        dz, dx, dnorm = _input_gradients(dy, z, common, need_z, need_out or need_up or need_gate, need_norm)
        dout = _out_gradient(dx, z, common) if need_out else None
        dup, dgate = _hidden_gradients(dx, z, common, need_up, need_gate)
    gradients = [] if dz is None else [dz]
    shares = ((dout, out), (dup, up), (dgate, gate), (dnorm, norm_weight))
    return gradients + [share.sum(0).to(weight.dtype) for share, weight in shares if share is not None]


def _input_gradients(
    dy: Tensor, z: Tensor, common: dict[str, Any], need_z: bool, need_x: bool, need_norm: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dz, the gradient dx of the map's output, and shares (programs, D) of the norm weight's, where needed."""
    # Without norm and rotation the gradient that arrives is dx.
    need_x = need_x and (common["NORM"] or common["PAIRS"] > 0)
    if not (need_z or need_x or need_norm):
        return None, dy, None
    tiles = _tiles("input", common["MAP"], z.shape[3], z.element_size())
    programs = min(ROW_PROGRAMS, triton.cdiv(common["rows"], tiles["BLOCK_M"]))
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device) if need_z else None
    dx = torch.empty(z.shape, dtype=z.dtype, device=z.device) if need_x else None
    dnorm = torch.empty(programs, z.shape[3], dtype=torch.float32, device=z.device) if need_norm else None
    head_prologue_bwd_input_kernel[(programs,)](
        **strides(dy, "y", "btn"), dz_ptr=dz, dx_ptr=dx, dnorm_ptr=dnorm, NEED_Z=need_z, NEED_X=need_x,
        NEED_NORM=need_norm, dy_ptr=dy, **common, **tiles,
    )  # fmt: skip
    return dz, dy if dx is None else dx, dnorm


def _out_gradient(dx: Tensor, z: Tensor, common: dict[str, Any]) -> Tensor:
    """Shares (programs, D, D) of the gradient of the matrix that makes the map's output."""
    D = z.shape[3]
    tiles = _tiles("out", common["MAP"], D, z.element_size())
    grid = _matrix_grid(common["rows"], tiles, triton.cdiv(D, tiles["BLOCK_I"]), triton.cdiv(D, tiles["BLOCK_J"]))
    dout = torch.empty(grid[0], D, D, dtype=torch.float32, device=z.device)
    head_prologue_bwd_out_kernel[grid](
        dx_ptr=dx,
        dout_ptr=dout,
        MAP=common["MAP"],
        **strides(dx, "x", "btn"),
        **_shared(common, "up_ptr", "gate_ptr"),
        **tiles,
    )
    return dout


def _hidden_gradients(
    dx: Tensor, z: Tensor, common: dict[str, Any], need_up: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Shares (programs, D, D) of the gradients of up and gate."""
    if not (need_up or need_gate):
        return None, None
    D = z.shape[3]
    tiles = _tiles("hidden", common["MAP"], D, z.element_size())
    grid = _matrix_grid(common["rows"], tiles, triton.cdiv(D, tiles["BLOCK_J"]), triton.cdiv(D, tiles["BLOCK_K"]))
    dup, dgate = (
        torch.empty(grid[0], D, D, dtype=torch.float32, device=z.device) if need else None
        for need in (need_up, need_gate)
    )
    head_prologue_bwd_hidden_kernel[grid](
        dx_ptr=dx, dup_ptr=dup, dgate_ptr=dgate, NEED_UP=need_up, NEED_GATE=need_gate, **strides(dx, "x", "btn"),
        **_shared(common, "out_ptr", "up_ptr", "gate_ptr"), **tiles,
    )  # fmt: skip
    return dup, dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_eps, ctx.style = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:5])
    gradients = iter(_head_prologue_backward(dy, *ctx.saved_tensors, ctx.norm_eps, ctx.style, needed))
    return (*(next(gradients) if need else None for need in needed), None, None, None, None)


@_head_prologue_backward.register_fake
def _(_dy: Tensor, z: Tensor, *options: Any) -> list[Tensor]:
    inputs = (z, *options[:4])
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in zip(inputs, options[-1], strict=True)
        if need
    ]


_head_prologue.register_autograd(_backward, setup_context=_save)


def head_prologue(
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
        cos: the first table of `attnzoo.rotary.rotary_table`, a cos of each of the first r features: (T, r), (1, T, r)
            or (B, T, r) in float32. Both members of a pair have the same.
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
    y: Tensor = _head_prologue(z, linear if mlp is None else down, up, gate, norm_weight, cos, sin, norm_eps, style)
    return y


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
