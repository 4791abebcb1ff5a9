"""A sequence over several processes equals one process: outputs and all gradients, every mechanism, form and layout."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.distributed import SequenceParallel, counting_traffic, parallelize, shard, unshard
from attnzoo.distributed.costs import bytes_sent
from attnzoo.distributed.sequence import form_of, forms_of
from attnzoo.ops.distributed_attention import merge_partials
from tests.zoo import MECHANISMS, OPTIONS, TAKES, build

E = 32
EXACT = 1e-12

ALL, MIXED, GATHER, STATE = {"heads", "ring", "gather"}, {"ring", "gather"}, {"gather"}, {"state"}
# What each mechanism can do; one that is not here refuses every form.
FORMS: dict[str, set[str]] = {
    **dict.fromkeys(("mha", "mqa", "gqa", "gta", "kha", "kha-linear", "kha-gta", "mhe", "mhe-add"), ALL),
    **dict.fromkeys(("mla", "mla-pre", "kha-mla", "moh", "moh-few", "moh-norm", "moa", "mae-token"), ALL),
    **dict.fromkeys(("gated", "gated-value", "gated-key", "gated-dense", "complexformer", "dcmha-folded"), ALL),
    **dict.fromkeys(("dcmha", "talking-heads"), MIXED),
    **dict.fromkeys(("eit", "eit-efficient", "mgk", "mgk-hard", "smha", "diff", "diff-v2"), GATHER),
    **dict.fromkeys(("linear", "linear-lm", "mhla", "mhla-heads"), STATE),
}
LAYOUTS = ("zigzag", "contiguous", "striped")
MADE: dict[str, Any] = {
    "dcmha by groups": lambda **options: attnzoo.DynamicallyComposableAttention(
        E, 8, 4, head_groups=4, static_base=True, chunk_size=5, **options
    ),
    "talking heads of three numbers": lambda **options: attnzoo.TalkingHeadsAttention(
        E, 4, num_qk_heads=2, num_v_heads=8, **options
    ),
    "mhla": lambda **options: attnzoo.MultiHeadLinearAttention(E, 4, 2, block_size=5, num_blocks=16, **options),
    "mhla-heads": lambda **options: MECHANISMS["mhla-heads"](**options),
    "mla with biases": lambda **options: attnzoo.MultiHeadLatentAttention(
        E, 4, 20, num_kv_heads=2, rope_kv_heads=2, kv_b_bias=True, **options
    ),
    "pruned": lambda **options: pruned(attnzoo.GroupedQueryAttention(E, 8, 4, **options), (0, 1, 3, 6)),
    "pruned mla": lambda **options: pruned(
        attnzoo.MultiHeadLatentAttention(E, 8, 20, num_kv_heads=4, **options), (0, 3)
    ),
    "pruned dcmha": lambda **options: pruned(attnzoo.DynamicallyComposableAttention(E, 4, 2, **options), (2,)),
}


def pruned(module: Any, heads: tuple[int, ...]) -> Any:
    module.prune_heads(heads)
    return module


def made(name: str, **options: Any) -> Any:
    """A mechanism of the zoo or of `MADE`, the same on all ranks, in float64 and off its start."""
    torch.manual_seed(5)
    if name not in MADE:
        return build(name, **options)
    module = MADE[name](**options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def inputs(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """The whole x and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(2, batch, tokens, E, generator=generator, dtype=torch.float64)
    return x, w


def results(module: nn.Module, x: Tensor, w: Tensor, **call: Any) -> dict[str, Tensor]:
    """Output, and the gradients of (y w).sum() for x and every parameter."""
    x = x.clone().requires_grad_()
    y = module(x, **call)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * w).sum(), [x, *named.values()], allow_unused=True)
    zeros = [x, *named.values()]
    full = [torch.zeros_like(z) if g is None else g for z, g in zip(zeros, grads, strict=True)]
    return {"y": y.detach(), "x": full[0], **dict(zip(named, full[1:], strict=True))}


def sharded_results(module: Any, sp: SequenceParallel, x: Tensor, w: Tensor, **call: Any) -> dict[str, Tensor]:
    """The same from shards: outputs side by side, gradients summed over the ranks."""
    found = results(module, shard(x, 1, sp), shard(w, 1, sp), **call)
    for name, value in found.items():
        if name in ("y", "x"):
            found[name] = unshard(value, 1, sp)
        else:
            dist.all_reduce(value)
    return found


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], about: object, tolerance: float = EXACT
) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1.0) if value.numel() else 1.0
        error = float((found[name] - value).abs().max()) / scale if value.numel() else 0.0
        assert error <= tolerance, f"{about}, {name}: {error:.1e}"


