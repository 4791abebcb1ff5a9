"""Which tokens each rank of a group holds, and what a call on such a shard has to know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnzoo.distributed import collectives
from attnzoo.masks import AttentionMask
from attnzoo.rules import check, describe, is_integer, one_of

FORMS = ("gather", "heads", "ring", "hybrid", "state")
LAYOUTS = ("contiguous", "zigzag", "striped")
FLOPS, BANDWIDTH = 4e14, 3e11
"""FLOP/s and bytes/s of a link by which "auto" decides whether a ring hides its transfers."""

Run = tuple[int, int]
"""First token and number of consecutive tokens."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class SequenceParallel:
    """How the tokens of one sequence, T in all, are spread over the P ranks of a group, and how attention reaches them.

    Layouts: "contiguous" (rank r holds tokens r T/P ..), "zigzag" (chunks r and 2P-1-r of 2P, so that causal work is
    even) and "striped" (r, r+P, ..; for comparison, since its masks are dense). Forms:

        gather   keys and values of all ranks are gathered; every mechanism, the whole K and V of a layer in memory
        heads    all-to-all from tokens to heads and back (DeepSpeed-Ulysses, arXiv:2309.14509)
        ring     keys and values travel (Ring Attention, arXiv:2310.01889); mechanisms that mix heads take two sweeps
        hybrid   heads within the second group, ring over the first (USP, arXiv:2405.07719)
        state    states of linear attention are passed (LASP-2, arXiv:2502.07563)

    Attributes:
        group: a ProcessGroup or one-dimensional DeviceMesh; for "hybrid" the pair (ring group, heads group).
        form: one of these, or "auto" for each mechanism's own.
        layout: one of these, or "auto", which `resolved` decides for a model.
        overlap: whether the ring starts to send a block before it computes with it.

    Raises:
        ValueError: for another form or layout, a mesh of more dimensions, what is not a group, a group without this
            process, or a pair of groups that have more than this process in common.
        RuntimeError: if torch.distributed is not initialized.
    """

    group: Any
    form: str = "auto"
    layout: str = "auto"
    overlap: bool = True

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "SequenceParallel needs torch.distributed to be initialized: call init_process_group first"
            )
        check("form", self.form, one_of("auto", *FORMS))
        check("layout", self.layout, one_of("auto", *LAYOUTS))
        pair = isinstance(self.group, tuple | list)
        if pair != (self.form == "hybrid") or (pair and len(self.group) != 2):
            raise ValueError(
                f"group must be a pair (ring, heads) for form 'hybrid' and one group otherwise, got {self.form!r}"
            )
        groups = tuple(map(_process_group, self.group)) if pair else _process_group(self.group)
        if pair:
            ring, heads = map(dist.get_process_group_ranks, groups)
            if len(set(ring) & set(heads)) > 1:
                raise ValueError(
                    f"group must be a pair (ring, heads) with one rank in common, got ranks {ring} and {heads}"
                )
        object.__setattr__(self, "group", groups)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled module is of one process again: a process group cannot be copied."""
        return _no_group, ()

    @property
    def groups(self) -> tuple[Any, ...]:
        """The ring and the heads group of the hybrid form, else the one group."""
        return self.group if isinstance(self.group, tuple) else (self.group,)

    @property
    def size(self) -> int:
        """Number P of ranks."""
        size = 1
        for group in self.groups:
            size *= dist.get_world_size(group)
        return size

    @property
    def rank(self) -> int:
        """This process's place: ring rank times the heads group's size plus rank among the heads."""
        rank = 0
        for group in self.groups:
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        return rank

    @property
    def ring(self) -> SequenceParallel:
        """The ring of the hybrid form alone."""
        return replace(self, group=self.groups[0], form="ring")

    def runs(self, tokens: int, rank: int | None = None) -> tuple[Run, ...]:
        """The runs of consecutive tokens, of T in all, that a rank (default: this) holds, in its order.

        Raises:
            ValueError: if T does not divide, a rank does not exist, or the layout is not decided.
        """
        rank = self.rank if rank is None else rank
        if not is_integer(tokens) or tokens < 0:
            raise ValueError(f"the number of tokens must be an integer and not negative, got {tokens!r}")
        if not 0 <= rank < self.size:
            raise ValueError(f"rank must lie between 0 and {self.size - 1}, got {rank}")
        if self.layout == "auto":
            raise ValueError("layout must be decided before tokens are sharded: sp = sp.resolved(model); got 'auto'")
        parts = self.size if self.form != "hybrid" else dist.get_world_size(self.groups[0])
        heads = self.size // parts
        chunks = 2 * parts if self.layout == "zigzag" else parts
        need = chunks if heads == 1 else 2 * parts * heads if self.layout == "zigzag" else self.size
        if tokens % need:
            raise ValueError(
                f"the number of tokens must be a multiple of {need} for layout {self.layout!r}, got {tokens}"
            )
        at, within = divmod(rank, heads)
        if self.layout == "striped":
            own = range(at, tokens, parts)[within * tokens // self.size : (within + 1) * tokens // self.size]
            return tuple((token, 1) for token in own)
        length = tokens // chunks
        places = [at, chunks - 1 - at] if self.layout == "zigzag" else [at]
        runs = tuple((place * length, length) for place in places)
        return runs if heads == 1 else tuple(_cut(runs, within * tokens // self.size, tokens // self.size))

    def positions(self, tokens: int, rank: int | None = None) -> Tensor:
        """Global positions (T / P,) of the tokens that a rank (default: this) holds, in its order."""
        return torch.cat([torch.arange(first, first + length) for first, length in self.runs(tokens, rank)])

    def order(self, tokens: int) -> Tensor:
        """Where token 0 .. T-1 is when the shards of all ranks are side by side, (T,)."""
        return torch.cat([self.positions(tokens, rank) for rank in range(self.size)]).argsort()

    def resolved(self, model: nn.Module) -> SequenceParallel:
        """With the layout decided: zigzag if a layer of the model is causal softmax attention without a window."""
        if self.layout != "auto":
            return self
        layers = [layer for layer in attention_layers(model) if "state" not in forms_of(layer)]
        even = any(layer.causal and layer.sliding_window is None for layer in layers)
        return replace(self, layout="zigzag" if even else "contiguous")


def ring_hops(window: int | None, own: int, ranks: int) -> int:
    """How many ranks of `own` tokens each a ring has to reach back, for a window of the keys before a query, or all."""
    return ranks - 1 if window is None or not own else min(ranks - 1, -(-(window - 1) // own))


def _process_group(group: Any) -> Any:
    if group is None:
        return dist.group.WORLD
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(f"group must be a one-dimensional DeviceMesh, got {group.ndim} dimensions")
        group = dist.GroupMember.NON_GROUP_MEMBER if group.get_coordinate() is None else group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must have this process, rank {dist.get_rank()}, as a member, got one of others")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a ProcessGroup or a one-dimensional DeviceMesh, got {group!r}")
    return group


def _check_shard(tensor: Any, dim: Any, sp: Any) -> None:
    if not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel, got {sp!r}")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensor must be a tensor, got {describe(tensor)}")
    if not is_integer(dim) or not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(f"dim must be one of the tensor's {tensor.ndim} dimensions, got {dim!r}")


def _no_group() -> None:
    return None


def _cut(runs: tuple[Run, ...], first: int, length: int) -> Iterator[Run]:
    """The tokens first .. first + length - 1 of runs side by side."""
    for start, size in runs:
        low, high = max(first, 0), min(first + length, size)
        if low < high:
            yield start + low, high - low
        first -= size


def shard(tensor: Tensor, dim: int, sp: SequenceParallel) -> Tensor:
    """The tokens of this rank, (.., T / P, ..), of a tensor that holds all T along a dimension.

    Shift labels before they are sharded: the last token of a run has its target on another rank.
    """
    _check_shard(tensor, dim, sp)
    return tensor.index_select(dim, sp.positions(tensor.shape[dim]).to(tensor.device))


def unshard(tensor: Tensor, dim: int, sp: SequenceParallel) -> Tensor:
    """The inverse of `shard`, on every rank; the gradient of a shard is the sum of those of all ranks."""
    _check_shard(tensor, dim, sp)
    tokens = tensor.shape[dim] * sp.size
    whole = tensor.movedim(dim, 0)
    for group in reversed(sp.groups):
        whole = collectives.differentiable_gather(whole, group).flatten(0, 1)
    return whole.index_select(0, sp.order(tokens).to(tensor.device)).movedim(0, dim)


def parallelize(model: Model, sp: SequenceParallel) -> Model:
    """Have every attention module of a model treat its input as this rank's shard of a longer sequence.

    Parameters are replicated over the group (or sharded by FSDP2 over it); each rank's gradient is a part, and their
    sum over the group is the gradient. Routers take their statistics over the group, as with `attnzoo.sync_aux_loss`,
    unless that function gave them another; in form "hybrid" give them one of all ranks by it. A model may be
    parallelized again, over another group or in another form.

    Args:
        model: with attention modules of this library; changed in place.
        sp: the group, form and layout; "auto" is decided by `sp.resolved(model)`.

    Returns:
        The model.

    Raises:
        ValueError: if there is no attention module, or a form is not valid for one of them.
    """
    if not isinstance(sp, SequenceParallel):
        raise ValueError(f"sp must be a SequenceParallel, got {sp!r}")
    sp = sp.resolved(model)
    layers = attention_layers(model)
    if not layers:
        raise ValueError("model must have an attention module of attnzoo, got none")
    for layer in layers:
        form_of(layer, sp)
    for layer in layers:
        before, layer.sequence_parallel = layer.sequence_parallel, sp
        if before is not None and getattr(layer, "aux_loss_group", None) is before.group:
            layer.aux_loss_group = None
        if sp.form != "hybrid" and sp.size > 1 and getattr(layer, "aux_loss_group", sp) is None:
            layer.aux_loss_group = sp.group
    return model


def attention_layers(model: nn.Module) -> list[Any]:
    """The mechanisms of a model that are not part of another one."""
    return [module for module in model.modules() if hasattr(module, "sequence_forms")]


def forms_of(module: Any) -> tuple[str, ...]:
    """The forms that a mechanism says its forward has.

    They count only if the class that names them is the one that defines `forward`, or a subclass of it: a subclass with
    another forward has to say so itself.
    """
    for cls in type(module).__mro__:
        if "sequence_forms" in vars(cls):
            forms: tuple[str, ...] = module.sequence_forms
            return forms
        if "forward" in vars(cls):
            return ()
    return ()


def form_of(module: Any, sp: SequenceParallel, tokens: int = 0) -> str:
    """The form in which a mechanism runs with so many tokens of its own; raises ValueError with the reason if none."""
    forms, name = forms_of(module), type(module).__name__
    obstacle = module.sequence_reason if not forms else module.sequence_obstacle()
    if not obstacle and sp.layout == "striped" and (forms == ("state",) or module.sliding_window is not None):
        obstacle = "layout 'striped' takes windows and blocks of tokens apart"
    if not obstacle and module.dropout and forms != ("state",):
        obstacle = f"dropout of attention weights must be 0, got {module.dropout}"
    if obstacle:
        raise ValueError(f"{name} cannot run on a sharded sequence: {obstacle}")
    form = sp.form
    if form == "auto":
        return _automatic(module, forms, sp, tokens)
    if form not in forms and not (form == "hybrid" and {"ring", "heads"} <= set(forms) and not module.mixes_heads):
        raise ValueError(
            f"form must be one of {', '.join(forms)} or auto for {name}, got {form!r}: {_why(form, forms)}"
        )
    if form in ("heads", "hybrid"):
        obstacle = module.split_obstacle(dist.get_world_size(sp.groups[-1]))
        if obstacle:
            raise ValueError(f"form {form!r} needs {obstacle}")
    return form


def _why(form: str, forms: tuple[str, ...]) -> str:
    if forms == ("state",):
        return "its tokens are summed into states, so there are no keys to gather or pass on"
    if form == "state":
        return "only linear attention has a state"
    return "its keys or weights depend on more than the block of keys that travels"


def _automatic(module: Any, forms: tuple[str, ...], sp: SequenceParallel, tokens: int) -> str:
    """What "auto" takes: heads where key/value heads divide, a ring where it hides its transfers, else gather."""
    if forms == ("state",):
        return "state"
    if "heads" in forms and module.splits_evenly(sp.size):
        return "heads"
    work = module.num_heads * (module.head_dim + module.v_head_dim)
    hidden = tokens >= module.cache_bytes_per_token() * FLOPS / (work * BANDWIDTH)
    return "ring" if "ring" in forms and not module.mixes_heads and tokens and hidden else "gather"


@dataclass(frozen=True, eq=False)
class Shards:
    """What a call on a shard knows beside its tensors.

    Attributes:
        sp: the layout.
        form: the one in use, or "cache" for new tokens, equal on all ranks, over a sharded cache.
        tokens: all T of the sequence, cached ones included.
        positions: (t,) of the queries.
        storage: the mechanism's cache type, which knows what of its states has to be kept.
        ops: `attnzoo.ops.distributed_attention`, to which operations pass on what they get with shards.
        key_positions: (S,) of the keys in a sharded cache.
    """

    sp: SequenceParallel
    form: str
    tokens: int
    positions: Tensor
    storage: Any
    ops: Any
    key_positions: Tensor | None = None

    def rotation_positions(self, mask: AttentionMask | None, batch: int) -> Tensor:
        """Positions of the queries for the rotation: (t,), or (B, t) restarting in each packed document."""
        packed = None if mask is None else mask.positions(batch, self.tokens)
        return self.positions if packed is None else packed.index_select(1, self.positions)

    def real_queries(self, mask: AttentionMask) -> Tensor | None:
        """Which of the queries (B, t) are tokens and not padding, by a mask of the whole sequence; None if all."""
        if mask.real_queries is not None:
            return mask.real_queries.index_select(1, self.positions)
        return None if mask.lengths is None else self.positions < mask.lengths[:, None]

    def gathered(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States (B, t, ..) of all tokens in their order, (B, T, ..), in one message."""
        widths = [math.prod(state.shape[2:]) for state in states]
        whole = unshard(torch.cat([state.flatten(2) for state in states], -1), 1, self.sp)
        parts = zip(whole.split(widths, -1), states, strict=True)
        return tuple(part.unflatten(-1, state.shape[2:]) for part, state in parts)

    def summed(self, x: Tensor) -> Tensor:
        """Sum of x over the ranks, without gradient."""
        for group in self.sp.groups:
            x = collectives.all_reduce(x, group)
        return x
