"""Tensor parallelism: the heads of a mechanism split over the ranks of a mesh, for `parallelize_module` of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from attnzoo.distributed.collectives import copied


@dataclass(frozen=True)
class HeadGroup:
    """The processes that a mechanism's heads are split over."""

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadGroup:
        """The same: a process group cannot be copied."""
        return self

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place."""
        return dist.get_rank(self.group)


class LocalHeads(ParallelStyle):
    """Of the mechanism itself: numbers of heads become those of a rank, and parameters of its own are split.

    Args:
        split: parameters that have an entry for each head, by name, and the dimension of their heads.
    """

    def __init__(self, split: dict[str, int]) -> None:
        super().__init__()
        self.split = split

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have one dimension, got {device_mesh.ndim}")
        if device_mesh.size() == 1:
            return module
        mechanism: Any = module
        if mechanism.tensor_group is not None:
            ranks = mechanism.tensor_group.size
            raise ValueError(f"{type(module).__name__} must not be split over ranks yet, it is over {ranks}")
        obstacle = mechanism.tensor_obstacle(device_mesh.size())
        # Ranks draw alike, and would drop the same weights of different heads; linear attention drops outputs.
        if obstacle is None and mechanism.dropout and mechanism.sequence_forms != ("state",):
            obstacle = f"dropout of attention weights must be 0, got {mechanism.dropout}"
        if obstacle is not None:
            raise ValueError(f"{type(module).__name__} cannot be split over {device_mesh.size()} ranks: {obstacle}")
        for name, dim in self.split.items():
            owner, _, own = name.rpartition(".")
            holder = module.get_submodule(owner)
            parameter = holder.get_parameter(own)
            shard = distribute_tensor(parameter.detach(), device_mesh, [Shard(dim)])
            holder.register_parameter(own, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        mechanism.take_heads(HeadGroup(device_mesh.get_group()))
        return module


class KeyValueHeads(ParallelStyle):
    """Of a projection to G key/value heads: split, or where there are fewer than ranks, whole with one head read."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        if self.groups % ranks == 0:
            return ColwiseParallel()._apply(module, device_mesh)
        group, own = device_mesh.get_group(), device_mesh.get_local_rank() * self.groups // ranks

        def read(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
            heads: Tensor = copied(out, group).unflatten(-1, (self.groups, -1))
            return heads[..., own, :]

        module.register_forward_hook(read)
        return module


class Rows(ParallelStyle):
    """Of a matrix that is not an nn.Linear: its rows by heads, and an input whose gradient is the sum over ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group, weight = device_mesh.get_group(), module.get_parameter("weight")
        shard = distribute_tensor(weight.detach(), device_mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(shard, requires_grad=weight.requires_grad))
        module.register_forward_pre_hook(lambda _, inputs: (copied(inputs[0], group),))
        return module


class ReadByAllHeads(ParallelStyle):
    """Of a projection that all ranks have and whose output the heads of all ranks read: its gradient is their sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        if device_mesh.size() > 1:
            module.register_forward_hook(lambda _, __, out: copied(out, group))
        return module


class SharedByHeads(ParallelStyle):
    """Of a submodule that all ranks have and that acts on their own heads: gradients of its parameters are summed."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        if device_mesh.size() == 1:
            return module

        def swap(part: nn.Module, _: Any) -> None:
            part.__dict__["_whole"] = dict(part._parameters)
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = copied(parameter, group)  # type: ignore[assignment]

        def restore(part: nn.Module, _: Any, __: Any) -> None:
            part._parameters.update(part.__dict__.pop("_whole"))

        for part in module.modules():
            if part._parameters:
                part.register_forward_pre_hook(swap)
                part.register_forward_hook(restore, always_call=True)
        return module


def plan_of(module: Any) -> dict[str, ParallelStyle]:
    """The plan of a mechanism from its `tensor_splits`; raises ValueError for a parameter that these do not name."""
    splits: dict[str, Any] = module.tensor_splits()
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if not any(name == own or name.startswith(f"{own}.") for own in splits)]
    if missing:
        raise ValueError(
            f"{type(module).__name__} has no tensor-parallel plan: tensor_splits() does not name {', '.join(missing)}"
        )
    found = {own: kind for own, kind in splits.items() if any(n == own or n.startswith(f"{own}.") for n in names)}
    plan: dict[str, ParallelStyle] = {
        "": LocalHeads({own: kind for own, kind in found.items() if isinstance(kind, int)})
    }
    styles: dict[str, Any] = {
        "heads": ColwiseParallel, "groups": lambda: KeyValueHeads(module.num_kv_heads), "columns": RowwiseParallel,
        "rows": Rows, "read by all": ReadByAllHeads, "shared": SharedByHeads,
    }  # fmt: skip
    for own, kind in found.items():
        if not isinstance(kind, int) and kind != "whole":
            plan[own] = styles[kind]()
    return plan
