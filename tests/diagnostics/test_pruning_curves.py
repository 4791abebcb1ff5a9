"""Importance, ablations, curves and statistics: stored figures, identities, refusals."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnzoo
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning import paired_tests as stats
from attnzoo.diagnostics.pruning.ablation import ablate_heads
from attnzoo.diagnostics.pruning.curves import head_pruning_curve
from attnzoo.diagnostics.pruning.importance import head_gradients, head_importance
from attnzoo.diagnostics.pruning.masks import head_mask, masked_heads
from tests import golden_decoder
from tests.diagnostics.test_attention_layers import _hf, _shaken
from tests.golden_decoder import WITHIN, next_token_losses, pairs, real_tokens
from tests.zoo import E, build, names


@pytest.fixture(scope="module")
def stored():
    return golden_decoder.load()


@pytest.fixture(scope="module")
def decoder(stored):
    return golden_decoder.build(stored)


@pytest.fixture(scope="module")
def batch(stored):
    return golden_decoder.examples(stored)


def split(batch, *sizes):
    """The batch in parts."""
    return list(zip(*(part.split(list(sizes)) for part in batch), strict=True))


def assert_order(found, importance, expected):
    """The stored order, but for neighbours whose importance is the same within the tolerance."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == theirs or abs(importance[mine] - importance[theirs]) < WITHIN


# Stored figures


def test_losses_and_gradients(stored, decoder, batch):
    t, _ = stored
    losses = next_token_losses(decoder, batch)
    torch.testing.assert_close(losses, t["output.loss_per_example"], atol=WITHIN, rtol=0)
    s = head_gradients(decoder, [batch], next_token_losses)
    torch.testing.assert_close(s, t["output.grad_xi_example"], atol=WITHIN, rtol=0)
    coupled = head_gradients(decoder, [batch], next_token_losses, coupled=True)
    torch.testing.assert_close(coupled, s, atol=1e-12, rtol=0)


@pytest.mark.parametrize("granularity", ["example", "token", "batch"])
@pytest.mark.parametrize("normalize", [None, "l2"])
def test_importance(stored, decoder, batch, granularity, normalize):
    key = f"output.importance_{granularity}" + ("_l2" if normalize else "")
    found = head_importance(
        decoder, [batch], next_token_losses, granularity=granularity, normalize=normalize, valid=real_tokens
    )
    torch.testing.assert_close(found, stored[0][key], atol=WITHIN, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_importance_of_tokens_counts_no_padding(side):
    model = _shaken(_hf("llama")).double()
    tokens = torch.randint(3, 31, (2, 5), generator=torch.Generator().manual_seed(4))
    ones, gap = torch.ones_like(tokens), torch.zeros(2, 3, dtype=torch.long)
    both = [(gap, x) if side == "left" else (x, gap) for x in (tokens, ones)]
    padded = {"input_ids": torch.cat(both[0], 1), "attention_mask": (real := torch.cat(both[1], 1)),
              "position_ids": (real.cumsum(1) - 1).clamp(min=0)}  # fmt: skip

    def losses(model, batch):
        out = model(**batch).logits.square().mean(-1)
        return (out * batch["attention_mask"]).sum(1)

    def found(batch):
        return head_importance(model, [batch], losses, granularity="token", normalize=None)

    alone = found({"input_ids": tokens, "attention_mask": ones})
    torch.testing.assert_close(found(padded), alone, atol=1e-10, rtol=1e-10)
    deltas = [ablate_heads(model, [b], losses).delta for b in ({"input_ids": tokens, "attention_mask": ones}, padded)]
    torch.testing.assert_close(*deltas, atol=1e-10, rtol=1e-10)


def test_importance_of_groups(stored, decoder, batch):
    found = head_importance(decoder, [batch], next_token_losses, normalize=None, unit="kv_group")
    torch.testing.assert_close(found, stored[0]["output.group_importance_example"], atol=WITHIN, rtol=0)


@pytest.mark.parametrize(
    ("mode", "key"),
    [("one", "ablate_one_loss"), ("all_but_one", "all_but_one_loss"), ("kv_group", "ablate_group_loss")],
)
def test_ablations(stored, decoder, batch, mode, key):
    found = ablate_heads(decoder, split(batch, 1, 3), next_token_losses, mode)
    assert found.base_loss == pytest.approx(stored[0]["output.loss"].item(), abs=WITHIN)
    torch.testing.assert_close(found.losses, stored[0][f"output.{key}"], atol=WITHIN, rtol=0)
    torch.testing.assert_close(found.examples.mean(-1), found.losses)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("l2", {}),
        ("raw", {"normalize": None}),
        ("l2_keep1", {"min_heads_per_layer": 1}),
        ("iterative_l2", {"mode": "iterative"}),
    ],
)
def test_curves(stored, decoder, batch, name, options):
    t, meta = stored
    found = head_pruning_curve(
        decoder, [batch], next_token_losses, percents=meta["pcts"], baselines=("reverse",), **options
    )
    assert list(found.counts) == t["output.pruned_counts"].tolist()
    assert found.base_loss == pytest.approx(t["output.loss"].item(), abs=WITHIN)
    torch.testing.assert_close(found.losses, t[f"output.curve_{name}_loss"], atol=WITHIN, rtol=0)
    if "iterative" in name:
        assert list(found.order) == pairs(t[f"output.order_{name}"])
    else:
        assert_order(found.order, found.importance, pairs(t[f"output.order_{name}"]))
    json.dumps(found.to_dict())


