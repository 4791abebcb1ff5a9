"""Multi-head latent attention: stored figures, its two forms of attending, its variants and what is refused."""

import copy
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, MultiHeadLatentAttention, Rotary
from attnzoo.modules.call import begin
from attnzoo.modules.heads import head_rows
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden"
E, H, T = 24, 4, 11


@cache
def load(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def golden(name, **options):
    tensors, config = load(name)
    rope = Rotary(theta=config["rope_theta"], style="interleaved" if config["interleave"] else "half")
    if name == "mla":
        sizes = {"kv_lora_rank": config["R"], "q_lora_rank": config["Rq"], "qk_nope_head_dim": config["dn"]}
        sizes |= {"qk_rope_head_dim": config["dr"], "v_head_dim": config["dv"], "bias": config["bias"]}
    else:
        sizes = {"kv_lora_rank": config["R"], "qk_nope_head_dim": config["D"], "v_head_dim": config["Dv"]}
        sizes |= {"rope_mode": "pre", "kv_norm": config["kv_norm"]}
    attn = MultiHeadLatentAttention(config["E"], config["H"], rope=rope, **sizes, **options)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return attn


def make(dtype=torch.float64, **options):
    torch.manual_seed(5)
    attn = MultiHeadLatentAttention(E, H, **({"kv_lora_rank": 10} | options)).to(dtype)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


VARIANTS = {
    "plain": {},
    "q rank": {"q_lora_rank": 7},
    "widths": {"qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7, "kv_lora_rank": 9},
    "biases": {"bias": True, "q_bias": True, "kv_b_bias": True},
    "groups": {"num_kv_heads": 2},
    "rotary key of each group": {"num_kv_heads": 2, "rope_kv_heads": 2, "kv_norm": False, "kv_b_bias": True},
    "own frequencies": {
        "num_kv_heads": 2, "rope_kv_heads": 2, "qk_rope_head_dim": 4,
        "rope_inv_freq": torch.tensor([[1.0, 0.1], [0.5, 0.01]]), "rope": Rotary(),
    },
    "half": {"rope": Rotary(style="half")},
    "no rope": {"rope": None},
    "pre": {"rope_mode": "pre"},
    "pre, own widths": {"rope_mode": "pre", "qk_nope_head_dim": 8, "v_head_dim": 3, "q_lora_rank": 6, "bias": True},
    "yarn": {"rope": Rotary(style="interleaved", scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
        "mscale_all_dim": 0.7})},
}  # fmt: skip
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.parametrize("absorb", [False, True])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mla", "mla_prerope"])
def test_stored_figures(name, backend, absorb):
    tensors, _ = load(name)
    attn = golden(name, backend=backend, absorb=absorb)
    x, w = tensors["input.x"].double(), tensors["input.w"].double()
    found = gradients(attn.double(), x, w, positions=tensors["input.position_ids"])
    assert (found["y"] - tensors["output.y"]).abs().max() < 1e-9
    stored = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    assert set(stored) <= set(found)
    for key, value in stored.items():
        assert (found[key] - value).abs().max() < 1e-9, key
    cached = attn.init_cache(*x.shape[:2])
    with torch.no_grad():
        attn(x, cache=cached)
    rank = attn.kv_lora_rank
    latent = cached.buffers[0][:, 0]
    assert (latent[..., :rank] - tensors["cache.kv_latent"]).abs().max() < 1e-9
    if name == "mla":
        assert (latent[..., rank:] - tensors["cache.k_rope_interleaved"]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["mla", "mla_prerope"])
def test_float32_is_within_ten_times_the_stored_difference(name):
    tensors, _ = load(name)
    found = gradients(golden(name), tensors["input.x"], tensors["input.w"])
    assert (found["y"].double() - tensors["output.y"]).abs().max() < 10 * 1.2e-6
    assert (found["x"].double() - tensors["grad.x"]).abs().max() < 10 * 3.0e-6


@every_variant
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_is_expanded_with_every_gradient(variant, causal, masked):
    attn = make(causal=causal, **VARIANTS[variant])
    x, weight = torch.randn(2, T, E).double(), torch.randn(2, T, E).double()
    mask = AttentionMask.padding([T, 0]) & (torch.rand(T, T) > 0.4) if masked else None
    attn.absorb = False
    expected = gradients(attn, x, weight, mask=mask)
    attn.absorb = True
    for key, value in gradients(attn, x, weight, mask=mask).items():
        torch.testing.assert_close(value, expected[key], atol=1e-11, rtol=0)


@every_variant
@pytest.mark.parametrize("absorb", ["auto", True, False])
@pytest.mark.parametrize("chunks", [[1] * T, [4, 1, 5, 1]])
def test_decoding_is_the_full_forward(variant, absorb, chunks):
    attn = make(**VARIANTS[variant])
    x = torch.randn(2, T, E).double()
    expected = attn(x)
    attn.absorb = absorb
    state = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=state) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert state.nbytes == 2 * T * attn.cache_bytes_per_token(torch.float64)


