"""What replaced layers see where transformers makes no mask, and where it packs documents."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo.hugging_face import families
from attnzoo.hugging_face.masks import reads_pairs_alone
from tests.hugging_face.small import small
from tests.zoo import MECHANISMS

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(ids, **options).logits


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # transformers has norms and tables in float32


# Causality


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek-v3-half", "bert"])
def test_a_call_says_whether_it_is_causal(name):
    model = small(name)
    new = hf.replace(copy.deepcopy(model))
    other = name == "bert"
    difference = logits(new, is_causal=other) - logits(new)
    assert difference.abs().max() > 1e-2
    for options in ({"use_cache": False}, {}, {"attention_mask": torch.ones_like(IDS)}):
        assert_same(logits(new, is_causal=other, **options), logits(model, is_causal=other, **options))


def test_the_configuration_and_the_layer_say_whether_a_call_is_causal():
    model = small("llama")
    new = hf.replace(copy.deepcopy(model))
    for each in (model, new):
        each.config.is_causal = False
    assert_same(logits(new), logits(model))
    for each in (model, new):
        del each.config.is_causal
        each.model.layers[0].self_attn.is_causal = False
    assert_same(logits(new), logits(model))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_cached_call_is_not_causal_either(fixed):
    model = small("llama")
    new = hf.replace(copy.deepcopy(model))
    outputs = []
    for each in (model, new):
        if fixed:
            past = transformers.StaticCache(each.config, max_cache_len=20)
        else:
            past = transformers.DynamicCache(config=each.config)
        logits(each, IDS[:, :5], past_key_values=past)
        # transformers lets such a call see keys of a fixed cache that are not written yet, so it gets a mask there.
        options = {"attention_mask": torch.ones(1, 12)} if fixed and each is model else {}
        outputs.append(logits(each, IDS[:, 5:], past_key_values=past, is_causal=False, **options))
    assert_same(outputs[1], outputs[0])


def converted(make, name="llama", **options):
    torch.manual_seed(0)
    model = small(name, **options)
    hf.convert(model, lambda attn, *_: make(attn.embed_dim).double())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            MECHANISMS["mta"],
            {"is_causal": False},
            "is_causal must be True for this MultiTokenAttention because no",
        ),
        (MECHANISMS["linear"], {"is_causal": False}, "is_causal must be True for this LinearAttention because no mask"),
        (
            lambda E: attnzoo.GroupedQueryAttention(E, 4, 2, sliding_window=3),
            {"is_causal": False},
            "is_causal must be True for this GroupedQueryAttention with a sliding_window of its own, got False",
        ),
        (
            lambda E: attnzoo.GroupedQueryAttention(E, 4, 2, causal=False),
            {"use_cache": True},
            "is_causal must be False for this GroupedQueryAttention with past_key_values, .*: use_cache=False",
        ),
    ],
)
def test_causality_that_no_mask_can_say_is_refused(make, options, message):
    model = converted(make)
    with pytest.raises(ValueError, match=message):
        logits(model, **options)


def test_layers_are_compared_without_padding_too(monkeypatch):
    model = small("llama")
    right = families.FAMILIES["LlamaAttention"]

    def read(module, layer):
        attn, state = right.read(module, layer)
        attn.causal = False
        # Where the class does not say it, transformers' kernels are causal, and masks of padded rows hide the mistake.
        del module.is_causal
        return attn, state

    monkeypatch.setitem(families.FAMILIES, "LlamaAttention", right._replace(read=read))
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn': attnzoo computes another function"):
        hf.replace(model)


# Packing

POSITIONS = torch.cat([torch.arange(5), torch.arange(7)])[None]
TELLING = {
    "mae": MECHANISMS["mae"],
    "rcmha": MECHANISMS["rcmha"],
    "selective": MECHANISMS["selective"],
    "forgetting-pro": MECHANISMS["forgetting-pro"],
    "mta": MECHANISMS["mta"],
    "linear": MECHANISMS["linear"],
    "mhla": MECHANISMS["mhla"],
    "mgk-position": lambda E: attnzoo.MixtureOfGaussianKeysAttention(E, 4, 2, prior="position", max_positions=16),
    "window and sinks": lambda E: attnzoo.GroupedQueryAttention(E, 4, 2, sliding_window=3, sink_tokens=2),
    "gqa": MECHANISMS["gqa"],
    "kha": MECHANISMS["kha"],
    "moh": MECHANISMS["moh"],
}


@pytest.mark.parametrize("name", TELLING)
def test_packed_documents_are_as_alone(name):
    model = converted(TELLING[name])
    packed = logits(model, position_ids=POSITIONS, use_cache=False)
    alone = [logits(model, part, use_cache=False) for part in IDS.split([5, 7], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_reads_pairs_alone_needs_no_packed_mask(name):
    torch.manual_seed(0)
    attn = MECHANISMS[name]().double().eval()
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if not reads_pairs_alone(attn):
        return
    document = torch.tensor([0] * 5 + [1] * 7)
    visible = (document[:, None] == document) & torch.ones(12, 12, dtype=torch.bool).tril()
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    positions = None if attn.rope is None else POSITIONS
    complete = attnzoo.masks.CompleteMask(visible[None, None], None, torch.ones(1, 12, dtype=torch.bool))
    packed = attn(x, mask=attnzoo.AttentionMask.packed([0, 5, 12]), positions=positions)
    torch.testing.assert_close(attn(x, mask=complete, positions=positions), packed)


def documents(lengths, padding=0):
    """transformers' mask of packed documents and padding on the right."""
    ends = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * padding)
    visible = (ends[:, None] == ends) & (ends >= 0)
    return visible.tril()[None, None]


