"""Spectra of whole models: equal to those of single modules, rates of alarms and detection at their full sizes."""

import itertools
import math

import pytest
import torch

import attnzoo
from attnzoo.diagnostics import analyze_attention, analyze_matrix
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.spectra.marchenko_pastur import mp_pdf, product_edge
from attnzoo.diagnostics.spectra.models import analyze_model, stacked_variances
from attnzoo.diagnostics.spectra.spectrum import product_pdf, product_singular_values, variance_of
from tests.diagnostics.test_attention_layers import _hf
from tests.zoo import MECHANISMS, names

FIGURES = (
    "lambda_max",
    "lambda_plus",
    "threshold",
    "mp_gap",
    "outlier_energy",
    "stable_rank",
    "effective_rank",
    "gamma",
)
DRAWS = 200


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found, expected):
    assert (found.layer, found.head, found.matrix) == (expected.layer, expected.head, expected.matrix)
    assert (found.hard_rank, found.outlier_count) == (expected.hard_rank, expected.outlier_count)
    for field in FIGURES:
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours == theirs or ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), field


@pytest.mark.parametrize("name", [n for n in names("circuits") if n not in ("linear", "mhla")])
@pytest.mark.parametrize("form", ["circuit", "gram"])
def test_a_model_is_its_modules(name, form):
    torch.manual_seed(0)
    model = torch.nn.ModuleList([MECHANISMS[name](dtype=torch.float64) for _ in range(2)])
    found = analyze_model(model, form=form)
    expected = [
        record for i, module in enumerate(model) for record in analyze_attention(module, form=form, layer=str(i))
    ]
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def planted():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({
        "wide": attnzoo.GroupedQueryAttention(96, 6, 2, bias=False),
        "other": attnzoo.MultiHeadAttention(64, 4, bias=False, dtype=torch.float64),
    })  # fmt: skip
    with torch.no_grad():
        model["wide"].o_proj.weight[:, 16:32] += 0.5 * torch.outer(torch.ones(96), torch.ones(16))
        model["wide"].v_proj.weight[:16] += 0.5
    return model


def test_layers_of_different_sizes_parts_and_matrices():
    model = planted()
    found = analyze_model(model, matrices=("qk", "ov", "weights"), keep_eigenvalues=True)
    per_head = [record for record in found if record.head is not None]
    assert [(r.layer, r.matrix, r.head) for r in per_head] == [
        (layer, matrix, head)
        for layer, H in (("wide", 6), ("other", 4)) for matrix in ("qk", "ov") for head in range(H)
    ]  # fmt: skip
    module = model["wide"]
    ov = [record for record in per_head if (record.layer, record.matrix) == ("wide", "ov")]
    for head, record in enumerate(ov):
        value = module.v_proj.weight[16 * (head // 3) : 16 * (head // 3) + 16].detach()
        out = module.o_proj.weight[:, 16 * head : 16 * head + 16].detach()
        expected = analyze_matrix([out, value], keep_eigenvalues=True)
        for field in FIGURES:
            assert getattr(record, field) == pytest.approx(getattr(expected, field), rel=1e-9), field
        assert record.eigenvalues == pytest.approx(expected.eigenvalues, rel=1e-9)
        assert record.dims == (96, 16, 96)
    assert max(ov, key=lambda record: record.mp_gap).head == 1
    weights = {record.matrix: record for record in found if record.head is None and record.layer == "wide"}
    assert set(weights) == {f"{x}_proj.weight" for x in "qkvo"}
    assert_same(weights["v_proj.weight"], analyze_matrix_named(module.v_proj.weight, "wide", "v_proj.weight"))


def analyze_matrix_named(weight, layer, matrix):
    import dataclasses

    return dataclasses.replace(analyze_matrix(weight), layer=layer, matrix=matrix)


@pytest.mark.parametrize("null", ["simulate", "mp"])
def test_other_nulls_and_whole_layers(null):
    model = planted()
    for per in ("head", "layer"):
        found = analyze_model(model["other"], per=per, null=null)
        expected = analyze_attention(model["other"], per=per, null=null, layer="")
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)


def test_latent_attention_is_redrawn_for_what_heads_write_too():
    torch.manual_seed(0)
    module = attnzoo.MultiHeadLatentAttention(64, 4, 24)
    found = analyze_model(module, matrices=("ov",))
    assert len(found) == 4
    assert all(record.dims is None for record in found)
    assert sum(record.outlier_count > 0 for record in found) <= 1


def test_progress_sees_every_layer():
    seen = []

    def progress(layers):
        for layer in layers:
            seen.append(layer.name)
            yield layer

    analyze_model(planted(), progress=progress)
    assert seen == ["wide", "other"]


def test_stacked_variances_are_the_single_ones():
    stack = torch.stack([torch.linalg.svdvals(noise(60, 20, seed=s) * (1 + s)) for s in range(9)])
    stack[3, 0] *= 9  # a spike
    stack[4, :5] *= 4
    for estimator in ("bulk", "median", "mean"):
        expected = [variance_of(row, 60, estimator, 2.0234) for row in stack]
        assert stacked_variances(stack, 60, estimator, 2.0234) == pytest.approx(expected, rel=1e-12)
    stack[5, -3:] = 0
    expected = [variance_of(row, 60, "bulk", 2.0234) for row in stack]
    assert stacked_variances(stack, 60, "bulk", 2.0234) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dims", [(50, 100), (192, 64, 192), (64, 192, 48), (100, 100, 100), (100, 30, 60, 80)])
def test_the_density_of_products_is_a_distribution(dims):
    edge, _ = product_edge(dims)
    x = edge * torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:] ** 4
    density = product_pdf(x, dims)
    # The mean over all N_0 eigenvalues is 1, over the non-zero ones more.
    assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=2e-3)
    assert float(torch.trapezoid(density * x, x)) == pytest.approx(dims[0] / min(dims), rel=2e-3)
    assert float(product_pdf(torch.tensor([-1.0, 0.0, 1.01 * edge]), dims).abs().max()) == 0
    if len(dims) == 2:
        torch.testing.assert_close(density, mp_pdf(x, dims[0] / dims[1]), rtol=1e-6, atol=1e-9)
        return_shape = product_pdf(x.view(-1, 2), dims).shape
        assert return_shape == (10_000, 2)


