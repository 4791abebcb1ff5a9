"""Knocking heads over grouped-tied attention: where the one map acts."""

import pytest
import torch

from attnzoo.cache import TiedCache, UntiedCache
from tests.modules.test_kha import make, moved
from tests.zoo import E, G, H


@pytest.mark.parametrize(("scope", "cache_type"), [("tied", TiedCache), ("value", UntiedCache)])
def test_the_scope_decides_what_the_cache_holds(scope, cache_type):
    kha = moved(make("gta", knock_scope=scope, dtype=torch.float64))
    cache = kha.init_cache(2, 5)
    assert type(cache) is cache_type
    assert cache.nbytes == 2 * 5 * kha.cache_bytes_per_token(torch.float64)
    Dn, Dr = kha.nope_head_dim, kha.rope_head_dim
    assert kha.cache_bytes_per_token(torch.float64) == 8 * (G * kha.head_dim + Dr + (G * Dn if scope == "value" else 0))


def test_with_scope_value_the_key_is_not_mapped():
    kha = moved(make("gta", knock_scope="value", variant=None, knock_v="linear", dtype=torch.float64))
    x = torch.randn(1, 3, E).double()
    _, k, v, _ = kha.project(x, x)
    plain = kha.kv_proj(x).view(1, 3, G, kha.head_dim)
    torch.testing.assert_close(k, plain[..., : kha.nope_head_dim], atol=1e-12, rtol=0)
    torch.testing.assert_close(v, plain @ kha.v_knock.weight.T, atol=1e-12, rtol=0)
    assert len(kha.ov_circuit()) == H
