"""Knocking heads over latent attention: what the maps must not break."""

import torch

import attnzoo
from tests.modules.test_kha import make, moved
from tests.zoo import E


def test_over_latent_attention_the_absorbed_form_stays_exact():
    kha = moved(make("mla", kv_lora_rank=12, dtype=torch.float64))
    x = torch.randn(2, 9, E).double()
    kha.absorb = False
    expected = kha(x)
    kha.absorb = True
    torch.testing.assert_close(kha(x), expected, atol=1e-12, rtol=0)
    kha.absorb, cache = "auto", kha.init_cache(2, 9)
    with torch.no_grad():
        y = torch.cat([kha(part, cache=cache) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    for (wq, wk), (q, k) in zip(kha.qk_circuit(), kha.fold().qk_circuit(), strict=True):
        torch.testing.assert_close(wq.T @ wk, q.T @ k, atol=1e-12, rtol=0)


def test_biases_of_the_expansion_fold_with_the_maps():
    kha = moved(make("mla", kv_lora_rank=12, kv_b_bias=True, bias=True, dtype=torch.float64))
    x = torch.randn(2, 9, E).double()
    folded = kha.fold()
    assert type(folded) is attnzoo.MultiHeadLatentAttention
    torch.testing.assert_close(folded(x), kha(x), atol=1e-12, rtol=0)
    for (wv, wo), (v, o) in zip(kha.ov_circuit(), folded.ov_circuit(), strict=True):
        torch.testing.assert_close(wo @ wv, o @ v, atol=1e-12, rtol=0)
