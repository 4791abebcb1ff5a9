"""Composed attention's kernels against the operation's definition: output and every gradient; the modules on them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, library, nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.masks import Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo_kernels import composed_attention as kernels
from attnzoo_kernels import tuning
from attnzoo_kernels.composed_attention import tuning as composed_tuning
from benchmarks.timing import saved_bytes
from tests.kernels.tiles import SMALL, tile
from tests.kernels.tolerance import assert_as_good_as
from tests.modules import test_dcmha, test_talking_heads
from tests.zoo import gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sizes that no axis shares; heads are N groups of MI queries' heads, MJ softmax heads and MV outputs.
SIZES = {"B": 1, "T": 19, "S": 19, "N": 1, "MI": 4, "MJ": 4, "MV": 4, "G": 2, "GV": 2, "D": 5, "DV": 7, "R": 2}
EVERYTHING = ("pre query", "pre key", "post query", "post key")


def draw(changed: dict[str, int], parts: tuple[str, ...], dtype: torch.dtype) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of a call with those parts of the two compositions ("pre base", "post key", ...)."""
    size = SIZES | changed
    B, N, R = size["B"], size["N"], size["R"]
    shapes = {
        "q": (B, size["T"], N * size["MI"], size["D"]),
        "k": (B, size["S"], size["G"], size["D"]),
        "v": (B, size["S"], size["GV"], size["DV"]),
    }
    for part in parts:
        place, kind = part.split()
        sources, targets = (size["MI"], size["MJ"]) if place == "pre" else (size["MJ"], size["MV"])
        if kind == "base":
            shapes[part] = (N, sources, targets)
            continue
        length = size["T"] if kind == "query" else size["S"]
        for vector in ("u", "v"):
            shapes[f"{part} {vector}"] = (B, length, N, R, sources)
        shapes[f"{part} g"] = (B, length, N, sources)
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensor = tensor if len(name) == 1 else 0.3 * tensor
        tensors.append(tensor.to(DEVICE, dtype).requires_grad_())
    return list(shapes), tensors


def compositions(made: dict[str, Tensor], residual: bool) -> tuple[Composition | None, Composition | None]:
    """The two compositions that tensors by name make up, None where there are none."""
    result = []
    for place in ("pre", "post"):
        sides = {
            kind: tuple(made[f"{place} {kind} {vector}"] for vector in "uvg")
            for kind in ("query", "key")
            if f"{place} {kind} u" in made
        }
        base = made.get(f"{place} base")
        result.append(Composition(base, residual, **sides) if sides or base is not None else None)
    return result[0], result[1]


def through(backend: str, names: list[str], call: dict[str, Any]) -> Callable[..., list[Tensor]]:
    """The operation on that backend, as a function of the tensors."""
    rules = {"causal": True, "window": None, "mask": None, "start": None, "positions": None, "residual": True} | call

    def run(*given: Tensor) -> list[Tensor]:
        made = dict(zip(names, given, strict=True))
        q, k, v = made["q"], made["k"], made["v"]
        start = k.shape[1] - q.shape[1] if rules["start"] is None else rules["start"]
        view = Visibility(rules["causal"], rules["window"], 0, rules["mask"], start, rules["positions"])
        pre, post = compositions(made, rules["residual"])
        return [composed_attention(q, k, v, pre, post, view, scale=q.shape[3] ** -0.5, backend=backend)]

    return run