def test_statistics(stored):
    t, _ = stored
    a, b = t["input.stat_a"], t["input.stat_b"]
    found = stats.paired_bootstrap(a, b, resamples=t["input.stat_resample"])
    assert found.p == pytest.approx(t["output.stat_bootstrap_p"].item(), abs=WITHIN)
    assert found.p_two_sided == pytest.approx(t["output.stat_bootstrap_p_two_sided"].item(), abs=WITHIN)
    tested = stats.paired_t_test(a, b)
    assert [tested.t, tested.p] == pytest.approx(t["output.stat_ttest"].tolist(), abs=WITHIN)


# Masks


@pytest.mark.parametrize("name", names())
def test_ones_change_nothing_and_zeros_leave_the_bias(name):
    module, x = build(name).eval(), torch.randn(2, 9, E, dtype=torch.float64)
    H = attention_layers(module)[0].num_heads
    plain = module(x)
    with masked_heads(module, torch.ones(1, H)):
        assert torch.equal(module(x), plain)
    with masked_heads(module, torch.zeros(2, 1, H)):
        empty = module(x)
    bias = getattr(getattr(module, "o_proj", None), "bias", None)
    if bias is not None or name != "moa":
        torch.testing.assert_close(empty, torch.zeros_like(empty) if bias is None else bias.expand_as(empty))
    assert torch.equal(module(x), plain)


def test_masks_compose_and_go_by_example(decoder, batch):
    generator = torch.Generator().manual_seed(3)
    xi, psi = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    with masked_heads(decoder, xi), masked_heads(decoder, psi):
        both = next_token_losses(decoder, batch)
    with masked_heads(decoder, xi * psi):
        torch.testing.assert_close(next_token_losses(decoder, batch), both)
    stacked = torch.stack([xi, psi, torch.ones_like(xi), torch.zeros_like(xi)])
    with masked_heads(decoder, stacked):
        each = next_token_losses(decoder, batch)
    for i, mask in enumerate(stacked):
        with masked_heads(decoder, mask):
            assert next_token_losses(decoder, batch)[i].item() == pytest.approx(each[i].item(), abs=1e-12)


def test_masks_have_gradients(decoder, batch):
    def loss(xi):
        with masked_heads(decoder, xi):
            return next_token_losses(decoder, batch).mean()

    xi = torch.linspace(0.2, 1.3, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(loss(xi), xi)
    for at in ((0, 1), (1, 3), (2, 0)):
        step = torch.zeros_like(xi)
        step[at] = 1e-5
        slope = (loss(xi.detach() + step) - loss(xi.detach() - step)) / 2e-5
        assert grad[at].item() == pytest.approx(slope.item(), abs=1e-8)


def test_rescaled_masks():
    xi = head_mask([(0, 1), (0, 2), (1, 0)], (2, 4), rescale=True)
    assert xi.tolist() == [[2.0, 0.0, 0.0, 2.0], [0.0, 4 / 3, 4 / 3, 4 / 3]]


# Importance


def test_batches_do_not_matter(decoder, batch):
    for options in ({}, {"granularity": "token"}, {"granularity": "batch"}, {"unit": "kv_group"}):
        whole = head_importance(decoder, [batch], next_token_losses, **options)
        parts = head_importance(decoder, split(batch, 1, 3), next_token_losses, **options)
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)
    one = head_pruning_curve(decoder, [batch], next_token_losses)
    two = head_pruning_curve(decoder, iter(split(batch, 2, 2)), next_token_losses)
    assert (one.order, one.counts) == (two.order, two.counts)
    torch.testing.assert_close(one.losses, two.losses, atol=1e-12, rtol=0)
    assert one.baselines.keys() == {"random0", "random1", "reverse"}
    assert one.baselines["random0"].order == two.baselines["random0"].order != one.baselines["random1"].order
    assert one.baselines["reverse"].order == one.order[::-1]


