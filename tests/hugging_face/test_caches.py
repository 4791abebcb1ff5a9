"""Every mechanism over transformers' caches gives what it gives without one."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo.cache import StatefulCache, StaticContextCache, TokenCache
from attnzoo.hugging_face import caches
from attnzoo.hugging_face.caches import StateLayer
from attnzoo.hugging_face.installation import attention_names, install
from tests.hugging_face.small import small
from tests.zoo import MECHANISMS, OPTIONS, TAKES

IDS = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CASES = [(name, "plain") for name in MECHANISMS]
CASES += [("gqa", option) for option in OPTIONS if option != "plain"]
CASES += [
    (name, "window") for name in ("gta", "dcmha", "talking-heads", "mae", "tpa") if "window" in TAKES.get(name, OPTIONS)
]
CASES += [("chai", "plain")]
NO_LEFT = ("mta", "mta-full", "mgk", "mgk-hard", "mgk-linear", "rcmha", "mhla", "mhla-heads", "chai", "selective")


@functools.cache
def with_mechanism(name, option):
    model = small("llama")
    torch.manual_seed(0)
    for layer in attention_names(model):
        if name == "chai":
            attn = attnzoo.ClusteredHeadAttention(attnzoo.MultiHeadAttention(32, 4, dtype=torch.float64).eval(), 2)
        else:
            attn = MECHANISMS[name](dtype=torch.float64, **OPTIONS[option]).eval()
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        install(model, layer, attn)
    return model


def steps(model, cache, sizes=(6, 1, 3, 2)):
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split(sizes, 1)], 1)


@pytest.mark.parametrize(("name", "option"), CASES)
def test_cached_is_uncached(name, option):
    model = with_mechanism(name, option)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        for cache in (
            transformers.DynamicCache(config=model.config),
            transformers.DynamicCache(),
            transformers.StaticCache(config=model.config, max_cache_len=20),
        ):
            assert (steps(model, cache) - whole).abs().max() < 1e-10
        expected = model.generate(IDS, num_beams=3, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(IDS, num_beams=3, **GREEDY), expected)
        right = LEFT.flip(1)
        padded = model(IDS, attention_mask=right, use_cache=False).logits
        assert (padded - whole)[right.bool()].abs().max() < 1e-10


@pytest.mark.parametrize(("name", "option"), CASES)
def test_padding_on_the_left_is_not_seen_or_refused(name, option):
    model = with_mechanism(name, option)
    if name in NO_LEFT or option == "window-sinks":
        with pytest.raises(
            ValueError, match=r"attention_mask must not begin with padding for this .*: pad on the right"
        ):
            model.generate(IDS, attention_mask=LEFT, **GREEDY)
        return
    alone = model.generate(IDS[:1, 4:], **GREEDY)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        found = model.generate(IDS, attention_mask=LEFT, **GREEDY, **options)
        assert torch.equal(found[:1, 4:], alone)


def test_latent_attention_caches_its_latents_alone():
    model = with_mechanism("mla", "plain")
    cache = transformers.DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    attn = model.model.layers[0].self_attn.attn
    width = attn.kv_lora_rank + attn.qk_rope_head_dim
    assert (cache.layers[0].keys.shape, cache.layers[0].values.shape) == ((2, 1, 12, width), (2, 1, 12, 0))


def test_keys_and_values_have_the_layout_of_transformers():
    source = small("llama")
    replaced = hf.replace(copy.deepcopy(source))
    cache = transformers.DynamicCache(config=source.config)
    with torch.no_grad():
        source(IDS[:, :7], past_key_values=cache)
        mixed = replaced(IDS[:, 7:], past_key_values=cache).logits
        whole = source(IDS).logits[:, 7:]
    assert (mixed - whole).abs().max() < 1e-4  # transformers' rotation tables are float32


def test_gradients_flow_through_cached_keys():
    model = hf.replace(small("llama"))
    cache = transformers.DynamicCache(config=model.config)
    first = model.get_input_embeddings()(IDS[:, :7]).detach().requires_grad_()
    model(inputs_embeds=first, past_key_values=cache)
    cached = model(IDS[:, 7:], past_key_values=cache).logits.sum()
    (found,) = torch.autograd.grad(cached, first)
    later = model.get_input_embeddings()(IDS[:, 7:])
    whole = model(inputs_embeds=torch.cat([first, later], 1)).logits[:, 7:].sum()
    (expected,) = torch.autograd.grad(whole, first)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["linear", "mhla-heads", "mae", "rcmha", "static-context", "chai"])
def test_layers_with_states_follow_rows(name):
    model = with_mechanism(name, "plain")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :8], past_key_values=cache)
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)
        assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (8, (10, 0))
        assert not any(layer.is_croppable for layer in cache.layers)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.reorder_cache(torch.tensor([1, 0, 0]))
        rows = IDS[[0, 1, 1]]
        found = model(rows[:, 8:], past_key_values=cache).logits
        whole = model(rows, use_cache=False).logits[:, 8:]
    assert (found - whole).abs().max() < 1e-10
    with pytest.raises(ValueError, match="cannot be updated with keys"):
        cache.layers[0].update(None, None)


def test_a_cache_that_another_layer_has_filled_is_refused():
    model = with_mechanism("linear", "plain")
    cache = transformers.DynamicCache(config=model.config)
    small("llama")(IDS, past_key_values=cache)
    with pytest.raises(
        ValueError, match="past_key_values must be empty at the first call of LinearAttention, got 12 tok"
    ):
        model(IDS, past_key_values=cache)


@pytest.mark.parametrize(("name", "held"), [("mla", "1 heads of width"), ("talking-heads", "4 heads of width")])
def test_a_prefix_of_another_layout_is_refused(name, held):
    model = with_mechanism(name, "plain")
    cache = transformers.DynamicCache(config=model.config)
    prefix = torch.randn(2, 3, 5, 7).double()
    cache.update(prefix, prefix, 0)
    with pytest.raises(
        ValueError, match=f"past_key_values must hold what .* caches, {held} .*, got 3 of width 7: pref"
    ):
        model(IDS[:2], past_key_values=cache)


STATEFUL = [
    name for name, make in MECHANISMS.items() if issubclass(make().cache_type, StatefulCache | StaticContextCache)
]


@pytest.mark.parametrize("name", [*STATEFUL, "dropping"])
def test_a_state_beside_keys_grows_with_its_sequence(name):
    model = with_mechanism("selective" if name == "dropping" else name, "plain")
    if name == "dropping":
        model = small("llama")
        for layer in attention_names(model):
            attn = attnzoo.SelectiveAttention(32, 4, 2, prune_threshold=0.02, init_std=0.5, dtype=torch.float64)
            install(model, layer, attn.eval())
    ids = torch.randint(3, 67, (1, 40), generator=torch.Generator().manual_seed(2))
    cache = transformers.DynamicCache(config=model.config)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(caches, "_FIRST_ROOM", 5)
        patch.setattr("attnzoo.cache.SelectionCache.PLACES", 4)
        found = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([3, 1, 4, 20, 12], 1)], 1)
        whole = model(ids, use_cache=False).logits
    assert (found - whole).abs().max() < 1e-10
    assert isinstance(cache.layers[0].cache, TokenCache)


def test_masks_of_single_pairs_are_refused_by_sums_over_keys():
    model = with_mechanism("linear", "plain")
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    causal = model(IDS, attention_mask=seen).logits
    torch.testing.assert_close(causal, model(IDS).logits)
    seen[0, 0, 7, 2] = False
    with pytest.raises(ValueError, match="must hold causality, padding and packed documents alone for Linear"):
        model(IDS, attention_mask=seen)


def test_sink_tokens_need_masks_and_caches_without_a_window():
    model = small("mistral")
    attn = attnzoo.GroupedQueryAttention(32, 4, 2, 10, sliding_window=6, sink_tokens=1, dtype=torch.float64)
    install(model, "model.layers.0.self_attn", attn)
    with pytest.raises(ValueError, match="sink_tokens must be 0 where transformers' masks have a window, here of 6"):
        model(IDS)


@pytest.mark.parametrize("window", [3, 9])
def test_another_window_than_the_models_holds_too(window):
    model = hf.replace(small("mistral"))
    own = model.config.sliding_window
    for _, attn in hf.modules(model):
        attn.sliding_window = window
    logits = model(IDS, use_cache=False).logits
    reference = small("mistral", sliding_window=min(own, window))
    torch.testing.assert_close(logits, hf.replace(reference)(IDS, use_cache=False).logits)


def test_what_is_no_longer_a_token_is_cropped():
    model = hf.replace(small("llama"))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :9], past_key_values=cache)
        cache.crop(-4)
        found = model(IDS[:, 5:], past_key_values=cache).logits
        assert (found - model(IDS).logits[:, 5:]).abs().max() < 1e-10
