"""The collectives of sharded attention: one name in every supported torch, differentiable, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Traffic:
    """What this rank sent to others; see `counting_traffic`.

    Attributes:
        sent: bytes.
        calls: collectives and sends.
    """

    sent: int = 0
    calls: int = 0


# Not a context variable: on GPUs the backward pass runs in a thread of its own.
_COUNTING: list[Traffic] = []


@contextmanager
def counting_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside the block through this module, forward and backward."""
    traffic = Traffic()
    _COUNTING.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: equal counts are not the same counter.
        _COUNTING[:] = [one for one in _COUNTING if one is not traffic]


def _count(numbers: int, like: Tensor) -> None:
    for traffic in _COUNTING:
        traffic.sent += numbers * like.element_size()
        traffic.calls += 1


def _named(*names: str) -> Any:
    """The first of these functions that this torch has; later versions warn about the older names."""
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def gather(x: Tensor, group: Any) -> Tensor:
    """x of every rank, (P, *x.shape)."""
    P = dist.get_world_size(group)
    out = x.new_empty(P, *x.shape)
    _count((P - 1) * x.numel(), x)
    _named("all_gather_single", "all_gather_into_tensor")(out.view(-1), x.reshape(-1), group=group)
    return out


def reduce_scatter(x: Tensor, group: Any) -> Tensor:
    """Sum over the ranks of x[rank], x (P, ...)."""
    out = x.new_empty(x.shape[1:])
    _count((x.shape[0] - 1) * out.numel(), x)
    _named("reduce_scatter_single", "reduce_scatter_tensor")(out.view(-1), x.reshape(-1), group=group)
    return out


def exchange(x: Tensor, group: Any) -> Tensor:
    """out[r] is what rank r has at x[own rank], x (P, ...)."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _count(x.numel() // x.shape[0] * (x.shape[0] - 1), x)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: Any, op: str = "sum") -> Tensor:
    """Sum or maximum ("max") of x over the ranks. Counted as reduce-scatter and gather."""
    P = dist.get_world_size(group)
    out = x.detach().clone(memory_format=torch.contiguous_format)
    _count(2 * (P - 1) * x.numel() // P, x)
    dist.all_reduce(out, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return out


class Passing:
    """A tensor on its way so many ranks on in a ring, and the one from as many ranks before on its way here."""

    def __init__(self, x: Tensor, group: Any, steps: int = 1) -> None:
        rank, P = dist.get_rank(group), dist.get_world_size(group)
        self.sent = self.received = x.contiguous()
        self.works: list[Any] = []
        if steps % P == 0:
            return
        self.received = torch.empty_like(self.sent)
        _count(x.numel(), x)
        peers = [dist.get_global_rank(group, (rank + step) % P) for step in (steps, -steps)]
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, peers[0], group=group),
                dist.P2POp(dist.irecv, self.received, peers[1], group=group),
            ]
        )

    def wait(self) -> Tensor:
        """What came from the rank before."""
        while self.works:
            self.works.pop().wait()
        return self.received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return exchange(grad, ctx.group), None


def differentiable_gather(x: Tensor, group: Any) -> Tensor:
    """`gather`; the gradient of a rank's x is the sum over the ranks."""
    out: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def differentiable_exchange(x: Tensor, group: Any) -> Tensor:
    """`exchange`; gradients go the way back."""
    out: Tensor = _Exchange.apply(x, group)  # type: ignore[no-untyped-call]
    return out


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # noqa: ARG004
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def copied(x: Tensor, group: Any) -> Tensor:
    """x, the same on all ranks, of which each reads a part: its gradient is the sum over the ranks."""
    out: Tensor = _Copied.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def reduced(x: Tensor, group: Any) -> Tensor:
    """The sum of x over the ranks, which all of them read alike: each gets the gradient of the sum."""
    out: Tensor = _Reduced.apply(x, group)  # type: ignore[no-untyped-call]
    return out
