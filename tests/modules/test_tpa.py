"""Tensor product attention: what it reduces to, its factors in the cache, symmetries, costs, refusals."""

import re
import warnings
from unittest import mock

import pytest
import torch

import attnzoo
from attnzoo import TensorProductAttention
from attnzoo.ops import factored_attention as op
from attnzoo.ops.observation import observing

E, H, D, T = 24, 4, 6, 13


def make(*, perturbed=True, **options):
    torch.manual_seed(5)
    attn = TensorProductAttention(E, H, **{"dtype": torch.float64} | options)
    if perturbed:
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T, constant=False):
    x = torch.randn(2, tokens, E, dtype=torch.float64)
    if constant:
        x[..., 0] = 1
    return x


def decoded(attn, x, chunks):
    cache = attn.init_cache(x.shape[0], x.shape[1])
    with torch.no_grad():
        return torch.cat([attn(part, cache=cache) for part in x.split(chunks, 1)], 1)


def constant_factors(layer, values):
    """Head factors of the value that the first feature, which is 1, is multiplied by."""
    with torch.no_grad():
        layer.weight.zero_()[:, 0] = values.flatten()


def plain(attn, groups, scale=1.0):
    """Grouped-query attention whose keys and values are the feature factors times a number."""
    gqa = attnzoo.GroupedQueryAttention(E, H, groups, D, rope=attn.rope, dtype=torch.float64)
    state = {"q_proj.weight": attn.q_proj.weight, "o_proj.weight": attn.o_proj.weight}
    state |= {f"{name}_proj.weight": scale * getattr(attn, f"{name}_b_proj").weight for name in ("k", "v")}
    gqa.load_state_dict(state)
    return gqa


