"""What a sequence over several processes cannot do, and what ends it."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import attnzoo
from attnzoo import AttentionMask
from attnzoo.distributed import SequenceParallel, parallelize, shard, unshard
from attnzoo.distributed.sequence import forms_of
from tests.distributed.comparison import (
    E,
    made,
)


def refusal(name: str, form: str, layout: str, options: dict[str, Any], call: dict[str, Any], tokens: int) -> str:
    try:
        module = parallelize(made(name, **options), SequenceParallel(None, form=form, layout=layout))
        if tokens:
            module.train()(torch.zeros(2, tokens, E, dtype=torch.float64), **call)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("name", "form", "layout", "options", "call", "tokens", "message"),
    [
        ("gqa", "state", "zigzag", {}, {}, 0, "form must be one of heads, ring, gather or auto"),
        ("linear", "ring", "zigzag", {}, {}, 0, "its tokens are summed into states"),
        ("eit", "ring", "zigzag", {}, {}, 0, "form must be one of gather or auto"),
        ("talking-heads", "heads", "zigzag", {}, {}, 0, "form must be one of ring, gather or auto"),
        ("dcmha", "heads", "zigzag", {}, {}, 0, "a number of ranks that divides head_groups 1"),
        ("rcmha", "gather", "zigzag", {}, {}, 0, "its convolutions and tables of distances reach over the border"),
        ("mta", "gather", "zigzag", {}, {}, 0, "its convolutions reach over the border"),
        ("forgetting-pro", "gather", "zigzag", {}, {}, 0, "k_shift and v_shift must be False"),
        ("forgetting", "gather", "zigzag", {"prune_tolerance": -9.0}, {}, 0, "prune_tolerance must be None"),
        ("selective", "gather", "zigzag", {}, {}, 0, "what tokens drop for later ones is summed"),
        ("mae", "gather", "zigzag", {}, {}, 0, "gate_input must be 'token'"),
        ("static-context", "gather", "zigzag", {}, {}, 0, "its static tokens are no part of one sequence"),
        ("mgk-linear", "gather", "zigzag", {}, {}, 0, "attention must be 'softmax'"),
        ("gqa", "gather", "striped", {"sliding_window": 4}, {}, 0, "layout 'striped' takes windows and blocks"),
        ("linear", "state", "striped", {}, {}, 0, "layout 'striped' takes windows and blocks"),
        ("gqa", "ring", "zigzag", {"dropout": 0.1}, {}, 0, "dropout of attention weights must be 0, got 0.1"),
        ("mhla", "state", "zigzag", {}, {}, 14, "must have runs of whole blocks"),
        ("mhla", "state", "zigzag", {}, {"mask": AttentionMask.packed([0, 64])}, 16, "every document starts a new"),
        ("gqa", "gather", "zigzag", {}, {}, 7, "must be a multiple of 4 for layout 'zigzag', got 14"),
        ("gqa", "ring", "zigzag", {}, {"mask": torch.ones(8, 16, dtype=torch.bool)}, 8, "mask must not be dense"),
        ("gqa", "gather", "zigzag", {}, {"mask": torch.ones(8, 8, dtype=torch.bool)}, 8, "mask must broadcast to"),
        ("gqa", "gather", "striped", {}, {"mask": AttentionMask.packed([0, 32])}, 8, "must not be packed with layout"),
        ("gqa", "ring", "zigzag", {"causal": False, "rope": None},
         {"context": torch.zeros(2, 8, E, dtype=torch.float64)}, 8, "context needs form 'gather'"),
    ],
)  # fmt: skip
def test_refusals(name, form, layout, options, call, tokens, message, two):
    assert all(message in text for text in two.run(refusal, name, form, layout, options, call, tokens))


def check_other_sizes() -> str:
    os.environ.pop("unused", None)
    dist.set_debug_level(dist.DebugLevel.INFO)
    try:
        module = parallelize(made("gqa"), SequenceParallel(None, form="gather", layout="contiguous"))
        module(torch.zeros(1, 4, E, dtype=torch.float64))  # one of the ranks has this size again
        module(torch.zeros(1 + dist.get_rank(), 4, E, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return "nothing was refused"


def test_different_sizes_are_named_in_debug_mode(two):
    assert all("same batch and tokens on all ranks" in text for text in two.run(check_other_sizes))


def check_groups() -> None:
    ranks, whole = [dist.new_group([rank]) for rank in range(2)], dist.group.WORLD
    others = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    for group, options, message in (
        (5, {}, "a ProcessGroup or a one-dimensional DeviceMesh, got 5"),
        ("world", {}, "a ProcessGroup or a one-dimensional DeviceMesh, got 'world'"),
        (others, {}, "one-dimensional DeviceMesh, got 2 dimensions"),
        (ranks[1 - dist.get_rank()], {}, f"rank {dist.get_rank()}, as a member"),
        (DeviceMesh("cpu", [1 - dist.get_rank()], _init_backend=False), {}, f"rank {dist.get_rank()}, as a member"),
        ((3, whole), {"form": "hybrid"}, "got 3"),
        ((whole, whole), {"form": "hybrid"}, r"one rank in common, got ranks \[0, 1\] and \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SequenceParallel(group, **options)
    assert SequenceParallel((whole, ranks[dist.get_rank()]), form="hybrid").size == 2
    for sp in (None, whole):
        with pytest.raises(ValueError, match="sp must be a SequenceParallel, got"):
            parallelize(made("gqa"), sp)


def test_groups_that_are_none(two):
    two.run(check_groups)


def check_shard_arguments() -> None:
    sp, x = SequenceParallel(None, layout="zigzag"), torch.zeros(2, 8, E)
    for work in (shard, unshard):
        for arguments, message in (
            ((x, 3, sp), "dim must be one of the tensor's 3 dimensions, got 3"),
            ((x, 1.0, sp), "dim must be one of the tensor's 3 dimensions, got 1.0"),
            ((x.tolist(), 1, sp), "tensor must be a tensor"),
            ((x, 1, None), "sp must be a SequenceParallel, got None"),
        ):
            with pytest.raises(ValueError, match=message):
                work(*arguments)
    for tokens, rank, message in (
        (16.0, 0, "must be an integer and not negative, got 16.0"),
        (-16, 0, "must be an integer and not negative, got -16"),
        (16, 2, "rank must lie between 0 and 1, got 2"),
        (16, -1, "rank must lie between 0 and 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            sp.positions(tokens, rank)


def test_arguments_of_shards(two):
    two.run(check_shard_arguments)


def test_it_needs_processes():
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed to be initialized"):
        SequenceParallel(None)


class Inherits(attnzoo.GroupedQueryAttention):
    """Another forward: what its base can do says nothing about it."""

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        return super().forward(x.cumsum(1), **call)


def test_another_forward_inherits_no_form():
    assert forms_of(Inherits(E, 4)) == ()
    assert forms_of(attnzoo.MultiHeadAttention(E, 4)) == forms_of(attnzoo.GroupedQueryAttention(E, 4)) != ()


def check_copies() -> None:
    model = parallelize(nn.Sequential(made("gqa"), made("linear")), SequenceParallel(None))
    assert model[0].sequence_parallel.layout == model[1].sequence_parallel.layout == "zigzag"
    assert copy.deepcopy(model)[0].sequence_parallel is None


def test_a_copy_is_of_one_process(two):
    two.run(check_copies)


def _dies(rank: int, folder: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=5)
    )
    module = parallelize(made("gqa"), SequenceParallel(None, form="ring", layout="zigzag"))
    x = torch.zeros(2, 8, E, dtype=torch.float64)
    module(x)
    if rank == 1:
        os._exit(9)
    try:
        module(x)
    except RuntimeError as error:
        (folder / "message").write_text(str(error))
        os._exit(3)
    os._exit(0)


def test_a_killed_rank_ends_the_others(tmp_path):
    started = [
        torch.multiprocessing.get_context("fork").Process(target=_dies, args=(rank, tmp_path)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [3, 9]
    assert (tmp_path / "message").read_text()
