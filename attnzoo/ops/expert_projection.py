"""Projections by experts: every row of the input has its own choice among N matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
    one product for each expert elsewhere, which waits for the counts. A compiled graph and the meta device cannot
    wait: there the definition runs unless the grouped product can.
    """
    grouped = _grouped_product_runs(rows, weight)
    if not grouped and (torch.compiler.is_compiling() or rows.device.type == "meta"):
        return expert_linear_reference(rows, weight, routes)
    in_order = rows[routes.order]
    if grouped:
        ends = routes.counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(in_order, weight.transpose(1, 2), offs=ends)[routes.inverse]
    parts = in_order.split(routes.counts.tolist())  # type: ignore[no-untyped-call]
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])[routes.inverse]


def _grouped_product_runs(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch.nn.functional.grouped_mm takes these: bfloat16, on a CPU also float32, rows of 16 bytes."""
    if not hasattr(F, "grouped_mm") or rows.dtype != weight.dtype or rows.device.type not in ("cpu", "cuda"):
        return False
    aligned = all(width * rows.element_size() % 16 == 0 for width in (rows.shape[1], weight.shape[1]))
    if rows.device.type == "cuda":
        return aligned and rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    return aligned and rows.dtype == torch.float32 and not torch.compiler.is_compiling() and rows.shape[0] > 0
