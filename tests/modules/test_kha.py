"""Knocking heads: the start, the fold, the parameters."""

import functools

import pytest
import torch

import attnzoo
from tests.zoo import E, G, H, build

CLASSES = {
    "gqa": attnzoo.KnockingHeadsAttention,
    "gta": attnzoo.KnockingHeadsTiedAttention,
    "mla": functools.partial(attnzoo.KnockingHeadsLatentAttention, num_kv_heads=G),
}
BASES = (attnzoo.GroupedQueryAttention, attnzoo.GroupedTiedAttention, attnzoo.MultiHeadLatentAttention)


def make(base="gqa", **options):
    """Knocking heads over that base."""
    sizes = (E, H) if base == "mla" else (E, H, G)
    return CLASSES[base](*sizes, **options)


def base_of(kha):
    """The base mechanism with the same projections."""
    sizes, options = kha._base_arguments
    base = next(cls for cls in BASES if isinstance(kha, cls))(*sizes, **options)
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
    kha = make(dtype=torch.float64, **options)
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
    kha = moved(make(dtype=torch.float64, **options))
    kha.prune_heads(pruned)
    folded, x = kha.fold(), torch.randn(2, T, E).double()
    assert type(folded) in BASES
    torch.testing.assert_close(folded(x), kha(x), atol=1e-12, rtol=0)


def test_what_folds_runs_as_the_module_does_now():
    later = {"dropout": 0.25, "backend": "eager", "depth": 3}
    for base in ("gqa", "mla"):
        kha = make(base, variant="linear").eval()
        for name, value in later.items() | ({("absorb", False)} if base == "mla" else set()):
            setattr(kha, name, value)
        folded = kha.fold()
        assert {name: getattr(folded, name) for name in later} == later
        assert getattr(folded, "absorb", False) is False
        assert not folded.training


@pytest.mark.parametrize("base", ["gqa", "gta", "mla"])
def test_what_was_made_without_memory_folds_where_its_weights_are(base):
    kha = moved(make(base, variant="linear_v"))
    copy = make(base, variant="linear_v", device="meta").to_empty(device="cpu").bfloat16()
    copy.load_state_dict(kha.state_dict())
    x = torch.randn(2, 3, E, dtype=torch.bfloat16)
    torch.testing.assert_close(copy.fold()(x), copy(x), atol=0.05, rtol=0.05)


def moved(kha):
    """Parameters off their start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in kha.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kha


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


def test_maps_may_start_random():
    kha = attnzoo.KnockingHeadsAttention(512, 8, variant="linear", knock_init="normal")
    for _ in range(2):
        for weight in kha.knock_parameters():
            assert weight.std().item() == pytest.approx(1 / 8, rel=0.1)
        kha.reset_parameters(std=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knock_init": "zero"}, "knock_init must be .*'identity'.*'normal'.*got 'zero'"),
        ({"base": "mla", "variant": "mlp"}, "kinds must be linear over latent attention, .*'mlp'"),
        ({"base": "mla", "rope_mode": "pre"}, "rope_mode must not be 'pre'"),
        ({"variant": "conv"}, "variant must be one of .*got 'conv'"),
        ({"variant": None}, "knock_q, knock_k or knock_v must be given when variant is None"),
        ({"knock_v": "conv"}, "knock_v must be None, 'linear' or 'mlp', got 'conv'"),
        ({"variant": "linear", "knock_v": "mlp"}, "variant 'linear' means"),
        ({"base": "gta", "variant": "linear"}, "variant must be 'mlp' or 'linear_v'"),
        ({"base": "gta", "knock_scope": "key"}, "knock_scope must be 'tied' or 'value', got 'key'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("base", "option"),
    [
        ("gqa", "kv_lora_rank"),
        ("gqa", "knock_scope"),
        ("gqa", "rope_head_dim"),
        ("gta", "alibi"),
        ("gta", "knock_q"),
        ("mla", "head_dim"),
        ("mla", "sliding_window"),
    ],
)
def test_options_of_another_base_are_no_arguments(base, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        make(base, **{option: 8})


def test_subclasses_keep_their_class_and_their_name():
    class Sub(attnzoo.KnockingHeadsAttention):
        def project(self, x, key, value):
            q, k, v = super().project(x, key, value)
            return 2 * q, k, v

    sub = Sub(E, H, G)
    assert type(sub) is Sub
    assert repr(sub).startswith("Sub(")
    plain = attnzoo.KnockingHeadsAttention(E, H, G)
    plain.load_state_dict(sub.state_dict())
    plain.scale *= 2
    x = torch.randn(2, 7, E)
    torch.testing.assert_close(sub(x), plain(x))
