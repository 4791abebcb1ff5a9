"""What the mechanisms say about running on several processes: shards of a sequence, heads split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from attnzoo.distributed.collectives import copied
from attnzoo.modules.heads import HeadLayout


class Parallel(nn.Module):
    """The part of `Mechanism` that `attnzoo.distributed` asks; what it reads of a module is declared here."""

    num_heads: int
    num_kv_heads: int
    heads: HeadLayout
    cache_widths: Callable[[], tuple[tuple[int, ...], ...]]

    sequence_parallel: Any = None
    """How a longer sequence is spread over processes, set by `attnzoo.distributed.parallelize`."""
    tensor_group: Any = None
    """The processes that the heads are split over, set by a tensor-parallel plan."""
    sequence_forms: tuple[str, ...] = ()
    """Forms in which `forward` serves a sharded sequence, named by the class that defines it."""
    sequence_cache = True
    """Whether a cache may be spread over processes too."""
    sequence_reason = "its class names no form (sequence_forms)"
    """Why there is none, where there is none."""
    tensor_reason: str | None = None
    """Why there is no tensor-parallel plan, where there is none."""
    mixes_heads = False
    """Whether an output needs the scores of several heads."""
    expands_states = False
    """Whether keys and values are made from smaller states, which travel in their place."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last forward left, which belongs to its graph, and without a process group."""
        left = ("aux_loss", "routing", "aux_loss_group")
        return {name: None if name in left else value for name, value in self.__dict__.items()}

    # Sharded sequences

    def sequence_obstacle(self) -> str | None:
        """Why the module, as it was made, cannot run on a shard of a sequence; None if it can."""
        return None

    def split_obstacle(self, parts: int) -> str | None:
        """What is missing for so many ranks to have heads of their own, as a condition; None if they can."""
        H, G = self.num_heads, self.heads.groups_read
        if not H or H % parts or (G % parts and parts % G):
            return (
                f"a number of ranks that divides num_heads {H}, and divides num_kv_heads or is a multiple of it, {G}; "
                f"got {parts}"
            )
        return None

    def splits_evenly(self, parts: int) -> bool:
        """Whether so many ranks each have heads of their own, and key/value heads that nobody else has."""
        return self.split_obstacle(parts) is None and self.heads.groups_read % parts == 0

    def score_numbers(self) -> int:
        """Numbers of a token that scores need of its key."""
        heads, width = self.cache_widths()[0]
        return heads * width

    def wide_numbers(self) -> int:
        """Numbers of a token, among those of its cache, that travel in float32 where others have 16 bits."""
        return 0

    def constant_numbers(self) -> int:
        """Numbers of a token, among those of its cache, that have no gradient."""
        return 0

    def factor_numbers(self) -> int:
        """Numbers of a token beside queries, keys, values and outputs that go to the ranks of other heads."""
        return 0

    # Heads split over ranks

    def tensor_splits(self) -> dict[str, Any]:
        """How submodules and parameters are split for tensor parallelism, by name.

        Of a linear layer "heads" or "groups" (rows of query or key/value heads), "columns", or "read by all" (whole,
        and all heads read its output); of another module with a matrix "rows"; of other submodules "shared" (whole,
        and each rank applies it to its own heads) or "whole" (whole, and all ranks do the same with it); of a
        parameter the dimension of its heads.
        """
        return {}

    def tensor_obstacle(self, parts: int) -> str | None:
        """Why heads cannot be split over so many ranks, or None."""
        if self.pruned_heads:
            return f"it must not be pruned, got pruned heads {self.pruned_heads}"
        obstacle = Parallel.split_obstacle(self, parts)
        return None if obstacle is None else f"that needs {obstacle}"

    def tensor_parallel_plan(self) -> dict[str, Any]:
        """The plan for `torch.distributed.tensor.parallel.parallelize_module(module, mesh, plan)`.

        Heads are split over the mesh; latents, shared keys and routers are whole on every rank. x and y are whole. The
        module's numbers of heads become those of a rank. Merge it into the plan of a model by putting the module's name
        before every key.

        Raises:
            ValueError: for a mechanism, or an option of it, that has no plan.
        """
        if self.tensor_reason is not None:
            raise ValueError(f"{type(self).__name__} has no tensor-parallel plan: {self.tensor_reason}")
        from attnzoo.distributed.tensor import plan_of

        return plan_of(self)

    def take_heads(self, group: Any) -> None:
        """Become the part of a rank: numbers of heads, and what is kept for each head as numbers."""
        self.tensor_group = group
        H, G = self.num_heads // group.size, max(self.num_kv_heads // group.size, 1)
        if (slopes := getattr(self, "alibi_slopes", None)) is not None:
            self.alibi_slopes = slopes[group.rank * H : (group.rank + 1) * H]
        self.num_heads, self.num_kv_heads, self.heads = H, G, HeadLayout.of(H, G)

    def read_by_all(self, x: Tensor) -> Tensor:
        """x, the same on all ranks, as their own heads read it: gradients are summed."""
        return x if self.tensor_group is None else copied(x, self.tensor_group.group)

    def own_heads(self, x: Tensor) -> Tensor:
        """This rank's heads of x (.., H), which all ranks have: floating x with summed gradients."""
        if self.tensor_group is None:
            return x
        first = self.tensor_group.rank * self.num_heads
        whole = self.read_by_all(x) if x.is_floating_point() else x
        return whole[..., first : first + self.num_heads]
