"""Caches as containers: what is held, at which index, and what is refused. Decoding is in the contract tests."""

import pytest
import torch

from attnzoo.cache import ForgettingCache, KeyValueCache, TiedCache, UntiedCache


def numbered(start, count, heads=1, width=1):
    """States whose value is the index of their token."""
    return torch.arange(start, start + count).float().view(1, count, 1, 1).expand(1, count, heads, width)


def test_a_linear_cache_returns_everything_in_order():
    cache = KeyValueCache(1, 8, ((1, 1), (1, 2)))
    for start, count in ((0, 3), (3, 1), (4, 4)):
        k, v, positions = cache.append(numbered(start, count), numbered(start, count, width=2))
        assert k.flatten().tolist() == list(range(start + count))
        assert v[0, :, 0, 1].tolist() == list(range(start + count))
        assert positions is None
    assert cache.length == 8
    assert cache.nbytes == 8 * 3 * 4


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 1, 1, 5), (2, 3, 7), (12,), (3, 1, 0, 8)])
@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_a_ring_buffer_holds_what_the_next_query_may_see(sizes, sink_tokens):
    window = 3
    cache = KeyValueCache(1, 12, ((1, 1), (1, 1)), window=window, sink_tokens=sink_tokens)
    assert cache.capacity == window + sink_tokens
    start = 0
    for count in sizes:
        k, v, positions = cache.append(numbered(start, count), numbered(start, count))
        # Each key's index is the token it came from ...
        assert k.flatten().tolist() == positions.tolist() == v.flatten().tolist()
        # ... nothing comes twice, and every new query finds its window and the sinks.
        assert len(set(positions.tolist())) == len(positions)
        for i in range(start, start + count):
            visible = {j for j in range(i + 1) if i - j < window or j < sink_tokens}
            assert visible <= set(positions.tolist())
        start += count
    assert cache.length == 12
    assert cache.buffers[0].shape[2] == window + sink_tokens


def test_tied_caches_hold_the_key_inside_the_value():
    cache = TiedCache(1, 4, ((2, 6), (1, 3)))
    v, rotary = torch.randn(1, 2, 2, 6), torch.randn(1, 2, 1, 3)
    k, held, k_rope, positions = cache.append(v[..., :4], v, rotary)
    assert torch.equal(held, v)
    assert torch.equal(k, v[..., :4])
    assert torch.equal(k_rope, rotary)
    assert positions is None
    assert cache.nbytes == 4 * (2 * 6 + 3) * 4
    apart = UntiedCache(1, 4, ((2, 4), (2, 6), (1, 3)))
    key = torch.randn(1, 2, 2, 4)
    assert torch.equal(apart.append(key, v, rotary)[0], key)
    assert apart.nbytes == 4 * (2 * 4 + 2 * 6 + 3) * 4


def test_truncate_and_reset_forget_from_the_end():
    cache = KeyValueCache(1, 6, ((1, 1), (1, 1)))
    cache.append(numbered(0, 5), numbered(0, 5))
    cache.truncate(2)
    k, _, _ = cache.append(numbered(7, 1), numbered(7, 1))
    assert k.flatten().tolist() == [0, 1, 7]
    cache.reset()
    assert cache.append(numbered(9, 1), numbered(9, 1))[0].flatten().tolist() == [9]


def test_reorder_takes_whole_rows():
    cache = KeyValueCache(3, 2, ((1, 1), (1, 1)))
    rows = torch.arange(3).float().view(3, 1, 1, 1)
    cache.append(rows, rows)
    cache.reorder(torch.tensor([2, 0, 0]))
    k, _, _ = cache.append(rows, rows)
    assert k[:, 0].flatten().tolist() == [2, 0, 0]
    assert k[:, 1].flatten().tolist() == [0, 1, 2]


def test_every_buffer_gets_its_states():
    cache = ForgettingCache(1, 4, ((1, 1), (1, 1), (2, 1)))
    k, v, gates = numbered(0, 2), numbered(0, 2), numbered(0, 2, heads=2)
    cache.check_fits(k, v)
    for few in ((k, v), (k,)):
        with pytest.raises(ValueError, match="zip"):
            cache.append(*few)
    assert cache.length == 0
    assert cache.append(k, v, gates)[2].shape == (1, 2, 2, 1)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (numbered(0, 2), numbered(0, 1), "cache was made for states"),
        (numbered(0, 2, heads=2), numbered(0, 2), r"cache was made for .*\(1, 2, 1, 1\).* got \(1, 2, 2, 1\)"),
        (numbered(0, 2).double(), numbered(0, 2).double(), "float32 .*got .*float64"),
        (numbered(0, 5), numbered(0, 5), "cache is full: 1 cached and 5 new tokens exceed its max_length 4"),
    ],
)
@pytest.mark.parametrize("window", [None, 3])
def test_what_does_not_fit_is_refused_and_changes_nothing(k, v, message, window):
    cache = KeyValueCache(1, 4, ((1, 1), (1, 1)), window=window)
    cache.append(numbered(3, 1), numbered(3, 1))
    before = [stream.clone() for stream in cache.buffers]
    with pytest.raises(ValueError, match=message):
        cache.append(k, v)
    assert cache.length == 1
    assert all(torch.equal(a, b) for a, b in zip(before, cache.buffers, strict=True))


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (-1, 4, "batch_size must not be negative, got -1"),
        (1, 0, "max_length must be at least 1, got 0"),
        (True, 4, "batch_size must be an integer, got True"),
        (1, 2.5, "max_length must be an integer, got 2.5"),
    ],
)
def test_sizes_without_meaning_are_refused(batch, length, message):
    with pytest.raises(ValueError, match=message):
        KeyValueCache(batch, length, ((1, 1), (1, 1)))
