"""Mixture of attentive experts: stored figures, explicit experts, the gate's input, phases, refusals."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import AttentionMask, Rotary
from attnzoo.modules.call import begin
from tests.zoo import E, G, H, gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "mae.safetensors"


def make(**options):
    """A module whose gate matters, in float64."""
    torch.manual_seed(3)
    module = attnzoo.MixtureOfAttentiveExperts(
        E, H, G, **{"init_std": 0.3, "gate_hidden": 12, "dtype": torch.float64} | options
    )
    torch.nn.init.normal_(module.gate_fc2.weight)
    return module


def plain(module):
    """Grouped-query attention with the same weights."""
    base = attnzoo.GroupedQueryAttention(E, H, G, causal=module.causal, dtype=torch.float64)
    base.load_state_dict({key: value for key, value in module.state_dict().items() if "gate" not in key})
    return base


def subsets(module):
    """The heads of every expert, in order."""
    k = module.num_active
    if k == H - 1:
        return [tuple(h for h in range(H) if h != i) for i in range(H)]
    return list(itertools.combinations(range(H), k))


def expert(module, heads, x):
    """What one expert gives: the other heads' columns of the output projection at 0, times H / k."""
    base = plain(module)
    with torch.no_grad():
        columns = base.o_proj.weight.view(E, H, -1)
        columns[:, [h for h in range(H) if h not in heads]] = 0
    return H / len(heads) * base(x)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_stored_figures(backend):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118  (no mapping)
        config = json.loads(file.metadata()["config"])
    options = {name: value for name, value in config.items() if name not in ("B", "T", "rope_theta", "phase")}
    module = attnzoo.MixtureOfAttentiveExperts(
        **options, rope=Rotary(theta=config["rope_theta"]), backend=backend, dtype=torch.float64
    )
    module.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    x = tensors["input.x"]
    found = gradients(module, x, tensors["input.w"])
    stored = {key.split(".", 1)[1]: tensors[key] for key in tensors if key.startswith("grad.")}
    stored["y"] = tensors["output.y"]
    assert found.keys() == stored.keys()
    assert max(float((found[key] - stored[key]).abs().max()) for key in stored) < 1e-9
    gates = module.gates(module.gate_inputs(x, begin(module, x))[0]).detach()
    assert float((gates - tensors["output.gates"]).abs().max()) < 1e-9
    torch.nn.init.zeros_(module.gate_fc2.weight)
    torch.nn.init.zeros_(module.gate_fc2.bias)
    assert float((module(x).detach() - tensors["output.mha"]).abs().max()) < 1e-9


@pytest.mark.parametrize("num_active", [1, 2, H - 1])
@pytest.mark.parametrize(
    ("causal", "gate_input"), [(True, None), (False, None), (True, "token"), (False, "causal_mean")]
)
def test_it_is_the_mixture_of_its_experts(num_active, causal, gate_input):
    module, x = make(num_active=num_active, causal=causal, gate_input=gate_input), torch.randn(2, 9, E).double()
    fresh = attnzoo.MixtureOfAttentiveExperts(E, H, G, num_active=num_active, causal=causal, dtype=torch.float64)
    torch.testing.assert_close(fresh(x), plain(fresh)(x), atol=1e-12, rtol=0)
    g = module.gates(module.gate_inputs(x, begin(module, x))[0])
    outputs = [expert(module, heads, x) for heads in subsets(module)]
    expected = sum(g[..., i, None] * y for i, y in enumerate(outputs))
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    factors = module.factors(g)
    torch.testing.assert_close(factors.sum(-1), torch.full_like(factors[..., 0], H), atol=1e-12, rtol=0)
    for i, y in enumerate(outputs):
        module.set_phase("expert", i)
        torch.testing.assert_close(module(x), y, atol=1e-12, rtol=0)
    module.set_phase("argmax")
    best = torch.stack(outputs).gather(0, g.argmax(-1)[None, ..., None].expand(1, 2, 9, E))[0]
    torch.testing.assert_close(module(x), best, atol=1e-12, rtol=0)


def test_the_mean_is_over_what_may_be_seen():
    causal, whole, x = make(), make(causal=False), torch.randn(2, 9, E).double()
    running, mean = (m.gate_inputs(x, begin(m, x))[0] for m in (causal, whole))
    torch.testing.assert_close(mean, x.mean(1, keepdim=True), atol=1e-14, rtol=0)
    torch.testing.assert_close(running[:, -1:], mean, atol=1e-14, rtol=0)
    torch.testing.assert_close(running[:, 3], x[:, :4].mean(1), atol=1e-14, rtol=0)
    for module in (causal, whole):
        packed = module.gate_inputs(x, begin(module, x, mask=AttentionMask.packed([0, 4, 18])))[0]
        torch.testing.assert_close(packed[0, 3], x[0, :4].mean(0), atol=1e-14, rtol=0)
        torch.testing.assert_close(packed[0, 8], x[0, 4:].mean(0), atol=1e-14, rtol=0)
        padded = module.gate_inputs(x, begin(module, x, mask=AttentionMask.padding([9, 5])))[0]
        torch.testing.assert_close(padded[1, -1], x[1, :5].mean(0), atol=1e-14, rtol=0)


