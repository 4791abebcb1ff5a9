"""Mechanisms on the kernels: the same outputs, gradients, golden figures and decoding as on the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo_kernels import decode, tuning
from tests.kernels.smoke import captured
from tests.kernels.tiles import SMALL
from tests.kernels.tolerance import assert_as_good_as
from tests.modules import test_golden, test_mla, test_moa, test_moh
from tests.zoo import LACKS, OPTIONS, TAKES, build, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOFTMAX = (
    "mha", "mqa", "gqa", "gta", "kha", "kha-linear", "kha-gta", "kha-mla", "mla", "mla-pre", "moh", "moa",
    "dcmha-folded", "mhe", "mhe-add", "mgk", "smha", "mae", "gated", "gated-value", "diff",
    "diff-v2", "forgetting", "forgetting-pro", "tpa", "complexformer", "static-context",
)  # fmt: skip
B, T = 1, 19

CASES = [
    *[("gqa", option) for option in OPTIONS],
    *[("gta", option) for option in TAKES["gta"] if option not in ("plain", "softcap")],
    *[(name, "plain") for name in SOFTMAX if name != "gqa"],
    ("kha-mla", "no-rope"),
    ("mla", "no-rope"),
    ("kha", "qk-norm"),
    ("kha-linear", "qk-norm"),
    ("kha", "mlp on all"),
]
MORE: dict[str, dict[str, object]] = {
    **OPTIONS,
    "mlp on all": {"variant": "mlp_qkv", "qk_norm": True, "rope": attnzoo.Rotary(style="interleaved", dim=4)},
}


def outcome(module: nn.Module, names: Sequence[str], tensors: Sequence[Tensor], **call: object) -> list[Tensor]:
    """The module's output with x and parameters taken from tensors."""
    x, *parameters = tensors
    return [torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,), call)]


# Its kernels take the options as those of gqa do.
ALSO_OF_GTA = ("window-sinks", "learned-sink")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[0] == "gta" and case[1] not in ALSO_OF_GTA else ())
        for case in CASES
    ],
)
def test_outputs_and_gradients(name: str, option: str, causal: bool) -> None:
    if not causal and "bidirectional" in LACKS.get(name, ()):
        pytest.skip("it is causal alone")
    if not causal and option not in ("plain", "window-sinks", "alibi"):
        pytest.skip("one direction is enough for this pair")
    made = {
        backend: build(name, dtype=torch.float32, causal=causal, backend=backend, **MORE[option]).to(DEVICE)
        for backend in ("eager", "triton")
    }
    names = [n for n, _ in made["eager"].named_parameters()]
    tensors = [torch.randn(B, T, 32, device=DEVICE), *(p.detach() for p in made["eager"].parameters())]

    def run(backend: str):
        def call(*given: Tensor) -> list[Tensor]:
            # The exact answer is the definition's, in float64; the module's own parameters never take part.
            return outcome(made[backend].to(given[0].dtype), names, given)

        return call

    for module in made.values():
        module.train()
    with tuning.pinned(SMALL):
        assert_as_good_as(run("triton"), run("eager"), *(x.requires_grad_() for x in tensors))


# Of these all is plain PyTorch, and asking for kernels is refused.
PLAIN = ("mta", "mta_full", "selective")


@pytest.mark.parametrize("name", [name for name in test_golden.CLASSES if name not in PLAIN])
def test_golden_figures_in_float32(name: str) -> None:
    module = test_golden.construct(name, backend="triton").to(DEVICE)
    result = test_golden.results(name, module, torch.float32) if DEVICE == "cpu" else on_device(name, module)
    errors = test_golden.largest_errors(result, test_golden.stored_results(name))
    allowed = test_golden.load(name)[2]
    assert all(errors[key] <= 10 * allowed[key] for key in errors), (errors, allowed)


def on_device(name: str, module: nn.Module) -> dict[str, Tensor]:
    tensors = test_golden.load(name)[0]
    result = gradients(module.float(), tensors["input.x"].to(DEVICE), tensors["input.w"].to(DEVICE))
    result = {key: value.cpu() for key, value in result.items()}
    return {"output.y": result.pop("y"), **{f"grad.{key}": value for key, value in result.items()}}


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("name", ["mla", "mla_prerope"])
def test_golden_figures_of_latent_attention(name: str, absorb: bool) -> None:
    tensors, _ = test_mla.load(name)
    module = test_mla.golden(name, backend="triton", absorb=absorb).to(DEVICE)
    result = gradients(module, tensors["input.x"].to(DEVICE), tensors["input.w"].to(DEVICE))
    for key, value in tensors.items():
        if key == "output.y" or key.startswith("grad."):
            error = (result[key.split(".", 1)[1]].double().cpu() - value).abs().max()
            # The files keep the float32 differences of the output and of x alone.
            assert error < 10 * 3.0e-6 * max(1.0, float(value.abs().max())), key


