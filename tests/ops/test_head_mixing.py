"""Shared head maps: the equations, one head at a time."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from attnzoo.ops.head_mixing import compose_projection, knock_linear, knock_mlp

D = 5


def test_every_head_passes_the_same_matrix():
    z, weight = torch.randn(2, 3, 7, D).double(), torch.randn(D, D).double()
    expected = torch.stack([weight @ vector for vector in z.view(-1, D)]).view_as(z)
    torch.testing.assert_close(knock_linear(z, weight), expected, atol=1e-13, rtol=0)


def test_the_gated_network_is_twice_up_times_gate_then_down():
    z, up, gate, down = (torch.randn(s).double() for s in ((2, 3, D), (D, D), (D, D), (D, D)))
    vectors = [2 * down @ ((up @ x) * (gate @ x).sigmoid()) for x in z.view(-1, D)]
    torch.testing.assert_close(knock_mlp(z, up, gate, down), torch.stack(vectors).view_as(z), atol=1e-13, rtol=0)


def test_its_start_is_the_identity_bit_for_bit():
    z, one = torch.randn(4, 9, D), torch.eye(D)
    assert torch.equal(knock_mlp(z, one, torch.zeros(D, D), one), z)


def test_derivatives():
    z, up, gate, down = (torch.randn(s).double().requires_grad_() for s in ((3, D), (D, D), (D, D), (D, D)))
    for check in (gradcheck, gradgradcheck):
        assert check(knock_mlp, (z, up, gate, down))
        assert check(knock_linear, (z, up))


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_and_a_map_are_one_projection(bias):
    x, weight, head_map = torch.randn(2, 4, 11).double(), torch.randn(3 * D, 11).double(), torch.randn(D, D).double()
    offset = torch.randn(3 * D).double() if bias else None
    composed, shifted = compose_projection(weight, offset, head_map)
    heads = torch.nn.functional.linear(x, weight, offset).unflatten(-1, (3, D))
    expected = knock_linear(heads, head_map).flatten(-2)
    torch.testing.assert_close(torch.nn.functional.linear(x, composed, shifted), expected, atol=1e-12, rtol=0)


def test_the_gated_network_stores_its_input_and_the_gated_pair_only():
    z = torch.randn(100, D, requires_grad=True)
    up, gate, down = (torch.randn(D, D, requires_grad=True) for _ in range(3))
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add((x.data_ptr(), x.numel())) or x, lambda x: x):
        knock_mlp(z, up, gate, down)
    # z, the pair (2 D a row) and the gated product (D a row), and matrices.
    assert sum(n for _, n in saved if n >= 100 * D) <= 4 * 100 * D
