"""Enhanced multi-head attention: stored figures, what it reduces to, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import EnhancedMultiheadAttention
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "eit.safetensors"
E, H, D, T = 24, 4, 6, 11


def make(embed_dim=E, num_heads=H, **options):
    torch.manual_seed(5)
    attn = EnhancedMultiheadAttention(embed_dim, num_heads, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"chunk_size": 6}, {"chunk_size": 1}])
def test_stored_figures(options):
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config, single = (json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64"))
    assert not config["rope"]
    config = {key: value for key, value in config.items() if not key.startswith("rope")}
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = EnhancedMultiheadAttention(*sizes, rope=None, dtype=torch.float64, **config, **options)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    low = gradients(copy.deepcopy(attn).float(), t["input.x"].float(), t["input.w"].float())
    found = gradients(attn, t["input.x"], t["input.w"])
    assert (found["y"] - t["output.y"]).abs().max() < 1e-9
    compared = [key.removeprefix("grad.") for key in t if key.startswith("grad.")]
    assert len(compared) == 9
    for name in compared:
        assert (found[name] - t[f"grad.{name}"]).abs().max() < 1e-9, name
        assert (low[name].double() - t[f"grad.{name}"]).abs().max() < 10 * single[f"grad_{name}"], name


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 4}, {"efficient": True}, {"rope": None}])
def test_it_can_start_as_multi_head_attention(options):
    attn = EnhancedMultiheadAttention(E, H, init="mha", dtype=torch.float64, **options)
    options.pop("efficient", None)
    mha = attnzoo.MultiHeadAttention(E, H, bias=False, dtype=torch.float64, **options)
    mha.load_state_dict({k: v for k, v in attn.state_dict().items() if "_proj" in k})
    x = sample()
    torch.testing.assert_close(attn(x), mha(x), atol=1e-13, rtol=0)


def test_two_layers_of_each_can_be_one_layer_of_each():
    """Without inner biases, pairs +-X around the ReLU make the second pair of layers linear."""
    A = 3
    full = make(isi_hidden=A, csi_hidden=2 * H)
    efficient = make(isi_hidden=A, efficient=True)
    mix = torch.randn(H, H, dtype=torch.float64)
    with torch.no_grad():
        full.isi_b2.zero_(), full.csi_b1.zero_(), full.csi_w1.zero_(), full.csi_w2.zero_()
        for i in range(H):
            full.csi_w1[2 * i, i], full.csi_w1[2 * i + 1, i] = 1, -1
            full.csi_w2[:, 2 * i], full.csi_w2[:, 2 * i + 1] = mix[:, i], -mix[:, i]
    shared = {k: v for k, v in full.state_dict().items() if "_proj" in k or k in ("isi_w1", "isi_b1")}
    efficient.load_state_dict(shared | {"csi_w1": (mix[:, :, None] * full.isi_w2).flatten(1)})
    x = sample()
    torch.testing.assert_close(full(x), efficient(x), atol=1e-12, rtol=0)


def test_the_order_of_key_heads_is_a_name():
    attn, other = make(rope=None), make(rope=None)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        other.load_state_dict(attn.state_dict())
        other.isi_w1.copy_(attn.isi_w1[:, :, order])
        other.k_proj.weight.copy_(attn.k_proj.weight.view(H, D, E)[order].flatten(0, 1))
    x = sample()
    torch.testing.assert_close(attn(x), other(x), atol=1e-12, rtol=0)
    with torch.no_grad():  # and not of values, which belong to the maps after the interaction
        other.v_proj.weight.copy_(attn.v_proj.weight.view(H, D, E)[order].flatten(0, 1))
    assert (attn(x) - other(x)).abs().max() > 1e-2


def test_one_number_on_all_maps_changes_nothing():
    attn = make(rope=None)
    x = sample()
    with torch.no_grad():  # a hidden map that is 1 everywhere
        attn.csi_w1[0], attn.csi_b1[0] = 0, 1
        before = attn(x)
        attn.csi_w2[:, 0] += 7
    torch.testing.assert_close(attn(x), before, atol=1e-12, rtol=0)


def test_masked_pairs_stay_masked():
    """Biases and ReLUs give hidden pairs a value: the mask comes after them."""
    attn, x = make(causal=False, rope=None), sample()
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[:, 3] = False
    changed = x.clone()
    changed[:, 3] += 10
    rows = [t for t in range(T) if t != 3]
    torch.testing.assert_close(attn(x, mask=mask)[:, rows], attn(changed, mask=mask)[:, rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"efficient": True, "isi_hidden": 3}])
def test_counted_costs(options):
    attn = EnhancedMultiheadAttention(E, H, rope=None, causal=False, backend="eager", **options)
    with FlopCounterMode(display=False) as counter:
        attn(torch.randn(1, T, E))
    assert counter.get_total_flops() == attn.flops(T)
    A, C = attn.isi_hidden, attn.csi_hidden
    interaction = H * A * H + H * A + (H * H * A if C is None else H * A + H + C * H + C + H * C)
    assert sum(p.numel() for p in attn.parameters()) == 4 * E * E + interaction


@pytest.mark.parametrize("efficient", [False, True])
def test_gradients_are_those_of_finite_differences(efficient):
    attn = make(4, 2, efficient=efficient, chunk_size=2)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*attn.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isi_hidden": 0}, "isi_hidden must be at least 1"),
        ({"csi_hidden": 8, "efficient": True}, "csi_hidden needs efficient=False"),
        ({"csi_hidden": 0}, "csi_hidden must be at least 1"),
        ({"init": "mha", "isi_hidden": 1}, "init 'mha' needs isi_hidden of at least 2"),
        ({"init": "mha", "csi_hidden": 7}, "csi_hidden of at least 2 num_heads, got 8 and 7"),
        ({"init": "xavier"}, "init must be 'default' or 'mha'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        EnhancedMultiheadAttention(E, H, **options)


def test_there_is_no_kernel():
    with pytest.raises(attnzoo.BackendUnavailable, match="no kernel for score maps that pass through hidden layers"):
        EnhancedMultiheadAttention(E, H, backend="triton")(torch.randn(1, 3, E))