def assert_same_as_eager(
    changed: dict[str, int], parts: tuple[str, ...], call: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    names, tensors = draw(changed, parts, dtype)
    # Around the backward pass too.
    with tuning.pinned(call.get("config", SMALL)):
        assert_as_good_as(through("triton", names, call), through("eager", names, call), *tensors)


def heads(count: int, **more: int) -> dict[str, int]:
    return {"MI": count, "MJ": count, "MV": count, "G": count, "GV": count} | more


LENGTHS = torch.tensor([19, 0], device=DEVICE)
RING = torch.tensor([16, 17, 18, *range(3, 16)], device=DEVICE)
CASES: dict[str, tuple[dict[str, int], tuple[str, ...], dict[str, Any]]] = {
    "both sides": ({}, EVERYTHING, {}),
    "both sides, several tiles": ({"T": 35, "S": 35}, EVERYTHING, {}),
    "cross": ({"S": 37}, EVERYTHING, {"causal": False}),
    "with a base": ({}, (*EVERYTHING, "pre base", "post base"), {"causal": False}),
    "query-wise": ({}, ("pre query", "post query"), {}),
    "key-wise": ({}, ("pre key", "post key"), {}),
    "before the softmax alone": ({}, ("pre query", "pre key"), {}),
    "after the softmax alone": ({}, ("post query", "post key", "post base"), {}),
    "three heads": (heads(3, G=1, GV=3), EVERYTHING, {}),
    "eight heads in two groups": (heads(4, N=2, G=4, GV=1), EVERYTHING, {}),
    "eight heads": (heads(8, G=4), EVERYTHING, {}),
    "sixteen heads": (heads(16), EVERYTHING, {}),
    "window": ({"T": 35, "S": 35}, EVERYTHING, {"window": 6}),
    "window, key-wise": ({"T": 35, "S": 35}, ("pre key", "post key"), {"window": 20}),
    "cached prefix": ({"T": 5, "S": 40}, EVERYTHING, {}),
    "queries beyond the keys": ({"S": 8}, EVERYTHING, {"start": 3}),
    "padding and an empty row": ({"B": 2}, EVERYTHING, {"mask": AttentionMask.padding(LENGTHS), "causal": False}),
    "packed": ({"B": 2}, EVERYTHING, {"mask": AttentionMask.packed([0, 7, 19, 38]).to(DEVICE)}),
    "dense for every head": (
        {}, EVERYTHING, {"mask": AttentionMask.dense((torch.arange(4 * 361) % 7 > 2).view(4, 19, 19).to(DEVICE))},
    ),
    "ring": ({"T": 3, "S": 16}, EVERYTHING, {"positions": RING, "start": 16, "window": 16}),
    "talking heads": ({"MI": 4, "MJ": 6, "MV": 3, "GV": 3}, ("pre base", "post base"), {"residual": False}),
    "talking heads, several tiles": (
        {"T": 35, "S": 35, **heads(8)}, ("pre base", "post base"), {"residual": False, "window": 9},
    ),
    "one query and one key": ({"T": 1, "S": 1}, EVERYTHING, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    assert_same_as_eager(*CASES[name])


@pytest.mark.parametrize("name", ["both sides", "window", "talking heads"])
def test_half_precision(name: str) -> None:
    assert_same_as_eager(*CASES[name], dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_half_precision_of_every_case(name: str) -> None:
    assert_same_as_eager(*CASES[name], dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 32])
def test_few_and_many_heads(count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        # The interpreter takes groups of any size.
        monkeypatch.setattr(kernels, "capacity", lambda *_: (32, 1024))
    assert_same_as_eager(heads(count, R=1), EVERYTHING, {}, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(32, 16), (16, 32), (32, 32), (64, 64)])
@pytest.mark.parametrize("name", ["both sides, several tiles", "window", "packed", "talking heads, several tiles"])
def test_other_tiles(name: str, sides: tuple[int, int]) -> None:
    changed, parts, call = CASES[name]
    assert_same_as_eager(changed, parts, call | {"config": tile(*sides)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [2, 5])
def test_keys_split_over_programs(splits: int, dtype: torch.dtype) -> None:
    names, tensors = draw({"B": 2, "T": 3, "S": 70, "DV": 5}, EVERYTHING, dtype)
    mask = AttentionMask.padding(torch.tensor([70, 9], device=DEVICE))

    def split(*given: Tensor) -> list[Tensor]:
        kernel = kernels.composed_attention

        def forced(*args: Tensor, **options: Any) -> Tensor:
            assert options["split_keys"]
            return kernel(*args, **options | {"splits": splits})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "composed_attention", forced)
            return through("triton", names, {"mask": mask, "causal": False})(*given)

    assert_as_good_as(split, through("eager", names, {"mask": mask, "causal": False}), *tensors)


def test_gradients_are_the_same_in_every_run() -> None:
    names, tensors = draw({}, EVERYTHING, torch.float32)
    first, second = (
        torch.autograd.grad(through("triton", names, {})(*tensors)[0].square().sum(), tensors) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_that_nobody_needs_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    names, tensors = draw({}, EVERYTHING, torch.float32)
    expected = torch.autograd.grad(through("triton", names, {})(*tensors)[0].sum(), tensors)
    for wanted in (0, 2, names.index("post key g")):
        unused = "dq" if names[wanted] in ("v", "post key g") else "dkdv"
        alone = [x.detach().requires_grad_(n == wanted) for n, x in enumerate(tensors)]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, f"composed_attention_bwd_{unused}_kernel", None)
            (result,) = torch.autograd.grad(through("triton", names, {})(*alone)[0].sum(), alone[wanted])
        assert torch.equal(result, expected[wanted]), names[wanted]


def test_no_key_gives_zeros() -> None:
    names, tensors = draw({"S": 0}, EVERYTHING, torch.float32)
    (out,) = through("triton", names, {"causal": False})(*tensors)
    assert out.shape == (1, 19, 4, 7)
    assert not out.any()
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), tensors))


