"""Knocking heads over latent attention: what the maps must not break."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


def test_a_module_without_heads_folds():
    kha = moved(make("mla", kv_lora_rank=12, kv_b_bias=True, bias=True, dtype=torch.float64))
    kha.prune_heads(range(kha.num_heads))
    x = torch.randn(2, 9, E).double()
    torch.testing.assert_close(kha.fold()(x), kha.o_proj.bias.expand(2, 9, E))


@pytest.mark.parametrize("absorb", [False, True])
def test_flops_are_those_that_are_counted(absorb):
    kha = make("mla", kv_lora_rank=12, absorb=absorb, causal=False, backend="eager", dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        kha(torch.randn(1, 9, E).double())
    # The absorbed form's value comes with the rotary key, and that part of its output is thrown away.
    spare = 2 * kha.num_heads * kha.qk_rope_head_dim * 9 * 9 if absorb else 0
    assert kha.flops(9) == counter.get_total_flops() - spare


def test_a_decoding_step_maps_no_cached_token():
    kha = make("mla", kv_lora_rank=12)
    short, long = (kha.flops_by_part(1, S)["head maps"] for S in (10, 1000))
    assert short == long == 2 * kha.num_heads * (2 * kha.qk_nope_head_dim**2 + kha.v_head_dim**2)