def test_the_first_examples(decoder, batch):
    first = split(batch, 3, 1)[0]
    expected = head_importance(decoder, [first], next_token_losses)
    found = head_importance(decoder, split(batch, 2, 2), next_token_losses, num_examples=3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    ablation = ablate_heads(decoder, [batch], next_token_losses, "layer", num_examples=3, layers=[1])
    assert ablation.base_examples.shape == (3,)
    assert ablation.losses.shape == (1, 1)


def test_where_the_absolute_value_is_taken(decoder, batch):
    by = {
        g: head_importance(decoder, [batch], next_token_losses, granularity=g, normalize=None)
        for g in ("example", "token", "batch")
    }
    assert (by["batch"] <= by["example"] + 1e-15).all()
    assert (by["example"] <= by["token"] * batch[0].shape[1] + 1e-15).all()


def test_progress_needs_no_tqdm(decoder, batch, monkeypatch):
    with_bar = head_importance(decoder, [batch], next_token_losses)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert torch.equal(head_importance(decoder, [batch], next_token_losses), with_bar)
    assert torch.equal(head_importance(decoder, [batch], next_token_losses, progress=False), with_bar)


def test_masked_heads_count_nothing(decoder, batch):
    xi = head_mask([(0, 1), (2, 3)], (3, 4))
    found = head_importance(decoder, [batch], next_token_losses, head_mask=xi)
    assert found[0, 1] == found[2, 3] == 0
    assert (found > 0).sum() == 10
    torch.testing.assert_close(found.square().sum(1), torch.ones(3).double())


def test_minmax_spans_the_unit_interval(decoder, batch):
    found = head_importance(decoder, [batch], next_token_losses, normalize="minmax")
    assert (found.min(), found.max()) == (0, 1)


@pytest.mark.parametrize("name", names())
def test_every_mechanism_has_importance(name):
    module, x = build(name), torch.randn(3, 8, E, dtype=torch.float64)
    target = torch.randn(3, 8, E, dtype=torch.float64)

    def losses(model, inputs):
        return (model(inputs) - target).square().mean((1, 2))

    found = head_importance(module, [x], losses, normalize=None)
    xi = torch.ones(3, *found.shape, dtype=torch.float64, requires_grad=True)
    with masked_heads(module.eval(), xi):
        (grad,) = torch.autograd.grad(losses(module, x).sum(), xi)
    torch.testing.assert_close(found, grad.abs().mean(0), atol=1e-12, rtol=0)


def test_training_mode_with_dropout_is_left_for_the_measurement():
    module = attnzoo.MultiHeadAttention(16, 4, dropout=0.5).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)

    def losses(model, inputs):
        return model(inputs).square().mean((1, 2))

    module.train()
    with pytest.warns(UserWarning, match="training mode with dropout"):
        first = head_importance(module, [x], losses)
    assert module.training
    with pytest.warns(UserWarning, match="training mode"), pytest.raises(ValueError, match="valid must give"):
        head_importance(module, [x], losses, granularity="token", valid=lambda _: torch.ones(1))
    assert module.training
    module.eval()
    with torch.no_grad():
        assert torch.equal(head_importance(module, [x], losses), first)
        assert not torch.is_grad_enabled()
    assert not module.training


