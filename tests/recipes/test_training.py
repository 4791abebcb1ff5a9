"""Loss, groups, schedule and figures."""

import csv
import functools
import itertools
import math
import types
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

import attnzoo
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.data.packing import PackedCorpus
from attnzoo_recipes.model_config import build_model, describe_attention, model_from_checkpoint
from attnzoo_recipes.optimisers import MuonWithAdamW, warmup_cosine
from attnzoo_recipes.training import Pretraining


def test_the_schedule_warms_up_and_ends_at_its_floor():
    factor = warmup_cosine(10, 110, 0.1)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == 1.0
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    assert factor(500) == pytest.approx(0.1)


def test_matrices_decay_and_the_rest_does_not():
    attention = functools.partial(attnzoo.KnockingHeadsAttention, num_heads=4, bias=True, sink="learned")
    module = Pretraining(attention, vocab_size=20, embed_dim=32, num_layers=2, knock_weight_decay=0.01)
    module.configure_model()
    groups = {group["name"]: group for group in module.parameter_groups()}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.1,
        "no_decay": 0.0,
        "knock": 0.01,
    }
    assert all(parameter.ndim == 1 for parameter in groups["no_decay"]["params"])
    assert all(parameter.ndim == 2 for parameter in groups["decay"]["params"])
    assert len(groups["knock"]["params"]) == 2 * 3
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in module.parameters())


