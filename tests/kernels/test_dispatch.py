"""Which backend "auto" takes on a GPU, seen without one, and what a decoding step creates and copies."""

from __future__ import annotations

import itertools
import runpy
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo_kernels.composed_attention import composed_attention
from attnzoo_kernels.decode import decode_attention
from attnzoo_kernels.decode.factors import decode_factors
from attnzoo_kernels.launch import Plan, find_plan, is_unobserved, keep_plan
from attnzoo_kernels.sigmoid_attention import sigmoid_attention
from attnzoo_kernels.softmax_attention import softmax_attention as softmax_attention_kernel
from attnzoo_kernels.tuning import Config, pinned
from tests.zoo import MECHANISMS, build

ROOT = Path(__file__).parents[2]
# In the interpreter, before the pretended GPU imports it without.
import_module("attnzoo_kernels.softmax_attention")
MADE = runpy.run_path(str(ROOT / "benchmarks" / "backend_table.py"))
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def noted() -> dict[tuple[str, str, torch.dtype], Any]:
    """What every mechanism calls in every case, in both half precisions."""
    return {
        (name, case, dtype): MADE["noted"](name, case, dtype)
        for name in MECHANISMS
        for case in MADE["CASES"]
        if MADE["takes"](name, case)
        for dtype in HALF
    }


def test_the_page_has_the_table():
    page = (ROOT / "docs" / "backends.md").read_text()
    assert MADE["written"](page, MADE["markdown"]()) == page, "run benchmarks/backend_table.py --write"


def test_our_kernels_run_wherever_they_cover_the_call(noted):
    """Nothing is eager, and no (T, S) tensor exists, unless weights are dropped, which no kernel of ours does."""
    for (name, case, dtype), gpu in noted.items():
        linear = name.startswith(("linear", "mhla"))
        if name in MADE["PLAIN"] or ("dropout" in case and not linear):
            continue
        assert gpu.attention() in (*MADE["ATTENTION"].values(), "sdpa"), (name, case, dtype)
        # The caller's dense masks are their own business.
        assert gpu.quadratic <= ({"mixing"} if linear else set()), (name, case, dtype)


def test_both_half_precisions_take_the_same(noted):
    for name, case, dtype in noted:
        assert noted[name, case, dtype].attention() == noted[name, case, HALF[0]].attention()


def test_sdpa_sees_no_bias_of_another_dtype(noted):
    """cuDNN reads a float32 bias beside half-precision queries as half precision; the other backends raise."""
    seen = 0
    for case, gpu in noted.items():
        for mask, dtype in gpu.sdpa:
            assert mask is None or mask.dtype in (torch.bool, dtype), case
            seen += mask is not None
    assert seen


