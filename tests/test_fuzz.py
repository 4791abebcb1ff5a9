"""Any sizes and options that a mechanism takes: its fast form against its eager one, with gradients.

`pytest -m slow tests/test_fuzz.py` draws 2,000 examples of each.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo import AttentionMask, Rotary
from tests.zoo import gradients

CLASSES = {
    "mha": attnzoo.MultiHeadAttention,
    "mqa": attnzoo.MultiQueryAttention,
    "gqa": attnzoo.GroupedQueryAttention,
    "gta": attnzoo.GroupedTiedAttention,
    "kha": attnzoo.KnockingHeadsAttention,
    "kha_gta": attnzoo.KnockingHeadsTiedAttention,
}
VARIANTS = ("linear", "linear_v", "mlp", "mlp_qkv")


@st.composite
def modules(draw, name):
    """A module of that mechanism with odd sizes and a random choice of the options it has."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    embed_dim = draw(st.integers(1, 23))
    head_dim = draw(st.integers(1, 6)) * 2
    sizes = {"head_dim": head_dim} | ({"num_kv_heads": groups} if name in ("gqa", "gta", "kha", "kha_gta") else {})
    causal = draw(st.booleans())
    options = {
        "causal": causal,
        "bias": draw(st.booleans()),
        "sink": draw(st.sampled_from([None, "zero", "learned"])),
        "logit_softcap": draw(st.sampled_from([None, 2.5])),
        "scale": draw(st.sampled_from([None, 0.7])),
    }
    if draw(st.booleans()):
        options |= {"sliding_window": draw(st.integers(1, 9)), "sink_tokens": draw(st.integers(0, 3))}
    tied = name in ("gta", "kha_gta")
    if name == "kha":
        options |= {"variant": draw(st.sampled_from(VARIANTS))}
    elif name == "kha_gta":
        options |= {
            "variant": draw(st.sampled_from(["mlp", "linear_v"])),
            "knock_scope": draw(st.sampled_from(["tied", "value"])),
        }
    style = draw(st.sampled_from(["half", "interleaved"]))
    rope = draw(st.sampled_from([None, "whole", "partial"]))
    if tied:
        fits = head_dim > 2
        options["rope"] = Rotary(style=style) if rope is not None and fits else None
        if options["rope"] is not None:
            options["rope_head_dim"] = draw(st.integers(1, head_dim // 2 - 1)) * 2
    else:
        options["rope"] = None if rope is None else Rotary(style=style, dim=2 if rope == "partial" else None)
        options |= {"v_head_dim": draw(st.sampled_from([None, 3])), "qk_norm": draw(st.booleans())}
        options["alibi"] = rope is None and draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**20)))
    attn = CLASSES[name](embed_dim, heads, **sizes, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


@st.composite
def masks(draw, B, T):
    mask = None
    if draw(st.booleans()):
        mask = AttentionMask.padding(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, B * T), max_size=3)))
        packed = AttentionMask.packed([0, *cuts, B * T])
        mask = packed if mask is None else mask & packed
    if draw(st.booleans()):
        keep = torch.rand(T, T, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) > 0.3
        mask = AttentionMask.dense(keep) if mask is None else mask & keep
    return mask


def assert_fast_form(data, name):
    """Outputs and gradients of "auto" and "eager" agree, and decoding equals the full forward."""
    attn = data.draw(modules(name))
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 13))
    mask = data.draw(masks(B, T))
    x = torch.randn(B, T, attn.embed_dim).double()
    weight = torch.randn_like(x)
    eager = copy.deepcopy(attn)
    eager.backend = "eager"
    for (what, fast), expected in zip(
        gradients(attn, x, weight, mask=mask).items(), gradients(eager, x, weight, mask=mask).values(), strict=True
    ):
        torch.testing.assert_close(fast, expected, atol=1e-10, rtol=1e-10, msg=lambda m, w=what: f"{w}: {m}")
    if not attn.causal:
        return
    expected, cache, start = attn(x), attn.init_cache(B, T), 0
    while start < T:
        size = data.draw(st.integers(1, T - start))
        y = attn(x[:, start : start + size], cache=cache)
        torch.testing.assert_close(y, expected[:, start : start + size], atol=1e-10, rtol=1e-10)
        start += size


@pytest.mark.parametrize("name", CLASSES)
def test_fast_form_and_decoding(name):
    settings(max_examples=200, deadline=None, derandomize=True)(
        given(st.data())(lambda data: assert_fast_form(data, name))
    )()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_fast_form_and_decoding_widely(name):
    settings(max_examples=2000, deadline=None)(given(st.data())(lambda data: assert_fast_form(data, name)))()
