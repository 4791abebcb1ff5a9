"""Decoding from a cache that is spread over several processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.multiprocessing

from attnzoo.distributed import SequenceParallel, parallelize, shard, unshard
from tests.distributed.comparison import (
    assert_equal,
    inputs,
    made,
    tokens_for,
)


def check_decoding(name: str, form: str, layout: str, options: dict[str, Any]) -> None:
    module = made(name, **options).eval()
    prompt, new = tokens_for(name), 7
    x, _ = inputs(prompt + new)
    mask = None
    with torch.no_grad():
        expected = module(x)
        own = parallelize(copy.deepcopy(module), SequenceParallel(None, form=form, layout=layout))
        sp = own.sequence_parallel
        cache = own.init_cache(2, prompt + new)
        y = unshard(own(shard(x[:, :prompt], 1, sp), mask=mask, cache=cache), 1, sp)
        assert_equal({"y": y}, {"y": expected[:, :prompt]}, (name, form, "prompt"))
        assert cache.length == prompt
        for at, count in ((0, 1), (1, 3), (4, 1), (5, 2)):
            y = own(x[:, prompt + at : prompt + at + count], cache=cache)
            assert_equal({"y": y}, {"y": expected[:, prompt + at : prompt + at + count]}, (name, form, at))
        plain = module.init_cache(2, prompt + new)
        module(x, cache=plain)
        if form != "state":
            assert cache.nbytes < 0.7 * plain.nbytes or "sliding_window" in options
            cache.truncate(prompt + 2)
            y = own(x[:, prompt + 2 : prompt + 4], cache=cache)
            assert_equal({"y": y}, {"y": expected[:, prompt + 2 : prompt + 4]}, (name, form, "again"))
            with pytest.raises(ValueError, match="length must be 0 or lie between"):
                cache.truncate(3)
            with pytest.raises(ValueError, match="cache is full"):
                own(x[:, :7], cache=cache)
            assert cache.length == prompt + 4


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("gqa", "gather", {}), ("gqa", "ring", {"sink": "learned"}), ("gqa", "heads", {"sliding_window": 5}),
        ("mqa", "ring", {"alibi": True, "rope": None}), ("gta", "ring", {}), ("mla", "heads", {"absorb": False}),
        ("kha-gta", "gather", {"knock_scope": "value"}), ("mla", "ring", {}), ("mla with biases", "gather", {}),
        ("dcmha", "gather", {}),
        ("dcmha", "ring", {}), ("talking-heads", "ring", {}), ("eit", "gather", {}), ("moh", "gather", {}),
        ("gated", "heads", {}), ("diff", "gather", {}), ("linear", "state", {}), ("mhla-heads", "state", {}),
        ("moa", "gather", {}), ("tpa", "gather", {}), ("tpa-kv", "gather", {"sliding_window": 5}),
        ("sigmoid", "gather", {}), ("sigmoid", "gather", {"alibi": True, "rope": None}),
        ("sigmoid-learned", "gather", {"sliding_window": 5}),
    ],
)  # fmt: skip
def test_decoding_from_a_sharded_cache(name, form, options, layout, two):
    two.run(check_decoding, name, form, layout, options)
