"""Bytes that a sequence over several processes sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import attnzoo
from attnzoo.distributed import SequenceParallel, counting_traffic, parallelize, shard
from attnzoo.distributed.costs import bytes_sent
from tests.distributed.comparison import (
    ALL,
    FORMS,
    inputs,
    made,
)


def check_bytes(name: str, form: str, sent: dict[str, int], **options: Any) -> None:
    """Bytes sent against formulas of P, T, b and the mechanism's sizes."""
    module = parallelize(made(name, **options), SequenceParallel(None, form=form, layout="contiguous"))
    sp, T = module.sequence_parallel, 28 if "mhla" not in name else 40
    x, w = inputs(T, batch=1)
    own = shard(x, 1, sp).requires_grad_()
    with counting_traffic() as forward:
        y = module(own)
    with counting_traffic() as backward:
        (y * shard(w, 1, sp)).sum().backward()
    assert {"forward": forward.sent, "backward": backward.sent} == sent, (name, form)


@pytest.mark.parametrize("name", [*FORMS, "dcmha by groups"])
def test_bytes_are_those_of_the_formulas(name, two):
    T = 40 if "mhla" in name else 28
    for form in sorted(FORMS.get(name, ALL)):
        sent = bytes_sent(made(name), form, T, 2, torch.float64)
        two.run(check_bytes, name, form, dict(zip(("forward", "backward"), sent, strict=True)))


def check_windows(name: str, windows: tuple[int, ...]) -> None:
    for window in windows:
        for options in ({}, {"sink_tokens": 1}, {"causal": False}):
            if options and name == "dcmha":
                continue
            own: dict[str, Any] = {"sliding_window": window, **options}
            sent = bytes_sent(made(name, **own), "ring", 28, dist.get_world_size(), torch.float64)
            check_bytes(name, "ring", dict(zip(("forward", "backward"), sent, strict=True)), **own)


@pytest.mark.parametrize("name", ["gqa", "gated", "dcmha"])
def test_a_ring_sends_no_farther_than_a_window_reaches(name, two):
    two.run(check_windows, name, (1, 2, 28))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "dcmha"])
def test_windows_of_four(name, four):
    four.run(check_windows, name, (1, 2, 8, 9, 16, 28))


def test_formulas_in_numbers():
    """T 131072, P 8, bfloat16, D = Dv = 128, in GB of the forward pass."""
    options: dict[str, Any] = {"head_dim": 128, "device": "meta"}
    latent = attnzoo.MultiHeadLatentAttention(
        4096, 128, 512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, device="meta"
    )
    for module, form, gigabytes in (
        (attnzoo.MultiHeadAttention(4096, 32, **options), "ring", 1.88),
        (attnzoo.MultiHeadAttention(4096, 32, **options), "heads", 0.47),
        (attnzoo.GroupedQueryAttention(4096, 32, 8, **options), "ring", 0.47),
        (attnzoo.GroupedQueryAttention(4096, 32, 8, **options), "heads", 0.29),
        (attnzoo.MultiQueryAttention(4096, 32, **options), "ring", 0.06),
        (attnzoo.GroupedTiedAttention(4096, 32, 4, **options), "ring", 0.13),
        (latent, "ring", 0.13),
        (attnzoo.DynamicallyComposableAttention(4096, 32, rank=2, **options), "gather", 1.95),
        (attnzoo.DynamicallyComposableAttention(4096, 32, rank=2, **options), "ring", 2.93),
        (attnzoo.LinearAttention(4096, 32, **options), "state", 0.015),
        (attnzoo.MultiHeadLinearAttention(4096, 32, 8, block_size=64, num_blocks=2048, **options), "state", 0.94),
        (attnzoo.MultiHeadLinearAttention(4096, 32, 8, block_size=256, num_blocks=512, **options), "state", 0.23),
    ):
        sent = bytes_sent(module, form, 131072, 8)[0] / 1e9
        assert abs(sent - gigabytes) <= 0.005 * max(1, gigabytes), (type(module).__name__, form, sent)
