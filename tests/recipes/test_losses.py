"""Cross-entropy without all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from attnzoo_recipes import losses
from attnzoo_recipes.losses import IGNORED, cross_entropy_and_z, linear_cross_entropy


@pytest.fixture
def inputs():
    """Hidden states, weights and targets of which some are ignored, in pieces of 7 of 37 rows."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 13, generator=random), torch.randn(101, 13, generator=random)
    targets = torch.randint(0, 101, (37,), generator=random)
    targets[::5] = IGNORED
    return hidden, weight, targets


def gradients(loss, hidden, weight, targets):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets)
    value.backward()
    return value.detach().double(), hidden.grad.double(), weight.grad.double()


def plain(reduction, z_loss=0.0):
    def loss(hidden, weight, targets):
        logits = F.linear(hidden, weight)
        squares = logits.logsumexp(-1)[targets != IGNORED].square()
        z = squares.sum() if reduction == "sum" else squares.mean()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction) + z_loss * z

    return loss


@pytest.mark.parametrize("largest", [2**26, 7 * 4 * 101], ids=["whole", "pieces"])
@pytest.mark.parametrize("fused", [True, False], ids=["torch's", "ours"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_loss_of_all_logits(inputs, largest, fused, reduction, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_LOGITS", largest)
    if not fused:
        monkeypatch.setattr(losses, "_fused", lambda *arguments: None)
    exact = gradients(plain(reduction), *(x.double() if x.is_floating_point() else x for x in inputs))
    found = gradients(lambda h, w, t: linear_cross_entropy(h, w, t, reduction), *inputs)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("largest", [2**26, 7 * 4 * 101], ids=["whole", "pieces"])
def test_the_z_loss_is_the_squared_logarithm_of_the_denominator(inputs, largest, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_LOGITS", largest)

    def with_z(hidden, weight, targets):
        nats, z = cross_entropy_and_z(hidden, weight, targets)
        return nats + 0.1 * z

    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for ours, theirs in zip(gradients(with_z, *wide), gradients(plain("mean", 0.1), *wide), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_half_precision_keeps_the_loss_in_float32(inputs, monkeypatch):
    monkeypatch.setattr(losses, "LARGEST_LOGITS", 7 * 4 * 101)
    hidden, weight, targets = inputs
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(hidden, weight, targets)
        whole = F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=IGNORED)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(whole), rel=1e-6)


def test_logits_in_pieces_are_not_kept(inputs, monkeypatch):
    hidden, weight, targets = inputs
    monkeypatch.setattr(losses, "_fused", lambda *arguments: None)
    largest = {}
    for limit in (2**26, 7 * 4 * 101):
        monkeypatch.setattr(losses, "LARGEST_LOGITS", limit)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            linear_cross_entropy(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), targets)
        largest[limit] = max(kept)
    assert largest[2**26] == 37 * 101
    assert largest[7 * 4 * 101] == weight.numel()
