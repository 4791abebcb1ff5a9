"""Heads removed from whole models equal heads masked: the zoo, Hugging Face families, decoding, reloading."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.diagnostics.heads.report import head_report
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.pruning.importance import head_importance
from attnzoo.diagnostics.pruning.masks import head_mask, head_slots, masked_heads
from attnzoo.diagnostics.pruning.speed import pruning_speed
from attnzoo.diagnostics.pruning.structural import load_pruned, prune_heads, pruned_heads
from attnzoo_recipes.lm import DecoderLM
from tests import golden_decoder
from tests.diagnostics import families
from tests.golden_decoder import WITHIN, next_token_losses, pairs
from tests.zoo import MECHANISMS, names

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])

UNEVEN = {0: [0, 5], 1: [2, 3], 2: [1]}
"""Of 6 query heads in 2 groups: one of each group, two of one, one of one."""
EMPTY_GROUP = {0: [0, 1, 2], 2: [3, 4, 5, 0]}
EMPTY_LAYERS = {0: list(range(6)), 1: [4]}
CASES = {"uneven": UNEVEN, "whole group": EMPTY_GROUP, "whole layer": EMPTY_LAYERS}


@pytest.fixture(scope="module")
def stored():
    return golden_decoder.load()


@pytest.fixture(scope="module")
def decoder(stored):
    return golden_decoder.build(stored)


@pytest.fixture(scope="module")
def batch(stored):
    return golden_decoder.examples(stored)


def hugging_face(name, dtype=torch.float64):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 20}
    if name == "bert":
        config = transformers.BertConfig(**sizes, num_attention_heads=6, max_position_embeddings=16)
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
        more = {"qwen2": {"use_sliding_window": True, "sliding_window": 5}, "llama": {"attention_bias": True}}
        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma2": "Gemma2"}[name]
        config = getattr(transformers, f"{kind}Config")(**sizes, **more.get(name, {}))
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def output(model, tokens=TOKENS, **call):
    found = model(input_ids=tokens, **call)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def masked_output(model, heads, tokens=TOKENS, **call):
    total = max(layer.num_heads for layer in attention_layers(model))
    shape = (len(attention_layers(model)), total)
    with masked_heads(model, head_mask([(l, h) for l, of in heads.items() for h in of], shape)):  # noqa: E741
        return output(model, tokens, **call)


# The stored decoder


def test_the_stored_decoder(stored, decoder, batch):
    t, _ = stored
    model = copy.deepcopy(decoder)
    prune_heads(model, pairs(t["output.structural_heads"]))
    loss = next_token_losses(model, batch).mean()
    assert loss.item() == pytest.approx(t["output.structural_loss"].item(), abs=WITHIN)


# The zoo in the recipe's decoder


def zoo_decoder(name):
    torch.manual_seed(0)
    return DecoderLM(23, lambda embed_dim: MECHANISMS[name](embed_dim), embed_dim=32, num_layers=2).double().eval()


@pytest.mark.parametrize("name", names("pruning as a mask"))
def test_zoo_models(name):
    model = zoo_decoder(name)
    gone = {0: [0, 3], 1: [1]}
    with masked_heads(model, head_mask([(0, 0), (0, 3), (1, 1)], (2, 4))):
        expected = model(TOKENS)
    prune_heads(model, gone)
    torch.testing.assert_close(model(TOKENS), expected, atol=1e-12, rtol=0)
    assert pruned_heads(model) == {0: (0, 3), 1: (1,)}
    caches = model.init_caches(2, 8)
    with torch.no_grad():
        decoded = torch.cat([model(part, caches=caches) for part in TOKENS.split([3, 1, 4], 1)], 1)
    torch.testing.assert_close(decoded, expected, atol=1e-12, rtol=0)


def test_twice_is_once_and_masks_keep_original_numbers():
    once, twice = zoo_decoder("gqa"), zoo_decoder("gqa")
    prune_heads(once, {0: [2, 0]})
    prune_heads(twice, [(0, 2)])
    prune_heads(twice, [(0, 0)])
    assert torch.equal(once(TOKENS), twice(TOKENS))
    xi = torch.randn(2, 4, dtype=torch.float64)
    full = zoo_decoder("gqa")
    with masked_heads(once, xi):
        found = once(TOKENS)
    xi[0, [0, 2]] = 0
    with masked_heads(full, xi):
        torch.testing.assert_close(full(TOKENS), found, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("name", "groups"), [("gqa", 2), ("mla", 4), ("dcmha", 2), ("linear", 2)])
def test_groups_of_zoo_models(name, groups):
    by_group, by_head = zoo_decoder(name), zoo_decoder(name)
    size = 4 // groups
    prune_heads(by_group, {1: [1]}, unit="kv_group")
    prune_heads(by_head, {1: range(size, 2 * size)})
    assert pruned_heads(by_group) == pruned_heads(by_head)
    assert torch.equal(by_group(TOKENS), by_head(TOKENS))
    with pytest.raises(ValueError, match="is pruned already"):
        prune_heads(by_group, {1: [1]}, unit="kv_group")


def test_mixtures_remove_heads_from_the_router():
    model = zoo_decoder("moh")
    prune_heads(model, {0: [3]})
    assert pruned_heads(model) == {0: (3,)}
    with pytest.raises(ValueError, match="num_routed_active"):
        prune_heads(model, {1: [3], 0: [1, 2]})
    # Nothing happened in the layer that would have agreed.
    assert pruned_heads(model) == {0: (3,)}


# Hugging Face


# Gemma 2 has a soft-cap, which transformers' sdpa function refuses.
FAMILIES = [(name, kind) for name in ("bert", "llama", "qwen2", "qwen3", "mistral") for kind in ("eager", "sdpa")]


@pytest.mark.parametrize(("name", "implementation"), [*FAMILIES, ("gemma2", "eager")])
@pytest.mark.parametrize("case", CASES)
def test_hugging_face_models(name, case, implementation):
    # The eager path computes its softmax in float32 whatever the model's dtype.
    within = {"atol": 1e-12 if implementation == "sdpa" or name == "bert" else 2e-6, "rtol": 0}
    model, heads = hugging_face(name), CASES[case]
    model.set_attn_implementation(implementation)
    padding = {"attention_mask": torch.tensor([[1] * 8, [1] * 6 + [0] * 2])}
    real = padding["attention_mask"].bool()
    with torch.no_grad():
        expected, padded = masked_output(model, heads), masked_output(model, heads, **padding)[real]
        before = sum(p.numel() for p in model.parameters())
        prune_heads(model, heads)
        torch.testing.assert_close(output(model), expected, **within)
        torch.testing.assert_close(output(model, **padding)[real], padded, **within)
    assert sum(p.numel() for p in model.parameters()) < before
    assert pruned_heads(model) == {layer: tuple(sorted(gone)) for layer, gone in heads.items()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("case", CASES)
def test_decoding_of_pruned_hugging_face_models(name, case):
    model = hugging_face(name)
    prune_heads(model, CASES[case])
    with torch.no_grad():
        expected = output(model)
        first = model(TOKENS[:, :3], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for at in range(3, 8):
            parts.append(model(TOKENS[:, at : at + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-12, rtol=0)
    keys = [layer.keys.shape[1] for layer in cache.layers]
    # Uneven groups are cached once each; an empty layer counts tokens with one head of width 1.
    assert keys == {"uneven": [2, 2, 2], "whole group": [1, 2, 1], "whole layer": [1, 2, 2]}[case]


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_pruning_in_steps_reloads_and_measures(name, case):
    once, steps = hugging_face(name), hugging_face(name)
    prune_heads(once, CASES[case])
    for layer, heads in CASES[case].items():
        for head in heads:
            prune_heads(steps, [(layer, head)])
    with torch.no_grad():
        torch.testing.assert_close(output(steps), output(once), atol=1e-12, rtol=0)
        fresh = hugging_face(name)
        for parameter in fresh.parameters():
            parameter.zero_()
        prune_heads(fresh, pruned_heads(once))
        fresh.load_state_dict(once.state_dict())
        torch.testing.assert_close(output(fresh), output(once), atol=0, rtol=0)
        torch.testing.assert_close(output(copy.deepcopy(once)), output(once), atol=0, rtol=0)

    def losses(model, tokens):
        return output(model, tokens).square().mean((1, 2))

    found = head_importance(once, [TOKENS], losses)
    gone = head_mask([(layer, h) for layer, of in CASES[case].items() for h in of], (3, 6)) == 0
    assert found[gone].eq(0).all()
    assert found[~gone].gt(0).all()
    full = hugging_face(name)
    expected = head_importance(full, [TOKENS], losses, head_mask=(~gone).double())
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_groups_of_hugging_face_models():
    model = hugging_face("llama")
    with torch.no_grad():
        expected = masked_output(model, {1: [3, 4, 5]})
        prune_heads(model, {1: [1]}, unit="kv_group")
        torch.testing.assert_close(output(model), expected, atol=1e-12, rtol=0)
    layer = attention_layers(model)[1]
    assert (layer.num_heads, layer.num_kv_heads) == (3, 1)
    assert layer.module.k_proj.out_features == 8


def test_an_uneven_layer_becomes_even_again_and_follows_the_models_implementation():
    model = hugging_face("llama")
    prune_heads(model, {0: [0]})
    assert [len(layer.qk_factors()) for layer in attention_layers(model)] == [5, 6, 6]
    assert [len(layer.ov_factors()) for layer in attention_layers(model)] == [5, 6, 6]
    prune_heads(model, {0: [3]})
    with torch.no_grad():
        by_sdpa = output(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(output(model), by_sdpa, atol=2e-6, rtol=0)
        torch.testing.assert_close(masked_output(hugging_face("llama"), {0: [0, 3]}), by_sdpa, atol=1e-12, rtol=0)


def test_training_goes_on_after_pruning():
    model = hugging_face("llama")
    prune_heads(model, UNEVEN)
    output(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


# Speed


def test_speed_counts_and_compares():
    model = zoo_decoder("gqa")
    order = [(0, 1), (1, 0), (1, 3), (0, 0)]
    found = pruning_speed(model, lambda m: m(TOKENS), fractions=[0, 0.25, 0.5], order=order, tokens=16, rounds=2)
    assert found.removed == (0, 2, 4)
    assert max(found.error) < 1e-12
    assert found.parameters[0] > found.parameters[1] > found.parameters[2]
    assert found.speedup[0] == 1
    assert [round(t * ms / 1e3) for t, ms in zip(found.tokens_per_second, found.structural_ms, strict=True)] == [16] * 3
    assert pruned_heads(model) == {}
    even = pruning_speed(model, lambda m: m(TOKENS), fractions=[0.5], rounds=1)
    assert even.removed == (4,)
    wide = nn.Sequential(*(attnzoo.MultiHeadAttention(10, 10, rope=None) for _ in range(9)))
    found = pruning_speed(wide, lambda m: m(torch.ones(1, 2, 10)), fractions=[0.7], rounds=1, warmup=0)
    assert found.removed == (63,)


# Refusals


@pytest.mark.parametrize(
    ("heads", "unit", "message"),
    [
        ({3: [0]}, "head", "heads must name layers from 0 to 2, got 3"),
        ({0: [6]}, "head", "must lie between 0 and 5, got 6"),
        ({0: [1, 1]}, "head", "must not repeat a head"),
        ({1: [0], 0: [-1]}, "head", "must lie between 0 and 5, got -1"),
        ({0: [2]}, "kv_group", "heads must name key/value heads from 0 to 1, got 2"),
        ({0: [0]}, "layer", "unit must be one of 'head', 'kv_group', got 'layer'"),
    ],
)
def test_refusals(heads, unit, message):
    model = hugging_face("llama")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_heads(model, heads, unit=unit)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_heads_that_are_gone_are_refused():
    for model in (hugging_face("llama"), hugging_face("bert")):
        prune_heads(model, {0: range(6), 1: [2]})
        for heads in ({0: [1]}, {1: [2]}):
            with pytest.raises(ValueError, match="is pruned already"):
                prune_heads(model, heads)


def test_a_single_module_keeps_a_head():
    """Nothing could replace it in the model around it."""
    attn = attention_layers(hugging_face("llama"))[0].module
    with pytest.raises(ValueError, match="heads must leave at least one of a model that is a single attention module"):
        prune_heads(attn, {0: range(6)})
    assert pruned_heads(attn) == {}
    assert attn.q_proj.out_features == 48
    prune_heads(attn, {0: range(1, 6)})
    assert attention_layers(attn)[0].num_heads == 1


def test_joint_norms_are_refused_unless_asked_for():
    transformers = pytest.importorskip("transformers")
    config = transformers.Olmo2Config(
        vocab_size=23, hidden_size=24, num_hidden_layers=2, intermediate_size=20, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Olmo2ForCausalLM(config).double().eval()
    with pytest.raises(ValueError, match=r"q_norm of layer .* runs over all heads together"):
        prune_heads(model, {0: [0]})
    prune_heads(model, {0: [0], 1: [0, 1, 2]}, allow_inexact=True)
    assert output(model).isfinite().all()
    linear = functools.partial(attnzoo.LinearAttention, num_heads=4, qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm=False"):
        prune_heads(DecoderLM(23, linear, embed_dim=32, num_layers=1), {0: [0]})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepseekV3", "prune_heads knows zoo modules and the families of .*, got DeepseekV3Attention"),
        ("T5", "prune_heads knows zoo modules and the families of .*, got T5Attention"),
        (
            "GPTBigCode",
            "prune_heads needs a key/value head for each query head where they are one projection, got 4 and 1",
        ),
    ],
)
def test_other_attention_is_refused(name, message):
    pytest.importorskip("transformers")
    with families.quiet():
        model = families.model_of(name)
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        prune_heads(model, {0: [0]})
    assert traces(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": [1.5]}, "fractions must lie between 0 and 1"),
        ({"fractions": 0.5}, "fractions must lie between 0 and 1, got 0.5"),
        ({"fractions": ["a"]}, r"fractions must lie between 0 and 1, got \['a'\]"),
        ({"fractions": [True]}, r"fractions must lie between 0 and 1, got \[True\]"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"call": lambda m: (m(TOKENS),)}, "call must return a tensor to compare"),
        ({"call": None}, "call must run the model, got None"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"order": [(0, 0)]}, "order must name at least 6 heads, got 1"),
    ],
)
def test_speed_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pruning_speed(zoo_decoder("gqa"), **{"call": lambda m: m(TOKENS), "rounds": 1, "warmup": 0, **options})


@pytest.mark.parametrize("several", [torch.tensor, iter])
def test_speed_takes_shares_in_any_form(several):
    found = pruning_speed(zoo_decoder("gqa"), lambda m: m(TOKENS), fractions=several([0.0, 0.5]), rounds=1, warmup=0)
    assert found.fractions == (0.0, 0.5)
    assert found.removed[0] == 0 < found.removed[1]


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_heads_of_uneven_groups_are_reported(name):
    pytest.importorskip("transformers")
    with families.quiet():
        model = families.model_of(name)
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with masked_heads(model, head_mask([(0, 1)], (2, 4))):
        expected = head_report(model, [tokens])
    prune_heads(model, {0: [1]})
    found = head_report(model, [tokens])
    for layer, kept in enumerate(([0, 2, 3], [0, 1, 2, 3])):
        for measure, values in found.layers[layer].measures.items():
            torch.testing.assert_close(values, expected.layers[layer].measure(measure)[kept], atol=1e-6, rtol=1e-6)
        pairs = expected.layers[layer].output_cosine[kept][:, kept]
        torch.testing.assert_close(found.layers[layer].output_cosine, pairs, atol=1e-6, rtol=1e-6)


# Tried before it is handed back


def traces(model):
    """Everything that pruning could change, by identity."""
    config = getattr(model, "config", None)
    return (
        [
            {name: (id(value), dict(value) if isinstance(value, dict) else None) for name, value in vars(m).items()}
            for m in model.modules()
        ],
        [(name, id(p)) for name, p in model.named_parameters()],
        None if config is None else config.to_dict(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("StableLm", {"qk_layernorm": True}), ("Cohere", {"use_qk_norm": True}), ("Cohere2", {}), ("Qwen3", {}),
     ("Lfm2", {}), ("HunYuanDenseV1", {}), ("GptOss", {}), ("GPTJ", {}), ("Roberta", {}), ("Bart", {}), ("GPT2", {}),
     ("GPTNeoX", {}), ("DistilBert", {})],
)  # fmt: skip
@pytest.mark.parametrize("heads", [{0: [1]}, {0: [0, 1, 2, 3]}, {0: [2, 3], 1: [0, 3]}])
def test_pruned_families_compute_what_masks_do(name, options, heads):
    pytest.importorskip("transformers")
    with families.quiet():
        model = families.model_of(name, dtype=torch.float32 if name == "GptOss" else torch.float64, **options)
    # Where the model has float32 inside, in its experts or its softmax.
    within = 1e-5 if name == "GptOss" else 1e-10
    call = {"decoder_input_ids": TOKENS} if name == "Bart" else {}
    layers = attention_layers(model)
    if name == "Lfm2":  # whose first layer is a convolution
        assert len(layers) >= 1
        heads = {0: heads[0]}
    with torch.no_grad():
        expected = masked_output(model, heads, **call)
        prune_heads(model, heads)
        torch.testing.assert_close(output(model, **call), expected, atol=within, rtol=within)
        if name in ("Roberta", "Bart", "DistilBert"):
            return
        first = model(TOKENS[:, :5], use_cache=True)
        rest = model(TOKENS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    decoded = torch.cat([first.last_hidden_state, rest.last_hidden_state], 1)
    # GPT-J computes its scores in float32.
    within = 1e-5 if name in ("GptOss", "GPTJ") else 1e-9
    torch.testing.assert_close(decoded, expected, atol=within, rtol=within)


@pytest.mark.parametrize("heads", [{2: [0]}, {2: [0, 1, 2, 3]}, {3: [1, 3]}, {3: [0, 1, 2, 3]}])
def test_sound_and_attention_over_an_encoder(heads):
    """Layer 2 is the decoder's own attention, layer 3 that over the encoder, which counts no tokens in the cache."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20, "decoder_start_token_id": 1}
    config = families.config_of(transformers.WhisperConfig, **sizes)
    model = families.shaken(transformers.WhisperModel(config))
    assert len(attention_layers(model)) == 6
    sound = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(tokens, **options):
        return model(sound, decoder_input_ids=tokens, **options)

    with torch.no_grad():
        mask = head_mask([(l, h) for l, of in heads.items() for h in of], head_slots(model).shape)  # noqa: E741
        with masked_heads(model, mask):
            expected = run(TOKENS).last_hidden_state
        prune_heads(model, heads)
        torch.testing.assert_close(run(TOKENS).last_hidden_state, expected, atol=1e-10, rtol=0)
        first = run(TOKENS[:, :5], use_cache=True)
        rest = run(TOKENS[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.last_hidden_state, expected[:, 5:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "ViTModel"])
def test_models_of_images(name):
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    model = families.shaken(cls(families.config_of(cls.config_class)))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        with masked_heads(model, head_mask([(0, 1), (1, 0)], (2, 4))):
            expected = model(pixel_values=pixels)[0]
        prune_heads(model, {0: [1], 1: [0]})
        torch.testing.assert_close(model(pixel_values=pixels)[0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BitNet", "prune_heads cannot prune BitNetAttention of layer 'layers.1.self_attn': RuntimeError when it is"),
        ("DiffLlama", "prune_heads cannot prune DiffLlamaAttention of layer"),
        ("Doge", "prune_heads cannot prune DogeAttention of layer"),
        ("Mvp", "prune_heads cannot prune MvpAttention of layer"),
        ("Nystromformer", "prune_heads cannot prune NystromformerAttention of layer"),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_stays(name, message):
    pytest.importorskip("transformers")
    with families.quiet():
        model = families.model_of(name)
    model.train()
    attention_layers(model)[0].hook_heads(lambda heads: None)
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        prune_heads(model, {1: [0], 0: [1]})
    assert traces(model) == before


class PerHead(nn.Module):
    """A lookalike of separate projections with one more number for each head."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))
        self.head_dim, self.loudness = 6, nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, hidden_states):
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = (q @ k.mT).softmax(-1) @ v * self.loudness[: q.shape[1]]
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def test_a_lookalike_with_numbers_of_its_own_is_refused():
    """They are equal here, so that no output shows what the others would do."""
    model = nn.Sequential(PerHead(), PerHead())
    before = traces(model)
    with pytest.raises(
        ValueError, match=r"cannot prune PerHead of layer '0': pruned, it differs from its masked heads"
    ):
        prune_heads(model, {0: [1]})
    assert traces(model) == before


def test_a_model_that_breaks_as_a_whole_is_restored():
    model = hugging_face("llama")
    model.config.use_cache = True
    inner, counts = model.model, []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: counts.append(1))
    forward = inner.forward
    inner.forward = lambda *args, **options: (
        [layer.self_attn.q_proj.weight.view(48, 24) for layer in inner.layers[1:]], forward(*args, **options)
    )[1]  # fmt: skip
    before = traces(model)
    # An uneven layer has got a configuration of its own, an empty one another module, by the time the model is run.
    with pytest.raises(ValueError, match=r"cannot prune LlamaForCausalLM \(on a few tokens\): RuntimeError when it is"):
        prune_heads(model, {0: range(6), 1: [0], 2: [0, 1, 2]})
    assert traces(model) == before
    assert pruned_heads(model) == {}
    assert counts
    handle.remove()
    counts.clear()
    output(model)
    assert not counts
    del inner.forward
    with torch.no_grad():
        expected = masked_output(model, {0: range(6), 1: [0]})
        prune_heads(model, {0: range(6), 1: [0]})
        torch.testing.assert_close(output(model), expected, atol=1e-12, rtol=0)


def test_models_inside_others_are_tried_too():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = hugging_face("bert"), hugging_face("llama")

    model = Wrapped()
    with torch.no_grad():
        expected = masked_output(model.decoder, {2: [1]})
        prune_heads(model, {1: [4], 5: [1]})
        torch.testing.assert_close(output(model.decoder), expected, atol=1e-12, rtol=0)
    assert model.encoder.config.attnzoo_pruned_heads == {"1": [4]}
    assert model.decoder.config.attnzoo_pruned_heads == {"2": [1]}
    broken = Wrapped()
    broken.decoder.forward = lambda *_, **__: broken.encoder.encoder.layer[1].attention.self.query.weight.view(24, 24)
    before = traces(broken)
    with pytest.raises(ValueError, match="cannot prune LlamaForCausalLM"):
        prune_heads(broken, {1: [4], 5: [1]})
    assert traces(broken) == before


@pytest.mark.parametrize("name", ["Llama", "Bert", "StableLm", "Bart", "GPTJ", "GPT2", "GPTNeoX", "DistilBert"])
def test_saved_models_load_again(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    with families.quiet():
        model = families.model_of(name, qk_layernorm=True)
        prune_heads(model, {0: range(4)})
        prune_heads(model, {1: [1]})
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.AutoModel.from_pretrained(tmp_path)
        loaded = load_pruned(tmp_path, dtype=torch.float64)
    assert type(loaded) is type(model)
    assert pruned_heads(loaded) == pruned_heads(model) == {0: (0, 1, 2, 3), 1: (1,)}
    call = {"decoder_input_ids": TOKENS} if name == "Bart" else {}
    with torch.no_grad():
        torch.testing.assert_close(output(loaded, **call), output(model, **call), atol=1e-12, rtol=0)
    prune_heads(loaded, {1: [0]})
    state = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "again")
    again = load_pruned(tmp_path / "again", dtype=torch.float64)
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_a_pickled_model_runs_in_another_process(tmp_path):
    model = hugging_face("llama")
    prune_heads(model, UNEVEN)
    torch.save((model, TOKENS, output(model).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, tokens, out = torch.load(sys.argv[1], weights_only=False); "
        "assert (model(tokens).logits - out).abs().max() < 1e-12"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


def test_other_folders_are_refused(tmp_path):
    model = hugging_face("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="folder must hold a model of transformers that prune_heads has pruned, got Llama"
    ):
        load_pruned(tmp_path)
    prune_heads(model, {0: [0]})
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path / "less", state_dict=state)
    path = tmp_path / "less" / "config.json"
    settings = json.loads(path.read_text())
    for change, message in {
        '{"attnzoo_pruned_heads": {"9": [0]}}': "must name layers that can be pruned, got 9",
        '{"attnzoo_pruned_heads": {"0": [77]}}': "indices must lie between 0 and 5, got 77",
        '{"attnzoo_pruned_heads": [1]}': "must hold a readable config.json",
        '{"architectures": ["Trainer"]}': "that prune_heads has pruned, got Trainer",
        '{"architectures": []}': "that prune_heads has pruned, got ",
    }.items():
        path.write_text(json.dumps(settings | json.loads(change)))
        with pytest.raises(ValueError, match=message):
            load_pruned(tmp_path / "less")
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"folder must hold a readable config\.json"):
        load_pruned(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"exactly the weights of LlamaForCausalLM, got .*layers.1.mlp.up_proj.weight"):
        load_pruned(tmp_path / "less")


@pytest.mark.slow
def test_every_text_family_is_pruned_exactly_or_refused():
    equal = refused = 0
    with families.quiet():
        for name in families.text_families():
            for dtype in (torch.float64, torch.float32):
                try:
                    model = families.model_of(name, dtype=dtype, **dict.fromkeys(families.NORMS, True))
                    call = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
                    with torch.no_grad():
                        untouched = model(input_ids=TOKENS, **call)[0]
                    count = attention_layers(model)[0].heads
                    break
                except Exception:  # needs other inputs, is not claimed, or has no float64
                    model = None
            if model is None or name == "FalconH1":  # takes 20 s a call
                continue
            everything = list(range(count.total))
            for heads in ({0: [1]}, {0: everything[: count.group_size]}, {0: everything}, {0: everything[1:]}):
                mask = head_mask([(0, h) for h in heads[0]], head_slots(model).shape)
                pruned = copy.deepcopy(model)
                try:
                    prune_heads(pruned, heads)
                except ValueError:
                    refused += 1
                    with torch.no_grad():
                        assert torch.equal(pruned(input_ids=TOKENS, **call)[0], untouched), name
                    continue
                with torch.no_grad():
                    with masked_heads(model, mask):
                        expected = model(input_ids=TOKENS, **call)[0]
                    error = (pruned(input_ids=TOKENS, **call)[0] - expected).abs().max() / expected.abs().max()
                # Eager attention has a softmax of float32, whatever the dtype.
                assert error < (1e-6 if dtype == torch.float64 else 1e-4), (name, heads)
                equal += 1
    assert equal >= 250, (equal, refused)
