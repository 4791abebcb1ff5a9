"""Observers of attention: what they are shown, how they nest, and that nothing is left behind."""

import pytest
import torch

from attnzoo.masks import Visibility
from attnzoo.ops.observation import current_observer, observing
from attnzoo.ops.softmax_attention import softmax_attention

B, T, S, H, G, D, Dv = 2, 3, 7, 4, 2, 5, 11


def attend(**options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, *size, generator=generator) for size in ((T, H, D), (S, G, D), (S, G, Dv)))
    return softmax_attention(q, k, v, Visibility(window=3), **options), (q, k, v)


def test_what_an_observer_is_shown():
    seen = []
    with observing(seen.append):
        out, (q, k, v) = attend(softcap=2.0)
    (one,) = seen
    assert one.operation == "softmax_attention"
    assert all(torch.equal(x, y) for x, y in zip((one.q, one.k, one.v), (q, k, v), strict=True))
    assert (one.view.window, one.rules.softcap, one.rules.scale) == (3, 2.0, D**-0.5)
    assert (one.pre, one.post, one.value_heads, one.value_groups) == (None, None, None, None)
    assert torch.equal(out, attend(softcap=2.0)[0])
    assert len(seen) == 1


def test_blocks_nest_and_the_outer_one_is_told_first():
    seen = []
    with observing(lambda _: seen.append("outer")):
        attend()
        with observing(lambda _: seen.append("inner")):
            attend()
        with observing(None):
            attend()
            with observing(lambda _: seen.append("alone")):
                attend()
        attend()
    attend()
    assert seen == ["outer", "outer", "inner", "alone", "outer"]


def test_blocks_may_end_in_the_order_in_which_they_began():
    seen = []
    first, second = observing(lambda _: seen.append("first")), observing(lambda _: seen.append("second"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    attend()
    second.__exit__(None, None, None)
    attend()
    assert seen == ["second"]
    assert current_observer() is None


def test_what_an_observer_raises_reaches_the_caller():
    def refuse(_):
        raise KeyError("not this one")

    with pytest.raises(KeyError, match="not this one"), observing(refuse):
        attend()
    assert current_observer() is None


def test_compiled_code_shows_nothing():
    seen = []
    compiled = torch.compile(lambda q: softmax_attention(q, q, q, backend="eager"), backend="eager", fullgraph=True)
    q = torch.randn(B, T, H, D)
    with observing(seen.append):
        out = compiled(q)
        assert seen == []
        softmax_attention(q, q, q, backend="eager")
    assert len(seen) == 1
    torch.testing.assert_close(out, softmax_attention(q, q, q, backend="eager"))