@pytest.mark.parametrize("own", [test_moh, test_moa], ids=["moh", "moa"])
def test_golden_figures_of_routed_heads(own: Any) -> None:
    tensors, _, single = own.stored()
    module = own.golden_module(backend="triton").to(DEVICE)
    result = gradients(module, tensors["input.x"].float().to(DEVICE), tensors["input.w"].float().to(DEVICE))
    result = {"output.y": result.pop("y"), **{f"grad.{key}": value for key, value in result.items()}}
    for key, value in result.items():
        assert float((value.double().cpu() - tensors[key]).abs().max()) < 10 * single[key] + 1e-12, key


# One module for every type of cache, with and without a window that makes it a ring.
DECODING: dict[str, tuple[str, dict[str, object]]] = {
    "KeyValueCache": ("gqa", {"qk_norm": True}),
    "KeyValueCache, ring": ("gqa", {"sliding_window": 5, "sink_tokens": 2, "sink": "learned"}),
    "KeyValueCache, soft-cap and ALiBi": ("mqa", {"logit_softcap": 3.0, "alibi": True, "rope": None}),
    "TiedCache": ("gta", {}),
    "TiedCache, ring": ("gta", {"sliding_window": 6}),
    "TiedCache of knocking heads": ("kha-gta", {}),
    "UntiedCache": ("kha-gta", {"knock_scope": "value"}),
    "LatentCache": ("mla", {"absorb": True}),
    "LatentCache, rotated before": ("mla-pre", {"absorb": True}),
    "LatentCache, expanded": ("mla", {"absorb": False}),
    "LatentCache of knocking heads": ("kha-mla", {}),
    "routed heads": ("moh", {}),
    "routed experts": ("moa", {}),
    "knocking heads": ("kha-linear", {}),
    "head embeddings": ("mhe", {"rope": attnzoo.Rotary()}),
}


@pytest.mark.parametrize("name", DECODING)
def test_decoding_is_the_full_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, options = DECODING[name]
    exact = build(mechanism, backend="eager", **options).eval()
    module = build(mechanism, dtype=torch.float32, backend="triton", **options).to(DEVICE).eval()
    plain = build(mechanism, dtype=torch.float32, backend="eager", **options).eval()
    x = torch.randn(2, 13, 32)
    calls = []
    for function in (decode.decode_attention, decode.latent_decode):
        monkeypatch.setattr(decode, function.__name__, counted(function, calls))
    with torch.no_grad():
        truth = exact(x.double())
        budget = (plain(x).double() - truth).abs().max()
        cache = module.init_cache(2, 13)
        y = torch.cat([module(part, cache=cache) for part in x.to(DEVICE).split((6, 1, 3, 1, 1, 1), 1)], 1)
    assert len(calls) == 5
    assert (y.double().cpu() - truth).abs().max() <= 2 * budget + torch.finfo(torch.float32).eps * truth.abs().max()


def counted(function: Any, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


def test_padded_rows_decode_like_shorter_ones() -> None:
    module = build("gqa", dtype=torch.float32, backend="triton").to(DEVICE).eval()
    x = torch.randn(3, 9, 32, device=DEVICE)
    lengths = torch.tensor([9, 5, 1], device=DEVICE)
    with torch.no_grad():
        cache = module.init_cache(3, 9)
        module(x[:, :8], cache=cache)
        y = module(x[:, 8:], mask=attnzoo.AttentionMask.padding(lengths), cache=cache)
        expected = module(x, mask=attnzoo.AttentionMask.padding(lengths))[:, 8:]
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)


def test_a_compiled_module_is_one_graph() -> None:
    module = build("gqa", dtype=torch.float32, backend="triton").to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(DEVICE == "cpu", reason="autocast on a CPU is bfloat16, which the interpreter multiplies wrongly")
def test_autocast() -> None:
    module = build("gqa", dtype=torch.float32, backend="triton").to(DEVICE)
    x = torch.randn(2, 9, 32, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), module(x), atol=3e-2, rtol=3e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("name", ["gqa", "gta", "mla"])
def test_a_decoding_step_is_captured_in_a_cuda_graph(name: str) -> None:
    module = build(name, dtype=torch.float32, backend="triton").to(DEVICE).eval()
    x = torch.randn(2, 1, 32, device=DEVICE)
    with torch.no_grad():
        cache = module.init_cache(2, 32)
        module(torch.randn(2, 9, 32, device=DEVICE), cache=cache)

        def step() -> torch.Tensor:
            cache.truncate(9)
            return module(x, cache=cache)

        expected, y = step(), captured(step)()
    torch.testing.assert_close(y, expected)