SCORES = {
    "ALiBi": {"alibi_slopes": torch.ones(2, device="meta")},
    "bias": {"bias": torch.ones(5, 5, device="meta")},
    "sink": {"sinks": 1.0},
    "sinks": {"sinks": torch.ones(2, device="meta")},
}
VIEWS = {
    "window": Visibility(window=3),
    "packed": Visibility(mask=AttentionMask(cu_seqlens=torch.ones(3, dtype=torch.int32, device="meta"))),
    "padding": Visibility(mask=AttentionMask(lengths=torch.ones(1, dtype=torch.int64, device="meta"))),
    "dense": Visibility(mask=AttentionMask(dense_mask=torch.ones(5, 5, dtype=torch.bool, device="meta"))),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", [*SCORES, *VIEWS, "zero sink", "soft-cap", "decay", "gate", "nothing"])
def test_the_operation_by_itself(case: str, dtype: torch.dtype, trains: bool):
    q, k, v = (torch.empty(1, 5, 2, 16, dtype=dtype, device="meta", requires_grad=trains) for _ in range(3))
    options: dict[str, Any] = dict(SCORES.get(case, {}))
    options |= {
        "zero sink": {"sinks": 0.0}, "soft-cap": {"softcap": 3.0},
        "decay": {"decay": torch.ones(1, 2, 5, device="meta")},
        "gate": {"output_gate": torch.ones(1, 5, 2, 1, device="meta"), "softcap": 3.0},
    }.get(case, {})  # fmt: skip
    with MADE["pretend_gpu"]() as gpu:
        softmax_attention(q, k, v, VIEWS.get(case, Visibility()), **options)
        assert gpu.attention() == ("sdpa" if case == "nothing" else "softmax")
        if case in SCORES:
            with pytest.raises(attnzoo.BackendUnavailable, match=f"a float32 bias beside {dtype} queries"):
                softmax_attention(q, k, v, **options, backend="sdpa")


def test_float32_keeps_its_bias():
    q = torch.empty(1, 5, 2, 16, device="meta")
    with MADE["pretend_gpu"]() as gpu:
        softmax_attention(q, q, q, **SCORES["ALiBi"], backend="sdpa")
    assert [mask.dtype for mask, _ in gpu.sdpa] == [torch.float32]


def test_transforms_of_torch_func_stay_with_torch():
    """An operator of ours has no rule for vmap."""
    q = torch.empty(3, 1, 5, 2, 16, device="meta")
    with MADE["pretend_gpu"]() as gpu:
        torch.vmap(lambda x: softmax_attention(x, x, x, Visibility(window=3)))(q)
    assert not gpu.kernels


@pytest.mark.parametrize("name", ["mha", "gqa", "kha", "dcmha", "moh", "moa", "talking-heads"])
def test_norm_and_rotation_are_one_pass(name: str, noted):
    assert "qk_norm_rope" in noted[name, "training", torch.bfloat16].kernels


def test_experts_and_norms_of_heads_run_in_kernels(noted):
    assert "expert_linear" in noted["moa", "training", torch.bfloat16].kernels
    assert "linear_attention_finish" in noted["linear-lm", "training", torch.bfloat16].kernels


def test_shapes_are_read_without_joining_keys(noted):
    """Latent attention joins latents with their rotary keys, and nothing with queries to ask what can run."""
    assert noted["mla", "training", torch.bfloat16].calls["cat"] == 1


class Operations(TorchDispatchMode):
    """Counts operations, and lists those that read one of some storages and returned another one."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.watched = {x.untyped_storage().data_ptr() for x in watched}
        self.counts: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        reads = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        made = out.untyped_storage().data_ptr() if isinstance(out, Tensor) else None
        if len(reads) == 1 and reads[0] in self.watched and made not in (None, reads[0]):
            self.copies.append(name)
        return out


def step(module: nn.Module, *watched: Tensor) -> Operations:
    """The operations of one decoding step, after one that fills what is remembered."""
    x, cache = torch.randn(1, 9, module.embed_dim), module.init_cache(1, 12)
    with torch.no_grad():
        module.eval()(x[:, :7], cache=cache)
        module(x[:, 7:8], cache=cache)
        with Operations(*watched) as operations:
            module(x[:, 8:], cache=cache)
    return operations


FROM_PYTHON = ("lift_fresh", "_to_copy", "scalar_tensor", "index")
"""What torch.tensor, a move to a device and an index that is a list run."""


@pytest.mark.parametrize("groups", [4, 2])
def test_absorbed_decoding_copies_no_weights(groups: int):
    module = attnzoo.MultiHeadLatentAttention(32, 4, 20, num_kv_heads=groups, kv_b_bias=True, absorb=True)
    operations = step(module, module.kv_b_proj.weight)
    assert operations.copies == []
    assert not set(FROM_PYTHON) & set(operations.counts)


@pytest.mark.parametrize("name", ["gqa", "gta", "kha", "moh", "mla", "kha-mla", "dcmha", "talking-heads"])
def test_decoding_after_pruning_makes_no_tensor_from_numbers(name: str):
    module = build(name, dtype=torch.float32, **({"num_kv_heads": 2} if "mla" in name else {}))
    module.prune_heads([3])
    assert not set(FROM_PYTHON) & set(step(module).counts)


def test_remembered_indices_serve_training_after_inference():
    module = attnzoo.GroupedQueryAttention(32, 4, 2)
    module.prune_heads([1])
    x = torch.randn(1, 3, 32)
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert module.k_proj.weight.grad.abs().sum() > 0


class Compiled:
    """Stands for a compiled kernel; keeps what it is launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *values: self.launched.append((grid, *values))


class Kernel:
    """Stands for a kernel that Triton compiles anew in every launch through it."""

    arg_names = ("x_ptr", "y_ptr", "stride", "length", "TILE", "FLAG")

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*values: Any, **options: Any) -> Compiled:
            self.launched.append((grid, *values, options))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run


def test_a_plan_launches_what_was_compiled():
    """Other addresses and lengths go to the compiled kernel; another alignment is compiled."""
    kernel, x = Kernel(), torch.zeros(64)
    plan = Plan(kernel, Config({"TILE": 16}, 4, 2), {"x_ptr": x, "stride": 8, "FLAG": True})
    assert plan.arguments == {**dict.fromkeys(kernel.arg_names), "stride": 8, "TILE": 16, "FLAG": True}

    def launch(x: Tensor, length: int) -> None:
        made = plan.launch(x_ptr=x, length=length)
        made.keep(made.run[length, 1, 1](*made.values, **made.options))

    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    y = torch.zeros(64)
    launch(x, 3)
    launch(y, 5)
    assert kernel.launched == [((3, 1, 1), x, None, 8, 3, 16, True, options)]
    assert [values[1] is y and values[2:] for values in kernel.compiled[0].launched] == [(None, 8, 5, 16, True)]
    launch(x[1:], 5)
    launch(y[1:], 7)
    assert len(kernel.launched) == 2
    assert len(kernel.compiled[0].launched) == len(kernel.compiled[1].launched) == 1


