"""The backward pass of a chunk is that of what its forward pass saw, whatever is overwritten in between."""

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask
from attnzoo.ops.chunks import tensor_now
from tests.zoo import E, build, names

B, T = 2, 11
CHUNKED = [name for name in names() if hasattr(build(name), "chunk_size") and build(name).has_patterns]
CACHED = [name for name in CHUNKED if name in ("sigmoid", "mta", "selective")]
FILLINGS = {
    "lengths": (AttentionMask.padding, torch.tensor([T, 6]), torch.tensor([3, 4])),
    "cu_seqlens": (
        AttentionMask.packed,
        torch.tensor([0, 4, T, 15, 2 * T], dtype=torch.int32),
        torch.tensor([0, 7, T, 12, 2 * T], dtype=torch.int32),
    ),
    "real queries": (
        lambda real: AttentionMask(real_queries=real),
        torch.arange(2 * T).view(2, T) % 3 > 0,
        torch.arange(2 * T).view(2, T) % 3 == 0,
    ),
    "dense": (AttentionMask.dense, torch.eye(T).bool() | (torch.arange(T) % 3 > 0), torch.eye(T).bool()),
}


def derived(y, x, module, *, again=False):
    """Gradients of a random sum of y by x and by all parameters."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return torch.autograd.grad((y * weight).sum(), wanted, retain_graph=again, allow_unused=True)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_these_mechanisms_have_chunks():
    assert {"dcmha", "mta", "rcmha", "selective", "sigmoid", "talking-heads"} <= set(CHUNKED)
    assert len(CACHED) == 3


@pytest.mark.parametrize("kind", FILLINGS)
@pytest.mark.parametrize("name", CHUNKED)
def test_a_mask_that_is_refilled_before_the_backward_pass(name, kind):
    make, values, later = FILLINGS[kind]
    module, buffer = build(name), values.clone()
    x = torch.randn(B, T, E, dtype=torch.float64, requires_grad=True)
    y = module(x, mask=make(buffer))
    expected = derived(y, x, module, again=True)
    buffer.copy_(later)
    assert_equal(derived(y, x, module), expected)


def test_refilled_lengths_where_forgotten_keys_are_left_out():
    module = attnzoo.ForgettingAttention(8, 2, prune_tolerance=-1.0, dtype=torch.float64)
    starts = torch.tensor([0, 200, 300], dtype=torch.int32)
    x = torch.randn(1, 300, 8, dtype=torch.float64, requires_grad=True)
    y = module(x, mask=AttentionMask.packed(starts))
    expected = derived(y, x, module, again=True)
    starts.copy_(torch.tensor([0, 20, 300]))
    assert_equal(derived(y, x, module), expected)


@pytest.mark.parametrize("change", ["append", "reorder", "reset"])
@pytest.mark.parametrize("name", CACHED)
def test_a_cache_that_goes_on_before_the_backward_pass(name, change):
    module = build(name)
    x = torch.randn(B, T, E, dtype=torch.float64, requires_grad=True)
    cache = module.init_cache(B, 4 * T)
    with torch.no_grad():
        module(torch.randn(B, 3, E, dtype=torch.float64), cache=cache)
    y = module(x, cache=cache)
    expected = derived(y, x, module, again=True)
    if change == "reorder":
        cache.reorder(torch.tensor([1, 0]))
    elif change == "reset":
        cache.reset()
    with torch.no_grad():
        module(torch.randn(B, 2 * T, E, dtype=torch.float64), cache=cache)
    assert_equal(derived(y, x, module), expected)


def test_a_copy_is_not_larger_than_what_is_stored():
    mask = torch.rand(1, 1, 3, 4).gt(0.5).expand(5, 6, 3, 4)
    copy = tensor_now(mask)
    assert torch.equal(copy, mask)
    assert copy.untyped_storage().nbytes() == 12
    assert copy.data_ptr() != mask.data_ptr()
