"""What a mechanism costs before anybody runs it: parameters, FLOPs, bytes, and the least time on a named device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnzoo.distributed.costs import bytes_sent
from attnzoo.distributed.sequence import FORMS, forms_of
from attnzoo.rules import INTEGER, RULES, check, check_sizes, one_of


@dataclass(frozen=True)
class Device:
    """Peaks of an accelerator, from its maker's data sheet.

    Attributes:
        flops: FLOP/s of dense matrix products by dtype.
        bandwidth: bytes/s of its memory.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float


def _peaks(half: float, single: float, bandwidth: float) -> Device:
    return Device({torch.bfloat16: half, torch.float16: half, torch.float32: single}, bandwidth)


DEVICES = {
    "A100": _peaks(312e12, 19.5e12, 2.039e12),  # SXM, 80 GB
    "H100": _peaks(989e12, 67e12, 3.35e12),  # SXM
    "H200": _peaks(989e12, 67e12, 4.8e12),
}


@dataclass(frozen=True)
class Cost:
    """The cost of one call; see `cost`.

    Attributes:
        parameters: number of the module's parameters.
        flops: forward FLOPs by part, of the whole batch.
        forward_flops: their sum.
        backward_flops: twice that: every product has two gradients. Recomputing scores, as fused kernels do, adds
            half of the attention's forward FLOPs.
        cache_bytes: what the cache holds after the call, which is what the attention reads.
        bytes_moved: the least that passes memory: weights, input, output, states written and read, each once.
        intensity: forward FLOPs over bytes moved.
        attention_intensity: FLOPs of the attention alone over cache_bytes.
        seconds: the least forward time, max(FLOPs / peak, bytes / bandwidth); None without a device.
        bound: "compute" or "memory", whichever decides; None without a device.
        bytes_sent: bytes that a rank of a mesh sends to others, forward; 0 without a mesh.
        bytes_sent_backward: the same in the backward pass.
    """

    parameters: int
    flops: Mapping[str, int]
    forward_flops: int
    backward_flops: int
    cache_bytes: int
    bytes_moved: int
    intensity: float
    attention_intensity: float
    seconds: float | None
    bound: str | None
    bytes_sent: int = 0
    bytes_sent_backward: int = 0