def test_a_pinned_configuration_leaves_no_plan():
    plans: dict[Any, Any] = {}
    with pinned(Config({"TILE": 32}, 4, 1)):
        assert keep_plan(plans, ("key",), "pinned") == "pinned"
        assert find_plan(plans, ("key",)) is None
    keep_plan(plans, ("key",), "own")
    with pinned(Config({"TILE": 32}, 4, 1)):
        assert find_plan(plans, ("key",)) is None
    assert find_plan(plans, ("key",)) == "own"


@pytest.mark.parametrize("watched", ["nothing", "gradient", "dispatch", "function", "vmap", "forward mode"])
def test_an_operator_is_passed_by_only_where_nobody_watches(watched: str):
    x = torch.zeros(3, requires_grad=watched == "gradient")
    with ExitStack() as stack:
        if watched == "dispatch":
            stack.enter_context(Operations())
        elif watched == "function":
            stack.enter_context(TorchFunctionMode())
        elif watched == "forward mode":
            stack.enter_context(forward_ad.dual_level())
        found = [is_unobserved(x, None)]
        if watched == "vmap":
            torch.vmap(lambda row: found.append(is_unobserved(row)) or row)(x)
    assert found[-1] == (watched == "nothing")
    with torch.no_grad():
        assert is_unobserved(x)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Kernels that are launched, and their arguments; they run."""
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():
        pytest.skip("watches the interpreter's launches")
    seen: list[tuple[str, dict[str, Any]]] = []
    run = InterpretedFunction.run

    def watched(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(self.arg_names, values, strict=False)) | named
        seen.append((self.__name__, {**arguments, "grid": tuple(grid), "kernel": self}))
        run(self, *values, grid=grid, warmup=warmup, **named)

    monkeypatch.setattr(InterpretedFunction, "run", watched)
    return seen


def specialisation(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel for: types, constants, and what is 1 or a multiple of 16 unless told otherwise."""
    kernel, found = arguments["kernel"], []
    general, types = kernel.kwargs.get("do_not_specialize") or (), kernel.fn.__annotations__
    for name in kernel.arg_names:
        value = arguments.get(name)
        if isinstance(value, Tensor):
            found.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not isinstance(value, bool) and "constexpr" not in str(types.get(name)):
            found.append((name, "int", None if name in general else (value % 16 == 0, value == 1)))
        else:
            found.append((name, "float" if isinstance(value, float) else value))
    return tuple(found)


def heads(tokens: int, heads: int = 2, width: int = 16) -> Tensor:
    """Strides of a cache of 80 tokens, which do not depend on how many are used."""
    return torch.randn(1, 80, heads, width)[:, :tokens]


def decode_of(S: int) -> None:
    decode_attention(heads(1), heads(S), heads(S), scale=0.3, query_start=S - 1, num_splits=2)


def prefill_of(S: int) -> None:
    softmax_attention(heads(S), heads(S), heads(S), Visibility(window=9), backend="triton")


@pytest.mark.parametrize("call", [decode_of, prefill_of])
def test_no_length_is_compiled_again(call: Any, launches, monkeypatch: pytest.MonkeyPatch):
    """Lengths that are 1, multiples of 16 and neither."""
    from triton.runtime.interpreter import InterpretedFunction

    seen = launches
    monkeypatch.setattr(InterpretedFunction, "run", _only_noted(seen))
    with torch.no_grad():
        for S in range(1, 71):
            call(S)
    kernels: dict[str, set[Any]] = {}
    for name, arguments in seen:
        kernels.setdefault(name, set()).add(specialisation(arguments))
    # Whether one program closes the row or several are merged is known to the compiler.
    most = {"decode_attention_fwd_kernel": 2}
    assert kernels
    changed = {name: set.union(*map(set, keys)) - set.intersection(*map(set, keys)) for name, keys in kernels.items()}
    assert {name: changed[name] for name, keys in kernels.items() if len(keys) > most.get(name, 1)} == {}


NUMBERS = [(1, None), (1, 16), (0.5, 30.0), (2, 1), (0.5, 2)]
"""Scales and soft-caps."""


def composed_of(q: Tensor, k: Tensor, scale: float, softcap: float | None, **options: Any) -> None:
    each = torch.randn(1, k.shape[1], 1, 2, 2)
    for splits in (1, 2, 16):
        composed_attention(q, k, k, scale=scale, k_pre=each, k_post=each, splits=splits, **options)


def decode_factors_of(q: Tensor, k: Tensor, scale: float, softcap: float | None, **options: Any) -> None:
    decode_factors(q, k[..., :2], k, k[..., :2], k, scale=scale, **options)


