"""Memorisation: stored figures of the official code, ranks and residuals on both sides of the bound, training."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo.diagnostics.capacity.memorization import (
    MemorizationModel,
    MemorizationTask,
    baseline_attention,
    lower_bound,
    memorization_curve,
    memorization_features,
    memorization_rank,
    sinusoidal_positions,
    upper_bound,
)

np = pytest.importorskip("numpy")
GOLDEN = Path(__file__).parents[1] / "golden" / "memorization.safetensors"


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        c = json.loads(file.metadata()["config"])
    task = MemorizationTask(
        c["num_examples"], c["context_size"], c["input_dim"], c["num_classes"], c["classification"],
        c["context_type"], c["seed"],
    )  # fmt: skip
    attention = baseline_attention(c["num_heads"], c["head_dim"], c["v_head_dim"])
    model = MemorizationModel(attention, c["input_dim"], c["embed_dim"], c["num_classes"])
    weights = {key.removeprefix("weights."): value for key, value in t.items() if key.startswith("weights.")}
    model.load_state_dict({f"attn.{n}" if "_proj" in n else n: w for n, w in weights.items()}, strict=True)
    return t, task, model


def spread(H, head_dim=None, d=16, seed=0, attention=None):
    """A fresh model whose attention is neither uniform nor saturated, as the rank's tolerance needs it."""
    torch.manual_seed(seed)
    model = MemorizationModel(attention or baseline_attention(H, head_dim), d, d, 1).double()
    for linear in (model.attn.q_proj, model.attn.k_proj):
        torch.nn.init.normal_(linear.weight, std=(1.5 / d) ** 0.5)
    return model


def test_the_data_are_the_official_ones(stored):
    t, task, _ = stored
    x, target = task.data
    assert torch.equal(x[:, :1], t["input.x"])
    assert torch.equal(x[:, 1:], t["input.context"].expand(120, -1, -1))
    assert torch.equal(target, t["input.target"])


def test_stored_outputs_and_gradients(stored):
    t, task, model = stored
    model, x = model.double(), task.data[0].double()
    model.zero_grad()
    loss = model.loss(x, task.data[1])
    assert (model(x) - t["output.y"]).abs().max() < 1e-9
    assert (loss - t["output.loss"]).abs().max() < 1e-9
    loss.backward()
    for name in ("q_proj", "v_proj", "o_proj"):
        gradient = model.attn.get_submodule(name).weight.grad
        assert (gradient - t[f"grad.{name}.weight"]).abs().max() < 1e-9, name
    psi, weights = memorization_features(model, x)
    assert psi.shape == (120, 4 * 16 + 1)
    assert (weights[:64] - t["output.attn"]).abs().max() < 1e-9


def test_stored_ranks_and_residuals(stored):
    t, task, model = stored
    for N, rank in t["output.rank"].tolist():
        found = memorization_rank(model, task, num_examples=N)
        assert found.rank == rank
        assert found.lower_bound == t["output.lower_bound"].item()
        assert found.upper_bound == t["output.upper_bound"].item()
    for N, residual in zip(t["output.lstsq_n"].tolist(), t["output.lstsq_mse"].tolist(), strict=True):
        found = memorization_rank(model, task, num_examples=N).lstsq_mse
        assert (found < 1e-15) == (residual < 1e-15)
        assert found == pytest.approx(residual, abs=1e-9)


@pytest.mark.parametrize(("H", "n"), [(1, 1), (1, 5), (3, 4), (6, 4), (2, 7)])
def test_a_shared_context_gives_n_minus_one_a_head(H, n):
    capacity = H * (n - 1) + 1
    assert lower_bound(H, n, 16) == upper_bound(H, n, 16, shared=True) == capacity
    model = spread(H)
    for N in (max(capacity - 1, 1), capacity, capacity + 3):
        task = MemorizationTask(N, n, 16, context="fixed")
        found = memorization_rank(model, task)
        assert found.num_examples == N
        assert found.rank == min(N, capacity)
        if capacity >= N:
            assert found.lstsq_mse < 1e-20
        else:
            assert found.lstsq_mse > 1e-4


