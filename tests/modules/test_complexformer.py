"""Complex attention: stored figures, what it reduces to, refusals."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import ComplexAttention, Rotary
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "complexformer.safetensors"
E, H, G, T = 24, 4, 2, 9


def make(*sizes, **options):
    torch.manual_seed(5)
    attn = ComplexAttention(*(sizes or (E, H, G)), dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_stored_figures(backend):
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
        config, single = (json.loads(file.metadata()[key]) for key in ("config", "f32_minus_f64"))
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = ComplexAttention(*sizes, dtype=torch.float64, backend=backend, **config)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    found = gradients(attn, t["input.x"], t["input.w"])
    assert (found["y"] - t["output.y"]).abs().max() < 1e-9
    compared = [key.removeprefix("grad.") for key in t if key.startswith("grad.")]
    assert sorted(compared) == ["phase_bias", "phase_scale", "q_proj.weight", "x"]
    for name in compared:
        assert (found[name] - t[f"grad.{name}"]).abs().max() < 1e-9, name
    low = copy.deepcopy(attn).float()(t["input.x"].float())
    assert (low.double() - t["output.y"]).abs().max() < 10 * single["y"]
    attn.causal = False
    assert (attn(t["input.x"]) - t["output.y_bidirectional"]).abs().max() < 1e-9


def test_the_stored_weights_are_those_of_the_diagnostics():
    from attnzoo.diagnostics import capture

    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    attn = ComplexAttention(32, 4, dtype=torch.float64)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    with capture(attn, ("patterns",)) as seen, torch.no_grad():
        attn(t["input.x"])
    assert (seen.last("patterns")[0] - t["output.attn"]).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 4}, {"rope": None}])
def test_it_starts_as_rotary_attention(options):
    attn = ComplexAttention(E, H, G, eps=0.0, softmax_scale=0.3, dtype=torch.float64, **options)
    gqa = attnzoo.GroupedQueryAttention(E, H, G, scale=0.3, dtype=torch.float64, **options)
    gqa.load_state_dict({k: v for k, v in attn.state_dict().items() if "_proj" in k})
    x = sample()
    torch.testing.assert_close(attn(x), gqa(x), atol=1e-13, rtol=0)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-30])
@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_gradients_of_tokens_that_are_nearly_zero_are_finite(eps, size):
    attn, x = make(eps=eps).float(), sample().float()
    x[:, 5:] *= size
    found = gradients(attn, x, torch.randn_like(x))
    assert all(value.isfinite().all() for value in found.values())


def test_scores_are_cosines_of_pairs_of_angles():
    """The printed form, pair by pair."""
    attn, x = make(eps=1e-3, causal=False, rope_theta=50.0), sample()
    q, k, v = attn.project(x, x, x)
    scale, shift = attn.phase_scale, attn.phase_bias

    def polar(z):
        re, im = z.chunk(2, dim=-1)
        return (re**2 + im**2 + 1e-3).sqrt(), torch.atan2(im, re)

    (q_size, q_angle), (k_size, k_angle) = polar(q), polar(k.repeat_interleave(H // G, 2))
    g = 50.0 ** (-torch.arange(3).double() / 3)
    steps = torch.arange(T).double()
    turned = (steps[:, None] - steps)[:, :, None, None] * g
    angles = scale * (q_angle[:, :, None] - k_angle[:, None]) + shift + turned
    scores = (q_size[:, :, None] * k_size[:, None] * angles.cos()).sum(-1)
    out = torch.einsum("btsh,bshd->bthd", scores.softmax(2), v.repeat_interleave(H // G, 2))
    torch.testing.assert_close(attn(x), attn.o_proj(out.flatten(2)), atol=1e-12, rtol=0)


def test_one_shift_of_all_positions_changes_nothing():
    attn, x = make(), sample()
    positions = torch.arange(T)
    torch.testing.assert_close(attn(x, positions=positions + 1000), attn(x, positions=positions), atol=1e-10, rtol=0)


def test_without_a_phase_scale_scores_depend_on_moduli_alone():
    attn, x = make(rope=None), sample()
    with torch.no_grad():
        attn.phase_scale.zero_()
    expected = attn(x)
    D = attn.head_dim
    turned = torch.eye(D, dtype=torch.float64).roll(D // 2, 0)
    turned[: D // 2] *= -1  # every pair of features by 90 degrees
    with torch.no_grad():
        attn.k_proj.weight.copy_((turned @ attn.k_proj.weight.view(G, D, E)).flatten(0, 1))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_angles_are_computed_in_float32():
    attn = make().bfloat16()
    z = torch.randn(1, 2, H, attn.head_dim, dtype=torch.bfloat16)
    exact = copy.deepcopy(attn).double().turn(z.double())
    assert attn.turn(z).dtype == torch.bfloat16
    assert ((attn.turn(z).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_gradients_are_those_of_finite_differences():
    attn, x = make(8, 2, 1), torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*attn.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), atol=1e-6)


def test_official_start():
    torch.manual_seed(0)
    attn = ComplexAttention(512, 64, phase_init="official")
    assert attn.phase_scale.std().item() == pytest.approx(0.5, rel=0.15)
    assert attn.phase_bias.eq(0).all()
    assert attn.scale == 1
    assert math.isclose(attn.rope.theta, 10000.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5, "rope": None}, "head_dim must be even, got 5"),
        ({"eps": -1.0}, "eps must not be negative, got -1"),
        ({"phase_init": "zero"}, "phase_init must be 'identity' or 'official'"),
        ({"alibi": True}, "alibi is not an option of ComplexAttention"),
        ({"scale": 0.1}, "scale is not an option of ComplexAttention"),
        ({"qk_norm": True}, "qk_norm is not an option of ComplexAttention"),
        ({"rope": None, "rope_theta": 1e4}, "rope_theta needs rope"),
        ({"rope": Rotary(style="interleaved")}, "rope must turn the whole head in style 'half'.*style='interleaved'"),
        ({"rope": Rotary(dim=2)}, "rope must turn the whole head in style 'half'.*dim=2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ComplexAttention(E, H, **options)
