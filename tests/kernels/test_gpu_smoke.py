"""The first thing to run on a GPU: every family of kernels in half precision at its table's own tiles, in a minute.

What is called and how it is held to the definition is in `smoke.py`. Without a GPU its expectations are tested: planted
faults in a form that is right, the kernels themselves in the interpreter, and which tiles half precision gets.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention
from tests import zoo
from tests.kernels import smoke
from tests.kernels.smoke import CASES, MASKS, NEEDLES, Case, assert_good, assert_needles_found, definition
from tests.kernels.tolerance import assert_as_good_as, error_of
from tests.views import attend

GPU = torch.cuda.is_available()
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device: bfloat16 at the table's tiles")]
without_a_gpu = pytest.mark.skipif(GPU, reason="tests the expectations, in the interpreter or with the definition")
DEVICE, FAR = "cuda", 2**31
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CALLS = [(family, name) for family, cases in CASES.items() for name in cases]
FIRST = [(family, next(iter(cases))) for family, cases in CASES.items()]
MASKED = [(family, name) for family, (_, masks, _) in NEEDLES.items() for name in masks]


def sums(q: Tensor, k: Tensor, v: Tensor, backend: str = "triton", size: int = 64) -> Tensor:
    return linear_attention(q, k, v, size=size, backend=backend)[0]


class TestOnAGPU:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("family", "name"), CALLS)
    def test_answers_and_gradients(self, family: str, name: str, dtype: str) -> None:
        case = CASES[family][name]
        assert_good(case, case.inputs(HALF[dtype], DEVICE))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("family", "name"), MASKED)
    def test_every_mask_ends_where_it_should(self, family: str, name: str, dtype: str) -> None:
        run, masks, sizes = NEEDLES[family]
        assert_needles_found(run, masks[name], HALF[dtype], DEVICE, **sizes)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("family", ["mhla", "moa"])
    def test_sums_and_experts_end_where_they_should(self, family: str, dtype: str) -> None:
        if family == "mhla":
            smoke.assert_sums_stop(sums, HALF[dtype], DEVICE)
        else:
            smoke.assert_experts_found(projected, HALF[dtype], DEVICE)

    @pytest.mark.parametrize(("family", "name"), FIRST)
    def test_any_place_in_memory(self, family: str, name: str) -> None:
        """Rows 2^31 elements apart, and pointers that are multiples of 2 bytes alone."""
        case = CASES[family][name]
        inputs = case.inputs(HALF["bf16"], DEVICE)
        assert_same_results(case, inputs, smoke.misaligned(inputs), exactly=False)
        if inputs[0].shape[0] == 2:
            assert_same_results(case, inputs, smoke.far_apart(inputs, FAR), exactly=True)

    def test_calls_of_one_layout_follow_each_other(self) -> None:
        assert_calls_follow_each_other(DEVICE)

    @pytest.mark.parametrize("family", ["softmax"])
    def test_answers_beyond_2_to_the_31_elements(self, family: str) -> None:
        """With a window of one key the answer is the value."""
        q = torch.randn(1, 2**18 + 5, 64, 128, dtype=HALF["bf16"], device=DEVICE)
        assert q.numel() > 2**31
        out = softmax_attention(q, q, q, Visibility(window=1), backend="triton")
        assert torch.equal(out, q)

    @pytest.mark.parametrize(("name", "option"), zoo.cases())
    def test_auto_is_as_good_as_eager(self, name: str, option: str) -> None:
        assert_auto_is_as_good_as_eager(name, option, HALF["bf16"], DEVICE)

    @pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "none"])
    @pytest.mark.parametrize("feature", smoke.FEATURES)
    def test_auto_takes_a_right_backend(self, feature: str, gradient: bool) -> None:
        assert_feature_as_good_as_eager(feature, HALF["bf16"], DEVICE, gradient)

    @pytest.mark.parametrize("name", zoo.names())
    def test_a_forward_pass_is_captured_in_a_graph(self, name: str) -> None:
        module = zoo.build(name, dtype=HALF["bf16"]).to(DEVICE).eval()
        x, other = (torch.randn(2, 24, 32, dtype=HALF["bf16"], device=DEVICE) for _ in range(2))
        with torch.no_grad():
            expected, given = module(other), x.clone()
            replay = smoke.captured(lambda: module(given))
            given.copy_(other)
            assert torch.equal(replay(), expected)

    @pytest.mark.parametrize("name", zoo.names())
    def test_a_decoding_step_is_captured_in_a_graph(self, name: str) -> None:
        module = zoo.build(name, dtype=HALF["bf16"]).to(DEVICE).eval()
        x = torch.randn(2, 10, 32, dtype=HALF["bf16"], device=DEVICE)
        with torch.no_grad():
            cache = module.init_cache(2, 10)
            module(x[:, :9], cache=cache)
            # A copy of the cache for every pass: linear attention's cannot be cut back.
            expected = module(x[:, 9:], cache=copy.deepcopy(cache))
            copies = iter([copy.deepcopy(cache) for _ in range(2)])
            assert torch.equal(smoke.captured(lambda: module(x[:, 9:], cache=next(copies)))(), expected)


def assert_calls_follow_each_other(device: str) -> None:
    """Lengths, windows and masks that kernels are compiled anew for, while the plan of their launches stays."""
    mixes = [Composition(torch.randn(1, 4, 4, device=device)) for _ in range(2)]
    forms: list[Callable[..., Tensor]] = [
        softmax_attention,
        functools.partial(sigmoid_attention, logit_bias=-1.0),
        lambda q, k, v, view, **options: composed_attention(q, k, v, *mixes, view, scale=0.3, **options),
    ]
    for window, keys in itertools.product((None, 1, 9, 16), (1, 2, 16, 17, 33, 48)):
        q, k, v = (torch.randn(2, tokens, 4, 16, device=device) for tokens in (1, keys, keys))
        dense = torch.rand(2, 4, 1, keys, device=device) < 0.8
        for mask in (None, AttentionMask.dense(dense), AttentionMask.dense(dense[:, :1])):
            view = Visibility(window=window, query_start=keys - 1, mask=mask)
            for form in forms:
                fused, plain = (form(q, k, v, view, backend=name) for name in ("triton", "eager"))
                torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)


def projected(x: Tensor, weight: Tensor, routes: Any, backend: str = "triton") -> list[Tensor]:
    from attnzoo.ops.expert_projection import expert_linear_pieces

    return [expert_linear_pieces(x, weight, routes, backend=backend)]


def results(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    out = case.fused(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [
        *(y.detach() for y in out),
        *(torch.autograd.grad(sum(y.float().sum() for y in out), wanted) if wanted else ()),
    ]


def assert_same_results(case: Case, inputs: list[Tensor], others: list[Tensor], exactly: bool) -> None:
    for one, two in zip(results(case, inputs), results(case, others), strict=True):
        if exactly:
            assert torch.equal(one, two)
        else:
            assert error_of(two, one.double(), smoke.LEAST) <= 2 * torch.finfo(one.dtype).eps


def assert_auto_is_as_good_as_eager(name: str, option: str, dtype: torch.dtype, device: str) -> None:
    """The module's answer and gradients by "auto" and by "eager", in the same dtype, and in float64.

    A router that chose other heads in float64 is held to "eager" alone. A bias's gradient is a sum of what its weight's
    is made of, and may cancel, as that of a key's bias does without positions: errors count relative to both. So may
    that of a prior over keys, which sums over all pairs.
    """
    x, weight = (torch.randn(2, 45, 32, dtype=torch.float64).to(device, dtype) for _ in range(2))
    found = {}
    for kind in ("auto", "eager", "exact"):
        backend = "auto" if kind == "auto" else "eager"
        torch.manual_seed(0)
        module = zoo.build(name, dtype=dtype, backend=backend, **zoo.OPTIONS[option]).to(device)
        wide = torch.float64 if kind == "exact" else dtype
        found[kind] = zoo.gradients(module.to(wide), x.to(wide), weight.to(wide))
    for key, value in found["auto"].items():
        exact = found["exact"][key]
        weight_of = "k_proj.weight" if key == "pi" else key.removesuffix("bias") + "weight"
        least = max(smoke.LEAST, largest(found["exact"].get(weight_of)))
        budget = error_of(found["eager"][key], exact, least)
        if name.startswith(("moh", "moa")) and budget > OTHER_HEADS:
            exact, budget = found["eager"][key].double(), OTHER_HEADS
        error = error_of(value, exact, least)
        assert error <= 2 * budget + 8 * torch.finfo(dtype).eps, f"{key}: {error:.1e}, the definition {budget:.1e}"


def largest(x: Tensor | None) -> float:
    return 0.0 if x is None else float(x.abs().max())


OTHER_HEADS = 0.05
"""What a router's result is off by where it chose other heads in float64."""


