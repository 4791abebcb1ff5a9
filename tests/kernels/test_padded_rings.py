"""A cache whose buffer is a ring holds keys with indices beyond their number, which lengths of sequences count."""

import pytest
import torch

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = [torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2)]
OPERATIONS = {
    "softmax": lambda *call, **options: softmax_attention(*call, **options),
    "sigmoid": lambda *call, **options: sigmoid_attention(*call, logit_bias=-1.0, **options),
    "composed": lambda q, k, v, view, **options: composed_attention(
        q, k, v, *map(Composition, MIXES), view, scale=0.3, **options
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_lengths_count_tokens_and_not_places_of_a_ring(operation):
    positions = torch.tensor([20, 21, 22, 23, 24, 17, 18, 19], device=DEVICE)
    view = Visibility(
        window=7,
        mask=AttentionMask(lengths=torch.tensor([25, 22, 24], device=DEVICE)),
        query_start=23,
        key_positions=positions,
    )
    tensors = [torch.randn(3, length, heads, 16, device=DEVICE) for length, heads in ((2, 4), (8, 4), (8, 4))]
    found = {}
    for backend in ("eager", "triton"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = OPERATIONS[operation](*leaves, view, backend=backend)
        found[backend] = [
            out,
            *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)),
        ]
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-4, atol=1e-5)
