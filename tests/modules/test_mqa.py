"""Multi-query attention is grouped-query attention with one group."""

import torch

import attnzoo
from tests.zoo import E, H


def test_it_equals_one_group():
    mqa = attnzoo.MultiQueryAttention(E, H, dtype=torch.float64)
    gqa = attnzoo.GroupedQueryAttention(E, H, 1, dtype=torch.float64)
    gqa.load_state_dict(mqa.state_dict())
    x = torch.randn(2, 7, E).double()
    assert torch.equal(mqa(x), gqa(x))


def test_it_equals_multi_head_attention_with_the_same_key_and_value_in_every_head():
    mqa = attnzoo.MultiQueryAttention(E, H, dtype=torch.float64)
    mha = attnzoo.MultiHeadAttention(E, H, bias=False, dtype=torch.float64)
    state = mqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].repeat(H, 1)
    mha.load_state_dict(state)
    x = torch.randn(2, 7, E).double()
    torch.testing.assert_close(mqa(x), mha(x), atol=1e-12, rtol=0)


def test_its_cache_holds_one_key_and_one_value():
    mqa = attnzoo.MultiQueryAttention(E, H)
    assert mqa.cache_bytes_per_token(torch.bfloat16) == 2 * (E // H) * 2
