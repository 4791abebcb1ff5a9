"""Multi-head and grouped-query layers as latent attention, and as knocking heads."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import Rotary
from attnzoo.conversion import InputStatistics, allocate_ranks, fold, latent_energies, mha2mla, to_kha
from attnzoo.conversion.factors import roots
from attnzoo.modules.heads import head_rows
from tests.zoo import gradients

GOLDEN = Path(__file__).parent / "golden" / "mha2mla.safetensors"
E, H, G, D = 24, 6, 2, 8


def layer(kind="gqa", **options):
    torch.manual_seed(4)
    sizes = {"mha": (E, H, D), "mqa": (E, H, D), "gqa": (E, H, G, D)}[kind]
    classes = {"mha": attnzoo.MultiHeadAttention, "mqa": attnzoo.MultiQueryAttention}
    attn = classes.get(kind, attnzoo.GroupedQueryAttention)(*sizes, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(T=9):
    return torch.randn(2, T, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_stored_figures():
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    g, width = config["G"], config["D"]
    source = attnzoo.GroupedQueryAttention(config["E"], config["H"], g, width, rope=Rotary(theta=config["rope_theta"]))
    source.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    source.double()
    x, w = t["input.x"].double(), t["input.w"].double()
    assert (source(x) - t["output.y_mha"]).abs().max() < 1e-9
    options = {"rope_dim": config["rope_dim"], "calib": t["input.calib"].double(), "weighting": "weights"}
    partial, _ = mha2mla(source, svd="none", **options)
    assert (partial(x) - t["output.y_partial_rope"]).abs().max() < 1e-9
    latent, report = mha2mla(source, kv_rank=g * config["low_rank"], **options)
    best = t["output.rope_rank"][:, : width // 2] < config["rope_dim"] // 2
    assert report.rope_pairs == tuple(tuple(row.nonzero().flatten().tolist()) for row in best)
    nope, rank = latent.qk_nope_head_dim, latent.kv_lora_rank
    down = latent.kv_a_proj_with_mqa.weight[:rank]
    up = latent.kv_b_proj.weight.view(g, -1, rank)
    assert (up[:, :nope].flatten(0, 1) @ down - t["output.k_nope_weight"]).abs().max() < 1e-9
    assert (up[:, nope:].flatten(0, 1) @ down - t["output.v_weight"]).abs().max() < 1e-9
    found = gradients(latent, x, w, positions=t["input.position_ids"])
    assert (found["y"] - t["output.y"]).abs().max() < 1e-9
    assert (found["x"] - t["grad.x"]).abs().max() < 1e-9
    assert (found["o_proj.weight"] - t["grad.o_proj.weight"]).abs().max() < 1e-9
    assert (found["kv_a_proj_with_mqa.weight"][rank:] - t["grad.k_rope_rows_weight"]).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_all_rotation_and_full_rank_are_the_source(kind, causal, bias):
    source = layer(kind, causal=causal, bias=bias)
    groups = source.num_kv_heads
    latent, report = mha2mla(source, rope_dim=D, kv_rank=min(E, groups * D), rope_select="high")
    torch.testing.assert_close(latent(sample()), source(sample()), atol=1e-12, rtol=0)
    assert report.rel_error < 1e-7
    assert report.key_rel_error == 0


def correlated(tokens=200):
    """Inputs whose directions differ in size, with a mean."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(2, tokens // 2, E, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, E).double()
    return x @ torch.randn(E, E, generator=draw, dtype=torch.float64) + 0.3


def products(latent, rank):
    """The key and value weights (G, dn + Dv, E) that the latent layer multiplies by."""
    return (latent.kv_b_proj.weight.view(G, -1, rank) @ latent.kv_a_proj_with_mqa.weight[:rank]).detach()