def test_it_is_the_formed_heads():
    attn, x = make(rope=None, v_head_dim=5, scale=0.3), sample()

    def formed(name, rank, width):
        a = getattr(attn, f"{name}_a_proj")(x).view(2, T, H, rank)
        b = getattr(attn, f"{name}_b_proj")(x).view(2, T, rank, width)
        return sum(a[..., r, None] * b[:, :, None, r] for r in range(rank)).transpose(1, 2) / rank

    scores = 0.3 * formed("q", 6, D) @ formed("k", 2, D).mT
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attn.o_proj((p @ formed("v", 2, 5)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_rotated_factors_are_rotated_heads():
    attn, x = make(), sample()
    seen = []
    with observing(seen.append):
        attn(x)
    unrotated = make(rope=None)
    with observing(seen.append):
        unrotated(x)
    (one, other), table = seen, attnzoo.modules.call.begin(attn, x).q_table
    for name in ("q", "k"):
        torch.testing.assert_close(getattr(one, name), attnzoo.rotary.rotate(getattr(other, name), *table))


def test_rank_one_with_factors_of_one_is_multi_query():
    attn, x = make(q_rank=None, k_rank=1, v_rank=1), sample(constant=True)
    for layer in (attn.k_a_proj, attn.v_a_proj):
        constant_factors(layer, torch.ones(H, dtype=torch.float64))
    expected = plain(attn, 1)(x)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(decoded(attn, x, [4] + [1] * 9), expected, atol=1e-12, rtol=0)


def test_factors_that_choose_a_group_are_grouped_queries():
    attn, x = make(q_rank=None), sample(constant=True)
    for layer in (attn.k_a_proj, attn.v_a_proj):
        constant_factors(layer, 2.0 * torch.eye(2, dtype=torch.float64).repeat_interleave(H // 2, 0))
    torch.testing.assert_close(attn(x), plain(attn, 2)(x), atol=1e-12, rtol=0)


def test_the_order_of_ranks_and_the_scale_of_a_pair_mean_nothing():
    attn, x = make(k_rank=3), sample()
    expected = attn(x)
    with torch.no_grad():
        a, b = attn.k_a_proj.weight.view(H, 3, E), attn.k_b_proj.weight.view(3, D, E)
        a.copy_(a[:, [2, 0, 1]])
        b.copy_(b[[2, 0, 1]])
        torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
        a[:, 1] *= 8
        assert (attn(x) - expected).abs().max() > 1e-3
        b[1] /= 8
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_the_order_of_heads_means_nothing():
    attn, x, order = make(), sample(), [2, 0, 3, 1]
    expected = attn(x)
    with torch.no_grad():
        for layer, rank in ((attn.q_a_proj, 6), (attn.k_a_proj, 2), (attn.v_a_proj, 2)):
            layer.weight.copy_(layer.weight.view(H, rank, E)[order].flatten(0, 1))
        attn.o_proj.weight.copy_(attn.o_proj.weight.view(E, H, D)[:, order].flatten(1))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


def test_turning_the_other_way_is_exchanging_halves():
    attn, x = make(), sample()
    other = make()
    with torch.no_grad():
        for layer in (other.q_b_proj, other.k_b_proj):
            layer.weight.copy_(layer.weight.view(-1, 2, D // 2, E).flip(1).flatten(0, 2))
    positions = torch.arange(T)
    turned = other(x, positions=positions.flip(0))
    torch.testing.assert_close(turned, attn(x), atol=1e-12, rtol=0)


def test_positions_are_relative():
    attn, x = make(), sample()
    torch.testing.assert_close(attn(x, positions=torch.arange(T) + 100), attn(x), atol=1e-12, rtol=0)


def test_the_first_gradient_reaches_the_output_projection_alone():
    attn = make(perturbed=False)
    assert not attn.o_proj.weight.any()
    attn(sample()).sum().backward()
    reached = {name for name, parameter in attn.named_parameters() if bool(parameter.grad.any())}
    assert reached == {"o_proj.weight"}


def test_the_start_is_within_the_authors_bounds():
    attn = TensorProductAttention(256, 16, 32, q_rank=None)
    for layer, rank, width in ((attn.k_a_proj, 2, 16), (attn.v_a_proj, 2, 16)):
        bound = (6 / (rank * (width + 256))) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    for layer in (attn.k_b_proj, attn.v_b_proj):
        bound = (6 / (32 * (2 + 256))) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    before = attn.k_a_proj.weight.std()
    attn.reset_parameters(std=0.3, out_std=0.02)
    assert abs(attn.q_proj.weight.std() - 0.3) < 0.01
    assert abs(attn.o_proj.weight.std() - 0.02) < 0.001
    assert abs(attn.k_a_proj.weight.std() - before) < 0.1 * before


# Cache


def test_the_cache_holds_the_factors_alone():
    attn = TensorProductAttention(1024, 47, 64, device="meta")
    numbers = attn.cache_bytes_per_token(torch.bfloat16) // 2
    assert numbers == (2 + 2) * 47 + 2 * 64 + 2 * 64 == 444
    assert attnzoo.MultiHeadAttention(1024, 16, device="meta").cache_bytes_per_token(torch.bfloat16) == 2 * 2048
    cache = attn.init_cache(3, 10, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 10 * 2 * numbers
    assert [tuple(buffer.shape) for buffer in cache.buffers] == [(3, 2, 10, 47), (3, 2, 10, 64)] * 2


@pytest.mark.parametrize("options", [{}, {"q_rank": None, "head_norm": True}, {"k_rank": 1, "v_rank": 1}])
@pytest.mark.parametrize("window", [None, 5])
def test_a_decoded_token_forms_neither_keys_nor_values(options, window):
    attn, x = make(sliding_window=window, **options), sample()
    expected, cache = attn(x), attn.init_cache(2, T)
    with torch.no_grad(), mock.patch.object(op, "softmax_attention", side_effect=op.softmax_attention) as formed:
        for at, part in enumerate(x.split([4] + [1] * 8 + [T - 12], 1)):
            y = attn(part, cache=cache)
            start = cache.length - part.shape[1]
            torch.testing.assert_close(y, expected[:, start : cache.length], atol=1e-12, rtol=0)
            assert formed.call_count == 1, at


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_every_backend_decodes_the_same(backend):
    attn, x = make(backend=backend), sample()
    expected = make()(x)
    for chunks in ([1] * T, [3, 2, 2, 6]):
        torch.testing.assert_close(decoded(attn, x, chunks), expected, atol=1e-12, rtol=0)


def test_what_is_cheaper_is_counted():
    attn = TensorProductAttention(1024, 47, 64, device="meta")
    H, width, S = 47, 64, 1000
    step = attn.flops_by_part(1, S)
    assert step["attention"] == 2 * H * (2 * width + 2 * width) * S
    assert step["forming"] == 2 * H * width * 6
    many = attn.flops_by_part(8, S)
    assert many["forming"] == 2 * H * width * (8 * 6 + S * 4)
    assert op.factors_are_cheaper(1, (9, 9), (64, 64))
    assert op.factors_are_cheaper(16, (1, 1), (64, 64))
    assert not op.factors_are_cheaper(3, (2, 2), (64, 64))


# Circuits and refusals


def test_circuits_are_those_of_feature_factors():
    attn = make()
    pairs = attn.qk_circuit("factors")
    assert len(pairs) == 6 * 2
    torch.testing.assert_close(pairs[3][0], attn.q_b_proj.weight[D : 2 * D])
    torch.testing.assert_close(pairs[3][1], attn.k_b_proj.weight[D:])
    assert len(make(q_rank=None).qk_circuit("factors")) == H * 2
    for part in ("full", "rope", 3):
        with pytest.raises(ValueError, match=re.escape(f"got {part!r}")):
            attn.qk_circuit(part)
    with pytest.raises(ValueError, match="TensorProductAttention has no ov_circuit: head factors depend on the token"):
        attn.ov_circuit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_rank": 0}, "q_rank must be at least 1, got 0"),
        ({"k_rank": 0}, "k_rank must be at least 1, got 0"),
        ({"v_rank": None}, "v_rank must be an integer, got None"),
        ({"k_rank": True}, "k_rank must be an integer, got True"),
        ({"head_norm": "yes"}, "head_norm must be True or False, got 'yes'"),
        ({"head_norm_eps": -1.0}, "head_norm_eps must not be negative, got -1.0"),
        ({"rope": attnzoo.Rotary(dim=8)}, "got 8 and 6|8 .* 6"),
        ({"kdim": 20}, "kdim needs causal=False, got kdim=20"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"bias": True}, {"num_kv_heads": 2}, {"qk_norm": True}, {"alibi": True}])
def test_options_of_other_mechanisms_are_unknown(options):
    with pytest.raises(TypeError, match="|".join(options)):
        make(**options)


@pytest.mark.parametrize("name", ["k_rank", "v_rank"])
def test_ranks_that_compress_nothing_warn(name):
    with pytest.warns(UserWarning, match=f"{name} 5 compresses nothing"):
        make(**{name: 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(**{name: 4})