def cost(
    module: Any,
    batch: int,
    seq: int,
    past: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str | Device | None = None,
    mesh: Mapping[str, int] | None = None,
    form: str = "auto",
) -> Cost:
    """What a forward call of a causal mechanism costs: prefill with past = 0, decoding with seq = 1.

    The module may be on the meta device. FLOPs are 2 for each multiply-add of a matrix product; pairs that
    causality or a window hides are not counted. Bytes are the floor of a perfectly fused implementation.

    Args:
        module: a mechanism of this library.
        batch: sequences.
        seq: new tokens of each.
        past: tokens in the cache.
        dtype: of weights, activations and cache.
        device: "A100", "H100", "H200", or a `Device` with peak numbers, for the time.
        mesh: ranks by name, "sequence" (`attnzoo.distributed`) and "tensor" (heads); then everything is of one rank of
            an even split, and the time is without that of messages. Sequences are those of one data-parallel rank.
        form: in which the sequence is spread.

    Raises:
        ValueError: for sizes below their least, past tokens of a module that is not causal, an unknown device, a dtype
            that its entry lacks, or a mesh that the mechanism cannot be spread over.
    """
    if not isinstance(module, torch.nn.Module) or not hasattr(module, "flops_by_part"):
        raise ValueError(f"module must be an attention mechanism, got {type(module).__name__}")
    batch, seq = check_sizes(batch=batch, seq=seq)
    check("past", past, (*INTEGER, (lambda size: size >= 0, "be at least 0")))
    if past and not module.causal:
        raise ValueError(f"past must be 0 for a module with causal=False, which has no cache, got {past}")
    check("dtype", dtype, RULES["dtype"])
    check("form", form, one_of("auto", *FORMS))
    parameters = sum(p.numel() for p in module.parameters())
    ranks, sent = 1, (0, 0)
    if mesh is not None:
        if not isinstance(mesh, Mapping):
            raise ValueError(f"mesh must be a mapping of 'sequence' and 'tensor' to ranks, got {mesh!r}")
        if unknown := set(map(str, mesh)) - {"sequence", "tensor"}:
            raise ValueError(f"mesh must name 'sequence' and 'tensor' ranks, got {', '.join(sorted(unknown))}")
        ranks, tensor = check_sizes(**{f"mesh[{name!r}]": mesh.get(name, 1) for name in ("sequence", "tensor")})
        if ranks > 1 and (past or seq % ranks):
            raise ValueError(f"seq must be a multiple of the sequence ranks {ranks} and past 0, got {seq} and {past}")
        module, parameters = of_a_rank(module, tensor)
        one = messages(module, seq, ranks, tensor, dtype, form)
        sent = batch * one[0], batch * one[1]
    parts = {name: batch * flops // ranks for name, flops in module.flops_by_part(seq, past + seq).items()}
    forward = sum(parts.values())
    held = batch * cache_bytes(module, past + seq, dtype) // ranks
    activations = 2 * batch * seq * module.embed_dim * dtype.itemsize // ranks
    written = batch * min(seq * module.cache_bytes_per_token(dtype), cache_bytes(module, past + seq, dtype)) // ranks
    moved = parameters * dtype.itemsize + activations + written + held
    seconds, bound = None, None
    if device is not None:
        peaks = device if isinstance(device, Device) else DEVICES.get(device)
        if peaks is None:
            raise ValueError(f"device must be one of {', '.join(DEVICES)} or a Device, got {device!r}")
        if dtype not in peaks.flops:
            raise ValueError(f"dtype must be one that the device's peaks name, got {dtype}")
        compute, memory = forward / peaks.flops[dtype], moved / peaks.bandwidth
        seconds, bound = max(compute, memory), "compute" if compute > memory else "memory"
    return Cost(
        parameters=parameters,
        flops=parts,
        forward_flops=forward,
        backward_flops=2 * forward,
        cache_bytes=held,
        bytes_moved=moved,
        intensity=forward / moved,
        attention_intensity=parts.get("attention", 0) / held if held else 0.0,
        seconds=seconds,
        bound=bound,
        bytes_sent=sent[0],
        bytes_sent_backward=sent[1],
    )


class _FirstRank:
    """A group of processes that do not run, seen from its first rank."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size


def of_a_rank(module: Any, tensor: int) -> tuple[Any, int]:
    """The module with the numbers of heads of one of so many tensor-parallel ranks, and its parameters there."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    if tensor == 1:
        return module, sum(sizes.values())
    module.tensor_parallel_plan()
    if (obstacle := module.tensor_obstacle(tensor)) is not None:
        raise ValueError(f"{type(module).__name__} cannot be split over {tensor} ranks: {obstacle}")
    splits = module.tensor_splits()
    groups = module.num_kv_heads
    parameters = 0
    for name, size in sizes.items():
        kind = next(kind for own, kind in splits.items() if name == own or name.startswith(f"{own}."))
        whole = kind in ("whole", "shared", "read by all") or (kind == "groups" and groups % tensor)
        whole = whole or (kind == "columns" and name.endswith("bias"))
        parameters += size if whole else size // tensor
    part = copy.copy(module)
    part._modules = {name: copy.copy(child) for name, child in module._modules.items()}
    part.take_heads(_FirstRank(tensor))
    return part, parameters


def messages(module: Any, seq: int, ranks: int, tensor: int, dtype: torch.dtype, form: str) -> tuple[int, int]:
    """Bytes that a rank sends for one sequence, forward and backward.

    Tensor parallelism adds an all-reduce of the output, and backward one of the input's gradient for each projection
    that is split; an all-reduce of n numbers over t ranks sends 2 (t - 1) / t n.
    """
    reduced = 2 * (tensor - 1) * (seq // ranks) * module.embed_dim * dtype.itemsize // tensor
    kinds = module.tensor_splits().items() if tensor > 1 else ()
    split = sum(
        kind in ("heads", "groups", "rows") and isinstance(dict(module.named_modules()).get(name), torch.nn.Module)
        for name, kind in kinds
    )
    if ranks == 1:
        return reduced, split * reduced
    forms = forms_of(module)
    if not forms:
        raise ValueError(f"{type(module).__name__} cannot run on a sharded sequence: {module.sequence_reason}")
    if form == "auto":
        even = "heads" in forms and module.splits_evenly(ranks)
        form = "state" if "state" in forms else "heads" if even else "gather"
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)} or auto for {type(module).__name__}, got {form!r}")
    if form == "heads" and (obstacle := module.split_obstacle(ranks)) is not None:
        raise ValueError(f"form 'heads' needs {obstacle}")
    forward, backward = bytes_sent(module, form, seq, ranks, dtype)
    return forward + reduced, backward + split * reduced


def cache_bytes(module: Any, tokens: int, dtype: torch.dtype) -> int:
    """What the cache of one sequence holds after so many tokens: no more than a window and its sink tokens."""
    return int(module.state_bytes(tokens, dtype))
