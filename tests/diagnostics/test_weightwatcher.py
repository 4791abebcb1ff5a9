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


DEFINED_OF_ZEROS = {
    "N": 20, "M": 12, "Q": 20 / 12, "num_evals": 12, "norm": 0, "spectral_norm": 0, "lambda_max": 0, "sv_max": 0,
    "sv_min": 0, "matrix_rank": 0, "rank_loss": 12, "weak_rank_loss": 12, "entropy": 0, "num_pl_spikes": 0,
    "max_rand_eval": 0, "ww_maxdist": 0, "warning": "",
}  # fmt: skip


def test_zeros_are_a_row_of_what_is_defined():
    found = ww_details(torch.zeros(20, 12), randomize=True)
    for name, value in found.items():
        if name in DEFINED_OF_ZEROS:
            assert value == DEFINED_OF_ZEROS[name], name
        else:
            assert value is None or math.isnan(value), name
    assert found.keys() == ww_details(torch.randn(20, 12), randomize=True).keys()
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    torch.nn.init.zeros_(model[1].weight)
    frame = ww_dataframe(model)
    assert list(frame["longname"]) == ["0", "1"]
    assert frame.loc[1, ["alpha", "log_norm", "stable_rank", "sigma_mp", "detX_val"]].isna().all()
    assert frame.loc[0, ["log_norm", "stable_rank", "detX_val"]].notna().all()


def test_one_direction_has_no_power_law():
    u, v = torch.arange(1.0, 21), torch.arange(1.0, 13)
    found = ww_details(torch.outer(u, v), randomize=True)
    assert found["lambda_max"] == pytest.approx(float(u.square().sum() * v.square().sum()))
    assert (found["matrix_rank"], found["stable_rank"]) == (1, pytest.approx(1))
    assert all(math.isnan(found[name]) for name in ("alpha", "alpha_weighted", "log_alpha_norm"))
    # All singular values equal: no tail, and nothing computed of one.
    assert math.isnan(ww_details(torch.eye(20))["log_alpha_norm"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_other_number_types_are_read_as_their_numbers(dtype):
    matrix = (8 * torch.randn(20, 12, generator=torch.Generator().manual_seed(3))).to(dtype)
    assert ww_details(matrix) == ww_details(matrix.double())


@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(3), torch.zeros(7, 30), torch.zeros(0, 30), torch.ones(1, 1), torch.full((9, 9), math.inf),
     torch.full((9, 9), math.nan), torch.ones(9, 9, dtype=torch.complex64), torch.ones(9, 9, device="meta"),
     torch.eye(9, dtype=torch.float64) * 1e-200, torch.eye(9, dtype=torch.float64) * 1e200],
)  # fmt: skip
def test_refusals(matrix):
    with pytest.raises(ValueError, match="matrix must "):
        ww_details(matrix)
    model = torch.nn.ModuleDict({"good": torch.nn.Linear(9, 9), "bad": torch.nn.Module()})
    model["bad"].weight = torch.nn.Parameter(matrix)
    if matrix.ndim == 2 and min(matrix.shape) >= 8:
        with pytest.raises(ValueError, match="layer 'bad' cannot be analysed: matrix must "):
            ww_dataframe(model)
    else:
        assert list(ww_dataframe(model)["longname"]) == ["good"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ww_details([[1.0]]), r"matrix must be a tensor, got \[\[1.0\]\]"),
        (lambda: ww_details(torch.eye(9), randomize=True, seed=1.5), "seed must be an integer, got 1.5"),
        (lambda: ww_details(torch.eye(9), randomize="yes"), "randomize must be True or False, got 'yes'"),
        (lambda: ww_dataframe(None), "model must be a module, got None"),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_computed_weights_are_read_as_computed_and_tied_ones_once():
    model = torch.nn.ModuleList([torch.nn.Linear(9, 10), torch.nn.Embedding(12, 9), torch.nn.Linear(9, 12)])
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(torch.arange(1.0, 11.0)[:, None])
    model[2].weight = model[1].weight
    frame = ww_dataframe(model)
    assert list(frame["longname"]) == ["0", "1"]
    assert frame["lambda_max"][0] == ww_details(model[0].weight)["lambda_max"]


def test_a_model_without_matrices_has_no_rows_but_columns():
    frame = ww_dataframe(torch.nn.LayerNorm(9))
    assert len(frame) == 0
    assert list(frame.columns) == list(ww_dataframe(torch.nn.Linear(9, 9)).columns)
