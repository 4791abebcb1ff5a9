"""Configs, checkpoints and model folders that try to run code: none of it runs, and each is refused in one sentence.

What an attack would run leaves a file behind: a module on the path that writes it when it is imported, or a call that
writes it.
"""

import importlib
import json
import pickle
import sys
import zipfile

import pytest
import torch

import attnzoo_recipes.commandline
from attnzoo_recipes.checkpointing import AtomicCheckpointIO
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import build_attention

MODULE = "attnzoo_tests_payload"
READERS = ("generate", "heads", "prune", "spectrum")
COMMANDS = {
    "pretrain": "pretrain", "generate": "generate", "compare": "compare.cli", "heads": "diagnose.heads",
    "prune": "diagnose.prune", "spectrum": "diagnose.spectrum",
}  # fmt: skip


class Touch:
    """A pickle that writes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (importlib.import_module("pathlib").Path.touch, (self.path,))


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The file that an attack would write."""
    path = tmp_path / "ran"
    (tmp_path / f"{MODULE}.py").write_text(
        "import pathlib, torch, lightning as L\n"
        f"def ran(*args, **options):\n    pathlib.Path({str(path)!r}).touch()\n"
        "ran()\n"
        "class Thing(torch.nn.Module):\n    __init__ = ran\n"
        "class Callback(L.Callback):\n    __init__ = ran\n"
    )
    (tmp_path / "hubconf.py").write_text(f"import {MODULE}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists()
    assert MODULE not in sys.modules


@pytest.fixture
def assert_refused(ran, capsys):
    """Call a command; it must end with exit code 2 and one sentence, which is returned."""

    def call(command, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"attnzoo_recipes.{COMMANDS[command]}").main(list(map(str, words)))
        printed = capsys.readouterr().err
        assert stop.value.code == 2, printed
        assert "Traceback" not in printed
        (sentence,) = [line for line in printed.splitlines() if line.startswith(f"attnzoo-{command}: error: ")]
        return sentence

    return call


def popen(ran):
    """What would write the file if it were instantiated."""
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(ran)]}}


def thing(ran):
    return {"class_path": f"{MODULE}.Thing"}


# checkpoints

ROPE = {"theta": 1e4, "dim": None, "style": "half"}
OPTIONS = {
    "rope": lambda it: {"rope": it},
    "rope in a list": lambda it: {"rope": [it]},
    "scaling": lambda it: {"rope": {**ROPE, "scaling": it}},
    "scaling factor": lambda it: {"rope": {**ROPE, "scaling": {"rope_type": "linear", "factor": it}}},
    "scaling list": lambda it: {"rope": {**ROPE, "scaling": {
        "rope_type": "longrope", "short_factor": [it], "long_factor": [1.0], "original_max_position_embeddings": 8,
    }}},
    "theta": lambda it: {"rope": {**ROPE, "theta": it}},
    "rope with init_args": lambda it: {"rope": {"class_path": "attnzoo.Rotary", "init_args": {"theta": it}}},
    "dtype": lambda it: {"dtype": it},
    "device": lambda it: {"device": it},
    "backend": lambda it: {"backend": it},
    "number": lambda it: {"head_dim": it},
    "an option that is not there": lambda it: {"dict_kwargs": it},
}  # fmt: skip
CLASSES = (
    f"{MODULE}.Thing", "subprocess.Popen", "os.system", "torch.hub.load", "torch.utils.cpp_extension.load",
    "torch.nn.Linear", "torch.nn.modules.os.system", "attnzoo.modules.gqa.torch.hub.load", "builtins.exec",
    "attnzoo_recipes.commandline.PretrainCLI", "lightning.pytorch.callbacks.LambdaCallback", "Popen", "",
)  # fmt: skip