def test_drawn_experts_are_the_mixture_on_average_and_leave_the_gate_alone():
    module, x = make(), torch.randn(1, 6, E).double()
    expected = module(x).detach()
    module.set_phase("expert")
    torch.manual_seed(0)
    draws = module(x.expand(4000, -1, -1)).detach()
    spread = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - expected[0]).abs() <= 6 * spread).all())
    assert float(draws.std(0).min()) > 0
    module(x).square().sum().backward()
    assert not any(p.grad.any() for p in module.gate_parameters())
    assert module.o_proj.weight.grad.any()
    torch.testing.assert_close(module.eval()(x), expected, atol=1e-12, rtol=0)


def test_statistics_of_the_gate():
    module, x = make(), torch.randn(2, 9, E).double()
    module(x)
    g = module.gates(module.gate_inputs(x, begin(module, x))[0])
    torch.testing.assert_close(module.routing.probability, g.mean((0, 1)).detach())
    likeliest = torch.nn.functional.one_hot(g.argmax(-1), H).double().mean((0, 1))
    torch.testing.assert_close(module.routing.load, likeliest)
    module.eval()(x)
    assert module.routing is None


def test_a_running_mean_is_cached_and_cannot_go_back():
    module, x = make().eval(), torch.randn(2, 9, E).double()
    cache = module.init_cache(2, 12)
    with torch.no_grad():
        module(x, cache=cache)
        torch.testing.assert_close(cache.sums, x.sum(1), atol=1e-12, rtol=0)
        assert cache.nbytes == 2 * module.state_bytes(12, torch.float64)
        with pytest.raises(ValueError, match="length must be 0 or 9: a sum cannot give single tokens back, got 4"):
            cache.truncate(4)
        cache.truncate(0)
        torch.testing.assert_close(module(x, cache=cache), module(x), atol=1e-12, rtol=0)
    other = attnzoo.MixtureOfAttentiveExperts(64, H, G, E // H, dtype=torch.float64)
    with pytest.raises(ValueError, match="cache must come from this module's init_cache"):
        other(torch.zeros(2, 1, 64).double(), cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 1, "num_kv_heads": 1}, "num_heads must be at least 2, got 1"),
        ({"num_active": H}, "num_active must lie between 1 and num_heads - 1 = 3, got 4"),
        ({"num_active": 0}, "num_active must be at least 1, got 0"),
        ({"num_heads": 16, "num_active": 8}, "num_active must give at most 4096 experts, got 12870 of 8 of 16 heads"),
        ({"gate_input": "mean"}, "gate_input 'mean' needs causal=False"),
        ({"gate_input": "last"}, "gate_input must be one of 'causal_mean', 'mean', 'token', got 'last'"),
        ({"training_scheme": "em"}, "training_scheme must be 'joint' or 'bcd', got 'em'"),
        ({"gate_hidden": 0}, "gate_hidden must be at least 1, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.MixtureOfAttentiveExperts(**{"embed_dim": E, "num_heads": H} | options)


def test_phases_that_are_not_there():
    with pytest.raises(ValueError, match="phase must be one of 'mixture', 'expert', 'argmax', got 'best'"):
        make().set_phase("best")
    with pytest.raises(ValueError, match="expert_index must lie between 0 and 3 and needs phase 'expert', got 4"):
        make().set_phase("expert", 4)
    for index in (1.0, True, "1"):
        with pytest.raises(ValueError, match=f"expert_index must be an integer, got {index!r}"):
            make().set_phase("expert", index)


@pytest.mark.parametrize("num_active", [None, 2])
def test_a_trained_layer_becomes_an_equal_mixture(num_active):
    options = {"qk_norm": True, "sink": "learned", "sliding_window": 5, "bias": True, "dtype": torch.float64}
    layer, x = attnzoo.GroupedQueryAttention(E, H, G, **options).eval(), torch.randn(2, 9, E).double()
    torch.nn.init.normal_(layer.sinks)
    mixture = attnzoo.conversion.to_mae(layer, num_active, gate_hidden=7)
    assert not mixture.training
    assert mixture.gate_fc1.out_features == 7
    torch.testing.assert_close(mixture(x), layer(x), atol=1e-12, rtol=0)
    layer.prune_heads([1])
    with pytest.raises(ValueError, match=r"module must not have pruned heads, got \(1,\)"):
        attnzoo.conversion.to_mae(layer)
    with pytest.raises(ValueError, match="module must be multi-head or grouped-query attention, got MixtureOf"):
        attnzoo.conversion.to_mae(mixture)
