"""Masks against their sentences, pair by pair."""

import itertools
import pickle
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo import AttentionMask
from attnzoo.masks import Visibility, as_mask

CPU = torch.device("cpu")


def dense(mask, shape, *, causal=False, window=None, sink_tokens=0, query_start=None, key_positions=None):
    """What a `Visibility` says, as a full (B, H, T, S) tensor."""
    view = Visibility(causal, window, sink_tokens, mask, query_start, key_positions)
    made = view.dense(shape, torch.device("cpu"))
    return torch.ones(shape, dtype=torch.bool) if made is None else made.expand(shape)


def pair_by_pair(shape, see):
    out = torch.zeros(shape, dtype=torch.bool)
    for index in itertools.product(*map(range, shape)):
        out[index] = see(*index)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("S", [5, 8])
def test_causality_window_and_sink_tokens(causal, window, sink_tokens, S):
    def see(b, h, t, j):
        i = t + S - 5
        inside = window is None or abs(i - j) < window or j < sink_tokens
        return inside and (j <= i or not causal)

    shape = (1, 1, 5, S)
    assert torch.equal(
        dense(None, shape, causal=causal, window=window, sink_tokens=sink_tokens), pair_by_pair(shape, see)
    )
    view = Visibility(causal, window, sink_tokens)
    for first in range(5):
        keys = view.keys_of(slice(first, first + 1), 5, S)
        assert not any(see(0, 0, first, j) for j in {*range(S)} - {*range(S)[keys]})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_padding_packing_and_dense_together(data):
    B, H, T = (data.draw(st.integers(1, n)) for n in (3, 2, 7))
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    cuts = sorted(data.draw(st.lists(st.integers(0, B * T), max_size=4)))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=T * T, max_size=T * T))).view(T, T)
    causal = data.draw(st.booleans())
    window = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    sink_tokens = data.draw(st.integers(0, 2)) if window is not None else 0
    ends = sorted({0, *cuts, *range(0, B * T + 1, T)})

    def document(b, t):
        return max(e for e in ends if e <= b * T + t)

    def see(b, h, i, j):
        if j >= lengths[b] or document(b, i) != document(b, j) or not keep[i, j] or (causal and j > i):
            return False
        first = document(b, i) - b * T
        return window is None or abs(i - j) < window or j - first < sink_tokens

    mask = AttentionMask.padding(lengths) & AttentionMask.packed([0, *cuts, B * T]) & keep
    shape = (B, H, T, T)
    made = dense(mask, shape, causal=causal, window=window, sink_tokens=sink_tokens)
    assert torch.equal(made, pair_by_pair(shape, see))


def test_a_ring_buffer_names_the_index_of_each_key():
    held = torch.tensor([6, 7, 3, 4, 5])
    made = dense(None, (1, 1, 1, 5), causal=True, window=4, query_start=7, key_positions=held)
    assert made.flatten().tolist() == [True, True, False, True, True]
    padded = dense(AttentionMask.padding([5]), (1, 1, 1, 5), causal=True, query_start=7, key_positions=held)
    assert padded.flatten().tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("packing", "positions"),
    [
        ([0, 3, 10], [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
        ([0, 7, 10], [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]),
        ([0, 5, 5, 6, 10], [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]),
        ([0, 10], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
    ],
)
def test_positions_restart_in_each_document(packing, positions):
    assert AttentionMask.packed(packing).positions(2, 5).tolist() == positions


def test_positions_are_none_without_packing():
    assert AttentionMask.padding([3]).positions(1, 4) is None


def test_joining_takes_the_narrower_of_both():
    joined = AttentionMask.padding([4, 2]) & AttentionMask.padding([3, 5])
    assert joined.lengths.tolist() == [3, 2]
    packed = AttentionMask.packed([0, 4, 8]) & AttentionMask.packed([0, 6, 8])
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 8]
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    assert (AttentionMask.dense(a) & b).dense_mask.tolist() == [True, False, False]
    with pytest.raises(TypeError, match="unsupported operand"):
        AttentionMask.padding([1]) & [True]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (AttentionMask.padding([1, 2]), AttentionMask.padding([1, 2, 3]), r"lengths .* got \(2,\) and \(3,\)"),
        (AttentionMask.padding([3]), AttentionMask.padding([1, 2]), r"lengths .* got \(1,\) and \(2,\)"),
        (
            AttentionMask.dense(torch.ones(6, 6).bool()), torch.ones(1, 5, 5).bool(),
            r"broadcast to one shape, got \(6, 6\) and \(1, 5, 5\)",
        ),
        (AttentionMask.packed([0, 3, 11]), AttentionMask.packed([0, 5, 12]), "cu_seqlens .* one end, got 11 and 12"),
    ],
)  # fmt: skip
def test_masks_of_other_shapes_are_not_joined(a, b, message):
    with pytest.raises(ValueError, match=message):
        a & b


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_integers_that_torch_cannot_compare_are_refused(dtype):
    with pytest.raises(ValueError, match=f"lengths must be a 1-D integer tensor, got {dtype}"):
        AttentionMask.padding(torch.tensor([3, 4]).to(dtype))
    attn = attnzoo.MultiHeadAttention(8, 2)
    with pytest.raises(ValueError, match="positions must be an integer tensor"):
        attn(torch.randn(1, 3, 8), positions=torch.arange(3).to(dtype))
    with pytest.raises(ValueError, match="index must hold 2 integers"):
        attn.init_cache(2, 4).reorder(torch.tensor([1, 0]).to(dtype))
    with pytest.raises(ValueError, match="cu_seqlens must hold integers of at most 2147483647"):
        AttentionMask.packed([0, 2**40])


