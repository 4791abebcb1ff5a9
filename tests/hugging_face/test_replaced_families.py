"""Families of transformers with attnzoo's attention: the same function, whatever the call."""

import copy
import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo.hugging_face import families
from attnzoo.hugging_face.layer import AttentionLayer
from tests.hugging_face.small import CAUSAL, FAMILIES, lifted, small

T = 15
DECODING = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "chunks": {"prefill_chunk_size": 4},
}


@functools.cache
def pair(name):
    """A model, and the same with attnzoo's attention."""
    with lifted():
        source = small(name)
        return source, hf.replace(copy.deepcopy(source))


def ids_and_padding(batch=2):
    ids = torch.randint(3, 67, (batch, T), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    return ids, padding


def calls(causal):
    """Ways of calling a model, with the rows that have a meaning."""
    ids, left = ids_and_padding()
    every, right = torch.ones_like(left), left.flip(1)
    seen = torch.rand(2, 1, T, T, generator=torch.Generator().manual_seed(2)) < 0.6
    seen |= torch.eye(T, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    bias = torch.randn(2, 1, T, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden = bias.masked_fill(~seen, torch.finfo(torch.float64).min)
    found = {
        "full": ({}, every),
        "left": ({"attention_mask": left}, left),
        "right": ({"attention_mask": right}, right),
        "own mask": ({"attention_mask": seen}, every),
        "own floats": ({"attention_mask": torch.zeros_like(bias).masked_fill(~seen, -torch.inf)}, every),
        "own bias": ({"attention_mask": hidden}, every),
    }
    if causal:
        packed = torch.cat([torch.arange(6), torch.arange(T - 6)])[None].expand(2, -1)
        found["packed"] = ({"position_ids": packed, "use_cache": False}, every)
    return ids, found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replaced_model_gives_the_same_logits(name):
    source, replaced = pair(name)
    assert all(isinstance(module, AttentionLayer) for module in map(replaced.get_submodule, dict(hf.modules(replaced))))
    assert len(hf.modules(replaced)) == 2
    ids, found = calls(name != "bert")
    for call, (keywords, real) in found.items():
        if call == "own bias" and name.startswith("deepseek"):
            continue  # refused, see test_interface
        if call == "own mask" and source.config._attn_implementation == "eager":
            continue  # transformers adds 1 to the scores that it allows
        with lifted(), torch.no_grad():
            # Dynamic scalings remember the longest sequence they have seen.
            expected = copy.deepcopy(source)(ids, **keywords).logits[real.bool()]
            found_logits = copy.deepcopy(replaced)(ids, **keywords).logits[real.bool()]
        assert (found_logits - expected).abs().max() < 1e-10, call


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_replaced_model_generates_the_same_tokens(name, decoding):
    if (name, decoding) == ("phi3", "lookup"):
        pytest.skip("transformers' own Phi-3 cannot take tokens back from its sliding cache")
    if decoding == "lookup" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
        pytest.skip("transformers' prompt lookup needs an end token before 5.15")
    if (name, decoding) == ("llama-dynamic", "lookup"):
        pytest.skip("transformers remembers the length with tokens that were taken back")
    ids, left = ids_and_padding(1 if decoding == "lookup" else 2)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if decoding != "lookup":
        options["attention_mask"] = left
    with lifted():
        expected, found = (copy.deepcopy(m).generate(ids, **options, **DECODING[decoding]) for m in pair(name))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replaced_model_gives_the_same_gradients(name):
    ids, left = ids_and_padding()
    gradients = []
    for model in pair(name):
        with lifted():
            model = copy.deepcopy(model).train(name != "gpt2")
            # Rows of padding predict nothing: they differ.
            labels = ids.masked_fill(torch.cat([left[:, :1], left[:, :-1]], 1) == 0, -100)
            model(ids, attention_mask=left, labels=labels).loss.backward()
        inside = ("attn.", "attention.self", "attention.output.dense", "attention.dense", "query_key_value")
        outside = {key: p.grad for key, p in model.named_parameters() if not any(part in key for part in inside)}
        gradients.append({key: gradient for key, gradient in outside.items() if gradient is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[1].items():
        assert (gradient - gradients[0][key]).abs().max() < 1e-10, key
    assert len(gradients[1]) > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_restore_gives_the_classes_and_weights_of_before(name):
    source, replaced = pair(name)
    restored = hf.restore(copy.deepcopy(replaced))
    assert [type(m) for m in restored.modules()] == [type(m) for m in source.modules()]
    before, after = source.state_dict(), restored.state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-14, atol=1e-14)
    ids, _ = ids_and_padding()
    with lifted(), torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(restored)(ids).logits, copy.deepcopy(source)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(("llama-", "deepseek", "gpt-oss"))])
def test_a_replaced_model_is_as_exact_as_its_source(name, dtype):
    ids, left = ids_and_padding()
    real = left.bool()
    with torch.no_grad():
        rounded = torch.nn.Module.to(small(name, std=0.1), dtype)
        with lifted():
            exact = torch.nn.Module.double(copy.deepcopy(rounded))(ids, attention_mask=left).logits[real]
        own = (rounded(ids, attention_mask=left).logits[real].double() - exact).abs().max()
        replaced = hf.replace(rounded)(ids, attention_mask=left).logits[real].double()
    budget = 1e-3 if dtype is torch.float32 else 2 * own / exact.abs().max()
    assert (replaced - exact).abs().max() <= budget * exact.abs().max()


def test_parameters_are_taken_over_and_not_copied_where_the_layout_allows_it():
    model = small("qwen3")
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = {id(p) for p in model.parameters()}
    hf.replace(model)
    assert {id(p) for p in model.parameters()} == before
    assert not model.model.layers[0].self_attn.attn.q_proj.weight.requires_grad
    fused = small("gpt2")
    fused.transformer.h[0].attn.requires_grad_(False)
    hf.replace(fused)
    trains = [p.requires_grad for p in fused.transformer.h[0].attn.parameters()]
    assert not any(trains)
    assert all(p.requires_grad for p in fused.transformer.h[1].attn.parameters())
    assert all(p.is_contiguous() for p in fused.parameters())


def test_layers_and_backend_and_modes_are_what_was_asked_for():
    model = small("llama").train()
    hf.replace(model, layers=[1], backend="eager")
    assert [name for name, _ in hf.modules(model)] == ["model.layers.1.self_attn"]
    attn = model.model.layers[1].self_attn.attn
    assert attn.backend == "eager"
    assert attn.training
    assert model.training
    hf.replace(model)
    assert len(hf.modules(model)) == 2
    assert model.model.layers[1].self_attn.attn is attn


def test_dropout_is_carried_over():
    model = hf.replace(small("llama", attention_dropout=0.25))
    assert {attn.dropout for _, attn in hf.modules(model)} == {0.25}
    bert = hf.replace(small("bert", attention_probs_dropout_prob=0.125))
    assert {attn.dropout for _, attn in hf.modules(bert)} == {0.125}
    gpt2 = hf.replace(small("gpt2", resid_pdrop=0.5)).train()
    assert not torch.equal(gpt2.transformer.h[0].attn(torch.ones(1, 3, 32).double())[0],
                           gpt2.transformer.h[0].attn(torch.ones(1, 3, 32).double())[0])  # fmt: skip


def test_a_family_of_ones_own():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(32, 96, bias=False)
            self.out = torch.nn.Linear(32, 32, bias=False)

        def forward(self, hidden_states, attention_mask=None, **_):
            q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in self.w(hidden_states).chunk(3, -1))
            mask = None if attention_mask is None else attention_mask
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            return self.out(y.transpose(1, 2).flatten(2)), None

    def read(module, layer):
        assert layer is model.model.layers[seen[0]]
        seen[0] += 1
        q, k, v = module.w.weight.chunk(3)
        attn = attnzoo.GroupedQueryAttention(32, 4, rope=None, device="meta")
        return attn, {
            "q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": module.out.weight
        }  # fmt: skip

    seen = [0]
    model = small("llama")
    for layer in model.model.layers:
        layer.self_attn = Mine().double()
    ids, left = ids_and_padding()
    expected = model(ids, attention_mask=left).logits
    with pytest.raises(ValueError, match="must contain attention of a known class"):
        hf.replace(model)
    hf.register_family("Mine", read)
    try:
        hf.replace(model)
        found = model(ids, attention_mask=left).logits
        assert (found - expected)[left.bool()].abs().max() < 1e-10
        with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\.self_attn': Mine has no way back"):
            hf.restore(model)
    finally:
        del families.FAMILIES["Mine"]
