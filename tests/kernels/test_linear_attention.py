"""The linear attention kernels against the operation's definition and the modules that run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, library

import attnzoo
from attnzoo import AttentionMask
from attnzoo.ops import linear_attention as op
from attnzoo.ops.linear_attention import linear_attention_chunked, linear_attention_reference
from attnzoo.ops.norm_and_gate import norm_and_gate
from attnzoo_kernels.linear_attention import (
    linear_attention,
    linear_attention_finish,
    linear_attention_states,
    linear_attention_step,
)
from attnzoo_kernels.linear_attention.launches import Inputs, Passes
from attnzoo_kernels.linear_attention.tuning import of_tokens
from attnzoo_kernels.tuning import Config, padded, pinned
from tests.kernels.tolerance import assert_as_good_as
from tests.modules import test_linear, test_mhla
from tests.zoo import build, gradients

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several pieces of every width and several tiles of every block, at the fewest programs.
SMALL = Config({f"BLOCK_{name}": 16 for name in "TAZIJE"}, num_warps=4, num_stages=1)
MODULES = ("linear", "linear-lm", "mhla", "mhla-heads")
# What runs with a mask outside -m slow.
KEPT = (("linear-lm", "packed"), ("mhla", "padded"), ("mhla", "packed"))


def spread(weights: Tensor | None, size: int, tokens: int, causal: bool) -> Tensor:
    """Weights of token pairs (1 or B, 1 or H, T, T) from those of block pairs."""
    if weights is None:
        pairs = torch.ones(1, 1, tokens, tokens, device=DEVICE)
    else:
        at = torch.arange(tokens, device=DEVICE) // size
        pairs = weights[:, :, at[:, None], at]
    return pairs.tril() if causal else pairs


def draw(sizes: dict[str, int], weights: tuple[int, int] | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and, for (rows, heads) of them, weights of block pairs; all need gradients."""
    b, t, s, h, g, d, dv, size = (sizes[x] for x in ("B", "T", "S", "H", "G", "D", "DV", "size"))
    generator = torch.Generator().manual_seed(7)
    n = max(1, -(-t // size))
    shapes: list[tuple[int, ...]] = [(b, t, h, d), (b, s, g, d), (b, s, g, dv)]
    kinds = [dtype] * 3
    if weights is not None:
        shapes, kinds = [*shapes, (*weights, n, n)], [*kinds, torch.float32]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(DEVICE, kind).requires_grad_() for x, kind in zip(made, kinds, strict=True)]


def assert_same(
    sizes: dict[str, int], weights: tuple[int, int] | None = None, *, causal: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Output and every gradient, held to the quadratic definition."""
    size = sizes["size"]

    def reference(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None = None) -> list[Tensor]:
        pairs = spread(w, size, k.shape[1], causal) if causal or w is not None else None
        return [linear_attention_reference(q, k, v, None if pairs is None else pairs.to(q.dtype)).to(wide(q))]

    def fused(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None = None) -> list[Tensor]:
        with pinned(SMALL):
            return [linear_attention(q, k, v, size=size, causal=causal, weights=w)[0]]

    assert_as_good_as(fused, reference, *draw(sizes, weights, dtype))


def wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


SIZES = {"B": 1, "T": 23, "S": 23, "H": 2, "G": 1, "D": 5, "DV": 7, "size": 17}
# Blocks of several tiles and of less than one, the last one shorter; what weights are shared by.
CALLS: dict[str, tuple[dict[str, int], tuple[int, int] | None, bool]] = {
    "causal": ({}, None, True),
    "bidirectional": ({}, None, False),
    "cross": ({"T": 11, "S": 40}, None, False),
    "shared weights": ({}, (1, 1), True),
    "weights of heads": ({}, (1, 2), True),
    "weights of rows": ({"B": 2, "size": 12}, (2, 1), True),
    "weights of rows and heads": ({"B": 2, "size": 12}, (2, 2), True),
    "bidirectional, shared weights": ({"size": 11}, (1, 1), False),
    "bidirectional, weights of heads": ({"size": 11}, (1, 2), False),
    "bidirectional, weights of rows and heads": ({"B": 2}, (2, 2), False),
    "groups of heads": ({"B": 2, "H": 4, "G": 2}, (1, 1), True),
    "groups of heads, weights of heads": ({"H": 4, "G": 2}, (1, 4), True),
    "no groups": ({"G": 2, "size": 40}, (1, 2), True),
    "many blocks": ({"size": 1, "H": 1}, (1, 1), True),
    "several pieces of the widths": ({"T": 19, "S": 19, "D": 18, "DV": 33, "H": 1}, (1, 1), True),
    "several pieces, groups": ({"T": 19, "S": 19, "D": 33, "DV": 17, "size": 40}, None, True),
    "one token": ({"T": 1, "S": 1}, (1, 1), True),
}


@pytest.mark.parametrize("name", CALLS)
def test_output_and_gradients(name: str) -> None:
    changed, weights, causal = CALLS[name]
    assert_same(SIZES | changed, weights, causal=causal)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.timeout(1500)
def test_drawn_calls(data: st.DataObject) -> None:
    groups, causal = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    sizes = {
        "B": data.draw(st.integers(1, 2)), "T": data.draw(st.sampled_from([1, 5, 16, 17, 33])),
        "H": groups * data.draw(st.integers(1, 2)), "G": groups, "size": data.draw(st.sampled_from([4, 16, 17, 40])),
        "D": data.draw(st.sampled_from([1, 5, 16, 19])), "DV": data.draw(st.sampled_from([1, 16, 18])),
    }  # fmt: skip
    sizes["S"] = sizes["T"]
    weights = data.draw(st.sampled_from([None, (1, 1), (sizes["B"], 1), (1, sizes["H"]), (sizes["B"], sizes["H"])]))
    assert_same(sizes, weights, causal=causal, dtype=data.draw(st.sampled_from([torch.float32, torch.float16])))


@pytest.mark.parametrize("name", ["causal", "weights of heads", "bidirectional, shared weights"])
def test_half_precision(name: str) -> None:
    changed, weights, causal = CALLS[name]
    assert_same(SIZES | changed, weights, causal=causal, dtype=torch.float16)


@pytest.mark.parametrize("name", ["causal", "shared weights", "groups of heads, weights of heads"])
def test_states_of_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded states, which products of bfloat16 have, in float32: off by their rounding and no more."""
    sizes, weights, causal = CALLS[name]
    inputs = draw({**SIZES, **sizes}, weights)

    def found() -> list[Tensor]:
        with pinned(SMALL):
            out = linear_attention(*inputs[:3], size=SIZES["size"], causal=causal, weights=(*inputs, None)[3])[0]
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    exact, start = found(), Passes.__init__

    def rounding(self: Passes, given: Inputs) -> None:
        start(self, given)
        self.kept = torch.bfloat16

    monkeypatch.setattr(Passes, "__init__", rounding)
    for close, right in zip(found(), exact, strict=True):
        error = (close - right).abs().max() / right.abs().max()
        assert 1e-6 < error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
@pytest.mark.parametrize(("d", "dv"), [(1, 1), (16, 64), (64, 128), (128, 64), (130, 5), (256, 256)])
@pytest.mark.parametrize("size", [16, 64, 100])
def test_any_width_on_the_tiles_that_run(d: int, dv: int, size: int) -> None:
    """The tables' own tiles, not the small ones."""
    sizes = SIZES | {"B": 1, "T": 130, "S": 130, "D": d, "DV": dv, "size": size}
    q, k, v, w = draw(sizes, (1, 1))
    config = of_tokens("linear_attention_tile", torch.float32, q.device, size, d, dv)
    assert config["BLOCK_T"] <= 64

    def reference(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        return [linear_attention_reference(q, k, v, spread(w, size, 130, True).to(q.dtype))]

    def fused(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        return [linear_attention(q, k, v, size=size, causal=True, weights=w)[0]]

    assert_as_good_as(fused, reference, q, k, v, w)


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_goes_in_and_out(causal: bool) -> None:
    """Both are differentiable; two pieces with the state between are one run."""
    q, k, v = draw(SIZES, None)
    state = torch.randn(1, 1, 5, 7, device=DEVICE, requires_grad=True)

    def run(operation, *given: Tensor) -> list[Tensor]:
        q, k, v, state = given
        with pinned(SMALL):
            return list(operation(q, k, v, size=11, causal=causal, state=state))

    assert_as_good_as(
        lambda *x: run(linear_attention, *x), lambda *x: run(linear_attention_chunked, *x), q, k, v, state
    )
    if causal:
        _, between = linear_attention(q[:, :13], k[:, :13], v[:, :13], size=11, causal=True, state=state)
        second, end = linear_attention(q[:, 13:], k[:, 13:], v[:, 13:], size=11, causal=True, state=between)
        whole, last = linear_attention(q, k, v, size=11, causal=True, state=state)
        torch.testing.assert_close(second, whole[:, 13:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(end, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["documents alone", "shared", "heads", "bidirectional"])
def test_packed_documents(kind: str) -> None:
    """Blocks restart in each document; some are empty, one is longer than a row's rest."""
    size, t = 6, 13
    mask = AttentionMask.packed([0, 3, 3, 11, 13, 20, 26]).to(DEVICE)
    q, k, v = draw(SIZES | {"B": 2, "T": t, "S": t}, None)
    causal = kind != "bidirectional"
    mixing = torch.randn((2,) * (kind == "heads") + (-(-t // size),) * 2, device=DEVICE, requires_grad=True)
    same = mask.visible(2, 1, t, t)

    def reference(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> list[Tensor]:
        if kind == "documents alone":
            pairs = torch.ones(1, 1, t, t, device=DEVICE, dtype=q.dtype)
        else:
            at = mask.positions(2, t) // size
            chosen = mixing if mixing.ndim == 3 else mixing[None]
            pairs = chosen[:, at[:, :, None], at[:, None, :]].transpose(0, 1)
        pairs = pairs * same
        return [linear_attention_reference(q, k, v, pairs.tril() if causal else pairs)]

    def fused(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor) -> list[Tensor]:
        used = None if kind == "documents alone" else mixing
        call = {"size": size, "causal": causal, "mixing": used, "mask": mask}
        with pinned(SMALL):
            return [op.linear_attention(q, k, v, backend="triton", **call)[0]]

    assert_as_good_as(fused, reference, q, k, v, mixing)


def test_the_tokens_of_a_block_may_lie_anywhere() -> None:
    """An order of the tokens is the same as ordering them before."""
    q, k, v, w = draw(SIZES | {"T": 24, "S": 24, "size": 12}, (1, 1))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def ordered(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        pairs = spread(w, 12, 24, True).to(q.dtype)
        out = linear_attention_reference(q[:, order], k[:, order], v[:, order], pairs)
        return [out[:, order.argsort()]]

    def fused(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
        return [linear_attention(q, k, v, size=12, causal=True, weights=w, order=order)[0]]

    assert_as_good_as(fused, ordered, q, k, v, w)


def test_strides_do_not_matter() -> None:
    sizes = SIZES | {"T": 19, "S": 19, "size": 11}
    q, k, v, w = (x.detach() for x in draw(sizes, (1, 1)))
    plain = linear_attention(q, k, v, size=11, causal=True, weights=w)[0]
    strided = []
    for x in (q, k, v):
        big = torch.randn(x.shape[0], x.shape[2], x.shape[1] * 2, x.shape[3] * 3, device=DEVICE)
        view = big[:, :, ::2, ::3].transpose(1, 2)
        view.copy_(x)
        strided.append(view)
    turned = w.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(linear_attention(*strided, size=11, causal=True, weights=turned)[0], plain)
    leaf = turned.requires_grad_()
    out = linear_attention(q, k, v, size=11, causal=True, weights=leaf)[0]
    (dense,) = torch.autograd.grad(out.sum(), leaf)
    other = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(linear_attention(q, k, v, size=11, causal=True, weights=other)[0].sum(), other)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("rows", "tokens"), [(0, 3), (2, 0)])
def test_empty_calls(rows: int, tokens: int, causal: bool) -> None:
    q, k = (torch.randn(rows, tokens, heads, 5, device=DEVICE, requires_grad=True) for heads in (2, 1))
    v = torch.randn(rows, tokens, 1, 7, device=DEVICE, requires_grad=True)
    out, end = linear_attention(q, k, v, size=4, causal=causal)
    assert out.shape == (rows, tokens, 2, 7)
    assert torch.equal(end, torch.zeros(rows, 1, 5, 7, device=DEVICE))
    for grad, x in zip(torch.autograd.grad(out.sum() + end.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_two_runs_are_bitwise_equal_and_unneeded_gradients_absent() -> None:
    tensors = draw(SIZES | {"size": 12}, (1, 2))

    def run() -> list[Tensor]:
        q, k, v, w = tensors
        out = linear_attention(q, k, v, size=12, causal=True, weights=w)[0]
        return [out, *torch.autograd.grad((out * out).sum(), tensors)]

    first = run()
    for one, two in zip(first, run(), strict=True):
        assert torch.equal(one, two)
    for n, (x, grad) in enumerate(zip(tensors, first[1:], strict=True)):
        alone = [y if m == n else y.detach() for m, y in enumerate(tensors)]
        out = linear_attention(*alone[:3], size=12, causal=True, weights=alone[3])[0]
        assert torch.equal(torch.autograd.grad((out * out).sum(), x)[0], grad), n


def test_later_tokens_change_nothing_before_them() -> None:
    """Bit for bit: what a block holds is never subtracted from what was summed."""
    q, k, v, w = (x.detach() for x in draw(SIZES | {"size": 16}, (1, 1)))
    before = linear_attention(q, k, v, size=16, causal=True, weights=w)[0]
    changed = k.clone()
    changed[:, 20:] = 1e6
    after = linear_attention(q, changed, v, size=16, causal=True, weights=w)[0]
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(1, 1, 3, 3)}, r"weights must be of 2 by 2 blocks, got \(1, 1, 3, 3\)"),
        ({"k": torch.ones(1, 4, 1, 5)}, "k must have the 23 tokens of q, got 4"),
        ({"starts": torch.tensor([[0, 17, 23]]), "causal": False}, r"starts must be .*, got \(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    q, k, v = draw(SIZES, None)
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": q, "k": k, "v": v, "size": 17, "causal": True} | change))


def test_a_second_derivative_is_refused() -> None:
    q, k, v = draw(SIZES | {"B": 1, "T": 5, "S": 5}, None)
    out = linear_attention(q, k, v, size=4, causal=True)[0]
    (dq,) = torch.autograd.grad((out * out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward"):
        dq.sum().backward()


def test_registration() -> None:
    """torch's own checks of the operators: schema, fake tensors, autograd registration."""
    q, k, v, w = draw(SIZES | {"T": 9, "S": 9}, (1, 2))
    state = torch.randn(1, 1, 5, 7, device=DEVICE, requires_grad=True)
    operator = torch.ops.attnzoo.linear_attention.default
    library.opcheck(operator, (q, k, v, w, None, None, None, None, 17, True))
    library.opcheck(operator, (q, k, v, None, state, None, None, None, 9, True))
    states = torch.randn(1, 2, 1, 5, 7, device=DEVICE)
    step = (q[:, :1].detach(), k[:, :1].detach(), v[:, :1].detach(), states, torch.randn(2, 2, device=DEVICE))
    library.opcheck(torch.ops.attnzoo.linear_attention_step.default, step)
    gate = torch.randn(1, 3, 2, 7, device=DEVICE, requires_grad=True)
    finish = (torch.randn_like(gate).requires_grad_(), torch.randn(7, device=DEVICE), gate, 1e-6, torch.float32)
    library.opcheck(torch.ops.attnzoo.linear_attention_finish.default, finish)


@pytest.mark.parametrize("kind", ["one state", "shared", "heads"])
def test_one_token_after_states(kind: str) -> None:
    q, k, v = (x.detach()[:, :1] for x in draw(SIZES | {"B": 2, "H": 4, "G": 2, "DV": 19}, None))
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 1 if kind == "one state" else 3, 2, 5, 19, generator=generator).to(DEVICE)
    row = {"one state": None, "shared": (3,), "heads": (4, 3)}[kind]
    weights = None if row is None else torch.randn(row, generator=generator).to(DEVICE)

    def reference(*given: Tensor) -> list[Tensor]:
        q, k, v, states, *w = given
        states = states.clone()
        states[:, -1] += torch.einsum("bgd,bgv->bgdv", k[:, 0], v[:, 0])
        of_head = w[0].expand(4, -1) if w else torch.ones(4, 1, dtype=q.dtype, device=q.device)
        seen = torch.einsum("hj,bjhdv->bhdv", of_head, states.repeat_interleave(2, 2))
        return [torch.einsum("bhd,bhdv->bhv", q[:, 0], seen)[:, None], states]

    def fused(*given: Tensor) -> list[Tensor]:
        q, k, v, states, *w = given
        states = states.clone()
        return [linear_attention_step(q, k, v, states, *w), states]

    assert_as_good_as(fused, reference, q, k, v, states, *([] if weights is None else [weights]))


@pytest.mark.parametrize("parts", ["norm and gate", "norm", "norm, strided and without epsilon", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm_and_gate(parts: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    out = torch.randn(2, 11, 3, 7, generator=generator).to(DEVICE).requires_grad_()
    strided = "strided" in parts
    weight = torch.randn(14, generator=generator).to(DEVICE)[:: 2 if strided else 1][:7].requires_grad_("norm" in parts)
    eps = 0.0 if strided else 1e-3
    gate = (30 * torch.randn(2, 11, 21, generator=generator)).to(DEVICE, dtype).requires_grad_("gate" in parts)

    def reference(out: Tensor, weight: Tensor, gate: Tensor) -> list[Tensor]:
        kind = out.dtype if out.dtype == torch.float64 else dtype
        y = F.rms_norm(out, (7,), weight, eps) if "norm" in parts else out
        y = y.to(kind)
        return [y * F.silu(gate.view(out.shape)) if "gate" in parts else y]

    def fused(out: Tensor, weight: Tensor, gate: Tensor) -> list[Tensor]:
        given = (weight if "norm" in parts else None, gate if "gate" in parts else None)
        return [linear_attention_finish(out, *given, eps=eps, dtype=dtype)]

    assert_as_good_as(fused, reference, out, weight, gate)


def test_the_epsilon_of_a_norm_that_names_none_is_that_of_its_dtype() -> None:
    norm = torch.nn.RMSNorm(7, eps=None).to(DEVICE)
    out = 1e-4 * torch.randn(1, 3, 2, 7, device=DEVICE)
    fused, plain = (norm_and_gate(out, norm, None, dtype=out.dtype, backend=name) for name in ("triton", "eager"))
    torch.testing.assert_close(fused, plain)


def test_states_of_blocks() -> None:
    _, k, v = (x.detach() for x in draw(SIZES, None))
    k.requires_grad_()
    result = linear_attention_states(k, v, 17)
    assert not result.requires_grad
    for n, part in enumerate((slice(0, 17), slice(17, 23))):
        expected = torch.einsum("bsgd,bsgv->bgdv", k[:, part], v[:, part])
        torch.testing.assert_close(result[:, :, n], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "causal", "mask"),
    [
        pytest.param(name, causal, mask, marks=() if mask == "whole" or (name, mask) in KEPT else pytest.mark.slow)
        for name in MODULES
        for causal in (True, False)
        for mask in ("whole", "padded", "packed")
    ],
)
def test_modules(name: str, causal: bool, mask: str) -> None:
    """Output and the gradients of x and of every parameter."""
    t = 7
    made = {
        backend: build(name, dtype=torch.float32, causal=causal, backend=backend).to(DEVICE)
        for backend in ("eager", "triton")
    }
    names = [n for n, _ in made["eager"].named_parameters()]
    tensors = [torch.randn(1, t, 32, device=DEVICE), *(p.detach() for p in made["eager"].parameters())]
    call = {
        "whole": {},
        "padded": {"mask": AttentionMask.padding([4]).to(DEVICE)},
        "packed": {"mask": AttentionMask.packed([0, 1, t]).to(DEVICE)},
    }[mask]

    def run(backend: str):
        def called(*given: Tensor) -> list[Tensor]:
            module = made[backend].to(given[0].dtype)
            x, *parameters = given
            return [torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), call)]

        return called

    assert_as_good_as(run("triton"), run("eager"), *(x.requires_grad_() for x in tensors))


def test_cross_attention() -> None:
    exact = build("linear", causal=False, backend="eager")
    module = build("linear", dtype=torch.float32, causal=False, backend="triton").to(DEVICE)
    module.load_state_dict(exact.state_dict())
    x, context = torch.randn(1, 5, 32), torch.randn(1, 13, 32)
    y = module(x.to(DEVICE), context.to(DEVICE)).double().cpu()
    torch.testing.assert_close(y, exact(x.double(), context.double()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("own", [test_linear, test_mhla], ids=["linear", "mhla"])
def test_golden_figures_in_float32(own) -> None:
    tensors, _ = own.stored()
    with safe_open(own.GOLDEN, "pt") as file:
        single = json.loads(file.metadata()["f32_vs_f64_max_rel_err"])
    # The file keeps the float32 difference of some figures; the largest is used for the rest.
    allowed = {key.replace("g_norm_swish_gate", "g_norm"): value for key, value in single.items()}
    module = own.golden(torch.float32, backend="triton").to(DEVICE)
    result = gradients(module, tensors["input.x"].float().to(DEVICE), tensors["input.w"].float().to(DEVICE))
    keys = [key for key in tensors if key == "output.y" or key.startswith("grad.")]
    assert len(keys) == 5
    for key in keys:
        value = result[key.split(".", 1)[1]].double().cpu()
        error = float((value - tensors[key]).abs().max() / tensors[key].abs().max())
        bound = 10 * allowed.get(key.replace("output.", ""), max(single.values()))
        assert error < bound, f"{key}: {error:.1e}, allowed {bound:.1e}"


@pytest.mark.parametrize("option", ["mixed", "compat"])
def test_images(option: str) -> None:
    """Blocks that are rectangles, with local values and each denominator."""
    options = {
        "grid": (4, 6), "block_grid": (2, 3), "causal": False, "rope": None, "num_kv_heads": 4, "feature_map": "elu",
        "normalizer": option, "lepe_kernel": 3,
    }  # fmt: skip
    exact = test_mhla.make(backend="eager", **options)
    module = test_mhla.make(torch.float32, backend="triton", **options).to(DEVICE)
    module.load_state_dict(exact.state_dict())
    x = test_mhla.sample(1, 24)
    weight = torch.randn_like(x)
    expected = gradients(exact, x, weight)
    for key, value in gradients(module, x.float().to(DEVICE), weight.float().to(DEVICE)).items():
        bound = 2e-5 * max(1.0, float(expected[key].abs().max()))
        assert (value.double().cpu() - expected[key]).abs().max() < bound, key


@pytest.mark.parametrize(
    ("name", "gradient"), [*((name, False) for name in MODULES), ("linear-lm", True), ("mhla-heads", True)]
)
def test_decoding_is_the_full_forward(name: str, gradient: bool) -> None:
    exact = build(name, backend="eager").eval()
    module = build(name, dtype=torch.float32, backend="triton").to(DEVICE).eval()
    plain = build(name, dtype=torch.float32, backend="eager").eval()
    for other in (module, plain):
        other.load_state_dict(exact.state_dict())
    x = torch.randn(1, 13, 32)
    with torch.set_grad_enabled(gradient):
        truth = exact(x.double()).detach()
        budget = (plain(x).double() - truth).abs().max()
        cache, kept = module.init_cache(1, 13), exact.init_cache(1, 13)
        y = torch.cat([module(part, cache=cache) for part in x.to(DEVICE).split((6, 1, 3, 1, 1, 1), 1)], 1)
        exact(x.double(), cache=kept)
    assert y.requires_grad == gradient
    assert (y.double().cpu() - truth).abs().max() <= 2 * budget + torch.finfo(torch.float32).eps * truth.abs().max()
    for stream, expected in zip(cache.buffers, kept.buffers, strict=True):
        assert (stream.double().cpu() - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["linear", "mhla-heads"])
def test_a_call_that_fails_leaves_the_states_as_they_were(name: str) -> None:
    module, x = build(name, dtype=torch.float32, backend="triton").to(DEVICE).eval(), torch.randn(1, 7, 32).to(DEVICE)
    cache = module.init_cache(1, 13)

    def fail(*_: object) -> None:
        raise RuntimeError("failed on purpose")

    with torch.no_grad():
        module(x, cache=cache)
        before = [buffer.clone() for buffer in cache.buffers]
        module.o_proj.register_forward_hook(fail)
        for tokens in (1, 5):
            with pytest.raises(RuntimeError, match="failed on purpose"):
                module(x[:, :tokens], cache=cache)
            assert cache.length == 7
            assert all(torch.equal(one, two) for one, two in zip(cache.buffers, before, strict=True))


@pytest.mark.parametrize("name", ["linear", "mhla"])
def test_what_is_kept_for_the_gradient_is_linear_in_the_tokens(name: str) -> None:
    """Twice the tokens, twice the bytes: no scores, and no states beside the inputs."""
    options: dict[str, object] = {"num_heads": 2, "feature_map": "elu", "backend": "triton", "device": DEVICE}
    module = (
        attnzoo.LinearAttention(16, **options, chunk_size=16)
        if name == "linear"
        else attnzoo.MultiHeadLinearAttention(16, **options, block_size=16, num_blocks=8, normalizer="mixed")
    )

    def kept(tokens: int) -> int:
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.shape and not any(x.data_ptr() == p.data_ptr() for p in module.parameters()):
                saved[x.data_ptr()] = x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = module(torch.randn(1, tokens, 16, device=DEVICE))
        assert y.requires_grad
        return sum(saved.values())

    assert kept(128) <= 2.05 * kept(64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels take no tensors of the CPU")
def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("linear", dtype=torch.float32)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the kernels ran")

    monkeypatch.setattr("attnzoo_kernels.linear_attention.linear_attention", refuse)
    assert module(torch.randn(1, 5, 32)).shape == (1, 5, 32)
    with pytest.raises(AssertionError, match="the kernels ran"):
        build("linear", dtype=torch.float32, backend="triton")(torch.randn(1, 5, 32))


@pytest.mark.parametrize("name", ["linear", "mhla"])
def test_what_the_kernels_refuse(name: str) -> None:
    with pytest.raises(
        attnzoo.BackendUnavailable,
        match=r"backend 'triton' cannot run linear attention: the kernels take .*, got torch\.float64",
    ):
        build(name, backend="triton").to(DEVICE)(torch.randn(1, 3, 32, dtype=torch.float64, device=DEVICE))
    if DEVICE == "cuda":
        pytest.skip("the rest is about the interpreter on a CPU")
    with pytest.raises(attnzoo.BackendUnavailable, match="Triton's interpreter multiplies bfloat16 wrongly"):
        build(name, dtype=torch.bfloat16, backend="triton")(torch.randn(1, 3, 32, dtype=torch.bfloat16))


def test_a_compiled_module_is_one_graph() -> None:
    module = build("mhla", dtype=torch.float32, backend="triton").to(DEVICE)
    x = torch.randn(1, 9, 32, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_tile_sides() -> None:
    assert [padded(n) for n in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]
    cut = of_tokens("linear_attention_tile", torch.bfloat16, torch.device("cpu"), tokens=20, summed=5, owned=40)
    assert cut.tiles == {"BLOCK_T": 32, "BLOCK_A": 16, "BLOCK_Z": 64}


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_without_spills(target: str, dtype: str) -> None:
    """In a process without the interpreter, since a kernel is one or the other from its decoration on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-m", "tests.kernels.linear_attention_resources", target, dtype]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) > 20
