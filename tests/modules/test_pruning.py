"""Removing heads equals silencing them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import attnzoo
from tests.zoo import MECHANISMS, E, H, build, names

GOLDEN = Path(__file__).parents[1] / "golden" / "head_pruning.safetensors"


def silenced(module, x, heads):
    """The module's output with the given heads' outputs set to zero."""
    width = module.o_proj.in_features // H
    keep = torch.ones(H, dtype=torch.bool)
    keep[list(heads)] = False
    hook = module.o_proj.register_forward_pre_hook(
        lambda _, inputs: (torch.where(keep.repeat_interleave(width), inputs[0], 0.0),)
    )
    try:
        return module(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", names("pruning as a mask"))
@pytest.mark.parametrize("steps", [[[0]], [[3], [1]], [[0, 1]], [[2], [0, 3]], [[0, 1, 3]]])
def test_pruned_equals_silenced(name, steps):
    module, x = build(name), torch.randn(2, 9, E).double()
    gone = sorted({head for step in steps for head in step})
    expected = silenced(module, x, gone)
    for step in steps:
        module.prune_heads(step)
    assert module.pruned_heads == tuple(gone)
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    cache = module.init_cache(2, 9)
    with torch.no_grad():
        decoded = torch.cat([module(part, cache=cache) for part in x.split([4, 1, 4], dim=1)], dim=1)
    torch.testing.assert_close(decoded, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", names("pruning as a mask"))
def test_the_default_device_means_nothing_to_pruning(name):
    module = build(name)
    twin = copy.deepcopy(module)
    with torch.device("meta"):
        module.prune_heads([0])
    twin.prune_heads([0])
    for (key, found), expected in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(found, expected), key


def test_a_head_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"indices must not repeat a head, got \[2, 2\]"):
        build("gqa").prune_heads([2, 2])


@pytest.mark.parametrize("name", names("pruning as a mask"))
def test_without_heads_the_bias_is_left(name):
    module = build(name)
    module.prune_heads(range(H))
    y = module(torch.randn(2, 5, E).double())
    expected = torch.zeros_like(y) if module.o_proj.bias is None else module.o_proj.bias.expand_as(y)
    torch.testing.assert_close(y, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", names("pruning as a mask"))
def test_pruning_makes_it_smaller(name):
    module = build(name)
    before = sum(p.numel() for p in module.parameters()), module.flops(16)
    module.prune_heads([0])
    assert sum(p.numel() for p in module.parameters()) < before[0]
    assert module.flops(16) < before[1]


@pytest.mark.parametrize("head", [H, -1])
@pytest.mark.parametrize("name", names("pruning as a mask"))
def test_heads_that_are_not_there_are_refused(name, head):
    module = build(name)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=rf"must .*got.*{head}"):
        module.prune_heads([0, head])
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


NO_NUMBERS = ([1.0], [1.7], [True], ["1"], "1", 1, None, [None], torch.tensor([0.6]), torch.tensor([True]), [[1]])


@pytest.mark.parametrize("indices", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", [*MECHANISMS, "chai"])
def test_heads_are_named_by_integers(name, indices):
    module = attnzoo.ClusteredHeadAttention(build("mha"), 2) if name == "chai" else build(name)
    before = [parameter.shape for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"^(indices must be|.* cannot be pruned)"):
        module.prune_heads(indices)
    assert [parameter.shape for parameter in module.parameters()] == before


def test_integers_of_numpy_and_of_tensors_are_heads():
    for indices in (np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)], (1, 2), range(1, 3)):
        module = build("gqa")
        module.prune_heads(indices)
        assert module.pruned_heads == (1, 2)


@pytest.mark.parametrize("name", names("pruning as a mask", "circuits"))
def test_without_heads_there_are_no_circuits(name):
    module = build(name)
    module.prune_heads(range(H))
    assert module.ov_circuit() == []
    assert len(module.qk_circuit()) in (0, H)  # The composed scores of all heads stay.


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_the_stored_decoder_with_heads_removed():
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    weights = {name.removeprefix("weights."): t.double() for name, t in tensors.items() if name.startswith("weights.")}
    sizes = (config["embed_dim"], config["num_heads"], config["num_kv_heads"], config["head_dim"])

    def loss(removed):
        x = weights["embed.weight"][tensors["input.tokens"]]
        for layer in range(config["num_layers"]):
            prefix = f"layers.{layer}."
            attn = attnzoo.GroupedQueryAttention(*sizes, dtype=torch.float64)
            names = [f"{part}_proj.weight" for part in "qkvo"]
            attn.load_state_dict({name: weights[f"{prefix}attn.{name}"] for name in names})
            attn.prune_heads([head for at, head in removed if at == layer])
            x = x + attn(rms_norm(x, weights[f"{prefix}attn_norm.weight"], config["norm_eps"]))
            z = rms_norm(x, weights[f"{prefix}mlp_norm.weight"], config["norm_eps"])
            z = F.silu(z @ weights[f"{prefix}mlp.up_proj.weight"].T)
            x = x + z @ weights[f"{prefix}mlp.down_proj.weight"].T
        logits = rms_norm(x, weights["norm.weight"], config["norm_eps"]) @ weights["embed.weight"].T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tensors["input.tokens"][:, 1:].flatten())

    assert loss([]).item() == pytest.approx(tensors["output.loss"].item(), abs=1e-9)
    structural = tensors["output.structural_heads"].tolist()
    assert loss(structural).item() == pytest.approx(tensors["output.structural_loss"].item(), abs=1e-9)