@pytest.mark.parametrize("context", ["random", "perm"])
def test_different_contexts_give_d_a_head(context):
    model, d = spread(3, d=6), 6
    found = memorization_rank(model, MemorizationTask(25, 9, d, context=context))
    assert found.rank == found.upper_bound == 3 * d + 1
    assert found.lstsq_mse > 1e-4
    assert memorization_rank(model, MemorizationTask(19, 9, d, context=context)).lstsq_mse < 1e-20


def test_narrow_heads_exceed_the_bound_of_the_theorem():
    found = memorization_rank(spread(6, head_dim=4), MemorizationTask(60, 5, 16, context="fixed"))
    assert (found.lower_bound, found.rank, found.upper_bound) == (19, 25, 25)


def test_doubling_heads_doubles_the_bound_less_one():
    ranks = [memorization_rank(spread(H), MemorizationTask(80, 6, 16, context="fixed")).rank for H in (1, 2, 4)]
    assert ranks == [6, 11, 21]


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"rope": attnzoo.Rotary()}, {"qk_norm": True}, {"num_kv_heads": 1}], ids=str
)
def test_biases_rotation_norms_and_grouping_do_not_change_the_rank(options):
    def attention(width):
        kinds = {"rope": None, "causal": False, "num_kv_heads": 3, **options}
        return attnzoo.GroupedQueryAttention(width, 3, head_dim=8, **kinds)

    model = spread(3, attention=attention)
    if options.get("bias"):
        torch.nn.init.normal_(model.attn.q_proj.bias)
    assert memorization_rank(model, MemorizationTask(40, 6, 16, context="fixed")).rank == 16


def test_a_head_has_its_own_targets_and_saturation():
    task = MemorizationTask(9, 4, 16, context="fixed")
    model = spread(2)
    psi, weights = memorization_features(model, task.data[0])
    targets = psi @ torch.randn(psi.shape[1], dtype=torch.float64)
    assert memorization_rank(model, task, targets=targets).lstsq_mse < 1e-20
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert memorization_rank(model, task).saturation < 0.2
    with torch.no_grad():
        model.attn.q_proj.weight.mul_(1e6)
    assert memorization_rank(model, task).saturation > 0.9
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memorization_rank(model, task)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_data_of_every_kind():
    regression = MemorizationTask(8, 3, 5, classification=False)
    x, target = regression.data
    assert (x.shape, x.dtype, target.shape, target.dtype) == ((8, 4, 5), torch.float32, (8,), torch.float32)
    draw = np.random.RandomState(42)
    assert torch.equal(x[:, 1:].double(), torch.from_numpy(draw.uniform(size=(8, 3, 5)).astype("f4")).double())
    assert torch.equal(x[:, 0].double(), torch.from_numpy(draw.uniform(size=(8, 5)).astype("f4")).double())
    assert torch.equal(target, torch.from_numpy(draw.uniform(size=8).astype("f4")))
    x, target = MemorizationTask(60, 400, 2, 3, context="perm").data
    assert set(target.tolist()) == {0, 1, 2}
    assert len(torch.unique(x[:, 1:].reshape(-1, 2), dim=0)) <= 500
    assert len(torch.unique(x[0, 1:], dim=0)) == 400
    assert not torch.equal(MemorizationTask(8, 3, 5, seed=1).data[0], MemorizationTask(8, 3, 5).data[0])


def test_the_query_sees_its_context_only():
    model = spread(2)
    x = MemorizationTask(4, 3, 16).data[0].double()
    base = model(x)
    moved = x.clone()
    moved[:, 2] += 1
    assert (model(moved) - base).abs().min() > 1e-9
    _, weights = memorization_features(model, x)
    assert weights.shape == (4, 2, 3)
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    pe = sinusoidal_positions(7, 4)
    assert pe[0].tolist() == [0, 1, 0, 1]
    angle = torch.tensor([3.0, 0.03], dtype=torch.float64)
    torch.testing.assert_close(pe[3], torch.stack([angle.sin(), angle.cos()], 1).flatten())