@pytest.mark.parametrize("optimizer", [None, MuonWithAdamW], ids=["adamw", "muon"])
def test_dynamic_weights_have_a_rate_of_their_own(optimizer):
    attention = functools.partial(attnzoo.DynamicallyComposableAttention, num_heads=4, static_base=True)
    module = Pretraining(attention, vocab_size=20, embed_dim=32, num_layers=2, lr=1e-2, optimizer=optimizer)
    module.configure_model()
    module.trainer = types.SimpleNamespace(precision="32-true", max_steps=10, estimated_stepping_batches=10)
    made = module.configure_optimizers()
    rates = {
        id(parameter): group["initial_lr"] for group in made["optimizer"].param_groups for parameter in group["params"]
    }
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-3 if "_dyn." in name else 1e-2), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"dynamic_lr_ratio": 0.0}, "dynamic_lr_ratio must be positive, got 0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"min_lr_ratio": 2.0}, r"min_lr_ratio must lie in \[0, 1\], got 2"),
        *[
            ({name: wrong}, f"{name} must be a finite number, got {wrong}")
            for name in (
                "lr",
                "weight_decay",
                "knock_weight_decay",
                "dynamic_lr_ratio",
                "adam_eps",
                "norm_eps",
                "dropout",
                "init_std",
                "min_lr_ratio",
                "aux_loss_weight",
            )
            for wrong in (math.nan, math.inf)
        ],
        ({"betas": (0.9, math.nan)}, "betas must be a finite number, got nan"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Pretraining(functools.partial(attnzoo.MultiHeadAttention, num_heads=4), **options)


def test_bits_per_byte_are_nats_over_bytes_of_the_whole_split(arguments, run, tmp_path, capsys):
    words = arguments("gqa", "--data.tokenizer=bpe", "--data.vocab_size=300", "--trainer.limit_val_batches=1.0")
    run([*words, "--trainer.val_check_interval=2"])
    (metrics,) = (tmp_path / "run").rglob("metrics.csv")
    with metrics.open(newline="") as file:
        (logged,) = [row for row in csv.DictReader(file) if row["val_bits_per_byte"]]
    model = model_from_checkpoint(read_checkpoint(tmp_path / "run"))
    (folder,) = (tmp_path / "data").iterdir()
    packed = PackedCorpus.open(folder)
    ids = torch.from_numpy(packed.tokens("val").astype("int64"))
    lengths = torch.from_numpy(packed.tokenizer.token_bytes())
    nats, count = 0.0, 0
    for start in range(0, len(ids) - 32, 32):
        tokens, targets = ids[start : start + 32], ids[start + 1 : start + 33]
        begins = [0, *[i for i in range(1, 32) if tokens[i] == packed.tokenizer.document_id], 32]
        logits = [model(tokens[None, a:b])[0] for a, b in itertools.pairwise(begins)]
        nats += F.cross_entropy(torch.cat(logits), targets, reduction="sum").item()
        count += lengths[targets].sum().item()
    assert float(logged["val_bits_per_byte"]) == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_the_report_compares_with_the_entropies_and_names_the_files(arguments, run, tmp_path, capsys):
    run([*arguments("kha"), "--trainer.val_check_interval=2"])
    printed = capsys.readouterr().out
    for words in ("bits per byte", "unigram entropy", "bigram entropy", "tokens/s", "parameters", "bytes per token"):
        assert words in printed
    for name in ("step=2.ckpt", "metrics.csv", "loss_curve.png"):
        (path,) = (tmp_path / "run").rglob(name)
        assert str(path) in printed
    (picture,) = (tmp_path / "run").rglob("loss_curve.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gradient_accumulation_equals_the_larger_batch(arguments, run, tmp_path):
    states = []
    for batch, accumulated in ((8, 1), (4, 2)):
        folder = tmp_path / str(batch)
        words = [f"--data.batch_size={batch}", f"--trainer.accumulate_grad_batches={accumulated}"]
        run(arguments("mha", *words, f"--trainer.default_root_dir={folder}", steps=3))
        states.append(read_checkpoint(folder)["state_dict"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=2e-6, rtol=1e-5, msg=name)


def test_precision_compile_and_loggers_are_options(arguments, run, tmp_path):
    run(
        arguments(
            "kha",
            "--trainer.precision=bf16-mixed",
            "--model.activation_checkpointing=true",
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={tmp_path / 'board'}",
        )
    )
    assert list((tmp_path / "board").rglob("events.out.tfevents*"))
    assert list((tmp_path / "run").rglob("metrics.csv"))


def test_an_attention_is_described_by_what_makes_it():
    rotary = attnzoo.Rotary(theta=5e5, scaling={"rope_type": "linear", "factor": 2.0})
    attention = functools.partial(attnzoo.GroupedTiedAttention, num_heads=4, num_kv_heads=2, rope=rotary)
    config = {"vocab_size": 11, "embed_dim": 32, "num_layers": 1, "attention": describe_attention(attention)}
    assert config["attention"]["class_path"] == "attnzoo.GroupedTiedAttention"
    assert build_model(config).blocks[0].attn.rope == rotary


def test_a_lambda_is_no_description():
    with pytest.raises(ValueError, match=r"attention must be a class or functools\.partial"):
        describe_attention(lambda width: attnzoo.MultiHeadAttention(width, 4))


BAD_SETTINGS = {
    "no end": (["--trainer.max_steps=-1"], "trainer.max_steps must be given", "got -1"),
    "no end but one of time": (["--trainer.max_steps=-1", "--trainer.max_time=00:01:00:00"], "trainer.max_steps", "-1"),
    "infinite rate": (["--model.lr=.inf"], "model.lr must be a finite number", "got inf"),
    "decay": (["--model.weight_decay=.nan"], "model.weight_decay must be a finite number", "got nan"),
    "a beta": (["--model.betas=[0.9,.nan]"], "model.betas must be a finite number", "got nan"),
    "of the trainer": (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val", "got nan"),
    "share of data": (["--data.val_fraction=.nan"], "data.val_fraction", "got nan"),
    "temperature": (["--samples.temperature=.inf"], "samples.temperature", "got inf"),
    "negative temperature": (["--samples.temperature=-1"], "temperature must be finite and not negative", "got -1"),
    "samples without tokens": (["--samples.max_new_tokens=0"], "samples.max_new_tokens must be at least 1", "got 0"),
    "mechanism": (["--model.attention.init_args.dropout=.nan"], "dropout must be a finite number", "got nan"),
    "keeps none": (["--checkpoints.keep=0"], "checkpoints.keep must be at least 1", "got 0"),
    "never saves": (["--checkpoints.every_n_train_steps=0"], "checkpoints.every_n_train_steps", "got 0"),
    "tensor parallel": (
        ["--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
         "--trainer.strategy.init_args.tensor_parallel_size=2"],
        "must be the number of devices", "got 1 x 1 x 2",
    ),
    "compiled shards": (
        ["--config=configs/distributed/fsdp.yaml", "--model.compile=true"], "model.compile must be false", "got true",
    ),
    "sharded": (["--trainer.accelerator=cpu", "--trainer.strategy=fsdp"], "fsdp", "requires a GPU"),
    "deepspeed": (["--trainer.strategy=deepspeed"], "DeepSpeed", "installed"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "named", "got"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_train_are_refused_first(more, named, got, arguments, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", *more))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "attnzoo-pretrain: error:" in line]
    assert named in sentence
    assert got in sentence
    assert not (tmp_path / "data").exists(), "before the corpus is tokenised"


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()], ids=lambda each: type(each).__name__)
def test_sharding_strategies_are_refused_by_the_module_too(strategy):
    module = Pretraining(functools.partial(attnzoo.MultiHeadAttention, num_heads=4))
    module.trainer = types.SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match=f"trainer.strategy must be .* got {type(strategy).__name__}"):
        module.setup("fit")


@pytest.mark.parametrize(("command", "name"), [("fit", "val_loss"), ("validate", "val_loss"), ("test", "test_loss")])
def test_an_evaluation_that_is_not_finite_has_exit_code_3(command, name, arguments, run, capsys, monkeypatch):
    original = Pretraining._cross_entropy

    def spoiled(module, batch, reduction):
        return original(module, batch, reduction) * (1.0 if module.training else math.nan)

    monkeypatch.setattr(Pretraining, "_cross_entropy", spoiled)
    words = arguments("mha", "--trainer.val_check_interval=2", steps=4)
    with pytest.raises(SystemExit) as stopped:
        run([command, *words[1:]])
    assert stopped.value.code == 3
    step = 2 if command == "fit" else 0
    assert f"attnzoo-pretrain: {name} is not finite after step {step}: it is nan" in capsys.readouterr().err


def test_other_data_than_the_recipes_are_evaluated_without_bits_per_byte():
    samples = [{"tokens": torch.randint(0, 20, (6,)), "targets": torch.randint(0, 20, (6,))} for _ in range(7)]
    for sample in samples[:3]:
        sample["targets"][2:] = -100
    loader = torch.utils.data.DataLoader(samples, batch_size=2)
    attention = functools.partial(attnzoo.MultiHeadAttention, num_heads=2)
    module = Pretraining(attention, vocab_size=20, embed_dim=8, num_layers=1)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*is deprecated.*")
        trainer.fit(module, loader, [loader, loader])
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (tested,) = trainer.test(module, loader, verbose=False)
    assert set(found) == {"train_loss", "val_loss", "val_1_loss"}
    logits = module(torch.stack([sample["tokens"] for sample in samples])).flatten(0, 1)
    expected = F.cross_entropy(logits, torch.cat([sample["targets"] for sample in samples])).item()
    assert [found["val_loss"], found["val_1_loss"], tested["test_loss"]] == pytest.approx([expected] * 3)


@pytest.mark.parametrize("steps", [-1, math.inf])
def test_an_end_is_asked_for(steps):
    module = Pretraining(functools.partial(attnzoo.MultiHeadAttention, num_heads=2), vocab_size=20, embed_dim=8)
    module.configure_model()
    module.trainer = types.SimpleNamespace(precision="32-true", max_steps=-1, estimated_stepping_batches=steps)
    with pytest.raises(ValueError, match=r"trainer\.max_steps must be given: the learning rate's cosine ends there"):
        module.configure_optimizers()


def test_the_size_of_a_vocabulary_is_asked_for():
    module = Pretraining(functools.partial(attnzoo.MultiHeadAttention, num_heads=2))
    with pytest.raises(ValueError, match="vocab_size must be given where the trainer's data module has no tokenizer"):
        module.configure_model()


def no_memory(kind):
    """The errors of torch on a CPU, which is a real one, of torch on a GPU, and of NumPy and Python."""
    if kind == "cpu":
        torch.empty(2**62, dtype=torch.uint8)
    raise {"gpu": torch.OutOfMemoryError("CUDA out of memory. Tried"), "python": MemoryError()}[kind]


@pytest.mark.parametrize("kind", ["cpu", "gpu", "python"])
def test_out_of_memory_is_one_sentence(kind, arguments, run, tmp_path, capsys, monkeypatch):
    original = Pretraining.training_step

    def greedy(module, batch, batch_idx):
        if module.global_step == 3:
            no_memory(kind)
        return original(module, batch, batch_idx)

    monkeypatch.setattr(Pretraining, "training_step", greedy)
    with pytest.raises(SystemExit) as stopped:
        run(arguments("kha", "--checkpoints.every_n_train_steps=2", steps=4))
    assert stopped.value.code == 5
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnzoo-pretrain")]
    assert "out of memory" in sentence
    assert "(B, T) = (4, 32)" in sentence
    for setting in ("data.batch_size", "data.block_size", "model.activation_checkpointing"):
        assert setting in sentence
    # Parameters of a layer: four matrices of 32 x 32 and the knocking maps; 16 bytes each in two layers.
    layer = attnzoo.KnockingHeadsAttention(32, 4)
    expected = attnzoo.cost(layer, 4, 32, dtype=torch.float32)
    trained, moved = 2 * expected.parameters * 16 / 2**20, 2 * expected.bytes_moved / 2**20
    assert f"2 layers of KnockingHeadsAttention take about {trained:,.1f} MiB" in sentence
    assert f"at least {moved:,.1f} MiB in a forward pass" in sentence
    assert read_checkpoint(tmp_path / "run")["global_step"] == 2


def test_a_model_that_does_not_fit_is_one_sentence(arguments, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(arguments("kha", "--model.embed_dim=80000000"))
    assert stopped.value.code == 5
    err = capsys.readouterr().err
    assert "out of memory" in err
    assert "E = 80000000" in err
    assert "Traceback" not in err
