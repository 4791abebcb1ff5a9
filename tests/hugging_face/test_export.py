"""Runs of the recipe as Hugging Face models."""

import functools
import json
from contextlib import nullcontext

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo_recipes.data.tokenizers import DOCUMENT, BpeTokenizer, ByteTokenizer
from attnzoo_recipes.export import hugging_face_tokenizer, to_hugging_face
from attnzoo_recipes.feed_forward import FeedForward, MultiHeadMixtureOfExperts, SwiGLU
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.sampling import generate
from tests.hugging_face.small import lifted
from tests.zoo import MECHANISMS

IDS = torch.randint(0, 29, (2, 9), generator=torch.Generator().manual_seed(0))
BIASED = functools.partial(FeedForward, activation="swiglu", bias=True)


def decoder(attention, **options):
    torch.manual_seed(0)
    return DecoderLM(29, attention, **{"embed_dim": 32, "num_layers": 2, "init_std": 0.3} | options).double().eval()


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism(name):
    lm = decoder(MECHANISMS[name])
    grouped_products = name == "moa"  # which take float64 for float32 where that is lifted
    with nullcontext() if grouped_products else lifted():
        model = to_hugging_face(lm, max_length=48)
        assert (model(IDS).logits - lm(IDS)).abs().max() < (1e-5 if grouped_products else 1e-10)
        expected = torch.cat([IDS, generate(lm, IDS, 8, temperature=0)], 1)
        for cached in (True, False):
            made = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=cached)
            assert torch.equal(made, expected)
    grouped = name in ("mha", "mqa", "gqa")
    assert type(model).__name__ == ("LlamaForCausalLM" if grouped else "AttnzooLlamaForCausalLM")


LLAMAS = {
    "head width": {"head_dim": 12},
    "biases": {"bias": True},
    "theta": {"rope": attnzoo.Rotary(theta=500.0)},
    "dropout": {"dropout": 0.25},
}
OTHERS = {
    "no rotation": {"rope": None},
    "partial rotation": {"rope": attnzoo.Rotary(dim=4)},
    "interleaved": {"rope": attnzoo.Rotary(style="interleaved")},
    "window": {"sliding_window": 4},
    "softcap": {"logit_softcap": 2.0},
    "sink": {"sink": "learned"},
    "norm": {"qk_norm": True},
    "scale": {"scale": 0.1},
    "value width": {"v_head_dim": 6},
    "one bias": {"bias": True, "o_bias": False},
}


@pytest.mark.parametrize("options", [*LLAMAS.values(), *OTHERS.values()], ids=[*LLAMAS, *OTHERS])
def test_a_plain_llama_where_a_llama_is_the_same(options):
    lm = decoder(functools.partial(GroupedQueryAttention, num_heads=4, num_kv_heads=2, **options))
    with lifted():
        model = to_hugging_face(lm)
        assert (model(IDS).logits - lm(IDS)).abs().max() < 1e-10
    plain = options in LLAMAS.values()
    assert type(model) is transformers.LlamaForCausalLM or not plain
    assert model.config.model_type == ("llama" if plain else "attnzoo")
    assert plain or set(model.config.attnzoo_layers) == {"layers.0.self_attn", "layers.1.self_attn"}
    if "dropout" in options:
        assert model.config.attention_dropout == 0.25


def test_layers_that_differ():
    lm = decoder(MECHANISMS["gqa"])
    lm.blocks[1].attn.prune_heads([0, 1])
    with lifted():
        model = to_hugging_face(lm)
        assert (model(IDS).logits - lm(IDS)).abs().max() < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": False},
        {"norm_eps": 1e-3},
        {"mlp_dim": 24},
        {"feed_forward": BIASED},
        {"feed_forward": FeedForward},
        {"feed_forward": functools.partial(FeedForward, hidden_dim=24, activation="swiglu")},
        {"dropout": 0.1},
    ],
)
@pytest.mark.parametrize("name", ["mha", "kha"])
def test_decoders_that_are_llamas(name, options):
    lm = decoder(MECHANISMS[name], **options)
    for norm in (module for module in lm.modules() if isinstance(module, torch.nn.RMSNorm)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    with lifted():
        model = to_hugging_face(lm)
        assert (model(IDS).logits - lm(IDS)).abs().max() < 1e-10
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": True}, "got parallel branches in block 0"),
        ({"feed_forward": None}, "got no feed-forward layer in block 0"),
        ({"feed_forward": functools.partial(FeedForward, activation="gelu")}, "of depth 2 with gelu in block 0"),
        ({"feed_forward": functools.partial(FeedForward, depth=3)}, "of depth 3 with swiglu in block 0"),
        ({"feed_forward": functools.partial(FeedForward, depth=1)}, "of depth 1 with gelu in block 0"),
        ({"feed_forward": MultiHeadMixtureOfExperts}, "got a MultiHeadMixtureOfExperts in block 0"),
        ({"sparse_feed_forward": MultiHeadMixtureOfExperts}, "got a MultiHeadMixtureOfExperts in block 1"),
        ({"sparse_feed_forward": functools.partial(SwiGLU, mlp_dim=24)}, "another feed-forward layer .* in block 1"),
    ],
)
def test_decoders_that_are_no_llamas(options, message):
    lm = decoder(MECHANISMS["mha"], **options)
    with pytest.raises(ValueError, match=f"lm must have attention and then a gated feed-forward layer.*{message}"):
        to_hugging_face(lm)


class Own(attnzoo.MultiHeadAttention):
    def __init__(self, embed_dim):
        super().__init__(embed_dim, 4)


def test_attention_of_a_users_own_is_refused():
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.self_attn' cannot be saved: .*\.Own"):
        to_hugging_face(decoder(Own))


TEXTS = ("the cat\n  sat é € 😀 \x00 don't\r\n", "", " a", "日本語", "x" * 50)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: BpeTokenizer.train(iter(["the cat sat on a mat"] * 9), 290)])
def test_tokenizers(make, tmp_path):
    tokenizer = make()
    hugging_face_tokenizer(tokenizer, 77).save_pretrained(tmp_path)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(read) == tokenizer.vocab_size
    assert read.model_max_length == 77
    assert (read.bos_token, read.eos_token, read.eos_token_id) == (DOCUMENT, DOCUMENT, tokenizer.document_id)
    for text in TEXTS:
        ids = read(text)["input_ids"]
        assert ids == [tokenizer.document_id, *tokenizer.encode(text)]
        assert read(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert read.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_with_gaps_is_refused():
    trained = json.loads(BpeTokenizer.train(iter(["the cat sat on a mat"] * 9), 290).to_dict()["serialized"])
    trained["added_tokens"] = []
    vocabulary = trained["model"]["vocab"]
    del vocabulary[DOCUMENT]
    with pytest.raises(ValueError, match="tokenizer must number its tokens without gaps"):
        hugging_face_tokenizer(BpeTokenizer(json.dumps(trained)))