def test_examples_that_see_each_other_need_coupled(decoder, batch):
    def contrast(model, inputs):
        means = model(inputs[0]).mean(1)
        return F.cross_entropy(means @ means.T / 10, torch.arange(len(means)), reduction="none")

    for batches in ([batch], split(batch, 1, 3)):
        with pytest.raises(ValueError, match="coupled must be True where a loss depends on other examples"):
            head_importance(decoder, batches, contrast)
    found = head_gradients(decoder, [batch], contrast, coupled=True)
    xi = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    with masked_heads(decoder, xi):
        losses = contrast(decoder, batch)
        for loss, s in zip(losses, found, strict=True):
            (grad,) = torch.autograd.grad(loss, xi, retain_graph=True)
            torch.testing.assert_close(s, grad, atol=1e-12, rtol=0)
    together = head_importance(decoder, [batch], contrast, coupled=True, granularity="batch", normalize=None)
    torch.testing.assert_close(together, found.mean(0).abs(), atol=1e-12, rtol=0)


def test_a_stationary_objective_is_refused(decoder, batch):
    with torch.no_grad():
        full = decoder(batch[0]).log_softmax(-1)

    def divergence(model, inputs):
        now = model(inputs[0]).log_softmax(-1)
        return (full.exp() * (full - now)).sum((1, 2))

    with pytest.raises(ValueError, match="loss_fn must have a gradient at the measured mask"):
        head_importance(decoder, [batch], divergence)
    assert (ablate_heads(decoder, [batch], divergence).delta > 0).all()


# Ablations and curves


def test_the_best_single_heads(decoder, batch):
    found = ablate_heads(decoder, [batch], next_token_losses, "all_but_one")
    for layer, head, delta in found.best():
        assert found.losses[layer, head] == found.losses[layer].min()
        assert delta == pytest.approx(float(found.losses[layer].min()) - found.base_loss)


def test_an_ablation_of_a_layer_masks_all_its_heads(decoder, batch):
    found = ablate_heads(decoder, [batch], next_token_losses, "layer")
    for layer in range(3):
        with masked_heads(decoder, head_mask([(layer, h) for h in range(4)], (3, 4))):
            expected = next_token_losses(decoder, batch).mean().item()
        assert found.losses[layer, 0].item() == pytest.approx(expected, abs=1e-12)


def test_rescaled_ablations(decoder, batch):
    found = ablate_heads(decoder, [batch], next_token_losses, "all_but_one", rescale=True, layers=[2])
    xi = torch.ones(3, 4, dtype=torch.float64)
    xi[2] = torch.tensor([0, 4, 0, 0])
    with masked_heads(decoder, xi):
        expected = next_token_losses(decoder, batch).mean().item()
    assert found.losses[0, 1].item() == pytest.approx(expected, abs=1e-12)


def test_scores_are_kept_beside_losses(decoder, batch):
    def with_accuracy(model, inputs):
        tokens, _ = inputs
        right = (model(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean(1)
        return next_token_losses(model, inputs), right

    ablation = ablate_heads(decoder, [batch], with_accuracy, layers=[0])
    assert ablation.scores.shape == (1, 4)
    curve = head_pruning_curve(decoder, [batch], with_accuracy, percents=[0, 100], baselines=())
    assert curve.scores[0].item() == pytest.approx(curve.base_score)
    assert curve.losses[0].item() == pytest.approx(curve.base_loss)
    assert curve.counts == (0, 12)


def test_curves_of_groups_and_of_given_orders(decoder, batch):
    groups = head_pruning_curve(decoder, [batch], next_token_losses, unit="kv_group", percents=[50], baselines=())
    assert (groups.total, groups.counts) == (6, (3,))
    heads = [(layer, 2 * g + i) for layer, g in groups.removed(0) for i in (0, 1)]
    given = head_pruning_curve(decoder, [batch], next_token_losses, order=heads, percents=[50], baselines=())
    assert given.importance is None
    assert given.losses.item() == pytest.approx(groups.losses.item(), abs=1e-12)


def test_protected_heads_stay(decoder, batch):
    found = head_pruning_curve(
        decoder, [batch], next_token_losses, mode="iterative", percents=[40, 60, 90], min_heads_per_layer=2
    )
    assert found.counts == (4, 6, 6)
    for curve in (found, *found.baselines.values()):
        for layer in range(3):
            assert sum(at == layer for at, _ in curve.order) == 2


def test_a_given_order_leaves_as_many_heads(decoder, batch):
    def curve(order, **options):
        return head_pruning_curve(
            decoder, [batch], next_token_losses, order=order, percents=[50, 100], min_heads_per_layer=2, **options
        )

    whole = [(layer, head) for head in (1, 3, 0, 2) for layer in range(3)]
    assert curve(whole).order == tuple(whole[:6])
    assert curve(whole).baselines["reverse"].order == tuple(whole[::-1][:6])
    # Three heads of layer 0 are named, so that the fourth and the last of these stay.
    found = curve([(0, 3), (1, 0), (0, 1), (0, 0)], baselines=["reverse"])
    assert found.order == ((0, 3), (1, 0), (0, 1))
    assert found.counts == (3, 3)
    assert found.baselines["reverse"].order == ((0, 0), (0, 1), (1, 0))


def test_heads_that_are_gone_are_never_chosen(stored, decoder, batch):
    pruned = copy.deepcopy(decoder)
    pruned.layers[1]["attn"].prune_heads([0, 2])
    pruned.layers[2]["attn"].prune_heads(range(4))
    found = head_importance(pruned, [batch], next_token_losses)
    masked = head_importance(
        decoder, [batch], next_token_losses, head_mask=head_mask([(1, 0), (1, 2), *((2, h) for h in range(4))], (3, 4))
    )
    torch.testing.assert_close(found, masked, atol=1e-9, rtol=0)
    assert found[1, 0] == found[1, 2] == 0
    ablation = ablate_heads(pruned, [batch], next_token_losses)
    assert ablation.losses.isnan().int().tolist() == [[0] * 4, [1, 0, 1, 0], [1] * 4]
    curve = head_pruning_curve(pruned, [batch], next_token_losses, percents=[100])
    assert set(curve.order) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 3)}
    with pytest.raises(ValueError, match="unit 'kv_group' needs layers of 4 query heads"):
        head_importance(pruned, [batch], next_token_losses, unit="kv_group")