def checkpoint(path, *, attention=None, model=None):
    """A valid file with such settings."""
    attention = {"class_path": "attnzoo.MultiHeadAttention", "init_args": {"num_heads": 2}, **(attention or {})}
    config = {"vocab_size": 257, "embed_dim": 8, "num_layers": 1, "attention": attention, **(model or {})}
    weights = {"model.x": torch.zeros(1)}
    content = {"attnzoo": {"model": config, "tokenizer": {"kind": "byte"}}, "state_dict": weights}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def words_for(command, path, folder):
    """A command line that reads the model at the path."""
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat " * 40)
    more = {"heads": ["--text", text, "--length", 8], "prune": ["--data", text, "--length", 8]}
    return [command, path, *more.get(command, ())]


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("payload", [popen, thing])
def test_no_option_of_a_checkpoint_is_instantiated(payload, option, command, assert_refused, ran, tmp_path):
    init_args = {"num_heads": 2, **OPTIONS[option](payload(ran))}
    path = checkpoint(tmp_path / "a.ckpt", attention={"init_args": init_args})
    assert "a.ckpt" in assert_refused(*words_for(command, path, tmp_path))


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("name", CLASSES)
def test_no_class_of_a_checkpoint_is_imported(name, command, assert_refused, ran, tmp_path):
    described = {"class_path": name, "init_args": popen(ran)["init_args"]}
    sentence = assert_refused(*words_for(command, checkpoint(tmp_path / "a.ckpt", attention=described), tmp_path))
    assert f"a.ckpt names {name}, which is neither a mechanism of attnzoo nor" in sentence


@pytest.mark.parametrize("name", ["mlp_dim", "norm_eps", "tie_embeddings", "vocab_size"])
def test_no_size_of_a_checkpoint_is_instantiated(name, assert_refused, ran, tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", model={name: popen(ran)})
    assert f"a.ckpt has a model whose {name} must be" in assert_refused("generate", path)


def test_an_allowed_package_opens_no_other(assert_refused, ran, tmp_path):
    (tmp_path / "own.py").write_text(f"import subprocess\nfrom subprocess import Popen\nimport {__name__} as other\n")
    for name in ("own.Popen", "own.subprocess.Popen", "own.other.Touch", "own.nothing", "own"):
        path = checkpoint(tmp_path / "a.ckpt", attention={"class_path": name, "init_args": popen(ran)["init_args"]})
        assert f"names {name}, which is neither" in assert_refused("generate", path, "--allow-import", "own")


@pytest.mark.parametrize("command", ["pretrain", *READERS])
def test_a_pickle_with_a_valid_sidecar_is_not_run(command, assert_refused, ran, arguments, tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "attnzoo": Touch(ran)}, path)
    words = words_for(command, path, tmp_path)
    if command == "pretrain":
        words = [command, *arguments("kha", f"--ckpt_path={path}")]
    assert "a.ckpt is not a checkpoint of tensors and plain values" in assert_refused(*words)


# configs

