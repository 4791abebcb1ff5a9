"""Submodules are called, so whoever wraps, hooks, parametrises or quantises one is heard, in decoding too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import attnzoo
from attnzoo.modules.chai import ClusteredHeadAttention
from tests.zoo import MECHANISMS, E, G, H, build

# B T exceeds E, from where two maps in a row are cheaper as one.
B, T = 2, 18
EXACT = 1e-10


def with_absorb(name: str, absorb: bool) -> nn.Module:
    module = build(name)
    module.absorb = absorb
    return module


def perturbed(module: nn.Module) -> nn.Module:
    """In float64, and off its start, as the modules of the zoo are."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# Each mechanism, and the forms and options that have submodules or ways to run of their own.
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: build(name) for name in MECHANISMS},
    "gqa-norm": lambda: build("gqa", qk_norm=True, bias=True),
    "kha-norm": lambda: build("kha-linear", qk_norm=True, bias=True),
    "mla-absorbed": lambda: with_absorb("mla", True),
    "mla-expanded": lambda: with_absorb("mla", False),
    "mla-biases": lambda: build("mla", q_lora_rank=12, kv_b_bias=True, bias=True),
    "mla-pre-absorbed": lambda: with_absorb("mla-pre", True),
    "kha-mla-absorbed": lambda: with_absorb("kha-mla", True),
    "dcmha-norm": lambda: build("dcmha", qk_norm=True),
    "moh-sparse": lambda: build("moh", sparse=True),
    "moh-few-dense": lambda: build("moh-few", sparse=False),
    "moh-norm-sparse": lambda: build("moh-norm", sparse=True),
    "moh-shared": lambda: perturbed(attnzoo.MixtureOfHeadAttention(E, H, G, gate_form="paper")),
    "linear-hedgehog": lambda: build("linear", feature_map="hedgehog"),
    "linear-product": lambda: perturbed(
        attnzoo.LinearAttention(
            E, H, G, feature_map="elementwise_product", normalize=False, output_norm="rmsnorm", qk_norm=True
        )
    ),
    "mhla-t2r": lambda: build("mhla", feature_map="t2r", bias=True),
    "chai": lambda: ClusteredHeadAttention(build("mha", bias=True), 2),
    "chai-norm": lambda: ClusteredHeadAttention(build("gqa", qk_norm=True), 3),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> nn.Module:
    """A module in float64, for inference; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return MODULES[name]().eval()


def sample(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, E, dtype=dtype)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def of_kind(module: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Names of the submodules of these kinds."""
    return [name for name, part in module.named_modules() if isinstance(part, kinds)]


@torch.no_grad()
def decode(name: str, module: nn.Module, x: Tensor, chunks: list[int]) -> Tensor:
    """Outputs of x in chunks; clustered heads take a first one that they can be clustered by."""
    chunks = [6, *chunks] if name.startswith("chai") else chunks
    cache = module.init_cache(B, T)
    parts, start = [], 0
    while start < T:
        size = chunks.pop(0) if chunks else 1
        parts.append(module(x[:, start : start + size], cache=cache))
        start += size
    return torch.cat(parts, dim=1)


@torch.no_grad()
def assert_heard(name: str, changed: nn.Module, x: Tensor, expected: Tensor, plain: Tensor, what: str = "") -> None:
    """The changed module gives what is expected, at once and in decoding, which is not what it gave before."""
    assert apart(changed(x), expected) <= EXACT, what
    assert apart(decode(name, changed, x, []), expected) <= EXACT, what
    assert apart(decode(name, changed, x, [7, 1, 5]), expected) <= EXACT, what
    assert apart(expected, plain) > 1e-4, what


# Adapters


class Adapter(nn.Module):
    """A low-rank term beside a linear layer, whose weight and bias it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False, dtype=torch.float64)
        self.up = nn.Linear(3, base.out_features, bias=False, dtype=torch.float64)
        self.in_features, self.out_features = base.in_features, base.out_features

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_adapter(module: nn.Module, place: str) -> tuple[nn.Module, nn.Module]:
    """A copy of the module with an adapter around that layer, and one with its product added to the layer's weight."""
    adapted, merged = copy.deepcopy(module), copy.deepcopy(module)
    adapter = Adapter(adapted.get_submodule(place))
    adapted.set_submodule(place, adapter)
    with torch.no_grad():
        merged.get_submodule(place).weight.add_(adapter.up.weight @ adapter.down.weight)
    return adapted, merged


@every_module
def test_an_adapter_around_any_linear_layer_is_its_merged_weight(name: str) -> None:
    module, x = make(name), sample()
    with torch.no_grad():
        plain = module(x)
        for place in of_kind(module, nn.Linear):
            adapted, merged = with_adapter(module, place)
            assert_heard(name, adapted, x, merged(x), plain, place)


