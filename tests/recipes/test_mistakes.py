"""A user's mistake ends in one sentence and exit code 2, and leaves nothing behind."""

import pytest
import torch

from attnzoo_recipes.checkpointing import newest_valid

MISTAKES = {
    "misspelled key": (["--trainer.max_step=3"], "max_step"),
    "misspelled mechanism option": (["--model.attention.init_args.num_head=3"], "num_head"),
    "option that cannot be": (["--model.attention.init_args.num_heads=5"], "got 5"),
    "class outside the allow-list": (["--trainer.callbacks+=antigravity.Fly"], "--allow-import antigravity"),
    "no such config": (["--config", "configs/attention/mhha.yaml"], "neither a file nor one of"),
    "missing data file": (["--data.files=['nowhere/*.txt']"], "there is no file 'nowhere/*.txt'"),
    "unknown source": (["--data.source=csv"], "data.source must be one of"),
    "files for the standard library": (["--data.source=stdlib"], "data.files must be empty"),
    "block larger than the corpus": (["--data.block_size=100000"], "split must hold more than data.block_size"),
    "val_fraction of 1": (["--data.val_fraction=1.0"], "data.val_fraction must be positive"),
    "no tokenizer": (["--data.tokenizer=nowhere.json"], "data.tokenizer must be byte, bpe or a tokenizer.json"),
    "vocabulary below the bytes": (["--data.tokenizer=bpe", "--data.vocab_size=100"], "at least 258"),
    "negative learning rate": (["--model.lr=-1"], "lr must be positive, got -1"),
    "no end": (["--trainer.max_steps=-1", "--trainer.max_epochs=-1"], "max_steps must be given"),
    "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
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