CONFIGS = {
    "module": "trainer: {callbacks: [{class_path: MODULE.Callback}]}",
    "class that starts a process": "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: ARGS}]}",
    "bare string": "trainer: {logger: MODULE.Thing}",
    "one callback": "trainer: {callbacks: MODULE.Callback}",
    "attention": "model: {attention: {class_path: MODULE.Thing}}",
    "bare attention": "model: {attention: MODULE.Thing}",
    "nested": "model: {attention: {class_path: attnzoo.MultiHeadAttention, init_args: {num_heads: 4, rope: POPEN}}}",
    "deeply nested": "model: {attention: {class_path: attnzoo.MultiHeadAttention, init_args: {num_heads: 4, rope: "
    "{class_path: attnzoo.Rotary, init_args: {scaling: {rope_type: linear, factor: POPEN}}}}}}",
    "dict_kwargs": "model: {attention: {class_path: attnzoo.MultiHeadAttention, dict_kwargs: {num_heads: POPEN}}}",
    "anchor": "x: &x {class_path: MODULE.Callback}\ntrainer: {callbacks: [*x]}",
    "merge key": "x: &x {class_path: MODULE.Callback}\ntrainer: {callbacks: [{<<: *x}]}",
    "JSON in a string": 'trainer: \'{"callbacks": [{"class_path": "MODULE.Callback"}]}\'',
    "YAML in a string": "trainer: 'callbacks: [{class_path: MODULE.Callback}]'",
    "JSON in strings in a string": 'trainer: {callbacks: [\'{"class_path": "MODULE.Callback"}\']}',
    "JSON": '{"trainer": {"callbacks": [{"class_path": "MODULE.Callback"}]}}',
    "blanks": "trainer: {callbacks: [{class_path: ' MODULE.Callback '}]}",
    "strategy": "trainer: {strategy: {class_path: MODULE.Thing}}",
    "plugin": "trainer: {plugins: [{class_path: MODULE.Thing}]}",
    "plugin of a plugin": "trainer: {plugins: [{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: "
    "{precision: 16-mixed, device: cpu, scaler: {class_path: MODULE.Thing}}}]}",
    "profiler": "trainer: {profiler: {class_path: MODULE.Thing}}",
    "section of the recipe": "checkpoints: {dirpath: {class_path: MODULE.Thing}}",
    "unknown section": "whatever: {class_path: MODULE.Thing}",
    "section of a subcommand": "fit: {trainer: {callbacks: [{class_path: MODULE.Callback}]}}",
    "data": "data: {files: [{class_path: MODULE.Thing}]}",
    "Python tag": "trainer: !!python/object/apply:subprocess.Popen [[touch, RAN]]",
    "LambdaCallback": "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: "
    "{setup: MODULE.ran}}]}",
    "LambdaCallback by its name": "trainer: {callbacks: [{class_path: LambdaCallback, init_args: "
    "{setup: MODULE.ran}}]}",
    "LambdaCallback where it is": "trainer: {callbacks: [{class_path: "
    "lightning.pytorch.callbacks.lambda_function.LambdaCallback, init_args: {setup: subprocess.run}}]}",
    "function of a callback": "trainer: {callbacks: [{class_path: "
    "lightning.pytorch.callbacks.StochasticWeightAveraging, init_args: {swa_lrs: 0.1, avg_fn: MODULE.ran}}]}",
    "torch.hub": "model: {attention: {class_path: torch.hub.load, init_args: {repo_or_dir: ., model: ran, "
    "source: local}}}",
    "cpp_extension": "model: {attention: {class_path: torch.utils.cpp_extension.load, init_args: {name: x, "
    "sources: [a.cpp]}}}",
    "torch.package": "trainer: {logger: {class_path: torch.package.PackageImporter, init_args: {file_or_buffer: a}}}",
    "load_library": "trainer: {logger: {class_path: torch.ops.load_library, init_args: {path: a.so}}}",
    "torch.load": "model: {attention: {class_path: torch.load, init_args: {f: a.pt, weights_only: false}}}",
    "module of a module": "model: {attention: {class_path: torch.nn.modules.os.system, init_args: {command: a}}}",
    "module of lightning": "trainer: {callbacks: [{class_path: "
    "lightning.pytorch.callbacks.model_checkpoint.shutil.rmtree, init_args: {path: .}}]}",
    "function of torch.nn": "model: {attention: torch.nn.functional.relu}",
    "checkpoints by another reader": "trainer: {plugins: [lightning.pytorch.plugins.io.TorchCheckpointIO]}",
    "another command": "trainer: {callbacks: [{class_path: attnzoo_recipes.commandline.PretrainCLI}]}",
    "an allow-list of its own": "trainer: {callbacks: [{class_path: attnzoo_recipes.callbacks.summary.Report, "
    "init_args: {allowed: [MODULE]}}]}",
    "allow_import": "allow_import: MODULE\ntrainer: {callbacks: [{class_path: MODULE.Callback}]}",
    "anchors without end": "x: &x [*x]\ntrainer: {callbacks: *x}",
    "anchors that multiply": "\n".join(
        ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    ),
    "brackets without end": "trainer: {callbacks: " + "[" * 3000,
}


def written(text, ran):
    args = f"{{args: [touch, '{ran}']}}"
    for name, value in (
        ("POPEN", f"{{class_path: subprocess.Popen, init_args: {args}}}"), ("ARGS", args), ("RAN", str(ran)),
        ("MODULE", MODULE),
    ):  # fmt: skip
        text = text.replace(name, value)
    return text


@pytest.fixture(params=["checked", "second line"])
def line_of_defence(request, monkeypatch):
    """With the search of the text, and without it: then the parser's own policy stands alone."""
    if request.param == "second line":
        monkeypatch.setattr(attnzoo_recipes.commandline, "check_arguments", lambda *arguments: None)
    return request.param


