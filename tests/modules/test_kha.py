"""Knocking heads: the start, the fold, the parameters."""

import pytest
import torch

import attnzoo
from tests.zoo import E, G, H, build


def base_of(kha):
    """The base mechanism with the same projections."""
    sizes, options = kha._base_arguments
    base = kha._base(*sizes, **options)
    base.load_state_dict({name: value for name, value in kha.state_dict().items() if "_knock." not in name})
    return base


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "linear"},
        {"variant": "linear_v"},
        {"variant": "mlp_qkv"},
        {"base": "gta"},
        {"base": "gta", "knock_scope": "value"},
        {"base": "mla"},
        {"base": "mla", "q_lora_rank": 6, "variant": None, "knock_k": "linear"},
    ],
)
def test_it_starts_as_its_base_in_output_and_gradients(options):
    kha = attnzoo.KnockingHeadsAttention(E, H, G, dtype=torch.float64, **options)
    base, x = base_of(kha), torch.randn(2, 9, E).double()
    y, expected = kha(x), base(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(kha.get_parameter(name).grad, parameter.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "linear"},
        {"variant": "linear_v"},
        {"variant": None, "knock_k": "linear"},
        {"variant": "linear", "qk_norm": True, "bias": True},
        {"base": "gta", "variant": None, "knock_v": "linear"},
        {"base": "gta", "variant": None, "knock_v": "linear", "knock_scope": "value"},
        {"base": "mla", "kv_lora_rank": 12},
        {"base": "mla", "kv_lora_rank": 12, "q_lora_rank": 5, "qk_nope_head_dim": 6, "v_head_dim": 3, "bias": True},
        {"base": "mla", "kv_lora_rank": 12, "variant": None, "knock_q": "linear"},
    ],
)
@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("pruned", [[], [1]])
def test_linear_maps_fold_away(options, T, pruned):
    kha = moved(attnzoo.KnockingHeadsAttention(E, H, G, dtype=torch.float64, **options))
    kha.prune_heads(pruned)
    folded, x = kha.fold(), torch.randn(2, T, E).double()
    assert not isinstance(folded, attnzoo.KnockingHeadsAttention)
    torch.testing.assert_close(folded(x), kha(x), atol=1e-12, rtol=0)


def moved(kha):
    """Parameters off their start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in kha.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kha


def test_over_latent_attention_the_absorbed_form_stays_exact():
    kha = moved(attnzoo.KnockingHeadsAttention(E, H, G, base="mla", kv_lora_rank=12, dtype=torch.float64))
    x = torch.randn(2, 9, E).double()
    kha.absorb = False
    expected = kha(x)
    kha.absorb = True
    torch.testing.assert_close(kha(x), expected, atol=1e-12, rtol=0)
    kha.absorb, cache = "auto", kha.init_cache(2, 9)
    with torch.no_grad():
        y = torch.cat([kha(part, cache=cache) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    for (wq, wk), (q, k) in zip(kha.qk_circuit(), kha.fold().qk_circuit(), strict=True):
        torch.testing.assert_close(wq.T @ wk, q.T @ k, atol=1e-12, rtol=0)


def test_an_mlp_does_not_fold():
    with pytest.raises(ValueError, match="fold is exact for linear maps only, got kind 'mlp'"):
        attnzoo.KnockingHeadsAttention(E, H).fold()


def test_the_mlp_is_equation_9():
    kha = build("kha", causal=False, rope=None)
    x = torch.randn(1, 1, E).double()
    z = kha.v_proj(x).view(G, -1)
    v = kha.v_knock
    z = 2 * ((z @ v.up_proj.weight.T) * (z @ v.gate_proj.weight.T).sigmoid()) @ v.down_proj.weight.T
    expected = kha.o_proj(z.repeat_interleave(H // G, 0).flatten())
    torch.testing.assert_close(kha(x)[0, 0], expected, atol=1e-12, rtol=0)


def test_maps_are_few_and_survive_an_initialisation_of_linear_layers():
    kha, base = attnzoo.KnockingHeadsAttention(512, 8), attnzoo.MultiHeadAttention(512, 8, bias=False)
    extra = sum(p.numel() for p in kha.parameters()) - sum(p.numel() for p in base.parameters())
    assert extra == 3 * 64 * 64 == sum(p.numel() for p in kha.knock_parameters())
    kha.apply(lambda module: module.reset_parameters() if isinstance(module, torch.nn.Linear) else None)
    assert torch.equal(kha.v_knock.up_proj.weight, torch.eye(64))
    kha.reset_parameters(std=0.5)
    assert torch.equal(kha.v_knock.down_proj.weight, torch.eye(64))
    assert torch.equal(kha.v_knock.gate_proj.weight, torch.zeros(64, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "moh"}, "base must be one of 'gqa', 'gta', 'mla', got 'moh'"),
        ({"base": "mla", "variant": "mlp"}, "kinds must be linear with base 'mla', .*'mlp'"),
        ({"base": "mla", "head_dim": 8}, "head_dim is no option of base 'mla', got 8"),
        ({"base": "mla", "sliding_window": 3}, "sliding_window is no option of base 'mla', got 3"),
        ({"kv_lora_rank": 8}, "kv_lora_rank is no option of base 'gqa', got 8"),
        ({"variant": "conv"}, "variant must be one of .*got 'conv'"),
        ({"variant": None}, "knock_q, knock_k or knock_v must be given when variant is None"),
        ({"knock_v": "conv"}, "knock_v must be None, 'linear' or 'mlp', got 'conv'"),
        ({"variant": "linear", "knock_v": "mlp"}, "variant 'linear' means"),
        ({"base": "gta", "variant": "linear"}, "knock_q and knock_k must be None with base 'gta'"),
        ({"knock_scope": "value"}, "knock_scope is no option of base 'gqa', got 'value'"),
        ({"base": "gta", "alibi": True}, "alibi is no option of base 'gta', got True"),
        ({"rope_head_dim": 4}, "rope_head_dim is no option of base 'gqa', got 4"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.KnockingHeadsAttention(E, H, G, **options)
