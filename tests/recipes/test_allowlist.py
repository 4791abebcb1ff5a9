"""Nothing outside the allow-list is imported, whatever names it."""

import sys
from pathlib import Path

import pytest

from attnzoo_recipes.allowlist import ALLOWED, ImportRefusedError, check_arguments, check_import
from attnzoo_recipes.compare.plan import attention_of
from attnzoo_recipes.model_config import build_attention

MARK = "attnzoo_tests_imported_module"

ATTACKS = {
    "class_path in a file": "trainer:\n  callbacks:\n  - class_path: {mark}.Thing\n",
    "bare string in a file": "model:\n  attention: {mark}.Thing\n",
    "nested init_args": "model:\n  attention:\n    class_path: attnzoo.MultiHeadAttention\n    init_args:\n"
    "      rope:\n        class_path: {mark}.Thing\n",
    "class_path in a flow mapping": "model: {{attention: {{class_path: {mark}.Thing}}}}\n",
    "quoted": "trainer: {{logger: '{mark}.Thing'}}\n",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported."""
    (tmp_path / f"{MARK}.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()
    assert MARK not in sys.modules


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_a_config_cannot_import(text, module):
    config = module / "config.yaml"
    config.write_text(text.format(mark=MARK))
    with pytest.raises(ImportRefusedError, match=f"config.yaml names {MARK}.Thing.*--allow-import {MARK}"):
        check_arguments(["fit", "--config", str(config)])


@pytest.mark.parametrize(
    "words",
    [
        [f"--trainer.callbacks+={MARK}.Thing"],
        ["--model.attention", f"{MARK}.Thing"],
        [f"--model.attention.class_path={MARK}.Thing"],
        ["--trainer.logger", f"{{class_path: {MARK}.Thing}}"],
    ],
)
def test_a_command_line_cannot_import(words, module):
    with pytest.raises(ImportRefusedError, match=f"the command line names {MARK}.Thing"):
        check_arguments(["fit", *words])


def test_a_file_that_a_config_leads_to_is_searched(module):
    (module / "inner.yaml").write_text(f"class_path: {MARK}.Thing\n")
    (module / "outer.yaml").write_text("model:\n  attention: inner.yaml\n")
    with pytest.raises(ImportRefusedError, match=r"inner\.yaml names"):
        check_arguments(["fit", "--config", str(module / "outer.yaml")])


def test_what_is_allowed_passes(module):
    check_arguments(["fit", "--model.attention", f"{MARK}.Thing"], ("attnzoo", MARK))
    check_import("attnzoo.MultiHeadAttention")
    check_import("torch.nn.Linear")
    with pytest.raises(ImportRefusedError):
        check_import("torchattack.Thing")


@pytest.mark.parametrize("option", ["--config", "-c", "--ckpt_path", "--model.init_from", "--trainer.default_root_dir"])
def test_a_file_may_have_the_name_of_a_module(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("json.yaml").write_text("seed_everything: 1\n")
    check_arguments(["fit", option, "json.yaml"])
    Path("json.yaml").write_text("model: {attention: {class_path: json.tool}}\n")
    if option in ("--config", "-c"):
        with pytest.raises(ImportRefusedError, match=r"json\.yaml names json\.tool"):
            check_arguments(["fit", option, "json.yaml"])


def test_data_settings_are_no_import_paths():
    words = ["fit", "--data.files=['os.path']", "--data.name=json.tool"]
    check_arguments(words)
    with pytest.raises(ImportRefusedError):
        check_arguments([*words, "--model.name=json.tool"])


@pytest.mark.parametrize("rope", [{"class_path": f"{MARK}.Thing"}, f"{MARK}.Thing", [{"class_path": f"{MARK}.Thing"}]])
def test_the_options_of_a_checkpoint_cannot_import(rope, module):
    description = {"class_path": "attnzoo.MultiHeadAttention", "init_args": {"num_heads": 4, "rope": rope}}
    with pytest.raises(ValueError, match=f"the checkpoint .*{MARK}.Thing"):
        build_attention(description, (*ALLOWED, MARK))


def test_the_options_of_a_compared_mechanism_cannot_import(module):
    config = module / "mine.yaml"
    config.write_text(
        "model:\n  attention:\n    class_path: attnzoo.MultiHeadAttention\n"
        f"    init_args:\n      rope: {{class_path: {MARK}.Thing}}\n"
    )
    with pytest.raises(ImportRefusedError, match=f"mine.yaml names {MARK}.Thing"):
        attention_of(config)