PLANNED: dict[str, Callable[..., object]] = {
    "softmax_attention": lambda q, k, scale, softcap, **options: softmax_attention_kernel(
        q, k, k, scale=scale, softcap=softcap, **options
    ),
    "sigmoid_attention": lambda q, k, scale, softcap, **options: sigmoid_attention(
        q, k, k, logit_bias=-1.0, scale=scale, softcap=softcap, **options
    ),
    "decode_attention": lambda q, k, scale, softcap, **options: decode_attention(
        q, k, k, scale=scale, softcap=softcap, **options
    ),
    "decode_factors": decode_factors_of,
    "composed_attention": composed_of,
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_a_compiled_kernel_is_launched_only_for_what_it_was_compiled_for(name: str, monkeypatch: pytest.MonkeyPatch):
    """Lengths, windows, places, strides of masks and numbers that are integers change between calls of one layout."""
    from triton.runtime.interpreter import InterpretedFunction

    if torch.cuda.is_available():
        pytest.skip("stands in for the compiler where kernels are interpreted")
    wrong: list[Any] = []

    class Compiled:
        def __init__(self, kernel: Any, made_for: tuple[Any, ...]) -> None:
            self.kernel, self.made_for = kernel, made_for

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*values: Any) -> None:
                needed = specialisation(
                    {**dict(zip(self.kernel.arg_names, values, strict=True)), "kernel": self.kernel}
                )
                wrong.extend(pair for pair in zip(self.made_for, needed, strict=True) if pair[0] != pair[1])

            return run

    def compiled(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> Compiled:
        arguments = dict(zip(self.arg_names, values, strict=False)) | named
        return Compiled(self, specialisation({**arguments, "kernel": self}))

    monkeypatch.setattr(InterpretedFunction, "run", compiled)
    general = property(lambda kernel: kernel.kwargs.get("do_not_specialize") or ())
    monkeypatch.setattr(InterpretedFunction, "do_not_specialize", general, raising=False)
    for module in ("softmax_attention", "sigmoid_attention", "decode", "decode.factors", "composed_attention"):
        monkeypatch.setattr(f"attnzoo_kernels.{module}._PLANS", {})
    monkeypatch.setattr("attnzoo_kernels.launch._LAUNCHED", {})
    call = PLANNED[name]
    with torch.no_grad():
        for (scale, softcap), window, S in itertools.product(NUMBERS, (None, 1, 16, 17), (2, 1, 16, 17)):
            for mask in (None, torch.ones(1, 2, 1, S) > 0, torch.ones(2, 1, 1) > 0):
                for place in (S - 1, 1, 16):
                    call(heads(1), heads(S), scale, softcap, window=window, mask=mask, query_start=place)
    assert wrong == []


def _only_noted(seen: list[tuple[str, dict[str, Any]]]) -> Any:
    def run(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        seen.append((self.__name__, {**dict(zip(self.arg_names, values, strict=False)), **named, "kernel": self}))

    return run


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"window": 7, "sink_tokens": 2}, {"causal": False}])
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_recording_serves_every_length(options: dict[str, Any], tokens: int, launches):
    """What a CUDA graph holds, launched again after the length on the device and the tensors' contents have changed."""
    S, start = 80, torch.zeros(1, dtype=torch.int64)
    q, k, v = torch.randn(1, tokens, 4, 16), heads(S), heads(S)
    lengths = torch.zeros(1, dtype=torch.int64)
    given = {**options, "lengths": lengths, "scale": 0.3}
    out = decode_attention(q, k, v, query_start=start, num_splits=3, **given)
    recorded = list(launches)
    assert len(recorded) == 2
    for length in (tokens, 17, 80):
        start.fill_(length - tokens)
        lengths.fill_(length)
        q.normal_()
        k[:, length:] = v[:, length:] = float("nan")
        expected = decode_attention(
            q, k[:, :length], v[:, :length], query_start=length - tokens, num_splits=1, scale=0.3, **options
        )
        for _, arguments in recorded:
            grid, kernel = arguments["grid"], arguments["kernel"]
            kernel[grid](**{name: value for name, value in arguments.items() if name not in ("grid", "kernel")})
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        k, v = k.nan_to_num_(1.0), v.nan_to_num_(1.0)


def test_one_compiled_graph_serves_every_length():
    graphs = []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True, dynamic=False)
    def step(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        return decode_attention(q, k, v, scale=0.3, query_start=start)

    q, k, v = torch.randn(1, 1, 4, 16), heads(80), heads(80)
    with torch.no_grad():
        for length in (1, 16, 80):
            found = step(q, k, v, torch.tensor([length - 1]))
            expected = decode_attention(q, k[:, :length], v[:, :length], scale=0.3, query_start=length - 1)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1
