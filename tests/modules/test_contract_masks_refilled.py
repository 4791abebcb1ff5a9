"""A mask says what its tensors say now: whoever refills them gets what a new mask would give, and nothing is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnzoo import AttentionMask
from attnzoo.modules.chai import ClusteredHeadAttention
from tests.zoo import MECHANISMS, OPTIONS, E, H, build, cases, names

B, T = 2, 11
MASKS: dict[str, Callable[[Tensor], AttentionMask]] = {
    "lengths": AttentionMask.padding,
    "cu_seqlens": AttentionMask.packed,
    "dense": AttentionMask.dense,
}
NEEDS = {"lengths": (), "cu_seqlens": (), "dense": ("dense mask",)}
CASES = [
    (name, option, kind)
    for kind, needs in NEEDS.items()
    for name, option in cases(*needs)
    if option in ("plain", "window-sinks", "alibi")
]

# Ways to write new values into a tensor; the last two leave no trace that the tensor itself could show.
REFILLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda tensor, values: tensor.copy_(values),
    "numpy": lambda tensor, values: tensor.numpy().__setitem__(..., values.numpy()),
    "data": lambda tensor, values: tensor.data.copy_(values),
}


def make(name: str, option: str = "plain") -> nn.Module:
    """A mechanism with a named option in float64; the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if name == "chai":
            return ClusteredHeadAttention(build("mha", **OPTIONS[option]), 2, probe_tokens=3).eval()
        return build(name, **OPTIONS[option])


def fillings(kind: str) -> tuple[Tensor, ...]:
    """Three values for such a mask of (B, H, T, T), each of which gives another output."""
    if kind == "lengths":
        return torch.tensor([T, 6]), torch.tensor([3, 4]), torch.tensor([5, T])
    if kind == "cu_seqlens":
        rows = ([0, 4, T, 15, B * T], [0, 7, T, 12, B * T], [0, 2, 3, 19, B * T])
        return tuple(torch.tensor(row, dtype=torch.int32) for row in rows)
    keep = torch.rand(3, B, 1, T, T) < 0.6
    # Every key stays visible to some query, so that no row's probe of clustered heads loses tokens.
    return tuple(keep | torch.eye(T, dtype=torch.bool))


@torch.no_grad()
def assert_follows(module: nn.Module, kind: str, refill: Callable[[Tensor, Tensor], object]) -> None:
    """One mask, refilled between calls, gives what new masks give."""
    x = torch.randn(B, T, E, dtype=torch.float64)
    first, *others = fillings(kind)
    tensor = first.clone()
    mask = MASKS[kind](tensor)
    outputs = [module(x, mask=mask)]
    for values in (*others, first):
        refill(tensor, values)
        outputs.append(module(x, mask=mask))
        assert torch.equal(outputs[-1], module(x, mask=MASKS[kind](values.clone())))
        assert not torch.equal(outputs[-1], outputs[-2])
    assert torch.equal(outputs[-1], outputs[0])


@pytest.mark.parametrize("refill", REFILLS)
@pytest.mark.parametrize(("name", "option", "kind"), CASES)
def test_a_refilled_mask_is_a_new_mask(name: str, option: str, kind: str, refill: str) -> None:
    assert_follows(make(name, option), kind, REFILLS[refill])


@pytest.mark.parametrize("kind", ["lengths", "dense"])
def test_clustered_heads_follow_a_refilled_mask(kind: str) -> None:
    assert_follows(make("chai"), kind, REFILLS["numpy"])


@pytest.mark.parametrize("name", names("dense mask"))
def test_a_refilled_part_of_a_combined_mask_counts(name: str) -> None:
    module, x = make(name), torch.randn(B, T, E, dtype=torch.float64)
    lengths, keep = torch.tensor([T, 6]), torch.rand(B, 1, T, T) < 0.6
    mask = AttentionMask.padding(lengths) & keep
    module(x, mask=mask)
    lengths.copy_(torch.tensor([4, 5]))
    keep.logical_not_()
    assert torch.equal(module(x, mask=mask), module(x, mask=AttentionMask.padding([4, 5]) & keep.clone()))


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mask_refilled_during_decoding_counts(name: str) -> None:
    module, x = make(name), torch.randn(B, T, E, dtype=torch.float64)
    lengths, outputs = torch.tensor([6, 6]), []
    mask = AttentionMask.padding(lengths)
    with torch.no_grad():
        for row in range(2):
            cache = module.init_cache(B, T)
            module(x[:, :6], cache=cache)
            lengths.copy_(torch.tensor([T, 8] if row else [9, T]))
            outputs.append(module(x[:, 6:], mask=mask, cache=cache))
            fresh = module.init_cache(B, T)
            module(x[:, :6], cache=fresh)
            assert torch.equal(outputs[-1], module(x[:, 6:], mask=AttentionMask.padding(lengths.clone()), cache=fresh))
    assert not torch.equal(*outputs)


REFUSED = {
    "lengths": torch.tensor([T, T + 1]),
    "cu_seqlens": torch.tensor([0, 4, 5, 6, B * T - 1], dtype=torch.int32),
}


def outcome(module: nn.Module, x: Tensor, mask: AttentionMask) -> str:
    """The words of a refusal, or "taken"."""
    try:
        module(x, mask=mask)
    except ValueError as refusal:
        return str(refusal)
    return "taken"


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", MECHANISMS)
def test_what_a_new_mask_would_refuse_a_refilled_one_refuses(name: str, kind: str) -> None:
    module, x, tensor = make(name), torch.randn(B, T, E, dtype=torch.float64), fillings(kind)[0]
    mask = MASKS[kind](tensor)
    assert outcome(module, x, mask) == "taken"
    tensor.copy_(REFUSED[kind])
    fresh = outcome(module, x, MASKS[kind](REFUSED[kind]))
    assert outcome(module, x, mask) == fresh
    assert fresh != "taken" or kind == "lengths"


# What is kept


def left_by(call: Callable[[], object], queries: int, keys: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a call leaves alive which have an entry for every (query, key) of some row."""
    # What is frozen is not listed, so that only what the call has made is looked through.
    gc.freeze()
    try:
        call()
        made = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.ndim >= 3]
        return [tuple(tensor.shape) for tensor in made if tensor.shape[-2:] == (queries, keys)]
    finally:
        gc.unfreeze()


@torch.no_grad()
@pytest.mark.parametrize(("name", "option", "kind"), [case for case in CASES if case[1] != "alibi"])
def test_a_mask_keeps_no_entry_for_every_pair(name: str, option: str, kind: str) -> None:
    module, tokens = make(name, option), 43
    x = torch.randn(B, tokens, E, dtype=torch.float64)
    value = {
        "lengths": torch.tensor([tokens, 20]),
        "cu_seqlens": torch.tensor([0, 20, tokens, 60, B * tokens], dtype=torch.int32),
        "dense": torch.rand(B, H, tokens, tokens) < 0.7,
    }[kind]
    mask = MASKS[kind](value)
    assert left_by(lambda: module(x, mask=mask), tokens, tokens) == []
    assert left_by(lambda: setattr(mask, "kept", module(x)[..., :1] * value.new_zeros(tokens)), tokens, tokens) != []
