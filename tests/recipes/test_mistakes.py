"""A user's mistake ends in one sentence and exit code 2, and leaves nothing behind."""

import importlib
import json
import os

import pytest
import torch

from attnzoo_recipes.checkpointing import AtomicCheckpointIO, newest_valid
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import build_attention

MISTAKES = {
    "misspelled key": (["--trainer.max_step=3"], "max_step"),
    "misspelled mechanism option": (["--model.attention.init_args.num_head=3"], "num_head"),
    "option that cannot be": (["--model.attention.init_args.num_heads=5"], "got 5"),
    "class outside the allow-list": (["--trainer.callbacks+=antigravity.Fly"], "--allow-import antigravity"),
    "no such config": (["--config", "configs/attention/mhha.yaml"], "neither a file nor one of"),
    "missing data file": (["--data.files=['nowhere/*.txt']"], "there is no file 'nowhere/*.txt'"),
    "a folder of data files": (["--data.files=['configs']"], "such as 'configs/*', got the folder 'configs'"),
    "unknown source": (["--data.source=csv"], "data.source must be one of"),
    "files for the standard library": (["--data.source=stdlib"], "data.files must be empty"),
    "block larger than the corpus": (["--data.block_size=100000"], "split must hold more than data.block_size"),
    "val_fraction of 1": (["--data.val_fraction=1.0"], "data.val_fraction must be positive"),
    "no tokenizer": (["--data.tokenizer=nowhere.json"], "data.tokenizer must be byte, bpe or a tokenizer.json"),
    "vocabulary below the bytes": (["--data.tokenizer=bpe", "--data.vocab_size=100"], "at least 258"),
    "negative learning rate": (["--model.lr=-1"], "lr must be positive, got -1"),
    "no end": (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "max_steps must be given"),
    "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    "a GPU that is not there": (["--trainer.accelerator=cuda"], "CUDAAccelerator"),
    "a mechanism on a GPU that is not there": (["--model.attention.init_args.device=cuda"], "device that is there"),
    "no such accelerator": (["--trainer.accelerator=tape"], "invalid accelerator name"),
    "no such strategy": (["--trainer.strategy=tape"], "invalid strategy name"),
    "no settings": (["--trainer=5"], "trainer"),
    "rotation that cannot be": (["--model.attention.init_args.rope.theta=-1"], "theta must be finite"),
    "config without a name": (["--config"], "expected one argument"),
    "config with a name that no file has": (["--config", "x" * 5000], "neither a file nor one of"),
    "accumulation of nothing": (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches must be at least 1"),
    "negative accumulation": (["--trainer.accumulate_grad_batches=-1"], "accumulate_grad_batches must be at least 1"),
    "validation after no step": (["--trainer.val_check_interval=0"], "trainer.val_check_interval must be at least 1"),
    "log of no step": (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps must be at least 1, got 0"),
    "gradients turned around": (["--trainer.gradient_clip_val=-1"], "gradient_clip_val must not be negative, got -1"),
    "no step": (["--trainer.max_steps=0"], "trainer.max_steps must be given and be at least 1"),
    "an epoch": (["--trainer.limit_train_batches=3"], "trainer.limit_train_batches must be left out"),
    "a share of the batches": (["--trainer.limit_train_batches=0.5"], "trainer.limit_train_batches must be left out"),
    "the same batches": (["--trainer.overfit_batches=2"], "trainer.overfit_batches must be left out"),
    "no epoch": (["--trainer.max_epochs=0"], "trainer.max_epochs must be left out"),
    "a rate that lasts one step": (["--trainer.callbacks+=LearningRateFinder"], "must not hold LearningRateFinder"),
    "a folder that is a file": ([f"--trainer.default_root_dir={__file__}/run"], "trainer.default_root_dir must be"),
    "a folder that cannot be": (["--trainer.default_root_dir=/proc/nope"], "/proc/nope/version_0 could not be written"),
    "moments that do not fade": (["--model.betas=[1,1]"], "betas must lie in [0, 1), got (1.0, 1.0)"),
    "negative epsilon": (["--model.adam_eps=-1"], "adam_eps must not be negative, got -1"),
    "negative epsilon of norms": (["--model.norm_eps=-1"], "norm_eps must not be negative, got -1"),
    "optimiser of another kind": (["--optimizer=LBFGS"], "optimizer must take parameter groups and dense gradients"),
    "optimiser that refuses": (["--optimizer=SGD", "--optimizer.nesterov=true"], "Nesterov momentum requires"),
    "devices that are none": (["--trainer.devices=foo"], "devices"),
    "precision without its package": (["--trainer.precision=transformer-engine"], "transformer_engine"),
    "a word for a checkpoint": (["--ckpt_path=last"], "ckpt_path must be a checkpoint, or the folder of a run"),
    "backend that does not exist": (["--model.attention.init_args.backend=cuda"], "backend"),
}


def refused(run, arguments, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO")]
    (sentence,) = [line for line in errors if "error:" in line]
    assert "Traceback" not in "\n".join(errors)
    return sentence


@pytest.mark.parametrize(("more", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_sentence(more, message, arguments, run, tmp_path, capsys):
    sentence = refused(run, arguments("kha", *more), capsys)
    assert message in sentence
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.tmp-*"))
    assert not list(tmp_path.rglob("version_*"))


def test_an_empty_corpus(arguments, run, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    assert "holds no text" in refused(run, arguments("kha", f"--data.files=['{empty}']"), capsys)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_text_that_is_not_utf8(arguments, run, tmp_path, capsys):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x80 text\n" * 50)
    assert "UTF-8" in refused(run, arguments("kha", f"--data.files=['{binary}']"), capsys)


def test_a_field_that_is_not_there(arguments, run, tmp_path, capsys):
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"body": "some text"}\n' * 50)
    words = arguments("kha", "--data.source=json", f"--data.files=['{lines}']")
    assert "data.text_field must be one of body, got 'text'" in refused(run, words, capsys)


def test_the_checkpoint_of_another_mechanism(arguments, run, tmp_path, capsys):
    run(arguments("kha"))
    path = newest_valid(tmp_path / "run")
    sentence = refused(run, arguments("gta", f"--ckpt_path={path}"), capsys)
    assert "attnzoo.KnockingHeadsAttention" in sentence
    assert "attnzoo.GroupedTiedAttention" in sentence


def test_a_checkpoint_of_other_sizes(arguments, run, tmp_path, capsys):
    run(arguments("kha"))
    path = newest_valid(tmp_path / "run")
    sentence = refused(run, arguments("kha", "--model.embed_dim=64", f"--ckpt_path={path}"), capsys)
    assert "embed_dim (32 in the checkpoint, 64 now)" in sentence


CONTINUED = {
    "rate": (["--model.lr=1e-5"], "model.lr must be 0.001, as in the checkpoint that is continued, got 1e-05"),
    "decay": (["--model.weight_decay=0.5"], "model.weight_decay must be 0.1"),
    "moments": (["--model.betas=[0.8,0.95]"], "model.betas must be [0.9, 0.95]"),
    "optimiser": (["--optimizer=SGD"], "optimizer.class_path must be torch.optim.adamw.AdamW"),
    "schedule": (["--lr_scheduler=ConstantLR"], "lr_scheduler.class_path must be None"),
}


def test_a_run_that_continues_has_its_optimiser(arguments, run, tmp_path, capsys):
    run(arguments("mha", "--model.min_lr_ratio=0.2"))
    path = newest_valid(tmp_path / "run")
    older = tmp_path / "older.ckpt"
    content = torch.load(path, weights_only=True)
    del content["attnzoo"]["optimizer"]
    AtomicCheckpointIO().save_checkpoint(content, older)
    for more, message in CONTINUED.values():
        sentence = refused(run, arguments("mha", *more, f"--ckpt_path={path}", steps=4), capsys)
        assert message in sentence
        assert "--model.init_from" in sentence
    assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["version_0"]
    for more, message in (CONTINUED["rate"], CONTINUED["decay"]):
        assert message in refused(run, arguments("mha", *more, f"--ckpt_path={older}", steps=4), capsys)
    # What takes effect may change.
    run(arguments("mha", "--model.min_lr_ratio=0.9", f"--ckpt_path={path}", steps=3))
    run(arguments("mha", f"--ckpt_path={older}", steps=3))
    run(["validate", *arguments("mha", "--model.lr=1e-5", f"--ckpt_path={path}")[1:]])


def test_an_optimiser_that_is_named_is_continued_with_its_arguments(arguments, run, tmp_path, capsys):
    muon = ["--config=configs/training/muon.yaml", "--lr_scheduler=ConstantLR", "--lr_scheduler.total_iters=3"]
    run(arguments("mha", *muon))
    path = newest_valid(tmp_path / "run")
    for option, was, now in (
        ("optimizer.init_args.momentum", 0.95, 0.5), ("lr_scheduler.init_args.total_iters", 3, 4),
    ):  # fmt: skip
        words = arguments("mha", *muon, f"--{option}={now}", f"--ckpt_path={path}", steps=4)
        assert f"{option} must be {was}" in refused(run, words, capsys)
    run(arguments("mha", *muon, f"--ckpt_path={path}", steps=3))


def test_figures_of_random_weights_are_said_to_be(arguments, run, capsys):
    run(["validate", *arguments("mha")[1:]])
    said = capsys.readouterr()
    assert "val_bits_per_byte" in said.out
    assert "the figures are those of random weights" in said.err


def test_a_dry_run_leaves_nothing(arguments, run, tmp_path):
    run(arguments("mha", "--trainer.fast_dev_run=true", "--trainer.max_steps=-1"))
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint(arguments, run, tmp_path, capsys):
    run(arguments("kha"))
    path = newest_valid(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-100])
    sentence = refused(run, arguments("kha", f"--ckpt_path={path}"), capsys)
    assert path.name in sentence
    assert "damaged" in sentence


def test_a_checkpoint_with_other_objects_is_not_unpickled(arguments, run, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Evil()}, path)
    refused(run, arguments("kha", f"--ckpt_path={path}"), capsys)
    assert not (tmp_path / "executed").exists()


COMMANDS = {
    "pretrain": "pretrain", "generate": "generate", "compare": "compare.cli", "heads": "diagnose.heads",
    "prune": "diagnose.prune", "spectrum": "diagnose.spectrum",
}  # fmt: skip
READERS = ("pretrain", "generate", "heads", "prune", "spectrum")
ATTENTION = {"class_path": "attnzoo.MultiHeadAttention", "init_args": {"num_heads": 2}}
CONFIG = {"vocab_size": 257, "embed_dim": 8, "num_layers": 1, "attention": ATTENTION}


def command(name):
    return importlib.import_module(f"attnzoo_recipes.{COMMANDS[name]}").main


def state():
    model = DecoderLM(257, build_attention(ATTENTION), embed_dim=8, num_layers=1)
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def with_model(**changes):
    return lambda: {"attnzoo": {"model": {**CONFIG, **changes}, "tokenizer": {"kind": "byte"}}, "state_dict": state()}


def with_options(**changes):
    return with_model(attention={**ATTENTION, "init_args": {"num_heads": 2, **changes}})


def with_state(change):
    return lambda: {**with_model()(), "state_dict": change(state())}


ODD = {
    "nothing": (dict, "names no attnzoo model"),
    "no settings": (lambda: {"attnzoo": None, "state_dict": {}}, "names no attnzoo model"),
    "no model": (lambda: {"attnzoo": {"model": None}, "state_dict": {}}, "must describe its model's attention"),
    "no attention": (with_model(attention=None), "must describe its model's attention"),
    "weights in a list": (lambda: {"attnzoo": {"model": CONFIG}, "state_dict": [1]}, "names no attnzoo model"),
    "weights that are none": (with_state(lambda w: {"model.x": 3}), "state_dict of tensors by name"),
    "weights without names": (with_state(lambda w: {3: torch.zeros(1)}), "state_dict of tensors by name"),
    "no weights": (with_state(lambda w: {}), "weights of every layer"),
    "a weight missing": (with_state(lambda w: dict(list(w.items())[1:])), "embedding.weight is missing"),
    "sparse weights": (with_state(lambda w: {n: v.to_sparse() for n, v in w.items()}), "torch.sparse_coo"),
    "complex weights": (with_state(lambda w: {n: v.to(torch.complex64) for n, v in w.items()}), "torch.complex64"),
    "a size in quotes": (with_model(vocab_size="257"), "vocab_size must be int, got '257'"),
    "a size that is true": (with_model(vocab_size=True), "vocab_size must be int, got True"),
    "a negative size": (with_model(vocab_size=-1), "vocab_size must be at least 1"),
    "too large a size": (with_model(vocab_size=10**13), "embedding.weight has shape (257, 8) instead of"),
    "too many layers": (with_model(num_layers=10**8), "weights of every layer, got"),
    "an unknown size": (with_model(width=3), "'width' is no option of DecoderLM"),
    "an unknown option": (with_options(width=3), "'width' is no option of MultiHeadAttention"),
    "a number in quotes": (with_options(head_dim="4"), "head_dim must be int, got '4'"),
    "a flag that is a number": (with_options(bias=1), "bias must be bool, got 1"),
    "a number that is a flag": (with_options(dropout=True), "dropout must be float, got True"),
    "a text that is a number": (with_options(backend=3), "backend must be str, got 3"),
    "a dtype": (with_options(dtype="torch.float16"), "dtype must be dtype"),
    "a rotation that is a number": (with_options(rope=10000.0), "rope must be Rotary, got 10000.0"),
    "a rotation with an unknown field": (with_options(rope={"base": 1e4}), "'base' is no option of Rotary"),
    "heads that do not fit": (with_options(num_heads=3), "num_heads must divide embed_dim"),
    "a width given twice": (with_options(embed_dim=4), "cannot be built: TypeError"),
    "an unknown tokenizer": (
        lambda: {**with_model()(), "attnzoo": {"model": CONFIG, "tokenizer": {"kind": "words"}}}, "tokenizer",
    ),
    "a tokenizer without its text": (
        lambda: {**with_model()(), "attnzoo": {"model": CONFIG, "tokenizer": {"kind": "bpe"}}}, "tokenizer",
    ),
    "a tokenizer that is a number": (
        lambda: {**with_model()(), "attnzoo": {"model": CONFIG, "tokenizer": 5}}, "tokenizer",
    ),
    "weights that are not numbers": (with_state(lambda w: {n: v * torch.nan for n, v in w.items()}), "got NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), ODD.values(), ids=ODD)
def test_an_odd_checkpoint(content, message, tmp_path, capsys):
    path = tmp_path / "odd.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    sentence = refused(command("generate"), [str(path)], capsys)
    assert message in sentence
    assert "odd.ckpt" in sentence or message == "got NaN"


def test_a_checkpoint_that_was_not_written_by_a_trainer(arguments, run, tmp_path, capsys):
    run(arguments("mha"))
    path = newest_valid(tmp_path / "run")
    content = torch.load(path, weights_only=True)
    odd = tmp_path / "odd.ckpt"
    for key in ("pytorch-lightning_version", "state_dict", "attnzoo", "loops", "optimizer_states"):
        AtomicCheckpointIO().save_checkpoint({**content, key: 5}, odd)
        assert str(odd) in refused(run, arguments("mha", f"--ckpt_path={odd}", steps=4), capsys), key


SPECIAL = {
    "a FIFO": (lambda path: os.mkfifo(path), "must be a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "must be a regular file"),
    "no file": (lambda path: None, "odd.ckpt"),
    "an empty file": (lambda path: path.touch(), "cannot be verified"),
}
SIDECARS = {
    "a FIFO": lambda path: os.mkfifo(path),
    "nested": lambda path: path.write_text("[" * 100_000),
    "nested objects": lambda path: path.write_text('{"may_be": ' * 50_000),
    "odd": lambda path: path.write_text('{"may_be": [5, null, {"sha256": "x", "size": true, "saved_at_ns": "x"}]}'),
}


def reading(name, path, text, arguments):
    more = {"heads": ["--text", str(text)], "prune": ["--data", str(text)]}
    return arguments("mha", f"--ckpt_path={path}") if name == "pretrain" else [str(path), *more.get(name, [])]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("make", "message"), SPECIAL.values(), ids=SPECIAL)
def test_a_path_that_is_no_checkpoint(make, message, name, arguments, corpus_file, tmp_path, capsys):
    path = tmp_path / "odd.ckpt"
    make(path)
    (tmp_path / "odd.ckpt.json").write_text(json.dumps({"may_be": [{"sha256": "x", "size": 0}]} if message else {}))
    sentence = refused(command(name), reading(name, path, corpus_file, arguments), capsys)
    assert message in sentence or "is damaged" in sentence
    assert "odd.ckpt" in sentence


@pytest.mark.parametrize("make", SIDECARS.values(), ids=SIDECARS)
def test_a_sidecar_that_is_none(make, tmp_path, capsys):
    path = tmp_path / "odd.ckpt"
    path.write_bytes(b"x")
    make(tmp_path / "odd.ckpt.json")
    sentence = refused(command("generate"), [str(path)], capsys)
    assert "odd.ckpt cannot be verified" in sentence or "odd.ckpt is damaged" in sentence


@pytest.mark.parametrize("name", ["generate", "heads", "prune", "spectrum"])
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tape", "meta"])
def test_a_device_that_is_not_there(device, name, corpus_file, tmp_path, capsys):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path = tmp_path / "some.ckpt"
    AtomicCheckpointIO().save_checkpoint(with_model()(), path)
    words = [*reading(name, path, corpus_file, None), "--device", device]
    assert repr(device) in refused(command(name), words, capsys)


FILES = {
    "missing": None, "empty": "", "list": "[1, 2]", "scalar": "hello", "broken": "model: [", "tabs": "model:\n\t- b",
    "two documents": "a: 1\n---\nb: 2", "odd key": "? [a]\n: b", "deep": "[" * 3000 + "]" * 3000,
    "bytes": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_an_odd_config(name, arguments, tmp_path, capsys, monkeypatch):
    path = tmp_path / "odd.yaml"
    content = FILES[name]
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = ["--out", str(tmp_path / "out")]
    for command_name, words in (
        ("compare", ["--mechanisms", f"mha,{path}", *out]), ("compare", ["--config", str(path), *out]),
        ("pretrain", arguments("mha", "--config", str(path))),
    ):  # fmt: skip
        sentence = refused(command(command_name), words, capsys)
        assert "odd.yaml" in sentence or name not in ("missing", "bytes")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_without_a_name(name, capsys):
    sentence = refused(command(name), ["fit", "--config"] if name == "pretrain" else ["--config"], capsys)
    assert "--config" in sentence or "required" in sentence


LINES = {
    "broken": '{"query": "a", "doc', "nested": "[" * 100_000, "a long number": f'{{"query": {"9" * 10_000}}}',
    "no objects": "5", "bytes": bytes(range(128, 256)), "blank": " \n",
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_broken_lines_of_pairs(name, tmp_path, capsys):
    pytest.importorskip("transformers")
    from tiny_hugging_face import bert

    path = tmp_path / "pairs.jsonl"
    good = b'{"query": "the cat", "document": "a mat"}\n'
    path.write_bytes(LINES[name] if isinstance(LINES[name], bytes) else b"" if name == "blank" else good)
    if name not in ("bytes", "blank"):
        path.write_bytes(good + LINES[name].encode())
    folder, _, _ = bert(tmp_path / "bert")
    sentence = refused(command("prune"), [str(folder), "--data", str(path), "--length", "16"], capsys)
    assert "in line 2" in sentence or name in ("bytes", "blank")
    assert "data must" in sentence
