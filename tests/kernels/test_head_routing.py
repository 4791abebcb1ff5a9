"""Attention of routed heads on the kernels against its definition: packing, outputs, every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, library

import attnzoo
from attnzoo import AttentionMask
from attnzoo.masks import Visibility
from attnzoo.ops.head_routing import routed_attention, runs_packed_kernels
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo_kernels import tuning
from attnzoo_kernels.head_routing import routed_attention as kernel
from tests.kernels.tiles import SMALL, tile
from tests.kernels.tolerance import assert_as_good_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 2, "T": 37, "H": 4, "G": 2, "D": 5, "DV": 7}


def slow(*values: Any) -> Any:
    """A case that runs with the slow tests only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def draw(sizes: dict[str, int], dtype: torch.dtype = torch.float32, share: float = 0.5) -> tuple[list[Tensor], Tensor]:
    """q, k, v and float32 gates, all with gradients; and which (token, head) pairs are active."""
    b, t, h, g, d, dv = (sizes[x] for x in ("B", "T", "H", "G", "D", "DV"))
    generator = torch.Generator().manual_seed(7)
    shapes = {"q": (b, t, h, d), "k": (b, t, g, d), "v": (b, t, g, dv), "gates": (b, t, h)}
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(DEVICE, torch.float32 if name == "gates" else dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    ]
    return tensors, (torch.rand(b, t, h, generator=generator) < share).to(DEVICE)


def definition(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None, active: Tensor, mask: Any, scale: float
) -> Tensor:
    """All heads, times the gates of the active pairs."""
    out = softmax_attention(q, k, v, Visibility(mask=mask), scale=scale, backend="eager")
    factor = active.to(out.dtype) if gates is None else (gates * active).to(out.dtype)
    return out * factor[..., None]


def assert_same(
    tensors: list[Tensor], active: Tensor, mask: AttentionMask | None = None, config: tuning.Config | None = SMALL,
    scale: float | None = None,
) -> None:  # fmt: skip
    """The output and all gradients of the kernels, held to the definition."""
    scale = tensors[0].shape[3] ** -0.5 if scale is None else scale

    def reference(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None) -> list[Tensor]:
        return [definition(q, k, v, gates, active, mask, scale)]

    def fused(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None) -> list[Tensor]:
        call = {"view": Visibility(mask=mask), "scale": scale, "gates": gates, "backend": "triton"}
        if config is None:
            return [routed_attention(q, k, v, active, **call)]
        with tuning.pinned(config):
            return [routed_attention(q, k, v, active, **call)]

    assert_as_good_as(fused, reference, *tensors)


# Packing


@pytest.mark.parametrize(("h", "g"), [(4, 2), (6, 2), (5, 1), (3, 3), (1, 1)])
def test_packing_lists_the_active_rows_by_token_and_head(h: int, g: int) -> None:
    t, size = 70, h // g
    active = torch.rand(h, 2, t, device=DEVICE).permute(1, 2, 0) > 0.6
    active[0, 10:20] = False
    q, k = (torch.zeros(2, t, n, 1, device=DEVICE) for n in (h, g))
    _, rows, start, _, _ = torch.ops.attnzoo.routed_attention(q, k, k, active, *(None,) * 4, 1.0)
    for b in range(2):
        for group in range(g):
            own = active[b, :, group * size : (group + 1) * size].flatten()
            listed = own.nonzero()[:, 0]
            assert rows[b, group, : len(listed)].tolist() == listed.tolist()
            assert start[b, group].tolist() == [int(own[: n * size].sum()) for n in range(t + 1)]


# Attention of packed rows

PADDING = AttentionMask.padding([37, 18])
PACKED = AttentionMask.packed([0, 3, 20, 41, 57, 74])
CASES: dict[str, tuple[dict[str, int], AttentionMask | None]] = {
    "causal": ({}, None),
    "padding": ({}, PADDING),
    "an empty row": ({}, AttentionMask.padding([0, 33])),
    "packed": ({}, PACKED),
    "long documents": ({"T": 50}, AttentionMask.packed([0, 45, 52, 100])),
    "packed and padded": ({}, AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 20])),
    "one group": ({"G": 1}, None),
    "as many groups as heads": ({"G": 4}, None),
    "groups of three": ({"H": 6, "T": 21}, None),
    "one head": ({"H": 1, "G": 1}, None),
    "one token": ({"T": 1}, None),
}
QUICK = ("causal", "an empty row", "long documents", "packed and padded", "groups of three", "one token")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in CASES])
def test_it_is_the_definition(name: str) -> None:
    changed, mask = CASES[name]
    assert_same(*draw(SIZES | changed), None if mask is None else mask.to(DEVICE))


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_need_not_be_positive(scale: float) -> None:
    assert_same(*draw(SIZES | {"T": 21}), scale=scale)


@pytest.mark.parametrize("share", [0.0, slow(0.1), slow(1.0)])
def test_any_number_of_heads_may_be_active(share: float) -> None:
    assert_same(*draw(SIZES, share=share))


