"""Projections by experts on the kernels against the definition: outputs, every gradient, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, library

import attnzoo
from attnzoo.ops.expert_projection import Routes, _kernels_run, expert_linear_pieces
from attnzoo_kernels import tuning
from attnzoo_kernels.expert_projection import expert_linear as kernel
from tests.kernels.tiles import SMALL
from tests.kernels.tolerance import assert_as_good_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def slow(*values: Any) -> Any:
    """A case that runs with the slow tests only."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Tokens n, slots k, experts N, pieces g of the input, pieces of the output, width of the input, of the output.
PIECES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "queries": (23, 2, 5, 1, 2, 40, 36),
    "outputs": (23, 2, 5, 2, 1, 36, 40),
    "both in pieces": (17, 3, 4, 3, 2, 9, 6),
    "one expert": (18, 1, 1, 1, 1, 7, 5),
    "one token": (1, 2, 3, 1, 1, 16, 16),
    "many experts": (20, 2, 17, 1, 1, 5, 3),
}


def experts(
    n: int, k: int, total: int, g: int, out_groups: int, width: int, out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Routes, Tensor]:
    """x (n, g, k, C), weight, routes in which the last expert gets nothing unless it is alone, gates (n, k)."""
    generator = torch.Generator().manual_seed(3)
    high = torch.promote_types(dtype, torch.float32)
    shapes = (((n, g, k, width // g), dtype), ((total, out, width), dtype), ((n, k), high))
    x, weight, gates = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, kind).requires_grad_()
        for shape, kind in shapes
    )
    chosen = torch.randint(0, max(total - 1, 1), (n * k,), generator=generator).to(DEVICE)
    return x, weight, Routes.of(chosen, total), gates


@pytest.mark.parametrize(("gated", "shared"), [(True, False), (False, True), slow(True, True), slow(False, False)])
@pytest.mark.parametrize("name", PIECES)
def test_expert_projection_is_the_definition(name: str, gated: bool, shared: bool) -> None:
    assert_same(name, gated, shared, torch.float32, SMALL)


@pytest.mark.parametrize("name", ["queries", "outputs"])
def test_expert_projection_in_half_precision(name: str) -> None:
    assert_same(name, True, False, torch.float16, SMALL)
    assert_same(name, True, False, torch.float32, None)


def assert_same(name: str, gated: bool, shared: bool, dtype: torch.dtype, config: tuning.Config | None) -> None:
    x, weight, routes, gates = experts(*PIECES[name], dtype)
    slots, out_groups = PIECES[name][1], PIECES[name][4]
    x = x[:, :, :1].detach().requires_grad_() if shared else x

    def call(backend: str) -> Any:
        def made(x: Tensor, weight: Tensor, gates: Tensor | None = None) -> list[Tensor]:
            x = x.expand(-1, -1, slots, -1)
            return [
                expert_linear_pieces(x, weight, routes, out_groups=out_groups, gates=gates, backend=backend)
            ]  # fmt: skip

        def pinned(*given: Tensor) -> list[Tensor]:
            with tuning.pinned(config):
                return made(*given)

        return made if config is None or backend != "triton" else pinned

    assert_as_good_as(call("triton"), call("eager"), x, weight, *([gates] if gated else []))


def test_an_expert_without_rows_gets_a_gradient_of_zero_and_two_runs_are_equal() -> None:
    x, weight, routes, gates = experts(*PIECES["queries"])
    assert routes.counts[-1] == 0

    def once() -> list[Tensor]:
        with tuning.pinned(SMALL):
            y = expert_linear_pieces(x, weight, routes, out_groups=2, gates=gates, backend="triton")
            return [y, *torch.autograd.grad((y * y).sum(), (x, weight, gates))]

    one, two = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not one[2][-1].any()
    assert one[2][:-1].any()


def test_no_rows_at_all() -> None:
    x, weight, routes, gates = experts(0, 2, 3, 1, 1, 4, 4)
    y = expert_linear_pieces(x, weight, routes, gates=gates, backend="triton")
    assert y.shape == (0, 1, 2, 4)
    dw, dgates = torch.autograd.grad(y.sum(), (weight, gates))
    assert not dw.any()
    assert dgates.shape == (0, 2)


def test_strides_do_not_matter() -> None:
    x, weight, routes, gates = experts(*PIECES["both in pieces"])
    ends = routes.counts.cumsum(0).int()
    with tuning.pinned(SMALL):
        plain = kernel(x, weight, routes.order, ends, out_groups=2, gates=gates)
        turned = [z.detach().transpose(0, -1).contiguous().transpose(0, -1) for z in (x, weight, gates)]
        assert torch.equal(kernel(turned[0], turned[1], routes.order, ends, out_groups=2, gates=turned[2]), plain)


def test_registration() -> None:
    """torch's own checks of the operator: schema, fake tensors, autograd registration."""
    x, weight, routes, gates = experts(*PIECES["both in pieces"])
    ends = routes.counts.cumsum(0).int()
    library.opcheck(torch.ops.attnzoo.expert_linear.default, (x, weight, routes.order, ends, gates, 2))


def test_what_the_kernels_refuse() -> None:
    x, weight, routes, _ = experts(3, 2, 2, 1, 1, 4, 4, torch.float64)
    with pytest.raises(attnzoo.BackendUnavailable, match="'triton' cannot run expert_linear: the kernels take float16"):
        expert_linear_pieces(x, weight, routes, backend="triton")
    with pytest.raises(attnzoo.BackendUnavailable, match="rows and matrices of one dtype, got torch"):
        expert_linear_pieces(x.float(), weight, routes, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter on a CPU")
def test_auto_on_a_cpu_and_bfloat16_never_reach_the_interpreter() -> None:
    x, weight, routes, _ = experts(*PIECES["queries"])
    assert not _kernels_run(x, weight, "auto")
    assert _kernels_run(x, weight, "triton")
    with pytest.raises(attnzoo.BackendUnavailable, match="Triton's interpreter multiplies bfloat16 wrongly"):
        expert_linear_pieces(x.bfloat16(), weight.bfloat16(), routes, backend="triton")