def test_regression_loss():
    model = spread(2)
    x, target = MemorizationTask(6, 3, 16, classification=False).data
    loss = model.loss(x.double(), target)
    torch.testing.assert_close(loss, (model(x.double())[:, 0] - target.double()).square().mean())


def test_small_loads_are_memorised_and_large_ones_are_not():
    points = memorization_curve((2,), (0.5, 16), context_size=5, embed_dim=8, steps=400, lr=1e-2)
    assert [(p.num_heads, p.num_examples) for p in points] == [(2, 4), (2, 128)]
    assert [p.load for p in points] == [4 / 9, 128 / 9]
    assert points[0].accuracy == 1
    assert points[0].steps < 400 == points[1].steps
    assert points[1].accuracy < 0.8
    again = memorization_curve((2,), (0.5,), context_size=5, embed_dim=8, steps=400, lr=1e-2)
    assert again[0] == points[0]


@pytest.mark.slow
def test_more_heads_memorise_more_examples():
    points = memorization_curve((1, 2, 4), (1, 4), steps=1500)
    memorised = {(p.num_heads, p.num_examples): round(p.accuracy * p.num_examples) for p in points}
    assert memorised.keys() == {(1, 7), (1, 28), (2, 14), (2, 56), (4, 28), (4, 112)}
    # At the bound all are memorised, but for one head, whose outputs lie on a line.
    assert memorised[2, 14] == 14
    assert memorised[4, 28] == 28
    assert memorised[2, 56] > 1.3 * memorised[1, 28]
    assert memorised[4, 112] > 1.8 * memorised[2, 56]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemorizationTask(0), "num_examples must be at least 1, got 0"),
        (lambda: MemorizationTask(5, 501, context="perm"), "context_size must be at most 500 for context 'perm'"),
        (lambda: MemorizationTask(5, context="shared"), "context must be one of 'random', 'fixed', 'perm'"),
        (lambda: MemorizationModel(lambda d: attnzoo.MultiHeadAttention(d, 4)), "attention must be made with causal"),
        (lambda: spread(1)(torch.ones(2, 3, 16, dtype=torch.float16)), "x must not be float16"),
        (lambda: spread(1)(torch.ones(1, 600, 16)), "x must have at most max_context 512 context tokens, got 599"),
        (
            lambda: memorization_rank(spread(1), MemorizationTask(5, 3, 16), targets=torch.ones(4)),
            r"targets must have shape \(5,\), got \(4,\)",
        ),
        (lambda: memorization_curve((1,), (1,), steps=0), "steps must be at least 1, got 0"),
        (lambda: MemorizationTask(2.5), "num_examples must be an integer, got 2.5"),
        (lambda: MemorizationTask(5, seed=-1), r"seed must lie in \[0, 2\^32\), got -1"),
        (lambda: MemorizationTask(5, classification="yes"), "classification must be True or False, got 'yes'"),
        (lambda: MemorizationModel(baseline_attention(1), 0), "input_dim must be at least 1, got 0"),
        (lambda: MemorizationModel(3), "attention must make a layer from a width, got 3"),
        (lambda: spread(1)(torch.ones(2, 1, 16)), r"x must have shape \(N, n \+ 1, 16\) .*, got \(2, 1, 16\)"),
        (lambda: memorization_rank(spread(1), MemorizationTask(5, 3, 16), 2.0), r"rtol must lie in \[0, 1\), got 2.0"),
        (
            lambda: memorization_rank(spread(1), MemorizationTask(5, 3, 16), num_examples=6),
            "num_examples must be at most the task's 5, got 6",
        ),
        (
            lambda: memorization_rank(spread(1), MemorizationTask(5, 3, 16), num_examples=-1),
            "num_examples must be at least 1, got -1",
        ),
        (
            lambda: memorization_rank(spread(1), MemorizationTask(5, 3, 16), targets=torch.full((5,), math.nan)),
            "targets must be finite",
        ),
        (lambda: memorization_curve((1,), (-1,)), "loads must be positive, got -1"),
        (lambda: memorization_curve(3, (1,)), "heads must be several numbers, got 3"),
        (lambda: memorization_curve((1,), (1,), lr=0), "lr must be positive, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
