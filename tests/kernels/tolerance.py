"""The computed tolerance: how far a fast form may be from the exact answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor]]

# (device, bytes of an element) -> steps allowed beside twice the reference. A gradient through a softmax is the
# difference of do_i v_j and do_i o_i, sums over the value width. Autograd of the definition forms the second of the
# first, and where one key dominates a row their rounding cancels. A kernel that does not keep the weights cannot do
# that: of 500 drawn calls in float32 the worst is off by 1.1e-6 where the definition is by 2e-7. The exp2, log2 and
# division of the interpreter are exact, those of a GPU are off by two units in the last place each. Products in
# TensorFloat-32 would be off by thousands of steps. Half precision has larger steps.
STEPS = {("cpu", 2): 4, ("cpu", 4): 8, ("cuda", 2): 4, ("cuda", 4): 32}
Results = dict[str, Tensor]


def assert_as_good_as(fused: Run, reference: Run, *inputs: Tensor, least: float = 1.0) -> None:
    """Outputs and gradients of `fused` are at most twice as far from the float64 answer as those of `reference`.

    Both take the inputs and return one or more floating tensors. Gradients are those of a fixed random weighting of all
    outputs, for every input that requires one. Errors and what is allowed are those of `deviations`.
    """
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    exact = results(reference, *wide)
    plain = results(reference, *inputs)
    fast = results(fused, *inputs)
    assert fast.keys() == plain.keys()
    for name, value in fast.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == plain[name].shape, name
        assert torch.equal(value.isinf(), exact[name].isinf()), f"{name}: infinities"
    for name, (error, allowed) in deviations(fast, plain, exact, kind_of(inputs), least).items():
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def kind_of(inputs: Sequence[Tensor]) -> torch.dtype:
    """The dtype whose rounding results of these inputs carry: half precision where any of them has it."""
    return min((x.dtype for x in inputs if x.is_floating_point()), key=lambda dtype: dtype.itemsize)


def deviations(
    fast: Results, plain: Results, exact: Results, kind: torch.dtype, least: float = 1.0
) -> dict[str, tuple[float, float]]:
    """Error of every result and what is allowed: twice that of the same result of the definition, and a few steps.

    An error counts relative to the result's largest value, and to `least` where that is smaller, for sums that cancel.
    Where half-precision inputs went in, float32 results carry their rounding too: kind is `kind_of` the inputs. Of a
    result of a few numbers, which the definition may hit by luck, the least that its others are off by counts too. And
    in float32 the most that any gradient is off by counts for all of them: a kernel forms the weights anew from scores,
    whose rounding is in every gradient then, and in the definition only in those of queries and keys.
    """
    own = {name: error_of(value, exact[name], least) for name, value in plain.items()}
    many = [error for name, error in own.items() if plain[name].numel() >= FEW]
    usual = min(many, default=max(own.values(), default=0.0))
    shared = max((error for name, error in own.items() if name.startswith("gradient")), default=0.0)
    found = {}
    for name, value in fast.items():
        budget = own[name] if value.numel() >= FEW else max(own[name], usual)
        if kind.itemsize == 4 and name.startswith("gradient"):
            budget = max(budget, shared)
        steps = STEPS[value.device.type, kind.itemsize] * torch.finfo(kind).eps
        found[name] = error_of(value, exact[name], least), 2 * budget + steps
    return found


FEW = 256


def error_of(value: Tensor, exact: Tensor, least: float = 1.0) -> float:
    """Largest difference over the largest finite value, or over `least` where that is smaller."""
    finite = ~exact.isinf()
    if not finite.any():
        return 0.0
    scale = max(least, float(exact[finite].abs().max()))
    error = float((value.double() - exact)[finite].abs().max()) / scale
    return error if error == error else float("inf")


def results(run: Run, *inputs: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    outputs = run(*inputs)
    result = {f"output {n}": out.detach() for n, out in enumerate(outputs)}
    wanted = [(n, x) for n, x in enumerate(inputs) if x.requires_grad]
    loss = 0
    for out in outputs:
        if not out.requires_grad:
            continue
        generator = torch.Generator().manual_seed(out.numel())
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
        # An infinite log-sum-exp carries no gradient and must not turn the sum into NaN.
        loss = loss + (out.masked_fill(out.isinf(), 0.0) * weight).double().sum()
    if wanted and isinstance(loss, Tensor):
        grads = torch.autograd.grad(loss, [x for _, x in wanted], allow_unused=True)
        for (n, x), grad in zip(wanted, grads, strict=True):
            result[f"gradient {n}"] = torch.zeros_like(x) if grad is None else grad
    return result