def test_the_operators_pass_torchs_own_checks() -> None:
    names, tensors = draw({"T": 5, "S": 5}, EVERYTHING, torch.float32)
    made = dict(zip(names, tensors, strict=True))
    matrices = [torch.randn(1, 5, 1, 4, 4, device=DEVICE, requires_grad=True) for _ in range(4)]
    with tuning.pinned(SMALL):
        library.opcheck(
            torch.ops.attnzoo.composed_attention.default,
            (made["q"], made["k"], made["v"], *matrices, *(None,) * 5, 0.5, 1, 0, 0, 1, True, True, True),
        )


REFUSALS = [
    ({"dtype": torch.float64}, "the kernels take float16, bfloat16 and float32, got torch.float64"),
    ({"dropout": 0.5}, "the kernels have no dropout, got 0.5"),
    (
        {"sizes": heads(16, D=64)},
        r"heads of a group times width may be at most 512 for torch.float32 here, got 1024 \(padded\): more",
    ),
    (
        {"sizes": heads(17)},
        r"groups may have at most 16 heads of torch.float32 here, got 32 \(padded\): more",
    ),
    ({"view": {"window": 4, "sink_tokens": 1}}, "have windows of causal attention without sink tokens only"),
    ({"view": {"window": 4, "causal": False}}, "have windows of causal attention without sink tokens only"),
    ({"sizes": {"N": 2, "G": 2}, "other": True}, "must have the same number of head groups, got 2 and 1"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS)
def test_what_the_kernels_cannot_do_is_refused(given: dict[str, Any], message: str) -> None:
    names, tensors = draw(given.get("sizes", {}), EVERYTHING, given.get("dtype", torch.float32))
    made = dict(zip(names, tensors, strict=True))
    pre, post = compositions(made, True)
    if given.get("other"):
        post = Composition(torch.eye(8, device=DEVICE)[None])
    with pytest.raises(
        attnzoo.BackendUnavailable, match="backend 'triton' cannot run composed_attention: .*" + message
    ):
        composed_attention(
            made["q"], made["k"], made["v"], pre, post, Visibility(**given.get("view", {})), scale=1.0,
            dropout=given.get("dropout", 0.0), backend="triton",
        )  # fmt: skip


def test_bfloat16_is_refused_in_the_interpreter() -> None:
    if DEVICE == "cuda":
        pytest.skip("the interpreter is for CPU tensors")
    names, tensors = draw({}, EVERYTHING, torch.bfloat16)
    with pytest.raises(attnzoo.BackendUnavailable, match="Triton's interpreter multiplies bfloat16 wrongly"):
        through("triton", names, {})(*tensors)


def test_every_size_that_is_accepted_has_a_configuration() -> None:
    accepted = 0
    for dtype in (torch.float32, torch.bfloat16):
        most, largest = composed_tuning.capacity(dtype, torch.device("cpu"))
        for count, width in itertools.product((1, 4, 12, 16, 32, 33), (8, 32, 64, 128)):
            M, state = composed_tuning.sizes(count, width)
            if most >= M and largest >= state:
                accepted += 1
                for kernel in composed_tuning.LINES:
                    assert composed_tuning.TABLE.config(kernel, dtype, torch.device("cpu"), M, state)["BLOCK_T"] >= 16
    assert accepted > 20


# Modules


MODULES: dict[str, Callable[..., nn.Module]] = {
    "dcmha": lambda **options: attnzoo.DynamicallyComposableAttention(32, 4, **options),
    "dcmha, shared keys": lambda **options: attnzoo.DynamicallyComposableAttention(
        32, 4, 2, head_groups=2, static_base=True, qk_norm=True, **options
    ),
    "dcmha, window": lambda **options: attnzoo.DynamicallyComposableAttention(
        32, 4, sliding_window=5, post_compose=False, **options
    ),
    "talking heads": lambda **options: attnzoo.TalkingHeadsAttention(32, 4, num_v_heads=2, num_qk_heads=8, **options),
}


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The module on eager and, with the same parameters, on the kernels."""
    torch.manual_seed(3)
    eager = MODULES[name](backend="eager", **options)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fused = MODULES[name](backend="triton", **options)
    fused.load_state_dict(eager.state_dict())
    return eager.to(DEVICE), fused.to(DEVICE)


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    eager, fused = pair(name)
    names = [n for n, _ in eager.named_parameters()]
    tensors = [torch.randn(2, 19, 32, device=DEVICE), *(p.detach() for p in eager.parameters())]

    def run(module: nn.Module) -> Callable[..., list[Tensor]]:
        def call(x: Tensor, *parameters: Tensor) -> list[Tensor]:
            # The exact answer is the definition's, in float64; the module's own parameters never take part.
            made = dict(zip(names, parameters, strict=True))
            return [torch.func.functional_call(module.to(x.dtype), made, (x,))]

        return call

    assert_as_good_as(run(fused), run(eager), *(x.requires_grad_() for x in tensors))


@pytest.mark.parametrize("name", ["dcmha, shared keys", "dcmha, window", "talking heads"])
def test_decoding_is_the_full_forward(name: str) -> None:
    eager, fused = pair(name)
    x = torch.randn(2, 13, 32, device=DEVICE)
    with torch.no_grad():
        cache = fused.init_cache(2, 13)
        y = torch.cat([fused(part, cache=cache) for part in x.split((6, 1, 4, 1, 1), 1)], 1)
        exact = eager.double()(x.double())
        budget = (eager.float()(x).double() - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * budget + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_pruned_heads() -> None:
    eager, fused = pair("dcmha, shared keys")
    for module in (eager, fused):
        module.prune_heads([0, 1, 3])
    x = torch.randn(1, 9, 32, device=DEVICE)
    expected, result = (gradients(module, x, torch.ones_like(x)) for module in (eager, fused))
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, atol=1e-5, rtol=1e-5, msg=key)


def test_stored_figures_of_dcmha_in_float32() -> None:
    tensors, _, single = test_dcmha.stored()
    module = test_dcmha.golden(backend="triton").float().to(DEVICE)
    result = gradients(module, tensors["input.x"].float().to(DEVICE), tensors["input.w"].float().to(DEVICE))
    assert_within_ten_times(result, tensors, single)


def test_stored_figures_of_talking_heads_in_float32() -> None:
    with safe_open(test_talking_heads.GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config, single = (json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64"))
    config = {key: value for key, value in config.items() if not key.startswith("rope")}
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    module = attnzoo.TalkingHeadsAttention(*sizes, rope=None, backend="triton", **config)
    module.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    module = module.float().to(DEVICE)
    result = gradients(module, tensors["input.x"].float().to(DEVICE), tensors["input.w"].float().to(DEVICE))
    assert_within_ten_times(result, tensors, single)


def assert_within_ten_times(result: dict[str, Tensor], stored: dict[str, Tensor], single: dict[str, float]) -> None:
    """Everything stored, to ten times the difference that the reference's own float32 run has."""
    assert (result["y"].double().cpu() - stored["output.y"]).abs().max() < 10 * single["y"]
    checked = [key.removeprefix("grad.") for key in stored if key.startswith("grad.")]
    assert len(checked) > 5
    for name in checked:
        error = (result[name].double().cpu() - stored[f"grad.{name}"]).abs().max()
        assert error < 10 * single[f"grad_{name}"], name


@pytest.mark.parametrize("name", ["dcmha", "talking heads"])
def test_what_is_kept_for_the_backward_pass_grows_with_the_length(name: str) -> None:
    _, fused = pair(name)
    kept = []
    for length in (32, 64):
        x = torch.randn(1, length, 32, device=DEVICE, requires_grad=True)
        kept.append(saved_bytes(lambda x=x: fused(x), [x, *fused.parameters()]))
    assert kept[1] / kept[0] <= 2.05


def test_the_kernels_run_by_name_only_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("about CPU tensors")
    ran = []
    monkeypatch.setattr(kernels, "composed_attention", lambda q, *_, **__: ran.append(1) or torch.zeros_like(q))
    for backend, count in (("auto", 0), ("eager", 0), ("triton", 1)):
        ran.clear()
        MODULES["dcmha"](backend=backend)(torch.randn(1, 5, 32))
        assert len(ran) == count, backend


def test_a_compiled_module_is_one_graph() -> None:
    _, fused = pair("dcmha")
    x = torch.randn(2, 9, 32, device=DEVICE)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))
