"""Grouped-tied attention: what is tied, what is cached, what is refused."""

import pytest
import torch

import attnzoo
from tests.zoo import E, G, H, build


def test_one_state_serves_as_value_and_as_half_of_the_key():
    attn = build("gta", causal=False, rope=None)
    x = torch.randn(1, 6, E).double()
    q = attn.q_proj(x).view(6, H, -1)
    tied = attn.kv_proj(x).view(6, G, -1).repeat_interleave(H // G, 1)
    scores = torch.einsum("thd,shd->hts", q, tied) / q.shape[-1] ** 0.5
    expected = attn.o_proj(torch.einsum("hts,shd->thd", scores.softmax(-1), tied).flatten(1))
    torch.testing.assert_close(attn(x)[0], expected, atol=1e-12, rtol=0)


def test_parameters_and_cache_are_about_half_of_gqa():
    gta, gqa = attnzoo.GroupedTiedAttention(512, 8, 2), attnzoo.GroupedQueryAttention(512, 8, 2)
    D = 64
    assert gta.cache_bytes_per_token(torch.bfloat16) == (2 * D + D // 2) * 2
    assert gqa.cache_bytes_per_token(torch.bfloat16) == 2 * 2 * D * 2
    names = dict(gta.named_parameters())
    assert names["kv_proj.weight"].shape == (2 * D, 512)
    assert names["k_rope_proj.weight"].shape == (D // 2, 512)


def test_the_value_is_not_rotated():
    attn = build("gta")
    x = torch.randn(1, 1, E).double()
    # One token sees itself alone, so its output is its value.
    value = attn.kv_proj(x).view(G, -1).repeat_interleave(H // G, 0).flatten()
    torch.testing.assert_close(attn(x)[0, 0], attn.o_proj(value), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((32, 6, 4, 8), {}, "num_kv_heads must divide num_heads, got 4 and 6"),
        ((32, 4, 2), {"qk_norm": True}, "qk_norm must be False: normalising the key would break its tie"),
        ((32, 4, 2), {"rope_head_dim": 16}, "rope_head_dim must .*16"),
        ((32, 4, 2), {"rope_head_dim": 3}, "rope_head_dim must .*3"),
        ((32, 4, 2), {"k_rope_bias": True, "rope": None}, "k_rope_bias needs rope, got k_rope_bias=True"),
        ((32, 4, 2), {"dropout": 2.0}, "dropout must .*got 2"),
    ],
)
def test_refusals(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.GroupedTiedAttention(*sizes, **options)
