"""Whether tensors have values now, or represent values of later calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced() -> bool:
    """Whether a program is being recorded instead of run: compiled, exported, traced, faked or transformed.

    Values must not be read then, since they are not known or would be frozen into the program, and tensors must not
    be remembered for later calls, since they belong to the recording.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        # Modes that only watch, as counters of FLOPs do, make plain tensors.
        or (torch._C._len_torch_dispatch_stack() > 0 and type(torch.empty(0)) is not Tensor)
    )


def is_exporting() -> bool:
    """Whether `torch.export` records a program.

    `torch.compiler.is_exporting`, which torch.compile before 2.12 takes for true wherever it meets it.
    """
    return torch.compiler._is_exporting_flag


def is_exported() -> bool:
    """Whether a program is being recorded that will run for other sizes: exported or traced."""
    return is_exporting() or torch._C._get_tracing_state() is not None


def in_forward_mode() -> bool:
    """Whether derivatives may be carried along in the forward pass, as by `torch.func.jvp` and `jacfwd`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def has_values(tensor: Tensor) -> bool:
    """Whether the host may read what is in a tensor, at the cost of waiting for its device."""
    return not (tensor.is_meta or is_traced())


def is_readable(tensor: Tensor) -> bool:
    """Whether reading the tensor's values costs no device synchronisation and breaks no recording."""
    return tensor.device.type == "cpu" and not is_traced()
