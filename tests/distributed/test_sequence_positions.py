"""Positions, causality and partial results of a sequence over several processes."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

import attnzoo
from attnzoo import AttentionMask
from attnzoo.distributed import SequenceParallel, parallelize, shard, unshard
from attnzoo.ops.distributed_attention import merge_partials
from tests.distributed.comparison import (
    assert_equal,
    inputs,
    made,
    results,
    sharded_results,
    tokens_for,
)


def test_partial_results_merge():
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64)
    lses = 3 * torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    nothing = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    (a, b, c) = zip(outs, lses, strict=True)
    one, other = merge_partials(*merge_partials(*a, *b), *c), merge_partials(*a, *merge_partials(*b, *c))
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
    for x, y in zip(merge_partials(*a, *nothing), a, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-15, atol=1e-15)
    empty = [part.clone().requires_grad_() for part in (*nothing, *nothing)]
    out, lse = merge_partials(*empty)
    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])
    for gradient in torch.autograd.grad(out.sum(), empty):
        assert torch.isfinite(gradient).all()


def check_unseen(form: str) -> None:
    module = parallelize(made("gqa"), SequenceParallel(None, form=form, layout="zigzag"))
    sp = module.sequence_parallel
    x, w = inputs(28)
    mask = AttentionMask.padding([28, 0])
    found = sharded_results(module, sp, x, w, mask=mask)
    assert torch.equal(found["y"][1], torch.zeros_like(found["y"][1]))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert_equal(found, results(made("gqa"), x, w, mask=mask), form)


@pytest.mark.parametrize("form", ["gather", "heads", "ring"])
def test_rows_without_keys(form, two):
    two.run(check_unseen, form)


def check_positions(form: str, name: str, layout: str) -> None:
    module = parallelize(made(name), SequenceParallel(None, form=form, layout=layout))
    sp, T = module.sequence_parallel, tokens_for(name)
    x, w = inputs(T)
    expected = results(made(name), x, w)
    assert_equal(sharded_results(module, sp, x, w, positions=sp.positions(T) + 1000), expected, form, 1e-9)
    other = sharded_results(module, sp, x, w, positions=torch.arange(T // sp.size))
    assert float((other["y"] - expected["y"]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "form"), [("gqa", "gather"), ("gqa", "heads"), ("gqa", "ring"), ("mla", "ring"), ("linear-lm", "state")]
)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_positions_shift_together(name, form, layout, two):
    two.run(check_positions, form, name, layout)


def check_scaled_rotation(form: str) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 16}
    options = {"rope": attnzoo.Rotary(scaling=scaling)}
    x, w = inputs(28)
    module = made("gqa", **options)
    for given in (None, torch.arange(28) * 2):
        expected = results(module, x, w, positions=given)
        own = parallelize(made("gqa", **options), SequenceParallel(None, form=form, layout="zigzag"))
        local = None if given is None else shard(given, 0, own.sequence_parallel)
        assert_equal(sharded_results(own, own.sequence_parallel, x, w, positions=local), expected, form)


def test_rotation_that_depends_on_the_length(two):
    two.run(check_scaled_rotation, "gather")


def check_causality(name: str, form: str, layout: str) -> None:
    module = parallelize(made(name), SequenceParallel(None, form=form, layout=layout))
    sp, T = module.sequence_parallel, tokens_for(name)
    x, _ = inputs(T)
    changed = x.clone()
    place = int(sp.positions(T, rank=1)[0])
    changed[:, place] += 1
    before, after = (unshard(module(shard(one, 1, sp)).detach(), 1, sp) for one in (x, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gqa", "gather"),
        ("gqa", "heads"),
        ("gqa", "ring"),
        ("dcmha", "ring"),
        ("linear", "state"),
        ("mhla-heads", "state"),
        ("forgetting", "gather"),
        ("sigmoid", "gather"),
    ],
)
def test_later_tokens_change_nothing(name, form, layout, two):
    two.run(check_causality, name, form, layout)