def test_what_is_remembered_belongs_to_the_sizes_and_rules():
    """One mask through layers of different sizes, windows and batch: never an earlier call's answer."""
    mask = AttentionMask.packed([0, 3, 8])
    calls = [
        ((1, 1, 8, 8), {"causal": True}),
        ((1, 2, 8, 8), {"causal": False}),
        ((1, 1, 8, 8), {"causal": True, "window": 2}),
        ((1, 1, 8, 8), {"causal": True, "window": 2, "sink_tokens": 1}),
        ((2, 1, 4, 4), {"causal": True}),
    ]
    for _ in range(2):
        for shape, rules in calls:
            fresh = dense(AttentionMask.packed([0, 3, 8]), shape, **rules)
            assert torch.equal(dense(mask, shape, **rules), fresh)
    assert mask.positions(1, 8).tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert mask.positions(2, 4).tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]


def test_a_mask_is_copied_pickled_and_moved():
    mask = AttentionMask.padding([3, 1]) & torch.ones(4, 4, dtype=torch.bool).tril()
    for copy in (deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to("cpu")):
        assert torch.equal(dense(copy, (2, 1, 4, 4)), dense(mask, (2, 1, 4, 4)))
    assert mask.to("meta").lengths.device.type == "meta"
    assert repr(mask) == "AttentionMask(lengths=(2,), dense_mask=(4, 4))"


def test_as_mask():
    keep = torch.ones(3, 3, dtype=torch.bool)
    assert as_mask(keep).dense_mask is keep
    assert as_mask(None) is None
    mask = AttentionMask.padding([1])
    assert as_mask(mask) is mask


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionMask.padding(torch.tensor([1.0])), "lengths must be a 1-D integer tensor, got torch.float32"),
        (lambda: AttentionMask.padding(torch.tensor([[1]])), r"lengths must be a 1-D integer tensor, got .*\(1, 1\)"),
        (lambda: AttentionMask.padding(torch.tensor([True])), "lengths must be a 1-D integer tensor, got torch.bool"),
        (lambda: AttentionMask.padding([3, -1]), "lengths must not be negative, got -1"),
        (lambda: AttentionMask.packed([1, 4]), "cu_seqlens must start at 0, got 1"),
        (lambda: AttentionMask.packed([0, 4, 3]), r"cu_seqlens must not decrease, got \[0, 4, 3\]"),
        (lambda: AttentionMask.packed(torch.tensor([0, 4])), "cu_seqlens must be a 1-D int32 tensor, got torch.int64"),
        (lambda: AttentionMask.packed([]), "cu_seqlens must be a 1-D int32 tensor"),
        (lambda: AttentionMask.dense(torch.zeros(3, 3)), "mask must be boolean .*, got torch.float32"),
        (lambda: AttentionMask.dense(None), "mask must be a tensor, got None"),
        (lambda: as_mask([True]), "mask must be a boolean tensor or an AttentionMask, got list"),
    ],
)
def test_a_mask_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "shape", "message"),
    [
        (AttentionMask.padding([3]), (2, 1, 4, 4), "lengths must have one entry a row, got 1 for 2"),
        (AttentionMask.padding([3, 5]), (2, 1, 4, 4), "lengths must be at most the 4 keys, got 5"),
        (AttentionMask.packed([0, 4]), (2, 1, 4, 4), r"cu_seqlens must end at B \* T = 8 tokens, got 4"),
        (AttentionMask.packed([0, 4]), (1, 1, 4, 6), "a packed mask needs as many queries as keys, got 4 .* 6"),
        (AttentionMask.dense(torch.ones(3, 4, dtype=torch.bool)), (1, 1, 4, 4), r"broadcast .*got shape \(3, 4\)"),
        (AttentionMask.dense(torch.ones(1, 1, 1, 4, 4, dtype=torch.bool)), (1, 1, 4, 4), "mask must broadcast"),
        (AttentionMask.dense(torch.ones(2, 5, dtype=torch.bool)), (2, 1, 4, 5), r"give mask\[:, None, None\]$"),
        (AttentionMask.padding(torch.tensor([3], device="meta")), (1, 1, 4, 4), "mask must be on the device"),
    ],
)
def test_a_mask_that_does_not_fit_the_call_is_refused(mask, shape, message):
    with pytest.raises(ValueError, match=message):
        dense(mask, shape)
