"""Every mechanism once, with the options that the contract tests run over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import attnzoo

E, H, G = 32, 4, 2
Make = Callable[..., nn.Module]

# A new mechanism is one line here: a function of embed_dim and any common option.
MECHANISMS: dict[str, Make] = {
    "mha": lambda embed_dim=E, **options: attnzoo.MultiHeadAttention(embed_dim, H, **options),
    "mqa": lambda embed_dim=E, **options: attnzoo.MultiQueryAttention(embed_dim, H, **options),
    "gqa": lambda embed_dim=E, **options: attnzoo.GroupedQueryAttention(embed_dim, H, G, **options),
    "gta": lambda embed_dim=E, **options: attnzoo.GroupedTiedAttention(embed_dim, H, G, **options),
    "kha": lambda embed_dim=E, **options: attnzoo.KnockingHeadsAttention(embed_dim, H, G, **options),
    "kha-linear": lambda embed_dim=E, **options: attnzoo.KnockingHeadsAttention(
        embed_dim, H, G, variant="linear", **options
    ),
    "kha-gta": lambda embed_dim=E, **options: attnzoo.KnockingHeadsAttention(embed_dim, H, G, base="gta", **options),
}

# Options that change what attention sees or computes; each is run with each mechanism that takes it.
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "no-rope": {"rope": None},
    "qk-norm": {"qk_norm": True},
    "window": {"sliding_window": 5},
    "window-sinks": {"sliding_window": 5, "sink_tokens": 2},
    "zero-sink": {"sink": "zero"},
    "learned-sink": {"sink": "learned"},
    "softcap": {"logit_softcap": 3.0},
    "alibi": {"alibi": True, "rope": None},
}


def build(name: str, *, dtype: torch.dtype = torch.float64, perturbed: bool = True, **options: object) -> nn.Module:
    """The mechanism, its parameters moved off their start so that identity and zero starts hide nothing."""
    module = MECHANISMS[name](**options).to(dtype)
    if perturbed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(dtype))
    return module


def gradients(module: nn.Module, x: Tensor, weight: Tensor, **call: object) -> dict[str, Tensor]:
    """Output, and the gradient of (y * weight).sum() for x and every parameter."""
    x = x.detach().clone().requires_grad_()
    y = module(x, **call)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * weight).sum(), [x, *named.values()])
    return {"y": y.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


@contextmanager
def exact_numbers() -> Iterator[None]:
    """Deterministic algorithms only."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
