"""Projections by experts: every row of the input has its own choice among N matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose, kernel_obstacle
from attnzoo.tracing import has_values


@dataclass(frozen=True)
class Routes:
    """Which expert each of n rows goes to, and their order by expert (stable, so deterministic).

    Attributes:
        expert: (n,) expert of each row.
        order: (n,) rows sorted by expert.
        inverse: (n,) place of each row in that order.
        counts: (N,) rows of each expert.
    """

    expert: Tensor
    order: Tensor
    inverse: Tensor
    counts: Tensor

    @classmethod
    def of(cls, expert: Tensor, experts: int) -> Routes:
        """Routes of the chosen experts (n,), each in 0 .. experts - 1."""
        order = expert.argsort(stable=True)
        counts = (expert[:, None] == torch.arange(experts, device=expert.device)).sum(0)
        return cls(expert, order, order.argsort(), counts)


def expert_linear_reference(rows: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """The definition: rows (n, in), weight (N, out, in) -> (n, out); all experts are computed and one is taken."""
    everything = torch.einsum("ni,eoi->neo", rows, weight)
    return everything[torch.arange(rows.shape[0], device=rows.device), routes.expert]


def expert_linear(rows: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """The same with each row multiplied by its own expert's matrix only.

    Rows are sorted by expert; torch's grouped product does the rest where it takes the dtype and the strides, and
    one product for each expert elsewhere, which waits for the counts. Where counts have no values to wait for, as in
    a compiled graph, on the meta device and under transforms of torch.func, the definition runs unless the grouped
    product can.
    """
    grouped = _grouped_product_takes(rows.dtype, rows.device, weight) and (rows.is_cuda or rows.shape[0] > 0)
    if not grouped and not has_values(routes.counts):
        return expert_linear_reference(rows, weight, routes)
    in_order = rows[routes.order]
    if grouped:
        ends = routes.counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(in_order, weight.transpose(1, 2), offs=ends)[routes.inverse]
    parts = in_order.split(routes.counts.tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])[routes.inverse]


def expert_linear_pieces(
    x: Tensor,
    weight: Tensor,
    routes: Routes,
    *,
    out_groups: int = 1,
    gates: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same for k slots of every token, read and written where attention wants them.

    Args:
        x: (n, g, k, C): the g C features of token n, slot k, in g pieces. Expand along k what all slots share.
        weight: (N, out, g C).
        routes: of the rows token * k + slot.
        out_groups: pieces of an output row; divides out.
        gates: (n, k), factors of the rows, or None for 1.
        backend: "eager" computes all experts; "triton" runs the kernels, which copy and sort no row; "auto" runs them
            on GPUs, and otherwise `expert_linear`, as all others do.

    Returns:
        (n, out_groups, k, out / out_groups).

    Raises:
        BackendUnavailable: if backend is "triton" and the kernels cannot serve the call.
    """
    if _kernels_run(x, weight, backend):
        from attnzoo_kernels.expert_projection import expert_linear as kernel

        ends = routes.counts.cumsum(0).to(torch.int32)
        out: Tensor = kernel(x, weight, routes.order, ends, out_groups=out_groups, gates=gates)
        return out
    n, pieces, slots, width = x.shape
    rows = x.transpose(1, 2)
    if gates is not None:
        rows = rows * gates.to(x.dtype)[:, :, None, None]
    rows = rows.reshape(n * slots, pieces * width)
    y = (expert_linear_reference if backend == "eager" else expert_linear)(rows, weight, routes)
    return y.view(n, slots, out_groups, weight.shape[1] // out_groups).transpose(1, 2)


def _kernels_run(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether `expert_linear_pieces` takes the kernels; raises if they are named and cannot run."""
    obstacle = kernel_obstacle(x.device, x.dtype)
    if obstacle is None and weight.dtype != x.dtype:
        obstacle = f"the kernels take rows and matrices of one dtype, got {x.dtype} and {weight.dtype}"
    if backend not in ("auto", "triton"):
        return False
    return choose(backend, "expert_linear", {"triton": lambda: obstacle, "eager": lambda: None}, x.device) == "triton"


def _grouped_product_takes(dtype: torch.dtype, device: torch.device, weight: Tensor) -> bool:
    """Whether torch.nn.functional.grouped_mm takes these: bfloat16, on a CPU float32, rows of 16 bytes."""
    if not hasattr(F, "grouped_mm") or dtype != weight.dtype or device.type not in ("cpu", "cuda"):
        return False
    aligned = all(width * dtype.itemsize % 16 == 0 for width in weight.shape[1:])
    if device.type == "cuda":
        return aligned and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    return aligned and dtype == torch.float32 and has_values(weight)
