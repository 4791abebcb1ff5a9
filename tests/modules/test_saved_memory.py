"""What a training forward keeps for its backward pass grows with the length, not with its square."""

import pytest
import torch

from tests.zoo import E, build

LINEAR_IN_TOKENS = ("gqa", "tpa", "tpa-kv", "sigmoid", "sigmoid-learned")


def saved_bytes(name, tokens, **options):
    """Bytes of every storage that is kept, parameters left out, each counted once."""
    module = build(name, dtype=torch.float32, **options)
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = module(torch.randn(1, tokens, E, requires_grad=True))
    del y
    return sum(size for pointer, size in kept.items() if pointer not in known)


@pytest.mark.parametrize("name", LINEAR_IN_TOKENS)
def test_twice_the_tokens_keep_twice_the_memory(name):
    once, twice = saved_bytes(name, 512), saved_bytes(name, 1024)
    assert 1.5 * once <= twice <= 2.05 * once


@pytest.mark.parametrize("name", LINEAR_IN_TOKENS)
def test_the_definition_keeps_its_scores(name):
    once, twice = (saved_bytes(name, tokens, backend="eager") for tokens in (512, 1024))
    assert twice > 3 * once
