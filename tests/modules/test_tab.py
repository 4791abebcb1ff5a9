"""The attention bottleneck: stored figures, the gate, interventions, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import TABAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "tab.safetensors"
E, T, S = 16, 6, 9


def make(**options):
    torch.manual_seed(3)
    attn = TABAttention(E, dtype=torch.float64, **options)
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
    assert config.pop("num_heads") == 1
    assert config.pop("head_dim") == config["embed_dim"]
    attn = TABAttention(**config, backend=backend, dtype=torch.float64)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    x, context = t["input.x"].requires_grad_(), t["input.context"].requires_grad_()
    y, weights = attn(x, context, need_weights=True)
    assert (y - t["output.y"]).abs().max() < 1e-9
    assert (weights - t["output.attn"]).abs().max() < 1e-9
    (attn(x, context) * t["input.w"]).sum().backward()
    found = {"x": x.grad, "context": context.grad, **{name: p.grad for name, p in attn.named_parameters()}}
    compared = [key.removeprefix("grad.") for key in t if key.startswith("grad.")]
    assert len(compared) == 6
    for name in compared:
        assert (found[name] - t[f"grad.{name}"]).abs().max() < 1e-9, name
    low = copy.deepcopy(attn).float()(x.detach().float(), context.detach().float())
    assert (low.double() - t["output.y"]).abs().max() < 10 * single["y"]


@pytest.mark.parametrize("rows", [(0,), (0, 3), ()])
@pytest.mark.parametrize("index", [0, 4])
def test_gated_rows_are_single_head_attention_times_the_attention_to_patches(rows, index):
    attn = make(gate_rows=rows, bottleneck_index=index)
    plain = attnzoo.GroupedQueryAttention(E, 1, bias=True, rope=None, causal=False, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    x, context = sample(), sample(S)
    y, weights = attn(x, context, need_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, T).double())
    expected = plain(x, context)
    bias = attn.o_proj.bias
    for row in rows:
        to_patches = weights[:, row].sum(-1) - weights[:, row, index]
        expected[:, row] = bias + (expected[:, row] - bias) * to_patches[:, None]
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(attn(x, context), y, atol=1e-12, rtol=0)
    _, gated = attn(x, context, need_weights=True, gated=True)
    kept = [row for row in range(T) if row not in rows]
    torch.testing.assert_close(gated[:, kept], weights[:, kept])
    for row in rows:
        factor = 1 - weights[:, row, index, None]
        torch.testing.assert_close(gated[:, row], weights[:, row] * factor)


def test_a_closed_gate_gives_the_bias_whatever_the_context_holds():
    attn, x = make(), sample()
    for context in (sample(S), 100 * sample(S)):
        y = attn(x, context, attn_override=torch.zeros(2, S - 1).double())
        torch.testing.assert_close(y[:, 0], attn.o_proj.bias.expand(2, E), atol=1e-12, rtol=0)
    assert not torch.allclose(y[:, 1], attn.o_proj.bias.expand(2, E))


def test_overriding_with_the_modules_own_weights_changes_nothing():
    attn, x, context = make(), sample(), sample(S)
    y, weights = attn(x, context, need_weights=True)
    torch.testing.assert_close(attn(x, context, attn_override=weights[:, 0]), y, atol=1e-12, rtol=0)
    torch.testing.assert_close(attn(x, context, attn_override=weights[:, 0, 1:]), y, atol=1e-12, rtol=0)


def test_an_override_weighs_patches_by_their_sum():
    attn, x, context = make(), sample(), sample(S)
    given = torch.rand(2, S - 1).double()
    given = 0.7 * given / given.sum(-1, keepdim=True)
    y, used = attn(x, context, attn_override=given, need_weights=True, gated=True)
    torch.testing.assert_close(used[:, 0, 1:], 0.7 * given)
    torch.testing.assert_close(used[:, 0, 0], torch.full((2,), 0.3 * 0.7).double())
    values = attn.v_proj(context)
    torch.testing.assert_close(y[:, 0], attn.o_proj(torch.einsum("bs,bsd->bd", used[:, 0], values)))


def test_padding_and_masks_are_not_attended_to():
    attn, x, context = make(), sample(), sample(S)
    mask = attnzoo.AttentionMask.padding([S, 4])
    y, weights = attn(x, context, mask=mask, need_weights=True)
    assert weights[1, :, 4:].eq(0).all()
    torch.testing.assert_close(y[1], attn(x[1:], context[1:, :4])[0], atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences():
    attn = make(gate_rows=(0, 1))
    x, context = sample(3).requires_grad_(), sample(4).requires_grad_()
    assert torch.autograd.gradcheck(attn, (x, context))


def test_half_precision_keeps_the_rows_that_are_not_gated():
    attn = make().bfloat16()
    assert attn(sample().bfloat16(), sample(S).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_rows": (0, 0)}, "gate_rows must hold token numbers from 0 on, each once"),
        ({"gate_rows": (-1,)}, "gate_rows must hold token numbers"),
        ({"bottleneck_index": True}, "bottleneck_index must hold token numbers"),
        ({"dropout": 1.0}, "dropout must"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        TABAttention(E, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"positions": torch.arange(T)}, "positions and cache must be None"),
        ({"attn_override": torch.zeros(2, S - 2)}, r"attn_override must be floating of shape \(2, 9\) or \(2, 8\)"),
        ({"attn_override": torch.full((2, S - 1), 0.5)}, "attn_override must not be negative and add up to 1 at most"),
        ({"attn_override": torch.full((2, S - 1), -0.1)}, "attn_override must not be negative"),
        ({"attn_override": torch.zeros(2, S, dtype=torch.long)}, "attn_override must be floating"),
    ],
)
def test_refused_calls(call, message):
    with pytest.raises(ValueError, match=message):
        make()(sample(), sample(S), **call)


def test_rows_that_are_not_there():
    with pytest.raises(ValueError, match="gate_rows must be below the 6 tokens given"):
        make(gate_rows=(6,))(sample(), sample(S))
    with pytest.raises(ValueError, match="bottleneck_index must be below the 9 tokens given"):
        make(bottleneck_index=9)(sample(), sample(S))
    with pytest.raises(ValueError, match="one head"):
        make().prune_heads([0])


def test_weights_that_are_no_tensor_and_an_empty_batch():
    attn, x = attnzoo.TABAttention(8), torch.randn(2, 6, 8)
    with pytest.raises(ValueError, match="attn_override must be a tensor, got"):
        attn(x, attn_override=[[1.0]])
    assert attn(x[:0], attn_override=torch.zeros(0, 6)).shape == (0, 6, 8)