def group_of(form: str) -> Any:
    """All ranks; for the hybrid form two rings of two, and pairs that share heads."""
    if form != "hybrid":
        return dist.group.WORLD
    if "pair" not in GROUPS:
        mine = dist.get_rank()
        for kind, members in (("heads", ((0, 1), (2, 3))), ("ring", ((0, 2), (1, 3)))):
            for ranks in members:
                group = dist.new_group(list(ranks))
                if mine in ranks:
                    GROUPS[kind] = group
        GROUPS["pair"] = (GROUPS["ring"], GROUPS["heads"])
    return GROUPS["pair"]


GROUPS: dict[str, Any] = {}


def tokens_for(name: str, prime: int = 7) -> int:
    """T = 2 P times a prime; of block mechanisms a multiple of their blocks in every layout."""
    return 2 * dist.get_world_size() * (20 if name == "mhla" and name not in MADE else 10 if "mhla" in name else prime)


# 1. Each form, layout and mechanism


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


@pytest.mark.parametrize("name", ["mha", "gqa", "gta", "mla", "moh", "moa", "dcmha", "talking-heads", "linear", "eit"])
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


# 2. One rank


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


# 4. Merging


def test_partial_results_merge():
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(3, 5, 2, 4, generator=generator, dtype=torch.float64)
    lses = 3 * torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    nothing = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    (a, b, c) = zip(outs, lses, strict=True)
    one, other = merge_partials(*merge_partials(*a, *b), *c), merge_partials(*a, *merge_partials(*b, *c))
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
    for x, y in zip(merge_partials(*a, *nothing), a, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-15, atol=1e-15)
    empty = [part.clone().requires_grad_() for part in (*nothing, *nothing)]
    out, lse = merge_partials(*empty)
    assert torch.equal(out, nothing[0])
    assert torch.equal(lse, nothing[1])
    for gradient in torch.autograd.grad(out.sum(), empty):
        assert torch.isfinite(gradient).all()


def check_unseen(form: str) -> None:
    module = parallelize(made("gqa"), SequenceParallel(None, form=form, layout="zigzag"))
    sp = module.sequence_parallel
    x, w = inputs(28)
    mask = AttentionMask.padding([28, 0])
    found = sharded_results(module, sp, x, w, mask=mask)
    assert torch.equal(found["y"][1], torch.zeros_like(found["y"][1]))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert_equal(found, results(made("gqa"), x, w, mask=mask), form)


@pytest.mark.parametrize("form", ["gather", "heads", "ring"])
def test_rows_without_keys(form, two):
    two.run(check_unseen, form)


# 5. and 6. Positions and causality