ENDLESS = [name for name in CONFIGS if name.startswith(("anchors", "brackets"))]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_nothing(name, line_of_defence, assert_refused, ran, arguments, tmp_path):
    if line_of_defence == "second line" and name in (*ENDLESS, "section of the recipe", "data"):
        pytest.skip("the parser has no limit, or takes a class_path for plain data")
    config = tmp_path / "attack.yaml"
    config.write_text(written(CONFIGS[name], ran))
    assert_refused("pretrain", *arguments("kha", "--config", config))


LINES = {
    "option": ["--trainer.callbacks+=MODULE.Callback"],
    "two words": ["--model.attention", "MODULE.Thing"],
    "class_path": ["--model.attention.class_path=MODULE.Thing"],
    "YAML": ["--trainer.logger", "{class_path: MODULE.Thing}"],
    "JSON": ['--trainer={"callbacks": [{"class_path": "MODULE.Callback"}]}'],
    "short option": ["-cattack.yaml"],
    "short option, two words": ["-c", "attack.yaml"],
    "short option with =": ["-c=attack.yaml"],
    "config in the line": ["--config={trainer: {callbacks: [MODULE.Callback]}}"],
    "a file for a section": ["--trainer=section.yaml"],
    "a file for a class": ["--model.attention=class.yaml"],
    "a file that names a file": ["--config=outer.yaml"],
    "a file in another folder": ["--config=folder/outer.yaml"],
    "a large file": ["--config=large.yaml"],
    "a file in UTF-16": ["--config=utf16.yaml"],
    "init_args": ["--model.attention=attnzoo.MultiHeadAttention", "--model.attention.rope=MODULE.Thing"],
    "a package that is not allowed, beside one that is": ["--allow-import=json", "--trainer.logger=MODULE.Thing"],
}


@pytest.mark.parametrize("name", LINES)
def test_a_command_line_runs_nothing(name, assert_refused, ran, arguments, tmp_path):
    attack = f"trainer: {{callbacks: [{MODULE}.Callback]}}\n"
    (tmp_path / "folder").mkdir()
    for file, content in {
        "attack.yaml": attack, "section.yaml": f"callbacks: [{MODULE}.Callback]\n",
        "class.yaml": f"class_path: {MODULE}.Thing\n", "outer.yaml": "model: {attention: class.yaml}\n",
        "folder/outer.yaml": "model: {attention: inner.yaml}\n", "folder/inner.yaml": f"class_path: {MODULE}.Thing\n",
        "large.yaml": attack + "# " + "x" * 1_000_000,
    }.items():  # fmt: skip
        (tmp_path / file).write_text(content)
    (tmp_path / "utf16.yaml").write_text(attack, encoding="utf-16")
    assert_refused("pretrain", *arguments("kha", *(word.replace("MODULE", MODULE) for word in LINES[name])))


@pytest.mark.parametrize("name", ["PL_FIT__TRAINER__CALLBACKS", "PL_FIT__MODEL__ATTENTION", "PL_FIT__CONFIG"])
def test_the_environment_runs_nothing(name, line_of_defence, assert_refused, ran, arguments, monkeypatch, tmp_path):
    (tmp_path / "attack.yaml").write_text(f"trainer: {{callbacks: [{{class_path: {MODULE}.Callback}}]}}\n")
    value = "attack.yaml" if name.endswith("CONFIG") else f'[{{"class_path": "{MODULE}.Callback"}}]'
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv(name, value)
    assert_refused("pretrain", *arguments("kha"))


# comparisons