def test_the_form_may_change_between_steps():
    attn, x = make(), torch.randn(1, T, E).double()
    state, parts = attn.init_cache(1, T), []
    with torch.no_grad():
        for i in range(T):
            attn.absorb = i % 2 == 0
            parts.append(attn(x[:, i : i + 1], cache=state))
    torch.testing.assert_close(torch.cat(parts, 1), attn(x), atol=1e-12, rtol=0)


def test_auto_absorbs_for_few_new_tokens_only():
    attn = attnzoo.MultiHeadLatentAttention(
        512, 4, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    # DeepSeek's widths: R (dn + Dv) / (2 R - dn - Dv) = 170.7.
    assert attn.absorbed_is_cheaper(170)
    assert not attn.absorbed_is_cheaper(171)
    x = torch.randn(1, 1, 512)
    with torch.no_grad():
        assert attn.absorbs(x, past=1)
        assert not attn.absorbs(x, past=0)
    assert not attn.absorbs(x, past=1)


@every_variant
def test_causality_and_independent_rows(variant):
    attn = make(**VARIANTS[variant])
    x = torch.randn(2, T, E).double()
    changed = x.clone()
    changed[0, 6:] += 1
    y, other = attn(x), attn(changed)
    assert torch.equal(y[0, :6], other[0, :6])
    assert torch.equal(y[1], other[1])
    assert not torch.equal(y[0, 6:], other[0, 6:])


@every_variant
def test_padding_is_a_shorter_batch_and_packing_separate_documents(variant):
    attn = make(**VARIANTS[variant])
    x = torch.randn(2, T, E).double()
    y = attn(x, mask=AttentionMask.padding([T, 4]))
    torch.testing.assert_close(y[1:, :4], attn(x[1:, :4]), atol=1e-12, rtol=0)
    y = attn(x[:1], mask=AttentionMask.packed([0, 3, T]))
    apart = torch.cat([attn(x[:1, :3]), attn(x[:1, 3:])], dim=1)
    torch.testing.assert_close(y, apart, atol=1e-12, rtol=0)


def test_positions_are_relative_when_decoupled_and_not_after_compression():
    x, at = torch.randn(1, T, E).double(), torch.arange(T)
    decoupled, pre = make(), make(rope_mode="pre", kv_lora_rank=8)
    torch.testing.assert_close(decoupled(x, positions=at + 7), decoupled(x), atol=1e-12, rtol=0)
    assert not torch.allclose(pre(x, positions=at + 7), pre(x), atol=1e-4)


def test_rows_of_the_interleaved_layout_reordered_are_the_half_layout():
    attn, half = make(bias=True), make(bias=True, rope=Rotary())
    order = torch.cat([torch.arange(0, attn.qk_rope_head_dim, 2), torch.arange(1, attn.qk_rope_head_dim, 2)])
    state = attn.state_dict()
    rows = head_rows(range(H), attn.head_dim).view(H, -1)
    rows[:, attn.qk_nope_head_dim :] = rows[:, attn.qk_nope_head_dim :][:, order]
    state["q_proj.weight"] = state["q_proj.weight"][rows.flatten()]
    rank = attn.kv_lora_rank
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        state[name] = torch.cat([state[name][:rank], state[name][rank:][order]])
    half.load_state_dict(state)
    x = torch.randn(2, T, E).double()
    torch.testing.assert_close(half(x), attn(x), atol=1e-12, rtol=0)


def test_at_full_rank_without_norm_it_is_multi_head_attention():
    D, dr = 6, 2
    mha = attnzoo.MultiHeadAttention(E, H, D, bias=False, rope=Rotary(dim=dr), dtype=torch.float64)
    width = H * (D - dr + D)
    with pytest.warns(UserWarning, match="compresses nothing"):
        attn = attnzoo.MultiHeadLatentAttention(
            E, H, width, qk_nope_head_dim=D - dr, qk_rope_head_dim=dr, v_head_dim=D, rope_kv_heads=H, kv_norm=False,
            rope=Rotary(), dtype=torch.float64,
        )  # fmt: skip
    q, k, v = (getattr(mha, f"{n}_proj").weight.detach().view(H, D, E) for n in "qkv")
    state = {
        "q_proj.weight": torch.cat([q[:, dr:], q[:, :dr]], 1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat(
            [torch.cat([k[:, dr:], v], 1).flatten(0, 1), k[:, :dr].flatten(0, 1)]
        ),
        "kv_b_proj.weight": torch.eye(width).double(),
        "o_proj.weight": mha.o_proj.weight.detach(),
    }  # fmt: skip
    attn.load_state_dict(state)
    x = torch.randn(2, T, E).double()
    torch.testing.assert_close(attn(x), mha(x), atol=1e-12, rtol=0)


def test_pre_compression_at_full_rank_is_multi_head_attention():
    mha = attnzoo.MultiHeadAttention(E, H, bias=False, dtype=torch.float64)
    width = 2 * E
    with pytest.warns(UserWarning, match="compresses nothing"):
        attn = attnzoo.MultiHeadLatentAttention(
            E, H, width, rope_mode="pre", kv_norm=False, rope=Rotary(), dtype=torch.float64
        )
    state = mha.state_dict() | {"kv_a_proj.weight": torch.eye(width), "kv_b_proj.weight": torch.eye(width)}
    attn.load_state_dict(state)
    x = torch.randn(2, T, E).double()
    torch.testing.assert_close(attn(x), mha(x), atol=1e-12, rtol=0)


def test_norm_gains_fold_into_the_projections_after_them():
    attn = make(q_lora_rank=7)
    x = torch.randn(2, T, E).double()
    expected = attn(x)
    with torch.no_grad():
        for norm, projection in ((attn.q_a_layernorm, attn.q_b_proj), (attn.kv_a_layernorm, attn.kv_b_proj)):
            projection.weight.mul_(norm.weight)
            norm.weight.fill_(1)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_the_latent_is_normalised_and_its_scale_means_nothing():
    attn, x = make(norm_eps=0.0), torch.randn(1, T, E).double()
    expected = attn(x)
    with torch.no_grad():
        attn.kv_a_proj_with_mqa.weight[: attn.kv_lora_rank].mul_(3.0)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_without_rotary_queries_there_is_no_position():
    attn, x = make(causal=False), torch.randn(1, T, E).double()
    with torch.no_grad():
        attn.q_proj.weight.view(H, attn.head_dim, E)[:, attn.qk_nope_head_dim :] = 0
    torch.testing.assert_close(attn(x.flip(1)).flip(1), attn(x), atol=1e-12, rtol=0)


def test_the_gradient_of_the_shared_key_is_the_sum_over_heads():
    attn = make(rope=Rotary())
    x = torch.randn(1, T, E).double()
    apart = make(num_kv_heads=H, rope_kv_heads=H, rope=Rotary())
    state = attn.state_dict()
    rank, width = attn.kv_lora_rank, attn.qk_rope_head_dim
    rows = state["kv_a_proj_with_mqa.weight"]
    state["kv_a_proj_with_mqa.weight"] = torch.cat([rows[:rank], *[rows[rank:]] * H])
    apart.load_state_dict(state)
    weight = torch.randn(1, T, E).double()
    one, each = gradients(attn, x, weight), gradients(apart, x, weight)
    torch.testing.assert_close(one["y"], each["y"], atol=1e-12, rtol=0)
    summed = each["kv_a_proj_with_mqa.weight"][rank:].view(H, width, E).sum(0)
    torch.testing.assert_close(one["kv_a_proj_with_mqa.weight"][rank:], summed, atol=1e-11, rtol=0)


def test_yarn_scales_the_scores_and_a_factor_of_one_nothing():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 0.7}
    attn = make(rope=Rotary(scaling=scaling | {"mscale": 0.7}))
    m = 0.1 * 0.7 * math.log(4.0) + 1
    assert attn.scale == pytest.approx(attn.head_dim**-0.5 * m * m)
    one, plain = make(rope=Rotary(scaling=scaling | {"factor": 1.0})), make(rope=Rotary())
    x = torch.randn(1, T, E).double()
    torch.testing.assert_close(one(x), plain(x), atol=1e-12, rtol=0)


def test_the_order_of_heads_means_nothing():
    attn = make(bias=True, kv_b_bias=True, q_bias=True)
    x, order = torch.randn(2, T, E).double(), [2, 0, 3, 1]
    expected, state = attn(x), attn.state_dict()
    for name, width in (("q_proj", attn.head_dim), ("kv_b_proj", attn.qk_nope_head_dim + attn.v_head_dim)):
        for part in ("weight", "bias"):
            state[f"{name}.{part}"] = state[f"{name}.{part}"][head_rows(order, width)]
    state["o_proj.weight"] = state["o_proj.weight"][:, head_rows(order, attn.v_head_dim)]
    attn.load_state_dict(state)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


@every_variant
@pytest.mark.parametrize("heads", [[1], [0, 3], [2, 3]])
def test_pruned_heads_are_heads_with_output_zero(variant, heads):
    attn = make(**VARIANTS[variant])
    x = torch.randn(2, T, E).double()
    keep = torch.ones(H).double()
    keep[heads] = 0

    def silence(module, inputs):
        return (inputs[0] * keep.repeat_interleave(attn.v_head_dim),)

    hook = attn.o_proj.register_forward_pre_hook(silence)
    expected = attn(x)
    hook.remove()
    attn.prune_heads(heads)
    assert attn.pruned_heads == tuple(heads)
    for absorb in (False, True):
        attn.absorb = absorb
        torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{"rope_kv_heads": 2}, {"kv_b_bias": True, "absorb": True}])
