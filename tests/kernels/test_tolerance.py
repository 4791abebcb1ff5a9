"""What the computed tolerance lets pass and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attnzoo.masks import Visibility
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo_kernels import tuning
from tests.kernels import tolerance
from tests.kernels.tiles import SMALL
from tests.kernels.tolerance import assert_as_good_as, deviations


@pytest.mark.parametrize(
    ("dtype", "other", "size"),
    [(torch.float32, "output 0", 1e-4), (torch.bfloat16, "output 0", 0.1), (torch.bfloat16, "gradient 1", 0.1)],
)
def test_a_result_s_error_does_not_loosen_the_others(dtype: torch.dtype, other: str, size: float) -> None:
    """The definition may be far off in one result: only there may the fast form be."""
    names = ("gradient 0", other)
    exact = {name: torch.ones(300, dtype=torch.float64) for name in names}
    plain = {"gradient 0": torch.ones(300) + 2 * size, other: torch.ones(300)}
    found = deviations({name: torch.ones(300) + size for name in names}, plain, exact, dtype)
    assert {name: error <= allowed for name, (error, allowed) in found.items()} == {"gradient 0": True, other: False}


def test_few_numbers_that_the_definition_hits_by_luck_are_allowed_what_the_others_are() -> None:
    exact = {"output 0": torch.ones(300, dtype=torch.float64), "output 1": torch.ones(2, dtype=torch.float64)}
    plain = {"output 0": torch.ones(300) + 1e-5, "output 1": torch.ones(2)}
    fast = {"output 0": torch.ones(300), "output 1": torch.ones(2) + 1e-5}
    assert all(error <= allowed for error, allowed in deviations(fast, plain, exact, torch.float32).values())
    fast["output 1"] += 2e-5
    error, allowed = deviations(fast, plain, exact, torch.float32)["output 1"]
    assert error > allowed


def test_float32_results_of_half_precision_inputs_carry_their_rounding() -> None:
    x = torch.randn(40, 40).bfloat16()

    def rounded(x: Tensor) -> list[Tensor]:
        return [(x @ x).float()] if x.dtype == torch.bfloat16 else [x @ x]

    def formula(x: Tensor) -> list[Tensor]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return [x @ x]

    assert_as_good_as(rounded, formula, x)
    with pytest.raises(AssertionError, match="output 0: relative error"):
        assert_as_good_as(lambda x: [1.1 * y for y in rounded(x)], formula, x)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> list[Tensor]:
    with tuning.pinned(SMALL):
        return [softmax_attention(q, k, v, Visibility(), backend=backend)]


@pytest.fixture
def calls() -> list[list[Tensor]]:
    """Plain normal numbers, and scores in the tens of which one key has most of the weight."""
    return [[(factor * torch.randn(1, 37, 2, 16)).requires_grad_() for _ in range(3)] for factor in (1.0, 4.0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="changes the interpreter's arithmetic")
def test_the_arithmetic_of_a_gpu_passes_with_its_own_constant(
    calls: list[list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp2, log2 and division off by up to two units in the last place; products in TensorFloat-32 are refused."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(0)

    def off(name: str) -> Any:
        exact = getattr(InterpreterBuilder, name)

        def create(self: Any, *args: Any) -> Any:
            handle = exact(self, *args)
            step = 1 + 2 * np.finfo(np.float32).eps * generator.uniform(-1, 1, handle.data.shape)
            return TensorHandle((handle.data * step).astype(handle.data.dtype), handle.dtype.scalar)

        return create

    for name in ("create_exp2", "create_log2", "create_fdiv"):
        monkeypatch.setattr(InterpreterBuilder, name, off(name))
    monkeypatch.setitem(tolerance.STEPS, ("cpu", 4), tolerance.STEPS["cuda", 4])
    for inputs in calls:
        assert_as_good_as(lambda *x: attention(*x, "triton"), lambda *x: attention(*x, "eager"), *inputs)

    def by_tensor_float_32(*inputs: Tensor) -> list[Tensor]:
        q, k, v = (x + ((x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32) - x).detach() for x in inputs)
        return attention(q, k, v, "eager")

    for inputs in calls:
        with pytest.raises(AssertionError, match="relative error"):
            assert_as_good_as(by_tensor_float_32, lambda *x: attention(*x, "eager"), *inputs)
