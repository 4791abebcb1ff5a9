"""Heads split over two processes equal one process: outputs and all gradients, every mechanism that has a plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import attnzoo
from attnzoo.distributed import SequenceParallel, parallelize, shard, unshard
from tests.distributed.comparison import E, assert_equal, inputs, made, results
from tests.zoo import MECHANISMS, OPTIONS, TAKES

# Mechanisms without a plan, and the reason.
REFUSED = {
    "talking-heads": "every output mixes the scores of all heads",
    "eit": "every output mixes the scores of all heads",
    "eit-efficient": "every output mixes the scores of all heads",
    "dcmha": "head_groups must be a multiple of the ranks",
    "mla-pre": "its latent is made from the keys of all heads",
    "moh-norm": "router 'query_norm' compares the queries of all heads",
    **dict.fromkeys(("mgk", "mgk-hard", "mgk-linear"), "the keys of a head are apart in k_proj"),
}
HAVE = [
    "mha", "mqa", "gqa", "gta", "kha", "kha-linear", "kha-gta", "mhe", "mhe-add", "complexformer", "mla", "kha-mla",
    "moh", "moh-few", "moa", "mae", "mae-token", "dcmha-folded", "dcmha by groups", "gated", "gated-value", "gated-key",
    "gated-dense", "smha", "rcmha", "linear", "linear-lm", "mhla", "mhla-heads", "static-context", "diff",
    "diff-v2", "sigmoid",
]  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """A gradient of all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def split_results(module: Any, x: Tensor, w: Tensor, **call: Any) -> dict[str, Tensor]:
    """As `results`, with the gradients of all ranks' parts."""
    return {name: whole(value) for name, value in results(module, x, w, **call).items()}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def check_split(name: str, options: dict[str, Any], training: bool = True) -> None:
    module = made(name, **options).train(training)
    x, w = inputs(20)
    expected = results(module, x, w)
    own = copy.deepcopy(module)
    parallelize_module(own, mesh(), own.tensor_parallel_plan())
    assert_equal(split_results(own, x, w), expected, (name, options))
    assert own.cache_bytes_per_token() <= module.cache_bytes_per_token()
    local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in own.parameters())
    assert local < 0.8 * sum(p.numel() for p in module.parameters()) or name == "mhe"
    # Every rank's state dict is that of the whole module.
    state = {key: whole(value) for key, value in own.state_dict().items()}
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", HAVE)
def test_heads_split_over_two_ranks(name, two):
    two.run(check_split, name, {})


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "plain"])
@pytest.mark.parametrize("name", ["gqa", "mqa", "gta"])
def test_options(name, option, two):
    if option in TAKES.get(name, tuple(OPTIONS)):
        two.run(check_split, name, OPTIONS[option])


