"""Every name that a user imports, with the two sizes alone: forward, backward, decoding, state dict."""

import pytest
import torch

import attnzoo

NAMES = (
    "MultiHeadAttention", "MultiQueryAttention", "GroupedQueryAttention", "GroupedTiedAttention",
    "MultiHeadLatentAttention", "MixtureOfHeadAttention", "MixtureOfAttentionHeads", "DynamicallyComposableAttention",
    "TalkingHeadsAttention", "EnhancedMultiheadAttention", "ComplexAttention", "KnockingHeadsAttention",
    "KnockingHeadsTiedAttention", "KnockingHeadsLatentAttention", "LinearAttention", "MultiHeadLinearAttention",
    "MultipleHeadEmbeddingAttention",
    "MixtureOfGaussianKeysAttention",
    "SelectiveMultiHeadAttention", "MixtureOfAttentiveExperts", "RelativeConvAttention",
    "GatedAttention", "DifferentialAttention", "ForgettingAttention",
    "TensorProductAttention",
    "GatedAttention",
    "TensorProductAttention", "SigmoidAttention", "MultiTokenAttention", "SelectiveAttention",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_two_sizes_are_enough(name):
    kind = getattr(attnzoo, name)
    attn, x = kind(512, 8), torch.randn(2, 40, 512)
    y = attn(x)
    assert y.shape == x.shape
    loss = y.square().mean()
    (loss if attn.aux_loss is None else loss + attn.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())
    attn.eval()
    cache = attn.init_cache(2, 40)
    with torch.inference_mode():
        expected = attn(x)
        parts = [attn(part, cache=cache) for part in x.split([30, *[1] * 10], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)
    other = kind(512, 8)
    other.load_state_dict(attn.state_dict())
    torch.testing.assert_close(other.eval()(x), attn(x), atol=0, rtol=0)
    assert name in attnzoo.__all__
    assert attn.flops(40) > 0
    assert repr(attn).startswith(name)