# Statistics


def test_the_bootstrap_repeats_itself_and_knows_directions():
    a = torch.linspace(0, 1, 50, dtype=torch.float64)
    better = stats.paired_bootstrap(a + 1, a)
    assert (better.p, better.p_two_sided, better.mean_difference) == (0, 0, pytest.approx(1))
    assert stats.paired_bootstrap(a, a + 1).p == 1
    same = stats.paired_bootstrap(a, a)
    assert (same.p, same.p_two_sided) == (1, 1)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = stats.paired_bootstrap(a + noise, a, seed=4)
    assert first == stats.paired_bootstrap(a + noise, a, seed=4) != stats.paired_bootstrap(a + noise, a, seed=5)
    assert first.p_two_sided == pytest.approx(stats.paired_t_test(a + noise, a).p, abs=0.06)


def test_the_t_test_without_spread():
    a = torch.ones(5)
    assert (stats.paired_t_test(a, a).t, stats.paired_t_test(a, a).p) == (0, 1)
    assert (stats.paired_t_test(a, a + 1).t, stats.paired_t_test(a, a + 1).p) == (-math.inf, 0)


@pytest.mark.parametrize("test", ["t_test", "bootstrap"])
def test_tests_of_an_ablation_count_themselves(decoder, batch, test):
    ablation = ablate_heads(decoder, [batch], next_token_losses)
    found = stats.ablation_tests(ablation, test=test, threshold=0.05)
    assert found.num_tests == 12
    assert found.expected_false_alarms == pytest.approx(0.6)
    for at in itertools.product(range(3), range(4)):
        a, b = ablation.base_examples, ablation.examples[at]
        expected = stats.paired_t_test(a, b).p if test == "t_test" else stats.paired_bootstrap(a, b).p_two_sided
        assert found.p[at].item() == pytest.approx(expected)
        assert bool(found.significant[at]) == (expected < 0.05)


# Refusals


def nan_losses(model, batch):
    losses = next_token_losses(model, batch)
    return losses * torch.tensor([1.0, math.nan, 1.0, 1.0])


def second(score):
    """Losses with second scores made from them."""
    return lambda model, batch: (losses := next_token_losses(model, batch), score(losses))


