"""A sequence over several processes equals one process: outputs and all gradients, every mechanism, form and layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.diagnostics import capture
from attnzoo.distributed import SequenceParallel, counting_traffic, parallelize, shard
from attnzoo.distributed.sequence import form_of
from tests.distributed.comparison import (
    EXACT,
    FORMS,
    LAYOUTS,
    MADE,
    STATE,
    E,
    assert_equal,
    group_of,
    inputs,
    made,
    results,
    sharded_results,
    tokens_for,
)
from tests.zoo import MECHANISMS, OPTIONS, TAKES


def check_forms(name: str, forms: tuple[str, ...], layouts: tuple[str, ...], options: dict[str, Any]) -> list[str]:
    """Compare all forms with one process; returns the forms and layouts that ran."""
    module, ran = made(name, **options), []
    causal = options.get("causal", True)
    x, w = inputs(tokens_for(name))
    torch.manual_seed(1)
    expected = results(module, x, w)
    for form in forms:
        for layout in layouts:
            sp = SequenceParallel(group_of(form), form=form, layout=layout)
            own = copy.deepcopy(module)
            try:
                parallelize(own, sp)
            except ValueError as error:
                ran.append(f"{form} {layout}: {error}")
                continue
            torch.manual_seed(1)
            assert_equal(sharded_results(own, sp, x, w), expected, (name, form, layout, options, causal))
            ran.append(f"{form} {layout}")
    return ran


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_form_equals_one_process(name, two):
    ran = two.run(check_forms, name, ("gather", "heads", "ring", "state"), LAYOUTS[:2], {})[0]
    assert {line for line in ran if ":" not in line} == {f"{f} {p}" for f in FORMS.get(name, ()) for p in LAYOUTS[:2]}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("gqa", "mla", "talking-heads") else pytest.mark.slow) for name in FORMS],
)
def test_striped_layout(name, two):
    ran = two.run(check_forms, name, ("gather", "heads", "ring", "state"), ("striped",), {})[0]
    assert {line for line in ran if ":" not in line} == {f"{form} striped" for form in FORMS[name] - STATE}


@pytest.mark.parametrize("name", MADE)
def test_sizes_and_pruned_heads(name, two):
    ran = two.run(check_forms, name, ("gather", "heads", "ring", "state"), ("zigzag",), {})[0]
    assert [line for line in ran if ":" not in line]


@pytest.mark.parametrize(
    "name", ["mha", "gqa", "gta", "mla", "moh", "moa", "dcmha", "talking-heads", "linear", "eit", "tpa", "sigmoid"]
)
def test_bidirectional(name, two):
    ran = two.run(check_forms, name, ("gather", "heads", "ring", "state"), ("zigzag", "contiguous"), {"causal": False})[
        0
    ]
    assert {line for line in ran if ":" not in line} >= {f"{form} contiguous" for form in FORMS[name]}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["gqa", "gta", "dcmha", "talking-heads"])
def test_options(name, option, two):
    if option not in TAKES.get(name, tuple(OPTIONS)):
        pytest.skip("the mechanism has no such option")
    for causal in (True, False):
        if not causal and "sliding_window" in OPTIONS[option] and name in ("dcmha", "talking-heads"):
            continue
        options = {**OPTIONS[option], "causal": causal}
        ran = two.run(check_forms, name, ("gather", "heads", "ring"), ("zigzag", "contiguous"), options)[0]
        assert {line for line in ran if ":" not in line} == {f"{f} {p}" for f in FORMS[name] for p in LAYOUTS[:2]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MECHANISMS if name in FORMS] + list(MADE))
def test_four_processes(name, four):
    ran = four.run(check_forms, name, ("gather", "heads", "ring", "state", "hybrid"), LAYOUTS[:2], {})[0]
    lines = {line for line in ran if ":" not in line}
    assert lines
    if "heads" in FORMS.get(name, ()) and "ring" in FORMS.get(name, ()):
        assert {"hybrid zigzag", "hybrid contiguous"} <= lines


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "mla", "moa"])
def test_stripes_in_the_hybrid_form(name, four):
    assert four.run(check_forms, name, ("hybrid",), ("striped",), {})[0] == ["hybrid striped"]


def check_pairs(layout: str) -> None:
    whole = dist.group.WORLD
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    x, w = inputs(28)
    expected = results(made("gqa"), x, w)
    for pair in ((whole, alone), (alone, whole)):
        sp = SequenceParallel(pair, form="hybrid", layout=layout)
        held = [sp.positions(28, rank) for rank in range(2)]
        assert sorted(torch.cat(held).tolist()) == list(range(28))
        assert_equal(sharded_results(parallelize(made("gqa"), sp), sp, x, w), expected, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hybrid_form_of_a_pair(layout, two):
    two.run(check_pairs, layout)


def check_auto(name: str) -> str:
    module = made(name)
    x, w = inputs(tokens_for(name))
    expected = results(module, x, w)
    sp = SequenceParallel(dist.group.WORLD).resolved(module)
    assert_equal(sharded_results(parallelize(module, sp), sp, x, w), expected, name)
    return f"{form_of(module, sp, 7)} {sp.layout}"


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("gqa", "heads zigzag"), ("mqa", "gather zigzag"), ("moh", "gather zigzag"), ("dcmha", "gather zigzag"),
        ("dcmha by groups", "heads zigzag"), ("linear", "state contiguous"), ("mla", "heads zigzag"),
    ],
)  # fmt: skip
def test_auto(name, choice, two):
    assert two.run(check_auto, name)[0] == choice


def check_alone(name: str) -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    module = made(name)
    x, w = inputs(20)
    expected = results(module, x, w)
    parallelize(module, SequenceParallel(groups[dist.get_rank()]))
    with counting_traffic() as traffic:
        found = results(module, x, w)
    assert traffic.calls == 0
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["gqa", "mla", "dcmha", "linear", "mhla"])
def test_one_rank_is_the_plain_path(name, two):
    two.run(check_alone, name)


def check_routers(name: str, form: str) -> None:
    T = 28
    x, w = inputs(T)
    mask = AttentionMask.padding([T, 9])
    module = made(name).train()
    y = module(x, mask=mask)
    aux = module.aux_loss
    named = dict(module.named_parameters())
    expected = torch.autograd.grad((y * w).sum() + aux, list(named.values()), allow_unused=True)
    own = parallelize(made(name), SequenceParallel(None, form=form, layout="zigzag")).train()
    sp = own.sequence_parallel
    y = own(shard(x, 1, sp), mask=mask)
    torch.testing.assert_close(own.aux_loss, aux, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(own.routing.load, module.routing.load, rtol=EXACT, atol=EXACT)
    # Gradients averaged over the ranks: each rank's loss is P times its part, and the same auxiliary loss.
    loss = sp.size * (y * shard(w, 1, sp)).sum() + own.aux_loss
    found = torch.autograd.grad(loss, list(own.parameters()), allow_unused=True)
    for key, one, other in zip(named, found, expected, strict=True):
        if other is not None:
            dist.all_reduce(one)
            torch.testing.assert_close(
                one / sp.size, other, rtol=1e-10, atol=EXACT, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", ["moh", "moh-norm", "moa", "smha"])
def test_routers_balance_over_the_sequence(name, two):
    two.run(check_routers, name, "gather")


def check_empty(name: str) -> None:
    for form in sorted(FORMS[name]):
        module = parallelize(made(name), SequenceParallel(None, form=form, layout="zigzag"))
        for batch, tokens in ((0, 20), (2, 0)):
            x = torch.zeros(batch, tokens, E, dtype=torch.float64, requires_grad=True)
            y = module(x)
            y.sum().backward()
            assert y.shape == x.shape, (name, form)


@pytest.mark.parametrize("name", ["gqa", "mla", "dcmha", "talking-heads", "linear", "mhla-heads", "tpa"])
def test_nothing_stays_nothing(name, two):
    two.run(check_empty, name)


def check_observed(name: str, form: str) -> None:
    module = parallelize(made(name), SequenceParallel(None, form=form, layout="zigzag"))
    x = shard(inputs(28)[0], 1, module.sequence_parallel)
    with capture(module, ["outputs"]) as captured, torch.no_grad():
        module(x)
    assert captured.last("outputs")[0].shape == (2, 4, x.shape[1], 8)
    for what in ("patterns", "queries", "keys"):
        with pytest.raises(ValueError, match=rf"has no .*{what}"), capture(module, [what]):
            module(x)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gqa", "gather"),
        ("gqa", "heads"),
        ("gqa", "ring"),
        ("mla", "heads"),
        ("dcmha", "gather"),
        ("sigmoid", "gather"),
        ("mgk", "gather"),
    ],
)
def test_patterns_of_some_tokens_do_not_pass_for_the_module(name, form, two):
    """A rank's calls are over some of the queries, or some of the heads."""
    two.run(check_observed, name, form)


