"""Multi-head attention: its defaults, and cross-attention."""

import pytest
import torch

import attnzoo
from tests.zoo import E, H


def test_it_is_grouped_query_attention_with_a_group_a_head():
    mha = attnzoo.MultiHeadAttention(E, H, dtype=torch.float64)
    gqa = attnzoo.GroupedQueryAttention(E, H, H, bias=True, dtype=torch.float64)
    gqa.load_state_dict(mha.state_dict())
    x = torch.randn(2, 7, E).double()
    assert torch.equal(mha(x), gqa(x))
    assert all(getattr(mha, f"{name}_proj").bias is not None for name in "qkvo")


def test_cross_attention_sees_the_whole_context():
    attn = attnzoo.MultiHeadAttention(E, H, rope=None, causal=False, kdim=20, vdim=12, dtype=torch.float64)
    x, key, value = (torch.randn(2, n, width).double() for n, width in ((5, E), (9, 20), (9, 12)))
    q = attn.q_proj(x).view(2, 5, H, -1)
    k = attn.k_proj(key).view(2, 9, H, -1)
    v = attn.v_proj(value).view(2, 9, H, -1)
    weights = (torch.einsum("bthd,bshd->bhts", q, k) / (E // H) ** 0.5).softmax(-1)
    expected = attn.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(attn(x, (key, value)), expected, atol=1e-12, rtol=0)


def test_context_needs_a_module_that_is_not_causal():
    with pytest.raises(ValueError, match="causal"):
        attnzoo.MultiHeadAttention(E, H)(torch.randn(1, 3, E), torch.randn(1, 4, E))


def test_xavier_starts_as_torch_multihead_attention():
    torch.manual_seed(4)
    ours = attnzoo.MultiHeadAttention(256, 4, init="xavier")
    theirs = torch.nn.MultiheadAttention(256, 4)
    q, k, v = theirs.in_proj_weight.chunk(3)
    for mine, other in ((ours.q_proj.weight, q), (ours.k_proj.weight, k), (ours.v_proj.weight, v)):
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.02)
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01)
    assert ours.o_proj.weight.std().item() == pytest.approx(theirs.out_proj.weight.std().item(), rel=0.02)
    assert (ours.q_proj.bias == 0).all()
    assert (ours.o_proj.bias == 0).all()
