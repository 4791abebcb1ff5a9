"""Gates over heads: stored figures, limits, training."""

import copy
import math

import pytest
import torch

from attnzoo.diagnostics.pruning.gates import HeadGates
from attnzoo.diagnostics.pruning.masks import masked_heads
from attnzoo.diagnostics.pruning.structural import prune_heads, pruned_heads
from tests import golden_decoder
from tests.golden_decoder import WITHIN, next_token_losses


@pytest.fixture(scope="module")
def stored():
    return golden_decoder.load()


@pytest.fixture(scope="module")
def decoder(stored):
    return golden_decoder.build(stored)


@pytest.fixture(scope="module")
def batch(stored):
    return golden_decoder.examples(stored)


def gates_of(log_alpha, **options):
    gates = HeadGates(*log_alpha.shape, **options).double()
    with torch.no_grad():
        gates.log_alpha.copy_(log_alpha)
    return gates


def test_stored_figures(stored, decoder, batch):
    t, meta = stored
    options = {name: meta["l0"][name] for name in ("low", "high", "temperature", "eps")}
    gates = gates_of(t["input.l0_log_alpha"], **options)
    noise = t["input.l0_noise"]
    torch.testing.assert_close(gates(noise), t["output.l0_gate_train"], atol=WITHIN, rtol=0)
    torch.testing.assert_close(gates.p_open(), t["output.l0_p_open"], atol=WITHIN, rtol=0)
    torch.testing.assert_close(gates.eval()(), t["output.l0_gate_eval"], atol=WITHIN, rtol=0)
    gates.train()
    with gates.applied(decoder, noise):
        loss = next_token_losses(decoder, batch).mean() + meta["l0"]["coef"] * gates.penalty()
    assert loss.item() == pytest.approx(t["output.l0_total_loss"].item(), abs=WITHIN)
    (grad,) = torch.autograd.grad(loss, gates.log_alpha)
    torch.testing.assert_close(grad, t["output.l0_grad_log_alpha"], atol=WITHIN, rtol=0)


@pytest.mark.parametrize(("log_alpha", "gate"), [(-40.0, 0.0), (40.0, 1.0)])
def test_limits(log_alpha, gate):
    gates = gates_of(torch.full((2, 3), log_alpha))
    assert gates.eval()().eq(gate).all()
    gates.train()
    assert gates(generator=torch.Generator().manual_seed(0)).eq(gate).all()


def test_the_penalty_closes_gates():
    gates = gates_of(torch.linspace(-6, 6, 12).view(3, 4))
    (grad,) = torch.autograd.grad(gates.penalty(), gates.log_alpha)
    assert (grad > 0).all()


def test_p_open_is_the_share_of_open_samples():
    gates = gates_of(torch.tensor([[-2.0, -0.5, 0.0, 1.5]]))
    generator = torch.Generator().manual_seed(0)
    open_ = torch.stack([gates(generator=generator) > 0 for _ in range(4000)]).double().mean(0)
    torch.testing.assert_close(open_, gates.p_open().detach(), atol=0.03, rtol=0)


def test_draws_repeat_with_the_generator_and_only_in_training():
    gates = HeadGates(2, 5, init=0.0)
    draws = [gates(generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], gates(generator=torch.Generator().manual_seed(8)))
    gates.eval()
    assert torch.equal(gates(), gates())


def test_gates_find_heads_that_do_not_matter(decoder, batch):
    model = copy.deepcopy(decoder).requires_grad_(False)
    for layer in model.layers:
        layer["attn"].o_proj.weight[:, 8:24] = 0  # heads 1 and 2 write nothing
    gates = HeadGates.for_model(model).double()
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        with gates.applied(model, generator=generator):
            loss = next_token_losses(model, batch).mean() + 0.05 * gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gates.eval()
    closed = gates.closed()
    assert all({1, 2} <= set(heads) for heads in closed.values())
    assert len(closed) == 3
    assert sum(map(len, closed.values())) < 12
    # What is pruned is what the closed gates mask.
    with masked_heads(model, (gates() > 0).double()):
        masked = next_token_losses(model, batch)
    prune_heads(model, closed)
    torch.testing.assert_close(next_token_losses(model, batch), masked, atol=1e-9, rtol=0)
    assert pruned_heads(model) == {layer: tuple(heads) for layer, heads in closed.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"low": 0.0}, "low must be negative, got 0"),
        ({"high": 1.0}, "high must be above 1, got 1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0"),
        ({"eps": 0.5}, "eps must lie between 0 and 0.5, got 0.5"),
        ({"temperature": "a"}, "temperature must be a finite number, got 'a'"),
        ({"init": math.nan}, "init must be a finite number, got nan"),
        ({"low": -math.inf}, "low must be a finite number, got -inf"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        HeadGates(**{"num_layers": 2, "num_heads": 3, **options})


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 3\), got \(3, 2\)"):
        HeadGates(2, 3)(torch.full((3, 2), 0.5))
    with pytest.raises(ValueError, match="noise must be a floating-point tensor, got 'a'"):
        HeadGates(2, 3)("a")