@every_module
def test_adapters_of_peft_are_their_merged_weights(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft makes the adapters")
    module, x = make(name), sample()
    with torch.no_grad():
        plain = module(x)
    layers = of_kind(module, nn.Linear)
    config = peft.LoraConfig(r=3, target_modules=layers, init_lora_weights=False)
    adapted = peft.get_peft_model(module, config).eval()
    assert len(of_kind(adapted, peft.tuners.lora.LoraLayer)) == len(layers)
    found = [adapted(x), decode(name, adapted, x, []), decode(name, adapted, x, [7, 1, 5])]
    merged = adapted.merge_and_unload()
    assert isinstance(merged, type(module))
    with torch.no_grad():
        expected = merged(x)
        assert apart(decode(name, merged, x, []), expected) <= EXACT
    assert max(apart(y, expected) for y in found) <= EXACT
    assert apart(expected, plain) > 1e-3


@every_module
def test_an_adapter_of_peft_on_any_single_layer_matters(name: str) -> None:
    peft = pytest.importorskip("peft", reason="peft makes the adapters")
    x = sample()
    for place in of_kind(make(name), nn.Linear):
        module = make(name)
        with torch.no_grad():
            plain = module(x)
        config = peft.LoraConfig(r=3, target_modules=[place], init_lora_weights=False)
        adapted = peft.inject_adapter_in_model(config, module).eval()
        with torch.no_grad():
            y = adapted(x)
        assert apart(decode(name, adapted, x, []), y) <= EXACT, place
        assert apart(y, plain) > 1e-4, place


# Hooks


def factors(part: nn.Module) -> Tensor:
    """A factor for every output feature of a layer."""
    return torch.linspace(0.5, 1.7, part.weight.shape[0], dtype=torch.float64)


@every_module
def test_a_hook_on_any_layer_or_norm_is_heard(name: str) -> None:
    module, x = make(name), sample()
    with torch.no_grad():
        plain = module(x)
        for place in of_kind(module, nn.Linear, nn.RMSNorm):
            reference = copy.deepcopy(module)
            part = reference.get_submodule(place)
            part.weight.mul_(factors(part)[(...,) + (None,) * (part.weight.ndim - 1)])
            if getattr(part, "bias", None) is not None:
                part.bias.mul_(factors(part))
            hooked = module.get_submodule(place)
            # A norm with gains of each head gives (B, T, N, D).
            hook = hooked.register_forward_hook(lambda part, _, y: y * factors(part).view(-1, y.shape[-1]).squeeze(0))
            assert_heard(name, module, x, reference(x), plain, place)
            hook.remove()
        assert torch.equal(module(x), plain)


@every_module
def test_a_hook_before_any_layer_is_heard(name: str) -> None:
    module, x = make(name), sample()
    with torch.no_grad():
        plain = module(x)
        for place in of_kind(module, nn.Linear):
            reference = copy.deepcopy(module)
            weight = reference.get_submodule(place).weight
            scale = torch.linspace(0.5, 1.7, weight.shape[1], dtype=torch.float64)
            weight.mul_(scale)
            hook = module.get_submodule(place).register_forward_pre_hook(
                lambda _, inputs, scale=scale: inputs[0] * scale
            )
            assert_heard(name, module, x, reference(x), plain, place)
            hook.remove()


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("chai")])
def test_a_hook_on_any_other_child_is_heard(name: str) -> None:
    module, x = make(name), sample()

    def halve_some(_: nn.Module, __: object, y: Tensor) -> Tensor:
        return y * torch.linspace(0.5, 1.7, y.shape[-1], dtype=y.dtype) if isinstance(y, Tensor) else y

    with torch.no_grad():
        plain = module(x)
        for place, child in module.named_children():
            # Some children only hold tensors, and some return more than one.
            returns_more = type(child).__name__ == "DynamicWeights"
            if isinstance(child, nn.Linear | nn.RMSNorm) or type(child).__name__ == "Experts" or returns_more:
                continue
            hook = child.register_forward_hook(halve_some)
            y = module(x)
            assert_heard(name, module, x, y, plain, place)
            hook.remove()


# Parametrisations


@every_module
def test_parametrised_layers_are_their_effective_weights(name: str) -> None:
    module, reference, x = make(name), make(name), sample()
    with torch.no_grad():
        plain = module(x)
    for place in of_kind(module, nn.Linear):
        part = weight_norm(module.get_submodule(place))
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(factors(part)[:, None])
            reference.get_submodule(place).weight.copy_(part.weight)
    with torch.no_grad():
        expected = reference(x)
    assert_heard(name, module, x, expected, plain)
    if not name.startswith("chai"):
        module(x).square().sum().backward()
        own = {key: parameter.grad for key, parameter in module.named_parameters() if "parametrizations" in key}
        assert all(gradient is not None and bool(gradient.any()) for gradient in own.values()), own


# Quantised layers


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
@every_module
def test_int8_layers_decode_as_well_as_at_once(name: str) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no engine for quantised layers")
    module, x = make(name).float(), sample(torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)
    assert not of_kind(quantised, nn.Linear)
    with torch.no_grad():
        expected = module(x)
        error = (quantised(x) - expected).abs().mean()
    assert 0 < error < 0.2 * expected.abs().mean()
    # Inputs are rounded by the range of each call, so that decoding errs otherwise, but no more.
    for chunks in ([], [7, 1, 5]):
        assert (decode(name, quantised, x, chunks) - expected).abs().mean() <= 2 * error
