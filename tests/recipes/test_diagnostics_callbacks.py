"""Callbacks that record spectra and head statistics: files, resuming, loggers, and a training that does not notice."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

import attnzoo
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.training_records import read_records
from attnzoo_recipes.callbacks.diagnostics import HeadStatisticsCallback, SpectrumCallback
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import model_from_checkpoint

MODULE = "attnzoo_recipes.callbacks.diagnostics"


def with_callbacks(*more):
    listed = [
        {"class_path": f"{MODULE}.SpectrumCallback",
         "init_args": {"every_n_steps": 2, "also_at": [0, 1], "presets": ["jha_reagen"], "matrices": ["qk", "ov"]}},
        {"class_path": f"{MODULE}.HeadStatisticsCallback", "init_args": {"every_n_steps": 2, "also_at": [0]}},
    ]  # fmt: skip
    return [f"--trainer.callbacks={json.dumps(listed)}", *more]


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {row["step"]: row["train_loss"] for row in csv.DictReader(file) if row.get("train_loss")}


@pytest.fixture
def trained(arguments, run, tmp_path):
    run(arguments("gqa", *with_callbacks(), steps=4))
    return tmp_path / "run" / "version_0"


def test_a_run_leaves_lines_scalars_and_pictures(trained):
    rows = read_records(trained / "spectrum.jsonl")
    assert sorted({row["step"] for row in rows}) == [0, 1, 2, 4]
    own = [row for row in rows if row["preset"] is None]
    assert {row["matrix"] for row in own} == {"qk", "ov"}
    heads = {(row["layer"], row["head"]) for row in own}
    assert len(own) == 4 * 2 * len(heads)
    assert all("eigenvalues" not in row for row in rows)
    assert {row["head"] for row in rows if row["preset"] == "jha_reagen"} == {None}
    last = model_from_checkpoint(read_checkpoint(trained))
    for record in analyze_model(last):
        (row,) = (r for r in own if (r["step"], r["matrix"], r["layer"], r["head"])
                  == (4, "qk", record.layer, record.head))  # fmt: skip
        assert row["lambda_max"] == pytest.approx(record.lambda_max, rel=1e-9)
    heads_rows = read_records(trained / "heads.jsonl")
    assert sorted({row["step"] for row in heads_rows}) == [0, 2, 4]
    assert {(row["layer"], row["head"]) for row in heads_rows} == heads
    assert all(0 <= row["normalized_entropy"] <= 1 and 0 < row["sink"] < 1 for row in heads_rows)
    with (trained / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    logged = [float(r["spectrum_qk/stable_rank"]) for r in table if r.get("spectrum_qk/stable_rank")]
    means = [
        [row["stable_rank"] for row in own if row["step"] == step and row["matrix"] == "qk"] for step in (0, 1, 2, 4)
    ]
    assert logged == pytest.approx([sum(m) / len(m) for m in means])
    assert any(r.get("heads/sink") for r in table)
    for name in (
        "spectrum_qk_stable_rank",
        "spectrum_ov_stable_rank",
        "spectrum_qk_jha_reagen_stable_rank",
        "heads_sink",
    ):
        assert (trained / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_training_does_not_notice(trained, arguments, run, tmp_path):
    run(arguments("gqa", f"--trainer.default_root_dir={tmp_path / 'plain'}", steps=4))
    assert losses(trained) == losses(tmp_path / "plain" / "version_0")
    assert len(losses(trained)) == 4


def test_a_resumed_run_tells_the_whole_training_once(trained, arguments, run, tmp_path):
    saved = newest_valid(trained)
    # What a killed run recorded after its last checkpoint, and the line that the kill cut off.
    with (trained / "spectrum.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "layer": "lost", "matrix": "qk", "preset": None}) + '\n{"step": 6, "la')
    run(arguments("gqa", *with_callbacks(f"--ckpt_path={saved}"), steps=6))
    folder = tmp_path / "run" / "version_1"
    rows = read_records(folder / "spectrum.jsonl")
    keys = [(row["step"], row["layer"], row["head"], row["matrix"], row["preset"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert sorted({row["step"] for row in rows}) == [0, 1, 2, 4, 6]
    assert "lost" not in {row["layer"] for row in rows}
    assert sorted({row["step"] for row in read_records(folder / "heads.jsonl")}) == [0, 2, 4, 6]


def test_a_resumed_run_whose_file_is_gone_says_so(trained, arguments, run, tmp_path):
    saved = newest_valid(trained)
    (trained / "spectrum.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"SpectrumCallback cannot find .*spectrum.jsonl: its records start at step 4"):
        run(arguments("gqa", *with_callbacks(f"--ckpt_path={saved}"), steps=6))
    assert {row["step"] for row in read_records(tmp_path / "run" / "version_1" / "spectrum.jsonl")} == {6}


class Taker:
    """A logger that takes pictures in one of the two ways."""

    def __init__(self, way):
        self.metrics, self.images = [], []
        self.experiment = SimpleNamespace()
        if way == "log_image":
            self.log_image = lambda key, images, step: self.images.append((key, images[0], step))
        else:
            self.experiment.add_image = lambda name, pixels, step, dataformats: self.images.append((name, pixels, step))

    def log_metrics(self, metrics, step):
        self.metrics.append((step, metrics))


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_run_that_may_diverge_ends_with_nothing_recorded(arguments, run, tmp_path):
    diverging = ["--model.lr=1e38", "--trainer.gradient_clip_val=null", "--loss_guard.enabled=false"]
    with pytest.warns(UserWarning, match="Callback records nothing at step .: weights are not finite"):
        run(arguments("gqa", *with_callbacks(), *diverging, "--trainer.val_check_interval=4", steps=4))
    folder = tmp_path / "run" / "version_0"
    assert {row["step"] for row in read_records(folder / "spectrum.jsonl")} == {0}
    assert read_checkpoint(folder)["global_step"] == 4
    assert not (folder / "samples.txt").exists()


@pytest.mark.parametrize("way", ["log_image", "add_image"])
def test_loggers_that_take_pictures_get_them(way, tmp_path):
    import attnzoo

    model = torch.nn.ModuleList([attnzoo.MultiHeadAttention(32, 2, bias=False) for _ in range(2)])
    taker = Taker(way)
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, global_step=0, loggers=[taker], default_root_dir=str(tmp_path)
    )
    taker.log_dir = str(tmp_path)
    callback = SpectrumCallback(drawn=("stable_rank",))
    callback.on_train_start(trainer, model)
    trainer.global_step = 10
    callback.on_train_batch_end(trainer, model, None, None, 9)
    callback.on_train_batch_end(trainer, model, None, None, 9)
    trainer.global_step = 11
    callback.on_train_batch_end(trainer, model, None, None, 10)
    assert [step for step, _ in taker.metrics] == [0, 10]
    assert [(name, step) for name, _, step in taker.images] == [
        ("spectrum_qk/stable_rank", 0), ("spectrum_qk/stable_rank", 10)
    ]  # fmt: skip
    pixels = taker.images[-1][1]
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.std() > 5
    assert callback.seconds > 0


class OneDocument:
    """Two validation samples in which no document begins."""

    def __len__(self):
        return 2

    def __getitems__(self, indices):
        return {"tokens": torch.arange(12).view(2, 6)}


def test_samples_within_one_document_need_no_mask(monkeypatch):
    data = SimpleNamespace(blocks=lambda split: OneDocument())
    monkeypatch.setattr("attnzoo_recipes.callbacks.diagnostics.text_data", lambda trainer: data)
    model = DecoderLM(16, lambda width: attnzoo.MultiHeadAttention(width, 2, bias=False), embed_dim=16, num_layers=1)
    rows = HeadStatisticsCallback().rows(None, SimpleNamespace(model=model, device=torch.device("cpu")))
    assert [row["head"] for row in rows] == [0, 1]


def test_other_processes_do_nothing(tmp_path):
    callback = HeadStatisticsCallback()
    trainer = SimpleNamespace(is_global_zero=False, fast_dev_run=False, global_step=0)
    callback.on_train_start(trainer, torch.nn.Linear(2, 2))
    callback.on_train_batch_end(trainer, torch.nn.Linear(2, 2), None, None, 0)
    callback.on_train_end(trainer, torch.nn.Linear(2, 2))
    assert callback.state_dict() == {"file": None, "last": -1}
    assert not list(tmp_path.iterdir())


def test_gates_are_logged_beside_the_measures():
    rows = [{"layer": "a", "head": h, "sink": 0.5, "gate_mean": 0.2 * h, "forget_gate_min": 0.1} for h in range(3)]
    rows.append({"layer": "b", "head": 0, "sink": 0.1})
    assert HeadStatisticsCallback().scalars(rows) == {
        "heads/sink": pytest.approx(0.4), "heads/gate_mean": pytest.approx(0.2),
        "heads/forget_gate_min": pytest.approx(0.1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectrumCallback(every_n_steps=0), "every_n_steps must be at least 1, got 0"),
        (lambda: SpectrumCallback(also_at=(5, -1)), r"also_at must not hold negative steps, got \[5, -1\]"),
        (lambda: SpectrumCallback(presets=("x",)), r"presets must be some of 'jha_reagen', got \['x'\]"),
        (lambda: HeadStatisticsCallback(num_sequences=0), "num_sequences must be at least 1, got 0"),
        (
            lambda: SpectrumCallback().setup(SimpleNamespace(strategy=FSDPStrategy()), None, "fit"),
            "SpectrumCallback needs all parameters in one process, got FSDPStrategy",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_file_in_the_way_is_refused(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    path.write_text("{}\n")
    trainer = SimpleNamespace(
        is_global_zero=True, fast_dev_run=False, global_step=0, loggers=[], default_root_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"path must not exist unless the run resumes, got .*spectrum.jsonl"):
        SpectrumCallback().on_train_start(trainer, torch.nn.Linear(2, 2))
    assert path.read_text() == "{}\n"