@pytest.mark.parametrize("name", ["mae", "rcmha", "linear", "window and sinks"])
def test_documents_and_padding_in_one_mask(name):
    model = converted(TELLING[name])
    positions = torch.cat([torch.arange(4), torch.arange(5), torch.arange(3)])[None]
    mask = documents([4, 5], padding=3)
    packed = logits(model, position_ids=positions, attention_mask=mask, use_cache=False)
    alone = [logits(model, part, use_cache=False) for part in IDS[:, :9].split([4, 5], dim=1)]
    torch.testing.assert_close(packed[:, :9], torch.cat(alone, dim=1))


def test_documents_in_a_window_of_transformers():
    model = converted(MECHANISMS["mae"], "mistral")  # with a window of 6
    ids, positions = torch.arange(3, 23)[None], torch.cat([torch.arange(9), torch.arange(11)])[None]
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    alone = [logits(model, part, use_cache=False) for part in ids.split([9, 11], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_other_masks_of_documents_are_refused():
    model = converted(MECHANISMS["mae"])
    with pytest.raises(ValueError, match="must not separate documents in a cache for MixtureOfAttentiveExperts"):
        logits(model, attention_mask=documents([5, 7]), use_cache=True)
    mask = documents([5, 7])
    mask[..., 9, 1] = True
    with pytest.raises(ValueError, match="must hold causality, padding and packed documents alone for Mixture"):
        logits(model, attention_mask=mask, use_cache=False)


def of_one_head():
    """Causal in all heads but the last, which sees one key less."""
    visible = torch.ones(1, 4, 12, 12, dtype=torch.bool).tril()
    visible[:, 3, 9, 1] = False
    return visible


def without_itself():
    """No token but the first sees itself, which is not padding: later ones see it."""
    visible = torch.ones(12, 12, dtype=torch.bool).tril(-1)
    visible[0, 0] = True
    return visible[None, None]


@pytest.mark.parametrize("mask", [of_one_head(), without_itself()], ids=["of one head", "without itself"])
@pytest.mark.parametrize("name", ["linear", "mta", "mhla"])
def test_masks_that_only_look_like_padding_are_refused(name, mask):
    model = converted(MECHANISMS[name], max_position_embeddings=48)
    with pytest.raises(ValueError, match="must hold causality, padding and packed documents alone for "):
        logits(model, attention_mask=mask, use_cache=False)
