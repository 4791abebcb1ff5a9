"""What `replace` refuses, what its check catches, and that nothing has changed then."""

import copy
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo.hugging_face import families
from attnzoo.hugging_face.layer import AttentionLayer
from tests.hugging_face.small import CAUSAL, FAMILIES, small


def state_of(model):
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    training = {name: m.training for name, m in model.named_modules()}
    return modules, parameters, hooks, training, copy.deepcopy(model.config.to_dict())


def assert_untouched(model, before):
    modules, parameters, hooks, training, config = state_of(model)
    assert modules == before[0]
    assert [(i, g) for i, g, _ in parameters.values()] == [(i, g) for i, g, _ in before[1].values()]
    assert all(torch.equal(p, before[1][name][2]) for name, (_, _, p) in parameters.items())
    assert (hooks, training, config) == before[2:]


def wrong(name, change):
    """The reader of a class, and after it a mistake."""
    read = families.FAMILIES[name].read

    def wrongly(module, layer):
        attn, state = read(module, layer)
        return change(attn, dict(state), module)

    return wrongly


def other_style(attn, state, module):
    attn.rope = attnzoo.Rotary(attn.rope.theta, attn.rope.dim, "interleaved", attn.rope.scaling)
    return attn, state


def without_positions(attn, state, module):
    attn.rope, attn.rope_dim = (None, 0) if module.layer_idx == 1 else (attn.rope, attn.rope_dim)
    return attn, state


def scaled(attn, state, module):
    attn.scale *= 1.3
    return attn, state


def not_transposed(attn, state, module):
    weights = module.c_attn.weight.view(96, 32).chunk(3)
    names = ("q_proj", "k_proj", "v_proj")
    return attn, state | {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}


def by_kind(attn, state, module):
    weights = module.query_key_value.weight.chunk(3)
    names = ("q_proj", "k_proj", "v_proj")
    return attn, state | {f"{name}.weight": weight for name, weight in zip(names, weights, strict=True)}


PLANTED = {
    "another rotation": ("llama", other_style, 0),
    "a layer without positions": ("qwen3", without_positions, 1),
    "a wrong scale": ("gemma2", scaled, 0),
    "a matrix that is not transposed": ("gpt2", not_transposed, 0),
    "rows of a fused matrix in another order": ("gpt-neox", by_kind, 0),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PLANTED)
def test_wrong_maps_are_caught(case, dtype, fresh, monkeypatch):
    name, change, number = PLANTED[case]
    # Weights of a new model hardly show what is wrong: its attention is nearly uniform.
    model = small(name, dtype=dtype, std=0.0 if fresh else 0.3).train()
    kind = next(type(m).__name__ for m in model.modules() if type(m).__name__ in families.FAMILIES)
    right = families.FAMILIES[kind]
    monkeypatch.setitem(families.FAMILIES, kind, right._replace(read=wrong(kind, change)))
    before = state_of(model)
    message = rf"layer '.*\.{number}\..*': attnzoo computes another function than {kind} \(relative difference"
    with pytest.raises(ValueError, match=message):
        hf.replace(model)
    assert_untouched(model, before)
    monkeypatch.setitem(families.FAMILIES, kind, right)
    assert len(hf.modules(hf.replace(model))) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_right_maps_pass_whatever_the_dtype(name, dtype):
    for std in (0.0, 0.3):
        model = small(name, dtype=dtype, std=std)
        assert len(hf.modules(hf.replace(model))) == 2


@pytest.mark.parametrize("name", CAUSAL)
def test_right_maps_pass_where_a_cast_has_rounded_the_frequencies(name):
    model = small(name, dtype=torch.float32).bfloat16()
    assert len(hf.modules(hf.replace(model))) == 2


def test_a_failing_layer_leaves_everything_as_it_was(monkeypatch):
    for name in ("llama", "gpt2", "bert"):
        model = small(name)
        kind = next(type(m).__name__ for m in model.modules() if type(m).__name__ in families.FAMILIES)
        family, calls = families.FAMILIES[kind], []

        def read(module, layer, family=family, calls=calls):
            calls.append(module)
            if len(calls) == 2:
                raise AttributeError("no attribute 'heads'")
            return family.read(module, layer)

        monkeypatch.setitem(families.FAMILIES, kind, family._replace(read=read))
        before = state_of(model)
        with pytest.raises(ValueError, match=f"{kind} cannot be read: no attribute 'heads'"):
            hf.replace(model)
        assert_untouched(model, before)


def test_verify_may_bring_the_inputs_of_the_model():
    model = small("llama")
    before = state_of(model)
    with pytest.raises(ValueError, match="verify must be True, False or a mapping of the model's arguments, got 3"):
        hf.replace(model, verify=3)
    part = small("llama").model
    part.forward = lambda **_: None
    refusal(part, "was not called by the model, so that it cannot be verified")
    assert_untouched(model, before)
    hf.replace(model, verify={"inputs_embeds": torch.randn(2, 7, 32).double()})
    assert len(hf.modules(model)) == 2


def test_only_whole_models_can_be_verified_without_inputs():
    model = small("llama")
    wrapped = torch.nn.ModuleDict({"model": model})
    before = state_of(model)
    with pytest.raises(ValueError, match="verify must hold the arguments of a ModuleDict, or be False: they are known"):
        hf.replace(wrapped)
    assert_untouched(model, before)
    hf.replace(wrapped, verify=False)
    assert len(hf.modules(model)) == 2


@pytest.mark.parametrize("call", [hf.replace, hf.restore, hf.modules])
def test_what_is_not_a_model_is_refused(call):
    with pytest.raises(ValueError, match="model must be a model of transformers, got None"):
        call(None)


