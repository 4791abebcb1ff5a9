"""WeightWatcher's columns against stored figures of it."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo.diagnostics import ww_dataframe, ww_details
from attnzoo.diagnostics.spectra.weightwatcher import eigenvalues, marchenko_pastur_fit, power_law, randomized_columns

GOLDEN = Path(__file__).parents[1] / "golden" / "spectrum.safetensors"
FITTED = ("sigma_mp", "bulk_min", "bulk_max", "mp_softrank")
COUNTS = (
    "num_pl_spikes",
    "num_spikes",
    "detX_num",
    "matrix_rank",
    "rank_loss",
    "weak_rank_loss",
    "num_evals",
    "M",
    "N",
)


@pytest.mark.parametrize("case", ["noise", "spiked"])
def test_stored_figures(case):
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    matrix = t[f"input.W_{case}"]
    found = ww_details(matrix)
    found |= randomized_columns(eigenvalues(matrix), t[f"input.rand_evals_{case}"].double(), max(matrix.shape))
    stored = {k.removeprefix(f"ww.{case}."): v.item() for k, v in t.items() if k.startswith(f"ww.{case}.")}
    assert set(stored) <= set(found)
    for name, value in stored.items():
        if name in COUNTS:
            assert found[name] == value, name
        else:
            tolerance = 2e-3 if name in FITTED else 1e-8
            assert found[name] == pytest.approx(value, rel=tolerance, abs=1e-12), name


def test_a_power_law_is_found():
    u = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tail = (1 - u) ** (-1 / (2.5 - 1))
    fit = power_law(tail.sort().values)
    assert fit["alpha"] == pytest.approx(2.5, rel=0.1)
    assert fit["D"] < 0.05
    assert fit["warning"] == ""
    assert power_law(torch.linspace(1, 1.2, 60, dtype=torch.float64))["warning"] == "under-trained"


def test_shuffling_keeps_noise_and_destroys_a_spike():
    noise = torch.randn(120, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs = torch.randn(180, generator=torch.Generator().manual_seed(2)).sign().double()
    spiked = noise + torch.outer(signs[:120], signs[120:])
    assert ww_details(noise, randomize=True)["ww_softrank"] == pytest.approx(1, abs=0.15)
    found = ww_details(spiked, randomize=True)
    assert found["ww_softrank"] < 0.95
    assert found == ww_details(spiked, randomize=True)
    assert found["num_spikes"] is None or found["num_spikes"] >= 0


def test_an_inadmissible_fit_is_no_number():
    fit = marchenko_pastur_fit(torch.cat([torch.full((99,), 1e-9), torch.tensor([1.0])]).double(), 200)
    assert math.isnan(fit["sigma_mp"])
    assert fit["num_spikes"] is None


def test_a_model_is_a_row_a_matrix():
    frame = ww_dataframe(attnzoo.GroupedQueryAttention(64, 4, 2, qk_norm=True), mp_fit=False)
    assert list(frame["longname"]) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (frame["alpha"] > 1).all()
    assert list(frame["M"]) == [64, 32, 32, 64]


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(7, 30), torch.full((9, 9), math.inf)])
def test_refusals(matrix):
    with pytest.raises(ValueError, match="matrix must "):
        ww_details(matrix)
