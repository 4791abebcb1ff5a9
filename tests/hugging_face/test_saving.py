"""Folders of models with attnzoo's attention: written, read in another process, edited by somebody else."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo.hugging_face as hf
from attnzoo.hugging_face import saving
from attnzoo.hugging_face.installation import install
from tests.hugging_face.small import CAUSAL, FAMILIES, small
from tests.zoo import MECHANISMS

IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
GENERATE = {"max_new_tokens": 6, "do_sample": False}


def with_mechanism(name, **options):
    """A Llama with that attention in its first layer and its own, replaced, in the second."""
    model = hf.replace(small("llama", dtype=torch.float32, max_position_embeddings=48), verify=False)
    attn = MECHANISMS[name](**options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    install(model, "model.layers.0.self_attn", attn.eval())
    saving.adopt(model)
    return model


def with_frequencies():
    frequencies = torch.rand(2, 2, dtype=torch.float64)
    return with_mechanism("mla", qk_rope_head_dim=4, num_kv_heads=2, rope_kv_heads=2, rope_inv_freq=frequencies)


def pruned():
    model = with_mechanism("gqa")
    hf.modules(model)[0][1].prune_heads([1])
    return model


def some_layers():
    return hf.replace(small("llama", dtype=torch.float32), layers=[1], verify=False)


MADE = {
    **{name: lambda name=name: hf.replace(small(name, dtype=torch.float32), verify=False) for name in FAMILIES},
    **{f"llama, {name}": lambda name=name: with_mechanism(name) for name in MECHANISMS},
    "own frequencies": with_frequencies,
    "pruned": pruned,
    "some layers": some_layers,
}
BERTS = ("bert", "bert-decoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of every model, with what it computes."""
    root = tmp_path_factory.mktemp("folders")
    for name, made in MADE.items():
        model = made()
        model.save_pretrained(root / name)
        found = {"logits": model(IDS).logits}
        if name == "bert" or name in CAUSAL or "," in name:
            found |= {"hidden": model(IDS, output_hidden_states=True).hidden_states[-1]}
        if name != "bert":
            found |= {"generated": model.generate(IDS, **GENERATE)}
        if name != "some layers":  # where transformers' own rotation tables are rounded
            found |= {"half": model.bfloat16()(IDS).logits}
        torch.save(found, root / f"{name}.pt")
    return root


CHILD = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
import attnzoo.hugging_face
from tests.hugging_face.test_saving import GENERATE, IDS

