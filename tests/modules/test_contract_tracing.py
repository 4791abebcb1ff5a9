"""What every mechanism promises to those who record or transform its call: trace, export, fake tensors, torch.func."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, stack_module_state

from attnzoo import AttentionMask
from tests.zoo import MECHANISMS, OPTIONS, E, build, cases, names

B, T = 2, 12
EXACT = 1e-12
CASES = cases()

every_case = pytest.mark.parametrize(("name", "option"), CASES)
every_mechanism = pytest.mark.parametrize("name", MECHANISMS)
variants_slow = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "-" in name else ()) for name in MECHANISMS]
)
QUICK = ("plain", "alibi", "window-sinks")
most_options_slow = pytest.mark.parametrize(
    ("name", "option"), [pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow) for case in CASES]
)
deprecated = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
constant_sizes = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
# torch maps over its fused attention by a loop, and says so.
slow_rules = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


def make(name: str, option: str = "plain", **more: object) -> nn.Module:
    """A mechanism with a named option in float64; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build(name, **OPTIONS[option] | more)


def sample(batch: int = B, tokens: int = T) -> Tensor:
    return torch.randn(batch, tokens, E, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def assert_unharmed(module: nn.Module, x: Tensor, y: Tensor) -> None:
    """The module still gives y for x, and so do its copies."""
    assert torch.equal(module(x), y)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)