def assert_feature_as_good_as_eager(feature: str, dtype: torch.dtype, device: str, gradient: bool) -> None:
    inputs, options = smoke.FEATURES[feature](dtype, device)
    inputs = {name: x.requires_grad_(gradient) for name, x in inputs.items()}

    def run(backend: str) -> smoke.Run:
        return lambda *x: [attend(**dict(zip(inputs, x, strict=True)), **options, backend=backend)]

    assert_as_good_as(run("auto"), run("eager"), *inputs.values(), least=smoke.LEAST)


# The expectations themselves.


@without_a_gpu
@pytest.mark.parametrize(("family", "name"), FIRST)
def test_a_right_form_passes_and_planted_faults_do_not(family: str, name: str) -> None:
    case = CASES[family][name]
    inputs = case.inputs(torch.float32, "cpu")
    assert_good(case, inputs, case.plain)
    calls = []

    def unwritten(*x: Tensor) -> list[Tensor]:
        (y,) = case.plain(*x)
        tokens = 1 if y.shape[0] == 2 else 0
        return [y.index_fill(tokens, torch.tensor([y.shape[tokens] - 1]), torch.nan)]

    def one_off(*x: Tensor) -> list[Tensor]:
        """One number of a thousand is off by a per cent of the largest."""
        (y,) = case.plain(*x)
        at = torch.zeros(y.numel())
        at[y.numel() // 2] = 0.01
        return [y + at.view(y.shape) * y.detach().abs().max()]

    def another(*x: Tensor) -> list[Tensor]:
        calls.append(x)
        (y,) = case.plain(*x)
        return [y * (1 + 1e-7 * (len(calls) % 2))]

    def bad_gradient(*x: Tensor) -> list[Tensor]:
        (y,) = case.plain(*x)
        return [y.detach() + 0.99 * (y - y.detach())]

    for fault, message in (
        (unwritten, "output 0: relative error inf"),
        (one_off, "output 0: relative error"),
        (another, "differs between two runs"),
        *([(bad_gradient, "gradient 0: relative error")] if inputs[0].requires_grad else []),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_good(case, inputs, fault)


@without_a_gpu
@pytest.mark.parametrize("name", CASES["softmax"])
def test_a_missing_scale_is_seen(name: str) -> None:
    case = CASES["softmax"][name]
    inputs = case.inputs(torch.float32, "cpu")

    def unscaled(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return case.plain(q * q.shape[3] ** 0.5, k, v)

    with pytest.raises(AssertionError, match="output 0: relative error"):
        assert_good(case, inputs, unscaled)
    with pytest.raises(AssertionError, match="queries see another"):
        assert_needles_found(lambda q, k, v, view: definition(q / 8, k, v, view), MASKS["causal"], torch.float32, "cpu")


def with_another_lengths(view: Visibility, step: int) -> Visibility:
    lengths = view.mask.lengths + torch.tensor([0, step])
    return replace(view, mask=AttentionMask.padding(lengths.clamp(max=int(view.mask.lengths.max()))))


def with_other_ends(view: Visibility, step: int) -> Visibility:
    ends = view.mask.cu_seqlens.clone()
    ends[3] += step
    return replace(view, mask=AttentionMask.packed(ends))


def with_another_column(view: Visibility, step: int) -> Visibility:
    return replace(view, mask=AttentionMask.dense(view.mask.dense_mask.roll(step, -1)))


def faults(masks: smoke.Masks) -> dict[str, Visibility]:
    """Views that are off by one in one respect."""
    view, found = masks.view, {}
    for step in (-1, 1):
        start = view.start(masks.queries, masks.keys)
        # The last query has no key after it that it could see.
        if view.causal and view.mask is None and (step < 0 or start + masks.queries < masks.keys or masks.queries > 1):
            found[f"causality {step:+}"] = replace(view, query_start=start + step)
        if view.window is not None and (view.window + step > 0):
            found[f"window {step:+}"] = replace(view, window=view.window + step)
        if view.sink_tokens:
            found[f"sink tokens {step:+}"] = replace(view, sink_tokens=view.sink_tokens + step)
        if view.mask is not None and view.mask.lengths is not None:
            found[f"lengths {step:+}"] = with_another_lengths(view, step)
        if view.mask is not None and view.mask.cu_seqlens is not None:
            found[f"documents {step:+}"] = with_other_ends(view, step)
        if view.mask is not None and view.mask.dense_mask is not None:
            found[f"dense {step:+}"] = with_another_column(view, step)
        if view.key_positions is not None:
            found[f"positions {step:+}"] = replace(view, key_positions=view.key_positions.roll(step))
    return found


SEEN = "queries see another|relative error"


@without_a_gpu
@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, name in MASKED if family in ("softmax", "decode")]
)
def test_a_mask_that_is_off_by_one_is_caught_by_the_needles(family: str, name: str) -> None:
    """In bfloat16, whose rounding hides what float32 would show anyway."""
    _, masks, sizes = NEEDLES[family]
    assert_needles_found(definition, masks[name], torch.bfloat16, "cpu", **sizes)
    for wrong in faults(masks[name]).values():
        with pytest.raises(AssertionError, match=SEEN):
            assert_needles_found(
                lambda q, k, v, _, wrong=wrong: definition(q, k, v, wrong), masks[name], torch.bfloat16, "cpu", **sizes
            )

    def overhanging(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        """A tile's keys beyond the last are taken for keys of zeros."""
        seen = view.dense((2, q.shape[2], q.shape[1], k.shape[1]), q.device)
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool) if seen is None else seen
        more = torch.nn.functional.pad(seen, (0, 5), value=True)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5)) for x in (k, v))
        return definition(q, k, v, Visibility(causal=False, mask=AttentionMask.dense(more)))

    with pytest.raises(AssertionError, match=SEEN):
        assert_needles_found(overhanging, masks[name], torch.bfloat16, "cpu", **sizes)