def check_aux(name: str) -> None:
    module = made(name).train()
    x, w = inputs(20)
    loss = (module(x) * w).sum() + module.aux_loss
    named = dict(module.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    own = made(name).train()
    parallelize_module(own, mesh(), own.tensor_parallel_plan())
    loss = (own(x) * w).sum() + own.aux_loss
    found = torch.autograd.grad(loss, list(own.parameters()))
    assert_equal({key: whole(g) for key, g in zip(named, found, strict=True)}, expected, name)


@pytest.mark.parametrize("name", ["moh", "moa", "smha"])
def test_routers_learn_as_on_one_rank(name, two):
    two.run(check_aux, name)


def check_decoding(name: str) -> None:
    module = made(name).eval()
    x, _ = inputs(12)
    with torch.no_grad():
        expected = module(x)
        own = parallelize_module(copy.deepcopy(module), mesh(), module.tensor_parallel_plan())
        cache = own.init_cache(2, 12)
        found = torch.cat([own(x[:, :8], cache=cache), *(own(x[:, t : t + 1], cache=cache) for t in range(8, 12))], 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa", "mqa", "gta", "mla", "kha-mla", "linear", "moh", "dcmha by groups"])
def test_decoding(name, two):
    two.run(check_decoding, name)


def refusal(name: str) -> str:
    try:
        module = made(name)
        parallelize_module(module, mesh(), module.tensor_parallel_plan())
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def check_once(name: str) -> None:
    module = made(name)
    plan = module.tensor_parallel_plan()
    parallelize_module(module, mesh(), plan)
    heads, x = module.num_heads, inputs(20)[0]
    y = module(x)
    with pytest.raises(ValueError, match="must not be split over ranks yet, it is over 2"):
        parallelize_module(module, mesh(), module.tensor_parallel_plan())
    if name != "linear":
        with pytest.raises(ValueError, match="prune_heads needs all heads on one rank"):
            module.prune_heads([0])
    assert module.num_heads == heads
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("name", ["gqa", "mla", "moa", "linear"])
def test_heads_are_split_once(name, two):
    two.run(check_once, name)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, two):
    assert all(REFUSED[name] in text for text in two.run(refusal, name))


def check_dropout() -> None:
    module = made("gqa", dropout=0.25)
    with pytest.raises(ValueError, match="dropout of attention weights must be 0, got"):
        parallelize_module(module, mesh(), module.tensor_parallel_plan())
    linear = made("linear", dropout=0.25)
    own = parallelize_module(copy.deepcopy(linear), mesh(), linear.tensor_parallel_plan())
    drawn = []
    for one in (linear, own):
        torch.manual_seed(2)
        drawn.append(one.train()(inputs(12)[0]))
    torch.testing.assert_close(*drawn, rtol=1e-12, atol=1e-12)


def test_weights_of_different_heads_are_not_dropped_alike(two):
    two.run(check_dropout)


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_has_a_plan_or_a_reason(name):
    module = MECHANISMS[name]()
    if name in HAVE or name in ("dcmha", "mla-pre", "moh-norm"):
        assert "" in module.tensor_parallel_plan()
    elif name in REFUSED:
        with pytest.raises(ValueError, match="has no tensor-parallel plan"):
            module.tensor_parallel_plan()


class MoreParameters(attnzoo.GroupedQueryAttention):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.temperature = nn.Parameter(torch.ones(self.num_heads))


def test_parameters_that_no_plan_names_are_refused():
    with pytest.raises(ValueError, match=r"tensor_splits\(\) does not name temperature"):
        MoreParameters(E, 4).tensor_parallel_plan()


def check_model() -> None:
    """A plan among those of a model, and a step of an optimiser."""
    model = nn.Sequential(nn.Linear(E, E), made("gqa"), made("mla")).double()
    reference = copy.deepcopy(model)
    plan = {f"{at}.{key}".rstrip("."): style for at in ("1", "2")
            for key, style in model[int(at)].tensor_parallel_plan().items()}  # fmt: skip
    parallelize_module(model, mesh(), plan)
    x, w = inputs(12)
    for one in (model, reference):
        optimiser = torch.optim.AdamW(one.parameters(), lr=0.1, foreach=False)
        for _ in range(3):
            optimiser.zero_grad()
            (one(x) * w).sum().backward()
            optimiser.step()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-9, atol=1e-9)


def test_in_a_model_with_an_optimiser(two):
    two.run(check_model)


def check_both(name: str, form: str) -> None:
    """Tensor 2 x sequence 2: P applies to the heads that are left."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("seq", "tensor"))
    module = made(name)
    x, w = inputs(20)
    expected = results(module, x, w)
    parallelize_module(module, both["tensor"], module.tensor_parallel_plan())
    parallelize(module, SequenceParallel(both["seq"], form=form, layout="contiguous"))
    sp = module.sequence_parallel
    found = results(module, shard(x, 1, sp), shard(w, 1, sp))
    for key, value in found.items():
        if key in ("y", "x"):
            found[key] = unshard(value, 1, sp)
        else:
            own = value.to_local() if hasattr(value, "to_local") else value
            dist.all_reduce(own, group=sp.group)
            found[key] = whole(value)
    assert_equal(found, expected, (name, form))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gather", "heads", "ring"])
@pytest.mark.parametrize("name", ["mha", "gqa", "mla", "kha", "moh"])
def test_tensor_and_sequence(name, form, four):
    four.run(check_both, name, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "mla", "linear", "dcmha by groups"])
def test_four_ranks(name, four):
    four.run(check_split, name, {})
