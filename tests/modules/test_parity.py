"""The same numbers as other libraries' attention."""

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.conversion import from_mha

SCALINGS = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_multihead_attention(causal, bias):
    theirs = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True).double()
    ours = from_mha(theirs, causal=causal)
    x = torch.randn(3, 9, 32).double().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    y = ours(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(y)
    grads = [torch.autograd.grad((out * weight).sum(), [x, p]) for out, p in ((y, ours.o_proj.weight),)]
    (dx, do) = grads[0]
    dx2, do2 = torch.autograd.grad((expected * weight).sum(), [x, theirs.out_proj.weight])
    torch.testing.assert_close(dx, dx2, atol=1e-12, rtol=0)
    torch.testing.assert_close(do, do2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_torch_multihead_cross_attention(padded):
    theirs = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, batch_first=True).double()
    ours = from_mha(theirs)
    x, key, value = (torch.randn(3, n, width).double() for n, width in ((9, 32), (7, 20), (7, 24)))
    lengths = torch.tensor([7, 4, 1])
    hidden = torch.arange(7) >= lengths[:, None] if padded else None
    expected = theirs(x, key, value, key_padding_mask=hidden, need_weights=False)[0]
    mask = attnzoo.AttentionMask.padding(lengths) if padded else None
    torch.testing.assert_close(ours(x, (key, value), mask=mask), expected, atol=1e-12, rtol=0)


def test_torch_zero_attention():
    theirs = nn.MultiheadAttention(32, 4, add_zero_attn=True, batch_first=True).double()
    x = torch.randn(3, 9, 32).double()
    torch.testing.assert_close(from_mha(theirs)(x), theirs(x, x, x, need_weights=False)[0], atol=1e-12, rtol=0)


def in_float64(monkeypatch, modeling):
    """Let a modeling file of transformers cast to float64 where it casts to float32."""

    class Torch:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(modeling, "torch", Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_transformers_llama(scaling):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": 10000.0, **scaling},
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(config, layer_idx=0).double()
    rope = attnzoo.Rotary(scaling=None if scaling["rope_type"] == "default" else scaling)
    ours = attnzoo.GroupedQueryAttention(64, 4, 2, rope=rope).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 40, 64).double()
    cos, sin = llama.LlamaRotaryEmbedding(config)(x.float(), torch.arange(40)[None])
    mask = torch.full((40, 40), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, position_embeddings=(cos.double(), sin.double()), attention_mask=mask)[0]
    # Their tables are float32.
    torch.testing.assert_close(ours(x), expected, atol=2e-5, rtol=1e-4)