def test_tokens_and_groups_without_active_heads() -> None:
    tensors, active = draw(SIZES)
    active[0] = False
    active[1, :20] = False
    active[1, :, :2] = False
    assert_same(tensors, active)


def test_without_gates_and_with_gates_of_zero() -> None:
    tensors, active = draw(SIZES)
    assert_same(tensors[:3], active)
    with torch.no_grad():
        tensors[3][:, ::2] = 0.0
    assert_same(tensors, active)


@pytest.mark.parametrize("name", [slow("causal"), "packed and padded"])
def test_half_precision(name: str) -> None:
    changed, mask = CASES[name]
    assert_same(*draw(SIZES | changed, torch.float16), None if mask is None else mask.to(DEVICE))


@pytest.mark.parametrize("sides", [(32, 16), (16, 32), slow((64, 64))])
@pytest.mark.parametrize("name", [slow("causal"), "packed and padded"])
def test_tiles_of_other_shapes(name: str, sides: tuple[int, int]) -> None:
    changed, mask = CASES[name]
    assert_same(*draw(SIZES | changed), None if mask is None else mask.to(DEVICE), tile(*sides))


@pytest.mark.parametrize(("d", "dv"), [slow(1, 1), (33, 5), (64, 128), slow(256, 17)])
def test_any_width_with_the_configurations_that_users_get(d: int, dv: int) -> None:
    assert_same(*draw(SIZES | {"T": 19, "H": 2, "G": 1, "D": d, "DV": dv}), config=None)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_calls(data: st.DataObject) -> None:
    b, t, g = (data.draw(st.sampled_from(x)) for x in ([1, 2], [1, 2, 15, 17, 33, 48], [1, 2, 3]))
    sizes = {"B": b, "T": t, "G": g, "H": g * data.draw(st.integers(1, 4)), "D": data.draw(st.sampled_from([1, 5, 16]))}
    sizes["DV"] = data.draw(st.sampled_from([1, 4, 20]))
    mask = None
    kind = data.draw(st.sampled_from(["none", "padding", "packed", "both"]))
    if kind in ("packed", "both"):
        ends = data.draw(st.lists(st.integers(0, b * t), max_size=4))
        mask = AttentionMask.packed(sorted([0, *ends, b * t])).to(DEVICE)
    if kind in ("padding", "both"):
        own = AttentionMask.padding([data.draw(st.integers(0, t)) for _ in range(b)]).to(DEVICE)
        mask = own if mask is None else mask & own
    config = tile(data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32])))
    tensors, active = draw(sizes, share=data.draw(st.sampled_from([0.3, 0.5, 0.8])))
    # As routers make them, about 1. Where one key has nearly all weight a row's gradient is the difference of two equal
    # sums, whose rounding grows with the gate: among few rows a gate of 3 lifts it above what the tolerance allows.
    tensors[3] = (2 * tensors[3].detach().sigmoid()).requires_grad_()
    assert_same(tensors, active, mask, config)


def test_inactive_pairs_are_neither_read_nor_given_a_gradient() -> None:
    """NaN in them would reach a sum, since 0 times NaN is NaN."""
    (q, k, v, gates), active = draw(SIZES)
    result = []
    for poison in (0.0, math.nan):
        own_q, own_gates = q.detach().clone(), gates.detach().clone()
        own_q[~active], own_gates[~active] = poison, poison
        given = (own_q.requires_grad_(), k, v, own_gates.requires_grad_())
        with tuning.pinned(SMALL):
            out = routed_attention(*given[:3], active, scale=0.4, gates=given[3], backend="triton")
            result.append([out, *torch.autograd.grad((out * out).sum(), given)])
    for clean, poisoned in zip(*result, strict=True):
        assert torch.equal(clean, poisoned)
    for x in (result[0][0], result[0][1], result[0][4][..., None]):
        assert not x[~active].any()
        assert x[active].any()


def test_keys_after_the_last_active_token_are_not_read() -> None:
    (q, k, v, _), active = draw(SIZES | {"T": 64})
    active[:, 32:] = False
    k, v = k.detach().clone(), v.detach().clone()
    k[:, 32:], v[:, 32:] = math.nan, math.nan
    with tuning.pinned(SMALL):
        out = routed_attention(q, k, v, active, scale=0.4, backend="triton")
        assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()
    assert out.isfinite().all()


def test_the_tiles_that_run_are_those_of_active_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile asks for its key range once; the tiles beyond the list's end return before that."""
    if DEVICE == "cuda":
        pytest.skip("looks into the interpreter")
    from attnzoo_kernels.head_routing import kernels as head_routing_kernels

    seen: list[int] = []
    original = head_routing_kernels.packed_key_range

    def counted(*args: Any) -> Any:
        seen.append(1)
        return original(*args)

    monkeypatch.setattr(head_routing_kernels, "packed_key_range", counted)
    (q, k, v, _), _ = draw(SIZES | {"T": 64})
    active = torch.zeros(2, 64, 4, dtype=torch.bool)
    active[0, :, 0] = True
    active[1, :40, 3] = True
    with tuning.pinned(SMALL):
        routed_attention(q, k, v, active, scale=0.4, backend="triton")
    # Of 2 batch rows, 2 groups and 8 tiles each: 64 rows of one group and 40 of another.
    assert len(seen) == 4 + 3