def forget() -> None:
    """Empty the package's memories of tensors: memoised functions, and dictionaries that hold nothing else."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "attnzoo":
            for value in vars(module).values():
                entries = list(value.values()) if isinstance(value, dict) else []
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
                elif entries and all(
                    isinstance(entry, tuple) and entry and isinstance(entry[0], Tensor) for entry in entries
                ):
                    value.clear()


@pytest.fixture
def forgotten() -> Iterator[None]:
    """A test whose calls are the first of their kind."""
    forget()
    yield
    forget()


# torch.jit.trace


@pytest.mark.usefixtures("forgotten")
@deprecated
@constant_sizes
@most_options_slow
def test_a_trace_is_right_for_other_values(name: str, option: str) -> None:
    module, x, other = make(name, option).eval(), sample(), sample()
    traced = torch.jit.trace(module, x, check_trace=False)
    assert apart(traced(other), module(other)) <= EXACT
    assert_unharmed(module, x, make(name, option).eval()(x))


@pytest.mark.usefixtures("forgotten")
@deprecated
@constant_sizes
@pytest.mark.parametrize("name", names("bidirectional"))
def test_a_trace_of_bidirectional_attention_is_right_for_other_values(name: str) -> None:
    module, other = make(name, causal=False).eval(), sample()
    traced = torch.jit.trace(module, sample(), check_trace=False)
    assert apart(traced(other), module(other)) <= EXACT


# torch.export


class Masked(nn.Module):
    """A module and one argument that is a tensor or an AttentionMask made of it."""

    def __init__(self, module: nn.Module, argument: str) -> None:
        super().__init__()
        self.module = module
        self.argument = argument

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        if self.argument == "positions":
            return self.module(x, positions=value)
        make_mask = {"lengths": AttentionMask.padding, "cu_seqlens": AttentionMask.packed, "dense": AttentionMask.dense}
        return self.module(x, mask=make_mask[self.argument](value))


def longest(module: nn.Module) -> int | None:
    """Tokens that a module takes by its definition; None if it names no number."""
    if getattr(module, "extrapolation", None) == "error":
        return module.num_blocks * module.block_size
    return getattr(module, "max_distance", None)


def free(module: nn.Module) -> dict[int, Dim]:
    """Batch and tokens of an input as dimensions of an export."""
    return {0: Dim("B"), 1: Dim("T", max=longest(module))}


def assert_exports(module: nn.Module, option: str = "", *, strict: bool = False) -> None:
    """One program serves sizes other than those it was exported with, the longest and a single token among them."""
    most = min(longest(module) or 41, 41)
    program = torch.export.export(module, (sample(),), dynamic_shapes={"x": free(module)}, strict=strict).module()
    for batch, tokens in ((3, 7), (5, most), (4, 10), (1, 2)):
        x = sample(batch, tokens)
        assert apart(program(x), module(x)) <= EXACT, (option, batch, tokens)


@variants_slow
def test_an_exported_program_takes_any_batch_and_length(name: str) -> None:
    module, x = make(name).eval(), sample()
    expected = make(name).eval()(x)
    assert_exports(module)
    assert_unharmed(module, x, expected)


@pytest.mark.slow
@every_case
def test_an_exported_program_takes_any_batch_and_length_with_every_option(name: str, option: str) -> None:
    assert_exports(make(name, option).eval())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"causal": False}) for name in names("bidirectional")]
    + [(name, {"backend": "eager"}) for name in MECHANISMS],
)
def test_other_ways_to_run_export_too(name: str, options: dict[str, object]) -> None:
    assert_exports(make(name, **options).eval())


@pytest.mark.slow
@every_mechanism
def test_strict_export_takes_any_batch_and_length(name: str) -> None:
    assert_exports(make(name).eval(), strict=True)


ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[int, str]]] = {
    "lengths": ((), {0: "B"}),
    "cu_seqlens": ((), {0: "n"}),
    "positions": ((), {0: "B", 1: "T"}),
    "dense": (("dense mask",), {0: "B", 2: "T", 3: "T"}),
}


def argument(kind: str, batch: int, tokens: int) -> Tensor:
    """A value of that argument for a batch of that size."""
    if kind == "lengths":
        return torch.arange(batch) % (tokens + 1)
    if kind == "cu_seqlens":
        ends = torch.randperm(batch * tokens - 1)[:4].sort().values + 1
        return torch.cat([torch.tensor([0]), ends, torch.tensor([batch * tokens])]).int()
    if kind == "positions":
        return torch.arange(batch * tokens).view(batch, tokens)
    return torch.rand(batch, 1, tokens, tokens) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for kind, (needs, _) in ARGUMENTS.items() for name in names(*needs)]
)
def test_an_exported_program_takes_masks_and_positions(name: str, kind: str) -> None:
    module = Masked(make(name), kind).eval()
    dimensions = free(module.module)
    named = {"B": dimensions[0], "T": dimensions[1], "n": Dim("n")}
    shapes = {"x": dimensions, "value": {at: named[key] for at, key in ARGUMENTS[kind][1].items()}}
    program = torch.export.export(module, (sample(), argument(kind, B, T)), dynamic_shapes=shapes).module()
    for batch, tokens in ((3, 7), (5, 37)):
        x, value = sample(batch, tokens), argument(kind, batch, tokens)
        assert apart(program(x, value), module(x, value)) <= EXACT


# Fake tensors


@most_options_slow
@pytest.mark.usefixtures("forgotten")
def test_a_fake_call_leaves_nothing_behind(name: str, option: str) -> None:
    with FakeTensorMode():
        module = MECHANISMS[name](**OPTIONS[option], dtype=torch.float64)
        y = module(sample())
        assert y.shape == (B, T, E)
    real, x = make(name, option), sample()
    assert type(real(x)) is Tensor
    assert apart(real(x), real(x)) == 0


@pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[1] in QUICK])
@pytest.mark.usefixtures("forgotten")
def test_a_real_module_takes_fake_inputs_between_real_ones(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert module(sample(3, 9)).shape == (3, 9, E)
    expected = module(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = module(sample(3, 9))
        y.sum().backward()
    module.zero_grad()
    assert_unharmed(module, x, expected)


# torch.func


@every_case
def test_the_gradient_by_torch_func_is_that_of_autograd(name: str, option: str) -> None:
    module, x, weight = make(name, option), sample(), sample()
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(module, parameters, (x,)) * weight).sum()

    found, to_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    x = x.requires_grad_()
    named = dict(module.named_parameters())
    expected = torch.autograd.grad((module(x) * weight).sum(), [x, *named.values()])
    assert apart(to_x, expected[0]) <= EXACT
    assert max(apart(found[key], value) for key, value in zip(named, expected[1:], strict=True)) <= EXACT
    assert_unharmed(module, x, make(name, option)(x))


@slow_rules
@every_case
def test_mapping_over_inputs_is_a_loop(name: str, option: str) -> None:
    module, x = make(name, option), sample(3)
    y = torch.vmap(lambda row: module(row[None])[0])(x)
    assert apart(y, torch.cat([module(row[None]) for row in x])) <= EXACT
    assert_unharmed(module, x, make(name, option)(x))


@slow_rules
@every_case
def test_mapping_over_parameters_is_a_loop_over_modules(name: str, option: str) -> None:
    modules, x = [make(name, option) for _ in range(3)], sample()
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    state = stack_module_state(modules)
    y = torch.vmap(lambda *each: functional_call(modules[0], each, (x,)))(*state)
    assert apart(y, torch.stack([module(x) for module in modules])) <= EXACT
    assert apart(y[0], y[1]) > 1e-3


@slow_rules
@every_mechanism
def test_gradients_of_single_samples_are_a_loop(name: str) -> None:
    module, x = make(name), sample(3)
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, parameters, (row[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(module(row[None]).square().sum(), list(module.parameters()))
        for key, value in zip(parameters, expected, strict=True):
            assert apart(found[key][i], value) <= 1e-10, key


@deprecated
@every_mechanism
def test_derivatives_carried_forward_are_those_carried_back(name: str) -> None:
    module, x, direction, weight = make(name), sample(), sample(), sample()
    y, tangent = torch.func.jvp(module, (x,), (direction,))
    assert apart(y, module(x)) <= EXACT
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad((module(x) * weight).sum(), x)
    assert apart((gradient * direction).sum(), (tangent * weight).sum()) <= 1e-10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "sigmoid" else pytest.mark.slow) for name in MECHANISMS]
)
@torch.no_grad()
def test_few_graphs_serve_every_step_of_decoding(name: str) -> None:
    module, x = make(name).eval(), sample()
    graphs: list[object] = []

    def counted(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend=counted)
    cache = module.init_cache(B, T)
    y = [compiled(x[:, :3], cache=cache), *(compiled(x[:, t : t + 1], cache=cache) for t in range(3, T))]
    assert apart(torch.cat(y, 1), module(x)) <= EXACT
    assert len(graphs) <= 4


@slow_rules
@variants_slow
def test_one_graph_serves_any_length(name: str) -> None:
    module = make(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for tokens in (5, 16):
            x = sample(B, tokens)
            assert apart(compiled(x), module(x)) <= 1e-10


# The meta device


def assert_starts_as(module: nn.Module, fresh: nn.Module) -> None:
    """Parameters are constants where a fresh module's are, and of a similar size elsewhere."""
    for (key, found), wanted in zip(module.named_parameters(), fresh.parameters(), strict=True):
        assert found.isfinite().all(), key
        if wanted.numel() < 2 or not bool(wanted.std()):
            assert torch.equal(found, wanted), key
        elif wanted.numel() < 20:
            assert bool(found.std()), key
        else:
            assert bool(0.5 < found.std() / wanted.std() < 2), key


@every_mechanism
def test_the_device_context_makes_modules_without_storage_too(name: str) -> None:
    with torch.device("meta"):
        module = MECHANISMS[name](dtype=torch.float64)
        assert module(torch.zeros(B, T, E, dtype=torch.float64)).device.type == "meta"
    reference, x = make(name), sample()
    module.load_state_dict(reference.state_dict(), assign=True)
    assert_unharmed(module, x, reference(x))


@every_case
def test_a_module_made_without_storage_works_once_it_has_some(name: str, option: str) -> None:
    reference, x = make(name, option), sample()
    options = OPTIONS[option] | {"dtype": torch.float64}
    module = MECHANISMS[name](**options, device="meta")
    y = module(x.to("meta"))
    assert y.device.type == "meta"
    assert y.shape == (B, T, E)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()
    assert_starts_as(module, MECHANISMS[name](**options))
    assert bool(module(x).isfinite().all())
    module.load_state_dict(reference.state_dict())
    assert_unharmed(module, x, reference(x))
