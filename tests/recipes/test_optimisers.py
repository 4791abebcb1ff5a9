"""Muon with AdamW, and schedules, by class path."""

import functools
import json
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.optimisers import (
    MuonWithAdamW,
    WarmupCosine,
    WarmupStableDecay,
    made_schedule,
    rates_at,
    warmup_cosine,
)
from attnzoo_recipes.training import Pretraining

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINING = sorted(path.stem for path in (CONFIGS / "training").glob("*.yaml"))


def groups():
    attention = functools.partial(attnzoo.KnockingHeadsAttention, num_heads=4, bias=True)
    module = Pretraining(attention, vocab_size=20, embed_dim=32, num_layers=2)
    module.configure_model()
    given = module.parameter_groups(embeddings=True)
    return module, [{name: value for name, value in group.items() if name != "lr"} for group in given]


def test_hidden_matrices_are_muons_and_the_rest_adamws():
    module, given = groups()
    optimizer = MuonWithAdamW(given)
    muon, adam = optimizer._parts
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert "blocks.0.attn.q_proj.weight" in taken
    assert "blocks.1.mlp.down_proj.weight" in taken
    left = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    assert {"embedding.weight", "norm.weight", "blocks.0.attn.q_proj.bias"} <= left
    assert any("knock" in name for name in left)
    assert [group["name"] for group in optimizer.param_groups] == ["muon", "embeddings", "no_decay", "knock"]