@pytest.mark.parametrize("heads", [2, 4])
def test_some_layers_are_restored_whatever_a_configuration_says_of_heads_that_are_not_shared(heads):
    model = small("gpt-neox")
    model.config.num_key_value_heads = heads  # which GPT-NeoX does not read
    hf.restore(hf.replace(model, layers=[1]))
    assert type(model) is transformers.GPTNeoXForCausalLM
    assert model.config.num_key_value_heads == heads


def refusal(model, words, **options):
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        hf.replace(model, **options)
    assert_untouched(model, before)


def test_models_without_known_attention_are_refused():
    mamba = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    refusal(
        transformers.MambaModel(mamba), r"model must contain attention of a known class \(LlamaAttention, .*MambaMod"
    )
    opt = transformers.OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
                                 word_embed_proj_dim=16, max_position_embeddings=16)  # fmt: skip
    refusal(
        transformers.OPTModel(opt),
        r"layer 'decoder\.layers\.0\.self_attn': OPTAttention is not known; register_family teaches it, "
        r"set_attn_implementation\('attnzoo'\) needs no mapping",
    )
    gptj = transformers.GPTJConfig(vocab_size=32, n_embd=16, n_head=2, n_layer=1, rotary_dim=4, n_positions=16)
    refusal(
        transformers.GPTJForCausalLM(gptj), r"GPTJAttention is not known; register_family teaches it$"
    )  # it has no interface to take another function through


def test_layers_have_to_be_numbers_of_layers():
    model = small("llama")
    refusal(model, "layers must hold numbers from 0 to 1, got 2", layers=[0, 2])
    refusal(model, "layers must hold numbers from 0 to 1, got -1", layers=[-1])
    refusal(model, "layers must hold numbers from 0 to 1, got True", layers=[True])
    refusal(model, "layers must hold different numbers, at least one, got \\[1, 1\\]", layers=[1, 1])
    refusal(model, "layers must hold different numbers, at least one, got \\[\\]", layers=[])
    refusal(model, "backend must be", backend="fast")


def test_weights_that_cannot_be_taken_over_are_refused():
    name = r"layer 'model\.layers\.1\.self_attn': "
    model = small("llama")
    projection = model.model.layers[1].self_attn.k_proj
    projection.weight = torch.nn.Parameter(torch.zeros(20, 16, dtype=torch.uint8), requires_grad=False)
    refusal(model, name + "weights must be floating; load without quantisation, got torch.uint8 in k_proj.weight")
    model = small("llama")
    del model.model.layers[1].self_attn.k_proj.weight
    model.model.layers[1].self_attn.k_proj.register_buffer("qweight", torch.zeros(3, dtype=torch.int32))
    refusal(model, name + "weights must be floating; load without quantisation, got torch.int32 in k_proj.qweight")
    model = small("llama")
    model.model.layers[1].self_attn.to("meta")
    with pytest.raises(ValueError, match=name + "weights must be loaded, got q_proj.weight on the meta device"):
        hf.replace(model)
    bert = small("bert")
    bert.bert.encoder.layer[1].attention.output.to("meta")
    with pytest.raises(ValueError, match="weights must be loaded, got weight on the meta device"):
        hf.replace(bert)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_adapters_have_to_be_merged():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = small("llama", dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    refusal(model, r"layer 'model\.layers\.0\.self_attn': merge adapters first")
    model = hf.replace(wrapped.merge_and_unload())
    assert len(hf.modules(model)) == 2
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn': merge adapters first"):
        hf.restore(model)


def test_sharded_weights_are_refused():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = small("llama")
        linear = model.model.layers[0].self_attn.v_proj
        linear.weight = torch.nn.Parameter(DTensor.from_local(linear.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"v_proj\.weight must not be sharded; replace before sharding"):
            hf.replace(model)
    finally:
        torch.distributed.destroy_process_group()


def test_cross_attention_is_left_alone():
    model = small("bert-decoder", add_cross_attention=True)
    hf.replace(model)
    names = [name for name, _ in hf.modules(model)]
    assert names == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    gpt2 = small("gpt2", add_cross_attention=True)
    hf.replace(gpt2)
    assert [name for name, _ in hf.modules(gpt2)] == [f"transformer.h.{i}.attn" for i in range(2)]
    assert type(gpt2.transformer.h[0].crossattention).__name__ == "GPT2Attention"


def test_restore_refuses_what_the_class_cannot_express():
    model = hf.replace(small("llama"))
    hf.restore(copy.deepcopy(model))
    layer = model.model.layers[1].self_attn
    layer.attn = attnzoo.conversion.to_kha(layer.attn)
    before = state_of(model)
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers\.1\.self_attn': LlamaAttention cannot express this Kno"
    ):
        hf.restore(model)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="model must have attention of attnzoo to be restored, got LlamaForCausalLM"):
        hf.restore(small("llama"))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt-neox"])
def test_restore_takes_fewer_key_value_heads_where_the_configuration_has_them(name):
    model = hf.replace(small(name))
    for _, attn in hf.modules(model):
        layer = next(m for m in model.modules() if isinstance(m, AttentionLayer) and m.attn is attn)
        layer.attn = attnzoo.conversion.to_gqa(attn, 1)
    ids = torch.randint(3, 67, (2, 9))
    expected = model(ids).logits
    if name == "gpt-neox":
        with pytest.raises(ValueError, match="GPTNeoXAttention cannot express this GroupedQueryAttention"):
            hf.restore(model)
        return
    hf.restore(model)
    assert model.config.num_key_value_heads == 1
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)


def test_importing_attnzoo_does_not_import_transformers():
    code = "import sys, attnzoo; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=".")
