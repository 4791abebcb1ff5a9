"""Masks and windows of a sequence over several processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from attnzoo import AttentionMask
from attnzoo.distributed import SequenceParallel, counting_traffic, parallelize, shard
from tests.distributed.comparison import (
    EXACT,
    E,
    assert_equal,
    inputs,
    made,
    results,
    sharded_results,
    tokens_for,
)


def check_masks(name: str, form: str, layout: str, options: dict[str, Any], kinds: tuple[str, ...]) -> None:
    T = tokens_for(name)
    x, w = inputs(T)
    generator = torch.Generator().manual_seed(1)
    dense = (torch.rand(2, 4, T, T, generator=generator) < 0.7) | torch.eye(T, dtype=torch.bool)
    masks = {
        "padding": AttentionMask.padding([T - 3, 5]),
        "documents": AttentionMask.packed([0, 3, T // 2 + 2, T // 2 + 3, T - 1, T, T + 5, 2 * T]),
        "documents and padding": AttentionMask.packed([0, 9, T, 2 * T]) & AttentionMask.padding([T, T - 2]),
        "dense": AttentionMask.dense(dense),
        "dense keys": AttentionMask.dense(dense[:, :1, :1]),
    }
    for kind in kinds:
        expected = results(made(name, **options), x, w, mask=masks[kind])
        own = parallelize(made(name, **options), SequenceParallel(None, form=form, layout=layout))
        sp, mask = own.sequence_parallel, masks[kind]
        if kind == "dense":
            mask = AttentionMask.dense(shard(dense, 2, sp))
        assert_equal(sharded_results(own, sp, x, w, mask=mask), expected, (name, form, layout, kind))


STRUCTURED = ("padding", "documents", "documents and padding")


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form", "options", "kinds"),
    [
        ("gqa", "gather", {}, (*STRUCTURED, "dense", "dense keys")),
        ("gqa", "heads", {}, (*STRUCTURED, "dense", "dense keys")),
        ("gqa", "ring", {}, STRUCTURED),
        ("gqa", "gather", {"sliding_window": 5, "sink_tokens": 2}, STRUCTURED),
        ("gqa", "ring", {"sliding_window": 5, "sink_tokens": 2}, STRUCTURED),
        ("gqa", "ring", {"causal": False}, STRUCTURED),
        ("gqa", "gather", {"causal": False}, (*STRUCTURED, "dense")),
        ("mla", "ring", {}, STRUCTURED),
        ("mla", "heads", {}, STRUCTURED),
        ("mgk", "gather", {}, ("documents",)),
        ("mgk", "gather", {"causal": False}, ("padding", "documents and padding", "dense keys")),
        ("smha", "gather", {}, STRUCTURED),
        ("moa", "gather", {}, STRUCTURED),
        ("forgetting", "gather", {}, STRUCTURED),
        ("forgetting-fixed", "gather", {"sliding_window": 5}, STRUCTURED),
        ("tpa", "gather", {}, STRUCTURED),
        ("sigmoid", "gather", {}, (*STRUCTURED, "dense")),
        ("sigmoid", "gather", {"causal": False}, STRUCTURED),
        ("dcmha", "gather", {}, (*STRUCTURED, "dense")),
        ("dcmha", "ring", {}, STRUCTURED),
        ("linear", "state", {}, STRUCTURED),
        ("linear", "state", {"causal": False}, STRUCTURED),
        ("linear-lm", "state", {}, STRUCTURED),
        ("mhla-heads", "state", {}, ("padding",)),
    ],
)
def test_masks_of_the_whole_sequence(name, form, layout, options, kinds, two):
    two.run(check_masks, name, form, layout, options, kinds)


def check_one_query(name: str, form: str, layout: str) -> None:
    """A dense mask of one row on each rank is that of its query; one row for all is the same on all ranks."""
    T = dist.get_world_size()
    x, w = inputs(T)
    dense = torch.tensor([[True, False], [True, True]])
    heads = made(name).score_heads
    for causal, whole in ((False, dense.expand(2, heads, T, T)), (False, dense.T), (True, dense), (False, dense[:1])):
        module = made(name, causal=causal)
        expected = results(module, x, w, mask=AttentionMask.dense(whole))
        own = parallelize(copy.deepcopy(module), SequenceParallel(None, form=form, layout=layout))
        sp = own.sequence_parallel
        local = whole if whole.shape[-2] == 1 else shard(whole, whole.ndim - 2, sp)
        found = sharded_results(own, sp, x, w, mask=AttentionMask.dense(local))
        assert_equal(found, expected, (name, form, causal, tuple(whole.shape)))


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize(
    ("name", "form"), [("gqa", "heads"), ("mla", "heads"), ("dcmha by groups", "heads"), ("gqa", "gather")]
)
def test_dense_masks_of_one_query_a_rank(name, form, layout, two):
    two.run(check_one_query, name, form, layout)


def check_documents(form: str, layout: str) -> None:
    T, ends = 28, (5, 20, 28)
    x, w = inputs(T, batch=1)
    module = made("gqa")
    outs = [module(x[:, first:last]) for first, last in zip((0, *ends), ends, strict=False)]
    own = parallelize(made("gqa"), SequenceParallel(None, form=form, layout=layout))
    found = sharded_results(own, own.sequence_parallel, x, w, mask=AttentionMask.packed([0, *ends]))
    torch.testing.assert_close(found["y"], torch.cat(outs, 1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", ["gather", "heads", "ring"])
def test_documents_over_borders_are_separate(form, two):
    two.run(check_documents, form, "zigzag")
    two.run(check_documents, form, "contiguous")


def check_cross(layout: str) -> None:
    x, w = inputs(28)
    context = torch.randn(2, 20, E, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for name, options in (("gqa", {"rope": None}), ("dcmha", {"rope": None}), ("gqa", {})):
        pair = (torch.arange(28), torch.arange(20)) if not options else None
        module = made(name, causal=False, **options)
        expected = results(module, x, w, context=context, positions=pair)
        own = parallelize(copy.deepcopy(module), SequenceParallel(None, layout=layout))
        sp = own.sequence_parallel
        local = None if pair is None else (sp.positions(28), sp.positions(20))
        found = sharded_results(own, sp, x, w, context=shard(context, 1, sp), positions=local)
        assert_equal(found, expected, (name, layout))


def test_cross_attention(two):
    two.run(check_cross, "contiguous")
    two.run(check_cross, "zigzag")


def check_hops() -> None:
    for window in (1, 2, 8, 9, 40):
        x, w = inputs(14 * dist.get_world_size())
        expected = results(made("gqa", sliding_window=window), x, w)
        own = parallelize(made("gqa", sliding_window=window), SequenceParallel(None, form="ring"))
        sp = own.sequence_parallel
        assert sp.layout == "contiguous"
        with counting_traffic() as traffic:
            y = own(shard(x, 1, sp))
        hops = min(sp.size - 1, -(-(window - 1) // 14))
        assert traffic.sent == hops * 2 * 14 * 2 * 16 * 8
        del y
        assert_equal(sharded_results(own, sp, x, w), expected, window)
        other = parallelize(made("gqa", sliding_window=window), SequenceParallel(None, form="ring", layout="zigzag"))
        assert_equal(sharded_results(other, other.sequence_parallel, x, w), expected, (window, "zigzag"))


def test_windows_reach_as_far_as_they_need(two):
    two.run(check_hops)


@pytest.mark.slow
def test_windows_of_four(four):
    four.run(check_hops)
