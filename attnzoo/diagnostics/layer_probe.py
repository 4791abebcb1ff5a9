"""An attention module run alone on random hidden states: what it computes of what its attributes seem to say.

Names prove nothing: fused projections come in several orders, and norms of queries and keys have many names. So a
layer is run on one token, at position 0 where rotations do nothing, in float64 and without biases, and what enters its
products of queries with keys and of weights with values is compared with what its weights give.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

Weights = tuple[Tensor, Tensor, Tensor]
"""Of queries (H D, E), keys (G D, E) and values (G Dv, E), rows head by head."""

Norm = tuple[nn.Module, torch.Size]
"""A norm of queries, keys or values of one token, and the shape that it takes."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_WITHIN = 1e-3
_ROTARY = ("position_embeddings", "rotary_pos_emb")
"""Names by which modules are given rotary tables."""


@dataclass
class _Run:
    """What was seen in one call of a module.

    Attributes:
        products: operands of batched products and of fused attention, in order.
        calls: submodules that were called with one tensor, with it and with what they returned.
    """

    products: list[tuple[Tensor, ...]] = field(default_factory=list)
    calls: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)


class _Products(TorchDispatchMode):
    def __init__(self, products: list[tuple[Tensor, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "bmm" in name or "scaled_dot_product" in name:
            tensors = [x for x in args if isinstance(x, Tensor)]
            self.products.append(tuple(tensors[-2:] if "bmm" in name else tensors[:3]))
        return func(*args, **(kwargs or {}))


def verified(
    name: str, module: nn.Module, projection: nn.Module, layouts: Sequence[Callable[[], Weights]], num_heads: int,
    num_kv_heads: int,
) -> Weights:  # fmt: skip
    """The weights in the first of these layouts that the module computes with, norms of queries and keys folded in.

    Args:
        name: of the layer, for the message.
        module: the attention module.
        projection: its output projection.
        layouts: weights as they might be.
        num_heads: H.
        num_kv_heads: G.

    Raises:
        ValueError: if the module computes none of them, or cannot be run alone.
    """
    first = tuple(weight.detach() for weight in layouts[0]())
    if any(weight.is_meta for weight in first):
        raise ValueError(f"layer {name!r} must have its weights to be read, got a module on the meta device")
    if not _are_finite(module):
        raise ValueError(f"layer {name!r} must have finite weights to be read, got some that are not")
    failure: str | None = None
    x = torch.randn(first[0].shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(first[0].device)
    for call in calls_of(module, x[None, None], first[0].shape[0] // num_heads, num_heads):
        try:
            run = _run(module, call)
        except Exception as error:
            failure = (
                f" ({type(error).__name__} when it is called alone: {line_of(error)})" if failure is None else failure
            )
            continue
        failure = ""
        for layout in layouts:
            weights = tuple(weight.detach().double() for weight in layout())
            folded = _computed(run, weights, x, projection, num_heads, num_kv_heads)
            if folded is not None:
                return tuple(w.to(first[0].dtype) for w in folded)  # type: ignore[return-value]
    raise ValueError(
        f"layer {name!r} cannot be read: {type(module).__name__} does not compute the queries, keys and values that "
        f"its projections seem to give{failure or ''}; masks and patterns of its heads do not need them"
    )


def _are_finite(module: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def rotated_features(module: nn.Module, queries: Tensor, num_heads: int, rope_dim: int) -> Tensor | None:
    """Which features of a head (D,) depend on its token's place: seen on two equal tokens at the first two places.

    Args:
        module: the attention module.
        queries: their weight (H D, E), rows head by head; only its sizes are used.
        num_heads: H.
        rope_dim: features of the model's rotary tables, or 0 if it seems to have none.

    Returns:
        Boolean (D,), or None if the module cannot be run alone.
    """
    D = queries.shape[0] // num_heads
    x = torch.randn(queries.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = x.to(queries.device).expand(1, 2, -1)
    for still, turned in zip(
        *(calls_of(module, tokens, rope_dim or D, num_heads, turned=turned) for turned in (False, True)), strict=True
    ):
        try:
            before, after = _run(module, still).products, _run(module, turned).products
        except Exception:  # The next way of calling it may be the right one.
            continue
        for (q, *_), (turned_q, *_) in zip(before, after, strict=True):
            # The first product of this size is the one with the keys; a linear layer's is not of single heads.
            if q.numel() == num_heads * 2 * D and q.shape[-2:] == (2, D):
                places = turned_q.detach().double().reshape(num_heads, 2, D)
                first, second = places[:, 0], places[:, 1]
                # A place may also scale queries, which is no rotation.
                second = second * (first.norm(dim=-1, keepdim=True) / second.norm(dim=-1, keepdim=True))
                # Above the rounding of modules that rotate in float32.
                moved: Tensor = ((second - first).abs() > 1e-6 * first.abs().amax()).any(0)
                return moved
    return None


def norms_after(module: nn.Module, linears: Sequence[nn.Module], width: int, num_heads: int) -> list[Norm | None]:
    """The norm that the output of each of these projections enters, with the shape in which it does, or None.

    Raises:
        ValueError: if the module cannot be run alone, or its weights are not finite.
    """
    if not _are_finite(module):
        raise ValueError("its weights are not finite")
    weight: Any = linears[0].weight
    x = torch.randn(1, 1, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    failure = "it takes no hidden states"
    for call in calls_of(module, x.to(weight.device), width, num_heads):
        try:
            run = _run(module, call)
        except Exception as error:
            failure = line_of(error)
            continue
        outputs = {linear: out for linear, _, out in run.calls}
        if all(linear in outputs for linear in linears):
            return [_norm_of(run, outputs[linear].flatten().double(), linears) for linear in linears]
        failure = "it does not call its projections"
    raise ValueError(f"{type(module).__name__} cannot be run alone on hidden states: {failure}")


def calls_of(
    module: nn.Module, x: Tensor, width: int, num_heads: int, *, turned: bool = False
) -> Iterator[dict[str, Any]]:
    """Ways of calling an attention module alone on hidden states x (1, T, E), the usual ones first.

    Nothing is rotated; or, if turned, every token but the first, by tables of `width` features or by its position.
    """
    parameters = inspect.signature(module.forward).parameters
    plain = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    T = x.shape[1]
    known: dict[str, Any] = {
        "position_ids": torch.arange(T, device=x.device)[None] * int(turned),
        "cu_seqlens": torch.tensor([0, T], dtype=torch.int32, device=x.device),
        "max_seqlen": T,
        "alibi": x.new_zeros(num_heads, 1, T),
        "residual": torch.zeros_like(x),
    }
    rotated = [p.name for p in plain if p.name in _ROTARY]
    inputs = [x, x[0]] if "cu_seqlens" in parameters else [x]
    masks = [None, x.new_zeros(1, 1, T, T)] if "attention_mask" in parameters else [None]
    for states, mask in itertools.product(inputs, masks):
        for turn in _rotations(x, width, turned) if rotated else [None]:
            keywords: dict[str, Any] = {"attention_mask": mask} if mask is not None else {}
            for number, parameter in enumerate(plain):
                if number == 0 or parameter.name in ("query", "key", "value"):
                    keywords[parameter.name] = states
                elif parameter.name in rotated:
                    keywords[parameter.name] = turn
                elif parameter.name in known:
                    keywords[parameter.name] = known[parameter.name]
                elif parameter.default is parameter.empty and parameter.name not in keywords:
                    is_states = parameter.name.endswith("states") or parameter.name == "context"
                    keywords[parameter.name] = states if is_states else None
            yield keywords


def _rotations(x: Tensor, width: int, turned: bool) -> Iterator[Any]:
    """Rotary tables of angle 0, if turned of a half turn after the first token, of the forms that modules take."""
    cosines = x.new_ones(1, x.shape[1], 1)
    if turned:
        cosines[:, 1:] = -1
    for size, lead in itertools.product((width, 1, width // 2), (cosines, cosines[0])):
        yield lead.expand(*lead.shape[:-1], size), x.new_zeros(*lead.shape[:-1], size)
    yield cosines.expand(-1, -1, max(width // 2, 1)).to(torch.complex128)
    yield None


def _run(module: nn.Module, call: dict[str, Any]) -> _Run:
    run = _Run()

    def record(submodule: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(out, Tensor):
            run.calls.append((submodule, inputs[0], out))

    with alone(module), torch.no_grad(), _Products(run.products):
        for submodule in module.modules():
            if submodule is not module:
                submodule.register_forward_hook(record)
        functional_call(module, _doubled(module), (), call)
    return run


def _doubled(module: nn.Module) -> dict[str, Tensor]:
    """A module's floating-point parameters and buffers in float64, its biases 0."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: torch.zeros_like(t, dtype=torch.float64) if "bias" in name.rpartition(".")[2] else t.detach().double()
        for name, t in tensors.items()
        if t.is_floating_point()
    }


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without hooks, with attention as transformers' eager functions compute it."""
    before = [(sub, sub.training, {name: sub.__dict__[name] for name in _HOOKS}) for sub in module.modules()]
    config: Any = getattr(module, "config", None) or getattr(getattr(module, "self", None), "config", None)
    implementation = getattr(config, "_attn_implementation_internal", None)
    try:
        for sub, _, _ in before:
            sub.training = False
            sub.__dict__.update({name: OrderedDict() for name in _HOOKS})
        if implementation is not None:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for sub, training, hooks in before:
            sub.training = training
            sub.__dict__.update(hooks)
        if implementation is not None:
            config._attn_implementation_internal = implementation


def _computed(
    run: _Run, weights: Sequence[Tensor], x: Tensor, projection: nn.Module, H: int, G: int
) -> Sequence[Tensor] | None:
    """The weights with norms folded in if the run's products are of what they give, else None."""
    folded, normed = zip(*(_with_norm(run, weight, x, projection) for weight in weights), strict=True)
    q, k, v = ((weight @ x).view(heads, -1) for weight, heads in zip(folded, (H, G, G), strict=True))
    k, v = (each.repeat_interleave(H // G, 0) for each in (k, v))

    def shows(operand: Tensor, expected: Tensor, stretched: bool) -> bool:
        found = operand.detach().double()
        if found.numel() * H == expected.numel() * G:
            found = found.reshape(G, -1).repeat_interleave(H // G, 0)
        return found.numel() == expected.numel() and _parallel(found.reshape_as(expected), expected, stretched)

    scores = any(shows(p[0], q, normed[0]) and shows(p[1], k, normed[1]) for p in run.products)
    values = any(shows(p[-1], v, normed[2]) for p in run.products)
    return folded if scores and values else None


def _parallel(found: Tensor, expected: Tensor, stretched: bool) -> bool:
    """Whether rows are multiples of the expected ones by positive factors, which differ only where stretched."""
    ratio = (found * expected).sum(-1, keepdim=True) / expected.square().sum(-1, keepdim=True).clamp(min=1e-300)
    if not stretched:
        ratio = ratio.mean() * torch.ones_like(ratio)
    error = (found - ratio * expected).abs().amax()
    return bool((ratio > 0).all() and error <= _WITHIN * found.abs().amax())


def _with_norm(run: _Run, weight: Tensor, x: Tensor, projection: nn.Module) -> tuple[Tensor, bool]:
    """The weight with the linear part of the norm that its output enters, and whether there is one."""
    raw = weight @ x
    norm = _norm_of(run, raw, [projection])
    return (weight, False) if norm is None else (_folded(*norm, weight), True)


def _norm_of(run: _Run, raw: Tensor, others: Sequence[nn.Module]) -> Norm | None:
    """The first module that changes these numbers and none of their places, without the others inside."""
    # An adapter's parts take what the projection that it wraps takes.
    apart = {part for other in others for part in other.modules()}
    for norm, seen, out in run.calls:
        if seen.numel() != raw.numel() or seen.shape != out.shape or any(m in apart for m in norm.modules()):
            continue
        given = seen.flatten().double()
        if torch.allclose(given, raw, rtol=_WITHIN, atol=_WITHIN * float(raw.abs().max())) and not torch.equal(
            seen, out
        ):
            return norm, seen.shape
    return None


def _folded(norm: nn.Module, shape: torch.Size, weight: Tensor) -> Tensor:
    """Weight (rows, E) with a norm's gain, and without its mean where the norm subtracts that.

    Measured, since some norms multiply by 1 + weight: a vector with mean square 1 and mean 0 shows its gain, and one
    whose entries are equal is gone where the mean is subtracted.
    """
    size = shape[-1]
    unit = torch.ones(size, dtype=torch.float64, device=weight.device)
    unit[1::2] = -1
    if size % 2 and size > 1:
        unit[-3:] = torch.tensor([0.5, 0.5, -1.0]).to(unit) * 2**0.5
    tensors = _doubled(norm)

    def of(vector: Tensor) -> Tensor:
        # Large, so that the norm's epsilon vanishes; both signs, so that its bias does.
        whole = vector.repeat(shape.numel() // size).view(shape)
        with alone(norm), torch.no_grad():
            up, down = (functional_call(norm, tensors, (sign * 1e4 * whole,)) for sign in (1, -1))
        half: Tensor = (up - down) / 2
        return half.flatten().double()

    gain = of(unit) / unit.repeat(shape.numel() // size)
    if bool((of(torch.ones_like(unit)).abs() < _WITHIN * gain.abs().max()).all()):
        by_group = weight.view(-1, size, weight.shape[1])
        weight = (by_group - by_group.mean(1, keepdim=True)).view_as(weight)
    return weight * gain[:, None]


def folded_norm(norm: nn.Module, weight: Tensor) -> Tensor:
    """Weight (rows, E), detached, with the linear part of a norm over its rows, in the weight's dtype."""
    return _folded(norm, torch.Size((1, 1, weight.shape[0])), weight.detach().double()).to(weight.dtype)


def line_of(error: Exception) -> str:
    """The start of an error's message, for another message."""
    return str(error).strip().split("\n")[0][:120]