transformers.logging.set_verbosity_error()
results = {}
for path in sorted(Path(sys.argv[1]).glob("*/config.json")):
    name = path.parent.name
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    try:
        model, found = auto.from_pretrained(path.parent, output_loading_info=True)
        stored = torch.load(path.parent.with_suffix(".pt"))
        made = {"logits": model(IDS).logits}
        if "hidden" in stored:
            made["hidden"] = model(IDS, output_hidden_states=True).hidden_states[-1]
        if "generated" in stored:
            made["generated"] = model.generate(IDS, **GENERATE)
        made["half"] = auto.from_pretrained(path.parent, dtype=torch.bfloat16)(IDS).logits
        results[name] = {key: torch.equal(made[key], value) for key, value in stored.items()}
        results[name] |= {what: sorted(map(str, keys)) for what, keys in found.items() if keys}
        results[name]["class"] = type(model).__name__
        if "again" not in name:
            model.save_pretrained(path.parent / "again")
            again = json.loads((path.parent / "again/config.json").read_text())
            results[name]["again"] = again == json.loads(path.read_text())
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def read(folders):
    """What another process says about the folders."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folders], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MADE)
def test_another_process_reads_the_same_model(read, name):
    result = read[name]
    assert isinstance(result, dict), result
    assert result.pop("class").startswith("Attnzoo")
    assert all(value is True for value in result.values()), result


def test_weights_of_half_precision_leave_frequencies_alone(folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "own frequencies", dtype=torch.bfloat16)
    numbers = hf.modules(model)[0][1].rope_inv_freq
    described = json.loads((folders / "own frequencies/config.json").read_text())["attnzoo_layers"]
    assert described["layers.0.self_attn"]["arguments"]["rope_inv_freq"] == [list(row) for row in numbers]
    assert not all(torch.tensor(row).bfloat16().double().equal(torch.tensor(row).double()) for row in numbers)


# Classes


def test_the_class_is_made_from_the_models_own():
    source = small("llama", dtype=torch.float32)
    model = hf.replace(copy.deepcopy(source), verify=False)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model.config, transformers.LlamaConfig)
    assert type(model).__name__ == "AttnzooLlamaForCausalLM"
    assert model.config.model_type == "attnzoo"
    assert model.config is model.model.config
    assert type(source) is transformers.LlamaForCausalLM
    assert source.config.model_type == transformers.LlamaConfig.model_type == "llama"
    again = hf.replace(small("llama", dtype=torch.float32), verify=False)
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, source(IDS).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_copies(name, copied, tmp_path):
    model = hf.replace(small(name, dtype=torch.float32), verify=False)
    made = copied(model)
    assert type(made) is type(model)
    assert type(made.config) is type(model.config)
    assert torch.equal(made(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        hf.modules(made)[0][1].o_proj.weight.zero_()
    assert not torch.equal(made(IDS).logits, model(IDS).logits)
    made.save_pretrained(tmp_path)
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    assert torch.equal(auto.from_pretrained(tmp_path)(IDS).logits, made(IDS).logits)


def test_a_pickle_is_read_by_another_process(tmp_path):
    model = hf.replace(small("llama", dtype=torch.float32), verify=False)
    torch.save((model, model(IDS).logits), tmp_path / "model.pt")
    child = (
        "import sys, torch; model, logits = torch.load(sys.argv[1], weights_only=False);"
        "from tests.hugging_face.test_saving import IDS; print(torch.equal(model(IDS).logits, logits))"
    )
    done = subprocess.run([sys.executable, "-c", child, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_restore_gives_the_own_classes_back(tmp_path):
    source = small("llama", dtype=torch.float32)
    model = hf.restore(hf.replace(copy.deepcopy(source), verify=False))
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.model) is transformers.LlamaModel
    assert type(model.config) is transformers.LlamaConfig
    assert model.config.to_dict() == source.config.to_dict()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read) is transformers.LlamaForCausalLM
    assert torch.equal(read(IDS).logits, source(IDS).logits)


@pytest.mark.parametrize("part", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_heads(part, folders):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama, kha")
    read, found = getattr(transformers, part).from_pretrained(folders / "llama, kha", output_loading_info=True)
    assert found["unexpected_keys"] == {"lm_head.weight"}
    assert found["missing_keys"] == ({"score.weight"} if "Classification" in part else set())
    expected = model.model(IDS, output_hidden_states=True)
    made = read.base_model(IDS, output_hidden_states=True)
    assert torch.equal(made.last_hidden_state, expected.last_hidden_state)
    assert len(made.hidden_states) == len(expected.hidden_states) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_without_its_head_is_saved(whole, tmp_path):
    model = hf.replace(small("llama", dtype=torch.float32), verify=False)
    if not whole:
        model = hf.replace(small("llama", dtype=torch.float32).model, verify=False)
    inner = model.model if whole else model
    inner.save_pretrained(tmp_path)
    read = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(read).__name__ == "AttnzooLlamaModel"
    assert torch.equal(read(IDS).last_hidden_state, inner(IDS).last_hidden_state)


@pytest.mark.parametrize("part", ["model", "model.layers.0"])
def test_a_model_is_saved_with_attention_that_was_replaced_in_a_part_of_it(part, tmp_path):
    model, other = small("llama", dtype=torch.float32), small("llama", dtype=torch.float32)
    other.config = model.config
    hf.convert(model.get_submodule(part), "kha", layers=[0], verify=False)
    hf.modules(model)[0][1].o_proj.weight.data.mul_(2)
    assert model.config is model.model.config
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert type(other) is transformers.LlamaForCausalLM
    assert other.config.model_type == "llama"


def test_a_model_whose_base_is_restored_is_a_plain_one():
    model = hf.replace(small("llama", dtype=torch.float32), verify=False)
    hf.restore(model.model)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config is model.model.config
    assert model.config.model_type == "llama"
    assert not any("attnzoo" in name for name in model.config.to_dict())
    model(IDS, output_attentions=True)


def test_changes_after_the_replacement_are_saved(tmp_path):
    model = hf.replace(small("llama", dtype=torch.float32), verify=False)
    for _, attn in hf.modules(model):
        attn.prune_heads([0])
        attn.dropout = 0.25
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert [(attn.pruned_heads, attn.dropout) for _, attn in hf.modules(read)] == [((0,), 0.25)] * 2


def test_the_backend_is_not_saved(tmp_path):
    hf.replace(small("llama", dtype=torch.float32), backend="eager", verify=False).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {attn.backend for _, attn in hf.modules(read)} == {"auto"}


def test_quantisation_settings_are_dropped(tmp_path):
    model = small("llama", dtype=torch.float32)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer = object()
    hf.replace(model, verify=False).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_sharded_weights(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama, mla")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_fused_format_is_written_as_the_model_has_it(tmp_path):
    small("deepseek-v3", dtype=torch.float32).save_pretrained(tmp_path / "source")
    source = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    source.config._experts_implementation = "eager"
    expected = source(IDS).logits
    hf.replace(source, verify=False).save_pretrained(tmp_path / "out")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(read(IDS).logits, expected, rtol=1e-4, atol=1e-4)


# Folders that somebody has edited


GQA = {"class": "GroupedQueryAttention", "arguments": {"embed_dim": 32, "num_heads": 4}}


def edited(source, folder, change):
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("again"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["attnzoo_layers"]["layers.0.self_attn"].update({"class": "evil.Evil"}), "class must be one of"),
        (lambda c: c["attnzoo_layers"]["layers.0.self_attn"].update({"class": "Linear"}), "class must be one of"),
        (lambda c: c["attnzoo_layers"]["layers.0.self_attn"].update(code="evil"), "must hold class, arguments"),
        (
            lambda c: c["attnzoo_layers"]["layers.0.self_attn"]["arguments"].update(
                rope={"class": "evil.Evil", "arguments": {}}
            ),
            "class must be one of",
        ),
        (
            lambda c: c["attnzoo_layers"]["layers.0.self_attn"]["arguments"].update(rope={"class_path": "evil.Evil"}),
            "'class_path' is no option",
        ),
        (lambda c: c["attnzoo_layers"]["layers.0.self_attn"]["arguments"].update(evil=1), "'evil' is no option"),
        (
            lambda c: c["attnzoo_layers"].update({"layers.0.mlp": GQA}),
            "must name attention modules of .*'layers.0.mlp'",
        ),
        (lambda c: c["attnzoo_layers"].update({"": GQA}), "must name attention modules"),
        (lambda c: c["attnzoo_layers"].update({"layers.7.self_attn": GQA}), "must name attention modules"),
        (lambda c: c.update(attnzoo_layers=["evil"]), "attnzoo_layers must map names"),
        (lambda c: c.update(attnzoo_layers={"layers.0.self_attn": "evil"}), "attnzoo_layers must map names"),
        (lambda c: c.pop("attnzoo_layers"), "attnzoo_layers must map names"),
        (lambda c: c.update(attnzoo_layers={}), "attnzoo_layers must map names"),
        (
            lambda c: c.update(base_model_type="evil"),
            "base_model_type must be a model type of transformers, got 'evil'",
        ),
        (lambda c: c.update(base_model_type="attnzoo"), "base_model_type must be a model type"),
        (lambda c: c.update(base_model_type=["llama"]), "base_model_type must be a model type"),
        (lambda c: c.update(attnzoo_version="9.0.0"), "attnzoo_version must be at most .*'9.0.0': install a newer"),
        (lambda c: c.update(attnzoo_version=None), "attnzoo_version must be"),
        # Weights that are not those of the description
        (lambda c: c["attnzoo_layers"].pop("layers.0.self_attn"), "are (missing|unknown)"),
        (lambda c: c["attnzoo_layers"].update({"layers.1.self_attn": GQA}), "."),
    ],
)
def test_an_edited_folder_is_refused_and_imports_nothing(folders, tmp_path, monkeypatch, change, message):
    folder = edited(folders / "llama, kha", tmp_path / "edited", change)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "evil" not in sys.modules
    if message != ".":
        assert raised.type is ValueError
        assert "\n" not in str(raised.value)


def test_without_attnzoo_transformers_says_that_it_does_not_know_the_type(folders):
    child = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", child, folders / "llama"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model type `attnzoo`" in done.stderr


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "llama, kha"])
def test_the_plain_class_refuses_the_folder(folders, name):
    plain = {"gemma3": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel"}.get(name, "LlamaForCausalLM")
    words = "attnzoo: import attnzoo.hugging_face, and load this folder with an Auto class"
    for cls in (plain, "BertModel"):
        with pytest.raises(Exception, match=words):
            getattr(transformers, cls).from_pretrained(folders / name)
    if name != "llama":  # in a process that knows nothing of attnzoo, once
        return
    child = f"import sys, transformers; transformers.{plain}.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", child, folders / name], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr


def test_the_settings_of_the_model_are_read_as_they_were(tmp_path):
    model = hf.replace(small("qwen3", dtype=torch.float32, initializer_range=0.25), verify=False)
    model.save_pretrained(tmp_path)
    for config in (transformers.AutoConfig.from_pretrained(tmp_path), type(model.config).from_pretrained(tmp_path)):
        assert config.initializer_range == 0.25
        expected = model.config.to_dict()
        assert {key: config.to_dict()[key] for key in expected if key != "_name_or_path"} == {
            key: value for key, value in expected.items() if key != "_name_or_path"
        }
    # Folders that an earlier version wrote say it themselves.
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["initializer_range"] = settings.pop("base_initializer_range")
    path.write_text(json.dumps(settings))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.config.initializer_range == 0.25
    assert torch.equal(read(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
        ("llama", "attention_dropout", 0.5),
        ("gpt2", "attn_pdrop", 0.5),
        ("qwen3", "sliding_window", 3),
    ],
)
def test_settings_of_attention_that_would_do_nothing_are_refused(folders, name, setting, value):
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = transformers.AutoConfig.from_pretrained(folders / name, use_cache=False)
    assert not load(folders / name, config=config).config.use_cache
    setattr(config, setting, value)
    for given in ({setting: value}, {"config": config}):
        with pytest.raises(ValueError, match=f"^{setting} must be .* as it was saved, got"):
            load(folders / name, **given)


# Models inside others


def image_model():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_id=66,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_inside_another_one_is_saved_with_its_attention(copied, tmp_path):
    model = hf.replace(image_model())
    hf.convert(model, "kha", layers=[0])
    model = copied(model)
    part = model.model.language_model
    part.save_pretrained(tmp_path / "part")
    read = transformers.AutoModel.from_pretrained(tmp_path / "part")
    assert [type(attn).__name__ for _, attn in hf.modules(read)] == ["KnockingHeadsAttention", "GroupedQueryAttention"]
    assert torch.equal(read(IDS).last_hidden_state, part(IDS).last_hidden_state)
    assert type(part.config) is transformers.LlamaConfig
    model.save_pretrained(tmp_path / "whole")
    whole = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole(IDS).logits, model(IDS).logits)
    whole.model.language_model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).last_hidden_state, part(IDS).last_hidden_state)
    with pytest.raises(Exception, match="load this folder with an Auto class"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")


def test_models_inside_others_get_their_classes_back(tmp_path):
    source = image_model()
    model = hf.restore(hf.replace(copy.deepcopy(source)))
    assert [type(m) for m in model.modules()] == [type(m) for m in source.modules()]
    model.model.language_model.save_pretrained(tmp_path)
    read = transformers.LlamaModel.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).last_hidden_state, source.model.language_model(IDS).last_hidden_state)


def test_auto_classes_that_hear_of_a_model_later(tmp_path):
    class OwnConfig(transformers.LlamaConfig):
        model_type = "attnzoo_test_llama"

    class OwnModel(transformers.LlamaForCausalLM):
        config_class = OwnConfig

    settings = {**small("llama").config.to_dict()}
    for name in ("model_type", "transformers_version"):
        del settings[name]
    model = hf.replace(OwnModel(OwnConfig(**settings)).eval())
    model.save_pretrained(tmp_path)
    transformers.AutoConfig.register("attnzoo_test_llama", OwnConfig)
    transformers.AutoModelForCausalLM.register(OwnConfig, OwnModel)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)


# Weights that are not all in memory


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("name", ["llama", "llama, kha", "llama, mla", "llama, moa", "llama, linear"])
def test_weights_on_disk(folders, name, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"model.layers.0": "disk", "lm_head": "cpu"}
    load = transformers.AutoModelForCausalLM.from_pretrained
    read, stored = load(folders / name, device_map=places, offload_folder=tmp_path), torch.load(folders / f"{name}.pt")
    inside = list(read.model.layers[0].self_attn.parameters())
    assert all(parameter.is_meta for parameter in inside)
    for _ in range(2):
        assert torch.equal(read(IDS).logits, stored["logits"])
        assert all(parameter.is_meta for parameter in inside)
    assert torch.equal(read.generate(IDS, **GENERATE), stored["generated"])
    read.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(IDS).logits, stored["logits"])
    held = accelerate.cpu_offload(load(folders / name), torch.device("cpu"))
    assert torch.equal(held(IDS).logits, stored["logits"])


# Training on


def trained(model, folder, steps, **options):
    """The model after some steps of the Trainer, on sequences of 8 tokens; and the Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 67).view(8, 8)]
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_strategy="no", disable_tqdm=True, **{"save_strategy": "no"} | options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return trainer


def test_a_model_trains_on_with_the_trainer(folders, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama, mla")
    before = copy.deepcopy(model)
    trained(model, tmp_path / "run", 2, save_strategy="steps", save_steps=1)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert {name for name, _ in model.named_parameters()} == moved
    checkpoint = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert torch.equal(checkpoint(IDS).logits, model.eval()(IDS).logits)