def test_a_step_is_that_of_both_and_its_state_is_restored():
    torch.manual_seed(0)
    module, given = groups()
    ours = MuonWithAdamW(given, lr=1e-2)
    parameters = [p for group in given for p in group["params"]]
    copies = {id(p): p.detach().clone() for p in parameters}
    muons = list(ours._parts[0].param_groups[0]["params"])
    for p in parameters:
        p.grad = torch.randn_like(p)
    ours.step()
    for make, chosen in (
        (lambda ps: torch.optim.Muon(ps, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"), muons),
        (lambda ps: torch.optim.AdamW(ps, 1e-2, (0.9, 0.95), weight_decay=0.1), [module.model.embedding.weight]),
    ):
        again = [torch.nn.Parameter(copies[id(p)]) for p in chosen]
        for copy, p in zip(again, chosen, strict=True):
            copy.grad = p.grad
        make(again).step()
        for copy, p in zip(again, chosen, strict=True):
            torch.testing.assert_close(copy, p)
    saved = ours.state_dict()
    assert len(saved["state"]) == len(parameters)
    other = MuonWithAdamW(groups()[1], lr=1.0)
    other.load_state_dict(saved)
    assert [g["lr"] for g in other._parts[1].param_groups] == [1e-2] * 3
    assert other._parts[0].param_groups[0] is other.param_groups[0]
    first = other._parts[0].param_groups[0]["params"][0]
    assert torch.equal(other._parts[0].state[first]["momentum_buffer"], ours.state[muons[0]]["momentum_buffer"])


def test_a_schedule_moves_the_rates_of_both():
    optimizer = MuonWithAdamW(groups()[1], lr=1.0)
    scheduler = made_schedule(functools.partial(WarmupCosine, warmup_steps=4), optimizer, 10)
    assert {group["lr"] for part in optimizer._parts for group in part.param_groups} == {0.25}
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for part in optimizer._parts for group in part.param_groups} == {0.5}


@pytest.mark.parametrize("form", ["linear", "sqrt"])
def test_warm_up_stable_decay(form):
    schedule = functools.partial(WarmupStableDecay, warmup_steps=4, decay_steps=10, min_ratio=0.1, form=form)
    rates = rates_at([0, 3, 4, 20, 25, 30, 35], 2.0, schedule, 30)
    half = 0.1 + 0.9 * (0.5 if form == "linear" else 1 - 0.5**0.5)
    assert rates == pytest.approx([0.5, 2.0, 2.0, 2.0, 2 * half, 0.2, 0.2])


def test_the_default_is_the_cosine():
    rates = rates_at([0, 50, 100, 150], 3.0, functools.partial(WarmupCosine, warmup_steps=10, min_ratio=0.1), 100)
    factor = warmup_cosine(10, 100, 0.1)
    assert rates == pytest.approx([3 * factor(step) for step in (0, 50, 100, 150)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": -1}, "decay_steps must not be negative, got -1"),
        ({"form": "cosine"}, "form must be linear or sqrt, got 'cosine'"),
        ({"warmup_steps": 20, "decay_steps": 20}, "must fit into the 30 steps of the schedule, got 20 and 20"),
        ({"min_ratio": 2.0}, r"min_ratio must lie in \[0, 1\], got 2"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
    ],
)
def test_schedules_refuse(options, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(optimizer, **{"decay_steps": 5, "warmup_steps": 2, "steps": 30, **options})


@pytest.mark.parametrize("config", TRAINING)
def test_every_training_config_trains(config, arguments, run, tmp_path):
    words = ["--lr_scheduler.init_args.warmup_steps=1", "--lr_scheduler.init_args.decay_steps=1"] * (config == "wsd")
    run(arguments("kha", "--config", f"configs/training/{config}.yaml", *words))
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_muon_learns(arguments, run, tmp_path):
    config = ["--config", "configs/training/muon.yaml", "--model.lr=1e-2", "--trainer.log_every_n_steps=20"]
    run(arguments("mha", *config, steps=40))
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    losses = list(metrics.read_text().splitlines())
    column = losses[0].split(",").index("train_loss")
    values = [float(line.split(",")[column]) for line in losses[1:] if line.split(",")[column]]
    assert values[-1] < 4.0  # 5.55 at the start


def test_any_optimiser_and_schedule_of_torch(arguments, run, tmp_path):
    run(
        arguments(
            "gqa",
            "--optimizer=torch.optim.NAdam",
            "--optimizer.betas=[0.8,0.9]",
            "--lr_scheduler=torch.optim.lr_scheduler.StepLR",
            "--lr_scheduler.step_size=1",
            "--lr_scheduler.gamma=0.5",
            "--model.lr=0.25",
        )
    )
    saved = read_checkpoint(tmp_path / "run")
    for group in saved["optimizer_states"][0]["param_groups"]:
        assert tuple(group["betas"]) == (0.8, 0.9)
        assert group["lr"] == 0.25 / 4


def test_the_schedule_may_be_longer_than_the_run(arguments, run, tmp_path):
    run(arguments("mha", "--model.schedule_steps=100", "--model.warmup_steps=0", "--model.lr=1.0", steps=3))
    saved = read_checkpoint(tmp_path / "run")
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(warmup_cosine(0, 100, 0.1)(3))


MISTAKES = {
    "not an optimiser": (["--optimizer=torch.nn.Linear"], "optimizer"),
    "of elsewhere": (["--optimizer=subprocess.Popen"], "subprocess.Popen"),
    "in a file": (["--config={optimizer: {class_path: os.system}}"], "os.system"),
    "a schedule of elsewhere": (["--lr_scheduler=shutil.rmtree"], "shutil.rmtree"),
    "a function": (
        ["--lr_scheduler=torch.optim.lr_scheduler.LambdaLR", "--lr_scheduler.lr_lambda=os.system"],
        "os.system",
    ),
    "a class among validation sets": (['--data.val_sets={"a": {"class_path": "os.system"}}'], "os.system"),
    "a class in a mixture": (['--data.mixture={"a": {"weight": 1, "class_path": "os.system"}}'], "os.system"),
    "a rate twice": (
        ["--optimizer=torch.optim.SGD", "--optimizer.lr=0.5"],
        "optimizer.init_args.lr must be left out, since model.lr",
    ),
    "z": (["--model.z_loss=-1"], "z_loss must not be negative, got -1"),
    "length": (["--model.schedule_steps=0"], "schedule_steps must be at least 1, got 0"),
    "decay too long": (
        ["--lr_scheduler=attnzoo_recipes.optimisers.WarmupStableDecay", "--lr_scheduler.decay_steps=7"],
        "must fit into the 2 steps of the schedule, got 100 and 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("more", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_sentence(more, named, arguments, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", *more))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "attnzoo-pretrain: error:" in line]
    assert named in sentence


def test_the_z_loss_is_added_and_logged_apart(arguments, run, tmp_path):
    rows = {}
    for z_loss in (0.0, 0.5):
        folder = tmp_path / str(z_loss)
        run(arguments("mha", f"--model.z_loss={z_loss}", f"--trainer.default_root_dir={folder}", steps=1))
        (metrics,) = folder.rglob("metrics.csv")
        names, values = (line.split(",") for line in metrics.read_text().splitlines()[:2])
        rows[z_loss] = dict(zip(names, values, strict=True))
    assert rows[0.0]["train_loss"] == rows[0.5]["train_loss"]
    assert "train_z_loss" not in rows[0.0]
    assert float(rows[0.5]["train_z_loss"]) > 20  # log(257)^2 is 30.8
    states = [read_checkpoint(tmp_path / folder)["state_dict"]["model.norm.weight"] for folder in ("0.0", "0.5")]
    assert not torch.equal(*states)


def test_optimiser_settings_are_saved_with_the_run(arguments, run, tmp_path):
    run(arguments("mha", "--config", "configs/training/muon.yaml"))
    (config,) = (tmp_path / "run").rglob("config.yaml")
    assert "MuonWithAdamW" in config.read_text()
    json.dumps(read_checkpoint(tmp_path / "run")["optimizer_states"][0]["param_groups"])
