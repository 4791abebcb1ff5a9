"""What every mechanism promises, whatever its options: shapes, gradients, visibility, layouts, state, backends."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import AttentionMask, BackendUnavailable, Rotary
from tests.zoo import (
    LACKS,
    MECHANISMS,
    OPTIONS,
    REFUSED,
    E,
    G,
    H,
    build,
    cases,
    directed,
    exact_numbers,
    gradients,
    names,
)

B, T = 2, 12
EXACT = 1e-12
CASES = cases()
NOT_ON_SDPA = ("softcap", "learned-sink")

every_case = pytest.mark.parametrize(("name", "option"), CASES)
every_mechanism = pytest.mark.parametrize("name", MECHANISMS)
every_case_in_either_direction = pytest.mark.parametrize(("name", "option", "causal"), directed(CASES))


def make(name: str, option: str = "plain", **more: object) -> nn.Module:
    """A mechanism with a named option, in float64 unless told otherwise; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build(name, **OPTIONS[option] | more)


def sample(*shape: int) -> Tensor:
    return torch.randn(shape or (B, T, E), dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def output_bias(module: nn.Module) -> tuple[str, Tensor | None]:
    """Name and value of what is added to every output."""
    if hasattr(module, "o_proj"):
        return "o_proj.bias", module.o_proj.bias
    return "o_bias", module.o_bias


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert found.keys() == expected.keys()
    errors = {key: apart(found[key], expected[key]) for key in found}
    assert max(errors.values()) <= tolerance, errors


# Shapes and gradients


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_has_the_shape_and_dtype_of_the_input(name: str, option: str, dtype: torch.dtype) -> None:
    y = make(name, option, dtype=dtype)(sample().to(dtype))
    assert y.shape == (B, T, E)
    assert y.dtype == dtype


@every_case
def test_gradient_reaches_the_input_and_every_parameter(name: str, option: str) -> None:
    module = make(name, option)
    module(x := sample().requires_grad_()).square().sum().backward()
    found = {"x": x.grad} | {key: parameter.grad for key, parameter in module.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    without = {key for key, gradient in found.items() if float(gradient.abs().max()) < 1e-10}
    # A softmax ignores what is added to all of its logits, and without a rotation the key's bias is just that.
    ignored = {"mha": {"k_proj.bias"} if option in ("no-rope", "alibi") else set(), "rcmha": {"k_conv.bias"}}
    assert without == ignored.get(name, set())


@every_mechanism
def test_gradients_agree_with_differences(name: str) -> None:
    module = make(name, "learned-sink" if (name, "learned-sink") in CASES else "plain", backend="eager")
    named = dict(module.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(named, values, strict=True)), x)

    x = sample(1, 4, E).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *named.values()), fast_mode=True)


@every_case
def test_empty_batch_runs_forward_and_backward(name: str, option: str) -> None:
    found = gradients(make(name, option), sample(0, T, E), sample(0, T, E))
    assert found.pop("y").shape == found.pop("x").shape == (0, T, E)
    assert all(not gradient.any() for gradient in found.values())


