"""Mixtures of heads and of attention heads on the kernels: the definition's outputs, gradients and losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo_kernels import expert_projection, head_routing, tuning
from benchmarks.timing import saved_bytes
from tests.kernels.tiles import SMALL
from tests.kernels.tolerance import assert_as_good_as
from tests.modules import test_moa, test_moh
from tests.zoo import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def slow(*values: Any) -> Any:
    """A case that runs with the slow tests only."""
    return pytest.param(*values, marks=pytest.mark.slow)


MOH: dict[str, dict[str, Any]] = {
    "two stages": {},
    "as printed": {"gate_form": "paper"},
    "none shared": {"num_shared_heads": 0, "num_routed_active": 3},
    "one group": {"num_kv_heads": 1},
    "as many groups as heads": {"num_kv_heads": 6},
    "query norms": {"router": "query_norm", "ste": "active"},
    "query norms, constant": {"router": "query_norm", "ste": "none", "num_shared_heads": 1},
    "without rotation": {"rope": None, "bias": True},
}
MOA: dict[str, dict[str, Any]] = {
    "top-k softmax": {},
    "softmax": {"gate_mode": "softmax_topk", "bias": True},
    "normalised": {"gate_mode": "softmax_topk_norm", "rope": None},
    "one head of an expert": {"num_kv_heads": 1, "num_heads": 3, "heads_per_expert": 1},
    "several heads of a group": {"num_kv_heads": 2, "num_heads": 8, "heads_per_expert": 4},
    "both directions": {"causal": False},
}


def moh(backend: str, **options: Any) -> attnzoo.MixtureOfHeadAttention:
    torch.manual_seed(5)
    options = {
        "num_kv_heads": 3,
        "num_shared_heads": 2,
        "num_routed_active": 2,
        "sparse": backend == "triton",
    } | options
    return widened(attnzoo.MixtureOfHeadAttention(24, 6, backend=backend, **options))


def moa(backend: str, **options: Any) -> attnzoo.MixtureOfAttentionHeads:
    torch.manual_seed(5)
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "num_experts": 5, "out_bias": True} | options
    return widened(attnzoo.MixtureOfAttentionHeads(24, backend=backend, **options))


def widened(module: Any) -> Any:
    """Weights large enough that routing is clear and attention is far from uniform."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.to(DEVICE).train()


def assert_modules_agree(make: Any, options: dict[str, Any], mask: AttentionMask | None, batch: int = 2) -> None:
    """Output, auxiliary loss and the gradients of x and of every parameter that takes part."""
    made = {backend: make(backend, **options) for backend in ("eager", "triton")}
    x = torch.randn(batch, 23, 24, device=DEVICE)
    used = [n for n, p in made["eager"].named_parameters()]

    def call(backend: str) -> Any:
        def outputs(x: Tensor, *parameters: Tensor) -> list[Tensor]:
            module = made[backend].to(x.dtype)
            with tuning.pinned(SMALL):
                y = torch.func.functional_call(module, dict(zip(used, parameters, strict=True)), (x,), {"mask": mask})
            return [y, module.aux_loss]

        return outputs

    tensors = [x, *(p.detach().clone() for _, p in made["eager"].named_parameters())]
    assert_as_good_as(call("triton"), call("eager"), *(t.requires_grad_() for t in tensors))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels' functions that were called."""
    seen: list[str] = []
    for owner, name in ((head_routing, "routed_attention"), (expert_projection, "expert_linear")):
        original = getattr(owner, name)

        def told(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            seen.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, told)
    return seen


@pytest.mark.parametrize("name", [name if name in ("two stages", "query norms") else slow(name) for name in MOH])
def test_sparse_mixture_of_heads_is_the_dense_definition(name: str, launches: list[str]) -> None:
    assert_modules_agree(moh, MOH[name], None)
    assert launches == ["routed_attention"]


@pytest.mark.parametrize("mask", [AttentionMask.padding([23, 9]), AttentionMask.packed([0, 4, 17, 46])], ids=repr)
def test_sparse_mixture_of_heads_under_masks(mask: AttentionMask, launches: list[str]) -> None:
    assert_modules_agree(moh, {}, mask.to(DEVICE))
    assert launches == ["routed_attention"]


def test_auto_is_sparse_with_triton_where_it_can_be(launches: list[str]) -> None:
    x = torch.randn(2, 9, 24, device=DEVICE)
    moh("triton", sparse="auto")(x)
    assert launches == ["routed_attention"]
    # These need the dense form: all heads' outputs in the gradient, a dense mask, nothing to skip.
    moh("triton", sparse="auto", router="query_norm")(x)
    moh("triton", sparse="auto")(x, mask=torch.ones(9, 9, dtype=torch.bool, device=DEVICE))
    moh("triton", sparse="auto", num_shared_heads=6, num_routed_active=0)(x)
    moh("triton", sparse=False)(x)
    assert launches == ["routed_attention"]


@pytest.mark.parametrize(
    "name", [name if name in ("softmax", "several heads of a group") else slow(name) for name in MOA]
)
def test_mixture_of_attention_heads_is_the_definition(name: str, launches: list[str]) -> None:
    assert_modules_agree(moa, MOA[name], None, batch=1)
    assert launches == ["expert_linear"] * 2


@pytest.mark.slow
def test_mixture_of_attention_heads_with_padding() -> None:
    assert_modules_agree(moa, {}, AttentionMask.padding([23, 9]).to(DEVICE))


def test_who_watches_head_outputs_sees_them_gated() -> None:
    """The gates go into the projection only where nobody looks; both ways give the same."""
    module, x = moa("triton"), torch.randn(2, 9, 24, device=DEVICE)
    exact = moa("eager").double()
    alone, seen, expected = module(x), [], []
    module.head_outputs.register_forward_hook(lambda _, given, out: seen.append(out.detach()))
    exact.head_outputs.register_forward_hook(lambda _, given, out: expected.append(out.detach()))
    watched = module(x)
    exact(x.double())
    torch.testing.assert_close(watched, alone, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(seen[0].double(), expected[0], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("own", [test_moh, test_moa], ids=["moh", "moa"])
def test_stored_figures(own: Any, launches: list[str]) -> None:
    tensors, _, single = own.stored()
    options = {"sparse": True} if own is test_moh else {}
    module = own.golden_module(backend="triton", **options).to(DEVICE)
    result = gradients(module, tensors["input.x"].float().to(DEVICE), tensors["input.w"].float().to(DEVICE))
    result = {"output.y": result.pop("y"), **{f"grad.{key}": value for key, value in result.items()}}
    assert launches
    assert result.keys() == {key for key in tensors if key.startswith(("output.y", "grad."))}
    for key, value in result.items():
        assert float((value.double().cpu() - tensors[key]).abs().max()) < 10 * single[key] + 1e-12, key


@pytest.mark.parametrize("make", [moh, moa])
def test_what_is_saved_grows_with_the_tokens(make: Any) -> None:
    module: nn.Module = make("triton")
    kept = []
    for tokens in (32, 64):
        x = torch.randn(1, tokens, 24, device=DEVICE, requires_grad=True)
        kept.append(saved_bytes(lambda x=x: module(x), [x, *module.parameters()]))
    assert kept[1] / kept[0] <= 2.05


@pytest.mark.slow
def test_compiled_modules_are_one_graph() -> None:
    x = torch.randn(2, 9, 24, device=DEVICE)
    for module in (moh("triton").eval(), moa("triton").eval()):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
