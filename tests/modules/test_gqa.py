"""Grouped-query attention: sizes, starts, costs, sinks, windows, scores."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo.ops.softmax_attention import softmax_attention
from tests.zoo import E, G, H, build


def test_sizes_and_starts():
    attn = attnzoo.GroupedQueryAttention(512, 8, 2, 64)
    shapes = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert shapes == {
        "q_proj.weight": (512, 512),
        "k_proj.weight": (128, 512),
        "v_proj.weight": (128, 512),
        "o_proj.weight": (512, 512),
    }
    for parameter in attn.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.03)
    attn.reset_parameters(std=0.1, out_std=0.01)
    assert attn.q_proj.weight.std().item() == pytest.approx(0.1, rel=0.03)
    assert attn.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GroupedQueryAttention", {"qk_norm": True, "sink": "learned"}),
        ("SelectiveMultiHeadAttention", {}),
        ("MixtureOfAttentiveExperts", {"gate_hidden": 64}),
    ],
)
def test_xavier_leaves_the_start_of_other_layers_as_it_is(name, options):
    xavier, normal = (getattr(attnzoo, name)(64, 4, init=init, **options) for init in ("xavier", "normal"))
    for module in (xavier, normal):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        module.reset_parameters()
    expected = {name: value for name, value in normal.state_dict().items() if name[2:6] != "proj"}
    assert expected
    for name, value in expected.items():
        found = xavier.state_dict()[name]
        assert found.mean().item() == pytest.approx(value.mean().item(), abs=0.01)
        assert found.std().item() == pytest.approx(value.std().item(), rel=0.2)


def test_cache_bytes_are_two_heads_a_group():
    attn = attnzoo.GroupedQueryAttention(512, 8, 2, 64, v_head_dim=32)
    assert attn.cache_bytes_per_token(torch.bfloat16) == 2 * (64 + 32) * 2


def test_flops_without_a_causal_mask_are_those_that_are_counted():
    attn = attnzoo.GroupedQueryAttention(E, H, G, causal=False, rope=None, backend="eager")
    with FlopCounterMode(display=False) as counter:
        attn(torch.randn(1, 13, E))
    assert attn.flops(13, 13) == counter.get_total_flops()


def test_a_zero_sink_is_a_key_with_score_zero_and_value_zero():
    with_sink, without = build("gqa", sink="zero", rope=None), build("gqa", rope=None)
    without.load_state_dict(with_sink.state_dict())
    x = torch.randn(1, 1, E).double()
    q = without.q_proj(x).view(H, -1)
    k = without.k_proj(x).view(G, -1).repeat_interleave(H // G, 0)
    share = ((q * k).sum(-1) / (E // H) ** 0.5).sigmoid()
    heads = without.v_proj(x).view(G, -1).repeat_interleave(H // G, 0) * share[:, None]
    torch.testing.assert_close(with_sink(x)[0, 0], without.o_proj(heads.flatten()), atol=1e-12, rtol=0)


def test_a_learned_sink_far_below_the_scores_changes_nothing():
    learned, plain = build("gqa", sink="learned"), build("gqa")
    state = learned.state_dict()
    (name,) = set(state) - set(plain.state_dict())
    plain.load_state_dict({key: value for key, value in state.items() if key != name})
    with torch.no_grad():
        dict(learned.named_parameters())[name].fill_(-1e4)
    x = torch.randn(2, 7, E).double()
    torch.testing.assert_close(learned(x), plain(x), atol=1e-12, rtol=0)


def test_a_window_is_a_band_mask():
    windowed, plain = build("gqa", sliding_window=4, sink_tokens=2), build("gqa")
    plain.load_state_dict(windowed.state_dict())
    t, s = torch.arange(11)[:, None], torch.arange(11)
    band = (s <= t) & ((t - s < 4) | (s < 2))
    x = torch.randn(2, 11, E).double()
    torch.testing.assert_close(windowed(x), plain(x, mask=band), atol=1e-12, rtol=0)


def test_soft_cap_is_a_tanh_of_the_scores():
    attn = build("gqa", logit_softcap=2.0, rope=None, causal=False)
    x = torch.randn(1, 6, E).double()
    q = attn.q_proj(x).view(6, H, -1)
    k = attn.k_proj(x).view(6, G, -1).repeat_interleave(H // G, 1)
    v = attn.v_proj(x).view(6, G, -1).repeat_interleave(H // G, 1)
    scores = 2 * torch.tanh(torch.einsum("thd,shd->hts", q, k) / math.sqrt(E // H) / 2)
    expected = attn.o_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))
    torch.testing.assert_close(attn(x)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa", "kha-linear"])
def test_qk_circuit_makes_the_scores(name):
    attn = build(name, rope=None)
    for projection in (attn.q_proj, attn.k_proj):
        if projection.bias is not None:
            projection.bias.data.zero_()
    x = torch.randn(1, 5, E).double()
    q, k, _ = attn.project(x, x, x)
    if isinstance(attn, attnzoo.KnockingHeadsAttention):
        q_map, k_map, _ = attn.remaining_maps(x, x, x)
        q, k = q_map(q), k_map(k)
    scores = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(H // attn.num_kv_heads, 1))
    made = torch.stack([(x[0] @ wq.T) @ (x[0] @ wk.T).T for wq, wk in attn.qk_circuit()])
    torch.testing.assert_close(made, scores, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((0, 4), {}, "embed_dim must be .*got 0"),
        ((32, 0), {}, "num_heads must be .*got 0"),
        ((33, 4), {}, "got 4 and 33"),
        ((32, 6, 4, 8), {}, "num_kv_heads must divide num_heads, got 4 and 6"),
        ((32, 4, 0), {}, "num_kv_heads must be .*got 0"),
        ((32, 4, 2, -1), {}, "head_dim must be .*got -1"),
        ((32, 4, 2), {"dropout": 1.0}, "dropout must .*got 1"),
        ((32, 4, 2), {"dropout": -0.1}, "dropout must .*got -0.1"),
        ((32, 4, 2), {"sliding_window": 0}, "sliding_window must be .*got 0"),
        ((32, 4, 2), {"sink_tokens": -1}, "sink_tokens must .*got -1"),
        ((32, 4, 2), {"sink_tokens": 2}, "sink_tokens"),
        ((32, 4, 2), {"sink": "one"}, "sink must be .*got 'one'"),
        ((32, 4, 2), {"logit_softcap": 0.0}, "logit_softcap must be .*got 0"),
        ((32, 4, 2), {"scale": 0.0}, "scale must be .*got 0"),
        ((32, 4, 2), {"init": "uniform"}, "init must be .*got 'uniform'"),
        ((32, 4, 2), {"alibi": True}, "rope"),
        ((32, 4, 2), {"backend": "cuda"}, "backend must be .*got 'cuda'"),
        ((32, 4, 2), {"v_head_dim": 0}, "v_head_dim must be .*got 0"),
    ],
)
def test_refused_arguments(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.GroupedQueryAttention(*sizes, **options)


@pytest.mark.parametrize(
    ("x", "call", "message"),
    [
        (torch.zeros(4, E), {}, r"x must have shape .*got \(4, 32\)"),
        (torch.zeros(1, 4, E + 1), {}, "33"),
        (torch.zeros(1, 4, E, dtype=torch.int64), {}, "int64"),
        (torch.zeros(1, 4, E), {"mask": torch.zeros(4, 4)}, "bool"),
        (torch.zeros(1, 4, E), {"mask": torch.zeros(3, 5, dtype=torch.bool)}, "mask"),
        (torch.zeros(1, 4, E), {"positions": torch.zeros(3, dtype=torch.int64)}, "positions"),
    ],
)
def test_refused_calls(x, call, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.GroupedQueryAttention(E, H, G)(x, **call)


def test_joint_norm_is_that_of_all_heads_together():
    torch.manual_seed(0)
    attn = attnzoo.GroupedQueryAttention(12, 4, 2, 6, qk_norm="joint", rope=None, dtype=torch.float64)
    with torch.no_grad():
        attn.q_norm.weight.uniform_(0.5, 2)
        attn.k_norm.weight.uniform_(0.5, 2)
    assert (attn.q_norm.weight.shape, attn.k_norm.weight.shape) == ((24,), (12,))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k = (x @ linear.weight.T for linear in (attn.q_proj, attn.k_proj))
    q, k = (
        z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        for z, norm in ((q, attn.q_norm), (k, attn.k_norm))
    )
    q, k, v = (z.unflatten(-1, (-1, 6)) for z in (q, k, attn.v_proj(x)))
    expected = attn.o_proj(softmax_attention(q, k, v, backend="eager").flatten(2))
    torch.testing.assert_close(attn(x), expected)
    same = attnzoo.conversion.to_kha(attn)
    torch.testing.assert_close(same(x), expected)
    cache = attn.init_cache(2, 7)
    with torch.no_grad():
        steps = [attn(part, cache=cache) for part in x.split([4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected)


def test_joint_norm_needs_all_heads():
    attn = attnzoo.GroupedQueryAttention(16, 4, qk_norm="joint")
    with pytest.raises(
        ValueError, match="prune_heads needs qk_norm other than 'joint': its statistics are those of all"
    ):
        attn.prune_heads([1])
    with pytest.raises(ValueError, match="attn must not have qk_norm='joint'"):
        attnzoo.ClusteredHeadAttention(attn, 2)
    with pytest.raises(ValueError, match="qk_norm must be True, False or 'joint', got 'each'"):
        attnzoo.GroupedQueryAttention(16, 4, qk_norm="each")
    with pytest.raises(ValueError, match="qk_norm must be True or False, got 'joint'"):
        attnzoo.LinearAttention(12, 4, qk_norm="joint")
