"""Random-matrix laws and spectra: stored figures, identities, and detection rates on matrices made for it."""

import itertools
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo.diagnostics import analyze_attention, analyze_matrix
from attnzoo.diagnostics.spectra.marchenko_pastur import (
    bbp,
    bbp_inverse,
    mp_cdf,
    mp_edges,
    mp_median,
    mp_pdf,
    product_edge,
    tracy_widom_edge,
    variance,
)
from attnzoo.diagnostics.spectra.spectrum import product_singular_values
from tests.zoo import MECHANISMS, names

GOLDEN = Path(__file__).parents[1] / "golden" / "spectrum.safetensors"
Q99 = 2.0234


@cache
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def noise(*shape, seed=0, sigma=1.0):
    return sigma * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", ["noise", "spiked"])
def test_stored_figures(case):
    t = stored()

    def figure(name):
        return t[f"mp.{case}.{name}"].item()

    W = t[f"input.W_{case}"]
    n_big = max(W.shape)
    values = torch.linalg.svdvals(W.double()).square().flip(0) / n_big
    assert mp_median(min(W.shape) / n_big) == pytest.approx(figure("mp_median"), rel=1e-8)
    for estimator in ("mean", "median", "bulk"):
        assert variance(values, n_big, estimator) == pytest.approx(figure(f"sigma2_{estimator}"), rel=1e-8)
    for estimator in ("median", "bulk"):
        record = analyze_matrix(W, estimator=estimator)
        for name in ("lambda_plus", "lambda_minus", "outlier_energy", "mp_gap", "ks_bulk"):
            assert getattr(record, name) == pytest.approx(figure(f"{estimator}.{name}"), rel=1e-8, abs=1e-12), name
        assert record.threshold == pytest.approx(figure(f"{estimator}.tw_edge"), rel=1e-8)
        assert record.outlier_count == figure(f"{estimator}.outlier_count")
        plain = analyze_matrix(W, estimator=estimator, edge="mp")
        assert plain.outlier_count == figure(f"{estimator}.outlier_count_mp")
        for name in ("stable_rank", "participation_ratio", "effective_rank", "spectral_entropy"):
            assert getattr(record, name) == pytest.approx(figure(name), rel=1e-8), name
        assert record.hard_rank == figure("hard_rank")
    gamma = min(W.shape) / n_big
    x = t[f"law.{case}.x"]
    torch.testing.assert_close(mp_pdf(x, gamma), t[f"law.{case}.pdf"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(mp_cdf(x, gamma), t[f"law.{case}.cdf"], rtol=1e-8, atol=1e-8)


def test_stored_positions_of_spikes():
    t = stored()
    for theta, expected in zip(t["bbp.theta"].tolist()[:2], t["bbp.lambda"].tolist()[:2], strict=True):
        assert bbp(theta, 0.5)[0] == pytest.approx(expected, rel=1e-8)
    below = t["bbp.theta"][2].item()
    assert bbp(below, 0.5)[1:] == (0.0, 0.0, False)
    critical = t["bbp.critical"].item()
    assert critical == pytest.approx(0.5**0.25, rel=1e-8)
    assert bbp(critical * 1.0001, 0.5)[3]
    assert not bbp(critical * 0.9999, 0.5)[3]
    record = analyze_matrix(t["input.W_spiked"])
    for spike, value, big, small in zip(
        record.spikes, t["bbp.measured_lambda"], t["bbp.measured_overlap_left"], t["bbp.measured_overlap_right"],
        strict=False,
    ):  # fmt: skip
        assert spike.value * 300 == pytest.approx(value.item(), rel=1e-8)
        assert spike.overlap_big == pytest.approx(big.item(), abs=0.1)
        assert spike.overlap_small == pytest.approx(small.item(), abs=0.1)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sigma2", [1.0, 0.3])
def test_the_law_is_a_distribution_with_its_density(gamma, sigma2):
    low, high = mp_edges(gamma, sigma2)
    # Squares bring the grid close to the edges, where the density has roots, or a pole at gamma = 1.
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    x = low + (high - low) * (3 * u**2 - 2 * u**3)
    f, F = mp_pdf(x, gamma, sigma2), mp_cdf(x, gamma, sigma2)
    tolerance = 1e-3 if gamma == 1 else 1e-6
    assert torch.trapezoid(f, x).item() == pytest.approx(1, abs=tolerance)
    assert torch.trapezoid(f * x, x).item() == pytest.approx(sigma2, abs=tolerance)
    slope = (F[2:] - F[:-2]) / (x[2:] - x[:-2])
    torch.testing.assert_close(slope[2000:-2000], f[1:-1][2000:-2000], rtol=1e-3, atol=1e-5)
    assert F[0] == 0
    assert F[-1] == 1
    assert mp_cdf(torch.tensor([high * 2.0]), gamma, sigma2).item() == 1
    assert mp_cdf(torch.tensor(mp_median(gamma)), gamma).item() == pytest.approx(0.5)


def test_edges_of_products():
    for gamma in (0.1, 0.5, 1.0):
        assert product_edge([100, round(100 / gamma)])[0] == pytest.approx(mp_edges(gamma)[1], rel=1e-9)
    assert product_edge([50, 50, 50])[0] == pytest.approx(27 / 4)
    assert product_edge([9, 9, 9, 9])[0] == pytest.approx(256 / 27)
    assert product_edge([64, 8, 32, 16]) == pytest.approx(product_edge([64, 32, 16, 8]))
    a, b = math.sqrt(200 - 1), math.sqrt(100)
    johnstone = (tracy_widom_edge(200, 100, 1.0, 1.0) - tracy_widom_edge(200, 100, 1.0, 0.0)) / 1
    # One factor 100 x 200: lambda in units of n_big = 200, so the spread is Johnstone's to the order of 1/n.
    assert product_edge([100, 200])[1] == pytest.approx(johnstone, rel=0.02)
    assert (a + b) ** 2 / 200 == pytest.approx(product_edge([100, 200])[0], rel=0.01)


@pytest.mark.parametrize("theta", [0.9, 1.2, 3.0])
@pytest.mark.parametrize("tau2", [1.0, 2.5])
def test_the_strength_of_a_spike_is_found_again(theta, tau2):
    theta *= math.sqrt(tau2)
    assert bbp_inverse(bbp(theta, 0.5, tau2)[0], 0.5, tau2) == pytest.approx(theta)
    assert bbp_inverse(tau2, 0.5, tau2) == 0


def test_noise_has_no_outliers_and_its_own_variance():
    records = [analyze_matrix(noise(200, 100, seed=seed, sigma=0.5)) for seed in range(40)]
    assert sum(record.outlier_count > 0 for record in records) <= 2
    assert all(record.sigma2 == pytest.approx(0.25, rel=0.03) for record in records)
    assert all(record.ks_bulk < 0.05 for record in records)
    assert sum(analyze_matrix(noise(200, 100, seed=s), edge="mp").outlier_count > 0 for s in range(40)) <= 10


@pytest.mark.parametrize(("theta", "least", "most"), [(0.6, 0, 3), (1.5, 20, 20)])
def test_a_planted_spike_is_seen_above_the_threshold_only(theta, least, most):
    found = 0
    for seed in range(20):
        u, v = (torch.nn.functional.normalize(noise(n, seed=100 + seed), dim=0) for n in (300, 150))
        record = analyze_matrix(noise(300, 150, seed=seed, sigma=300**-0.5) + theta * torch.outer(u, v))
        found += record.outlier_count > 0
        if record.spikes and theta > 1:
            assert record.spikes[0].theta == pytest.approx(theta, rel=0.25)
    assert least <= found <= most


@pytest.mark.parametrize("shape", [(60, 40), (40, 40)])
def test_a_record_does_not_know_bases_sides_or_scale(shape):
    W = noise(*shape)
    record = analyze_matrix(W)
    U, V = (torch.linalg.qr(noise(n, n, seed=9)).Q for n in shape)
    fields = ("mp_gap", "mp_softrank", "outlier_energy", "stable_rank", "participation_ratio", "ks_bulk")
    for other, factor in ((W.T, 1.0), (U @ W @ V, 1.0), (3 * W, 9.0)):
        found = analyze_matrix(other)
        assert found.lambda_max == pytest.approx(factor * record.lambda_max)
        for field in fields:
            assert getattr(found, field) == pytest.approx(getattr(record, field), abs=1e-9), field
    assert record.mp_softrank * (1 + record.mp_gap) == pytest.approx(1)
    assert record.stable_rank <= record.participation_ratio <= record.effective_rank <= record.hard_rank
    assert analyze_matrix(W, effective_rank_of="sv").effective_rank > record.effective_rank


def test_a_product_has_the_rank_of_its_narrowest_factor():
    record = analyze_matrix((noise(100, 12) @ noise(12, 80, seed=1)).float())
    assert record.hard_rank == 12
    assert record.gamma == 12 / 100
    assert math.isfinite(record.ks_bulk)
    factors = [noise(100, 12), noise(12, 80, seed=1)]
    singular = product_singular_values(factors)
    torch.testing.assert_close(singular, torch.linalg.svdvals(factors[0] @ factors[1])[:12], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(192, 192, 192), (128, 24, 128), (64, 32, 16, 64)])
def test_products_of_noise_are_noise_to_the_product_null_and_signal_to_the_other(sizes):
    def product(seed):
        return [noise(a, b, seed=17 * seed + i) for i, (a, b) in enumerate(itertools.pairwise(sizes))]

    alarms = sum(analyze_matrix(product(seed)).outlier_count > 0 for seed in range(20))
    assert alarms <= 2
    formed = torch.linalg.multi_dot(product(0))
    assert analyze_matrix(formed).outlier_fraction > 0.1
    simulated = analyze_matrix(product(0), null="simulate")
    assert simulated.outlier_count == 0
    assert simulated.lambda_plus == pytest.approx(analyze_matrix(product(0)).lambda_plus, rel=0.25)


def test_small_and_zero_matrices_have_no_fit():
    zero = analyze_matrix(torch.zeros(20, 10))
    assert zero.hard_rank == 0
    assert math.isnan(zero.stable_rank)
    assert zero.mp_gap is None
    few = analyze_matrix(noise(30, 5))
    assert few.hard_rank == 5
    assert few.outlier_count is None
    assert "only 5" in few.note
    kept = analyze_matrix(noise(30, 10), keep_eigenvalues=True)
    assert len(kept.eigenvalues) == 10
    assert kept.to_dict()["hard_rank"] == 10


@pytest.mark.parametrize("name", [n for n in names("circuits") if n not in ("moa", "linear", "mhla")])
def test_random_attention_shows_nothing_and_a_planted_form_shows(name):
    torch.manual_seed(1)
    module = MECHANISMS[name](dtype=torch.float64)
    records = analyze_attention(module, layer="0")
    assert [record.head for record in records] == list(range(4))
    assert all(record.layer == "0" and record.matrix == "qk" for record in records)
    circuits = [wq.T @ wk for wq, wk in module.qk_circuit()]
    for record, circuit in zip(records, circuits, strict=True):
        top = torch.linalg.svdvals(circuit)[0].square().item()
        assert record.lambda_max == pytest.approx(top, rel=1e-9)
    (layer,) = analyze_attention(module, per="layer")
    assert layer.lambda_max == pytest.approx(torch.linalg.svdvals(sum(circuits))[0].square().item(), rel=1e-9)
    grams = torch.cat([q for q, _ in module.qk_circuit()]) @ torch.cat([k for _, k in module.qk_circuit()]).T
    (gram,) = analyze_attention(module, per="layer", form="gram")
    assert gram.lambda_max == pytest.approx(torch.linalg.svdvals(grams)[0].square().item(), rel=1e-9)


def test_blocks_of_uneven_groups():
    module = MECHANISMS["gqa"](dtype=torch.float64)
    module.prune_heads([0])
    queries, keys = (torch.cat(factors) for factors in zip(*module.qk_circuit(), strict=True))
    (gram,) = analyze_attention(module, per="layer", form="gram")
    singular = torch.linalg.svdvals(queries @ keys.T)
    assert gram.lambda_max == pytest.approx(float(singular[0].square()), rel=1e-9)
    assert gram.stable_rank == pytest.approx(float((singular / singular[0]).square().sum()), rel=1e-9)


@pytest.mark.parametrize("mode", ["decoupled", "pre", "none"])
@pytest.mark.parametrize("per", ["head", "layer"])
def test_random_latent_attention_shows_nothing(mode, per):
    alarms, records = 0, []
    for seed in range(6):
        torch.manual_seed(seed)
        module = attnzoo.MultiHeadLatentAttention(128, 4, 48, rope_mode=mode)
        records += analyze_attention(module, per=per)
    alarms = sum(record.outlier_count > 0 for record in records)
    assert alarms <= max(2, len(records) // 8)
    with torch.no_grad():
        key = module.kv_b_proj.weight.view(4, -1, 48)[0, :32]
        key += 0.3 * torch.outer(torch.ones(32), torch.randn(48).sign())
    found = analyze_attention(module, per=per)
    assert found[0].mp_gap > max(record.mp_gap for record in records)


def test_the_preset_shows_the_pitfall_that_the_product_null_avoids():
    torch.manual_seed(0)
    module = attnzoo.MultiHeadAttention(192, 4, bias=False)
    assert all(record.outlier_count == 0 for record in analyze_attention(module))
    (record,) = analyze_attention(module, preset="jha_reagen")
    assert record.outlier_count > 5
    assert record.lambda_minus is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analyze_matrix(torch.zeros(3)), "matrix must have 2 dimensions"),
        (lambda: analyze_matrix(torch.full((9, 9), math.nan)), "matrix must be finite"),
        (lambda: analyze_matrix(torch.ones(1, 1)), "matrix must have at least 2 rows or columns"),
        (lambda: analyze_matrix(None), "matrix must be a tensor or a list of factors, got None"),
        (lambda: analyze_matrix(noise(9, 9).to_sparse()), "matrix must hold real numbers, got torch.sparse_coo"),
        (lambda: analyze_matrix(noise(9, 9), rank_rtol=1.0), "rank_rtol must be below 1, got 1.0"),
        (lambda: analyze_matrix(noise(9, 9), draws=[1.0, 2.0]), "draws must be None unless null is 'simulate'"),
        (lambda: analyze_matrix(noise(9, 9), null="simulate", draws=[1.0]), "draws must be at least 2 finite numbers"),
        (lambda: analyze_matrix(noise(9, 9), null="simulate", draws=[1.0, math.nan]), "draws must be at least 2 fi"),
        (lambda: analyze_matrix([noise(9, 9)] * 2, edge="ww"), "edge must be 'tw' or 'mp' for null 'product', got"),
        (lambda: analyze_matrix(noise(9, 9), level=0.5), "level must be one of 0.99, 0.95, 0.9 .*got 0.5"),
        (lambda: analyze_matrix(noise(9, 9), null="product"), "null 'product' needs the factors, got one matrix"),
        (lambda: analyze_matrix(noise(9, 9), null="goe"), "null must be one of .*got 'goe'"),
        (lambda: analyze_matrix(noise(9, 9), edge="max"), "edge must be one of .*got 'max'"),
        (lambda: analyze_matrix(noise(9, 9), estimator="mode"), "estimator must be .*got 'mode'"),
        (lambda: analyze_matrix([noise(9, 8), noise(9, 8)]), r"factors must fit each other, got \(9, 8\) and \(9, 8\)"),
        (lambda: mp_edges(1.5), r"gamma must lie in \(0, 1\], got 1.5"),
        (lambda: product_edge([4]), "dims must hold at least two sizes"),
        (lambda: analyze_attention(attnzoo.MultiHeadAttention(32, 4), form="sum"), "form must be .*got 'sum'"),
        (lambda: analyze_attention(attnzoo.MultiHeadAttention(32, 4), per="model"), "per must be .*got 'model'"),
        (lambda: analyze_attention(attnzoo.MultiHeadAttention(32, 4), preset="x"), "preset must be .*got 'x'"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_quantile_may_be_given():
    W = noise(80, 40)
    assert analyze_matrix(W, quantile=Q99).threshold == analyze_matrix(W).threshold
    assert analyze_matrix(W, level=0.9).threshold < analyze_matrix(W).threshold