def check_positions(form: str, name: str, layout: str) -> None:
    module = parallelize(made(name), SequenceParallel(None, form=form, layout=layout))
    sp, T = module.sequence_parallel, tokens_for(name)
    x, w = inputs(T)
    expected = results(made(name), x, w)
    assert_equal(sharded_results(module, sp, x, w, positions=sp.positions(T) + 1000), expected, form, 1e-9)
    other = sharded_results(module, sp, x, w, positions=torch.arange(T // sp.size))
    assert float((other["y"] - expected["y"]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "form"), [("gqa", "gather"), ("gqa", "heads"), ("gqa", "ring"), ("mla", "ring"), ("linear-lm", "state")]
)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_positions_shift_together(name, form, layout, two):
    two.run(check_positions, form, name, layout)


def check_scaled_rotation(form: str) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 16}
    options = {"rope": attnzoo.Rotary(scaling=scaling)}
    x, w = inputs(28)
    module = made("gqa", **options)
    for given in (None, torch.arange(28) * 2):
        expected = results(module, x, w, positions=given)
        own = parallelize(made("gqa", **options), SequenceParallel(None, form=form, layout="zigzag"))
        local = None if given is None else shard(given, 0, own.sequence_parallel)
        assert_equal(sharded_results(own, own.sequence_parallel, x, w, positions=local), expected, form)


def test_rotation_that_depends_on_the_length(two):
    two.run(check_scaled_rotation, "gather")


def check_causality(name: str, form: str, layout: str) -> None:
    module = parallelize(made(name), SequenceParallel(None, form=form, layout=layout))
    sp, T = module.sequence_parallel, tokens_for(name)
    x, _ = inputs(T)
    changed = x.clone()
    place = int(sp.positions(T, rank=1)[0])
    changed[:, place] += 1
    before, after = (unshard(module(shard(one, 1, sp)).detach(), 1, sp) for one in (x, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gqa", "gather"),
        ("gqa", "heads"),
        ("gqa", "ring"),
        ("dcmha", "ring"),
        ("linear", "state"),
        ("mhla-heads", "state"),
    ],
)
def test_later_tokens_change_nothing(name, form, layout, two):
    two.run(check_causality, name, form, layout)


# 7. Masks of the whole sequence


def check_masks(name: str, form: str, layout: str, options: dict[str, Any], kinds: tuple[str, ...]) -> None:
    T = tokens_for(name)
    x, w = inputs(T)
    generator = torch.Generator().manual_seed(1)
    dense = (torch.rand(2, 4, T, T, generator=generator) < 0.7) | torch.eye(T, dtype=torch.bool)
    masks = {
        "padding": AttentionMask.padding([T - 3, 5]),
        "documents": AttentionMask.packed([0, 3, T // 2 + 2, T // 2 + 3, T - 1, T, T + 5, 2 * T]),
        "documents and padding": AttentionMask.packed([0, 9, T, 2 * T]) & AttentionMask.padding([T, T - 2]),
        "dense": AttentionMask.dense(dense),
        "dense keys": AttentionMask.dense(dense[:, :1, :1]),
    }
    for kind in kinds:
        expected = results(made(name, **options), x, w, mask=masks[kind])
        own = parallelize(made(name, **options), SequenceParallel(None, form=form, layout=layout))
        sp, mask = own.sequence_parallel, masks[kind]
        if kind == "dense":
            mask = AttentionMask.dense(shard(dense, 2, sp))
        assert_equal(sharded_results(own, sp, x, w, mask=mask), expected, (name, form, layout, kind))


STRUCTURED = ("padding", "documents", "documents and padding")


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form", "options", "kinds"),
    [
        ("gqa", "gather", {}, (*STRUCTURED, "dense", "dense keys")),
        ("gqa", "heads", {}, (*STRUCTURED, "dense", "dense keys")),
        ("gqa", "ring", {}, STRUCTURED),
        ("gqa", "gather", {"sliding_window": 5, "sink_tokens": 2}, STRUCTURED),
        ("gqa", "ring", {"sliding_window": 5, "sink_tokens": 2}, STRUCTURED),
        ("gqa", "ring", {"causal": False}, STRUCTURED),
        ("gqa", "gather", {"causal": False}, (*STRUCTURED, "dense")),
        ("mla", "ring", {}, STRUCTURED),
        ("mla", "heads", {}, STRUCTURED),
        ("mgk", "gather", {}, ("documents",)),
        ("smha", "gather", {}, STRUCTURED),
        ("moa", "gather", {}, STRUCTURED),
        ("dcmha", "gather", {}, (*STRUCTURED, "dense")),
        ("dcmha", "ring", {}, STRUCTURED),
        ("linear", "state", {}, STRUCTURED),
        ("linear", "state", {"causal": False}, STRUCTURED),
        ("linear-lm", "state", {}, STRUCTURED),
        ("mhla-heads", "state", {}, ("padding",)),
    ],
)
def test_masks_of_the_whole_sequence(name, form, layout, options, kinds, two):
    two.run(check_masks, name, form, layout, options, kinds)


def check_documents(form: str, layout: str) -> None:
    T, ends = 28, (5, 20, 28)
    x, w = inputs(T, batch=1)
    module = made("gqa")
    outs = [module(x[:, first:last]) for first, last in zip((0, *ends), ends, strict=False)]
    own = parallelize(made("gqa"), SequenceParallel(None, form=form, layout=layout))
    found = sharded_results(own, own.sequence_parallel, x, w, mask=AttentionMask.packed([0, *ends]))
    torch.testing.assert_close(found["y"], torch.cat(outs, 1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("form", ["gather", "heads", "ring"])
def test_documents_over_borders_are_separate(form, two):
    two.run(check_documents, form, "zigzag")
    two.run(check_documents, form, "contiguous")


def check_cross(layout: str) -> None:
    x, w = inputs(28)
    context = torch.randn(2, 20, E, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for name, options in (("gqa", {"rope": None}), ("dcmha", {"rope": None}), ("gqa", {})):
        pair = (torch.arange(28), torch.arange(20)) if not options else None
        module = made(name, causal=False, **options)
        expected = results(module, x, w, context=context, positions=pair)
        own = parallelize(copy.deepcopy(module), SequenceParallel(None, layout=layout))
        sp = own.sequence_parallel
        local = None if pair is None else (sp.positions(28), sp.positions(20))
        found = sharded_results(own, sp, x, w, context=shard(context, 1, sp), positions=local)
        assert_equal(found, expected, (name, layout))


def test_cross_attention(two):
    two.run(check_cross, "contiguous")
    two.run(check_cross, "zigzag")


# 8. Windows


def check_hops() -> None:
    for window in (1, 2, 8, 9, 40):
        x, w = inputs(14 * dist.get_world_size())
        expected = results(made("gqa", sliding_window=window), x, w)
        own = parallelize(made("gqa", sliding_window=window), SequenceParallel(None, form="ring"))
        sp = own.sequence_parallel
        assert sp.layout == "contiguous"
        with counting_traffic() as traffic:
            y = own(shard(x, 1, sp))
        hops = min(sp.size - 1, -(-(window - 1) // 14))
        assert traffic.sent == hops * 2 * 14 * 2 * 16 * 8
        del y
        assert_equal(sharded_results(own, sp, x, w), expected, window)
        other = parallelize(made("gqa", sliding_window=window), SequenceParallel(None, form="ring", layout="zigzag"))
        assert_equal(sharded_results(other, other.sequence_parallel, x, w), expected, (window, "zigzag"))


def test_windows_reach_as_far_as_they_need(two):
    two.run(check_hops)


@pytest.mark.slow
def test_windows_of_four(four):
    four.run(check_hops)


# 9. Routers


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


# 11. Bytes


def check_bytes(name: str, form: str, sent: dict[str, int]) -> None:
    """Bytes sent against formulas of P, T, b and the mechanism's sizes."""
    module = parallelize(made(name), SequenceParallel(None, form=form, layout="contiguous"))
    sp, T = module.sequence_parallel, 28 if "mhla" not in name else 40
    x, w = inputs(T, batch=1)
    own = shard(x, 1, sp).requires_grad_()
    with counting_traffic() as forward:
        y = module(own)
    with counting_traffic() as backward:
        (y * shard(w, 1, sp)).sum().backward()
    assert {"forward": forward.sent, "backward": backward.sent} == sent, (name, form)


@pytest.mark.parametrize("name", [*FORMS, "dcmha by groups"])
def test_bytes_are_those_of_the_formulas(name, two):
    T = 40 if "mhla" in name else 28
    for form in sorted(FORMS.get(name, ALL)):
        sent = bytes_sent(made(name), form, T, 2, torch.float64)
        two.run(check_bytes, name, form, dict(zip(("forward", "backward"), sent, strict=True)))


def test_formulas_in_numbers():
    """T 131072, P 8, bfloat16, D = Dv = 128, in GB of the forward pass."""
    options: dict[str, Any] = {"head_dim": 128, "device": "meta"}
    latent = attnzoo.MultiHeadLatentAttention(
        4096, 128, 512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, device="meta"
    )
    for module, form, gigabytes in (
        (attnzoo.MultiHeadAttention(4096, 32, **options), "ring", 1.88),
        (attnzoo.MultiHeadAttention(4096, 32, **options), "heads", 0.47),
        (attnzoo.GroupedQueryAttention(4096, 32, 8, **options), "ring", 0.47),
        (attnzoo.GroupedQueryAttention(4096, 32, 8, **options), "heads", 0.29),
        (attnzoo.MultiQueryAttention(4096, 32, **options), "ring", 0.06),
        (attnzoo.GroupedTiedAttention(4096, 32, 4, **options), "ring", 0.13),
        (latent, "ring", 0.13),
        (attnzoo.DynamicallyComposableAttention(4096, 32, rank=2, **options), "gather", 1.95),
        (attnzoo.DynamicallyComposableAttention(4096, 32, rank=2, **options), "ring", 2.93),
        (attnzoo.LinearAttention(4096, 32, **options), "state", 0.015),
        (attnzoo.MultiHeadLinearAttention(4096, 32, 8, block_size=64, num_blocks=2048, **options), "state", 0.94),
        (attnzoo.MultiHeadLinearAttention(4096, 32, 8, block_size=256, num_blocks=512, **options), "state", 0.23),
    ):
        sent = bytes_sent(module, form, 131072, 8)[0] / 1e9
        assert abs(sent - gigabytes) <= 0.005 * max(1, gigabytes), (type(module).__name__, form, sent)


# 12. Decoding


def check_decoding(name: str, form: str, layout: str, options: dict[str, Any]) -> None:
    module = made(name, **options).eval()
    prompt, new = tokens_for(name), 7
    x, _ = inputs(prompt + new)
    mask = None
    with torch.no_grad():
        expected = module(x)
        own = parallelize(copy.deepcopy(module), SequenceParallel(None, form=form, layout=layout))
        sp = own.sequence_parallel
        cache = own.init_cache(2, prompt + new)
        y = unshard(own(shard(x[:, :prompt], 1, sp), mask=mask, cache=cache), 1, sp)
        assert_equal({"y": y}, {"y": expected[:, :prompt]}, (name, form, "prompt"))
        assert cache.length == prompt
        for at, count in ((0, 1), (1, 3), (4, 1), (5, 2)):
            y = own(x[:, prompt + at : prompt + at + count], cache=cache)
            assert_equal({"y": y}, {"y": expected[:, prompt + at : prompt + at + count]}, (name, form, at))
        plain = module.init_cache(2, prompt + new)
        module(x, cache=plain)
        if form != "state":
            assert cache.nbytes < 0.7 * plain.nbytes or "sliding_window" in options
            cache.truncate(prompt + 2)
            y = own(x[:, prompt + 2 : prompt + 4], cache=cache)
            assert_equal({"y": y}, {"y": expected[:, prompt + 2 : prompt + 4]}, (name, form, "again"))
            with pytest.raises(ValueError, match="length must be 0 or lie between"):
                cache.truncate(3)
            with pytest.raises(ValueError, match="cache is full"):
                own(x[:, :7], cache=cache)
            assert cache.length == prompt + 4


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("gqa", "gather", {}), ("gqa", "ring", {"sink": "learned"}), ("gqa", "heads", {"sliding_window": 5}),
        ("mqa", "ring", {"alibi": True, "rope": None}), ("gta", "ring", {}), ("mla", "heads", {"absorb": False}),
        ("kha-gta", "gather", {"knock_scope": "value"}), ("mla", "ring", {}), ("mla with biases", "gather", {}),
        ("dcmha", "gather", {}),
        ("dcmha", "ring", {}), ("talking-heads", "ring", {}), ("eit", "gather", {}), ("moh", "gather", {}),
        ("gated", "heads", {}), ("diff", "gather", {}), ("linear", "state", {}), ("mhla-heads", "state", {}),
        ("moa", "gather", {}),
    ],
)  # fmt: skip
def test_decoding_from_a_sharded_cache(name, form, options, layout, two):
    two.run(check_decoding, name, form, layout, options)


# 14. and refusals


def check_repeatable(name: str, form: str) -> None:
    x, w = inputs(tokens_for(name))
    module = parallelize(made(name), SequenceParallel(None, form=form, layout="zigzag"))
    one, other = (sharded_results(module, module.sequence_parallel, x, w) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "form"), [("gqa", "ring"), ("gqa", "heads"), ("mla", "gather"), ("dcmha", "ring")])
def test_two_runs_are_bitwise_equal(name, form, two):
    two.run(check_repeatable, name, form)


def refusal(name: str, form: str, layout: str, options: dict[str, Any], call: dict[str, Any], tokens: int) -> str:
    try:
        module = parallelize(made(name, **options), SequenceParallel(None, form=form, layout=layout))
        if tokens:
            module.train()(torch.zeros(2, tokens, E, dtype=torch.float64), **call)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("name", "form", "layout", "options", "call", "tokens", "message"),
    [
        ("gqa", "state", "zigzag", {}, {}, 0, "form must be one of heads, ring, gather or auto"),
        ("linear", "ring", "zigzag", {}, {}, 0, "its tokens are summed into states"),
        ("eit", "ring", "zigzag", {}, {}, 0, "form must be one of gather or auto"),
        ("talking-heads", "heads", "zigzag", {}, {}, 0, "form must be one of ring, gather or auto"),
        ("dcmha", "heads", "zigzag", {}, {}, 0, "a number of ranks that divides head_groups 1"),
        ("rcmha", "gather", "zigzag", {}, {}, 0, "its convolutions and tables of distances reach over the border"),
        ("mae", "gather", "zigzag", {}, {}, 0, "gate_input must be 'token'"),
        ("static-context", "gather", "zigzag", {}, {}, 0, "its static tokens are no part of one sequence"),
        ("mgk-linear", "gather", "zigzag", {}, {}, 0, "attention must be 'softmax'"),
        ("gqa", "gather", "striped", {"sliding_window": 4}, {}, 0, "layout 'striped' takes windows and blocks"),
        ("linear", "state", "striped", {}, {}, 0, "layout 'striped' takes windows and blocks"),
        ("gqa", "ring", "zigzag", {"dropout": 0.1}, {}, 0, "dropout of attention weights must be 0, got 0.1"),
        ("mhla", "state", "zigzag", {}, {}, 14, "must have runs of whole blocks"),
        ("mhla", "state", "zigzag", {}, {"mask": AttentionMask.packed([0, 64])}, 16, "every document starts a new"),
        ("gqa", "gather", "zigzag", {}, {}, 7, "must be a multiple of 4 for layout 'zigzag', got 14"),
        ("gqa", "ring", "zigzag", {}, {"mask": torch.ones(8, 16, dtype=torch.bool)}, 8, "mask must not be dense"),
        ("gqa", "gather", "zigzag", {}, {"mask": torch.ones(8, 8, dtype=torch.bool)}, 8, "mask must broadcast to"),
        ("gqa", "gather", "striped", {}, {"mask": AttentionMask.packed([0, 32])}, 8, "must not be packed with layout"),
        ("gqa", "ring", "zigzag", {"causal": False, "rope": None},
         {"context": torch.zeros(2, 8, E, dtype=torch.float64)}, 8, "context needs form 'gather'"),
    ],
)  # fmt: skip
def test_refusals(name, form, layout, options, call, tokens, message, two):
    assert all(message in text for text in two.run(refusal, name, form, layout, options, call, tokens))


def check_other_sizes() -> str:
    os.environ.pop("unused", None)
    dist.set_debug_level(dist.DebugLevel.INFO)
    try:
        module = parallelize(made("gqa"), SequenceParallel(None, form="gather", layout="contiguous"))
        module(torch.zeros(1 + dist.get_rank(), 4, E, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return "nothing was refused"


def test_different_sizes_are_named_in_debug_mode(two):
    assert all("same batch and tokens on all ranks" in text for text in two.run(check_other_sizes))


def test_it_needs_processes():
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed to be initialized"):
        SequenceParallel(None)


class Inherits(attnzoo.GroupedQueryAttention):
    """Another forward: what its base can do says nothing about it."""

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        return super().forward(x.cumsum(1), **call)


def test_another_forward_inherits_no_form():
    assert forms_of(Inherits(E, 4)) == ()
    assert forms_of(attnzoo.MultiHeadAttention(E, 4)) == forms_of(attnzoo.GroupedQueryAttention(E, 4)) != ()


def check_copies() -> None:
    model = parallelize(nn.Sequential(made("gqa"), made("linear")), SequenceParallel(None))
    assert model[0].sequence_parallel.layout == model[1].sequence_parallel.layout == "zigzag"
    assert copy.deepcopy(model)[0].sequence_parallel is None


def test_a_copy_is_of_one_process(two):
    two.run(check_copies)


# 13. A killed rank


def _dies(rank: int, folder: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=5)
    )
    module = parallelize(made("gqa"), SequenceParallel(None, form="ring", layout="zigzag"))
    x = torch.zeros(2, 8, E, dtype=torch.float64)
    module(x)
    if rank == 1:
        os._exit(9)
    try:
        module(x)
    except RuntimeError as error:
        (folder / "message").write_text(str(error))
        os._exit(3)
    os._exit(0)


def test_a_killed_rank_ends_the_others(tmp_path):
    started = [
        torch.multiprocessing.get_context("fork").Process(target=_dies, args=(rank, tmp_path)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    assert [process.exitcode for process in started] == [3, 9]
    assert (tmp_path / "message").read_text()
