"""Decoding from a cache that is spread over several processes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
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


def check_copies() -> None:
    """A copy of a cache continues alone, and one made in inference mode continues outside it."""
    x, _ = inputs(20)
    module = parallelize(made("gqa").eval(), SequenceParallel(None, form="gather", layout="zigzag"))
    expected = made("gqa").eval()(x)
    with torch.inference_mode():
        cache = module.init_cache(2, 20)
        module(shard(x[:, :16], 1, module.sequence_parallel), cache=cache)
        copied = copy.deepcopy(cache)
    with torch.no_grad():
        for one in (cache, copied, copy.deepcopy(copied)):
            for at in range(one.length, 20):
                y = module(x[:, at : at + 1], cache=one)
                assert_equal({"y": y}, {"y": expected[:, at : at + 1]}, at)
            assert one.length == 20
            one.truncate(16)
            module(x[:, :1], cache=one)


def test_copies_go_on(two):
    two.run(check_copies)


def check_other_processes() -> None:
    """A cache is of the processes that its module had; refused, it stays as it was."""
    x, _ = inputs(16)
    module = parallelize(made("gqa").eval(), SequenceParallel(None, form="gather", layout="zigzag"))
    cache = module.init_cache(2, 20)
    with torch.no_grad():
        module(shard(x, 1, module.sequence_parallel), cache=cache)
        with pytest.raises(ValueError, match="of one process, got one that is spread over several"):
            copy.deepcopy(module)(x[:, :1], cache=cache)
        other = SequenceParallel(dist.new_group([0, 1]), form="gather", layout="zigzag")
        with pytest.raises(ValueError, match="after the module was parallelized, got one of another group"):
            parallelize(copy.deepcopy(module), other)(x[:, :1], cache=cache)
        with pytest.raises(ValueError, match="after the module was parallelized, got one of another group"):
            module(x[:, :1], cache=pickle.loads(pickle.dumps(cache)))
        for length in ("16", 16.5, True, None):
            with pytest.raises(ValueError, match="length must be 0 or lie between"):
                cache.truncate(length)  # type: ignore[arg-type]
        assert cache.length == 16
        assert module(x[:, :1], cache=cache).shape == (2, 1, x.shape[2])


def test_a_cache_of_other_processes_is_refused(two):
    two.run(check_other_processes)