def check_again() -> None:
    whole, pair = dist.group.WORLD, dist.new_group([0, 1])
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = nn.Sequential(made("moh"), made("gqa"), made("mgk"))
    for group, expected in ((whole, whole), (pair, pair), (alone, None), (pair, pair)):
        parallelize(model, SequenceParallel(group, form="gather"))
        assert model[0].aux_loss_group is model[2].aux_loss_group is expected
        copied = copy.deepcopy(model)
        assert copied[0].aux_loss_group is copied[2].aux_loss_group is None
        assert all(layer.sequence_parallel.group is group for layer in model)
    attnzoo.sync_aux_loss(model)
    parallelize(model[:2], SequenceParallel(pair, form="ring"))
    assert model[0].aux_loss_group is whole


def test_a_model_is_parallelized_again(two):
    two.run(check_again)


def check_repeatable(name: str, form: str) -> None:
    x, w = inputs(tokens_for(name))
    module = parallelize(made(name), SequenceParallel(None, form=form, layout="zigzag"))
    one, other = (sharded_results(module, module.sequence_parallel, x, w) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "form"), [("gqa", "ring"), ("gqa", "heads"), ("mla", "gather"), ("dcmha", "ring")])
def test_two_runs_are_bitwise_equal(name, form, two):
    two.run(check_repeatable, name, form)
