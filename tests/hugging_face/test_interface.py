"""attnzoo's attention function under transformers' interface, and what the layer takes from transformers' blocks."""

import copy
from unittest import mock

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo import diagnostics
from attnzoo.hugging_face import interface
from attnzoo.hugging_face.layer import AttentionLayer
from attnzoo.hugging_face.replacement import install
from tests.hugging_face.small import CAUSAL, FAMILIES, lifted, small

IDS = torch.randint(3, 67, (2, 15), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0


def under_attnzoo(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation("attnzoo")
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_attention_function_gives_the_same_logits(name):
    source = small(name)
    with mock.patch.object(interface, "softmax_attention", wraps=interface.softmax_attention) as attend:
        for keywords, real in (({}, torch.ones_like(LEFT)), ({"attention_mask": LEFT}, LEFT),
                               ({"attention_mask": LEFT.flip(1)}, LEFT.flip(1))):  # fmt: skip
            with lifted(), torch.no_grad():
                expected = copy.deepcopy(source)(IDS, **keywords).logits
                found = under_attnzoo(source)(IDS, **keywords).logits
            assert (found - expected)[real.bool()].abs().max() < 1e-10
    assert attend.call_count == 6


@pytest.mark.parametrize("name", CAUSAL)
def test_the_attention_function_generates_the_same_tokens(name):
    source = small(name)
    options = {
        "attention_mask": LEFT,
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    for decoding in ({}, {"cache_implementation": "static"}, {"num_beams": 3}):
        with lifted():
            expected = copy.deepcopy(source).generate(IDS, **options, **decoding)
            found = under_attnzoo(source).generate(IDS, **options, **decoding)
        assert found.tolist() == expected.tolist()


def test_a_prefill_without_padding_in_a_cache_of_fixed_size_sees_what_is_written():
    with lifted():
        source = small("llama")
    for model in (source, under_attnzoo(source), hf.replace(copy.deepcopy(source))):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        with lifted(), torch.no_grad():
            steps = [model(part, past_key_values=cache).logits for part in IDS.split([6, 1, 8], 1)]
            whole = source(IDS).logits
        assert (torch.cat(steps, 1) - whole).abs().max() < 1e-10


def test_dropout_is_that_of_training():
    model = under_attnzoo(small("llama", attention_dropout=0.5))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def layer_of(**options):
    model = small("llama")
    install(model, "model.layers.0.self_attn", attnzoo.GroupedQueryAttention(32, 4, 2, dtype=torch.float64, **options))
    return model.model.layers[0].self_attn


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
AT = torch.arange(5)[None]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "position_ids must be given to a layer with a rotary embedding, got None"),
        ({"position_ids": AT.expand(3, 2, 5)}, r"position_ids must be \(B, T\), got shape \(3, 2, 5\): multimodal"),
        ({"position_ids": AT, "attention_mask": torch.ones(2, 5)},
         "attention_mask must be 4-D: load the model with attn_implementation 'sdpa' or 'eager'; got 2 dimensions"),
        ({"position_ids": AT, "attention_mask": "causal"}, "attention_mask must be 4-D: .* got a str"),
        ({"position_ids": AT, "attention_mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)}, "mask must broadcast to"),
        ({"position_ids": AT, "past_key_values": ((X,),)}, "past_key_values must be a Cache of .*, got tuple"),
    ],
)  # fmt: skip
def test_calls_that_a_layer_cannot_take_are_refused(keywords, words):
    with pytest.raises(ValueError, match=words):
        layer_of()(X, **keywords)


@pytest.mark.parametrize("kind", ["boolean", "float", "-inf"])
def test_masks_of_transformers_say_what_a_dense_mask_says(kind):
    layer = layer_of(causal=True, sliding_window=3)
    visible = torch.ones(5, 5).tril().bool() & (torch.rand(2, 1, 5, 5) < 0.8) | torch.eye(5).bool()
    hidden = {"float": torch.finfo(torch.float64).min, "-inf": -torch.inf}.get(kind)
    mask = visible if hidden is None else torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~visible, hidden)
    whole = copy.deepcopy(layer.attn)
    whole.sliding_window = None
    keywords = {"attention_mask": mask, "position_ids": AT}
    assert torch.equal(layer(X, **keywords)[0], layer.attn(X, mask=visible, positions=AT))
    # Masks that have the window already are not narrowed a second time.
    layer.sliding_window = 3
    assert torch.equal(layer(X, **keywords)[0], whole(X, mask=visible, positions=AT))


def test_biases_are_added_or_refused():
    bias = torch.randn(2, 1, 5, 5, dtype=torch.float64).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    alibi = attnzoo.GroupedQueryAttention(32, 4, 2, rope=None, dtype=torch.float64)
    distances = torch.arange(5)[:, None] - torch.arange(5)
    slopes = -0.25 * distances.clamp(min=0)[None, None].double()
    hidden = slopes.masked_fill(distances < 0, torch.finfo(torch.float64).min)
    layer = AttentionLayer(alibi, layer_of())
    like = copy.deepcopy(alibi)
    like.alibi_slopes = (0.25,) * 4
    torch.testing.assert_close(layer(X, attention_mask=hidden)[0], like(X))
    latent = AttentionLayer(attnzoo.MultiHeadLatentAttention(32, 4, 12, dtype=torch.float64), layer)
    with pytest.raises(ValueError, match="mask must not add to the scores of MultiHeadLatentAttention, got a bias"):
        latent(X, attention_mask=bias, position_ids=AT)
    latent(X, attention_mask=bias.masked_fill(bias > -torch.inf, 0.0), position_ids=AT)


@pytest.mark.parametrize("on_config", [False, True])
def test_attention_weights_are_refused_and_the_way_to_them_named(on_config):
    model = small("llama")
    model.set_attn_implementation("eager")
    assert len(model(IDS, output_attentions=True).attentions) == 2
    hf.replace(model)
    model.config.output_attentions = on_config
    with pytest.raises(ValueError, match=r"output_attentions must be False .* use attnzoo\.diagnostics\.capture"):
        model(IDS, **({} if on_config else {"output_attentions": True}))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model.model(IDS, output_attentions=True)
    if not on_config:
        assert model(IDS).logits.shape == (2, 15, 67)
        assert len(copy.deepcopy(model)(IDS, output_hidden_states=True).hidden_states) == 3
    model.config.output_attentions = False
    hf.restore(model)
    assert len(model(IDS, output_attentions=True).attentions) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen3"])
def test_a_replaced_model_compiles_without_breaks(name):
    model = hf.replace(small(name, dtype=torch.float32))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        model(IDS, past_key_values=cache)
        other = copy.deepcopy(cache)
        at = torch.tensor([[15]])
        keywords = {"attention_mask": torch.ones(2, 20, dtype=torch.long), "position_ids": at}
        expected = model(IDS[:, :1], past_key_values=cache, **keywords).logits
        found = compiled(IDS[:, :1], past_key_values=other, **keywords).logits
    torch.testing.assert_close(found, expected)


def test_diagnostics_see_the_modules_as_their_own():
    source = small("qwen3")
    model = hf.replace(copy.deepcopy(source))
    layers = diagnostics.attention_layers(model)
    assert [layer.family for layer in layers] == ["attnzoo"] * 2
    assert [layer.name for layer in layers] == [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    kept = []
    for each in (source, model):
        with diagnostics.capture(each, ["patterns", "outputs"]) as captured, torch.no_grad():
            each(IDS, attention_mask=LEFT)
        kept.append(captured)
    real = LEFT.bool()
    for index in range(2):
        patterns, outputs = ([one.last(kind)[index] for one in kept] for kind in ("patterns", "outputs"))
        torch.testing.assert_close(*(p.transpose(1, 2)[real].double() for p in patterns), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(*(o.transpose(1, 2)[real].double() for o in outputs), atol=1e-5, rtol=1e-5)
    measure = next(iter(diagnostics.head_report(model, [IDS]).layers[0].measures))
    tables = [diagnostics.head_report(each, [IDS]).table(measure) for each in (source, model)]
    torch.testing.assert_close(*tables, atol=1e-5, rtol=1e-5)
    assert len(diagnostics.analyze_model(model)) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_pruning_a_replaced_model_is_masking_its_heads(name):
    model = hf.replace(small(name))
    heads = {0: [1], 1: [0, 3]}
    keywords = {"input_ids": IDS, "attention_mask": LEFT}
    with torch.no_grad(), diagnostics.masked_heads(model, diagnostics.head_mask([(0, 1), (1, 0), (1, 3)], (2, 4))):
        expected = model(**keywords).logits
    diagnostics.prune_heads(model, heads)
    assert [attn.pruned_heads for _, attn in hf.modules(model)] == [(1,), (0, 3)]
    with torch.no_grad():
        found = model(**keywords).logits
    assert (found - expected)[LEFT.bool()].abs().max() < 1e-10
    if name != "bert":
        generated = [model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, do_sample=False, pad_token_id=0,
                                    use_cache=use) for use in (True, False)]  # fmt: skip
        assert torch.equal(*generated)
    with pytest.raises(ValueError, match="cannot express this"):
        hf.restore(model)


def test_hooks_stay_with_their_place():
    model, seen = small("llama"), []
    place = model.model.layers[0].self_attn
    handle = place.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    hf.replace(model)
    assert seen == ["LlamaAttention"] * 2  # in the runs of the model that are verified
    model(IDS)
    hf.restore(model)(IDS)
    assert seen == ["LlamaAttention", "LlamaAttention", "AttentionLayer", "LlamaAttention"]
    handle.remove()
    model(IDS)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "deepseek-v3"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_adapters_on_every_projection_are_their_merged_weights(name):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = hf.replace(small(name))
    linear = sorted({key.rpartition(".")[2] for key, m in model.named_modules()
                     if ".attn." in key and isinstance(m, torch.nn.Linear)})  # fmt: skip
    inside = [f"{layer}.attn.{part}" for layer, _ in hf.modules(model) for part in linear]
    targets = [key for key in inside if key in dict(model.named_modules())]
    assert len(targets) >= 8
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double().eval()
    assert adapted(IDS).logits.sum().isfinite()
    adapted(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for key, p in adapted.named_parameters() if "lora_" in key]
    assert len(gradients) == 2 * len(targets)
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    with torch.no_grad():
        found = adapted(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    assert (found - merged).abs().max() < 1e-10
    with torch.no_grad():
        assert (adapted.get_base_model()(IDS).logits - merged).abs().max() < 1e-10