REFUSED = [
    (lambda m, b: ablate_heads(m, b, second(lambda x: x[:3])), r"a score for each of the 4 examples, got \(3,\)"),
    (lambda m, b: ablate_heads(m, b, second(lambda x: 1.0)), "a score for each of the 4 examples, got float"),
    (lambda m, b: ablate_heads(m, b, second(lambda x: x * math.nan)), "loss_fn must return finite scores"),
    (lambda m, b: ablate_heads(m, b, lambda m, b: (next_token_losses(m, b),)), "a pair of losses and scores, got 1"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[(0, 0)], granularity="x"), "granularity must be"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, baselines=None), "baselines must be some of .* got None"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, seeds=[2**70]), "seeds must be an integer of 64 bits"),
    (lambda m, b: head_importance(m, b, next_token_losses, coupled="no"), "coupled must be True or False, got 'no'"),
    (lambda m, b: head_importance(None, b, next_token_losses), "model must be a module, got None"),
    (lambda m, b: head_mask([(0, 0)], (3,)), r"shape must be two integers, got \(3,\)"),
    (
        lambda m, b: head_importance(
            m, b, next_token_losses, granularity="token", valid=lambda pair: torch.full(pair[0].shape, 0.5)
        ),
        r"valid must give a mask \(B, T\) of True and False",
    ),
    (
        lambda m, b: head_importance(
            m, b, next_token_losses, granularity="token", valid=lambda pair: torch.zeros(pair[0].shape).bool()
        ),
        "valid must mark at least one token",
    ),
    (
        lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(3), resamples=torch.full((2, 3), -1)),
        "resamples must lie between 0 and 2",
    ),
    (
        lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(3), resamples=torch.full((2, 3), 0.7)),
        "resamples must be a tensor of indices",
    ),
    (lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(3), 1.5), "n_resamples must be an integer, got 1.5"),
    (lambda m, b: stats.paired_t_test("a", torch.ones(3)), "a and b must hold numbers, got 'a' and"),
    (lambda m, b: stats.ablation_tests(None), "ablation must be what ablate_heads returns, got None"),
    (lambda m, b: head_importance(m, b, next_token_losses, granularity="layer"), "granularity must be one of"),
    (lambda m, b: head_importance(m, b, next_token_losses, normalize="l1"), "normalize must be one of"),
    (lambda m, b: head_importance(m, b, next_token_losses, unit="layer"), "unit must be one of"),
    (lambda m, b: head_importance(m, b, next_token_losses, head_mask=torch.ones(4, 3)), "head_mask must have shape"),
    (
        lambda m, b: head_importance(m, b, next_token_losses, granularity="token", coupled=True),
        "granularity 'token' needs examples that are not coupled",
    ),
    (
        lambda m, b: head_importance(m, b, next_token_losses, granularity="token", valid=lambda _: torch.ones(2, 2)),
        "valid must give a mask of shape",
    ),
    (lambda m, b: head_importance(m, b, nan_losses), "loss_fn must return finite losses, got nan for example 1 of b"),
    (lambda m, b: head_importance(m, b, lambda m, b: next_token_losses(m, b).mean()), "a loss for each example"),
    (lambda m, b: head_importance(m, b, lambda m, b: next_token_losses(m, b)[:2]), "as many sequences as it returns"),
    (lambda m, b: head_importance(m, b, lambda m, b: 0 * next_token_losses(m, b)), "got a gradient of 0 for every"),
    (lambda m, b: head_importance(m, b, lambda m, b: torch.ones(4)), "but 'layers.0.attn' never ran"),
    (lambda m, b: head_importance(m, [], next_token_losses), "batches must hold at least one example, got none"),
    (
        lambda m, b: head_importance(m, b, next_token_losses, num_examples=5),
        "num_examples must not exceed the examples in batches, got 5 and 4",
    ),
    (lambda m, b: ablate_heads(m, b, next_token_losses, "two"), "mode must be one of 'one', 'all_but_one'"),
    (lambda m, b: ablate_heads(m, b, next_token_losses, layers=[3]), "layers must lie between 0 and 2"),
    (lambda m, b: ablate_heads(m, b, nan_losses), "finite losses, got nan"),
    (lambda m, b: ablate_heads(m, b, next_token_losses, num_examples=9), "num_examples must not exceed"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, mode="random"), "mode must be one of 'greedy'"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, baselines=["best"]), "baselines must be one of"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, percents=[50, 20]), "percents must ascend"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, percents=[101]), "percents must ascend between 0 and"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[(0, 0), (0, 0)]), "order must name heads"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[(3, 0)]), "order must name heads"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[(0, 0)], mode="iterative"), "got order too"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, min_heads_per_layer=-1), "must not be negative"),
    (lambda m, b: masked_heads(m, torch.ones(3, 3)).__enter__(), r"xi must be \(L, H\) or"),
    (lambda m, b: masked_heads(m, torch.ones(3, 4).bool()).__enter__(), "xi must be a floating-point tensor"),
    (lambda m, b: masked_heads(m, [[1.0]]).__enter__(), r"xi must be a floating-point tensor .*, got \[\[1.0\]\]"),
    (lambda m, b: head_mask([(0.5, 0)], (3, 4)), "heads must be integers, got 0.5"),
    (lambda m, b: head_importance(m, b, next_token_losses, head_mask=[[1.0]]), "head_mask must be a floating-point"),
    (lambda m, b: head_importance(m, b, next_token_losses, num_examples=1.5), "num_examples must be an integer, got"),
    (lambda m, b: ablate_heads(m, b, next_token_losses, num_examples="1"), "num_examples must be an integer, got '1'"),
    (lambda m, b: ablate_heads(m, b, next_token_losses, layers=["0"]), "layers must be integers, got '0'"),
    (lambda m, b: ablate_heads(m, b, next_token_losses, layers=0), "layers must be several integers, got 0"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, percents=25), "percents must ascend .*, got 25"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, percents=["9"]), r"percents must ascend .*, got \['9'\]"),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[(0, 1.5)]), "order must be integers, got 1.5"),
    (
        lambda m, b: head_pruning_curve(m, b, next_token_losses, order=[0]),
        r"order must be \(layer, head\) pairs, got 0",
    ),
    (lambda m, b: head_pruning_curve(m, b, next_token_losses, seeds=[0.5]), "seeds must be integers, got 0.5"),
    (lambda m, b: head_mask([(3, 0)], (3, 4)), "heads must lie within 3 layers of 4"),
    (lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(4)), "a and b must hold a score for each"),
    (lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(3), 0), "n_resamples must be at least 1"),
    (lambda m, b: stats.paired_bootstrap(torch.ones(3), torch.ones(3), resamples=torch.ones(2, 2)), "resamples must"),
    (lambda m, b: stats.paired_t_test(torch.ones(1), torch.ones(1)), "at least 2 scores, got 1"),
    (lambda m, b: stats.paired_t_test(torch.ones(3), torch.full((3,), math.nan)), "a and b must be finite"),
    (lambda m, b: stats.ablation_tests(None, test="sign"), "test must be 't_test' or 'bootstrap'"),
    (lambda m, b: stats.ablation_tests(None, threshold=1.0), "threshold must lie between 0 and 1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(decoder, batch, call, message):
    with pytest.raises(ValueError, match=message):
        call(decoder, [batch])


def test_a_mask_for_another_batch_is_refused(decoder, batch):
    with (
        masked_heads(decoder, torch.ones(3, 3, 4)),
        pytest.raises(ValueError, match="xi must have one mask for each of the 4 sequences, got 3"),
    ):
        next_token_losses(decoder, batch)


def test_tokens_of_an_encoder_and_its_decoder_are_not_averaged_together():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4)
    model = transformers.T5Model(config).eval()
    tokens = torch.randint(3, 31, (2, 5))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens}
    with pytest.raises(ValueError, match="granularity 'token' needs layers that all run over the same tokens"):
        head_importance(
            model, [inputs], lambda m, b: m(**b).last_hidden_state.square().mean((1, 2)), granularity="token"
        )


def test_a_compiled_model_is_masked_too():
    attn = build("gqa").eval()
    compiled, x = torch.compile(attn, backend="eager"), torch.randn(2, 5, E, dtype=torch.float64)
    whole = compiled(x)
    xi = torch.ones(1, attention_layers(attn)[0].num_heads, requires_grad=True)
    with masked_heads(compiled, xi.detach() * torch.arange(xi.numel())):
        found = compiled(x)
    with masked_heads(attn, xi.detach() * torch.arange(xi.numel())):
        assert torch.equal(found, attn(x))
    assert not torch.equal(found, whole)
    with masked_heads(compiled, xi):
        assert torch.autograd.grad(compiled(x).sum(), xi)[0].all()
    assert torch.equal(compiled(x), whole)


def test_torch_attention_is_refused():
    model = nn.TransformerEncoderLayer(16, 4, 16, batch_first=True).eval()
    with pytest.raises(ValueError, match="takes no hooks on its heads"):
        head_importance(model, [torch.randn(2, 5, 16)], lambda m, x: m(x).square().mean((1, 2)))
