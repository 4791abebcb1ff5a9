"""Scores and weights mixed over heads: the fast form is the definition."""

import pytest
import torch

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops import composed_attention as ops
from attnzoo.ops.composed_attention import Composition, composed_attention

B, T, S, D = 2, 11, 14, 3


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def side(tokens, groups, heads, rank=2):
    return (
        numbers(B, tokens, groups, rank, heads),
        numbers(B, tokens, groups, rank, heads),
        numbers(B, tokens, groups, heads),
    )


CASES = {
    "all parts": lambda: [
        Composition(numbers(2, 3, 3), query=side(T, 2, 3), key=side(S, 2, 3)),
        Composition(numbers(2, 3, 3), query=side(T, 2, 3), key=side(S, 2, 3)),
    ],
    "no residual": lambda: [Composition(numbers(1, 6, 6), False, side(T, 1, 6), side(S, 1, 6)), None],
    "queries": lambda: [None, Composition(query=side(T, 3, 2, rank=1))],
    "keys": lambda: [Composition(key=side(S, 1, 6)), Composition(key=side(S, 6, 1, rank=1))],
    "other numbers of heads": lambda: [Composition(numbers(2, 3, 5), False), Composition(numbers(1, 10, 4), False)],
    "identity": lambda: [Composition(), Composition(residual=True)],
}
VIEWS = {
    "causal": Visibility(),
    "window": Visibility(window=4),
    "not causal": Visibility(causal=False),
    "a row of padding": Visibility(mask=AttentionMask.padding([0, 9])),
    "dense": Visibility(mask=AttentionMask.dense(torch.rand(B, 1, T, S) > 0.4)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", CASES)
def test_one_matrix_of_each_query_in_chunks_is_the_definition(case, view, monkeypatch):
    monkeypatch.setattr(ops, "CACHED_SCORES", 1)
    monkeypatch.setattr(ops, "FEWEST_AT_ONCE", 3)
    torch.manual_seed(3)
    q, k = numbers(B, T, 6, D), numbers(B, S, 3, D)
    pre, post = CASES[case]()
    v = numbers(B, S, 2, 5)
    inputs = [q, k, v, *(x for c in (pre, post) if c for x in (c.matrix, *(c.query or ()), *(c.key or ())))]
    inputs = [x for x in inputs if x is not None]

    def run(backend):
        out = composed_attention(q, k, v, pre, post, VIEWS[view], scale=0.7, chunk_size=8, backend=backend)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)]

    for found, expected in zip(run("auto"), run("eager"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("chunk_size", "heads", "sizes"), [(None, 2, [40]), (64, 2, [40]), (16, 2, [16, 16, 8]), (39, 64, [32, 8])]
)
def test_chunks_are_no_larger_than_asked_and_fit_into_a_cache(chunk_size, heads, sizes, monkeypatch):
    monkeypatch.setattr(ops, "CACHED_SCORES", 32 * 64 * 40)
    plain, seen = ops.composed_attention_reference, []
    monkeypatch.setattr(
        ops, "composed_attention_reference", lambda q, *rest: seen.append(q.shape[1]) or plain(q, *rest)
    )
    q = torch.randn(1, 40, heads, 2)
    composed_attention(
        q, q, q, None, Composition(torch.eye(heads)[None], False), Visibility(), scale=1.0, chunk_size=chunk_size
    )
    assert seen[::-1] == sizes
