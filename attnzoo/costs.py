"""What a mechanism costs before anybody runs it: parameters, FLOPs, bytes, and the least time on a named device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


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


def cost(
    module: Any,
    batch: int,
    seq: int,
    past: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str | Device | None = None,
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

    Raises:
        ValueError: for sizes below their least, an unknown device, or a dtype that its entry lacks.
    """
    for name, size, least in (("batch", batch, 1), ("seq", seq, 1), ("past", past, 0)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    parts = {name: batch * flops for name, flops in module.flops_by_part(seq, past + seq).items()}
    forward = sum(parts.values())
    parameters = sum(p.numel() for p in module.parameters())
    held = batch * cache_bytes(module, past + seq, dtype)
    activations = 2 * batch * seq * module.embed_dim * dtype.itemsize
    written = batch * min(seq * module.cache_bytes_per_token(dtype), cache_bytes(module, past + seq, dtype))
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
    )


def cache_bytes(module: Any, tokens: int, dtype: torch.dtype) -> int:
    """What the cache of one sequence holds after so many tokens: no more than a window and its sink tokens."""
    return int(module.state_bytes(tokens, dtype))
