"""Conversions: the stated relation, and what has none. Agreement of `from_mha` is in modules/test_parity.py."""

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.conversion import from_mha, to_gqa
from tests.zoo import E, H, build


def test_submodules_need_no_import_of_their_own():
    assert attnzoo.conversion.to_gqa is to_gqa
    assert attnzoo.adapters.TorchMultiheadAttention.__name__ == "TorchMultiheadAttention"


def test_the_extra_key_and_value_of_torch_are_refused():
    with pytest.raises(ValueError, match="module must not have add_bias_kv=True"):
        from_mha(nn.MultiheadAttention(E, H, add_bias_kv=True))


def test_a_causal_copy_cannot_have_other_context_widths():
    with pytest.raises(ValueError, match="kdim and vdim need causal=False, got kdim=12"):
        from_mha(nn.MultiheadAttention(E, H, kdim=12), causal=True)


def test_options_of_the_result_can_be_named():
    attn = from_mha(nn.MultiheadAttention(E, H, dropout=0.1).eval(), backend="eager", sliding_window=4)
    assert (attn.backend, attn.sliding_window, attn.dropout, attn.training) == ("eager", 4, 0.1, False)


@pytest.mark.parametrize("mode", ["mean", "first"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_merging_equal_heads_changes_nothing(mode, groups):
    attn = build("mha", qk_norm=True, sink="learned", sliding_window=5)
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            for parameter in getattr(attn, name).parameters():
                heads = parameter.unflatten(0, (groups, H // groups, E // H))
                heads.copy_(heads[:, :1].expand_as(heads).clone())
    merged, x = to_gqa(attn.eval(), groups, mode), torch.randn(2, 9, E).double()
    assert merged.num_kv_heads == groups
    assert not merged.training
    torch.testing.assert_close(merged(x), attn(x), atol=1e-12, rtol=0)


def test_a_group_becomes_its_mean_or_its_first_head():
    attn = build("mha")
    heads = attn.k_proj.weight.view(2, 2, E // H, E)
    assert torch.equal(to_gqa(attn, 2, "first").k_proj.weight.view(2, E // H, E), heads[:, 0])
    torch.testing.assert_close(to_gqa(attn, 2).k_proj.weight.view(2, E // H, E), heads.mean(1))
    before = attn.k_proj.weight.clone()
    to_gqa(attn, 1).k_proj.weight.data.zero_()
    assert torch.equal(attn.k_proj.weight, before)


def test_a_grouped_module_merges_further():
    attn = build("gqa", rope=None, alibi=True, logit_softcap=4.0)
    merged = to_gqa(attn, 1)
    assert merged.alibi_slopes == attn.alibi_slopes
    assert (merged.logit_softcap, merged.rope) == (4.0, None)
    assert merged(torch.randn(1, 3, E).double()).shape == (1, 3, E)


@pytest.mark.parametrize(
    ("make", "groups", "mode", "message"),
    [
        (lambda: build("mha"), 3, "mean", "num_kv_heads must divide the module's 4, got 3"),
        (lambda: build("mha"), 0, "mean", "num_kv_heads must divide the module's 4, got 0"),
        (lambda: build("mha"), 2, "median", "mode must be 'mean' or 'first', got 'median'"),
        (lambda: build("kha"), 1, "mean", "module must be multi-head or grouped-query attention, got "),
        (lambda: build("gta"), 1, "mean", "got GroupedTiedAttention"),
    ],
)
def test_refusals_of_to_gqa(make, groups, mode, message):
    with pytest.raises(ValueError, match=message):
        to_gqa(make(), groups, mode)


def test_a_pruned_module_is_refused():
    attn = build("mha")
    attn.prune_heads([1])
    with pytest.raises(ValueError, match="module must not have pruned heads, got"):
        to_gqa(attn, 2)