def test_the_density_of_products_is_that_of_noise():
    dims = (300, 100, 200)
    eigenvalues = torch.cat([
        product_singular_values([noise(a, b, seed=7 * s + i) for i, (a, b) in enumerate(itertools.pairwise(dims))])
        .square() / math.prod(dims[1:])
        for s in range(5)
    ]).sort().values  # fmt: skip
    x = product_edge(dims)[0] * torch.linspace(0, 1, 4001, dtype=torch.float64)[1:] ** 2
    law = torch.cumulative_trapezoid(product_pdf(x, dims), x)
    share = torch.searchsorted(eigenvalues, x[1:]) / eigenvalues.numel()
    assert float((law - share).abs().max()) < 0.02


@pytest.mark.parametrize("sizes", [(300, 150), (192, 192, 192), (288, 32, 288)])
def test_noise_alarms_in_at_most_one_of_forty(sizes):
    alarms = 0
    for seed in range(DRAWS):
        factors = [noise(a, b, seed=9973 * seed + i) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
        alarms += analyze_matrix(factors[0] if len(factors) == 1 else factors).outlier_count > 0
    assert alarms <= 0.025 * DRAWS


def test_a_spike_of_one_and_a_half_is_found():
    found = 0
    for seed in range(DRAWS):
        u, v = (torch.nn.functional.normalize(noise(n, seed=10_000 + 2 * seed + i), dim=0)
                for i, n in enumerate((300, 150)))  # fmt: skip
        found += analyze_matrix(noise(300, 150, seed=seed) / 300**0.5 + 1.5 * torch.outer(u, v)).outlier_count > 0
    assert found >= 0.95 * DRAWS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analyze_model(planted(), matrices=("qk", "vo")), r"matrices must be some of .* got \['qk', 'vo'\]"),
        (lambda: analyze_model(planted(), matrices=()), r"matrices must be some of .* got \[\]"),
        (lambda: analyze_model(planted(), form="sum"), "form must be 'circuit' or 'gram', got 'sum'"),
        (lambda: analyze_model(planted(), per="model"), "per must be 'head' or 'layer', got 'model'"),
        (lambda: analyze_model(planted(), null="goe"), r"null must be one of .* got 'goe'"),
        (lambda: analyze_model(planted(), edge="max"), r"edge must be one of .* got 'max'"),
        (lambda: analyze_model(planted(), level=0.5), r"level must be one of .* got 0.5"),
        (lambda: analyze_model(planted(), q=2), r"options must be some of estimator, .*, got q=2"),
        (lambda: analyze_model(planted(), draws=[1.0]), r"options must be some of estimator, .*, got draws=\[1.0\]"),
        (lambda: analyze_attention(planted()["wide"], q=2), r"options must be some of estimator, .*, got q=2"),
        (lambda: analyze_model(planted(), matrices=5), r"matrices must be some of .* got \[5\]"),
        (lambda: analyze_model(planted(), matrices="qk"), r"matrices must be some of .* got \['qk'\]"),
        (lambda: analyze_model(planted(), level=[0.99]), r"level must be one of .* got \[0.99\]"),
        (lambda: analyze_model(planted(), quantile="2"), "quantile must be a finite number, got '2'"),
        (lambda: analyze_model(planted(), rank_rtol=-1.0), "rank_rtol must not be negative, got -1.0"),
        (lambda: analyze_model(planted(), estimator="best"), r"estimator must be one of .*, got 'best'"),
        (lambda: analyze_model(planted(), keep_eigenvalues=1), "keep_eigenvalues must be True or False, got 1"),
        (lambda: analyze_model(torch.nn.Linear(3, 3)), "model must contain attention"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_that_are_not_finite_are_refused():
    model = planted()
    with torch.no_grad():
        model["other"].k_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="matrix must be finite"):
        analyze_model(model)


def test_a_matrix_is_analysed_once():
    model = planted()
    assert analyze_model(model, matrices=("qk", "qk", "ov")) == analyze_model(model, matrices=("qk", "ov"))


def test_computed_weights_are_analysed_as_computed():
    model = attnzoo.MultiHeadAttention(32, 4, bias=False)
    expected = analyze_model(model, matrices=["weights"])
    torch.nn.utils.parametrizations.weight_norm(model.q_proj)
    # torch registers such a module's parameters last.
    found = sorted(analyze_model(model, matrices=["weights"]), key=lambda record: record.matrix)
    assert [record.matrix for record in found] == sorted(record.matrix for record in expected)
    for one, other in zip(found, sorted(expected, key=lambda record: record.matrix), strict=True):
        assert one.lambda_max == pytest.approx(other.lambda_max, rel=1e-5)
        assert one.hard_rank == other.hard_rank


def test_a_hugging_face_layer_that_is_not_finite_is_named():
    model = _hf("llama")
    with torch.no_grad():
        next(layer for layer in attention_layers(model) if layer.index == 1).module.q_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layer '.*1.self_attn' must have finite weights to be read"):
        analyze_model(model)
