"""Selective multi-head attention: stored figures, the packed form, lists of heads, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, Rotary
from attnzoo.ops.observation import observing
from tests.zoo import E, H, gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "smha.safetensors"


def make(**options):
    """A module whose routing matters, in float64."""
    torch.manual_seed(3)
    return attnzoo.SelectiveMultiHeadAttention(E, H, **{"init_std": 0.3, "dtype": torch.float64} | options)


@pytest.mark.parametrize("how", [{"backend": "eager"}, {"backend": "sdpa"}, {"packed": True}])
def test_the_stored_figures(how):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        config = json.loads(file.metadata()["config"])
    options = {name: value for name, value in config.items() if name not in ("B", "T", "rope_theta")}
    module = attnzoo.SelectiveMultiHeadAttention(
        **options, rope=Rotary(theta=config["rope_theta"]), dtype=torch.float64, **how
    )
    module.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    found = gradients(module, tensors["input.x"], tensors["input.w"])
    stored = {key.split(".", 1)[1]: tensors[key] for key in tensors if key.startswith("grad.")}
    stored["y"] = tensors["output.y"]
    assert found.keys() == stored.keys()
    assert max(float((found[key] - stored[key]).abs().max()) for key in stored) < 1e-9
    call = attnzoo.modules.call.begin(module, tensors["input.x"])
    assert float((module.gates(tensors["input.x"], call)[0].detach() - tensors["output.gates"]).abs().max()) < 1e-9
    loss = module.aux_loss.detach() / module.aux_loss_coef
    assert float((loss - tensors["output.load_balance_loss"]).abs().max()) < 1e-9


@pytest.mark.parametrize("gate_mode", ["normalized", "none"])
@pytest.mark.parametrize("rope_positions", ["original", "rank"])
def test_with_all_heads_active_it_is_multi_head_attention(gate_mode, rope_positions):
    attn = make(num_active=H, gate_mode=gate_mode, rope_positions=rope_positions, head_out_bias=True)
    module = attnzoo.MultiHeadAttention(E, H, dtype=torch.float64)
    with torch.no_grad():
        attn.router.weight.zero_()
        attn.o_head_bias.normal_()
        module.o_proj.bias.copy_(attn.o_head_bias.sum(0))
    own = {key: value for key, value in attn.state_dict().items() if "router" not in key and key != "o_head_bias"}
    module.load_state_dict(own | {"o_proj.bias": module.o_proj.bias})
    x = torch.randn(2, 9, E).double()
    torch.testing.assert_close(attn(x), module(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rope_positions", ["original", "rank"])
@pytest.mark.parametrize("num_active", [1, 2, 3])
def test_the_packed_form_is_the_dense_one(num_active, rope_positions):
    x, weight = torch.randn(3, 40, E).double(), torch.randn(3, 40, E).double()
    found, expected = (
        gradients(make(num_active=num_active, rope_positions=rope_positions, packed=packed), x, weight)
        for packed in (True, False)
    )
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-12, rtol=0)
    assert expected["router.weight"].abs().max() > 1e-6 or num_active == 1


def test_a_head_attends_among_the_tokens_that_chose_it():
    attn, x = make(rope_positions="rank"), torch.randn(1, 15, E).double()
    chosen = attn.gates(x, attnzoo.modules.call.begin(attn, x))[1][0]
    heads = []
    attn.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].unflatten(-1, (H, -1))[0]))
    attn(x)
    gates = attn.gates(x, attnzoo.modules.call.begin(attn, x))[0][0]
    assert torch.equal(chosen.sum(-1), torch.full((15,), H // 2))
    for h in range(H):
        tokens = chosen[:, h].nonzero()[:, 0]
        alone = attnzoo.MultiHeadAttention(E, 1, E // H, rope=attn.rope, o_bias=False, dtype=torch.float64)
        rows = slice(h * E // H, (h + 1) * E // H)
        with torch.no_grad():
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(alone, name).weight.copy_(getattr(attn, name).weight[rows])
            alone.o_proj.weight.copy_(torch.eye(E)[:, : E // H])
        expected = alone(x[:, tokens])[0, :, : E // H] * gates[tokens, h, None]
        torch.testing.assert_close(heads[0][tokens, h], expected, atol=1e-12, rtol=0)
        assert not heads[0][~chosen[:, h], h].any()


@pytest.mark.parametrize("rope_positions", ["original", "rank"])
@pytest.mark.parametrize("chunks", [[1] * 14, [6, 1, 5, 2]])
def test_decoding_by_lists(rope_positions, chunks):
    attn, x = make(rope_positions=rope_positions).eval(), torch.randn(2, 14, E).double()
    cache = attn.init_cache(2, 14)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, attn(x), atol=1e-12, rtol=0)
    assert attn.cache_bytes_per_token(torch.float64) == 8 * (2 * E + H)


def test_ranks_are_counted_exactly_in_half_precision():
    # Every head takes every token, so that ranks go beyond the integers that bfloat16 has.
    attn = attnzoo.SelectiveMultiHeadAttention(E, H, num_active=H, rope_positions="rank", dtype=torch.bfloat16).eval()
    x, cache = torch.randn(1, 600, E).bfloat16(), attn.init_cache(1, 600)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.mul_(20)
        attn(x[:, :599], cache=cache)
        last, expected = attn(x[:, 599:], cache=cache)[0, 0].double(), attn(x)[0, 599].double()
    assert (last - expected).norm() <= 0.02 * expected.norm()


def test_ranks_restart_in_documents_and_skip_padding():
    attn, x = make(rope_positions="rank"), torch.randn(1, 14, E).double()
    y = attn(x, mask=AttentionMask.packed([0, 5, 14]))
    torch.testing.assert_close(y[:, 5:], attn(x[:, 5:]), atol=1e-12, rtol=0)
    y = attn(x, mask=AttentionMask.padding([9]))
    torch.testing.assert_close(y[:, :9], attn(x[:, :9]), atol=1e-12, rtol=0)


def test_without_gates_the_router_has_no_gradient():
    attn = make(gate_mode="none")
    attn(torch.randn(2, 9, E).double()).square().sum().backward()
    assert attn.router.weight.grad is None or not attn.router.weight.grad.any()
    softmax = make(gate_mode="softmax")
    softmax(torch.randn(2, 9, E).double()).square().sum().backward()
    assert softmax.router.weight.grad.any()


def test_an_observer_sees_all_pairs():
    attn, shapes = make(num_active=1), []
    with observing(lambda observation: shapes.append(tuple(observation.q.shape))), torch.no_grad():
        attn.eval()(torch.randn(1, 1024, E).double())
    assert shapes == [(1, 1024, H, E // H)]


def test_output_biases_of_heads_are_counted_and_not_decayed():
    plain, biased = make(causal=False, backend="eager"), make(causal=False, backend="eager", head_out_bias=True)
    for module in (plain, biased):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.randn(1, 9, E).double())
        assert module.flops(9) == counter.get_total_flops()
    assert plain.no_weight_decay() == set()
    assert biased.no_weight_decay() == {"o_head_bias"}


def test_pruning_takes_a_head_out_of_the_choice():
    attn, x = make(), torch.randn(2, 9, E).double()
    with torch.no_grad():
        attn.router.bias[1] = -1e9
    expected = attn(x)
    attn.prune_heads([1])
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="indices must leave at least num_active 2 heads, got 1"):
        attn.prune_heads([0, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 0}, "num_active must be at least 1, got 0"),
        ({"num_active": H + 1}, f"num_active must be at most num_heads {H}, got {H + 1}"),
        ({"num_kv_heads": 2}, f"num_kv_heads must be num_heads {H}, got 2"),
        ({"gate_mode": "hard"}, "gate_mode must be one of 'normalized', 'softmax', 'none', got 'hard'"),
        ({"rope_positions": "time"}, "rope_positions must be 'original' or 'rank', got 'time'"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef must not be negative, got -1.0"),
        ({"packed": "no"}, "packed must be True, False or 'auto', got 'no'"),
        ({"sliding_window": 3}, "sliding_window is no option of selective multi-head attention, got 3"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.SelectiveMultiHeadAttention(E, H, **options)


def test_calls_that_it_cannot_serve():
    x = torch.randn(1, 5, E).double()
    with pytest.raises(ValueError, match="context must be None"):
        make(causal=False)(x, x)
    with pytest.raises(ValueError, match="positions must be None with rope_positions 'rank'"):
        make(rope_positions="rank")(x, positions=torch.arange(5))
    with pytest.raises(ValueError, match="packed=True cannot run: it is for causal self-attention"):
        make(packed=True)(x, mask=AttentionMask.padding([3]))