COMPARISONS = {
    "a mechanism": "model: {attention: {class_path: MODULE.Thing}}",
    "an option": "model: {attention: {class_path: attnzoo.MultiHeadAttention, init_args: {num_heads: 4, rope: POPEN}}}",
    "scaling": "model: {attention: {class_path: attnzoo.MultiHeadAttention, init_args: {num_heads: 4, rope: "
    "{class_path: attnzoo.Rotary, init_args: {scaling: {rope_type: linear, factor: POPEN}}}}}}",
    "another key": "model: {attention: {class_path: attnzoo.MultiHeadAttention, dict_kwargs: {dtype: POPEN}}}",
    "torch.hub": "model: {attention: {class_path: torch.hub.load, init_args: {repo_or_dir: .}}}",
    "Python tag": "model: !!python/object/apply:subprocess.Popen [[touch, RAN]]",
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_compared_mechanism_runs_nothing(name, assert_refused, ran, tmp_path):
    (tmp_path / "mine.yaml").write_text(written(COMPARISONS[name], ran))
    assert "mine.yaml" in assert_refused("compare", "--mechanisms", "mha,mine.yaml", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "train", ["trainer: {callbacks: [{class_path: MODULE.Callback}]}", "model: {attention: POPEN}"]
)
def test_the_settings_of_a_comparison_run_nothing(train, assert_refused, ran, tmp_path):
    (tmp_path / "compare.yaml").write_text(written(f"mechanisms: [mha]\ntrain: {{{train}}}\n", ran))
    assert_refused("compare", "--config", "compare.yaml", "--out", tmp_path / "out")


def test_what_a_comparison_passes_on_runs_nothing(assert_refused, ran, tmp_path, monkeypatch):
    words = ["compare", "--mechanisms", "mha", "--out", tmp_path / "out"]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    assert f"names {MODULE}.Callback" in assert_refused(*words, "--", f"--trainer.callbacks+={MODULE}.Callback")


# models of others

MODELING = f"import {MODULE}\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"


@pytest.fixture
def llama(tmp_path):
    pytest.importorskip("transformers")
    from tiny_hugging_face import llama

    return llama(tmp_path / "llama")[0]


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("command", ["heads", "prune", "spectrum"])
def test_code_in_a_model_folder_is_not_run(command, assert_refused, llama, tmp_path, monkeypatch):
    (llama / "modeling.py").write_text(MODELING)
    own = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model", "AutoModel": "modeling.Model"}
    edit(llama / "config.json", auto_map=own, model_type="mine")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asks"))
    sentence = assert_refused(*words_for(command, llama, tmp_path))
    assert "config.json' asks for code of its own (auto_map), which attnzoo never runs" in sentence


def test_code_of_a_known_architecture_is_not_run_and_said(ran, llama, tmp_path, capsys):
    (llama / "modeling.py").write_text(MODELING)
    edit(llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    importlib.import_module("attnzoo_recipes.diagnose.spectrum").main([str(llama), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert (
        "asks for code of its own (auto_map), which attnzoo never runs; transformers' LlamaForCausalLM is used" in said
    )


def test_code_of_a_tokenizer_is_not_run(assert_refused, llama, tmp_path, monkeypatch):
    (llama / "tokens.py").write_text(MODELING)
    edit(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokens.Mine", None]}, tokenizer_class="Mine")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asks"))
    assert "tokenizer_config.json' asks for code" in assert_refused(*words_for("heads", llama, tmp_path))


def test_kernels_of_others_are_not_fetched(assert_refused, llama, tmp_path):
    edit(llama / "config.json", attn_implementation="someone/attention")
    assert "asks for kernels of others (someone/attention)" in assert_refused(*words_for("spectrum", llama, tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_pickled_weights_are_not_read(name, assert_refused, llama, tmp_path, ran):
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(pickle.dumps({"w": Touch(ran)}))
    assert str(llama) in assert_refused(*words_for("spectrum", llama, tmp_path))


def test_a_pickle_is_no_safetensors_file(assert_refused, ran, tmp_path):
    path = tmp_path / "a.safetensors"
    torch.save({"q_proj.weight": Touch(ran)}, path)
    assert zipfile.is_zipfile(path)
    assert "a.safetensors' is no safetensors file" in assert_refused("spectrum", path, "--num-heads", 2)


def test_these_attacks_would_work(ran, tmp_path, monkeypatch):
    """Where a class may be imported, it is; otherwise the tests above could not fail."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    attention = build_attention({"class_path": f"{MODULE}.Thing", "init_args": {}}, (MODULE,))
    assert ran.exists()
    ran.unlink()
    attention(8)
    assert ran.exists()
    ran.unlink()
    with pytest.raises(ValueError, match="must be"):
        DecoderLM(0, attention)
    sys.modules.pop(MODULE)
    pickle.loads(pickle.dumps(Touch(ran)))
    assert ran.exists()
    ran.unlink()
