"""The computed tolerance: how far a fast form may be from the exact answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[..., Sequence[Tensor]]

# Bytes of an element -> steps allowed beside twice the reference. A gradient through a softmax is the difference
# of do_i v_j and do_i o_i, sums over the value width. Autograd of the definition forms the second of the first, and
# where one key dominates a row their rounding cancels. A kernel that does not keep the weights cannot do that: of 500
# drawn calls in float32 the worst is off by 1.1e-6 where the definition is by 2e-7. Half precision has larger steps.
STEPS = {2: 4, 4: 8}


def assert_as_good_as(fused: Run, reference: Run, *inputs: Tensor) -> None:
    """Outputs and gradients of `fused` are at most twice as far from the float64 answer as those of `reference`.

    Both take the inputs and return one or more floating tensors. Gradients are those of a fixed random weighting of all
    outputs, for every input that requires one. A result's error counts relative to its largest value (at least 1, for
    sums that cancel), and the reference's is the largest among its results of that dtype: the largest of a few numbers
    alone is luck. A few steps of the dtype come on top, see STEPS.
    """
    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    exact = results(reference, *wide)
    plain = results(reference, *inputs)
    fast = results(fused, *inputs)
    assert fast.keys() == plain.keys()
    half = {x.dtype for x in inputs if x.is_floating_point() and x.dtype.itemsize == 2}
    budgets: dict[torch.dtype, float] = {}
    for name, value in plain.items():
        # Where half-precision inputs went in, float32 results carry their rounding too.
        kind = next(iter(half), value.dtype)
        budgets[kind] = max(budgets.get(kind, 0.0), _error(value, exact[name]))
    for name, value in fast.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == plain[name].shape, name
        assert torch.equal(value.isinf(), exact[name].isinf()), f"{name}: infinities"
        kind = next(iter(half), value.dtype)
        allowed = 2 * budgets[kind] + STEPS[kind.itemsize] * torch.finfo(kind).eps
        error = _error(value, exact[name])
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest finite value, or over 1 where that is smaller."""
    finite = ~exact.isinf()
    if not finite.any():
        return 0.0
    scale = max(1.0, float(exact[finite].abs().max()))
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