@every_case
def test_a_single_token_is_the_first_of_many(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    assert apart(module(x[:, :1]), module(x)[:, :1]) <= EXACT


@every_mechanism
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(T, E), rf"x must have shape \(B, T, {E}\), got \({T}, {E}\)"),
        (torch.ones(B, T, E + 1), rf"x must have shape \(B, T, {E}\), got \({B}, {T}, {E + 1}\)"),
        (torch.ones(B, T, E, dtype=torch.long), r"x must hold real floating-point numbers, got torch.int64"),
    ],
    ids=["two-dimensional", "wrong-width", "integers"],
)
def test_a_wrong_input_is_refused(name: str, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MECHANISMS[name]()(x)


@pytest.mark.parametrize(("name", "option"), REFUSED)
def test_an_option_that_a_mechanism_lacks_is_refused_by_name(name: str, option: str) -> None:
    with pytest.raises((ValueError, TypeError), match="|".join(OPTIONS[option])):
        make(name, option)


@pytest.mark.parametrize("name", names("counted flops"))
def test_flops_by_part_are_those_that_are_counted(name: str) -> None:
    module = make(name, backend="eager", causal=False)
    with FlopCounterMode(display=False) as counter:
        module(sample(1, T, E))
    assert module.flops(T, T) == counter.get_total_flops() == sum(module.flops_by_part(T, T).values())
    y = make(name, backend="eager", causal=False)(sample(1, T, E).requires_grad_())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * module.flops(T, T)


# Who sees whom


def rounding(name: str, backend: str = "auto") -> float:
    """How far two runs may differ that must agree: not at all, except where an expert's product has other rows.

    The processor's library may sum a product of more rows in another order, and torch's sigmoid rounds the last few
    numbers of a tensor in another way.
    """
    return EXACT if "rounding of its own" in LACKS.get(name, ()) and backend != "eager" else 0.0


@every_case
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_later_tokens_change_no_earlier_output(name: str, option: str, backend: str) -> None:
    module, x = make(name, option, backend=backend), sample()
    before = module(x)
    for t in (1, 4, T - 1):
        changed = torch.cat([x[:, :t], 10 * sample(B, T - t, E)], dim=1)
        after = module(changed)
        assert apart(after[:, :t], before[:, :t]) <= rounding(name, backend)
        assert not torch.equal(after[:, t:], before[:, t:])


@every_case_in_either_direction
def test_rows_of_a_batch_are_independent(name: str, option: str, causal: bool) -> None:
    module, x = make(name, option, causal=causal), sample(3, T, E)
    y = module(x)
    assert apart(torch.cat([module(row) for row in x.split(1)]), y) <= EXACT
    changed = torch.cat([x[:1], 10 * sample(2, T, E)])
    assert apart(module(changed)[0], y[0]) <= rounding(name)
    order = torch.tensor([2, 0, 1])
    assert apart(module(x[order]), y[order]) <= rounding(name)


@every_case_in_either_direction
def test_right_padding_is_a_shorter_batch(name: str, option: str, causal: bool) -> None:
    module, x, lengths = make(name, option, causal=causal), sample(3, T, E), [T, 7, 1]
    y = module(x, mask=AttentionMask.padding(lengths))
    for row, length in enumerate(lengths):
        assert apart(y[row : row + 1, :length], module(x[row : row + 1, :length])) <= EXACT
    assert causal or apart(y[1, :7], module(x)[1, :7]) > 1e-3


PACKINGS = {
    "row-ends-listed": [0, 5, T, 20, 2 * T],
    "row-ends-inside": [0, 5, 17, 2 * T],
    "one-document": [0, 2 * T],
    "single-tokens": [0, 1, 2, T, T + 1, 2 * T],
    "all-single-tokens": list(range(2 * T + 1)),
    "empty-document": [0, 5, 5, 2 * T],
    "all-of-these": [0, 1, 2, 2, 7, T, 20, 2 * T],
}
FAST_PACKINGS = ("row-ends-inside", "all-of-these")


def documents(packing: str) -> list[tuple[int, int, int]]:
    """Row, start and stop of each document; a row's end always ends one."""
    ends = sorted({*PACKINGS[packing], T})
    return [(a // T, a % T, a % T + b - a) for a, b in itertools.pairwise(ends)]


@every_case_in_either_direction
@pytest.mark.parametrize(
    "packing", [name if name in FAST_PACKINGS else pytest.param(name, marks=pytest.mark.slow) for name in PACKINGS]
)
def test_packed_documents_are_separate_calls(name: str, option: str, causal: bool, packing: str) -> None:
    module, x = make(name, option, causal=causal), sample()
    y = module(x, mask=AttentionMask.packed(PACKINGS[packing]))
    for row, start, stop in documents(packing):
        alone = module(x[row : row + 1, start:stop])
        assert apart(y[row : row + 1, start:stop], alone) <= EXACT


@every_mechanism
def test_packed_gradients_are_the_sum_over_documents(name: str) -> None:
    module, x, weight = make(name), sample(), sample()
    found = gradients(module, x, weight, mask=AttentionMask.packed(PACKINGS["row-ends-inside"]))
    expected = {key: torch.zeros_like(value) for key, value in found.items()}
    for row, start, stop in documents("row-ends-inside"):
        at = (slice(row, row + 1), slice(start, stop))
        for key, value in gradients(module, x[at], weight[at]).items():
            (expected[key][at] if key in ("x", "y") else expected[key]).add_(value)
    assert_same(found, expected)


@pytest.mark.parametrize(("name", "option", "causal"), directed(cases("dense mask", "padding as a mask")))
def test_a_structured_mask_equals_its_dense_form(name: str, option: str, causal: bool) -> None:
    module, x, lengths = make(name, option, causal=causal), sample(), torch.tensor([9, T])
    keep = torch.rand(B, H, T, T) < 0.7
    real = (torch.arange(T) < lengths[:, None])[:, None, None, :]
    combined = module(x, mask=AttentionMask.padding(lengths) & AttentionMask.dense(keep))
    assert torch.equal(combined, module(x, mask=AttentionMask.padding(lengths) & keep))
    # Padding that the mask names has no forget gates, which rounds the scores of its own rows in another way.
    allowed = EXACT if name.startswith("forgetting") else 0.0
    assert apart(combined, module(x, mask=AttentionMask.dense(keep & real))) <= allowed
    assert apart(combined, module(x, mask=keep & real)) <= allowed
    assert apart(combined, module(x, mask=keep)) > 1e-3


@pytest.mark.parametrize(("name", "option", "causal"), directed(cases("dense mask")))
def test_a_mask_of_fewer_dimensions_holds_for_all_of_the_others(name: str, option: str, causal: bool) -> None:
    module, x, keep = make(name, option, causal=causal), sample(), torch.rand(T) < 0.7
    assert torch.equal(module(x, mask=keep), module(x, mask=keep.expand(T, T)))
    assert torch.equal(module(x, mask=torch.tensor(True)), module(x, mask=torch.ones(T, T, dtype=torch.bool)))
    if causal:
        caches = [module.init_cache(B, T) for _ in range(2)]
        for start, stop in ((0, 5), (5, 6), (6, 6), (6, T)):
            seen, new = keep[:stop], x[:, start:stop]
            # A mask for all queries alike, which every mechanism takes with a cache.
            other = module(new, mask=seen[None], cache=caches[1])
            assert torch.equal(module(new, mask=seen, cache=caches[0]), other)


@pytest.mark.parametrize(("name", "option"), cases("dense mask"))
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_rows_that_see_nothing_give_the_output_bias_and_no_gradient(name: str, option: str, backend: str) -> None:
    module = make(name, option, backend=backend)
    blind = gradients(module, sample(), weight := sample(), mask=torch.zeros(T, T, dtype=torch.bool))
    name_of_bias, bias = output_bias(module)
    assert torch.equal(blind.pop("y"), (torch.zeros(E) if bias is None else bias.detach()).expand(B, T, E).double())
    if bias is not None:
        assert apart(blind.pop(name_of_bias), weight.sum((0, 1))) <= EXACT
    assert all(torch.equal(value, torch.zeros_like(value)) for value in blind.values())


@pytest.mark.parametrize(("name", "option"), cases("dense mask"))
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_blind_row_leaves_the_others_alone(name: str, option: str, backend: str) -> None:
    module, x, weight = make(name, option, backend=backend), sample(), sample()
    found = gradients(module, x, weight, mask=AttentionMask.padding([0, T]))
    expected = gradients(module, x[1:], weight[1:])
    name_of_bias, bias = output_bias(module)
    if bias is not None:
        expected[name_of_bias] = weight.sum((0, 1))
    assert not found["x"][0].any()
    found["x"], found["y"] = found["x"][1:], found["y"][1:]
    assert_same(found, expected)


@pytest.mark.parametrize("name", names("dense mask", "rotation"))
def test_positions_restart_in_every_packed_document(name: str) -> None:
    # Rotation is relative, so only frequencies that depend on the largest position can tell.
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 4}
    module, x = make(name, rope=Rotary(scaling=dynamic)), sample()
    halves = x.unflatten(1, (2, T // 2)).flatten(0, 1)
    packed = module(x, mask=AttentionMask.packed([0, T // 2, T, T + T // 2, 2 * T]))
    assert apart(packed, module(halves).view(B, T, E)) <= EXACT
    apart_by_mask = torch.block_diag(*[torch.ones(T // 2, T // 2)] * 2).bool()
    assert apart(packed, module(x, mask=apart_by_mask)) > 1e-6


# Symmetries


def permuted(state: dict[str, Tensor], heads: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """Weights with query heads and groups in another order; what all heads share stays as it is."""

    def rows(tensor: Tensor, order: Tensor) -> Tensor:
        return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    result = {}
    for key, value in state.items():
        layer = key.split(".")[0]
        if layer in (
            "q_proj",
            "g_proj",
            "lambda_proj",
            "forget_proj",
            "output_norm",
            "sinks",
            "phase_scale",
            "phase_bias",
        ) or (layer == "mixing_matrix" and value.ndim == 3):
            value = rows(value, heads)
        elif layer in ("k_proj", "v_proj", "kv_proj", "k_shift_proj", "v_shift_proj"):
            value = rows(value, groups)
        elif layer in ("q_norm", "k_norm") and len(value) == len(state[f"{layer[0]}_proj.weight"]):
            value = rows(value, heads if layer == "q_norm" else groups)
        elif key == "o_proj.weight":
            value = rows(value.T, heads).T
        result[key] = value
    return result


@pytest.mark.parametrize(
    ("name", "option"),
    [case for case in cases("head order by rows") if case[1] != "alibi"],  # its slopes go by number
)
def test_the_order_of_heads_and_groups_means_nothing(name: str, option: str) -> None:
    module, x = make(name, option), sample()
    groups = torch.arange(module.num_kv_heads).flip(0)
    size = H // len(groups)
    heads = (groups[:, None] * size + torch.arange(size).flip(0)).flatten()
    assert heads.tolist() == list(range(H))[::-1]
    other = make(name, option, perturbed=False)
    other.load_state_dict(permuted(module.state_dict(), heads, groups))
    assert not torch.equal(other.q_proj.weight, module.q_proj.weight)
    assert apart(other(x), module(x)) <= EXACT


# State


@every_case
def test_a_state_dict_makes_an_equal_module(name: str, option: str) -> None:
    module, other, x = make(name, option), make(name, option, perturbed=False), sample()
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), module(x))


@every_case
def test_a_cast_rounds_parameters_alone(name: str, option: str) -> None:
    exact, x = make(name, option), torch.randn(B, T, E, dtype=torch.float64)
    cast = make(name, option).bfloat16().half().double()
    with torch.no_grad():
        for mine, theirs in zip(cast.parameters(), exact.parameters(), strict=True):
            mine.copy_(theirs)
    torch.testing.assert_close(cast(x), exact(x), atol=0, rtol=0)


@every_case
def test_a_state_dict_with_a_missing_a_foreign_or_a_misshapen_key_is_refused(name: str, option: str) -> None:
    module = make(name, option)
    for key, value in module.state_dict().items():
        state = {other: tensor for other, tensor in module.state_dict().items() if other != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            module.load_state_dict(state)
        with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
            module.load_state_dict(state | {key: torch.zeros(value.shape[0] + 1, *value.shape[1:])})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"foreign"'):
        module.load_state_dict(module.state_dict() | {"foreign": torch.zeros(1)})


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_computes_the_same_and_shares_nothing(
    name: str, option: str, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    module, x, weight = make(name, option), sample(), sample()
    module(x)  # whatever a call remembers has to survive the copy
    other = duplicate(module)
    assert type(other) is type(module)
    assert_same(gradients(other, x, weight), before := gradients(module, x, weight), 0.0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(gradients(module, x, weight), before, 0.0)


@every_case
def test_a_module_is_built_on_the_meta_device_and_filled_later(name: str, option: str) -> None:
    module, x = make(name, option, perturbed=False, device="meta"), sample()
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module(x.to("meta")).shape == x.shape
    original = make(name, option)
    filled = module.to_empty(device="cpu")
    filled.load_state_dict(original.state_dict())
    assert torch.equal(filled(x), original(x))


def test_positions_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="positions must have values, got a tensor on the device meta"):
        make("gqa")(sample(), positions=torch.arange(T, device="meta"))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_start_that_is_refused_draws_nothing(name: str) -> None:
    module = make(name)
    before = copy.deepcopy(module.state_dict())
    for std, out_std, message in (
        (-0.1, None, "^std must not be negative, got -0.1"),
        (0.1, -0.1, "^out_std must not be negative, got -0.1"),
        (math.nan, None, "^std must be a finite number, got nan"),
        ("0.1", None, "^std must be a finite number, got '0.1'"),
    ):
        with pytest.raises(ValueError, match=message):
            module.reset_parameters(std, out_std)
    assert_same(module.state_dict(), before, 0.0)


# Layout


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width-first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one-row-expanded": lambda x: x[:1].expand(B, -1, -1),
    "one-token-expanded": lambda x: x[:, :1].expand(-1, T, -1),
    "one-number-expanded": lambda x: x[..., :1].expand(-1, -1, E),
    "every-second": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([-x, x], dim=1)[:, T:],
}


@every_mechanism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_input_does_not_matter(name: str, layout: str) -> None:
    module, weight = make(name), sample()
    view = LAYOUTS[layout](sample())
    assert not view.is_contiguous()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = module(x)
        return y.detach(), torch.autograd.grad((y * weight).sum(), x)[0]

    y, gradient = run(view)
    expected_y, expected_gradient = run(view.contiguous())
    assert apart(y, expected_y) <= EXACT
    assert apart(gradient, expected_gradient) <= EXACT


# Backends, precision, compilation


@pytest.mark.parametrize(("name", "option", "causal"), directed([case for case in CASES if case[1] not in NOT_ON_SDPA]))
def test_eager_equals_the_fast_form(name: str, option: str, causal: bool) -> None:
    x, weight = sample(), sample()
    fast = "sdpa" if name in names("sdpa") else "auto"
    eager, other = (
        gradients(make(name, option, causal=causal, backend=backend), x, weight) for backend in ("eager", fast)
    )
    assert_same(other, eager)


@pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[1] in NOT_ON_SDPA])
def test_sdpa_refuses_what_it_cannot_do(name: str, option: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"'sdpa' cannot run softmax_attention: .*|.* has no sdpa backend"):
        make(name, option, backend="sdpa")(sample())


def exact_and_rounded(name: str, option: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """Input in dtype, output in float64, and the error of the eager module in dtype: the budget of all others."""
    eager = make(name, option, backend="eager", dtype=dtype)
    x = sample(4, T, E).to(dtype)
    exact = copy.deepcopy(eager).double()(x.double()).detach()
    return x, exact, apart(eager(x).double(), exact)


def allowed(budget: float, exact: Tensor, dtype: torch.dtype) -> float:
    """Twice the eager error, and half a unit in the last place of the largest output."""
    return 2 * budget + torch.finfo(dtype).eps / 2 * float(exact.abs().max())


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(name: str, option: str, dtype: torch.dtype) -> None:
    x, exact, budget = exact_and_rounded(name, option, dtype)
    y = make(name, option, dtype=dtype)(x)
    assert y.dtype == dtype
    assert apart(y.double(), exact) <= allowed(budget, exact, dtype)


@every_case
def test_autocast_is_as_good_as_eager_bfloat16(name: str, option: str) -> None:
    x, exact, budget = exact_and_rounded(name, option, torch.bfloat16)
    module = make(name, option, dtype=torch.bfloat16).float()
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert apart(y.double(), exact) <= allowed(budget, exact, torch.bfloat16)
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found)


INDUCTOR = (
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch warns about its own import
)
# Other forms of mechanisms that are compiled anyway.
VARIANTS = {name for name in MECHANISMS if "-" in name}
COMPILED = [(name, "plain") for name in MECHANISMS] + [("gqa", option) for option in OPTIONS if option != "plain"]
QUICK_OPTIONS = ("plain", "window-sinks")


@pytest.mark.parametrize(
    ("name", "option", "compiler"),
    [
        pytest.param(
            name, option, "aot_eager", marks=pytest.mark.slow if name in VARIANTS or option not in QUICK_OPTIONS else ()
        )
        for name, option in COMPILED
    ]
    + [pytest.param(name, "plain", "inductor", marks=INDUCTOR) for name in ("gqa", "kha-gta")],
)
def test_compiles_without_a_graph_break(name: str, option: str, compiler: str) -> None:
    torch.compiler.reset()
    module, x, weight = make(name, option), sample(), sample()
    compiled = torch.compile(make(name, option), fullgraph=True, backend=compiler)
    found = gradients(compiled, x, weight)
    assert_same({key.removeprefix("_orig_mod."): value for key, value in found.items()}, gradients(module, x, weight))


@pytest.mark.parametrize(
    "mask",
    [AttentionMask.padding([9, T]), AttentionMask.packed(PACKINGS["row-ends-inside"]), torch.ones(T, T).bool().tril()],
    ids=["padding", "packed", "dense"],
)
def test_compiles_with_a_mask(mask: Tensor | AttentionMask) -> None:
    torch.compiler.reset()
    module, x = make("gqa"), sample()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert apart(compiled(x, mask=mask), module(x, mask=mask)) <= EXACT


# Chance


@every_case
def test_two_runs_are_bitwise_equal(name: str, option: str) -> None:
    x, weight = sample(), sample()
    with exact_numbers():
        assert_same(gradients(make(name, option), x, weight), gradients(make(name, option), x, weight), 0.0)


@every_case
def test_dropout_acts_in_training_only(name: str, option: str) -> None:
    module, x = make(name, option, dropout=0.5), sample()
    first, second = module(x), module(x)
    torch.manual_seed(3)
    third = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), third)
    assert not torch.equal(first, second)
    assert torch.equal(module.eval()(x), make(name, option)(x))


@pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[1] in ("plain", "learned-sink")])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_drops_the_same_weights_again(name: str, option: str, reentrant: bool) -> None:
    module, x, weight = make(name, option, dropout=0.5), sample(), sample()

    torch.manual_seed(3)
    expected = gradients(module, x, weight)
    torch.manual_seed(3)
    y = checkpoint(module, x := x.requires_grad_(), use_reentrant=reentrant)
    (y * weight).sum().backward()
    found = {"y": y, "x": x.grad, **{key: parameter.grad for key, parameter in module.named_parameters()}}
    assert_same(found, expected)


@pytest.mark.parametrize("name", names("unnormed heads"))
def test_dropout_keeps_the_mean(name: str) -> None:
    module, x = make(name, dropout=0.3, bias=False), sample(1, T, E)
    with torch.no_grad():
        draws = torch.cat([module(x.expand(500, -1, -1)) for _ in range(4)])
        spread = draws.std(0) / math.sqrt(len(draws))
        assert bool(((draws.mean(0) - module.eval()(x)[0]).abs() <= 6 * spread + EXACT).all())
        assert float(draws.std(0).min()) > 0


def test_the_zoo_has_the_sizes_that_these_tests_rely_on() -> None:
    assert E % H == 0
    assert 1 < G < H
    assert max(option.get("sliding_window", 0) for option in OPTIONS.values()) < T