WEIGHTINGS = ["weights", "activations", "two-sided"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize(("kind", "bias"), [("gqa", True), ("gqa", False), ("mha", False)])
def test_every_weighting_is_exact_at_full_rank(weighting, tokens, kind, bias):
    source, x = layer(kind, bias=bias), sample()
    groups = source.num_kv_heads
    options = {"calib": correlated(200)[:, : (tokens + 1) // 2], "weighting": weighting}
    rank = min(E, groups * D)
    latent, report = mha2mla(source, rope_dim=D, kv_rank=rank, **options)
    torch.testing.assert_close(latent(x), source(x), atol=1e-9, rtol=0)
    assert (report.weighting, report.rank) == (weighting, rank)
    partial, _ = mha2mla(source, rope_dim=4, rope_select="high", svd="none")
    factorisations = [{"svd": "joint", "kv_rank": E}]
    if kind == "gqa":
        factorisations.append({"svd": "split", "kv_rank": 24, "kv_rank_split": (8, 16)})
    for split in factorisations:
        latent, _ = mha2mla(source, rope_dim=4, rope_select="high", **split, **options)
        torch.testing.assert_close(latent(x), partial(x), atol=1e-8, rtol=0)


def test_all_rotation_needs_no_calibration():
    latent, report = mha2mla(layer(), rope_dim=D, kv_rank=G * D)
    assert report.rope_pairs == (tuple(range(D // 2)),) * G
    torch.testing.assert_close(latent(sample()), layer()(sample()), atol=1e-12, rtol=0)


@pytest.mark.parametrize("svd", [{"svd": "joint"}, {"svd": "split"}])
def test_a_weighting_loses_least_of_what_it_weighs(svd):
    source, x, rank = layer(bias=True), correlated(), 8
    options = {"rope_dim": 4, "rope_select": "high", "kv_rank": rank, "calib": x, **svd}
    latents = {weighting: mha2mla(source, weighting=weighting, **options) for weighting in WEIGHTINGS}
    exact = torch.cat([source.k_proj.weight.view(G, D, E)[:, [2, 3, 6, 7]], source.v_proj.weight.view(G, D, E)], 1)
    lost = {
        weighting: float(((exact.detach() - products(latent, rank)) @ x.flatten(0, 1).mT).square().mean().sqrt())
        for weighting, (latent, _) in latents.items()
    }
    assert lost["activations"] < 0.8 * lost["weights"]
    assert lost["activations"] < lost["two-sided"]
    assert latents["two-sided"][1].output_rel_error_of_svd < latents["weights"][1].output_rel_error_of_svd
    _, report = latents["activations"]
    if svd["svd"] == "joint":
        size = float((exact.detach() @ x.flatten(0, 1).mT).square().mean().sqrt())
        assert report.rel_error == pytest.approx(lost["activations"] / size, rel=1e-6)
        parts = torch.tensor([report.key_rel_error, report.value_rel_error])
        assert parts.min() < report.rel_error < parts.max()


def test_the_default_weighting_is_by_what_is_given():
    source, options = layer(), {"rope_dim": 4, "rope_select": "high", "kv_rank": 8}
    assert mha2mla(source, **options)[1].weighting == "weights"
    assert mha2mla(source, calib=correlated(), **options)[1].weighting == "activations"


def test_statistics_stand_for_the_states():
    source, x = layer(bias=True), correlated()
    options = {"rope_dim": 4, "kv_rank": 8, "weighting": "two-sided", "key_weight": 2.0}
    from_states, full = mha2mla(source, calib=x, **options)
    statistics = InputStatistics(E, source)
    for part in x:
        statistics.update(part)
    from_sums, report = mha2mla(source, calib=statistics, **options)
    torch.testing.assert_close(from_sums(sample()), from_states(sample()), atol=1e-9, rtol=0)
    assert (report.rope_pairs, report.output_rel_error) == (full.rope_pairs, None)
    assert report.score_kept == pytest.approx(full.score_kept)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_what_a_weighting_does_not_depend_on(weighting):
    source = layer()
    options = {"rope_dim": 4, "rope_select": "high", "kv_rank": 8, "weighting": weighting}
    by = {scale: mha2mla(source, calib=scale * correlated(), **options)[0] for scale in (1.0, 100.0)}
    torch.testing.assert_close(products(by[1.0], 8), products(by[100.0], 8), atol=1e-8, rtol=0)
    shared, _ = mha2mla(source, calib=correlated(), balance="sqrt", **options)
    torch.testing.assert_close(products(shared, 8), products(by[1.0], 8), atol=1e-8, rtol=0)
    down = by[1.0].kv_a_proj_with_mqa.weight[:8].detach()
    torch.testing.assert_close(down @ down.T, torch.eye(8).double(), atol=1e-10, rtol=0)


def test_equal_inputs_in_all_directions_weigh_nothing():
    source, options = layer(), {"rope_dim": 4, "rope_select": "high", "kv_rank": 8}
    plain, _ = mha2mla(source, **options)
    weighed, report = mha2mla(source, calib=torch.eye(E).double()[None], **options)
    torch.testing.assert_close(products(weighed, 8), products(plain, 8), atol=1e-9, rtol=0)
    assert report.weighting == "activations"


def test_the_two_sided_weights_are_those_of_scores_and_outputs():
    """One key/value head that a single query reads: its scores and outputs have the least error of this rank."""
    torch.manual_seed(1)
    source = attnzoo.GroupedQueryAttention(E, 1, 1, D, rope=Rotary(), bias=True, dtype=torch.float64)
    torch.nn.init.normal_(source.q_proj.bias)
    x = correlated()
    options = {"rope_dim": 2, "rope_select": "high", "svd": "split", "kv_rank": 8, "calib": x}
    q, k = (linear(x[0])[:, [1, 2, 3, 5, 6, 7]] for linear in (source.q_proj, source.k_proj))
    v = torch.nn.functional.linear(x[0], source.o_proj.weight @ source.v_proj.weight)

    def errors(weighting):
        latent, _ = mha2mla(source, weighting=weighting, **options)
        key, value = (latent.kv_b_proj.weight @ latent.kv_a_proj_with_mqa.weight[:8]).split([6, D])
        scores = q @ (torch.nn.functional.linear(x[0], key, source.k_proj.bias[[1, 2, 3, 5, 6, 7]]) - k).mT
        outputs = torch.nn.functional.linear(x[0], source.o_proj.weight @ value) - v
        return float(scores.detach().norm()), float(outputs.detach().norm())

    both = errors("two-sided")
    for other in ("weights", "activations"):
        assert all(best < worse for best, worse in zip(both, errors(other), strict=True))


def test_a_larger_key_weight_keeps_more_of_the_keys():
    options = {"rope_dim": 2, "rope_select": "high", "kv_rank": 10, "calib": correlated(), "weighting": "two-sided"}
    reports = [mha2mla(layer(), key_weight=weight, **options)[1] for weight in (0.25, 1, 4)]
    for before, after in itertools.pairwise(reports):
        assert after.key_rel_error < before.key_rel_error
        assert after.value_rel_error > before.value_rel_error


def test_roots_of_a_moment():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 40, dtype=torch.float64)
    moment = x @ x.mT
    root, inverse = roots(moment)
    torch.testing.assert_close(root @ root, moment)
    torch.testing.assert_close(root @ inverse, torch.eye(3).double().expand(5, 3, 3), atol=1e-9, rtol=0)
    assert torch.isfinite(roots(torch.zeros(2, 2).double())[1]).all()
    assert roots(torch.zeros(2, 0, 0))[0].shape == (2, 0, 0)


def test_ranks_of_layers_are_the_best_of_their_budget():
    draw = torch.Generator().manual_seed(5)
    energies = [torch.rand(n, generator=draw, dtype=torch.float64).sort(descending=True).values for n in (5, 3, 6)]
    for budget in range(3, 15):
        ranks = allocate_ranks(energies, budget)
        assert sum(ranks) == budget

        def lost(ranks):
            return sum(float(e[r:].sum() / e.sum()) for e, r in zip(energies, ranks, strict=True))

        every = itertools.product(range(1, 6), range(1, 4), range(1, 7))
        assert lost(ranks) == pytest.approx(min(lost(r) for r in every if sum(r) == budget), abs=1e-12)
    for budget in (2, 15):
        with pytest.raises(ValueError, match=f"budget must lie between 3 and 14 for 3 layers, got {budget}"):
            allocate_ranks(energies, budget)


def test_the_energies_are_those_that_a_conversion_keeps():
    options = {"rope_dim": 4, "rope_select": "high", "weighting": "two-sided", "calib": correlated()}
    energies = latent_energies(layer(), **options)
    for rank in (1, 6, 20):
        _, report = mha2mla(layer(), kv_rank=rank, **options)
        assert report.energy_kept == pytest.approx(float(energies[:rank].sum() / energies.sum()))


def test_casts_of_a_converted_layer_leave_its_frequencies():
    latent, _ = mha2mla(layer(), rope_dim=4, kv_rank=10, calib=sample())
    x, at = sample(), torch.arange(9) * 500
    exact = latent(x, positions=at)
    rounded = latent.bfloat16().double()
    weights_alone = mha2mla(layer(), rope_dim=4, kv_rank=10, calib=sample())[0]
    weights_alone.load_state_dict(
        {**rounded.state_dict(), "rope_inv_freq": weights_alone.state_dict()["rope_inv_freq"]}
    )
    assert torch.equal(rounded(x, positions=at), weights_alone(x, positions=at))
    assert (rounded(x, positions=at) - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("select", ["2-norm", "high", "low", "uniform"])
@pytest.mark.parametrize("rope_dim", [0, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_full_rank_is_partial_rotation_alone(select, rope_dim, bias):
    source = layer(bias=bias)
    options = {"rope_dim": rope_dim, "rope_select": select, "calib": sample()}
    partial, _ = mha2mla(source, svd="none", **options)
    x, rank = sample(7), min(E, G * (2 * D - rope_dim))
    for more in ({}, {"balance": "sqrt"}):
        latent, report = mha2mla(source, **options, **more, kv_rank=rank)
        torch.testing.assert_close(latent(x), partial(x), atol=1e-10, rtol=0)
        assert report.energy_kept == pytest.approx(1.0)
        assert report.output_rel_error_of_svd < 1e-9


@pytest.mark.parametrize("select", ["high", "low", "uniform"])
def test_repeated_heads_change_nothing_at_full_rank(select):
    options = {"rope_dim": 4, "rope_select": select, "kv_rank": E}
    source = layer()
    wide, _ = mha2mla(source, expand_gqa=True, **options)
    assert wide.num_kv_heads == H
    torch.testing.assert_close(wide(sample()), mha2mla(source, **options)[0](sample()), atol=1e-10, rtol=0)


def test_a_split_at_full_ranks_is_partial_rotation_alone():
    source = layer()
    partial, _ = mha2mla(source, rope_dim=6, rope_select="high", svd="none")
    ranks = (G * 2, G * D)
    latent, _ = mha2mla(source, rope_dim=6, rope_select="high", svd="split", kv_rank=sum(ranks), kv_rank_split=ranks)
    torch.testing.assert_close(latent(sample()), partial(sample()), atol=1e-10, rtol=0)


def test_a_nine_to_three_layer_and_the_error_by_rank():
    torch.manual_seed(0)
    source = attnzoo.GroupedQueryAttention(72, 9, 3, 8, dtype=torch.float64)
    x = torch.randn(2, 20, 72, dtype=torch.float64)
    latent, _ = mha2mla(source, rope_dim=8, rope_select="high", kv_rank=24)
    torch.testing.assert_close(latent(x), source(x), atol=1e-10, rtol=0)
    errors = []
    for rank in range(2, 39, 4):
        _, report = mha2mla(source, rope_dim=2, kv_rank=rank, calib=x)
        errors.append((report.rel_error, report.output_rel_error_of_svd))
    for before, after in itertools.pairwise(errors):
        assert after[0] < before[0]
        assert after[1] < before[1]


def test_the_reported_error_is_that_of_the_best_approximation():
    source = layer()
    latent, report = mha2mla(source, rope_dim=4, rope_select="high", kv_rank=6)
    rank, nope = 6, latent.qk_nope_head_dim
    latent.requires_grad_(False)
    product = latent.kv_b_proj.weight.view(G, -1, rank) @ latent.kv_a_proj_with_mqa.weight[:rank]
    k, v = (p.weight.detach().view(G, D, E) for p in (source.k_proj, source.v_proj))
    rows = [i for i in range(D) if i % 4 not in report.rope_pairs[0]]
    exact = torch.cat([k[:, rows], v], 1)
    error = float((product - exact).norm() / exact.norm())
    assert product[:, :nope].shape == exact[:, : len(rows)].shape
    assert report.rel_error == pytest.approx(error, rel=1e-9)
    assert report.cache_ratio == (6 + G * 4) / (G * 2 * D)
    down = latent.kv_a_proj_with_mqa.weight[:rank]
    torch.testing.assert_close(down @ down.T, torch.eye(rank).double(), atol=1e-12, rtol=0)
    joint = report.rel_error
    _, split = mha2mla(source, rope_dim=4, rope_select="high", kv_rank=6, svd="split")
    assert joint <= split.rel_error


def test_the_dominating_pair_is_kept():
    source = layer()
    with torch.no_grad():
        for projection, heads in ((source.q_proj, H), (source.k_proj, G)):
            projection.weight.view(heads, D, E)[:, [2, 6]] *= 50
    _, report = mha2mla(source, rope_dim=2, kv_rank=8, calib=sample())
    assert report.rope_pairs == ((2,), (2,))
    assert all(0.9 < kept <= 1 for kept in report.score_kept)


def test_a_converted_layer_decodes_absorbed_and_is_shift_invariant():
    latent, _ = mha2mla(layer(bias=True), rope_dim=4, kv_rank=10, calib=sample())
    x, at = sample(), torch.arange(9)
    y = latent(x)
    cache = latent.init_cache(2, 9)
    with torch.no_grad():
        parts = [latent(part, cache=cache) for part in x.split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=1e-12, rtol=0)
    torch.testing.assert_close(latent(x, positions=at + 5), y, atol=1e-12, rtol=0)
    again = attnzoo.MultiHeadLatentAttention(
        E, H, 10, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=D, num_kv_heads=G, rope_kv_heads=G,
        rope_inv_freq=torch.zeros(G, 2), rope=Rotary(), kv_norm=False, kv_b_bias=True, q_bias=True, bias=True,
        scale=D**-0.5, dtype=torch.float64,
    )  # fmt: skip
    again.load_state_dict(latent.state_dict())
    torch.testing.assert_close(again(x), y, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_dim": 3}, "rope_dim must be even and between 0 and head_dim 8, got 3"),
        ({"rope_dim": 10}, "rope_dim must be even and between 0 and head_dim 8, got 10"),
        ({"kv_rank": 0}, "kv_rank must lie between 1 and .* = 24, got 0"),
        ({"kv_rank": 25}, "kv_rank must lie between 1 and .* = 24, got 25"),
        *(({"rope_dim": wrong}, f"rope_dim must be an integer, got {wrong!r}") for wrong in ("4", 4.0, None, True)),
        *(({"kv_rank": wrong}, f"kv_rank must be an integer, got {wrong!r}") for wrong in ("8", 8.5, True)),
        ({"svd": "split", "kv_rank_split": 8}, "kv_rank_split must be two integers, got 8"),
        ({"svd": "split", "kv_rank_split": (4, 4.0)}, r"kv_rank_split must be two integers, got \(4, 4.0\)"),
        ({"uniform_start": 1.0}, "uniform_start must be an integer, got 1.0"),
        ({"expand_gqa": "yes"}, "expand_gqa must be True or False, got 'yes'"),
        ({"factor_dtype": torch.int32}, "factor_dtype must be one of torch.float64, .*, got torch.int32"),
        ({"calib": 5}, r"calib must be a tensor \(N, T, 24\) or InputStatistics, got 5"),
        ({"kv_rank": None}, "kv_rank must lie between 1 and .* = 24, got None"),
        ({"svd": "split", "kv_rank": 20, "kv_rank_split": (12, 8)}, r"at most 8 and 16, got \(12, 8\)"),
        ({"kv_rank_split": (4, 4)}, "kv_rank_split needs svd 'split', got"),
        ({"rope_select": "2-norm"}, "calib must be given with rope_select '2-norm', got None"),
        ({"rope_select": "random"}, "rope_select must be one of .*got 'random'"),
        ({"rope_select": "uniform", "rope_dim": 6}, "rope_select 'uniform' needs .*got 3 and 0"),
        ({"calib": torch.zeros(2, 3, 5)}, r"calib must have shape \(N, T, 24\), got \(2, 3, 5\)"),
        ({"svd": "qr"}, "svd must be 'joint', 'split' or 'none', got 'qr'"),
        ({"balance": "down"}, "balance must be 'up' or 'sqrt', got 'down'"),
        ({"weighting": "rows"}, "weighting must be one of 'weights', 'activations', 'two-sided', got 'rows'"),
        ({"weighting": "activations"}, "calib must be given with weighting 'activations', got None"),
        ({"weighting": "two-sided", "calib": sample(), "key_weight": 0}, "key_weight must be positive, got 0"),
        ({"key_weight": 2}, "key_weight needs weighting 'two-sided', got 2 with 'weights'"),
        ({"calib": InputStatistics(E)}, "calib must have at least one token, got none"),
        ({"calib": InputStatistics(5)}, "calib must have width 24, got 5"),
        (
            {"calib": InputStatistics.of(sample()), "rope_select": "2-norm"},
            "calib must have norms of pairs with rope_select '2-norm': create it with the module",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        mha2mla(layer(), **({"rope_dim": 4, "kv_rank": 8, "rope_select": "high"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "module must not have qk_norm"),
        ({"sliding_window": 4}, "module must not have sliding_window"),
        ({"sink": "zero"}, "module must not have sink"),
        ({"logit_softcap": 2.0}, "module must not have logit_softcap"),
        ({"alibi": True, "rope": None}, "module must not have alibi"),
        ({"rope": None}, "module must have a plain rotary embedding"),
        ({"rope": Rotary(dim=4)}, "module must have a plain rotary embedding .* of width 4"),
        ({"rope": Rotary(style="interleaved")}, "module must have a plain rotary embedding"),
    ],
)
def test_sources_without_a_counterpart_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mha2mla(layer(**options), rope_dim=4, kv_rank=8, rope_select="high")


def test_only_the_grouped_query_family_is_converted():
    with pytest.raises(ValueError, match="module must be multi-head or grouped-query attention, got Grouped"):
        mha2mla(attnzoo.GroupedTiedAttention(E, H), rope_dim=2, kv_rank=4)


SOURCES = {
    "gqa": lambda: layer(bias=True, qk_norm=True, sliding_window=5, sink="learned"),
    "mha": lambda: layer("mha", rope=None, alibi=True),
    "gta": lambda: attnzoo.GroupedTiedAttention(E, H, G, D, k_rope_bias=True, dtype=torch.float64),
    "mla": lambda: attnzoo.MultiHeadLatentAttention(E, H, 10, 6, bias=True, dtype=torch.float64),
}


@pytest.mark.parametrize("name", SOURCES)
def test_knocking_heads_start_as_the_source(name):
    source = SOURCES[name]()
    kha, weight = to_kha(source), sample()
    classes = {"gta": attnzoo.KnockingHeadsTiedAttention, "mla": attnzoo.KnockingHeadsLatentAttention}
    assert type(kha) is classes.get(name, attnzoo.KnockingHeadsAttention)
    found, expected = gradients(kha, sample(), weight), gradients(source, sample(), weight)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-12, rtol=0)
    assert len(found) > len(expected)


def test_the_kind_of_map_can_be_chosen_and_a_foreign_source_is_refused():
    kha = to_kha(layer(), "linear")
    torch.testing.assert_close(fold(kha)(sample()), layer()(sample()), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="module must be knocking-heads attention, got GroupedQuery"):
        fold(layer())
    kha = to_kha(attnzoo.GroupedTiedAttention(E, H, G), None, knock_v="linear", knock_scope="value")
    assert kha.knock_scope == "value"
    with pytest.raises(ValueError, match="module must be of the grouped-query family"):
        to_kha(kha)
    source = layer()
    source.prune_heads([0])
    with pytest.raises(ValueError, match="module must not have pruned heads"):
        to_kha(source)
    with pytest.raises(ValueError, match="module must not have rope_mode 'pre'"):
        to_kha(attnzoo.MultiHeadLatentAttention(E, H, rope_mode="pre", qk_nope_head_dim=4))


def test_rows_of_a_head_are_what_the_layout_says():
    assert head_rows([1], 2).tolist() == [2, 3]
