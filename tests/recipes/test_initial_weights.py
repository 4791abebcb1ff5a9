"""Runs that start from the weights of others."""

import csv

import pytest
import torch
from safetensors.torch import save_file

from attnzoo.conversion import to_kha
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.diagnose.load_model import load_model


def state_of(folder):
    return read_checkpoint(folder)["state_dict"]


def first_run(arguments, run, tmp_path, *more, steps=2):
    run(arguments("mha", f"--trainer.default_root_dir={tmp_path / 'first'}", *more, steps=steps))
    return tmp_path / "first"


def test_a_run_a_checkpoint_and_tensors_give_the_same_start(arguments, run, tmp_path):
    first = first_run(arguments, run, tmp_path)
    tensors = tmp_path / "model.safetensors"
    state = {name.removeprefix("model."): value for name, value in state_of(first).items()}
    save_file({**state, "head.weight": state["embedding.weight"].clone()}, tensors)
    folder = tmp_path / "tensors"
    folder.mkdir()
    save_file({f"model.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    ended = []
    for i, source in enumerate((first, newest_valid(first), tensors, folder)):
        own = tmp_path / str(i)
        options = ["--model.lr=1e-30", "--model.weight_decay=0"]
        run(arguments("mha", f"--model.init_from={source}", f"--trainer.default_root_dir={own}", *options, steps=1))
        saved = read_checkpoint(own)
        assert saved["global_step"] == 1
        ended.append(saved["state_dict"])
    for state in ended:
        for name, value in state_of(first).items():
            assert torch.equal(state[name], value), name


def test_longer_samples_continue_where_the_shorter_ones_ended(arguments, run, tmp_path):
    """200 steps at T = 128, then T = 512 from those weights."""
    common = ["--trainer.log_every_n_steps=1", "--trainer.val_check_interval=200", "--model.lr=3e-3",
              "--data.batch_size=16"]  # fmt: skip
    first = first_run(arguments, run, tmp_path, *common, "--data.block_size=128", steps=200)
    longer = [f"--model.init_from={first}", "--data.block_size=512", "--data.val_fraction=0.4"]
    run(arguments("mha", *common, *longer, f"--trainer.default_root_dir={tmp_path / 'second'}", steps=2))
    losses = []
    for name in ("first", "second"):
        (metrics,) = (tmp_path / name).rglob("metrics.csv")
        with metrics.open(newline="") as file:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]])
    assert losses[0][0] > 5
    assert abs(losses[1][0] - losses[0][-1]) < 0.05, (losses[0][-5:], losses[1])


def test_a_mechanism_made_from_another_starts_where_that_ended(arguments, run, tmp_path, capsys):
    first = first_run(arguments, run, tmp_path, "--trainer.val_check_interval=4", "--model.lr=1e-2", steps=4)
    expected = capsys.readouterr().out.split("validation")[1].split()[0]
    model = load_model(first).model
    for block in model.layers:
        block.attn = to_kha(block.attn)
    save_file(model.state_dict(), tmp_path / "kha.safetensors")
    words = arguments("kha", f"--model.init_from={tmp_path / 'kha.safetensors'}")
    run(["validate", *words[1:]])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("val_bits_per_byte ")]
    assert float(line.split()[1]) == pytest.approx(float(expected), abs=2e-4)


def test_weights_of_other_names_are_refused_briefly(arguments, run, tmp_path, capsys):
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit):
        run(arguments("mha", f"--model.init_from={tmp_path / 'x.safetensors'}"))
    assert "such as blocks.0.attn.k_proj.weight, got transformer.wte.weight" in capsys.readouterr().err


def test_a_resumed_run_does_not_read_them_again(arguments, run, tmp_path):
    first = first_run(arguments, run, tmp_path)
    words = arguments("mha", f"--model.init_from={first}", steps=2)
    run(words)
    saved = newest_valid(tmp_path / "run")
    first.rename(tmp_path / "gone")
    run([*words, "--trainer.max_steps=3", f"--ckpt_path={saved}"])
    assert read_checkpoint(tmp_path / "run")["global_step"] == 3


def test_validate_reads_them(arguments, run, tmp_path, capsys):
    first = first_run(arguments, run, tmp_path, "--trainer.val_check_interval=2")
    expected = capsys.readouterr().out.split("validation")[1].split()[0]
    run(["validate", *arguments("mha", f"--model.init_from={first}")[1:]])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("val_bits_per_byte ")]
    assert float(line.split()[1]) == pytest.approx(float(expected), abs=1e-4)


def test_other_options_are_warned_about(arguments, run, tmp_path):
    first = first_run(arguments, run, tmp_path)
    with pytest.warns(UserWarning, match=r"differs from the configured one in rope \(.*theta.*10000.0.*\)"):
        run(arguments("mha", f"--model.init_from={first}", "--model.attention.init_args.rope={theta: 20000}"))


MISTAKES = {
    "nothing": (["--model.init_from=/nothing"], "model.init_from must be a file or folder, got '/nothing'"),
    "sizes": (["--model.embed_dim=48"], "embedding.weight has shape (257, 32) instead of (257, 48)"),
    "layers": (["--model.num_layers=1"], "blocks.1.attn_norm.weight is unknown"),
    "mechanism": (["--config=configs/attention/kha.yaml"], "is missing"),
    "tokenizer": (["--data.tokenizer=bpe", "--data.vocab_size=300"], "has another tokenizer than the data settings"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_one_sentence(mistake, arguments, run, tmp_path, capsys):
    more, named = MISTAKES[mistake]
    first = first_run(arguments, run, tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", f"--model.init_from={first}", *more))
    assert stopped.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "attnzoo-pretrain: error:" in line]
    assert named in sentence


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x80\x04."], ids=["empty", "text", "pickle"])
def test_files_that_hold_no_tensors_are_refused(content, arguments, run, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", f"--model.init_from={path}"))
    assert stopped.value.code == 2
    assert "cannot be read as safetensors" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(arguments, run, tmp_path, capsys):
    path = newest_valid(first_run(arguments, run, tmp_path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run(arguments("mha", f"--model.init_from={path}"))
    assert stopped.value.code == 2
    assert "is damaged" in capsys.readouterr().err