def test_a_module_without_heads_gives_the_output_bias(options):
    attn = make(num_kv_heads=2, bias=True, **options)
    attn.prune_heads(range(H))
    x, cache = torch.randn(2, T, E).double(), attn.init_cache(2, T)
    expected = attn.o_proj.bias.expand(2, T, E)
    torch.testing.assert_close(attn(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([attn(part, cache=cache) for part in x.split(3, 1)], 1), expected)


@every_variant
def test_qk_circuit_makes_the_scores_of_one_position(variant):
    attn = make(**{k: v for k, v in VARIANTS[variant].items() if "bias" not in k})
    for norm in ("kv_a_layernorm", "q_a_layernorm"):
        if getattr(attn, norm, None) is not None:
            norm = getattr(attn, norm)
            norm.forward = lambda x, g=norm.weight: x * g  # statistics are left out
    x = torch.randn(1, 1, E).double()
    q, k = _query_and_key(attn, x)
    for h, (wq, wk) in enumerate(attn.qk_circuit()):
        expected = (q[h] * k[h]).sum()
        torch.testing.assert_close((wq @ x[0, 0]) @ (wk @ x[0, 0]), expected, atol=1e-11, rtol=0)
    if attn.qk_rope_head_dim:
        parts = [sum((wq @ x[0, 0]) @ (wk @ x[0, 0]) for wq, wk in attn.qk_circuit(p)) for p in ("nope", "rope")]
        torch.testing.assert_close(sum(parts), (q * k).sum(), atol=1e-10, rtol=0)


def _query_and_key(attn, x):
    """Unrotated queries and keys (H, dn + dr) of one token at position 0."""
    q, q_rope, latent = attn.compress(attn.queries(x), begin(attn, x, positions=torch.zeros(1, dtype=torch.long)))
    k, _ = attn.expand(latent[:, :, 0, : attn.kv_lora_rank])
    k = k.repeat_interleave(H // attn.num_kv_heads, 2)[0, 0]
    if not attn.qk_rope_head_dim:
        return q[0, 0], k
    rope = latent[0, 0, 0, attn.kv_lora_rank :].view(attn.rope_kv_heads, -1)
    slots = attn.rope_slots()
    q_rope = q_rope[0, 0].unflatten(-1, (attn.rope_kv_heads, -1))[range(H), slots]
    return torch.cat([q[0, 0], q_rope], -1), torch.cat([k, rope[slots]], -1)


@every_variant
@pytest.mark.parametrize("absorb", [False, True])
def test_flops_are_those_that_are_counted(variant, absorb):
    attn = make(causal=False, absorb=absorb, backend="eager", **VARIANTS[variant])
    with FlopCounterMode(display=False) as counter:
        attn(torch.randn(1, T, E).double())
    # The absorbed form's value comes with the rotary key, and that part of its output is thrown away.
    spare = 2 * H * attn.rope_kv_heads * attn.qk_rope_head_dim * T * T if absorb else 0
    assert attn.flops(T, T) == counter.get_total_flops() - spare


def test_parameters_are_those_of_the_formula():
    R, Rq, dn, dr, Dv = 20, 12, 6, 4, 5
    attn = MultiHeadLatentAttention(
        E, H, kv_lora_rank=R, q_lora_rank=Rq, qk_nope_head_dim=dn, qk_rope_head_dim=dr, v_head_dim=Dv
    )
    expected = E * Rq + Rq + Rq * H * (dn + dr) + E * (R + dr) + R + R * H * (dn + Dv) + E * H * Dv
    assert sum(p.numel() for p in attn.parameters()) == expected
    # DeepSeek-V3: 576 numbers a token and layer.
    with torch.device("meta"):
        big = MultiHeadLatentAttention(
            7168, 128, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )
    assert big.cache_bytes_per_token(torch.bfloat16) == 1152


def test_cross_attention_rotates_by_both_positions():
    attn = make(causal=False, kdim=12)
    x, context = torch.randn(2, 5, E).double(), torch.randn(2, 8, 12).double()
    at = (torch.arange(5) + 8, torch.arange(8))
    y = attn(x, context, positions=at)
    assert y.shape == x.shape
    attn.absorb = True
    torch.testing.assert_close(attn(x, context, positions=at), y, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="positions must be a pair"):
        attn(x, context)
    with pytest.raises(ValueError, match="context must be given"):
        attn(x)


@pytest.mark.parametrize("variant", ["plain", "biases", "rotary key of each group", "pre"])
def test_derivatives(variant):
    attn = make(**VARIANTS[variant])
    x = torch.randn(1, 3, E).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True)


@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_close_to_float32(bits):
    attn = make(torch.float32)
    x = torch.randn(1, T, E)
    expected = attn(x)
    low, state = make(bits), None
    state = low.init_cache(1, T)
    with torch.no_grad():
        y = torch.cat([low(part.to(bits), cache=state) for part in x.split(1, dim=1)], dim=1)
    assert (y.float() - expected).abs().max() < 40 * torch.finfo(bits).eps * expected.abs().max()


OWN = torch.tensor([[1.0, 0.1234567890123], [0.77, 0.0101]], dtype=torch.float64)


def of_own_frequencies(frequencies=OWN):
    torch.manual_seed(6)
    return MultiHeadLatentAttention(
        24, 4, 8, qk_nope_head_dim=4, qk_rope_head_dim=4, num_kv_heads=2, rope_kv_heads=2, rope_inv_freq=frequencies,
        rope=Rotary(), dtype=torch.float64,
    )  # fmt: skip


def test_casting_a_module_does_not_round_its_own_frequencies():
    attn, x = of_own_frequencies(), torch.randn(2, 30, 24).double()
    cast = of_own_frequencies().bfloat16().double()
    cast.load_state_dict({name: value for name, value in attn.state_dict().items() if name != "rope_inv_freq"})
    assert torch.equal(cast(x), attn(x))
    assert torch.equal(cast.state_dict()["rope_inv_freq"], OWN)
    assert torch.equal(copy.deepcopy(attn).bfloat16().state_dict()["rope_inv_freq"], OWN)
    assert list(attn.buffers()) == []


def test_frequencies_of_a_state_dict_are_the_modules():
    attn, x = of_own_frequencies(), torch.randn(2, 5, 24).double()
    stored = attn.state_dict()
    # As a module was saved that had them in a buffer, which a cast may have rounded.
    for value in (OWN, OWN.bfloat16()):
        fresh = of_own_frequencies()
        fresh.load_state_dict(stored | {"rope_inv_freq": value})
        assert torch.equal(fresh(x), attn(x))
    other = torch.nn.Sequential(of_own_frequencies(torch.zeros(2, 2)))
    other.load_state_dict({f"0.{name}": value for name, value in stored.items()})
    assert torch.equal(other(x), attn(x))
    twin = copy.deepcopy(attn)
    twin.load_state_dict(stored | {"rope_inv_freq": 2 * OWN})
    assert torch.equal(twin.state_dict()["rope_inv_freq"], 2 * OWN)
    assert torch.equal(attn.state_dict()["rope_inv_freq"], OWN)
    with pytest.raises(RuntimeError, match=r"size mismatch for rope_inv_freq: \(1, 2\), not \(2, 2\)"):
        attn.load_state_dict(stored | {"rope_inv_freq": OWN[:1]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*rope_inv_freq"):
        of_own_frequencies(None).load_state_dict(stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even and at least 2, got 3"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim must be even and at least 2, got 0"),
        ({"qk_nope_head_dim": 5, "rope_mode": "pre"}, "qk_nope_head_dim must be even .*got 5"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, got 0"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1, got 0"),
        ({"v_head_dim": 0}, "v_head_dim must be at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"rope_kv_heads": 2}, "rope_kv_heads must be 1 or num_kv_heads 4, got 2"),
        ({"num_kv_heads": 2, "rope_kv_heads": 2, "rope": None}, "rope_kv_heads must be 1 without a rotation, got 2"),
        (
            {"rope_inv_freq": torch.ones(1, 1), "rope": Rotary(scaling={"rope_type": "linear", "factor": 2.0})},
            "rope_inv_freq needs a rope without scaling, which would have no effect, got Rotary",
        ),
        ({"rope_inv_freq": torch.ones(2, 2)}, r"rope_inv_freq must have shape \(1, 1\), got \(2, 2\)"),
        ({"rope_mode": "post"}, "rope_mode must be one of 'decoupled', 'pre', 'none', got 'post'"),
        ({"rope_mode": "pre", "rope": None}, "rope must be given with rope_mode 'pre'"),
        ({"rope_mode": "pre", "qk_rope_head_dim": 4}, "qk_rope_head_dim must not be given with rope_mode 'pre', got 4"),
        ({"rope_mode": "none", "qk_rope_head_dim": 4}, "qk_rope_head_dim must not be given with rope_mode 'none'"),
        ({"rope_mode": "pre", "num_kv_heads": 2}, "num_kv_heads and rope_kv_heads must be left alone .*got 2"),
        ({"q_bias": True, "q_lora_rank": 6}, "q_bias needs q_lora_rank=None.*got True and q_lora_rank 6"),
        ({"rope": Rotary(dim=6)}, "rope.dim must equal qk_rope_head_dim, got 6 and 2"),
        ({"absorb": "always"}, "absorb must be True, False or 'auto', got 'always'"),
        ({"kdim": 5}, "kdim needs causal=False, got kdim=5"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadLatentAttention(E, H, **options)


def test_calls_that_are_refused():
    attn = MultiHeadLatentAttention(E, H, dropout=0.1, absorb=True)
    with pytest.raises(ValueError, match=r"absorb must not be True in training with dropout, got dropout 0\.1"):
        attn(torch.zeros(1, 2, E))
    attn = MultiHeadLatentAttention(E, H, causal=False, rope=None)
    with pytest.raises(ValueError, match="context must be one tensor"):
        attn(torch.zeros(1, 2, E), (torch.zeros(1, 2, E), torch.zeros(1, 2, E)))
    with pytest.raises(ValueError, match="part must be 'full'"):
        attn.qk_circuit("rope")
    with pytest.raises(ValueError, match="cache must come from this module's init_cache"):
        make()(torch.zeros(1, 1, E).double(), cache=attnzoo.MultiHeadAttention(E, H).init_cache(1, 2))