def test_strides_do_not_matter() -> None:
    tensors, active = draw(SIZES)
    with tuning.pinned(SMALL):
        plain = kernel(*tensors[:3], active, scale=0.4, gates=tensors[3])
        strided = []
        for x in tensors:
            view = x.new_empty(*(2 * size for size in x.shape))[tuple([slice(None, None, 2)] * x.ndim)].transpose(0, 1)
            strided.append(view.transpose(0, 1).copy_(x.detach()))
        other = active.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torch.equal(kernel(*strided[:3], other, scale=0.4, gates=strided[3]), plain)


def test_two_runs_are_bitwise_equal() -> None:
    tensors, active = draw(SIZES | {"B": 1})

    def once() -> list[Tensor]:
        with tuning.pinned(SMALL):
            out = kernel(*tensors[:3], active, scale=0.4, gates=tensors[3])
            return [out, *torch.autograd.grad((out * out).sum(), tensors)]

    for one, two in zip(once(), once(), strict=True):
        assert torch.equal(one, two)


def test_gradients_nobody_needs_are_not_computed() -> None:
    (q, k, v, gates), active = draw(SIZES | {"T": 19, "B": 1})
    everything = kernel(q, k, v, active, scale=0.4, gates=gates)
    dq, dk, _, dgates = torch.autograd.grad(everything.sum(), (q, k, v, gates))
    for wanted, expected in ((0, dq), (1, dk), (3, dgates)):
        given = [x if n == wanted else x.detach() for n, x in enumerate((q, k, v, gates))]
        out = kernel(*given[:3], active, scale=0.4, gates=given[3])
        assert torch.equal(torch.autograd.grad(out.sum(), given[wanted])[0], expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_calls(shape: tuple[int, int]) -> None:
    tensors, active = draw(SIZES | {"B": shape[0], "T": shape[1]})
    out = kernel(*tensors[:3], active, scale=0.4, gates=tensors[3])
    assert out.shape == (*shape, 4, 7)
    for grad, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


def test_registration() -> None:
    """torch's own checks of the operator: schema, fake tensors, autograd registration."""
    # All active: beyond its rows a list holds whatever memory held.
    (q, k, v, gates), active = draw(SIZES | {"T": 9, "B": 1}, share=1.0)
    lengths = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    library.opcheck(
        torch.ops.attnzoo.routed_attention.default, (q, k, v, active, gates, lengths, None, None, 0.4)
    )  # fmt: skip


def test_compiled_whole() -> None:
    tensors, active = draw(SIZES | {"T": 9, "B": 1})

    def call(*given: Tensor) -> Tensor:
        return routed_attention(*given[:3], active, scale=0.4, gates=given[3], backend="triton")

    plain, fast = call(*tensors), torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(plain, fast)
    for one, two in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (plain, fast)), strict=True):
        torch.testing.assert_close(one, two)


def test_what_the_kernels_refuse() -> None:
    for changed, dtype, mask, message in (
        ({}, torch.float64, None, "the kernels take float16, bfloat16 and float32, got torch.float64"),
        ({"D": 257}, torch.float32, None, "the kernels take heads up to 256 wide, got 257"),
        ({}, torch.float32, AttentionMask.dense(torch.ones(3, 3, dtype=torch.bool)), "take no dense mask"),
    ):
        (q, k, v, _), active = draw(SIZES | {"T": 3} | changed, dtype)
        with pytest.raises(attnzoo.BackendUnavailable, match=f"'triton' cannot run routed_attention: .*{message}"):
            routed_attention(q, k, v, active, Visibility(mask=mask), scale=1.0, backend="triton")
    (q, k, v, _), active = draw(SIZES | {"T": 3})
    with pytest.raises(attnzoo.BackendUnavailable, match="routed_attention has no eager backend"):
        routed_attention(q, k, v, active, scale=1.0, backend="eager")
    view = Visibility(mask=AttentionMask.padding([3]).to(DEVICE))
    with pytest.raises(ValueError, match="lengths must have one entry a row, got 1 for 2"):
        routed_attention(q, k, v, active, view, scale=1.0, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter on a CPU")
def test_auto_on_a_cpu_and_bfloat16_never_reach_the_interpreter() -> None:
    (q, k, v, _), active = draw(SIZES | {"T": 3})
    assert not runs_packed_kernels(q, v, Visibility(), "auto")
    assert runs_packed_kernels(q, v, Visibility(), "triton")
    wrong = "Triton's interpreter multiplies bfloat16 wrongly"
    with pytest.raises(attnzoo.BackendUnavailable, match=wrong):
        routed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), active, scale=1.0, backend="triton")
