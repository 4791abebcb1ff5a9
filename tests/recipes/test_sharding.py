"""Runs whose parameters are spread over processes: they equal one process, and their checkpoints are kept."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from children import before, together
from safetensors.torch import load_file

from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.consolidate import main as consolidate
from attnzoo_recipes.generate import main as generate

SHARDED = "--config=configs/distributed/fsdp.yaml"


def succeed(words, world_size=2, **options):
    for code, said in together(words, world_size, **options):
        assert code == 0, said


def metrics(folder):
    """Every logged number of a run by step, but those of the clock."""
    found = {}
    for path in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name not in ("step", "epoch", "tokens_per_second"):
                    found[name, int(row["step"])] = float(value)
    return found


def assert_equal_runs(expected, found, tolerance=1e-10):
    alone, together = read_checkpoint(expected), read_checkpoint(found)
    assert alone["global_step"] == together["global_step"]
    assert alone["state_dict"].keys() == together["state_dict"].keys()
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(value, together["state_dict"][name], atol=tolerance, rtol=0, msg=name)
    for one, two in zip(alone["optimizer_states"], together["optimizer_states"], strict=True):
        assert one["param_groups"] == two["param_groups"]
        for number, values in one["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(value, two["state"][number][name], atol=tolerance, rtol=0, msg=name)


ACCUMULATED = ["--trainer.accumulate_grad_batches=2", "--model.z_loss=0.001"]
BALANCED = ["--model.aux_loss_weight=20"]
SHAPES = {
    "mha": ["--model.activation_checkpointing=true", "--model.tie_embeddings=false"],
    "mla": ACCUMULATED,
    "moh": BALANCED,
    "kha": [],
    "dcmha": ["--model.attention.init_args.head_groups=2"],
    "linear": [],
    "mhla": ["--model.attention.init_args.block_size=8", "--data.cross_documents=true"],
    "moa": [*BALANCED, *(f"--model.attention.init_args.{name}=2" for name in ("heads_per_expert", "num_kv_heads"))],
}
TENSOR, CONTEXT = (f"--config=configs/distributed/{name}.yaml" for name in ("tensor", "context"))
SPREAD = {"ddp": ["--trainer.strategy=ddp"], "fsdp": [SHARDED], "tensor": [TENSOR], "context": [CONTEXT]}
HALF = {("bf16-mixed", "tensor"), ("bf16-true", "fsdp")}  # in the fast set
FORMS = {"kha": "ring", "mla": "gather", "moh": "ring"}  # of others what "auto" takes
FOUR = {
    "fsdp 2 x context 2": [CONTEXT],
    "fsdp 2 x tensor 2": [TENSOR],
    "context 2 x tensor 2": [CONTEXT, "--trainer.strategy.init_args.tensor_parallel_size=2"],
}


@pytest.mark.parametrize(("mechanism", "spread"), [("mha", "fsdp"), ("mla", "tensor"), ("moh", "context")])
def test_two_processes_equal_one(mechanism, spread, arguments, run, tmp_path):
    check_equal(mechanism, SPREAD[spread], 2, arguments, run, tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREAD)
@pytest.mark.parametrize("mechanism", SHAPES)
def test_two_processes_equal_one_for_longer(mechanism, spread, arguments, run, tmp_path):
    form = [f"--trainer.strategy.init_args.sequence_form={FORMS[mechanism]}"] if mechanism in FORMS else []
    check_equal(mechanism, SPREAD[spread] + form * (spread == "context"), 2, arguments, run, tmp_path, 20)


@pytest.mark.slow
def test_split_heads_drop_what_one_process_drops(arguments, run, tmp_path):
    check_equal("kha", [TENSOR], 2, arguments, run, tmp_path, 6, "--model.dropout=0.2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "spread"),
    [(name, next(iter(FOUR))) for name in SHAPES if name not in ("mhla", "moa")]
    + [(name, spread) for name in ("kha", "moh") for spread in list(FOUR)[1:]],
)
def test_four_processes_equal_one(mechanism, spread, arguments, run, tmp_path):
    check_equal(mechanism, FOUR[spread], 4, arguments, run, tmp_path, 20)


def check_equal(mechanism, spread, world_size, arguments, run, tmp_path, steps, *more):
    """Weights, optimiser states, logged numbers and texts of a run over processes are those of one process."""
    words = arguments(mechanism, "--trainer.precision=64-true", "--trainer.log_every_n_steps=1", *SHAPES[mechanism])
    words += [*more, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps // 2}"]
    words += [f"--checkpoints.every_n_train_steps={steps}"]
    alone, together = (f"--trainer.default_root_dir={tmp_path / name}" for name in ("alone", "together"))
    run([*words, alone, "--trainer.accelerator=cpu", "--trainer.devices=1"])
    succeed([*words, together, *spread], world_size)
    assert_equal_runs(tmp_path / "alone", tmp_path / "together")
    expected, found = metrics(tmp_path / "alone"), metrics(tmp_path / "together")
    assert ("train_loss", steps - 1) in expected
    assert ("val_bits_per_byte", steps - 1) in expected
    assert found == pytest.approx(expected, abs=1e-9)
    folders = [tmp_path / name / "version_0" for name in ("alone", "together")]
    texts, records = ([(folder / name).read_text() for folder in folders] for name in ("samples.txt", "record.json"))
    assert texts[0] == texts[1]
    assert records[0] == records[1]


def test_runs_continue_on_another_number_of_processes(arguments, tmp_path):
    words = arguments("kha", "--trainer.precision=64-true", "--checkpoints.every_n_train_steps=3", steps=6)
    for name, world_size, more in (("alone", 1, []), ("sharded", 2, [SHARDED])):
        succeed([*words, *more, f"--trainer.default_root_dir={tmp_path / name}"], world_size)
    assert_equal_runs(tmp_path / "alone", tmp_path / "sharded")
    old = {name: next((tmp_path / name).rglob("step=3.ckpt")) for name in ("alone", "sharded")}
    assert old["sharded"].is_dir()
    assert old["alone"].is_file()
    for name, source, world_size, more in (
        ("2 to 1 without shards", "sharded", 1, []),
        ("1 to 2", "alone", 2, [SHARDED]),
        ("2 to 2, damaged", "sharded", 2, [SHARDED]),
    ):
        path = old[source]
        if "damaged" in name:
            path = path.with_name("step=6.ckpt")
            shard = sorted(path.glob("*/*.safetensors"))[-1]
            shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        folder = tmp_path / name
        said = together([*words, *more, f"--trainer.default_root_dir={folder}", f"--ckpt_path={path}"], world_size)
        assert [code for code, _ in said] == [0] * world_size, said
        assert ("is damaged: its SHA-256" in said[0][1]) == ("damaged" in name)
        assert_equal_runs(tmp_path / "alone", folder)


def lose(rank, lost):
    from attnzoo_recipes.training import Pretraining

    def die(module, batch, batch_idx):
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == lost:
        before(Pretraining, "training_step", die)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_a_sentence(lost, arguments):
    said = together([*arguments("mha"), SHARDED], prepare=lose, arguments=(lost,), timeout=60)
    assert said[lost][0] == -signal.SIGKILL
    code, output = said[1 - lost]
    assert code == 6
    assert "Traceback" not in output
    assert output.count("attnzoo-pretrain: another process of this run has ended or does not answer") == 1


def spoil(rank):
    from attnzoo_recipes.training import Pretraining

    original = Pretraining.training_step

    def step(module, batch, batch_idx):
        loss = original(module, batch, batch_idx)
        return loss * float("nan") if rank == 1 and batch_idx == 1 else loss

    Pretraining.training_step = step


@pytest.mark.parametrize("spread", ["tensor", pytest.param("context", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_in_all(spread, arguments, tmp_path):
    said = together([*arguments("mha", steps=3), *SPREAD[spread]], prepare=spoil)
    assert [code for code, _ in said] == [0, 0], said
    assert "Step 1 is skipped: its loss or gradient is not finite" in said[0][1]
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 3
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("config", sorted(Path("configs/distributed").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_distributed_config_trains(config, arguments, tmp_path, capsys):
    succeed([*arguments("mha"), f"--config={config}"])
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    consolidate([str(tmp_path / "run"), str(tmp_path / "weights.safetensors")])
    written = load_file(tmp_path / "weights.safetensors")
    assert {f"model.{name}" for name in written} == set(saved["state_dict"])
    assert all(torch.equal(value, saved["state_dict"][f"model.{name}"]) for name, value in written.items())
    generate([str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.parametrize(
    "config", [TENSOR, *(pytest.param(config, marks=pytest.mark.slow) for config in (SHARDED, CONTEXT))]
)
def test_runs_start_from_weights(config, arguments, run, tmp_path):
    words = arguments("kha", "--trainer.precision=64-true")
    folders = [f"--trainer.default_root_dir={tmp_path / name}" for name in ("before", "alone", "together")]
    one = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    run([*words, folders[0], *one])
    consolidate([str(tmp_path / "before"), str(tmp_path / "weights.safetensors")])
    words.append(f"--model.init_from={tmp_path / 'weights.safetensors'}")
    run([*words, folders[1], *one])
    succeed([*words, folders[2], config])
    assert_equal_runs(tmp_path / "alone", tmp_path / "together")


@pytest.mark.slow
def test_runs_continue_on_another_mesh(arguments, tmp_path):
    words = arguments("kha", "--trainer.precision=64-true", "--checkpoints.every_n_train_steps=3", steps=8)
    words += ["--model.schedule_steps=8", "--checkpoints.keep=9"]
    succeed([*words, f"--trainer.default_root_dir={tmp_path / 'alone'}"], 1)
    path = next((tmp_path / "alone").rglob("step=3.ckpt"))
    for steps, world_size, more in ((4, 2, TENSOR), (5, 2, CONTEXT), (6, 1, SHARDED), (7, 2, SHARDED), (8, 1, None)):
        folder = tmp_path / str(steps)
        changed = [f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}", f"--ckpt_path={path}"]
        succeed([*words, *changed, *([more] if more else [])], world_size)
        path = next(folder.rglob(f"step={steps}.ckpt"))
    assert_equal_runs(tmp_path / "alone", tmp_path / "8")


TOO_MANY = "--trainer.strategy.init_args.data_parallel_size=2"
MISTAKES = {
    "heads that are mixed": ("talking_heads", [TENSOR], "every output mixes the scores of all heads"),
    "groups of heads": ("dcmha", [TENSOR], "head_groups must be a multiple of the ranks"),
    "form": ("linear", [CONTEXT, "--trainer.strategy.init_args.sequence_form=ring"], "form must be one of state"),
    "length": ("mha", [CONTEXT, "--data.block_size=30"], "data.block_size must divide among sequence_parallel_size 2"),
    "documents": ("mhla", [CONTEXT], "mask must not be packed on a shard"),
    "blocks": ("mhla", [CONTEXT, "--data.cross_documents=true"], "a multiple of block_size"),
    "devices": ("mha", [TENSOR, TOO_MANY], "must be the number of devices 2, got 2 x 1 x 2"),
}

FIRST = ("heads that are mixed", "length", "documents")


@pytest.mark.parametrize(
    ("mechanism", "more", "sentence"),
    [
        pytest.param(*mistake, id=name, marks=() if name in FIRST else pytest.mark.slow)
        for name, mistake in MISTAKES.items()
    ],
)
def test_what_cannot_be_spread_is_refused_before_training(mechanism, more, sentence, arguments, tmp_path):
    for code, said in together([*arguments(mechanism), *more]):
        assert code == 2
        assert said.count("attnzoo-pretrain: error: ") == 1
        assert sentence in said
        assert "Traceback" not in said
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("precision", "spread"),
    [
        pytest.param(precision, spread, marks=() if (precision, spread) in HALF else pytest.mark.slow)
        for precision in ("bf16-mixed", "bf16-true")
        for spread in ("fsdp", "tensor", "context")
    ],
)
def test_half_precision_trains(precision, spread, arguments, tmp_path):
    succeed([*arguments("mla"), *SPREAD[spread], f"--trainer.precision={precision}"])
    expected = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {value.dtype for value in read_checkpoint(tmp_path / "run")["state_dict"].values()} == {expected}