@without_a_gpu
@pytest.mark.parametrize("name", ["causal", "window", "packed", "padded", "dense"])
@pytest.mark.parametrize("part", ["queries", "keys"])
def test_a_backward_pass_with_another_mask_is_caught_too(name: str, part: str) -> None:
    class Spoiled(torch.autograd.Function):
        """A right answer, and gradients by another mask, of the queries or of keys and values."""

        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            return definition(q, k, v, MASKS[name].view)

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
            found = []
            for view in (MASKS[name].view, next(iter(faults(MASKS[name]).values()))):
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                    out = definition(*inputs, view)
                found.append(torch.autograd.grad(out, inputs, do))
            right, wrong = found
            return (wrong[0], *right[1:]) if part == "queries" else (right[0], *wrong[1:])

    def spoiled(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
        exact = q.dtype == torch.float64
        return definition(q, k, v, view) if exact else Spoiled.apply(q, k, v)

    with pytest.raises(AssertionError, match="gradient"):
        assert_needles_found(spoiled, MASKS[name], torch.float32, "cpu")


@without_a_gpu
def test_sums_and_experts_that_are_off_by_one_are_seen() -> None:
    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sums(q, k, v, "auto")

    smoke.assert_sums_stop(right, torch.float32, "cpu")
    for step in (-1, 1):
        with pytest.raises(AssertionError, match="another token than its own"):
            smoke.assert_sums_stop(lambda q, k, v, step=step: right(q, k, v.roll(step, 1)), torch.float32, "cpu")

    def eager(*given: Any) -> list[Tensor]:
        return projected(*given, backend="eager")

    smoke.assert_experts_found(eager, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="another expert's matrix"):
        smoke.assert_experts_found(lambda x, w, routes: eager(x, w.roll(1, 0), routes), torch.float32, "cpu")


@without_a_gpu
def test_memory_is_placed_as_the_tests_say() -> None:
    case = CASES["softmax"]["64 causal"]
    inputs = case.inputs(torch.float32, "cpu")
    apart, odd = smoke.far_apart(inputs, step=2**18), smoke.misaligned(inputs)
    for x, far, shifted in zip(inputs, apart, odd, strict=True):
        assert torch.equal(x, far)
        assert torch.equal(x, shifted)
        assert far.stride(0) == 2**18
        assert shifted.data_ptr() % 16 == 4
    assert len({x.untyped_storage().data_ptr() for x in apart}) == 1
    plain = replace(case, fused=case.plain)
    assert_same_results(plain, inputs, apart, exactly=False)

    def by_offset(q: Tensor, *rest: Tensor) -> list[Tensor]:
        # An offset that does not reach the second row.
        return case.plain(q[:1].expand(2, -1, -1, -1) if q.stride(0) == 2**18 else q, *rest)

    with pytest.raises(AssertionError):
        assert_same_results(replace(case, fused=by_offset), inputs, apart, exactly=False)


@without_a_gpu
def test_a_capture_waits_for_the_current_stream_before_it_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            order.append(f"{self.name} waits for {other.name}")

    class Scope:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...
        def replay(self) -> None:
            order.append("replay")

    for name, value in (
        ("Stream", Stream), ("current_stream", lambda: Stream("current")), ("stream", Scope), ("graph", Scope),
        ("CUDAGraph", Scope),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def call() -> Tensor:
        order.append("call")
        return torch.ones(1)

    assert smoke.captured(call)() == 1
    assert order == ["side waits for current", "call", "current waits for side", "call", "replay"]


REHEARSED: dict[str, tuple[Any, ...]] = {
    "test_answers_and_gradients": ("decode", "64, 1 tokens", "bf16"),
    "test_every_mask_ends_where_it_should": ("decode", "window", "bf16"),
    "test_sums_and_experts_end_where_they_should": ("moa", "bf16"),
    "test_any_place_in_memory": ("decode", "64, 1 tokens"),
    "test_auto_is_as_good_as_eager": ("gqa", "alibi"),
    "test_auto_takes_a_right_backend": ("packed", True),
    "test_a_forward_pass_is_captured_in_a_graph": ("kha",),
    "test_a_decoding_step_is_captured_in_a_graph": ("linear",),
}


@without_a_gpu
@pytest.mark.parametrize("name", REHEARSED)
def test_the_tests_for_a_gpu_rehearsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, in float16 and without a graph."""
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    monkeypatch.setitem(globals(), "FAR", 2**20)
    monkeypatch.setitem(HALF, "bf16", torch.float16)

    def captured(call: Any) -> Any:
        call()
        return call

    monkeypatch.setattr(smoke, "captured", captured)
    assert_passes = getattr(TestOnAGPU(), name)
    assert_passes(*REHEARSED[name])


# The kernels in the interpreter, in float16 at the tiles that a GPU with 227 KiB of shared memory gets.


@without_a_gpu
@pytest.mark.parametrize(
    ("family", "name"), [call if call in smoke.QUICK else pytest.param(*call, marks=pytest.mark.slow) for call in CALLS]
)
def test_the_kernels_in_half_precision_at_their_own_tiles(family: str, name: str) -> None:
    case = CASES[family][name]
    assert_good(case, case.inputs(torch.float16, "cpu"))


# The weight of a key that is not visible may be infinite in a row that is left out.
@without_a_gpu
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2", "ignore:invalid value encountered in")
@pytest.mark.parametrize(
    ("family", "name"),
    [call if call in smoke.QUICK else pytest.param(*call, marks=pytest.mark.slow) for call in MASKED],
)
def test_the_kernels_masks_at_their_own_tiles(family: str, name: str) -> None:
    run, masks, sizes = NEEDLES[family]
    assert_needles_found(run, masks[name], torch.float16, "cpu", **sizes)


@without_a_gpu
def test_the_kernels_sums_and_experts_at_their_own_tiles() -> None:
    smoke.assert_sums_stop(sums, torch.float16, "cpu")
    smoke.assert_experts_found(projected, torch.float16, "cpu")


@without_a_gpu
def test_half_precision_gets_the_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call here is at the tiles of 16 that other tests pin."""
    from triton.runtime.interpreter import InterpretedFunction

    least: dict[str, int] = {}

    def noted(self: Any, *args: Any, **named: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        side, _ = smoke.LARGE.get(self.__name__, ("", 0))
        if side:
            least[self.__name__] = min(given[side], least.get(self.__name__, given[side]))

    monkeypatch.setattr(InterpretedFunction, "run", noted)
    for case in (case for cases in CASES.values() for case in cases.values()):
        results(case, case.inputs(torch.float16, "cpu"))
    assert least.keys() == smoke.LARGE.keys()
    assert {name for name, (_, size) in smoke.LARGE.items() if least[name] < size} == set()


@without_a_gpu
@pytest.mark.parametrize(("name", "option"), [call for call in zoo.cases() if call[1] in ("plain", "alibi")])
def test_modules_by_auto_on_a_cpu(name: str, option: str) -> None:
    assert_auto_is_as_good_as_eager(name, option, torch.float32, "cpu")


@without_a_gpu
@pytest.mark.parametrize("feature", smoke.FEATURES)
def test_features_by_auto_on_a_cpu(feature: str) -> None:
    assert_feature_as_good_as_eager(feature, torch.float32, "cpu", True)
