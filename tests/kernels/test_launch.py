"""Operators that run by themselves where nobody watches, and launches that are known again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.masks import Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.expert_projection import Routes, expert_linear_pieces
from attnzoo.ops.head_routing import routed_attention
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo_kernels.launch import operator, prepare
from attnzoo_kernels.linear_attention import linear_attention_finish
from attnzoo_kernels.qk_norm_rope import qk_norm_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (1, 6, 2, 16)
ON = (torch.arange(12) % 3 > 0).view(1, 6, 2).to(DEVICE)
EXPERTS = torch.arange(6) % 3

Call = Callable[..., Tensor]
CALLS: dict[str, tuple[list[tuple[int, ...]], Call]] = {
    "softmax_attention": ([SHAPE] * 3, lambda *x: softmax_attention(*x, backend="triton")),
    "sigmoid_attention": ([SHAPE] * 3, lambda *x: sigmoid_attention(*x, backend="triton")),
    "linear_attention": ([SHAPE] * 3, lambda *x: linear_attention(*x, size=4, backend="triton")[0]),
    "linear_attention_finish": (
        [SHAPE, SHAPE],
        lambda out, gate: linear_attention_finish(out, None, gate, eps=1e-5, dtype=torch.float32),
    ),
    "routed_attention": (
        [SHAPE] * 3,
        lambda *x: routed_attention(*x, ON, Visibility(), scale=0.3, backend="triton"),
    ),
    "composed_attention": (
        [*[SHAPE] * 3, (1, 2, 2)],
        lambda q, k, v, w: composed_attention(
            q, k, v, Composition(w, residual=True), None, Visibility(), scale=0.3, backend="triton"
        ),
    ),
    "qk_norm_rope": ([SHAPE, (16,)], lambda z, weight: qk_norm_rope(z, norm_weight=weight)),
    "expert_linear": (
        [(6, 1, 1, 16), (3, 8, 16)],
        lambda x, w: expert_linear_pieces(x, w, Routes.of(EXPERTS.to(x.device), 3), backend="triton"),
    ),
}  # fmt: skip


class Watching(TorchDispatchMode):
    """Sees the operators that go through PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_the_same_by_itself_and_by_the_dispatcher(name: str) -> None:
    shapes, call = CALLS[name]
    inputs = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]

    def results() -> list[Tensor]:
        out = call(*inputs)
        return [out.detach(), *torch.autograd.grad((out * out).sum(), inputs)]

    by_itself = results()
    with Watching() as watching:
        watched = results()
    ours = {f"attnzoo.{name}.default", f"attnzoo.{name}_backward.default"}
    assert ours <= watching.seen
    for one, two in zip(by_itself, watched, strict=True):
        assert torch.equal(one, two)
    # In a graph of gradients an operator without a formula is one of the dispatcher's, and says what it lacks.
    (grad, *_) = torch.autograd.grad((call(*inputs) ** 2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward"):
        grad.sum().backward()


def test_an_operator_without_a_formula_says_so() -> None:
    @operator("attnzoo::test_without_a_formula")
    def double(x: Tensor, others: list[Tensor]) -> Tensor:
        return 2 * x + sum(others)

    x = torch.ones(2)
    assert double(x, [x]).tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="test_without_a_formula"):
        double(x, [x.clone().requires_grad_()]).sum().backward()


class Kernel:
    """A kernel whose launches are noted, and what it is compiled to."""

    arg_names = ("x_ptr", "y_ptr", "length", "TILE")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.compiled: list[Kernel] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*values: Any, **options: Any) -> Kernel:
            self.launched.append((grid, *values, options))
            self.compiled.append(Kernel())
            return self.compiled[-1]

        return run


def test_a_launch_is_known_again_by_all_but_addresses() -> None:
    kernel = Kernel()
    x, y = torch.zeros(64), torch.zeros(64)

    def start(x: Tensor, length: int = 3, tile: int = 16, warps: int = 4) -> None:
        launch = prepare(kernel, (2,), x_ptr=x, y_ptr=None, length=length, TILE=tile, num_warps=warps)
        launch.keep(launch.run[launch.grid](*launch.values, **launch.options))

    start(x)
    start(y)
    assert kernel.launched == [((2, 1, 1), x, None, 3, 16, {"num_warps": 4})]
    (again,) = kernel.compiled[0].launched
    assert again[0] == (2, 1, 1)
    assert again[1] is y
    assert again[2:] == (None, 3, 16, {})
    for n, other in enumerate(({"x": x[1:]}, {"length": 4}, {"tile": 32}, {"warps": 8}, {"x": x.half()}), 2):
        start(**{"x": x, **other})
        assert len(kernel.launched) == n, other
