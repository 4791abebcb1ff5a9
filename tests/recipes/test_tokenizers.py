"""Tokenizers return every text unchanged and know its bytes, or are refused."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from attnzoo_recipes.data.tokenizers import DOCUMENT, BpeTokenizer, from_dict, load_tokenizer

TEXTS = [
    "",
    "Hello",
    "\u1112\u1161\u11ab",
    "a <mask> b",
    "x<\uff5cend\uff5c>y",
    "<é>",
    f"a{DOCUMENT}b",
    "日本 🙂 ÿ",
    "  two  ",
]


def byte_level(normalizer=None, pre_tokenizer=None, decoder=None, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["some text and some more text"], trainer)
    return tokenizer


def without_byte(letter):
    described = json.loads(byte_level().to_str())
    del described["model"]["vocab"][letter]
    described["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(described))


def spread_out(step=3):
    """A vocabulary whose ids are 0, step, 2 step, ..."""
    described = json.loads(byte_level().to_str())
    described["model"]["vocab"] = {token: step * i for token, i in described["model"]["vocab"].items()}
    return Tokenizer.from_str(json.dumps(described))


def with_added(*tokens):
    tokenizer = byte_level()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def with_special(*tokens):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def split_by(behaviour):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), behaviour), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


KEEPS = {
    "plain": byte_level(),
    "no normalizers": byte_level(normalizers.Sequence([])),
    "split": byte_level(pre_tokenizer=split_by("isolated")),
    "special tokens that are not ASCII": with_special("<\uff5cend\uff5c>", "<é>", "ÿ", "日本"),
    "added tokens": with_added("<mask>", "some text", "été"),
    "gaps": spread_out(),
    "a wide gap": spread_out(50),
}

CHANGES = {
    "lowercase": byte_level(normalizers.Lowercase()),
    "NFC": byte_level(normalizers.NFC()),
    "NFD": byte_level(normalizers.NFD()),
    "NFKC": byte_level(normalizers.NFKC()),
    "strip": byte_level(normalizers.Strip()),
    "replace": byte_level(normalizers.Replace("rare", "common")),
    "prepend": byte_level(normalizers.Sequence([normalizers.Prepend("x")])),
    "prefix space": byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "removed spaces": byte_level(pre_tokenizer=split_by("removed")),
    "no bytes": byte_level(pre_tokenizer=pre_tokenizers.Whitespace()),
    "an added token with the spelling of a byte": with_added("é"),
    "a byte is missing": without_byte("Ã"),
    "a rare byte is missing": without_byte("ô"),
    "strips on the left": with_added(AddedToken("<mask>", lstrip=True)),
    "strips on the right": with_special(AddedToken("<mask>", rstrip=True)),
}


@pytest.mark.parametrize("name", KEEPS)
def test_every_text_comes_back_with_its_bytes(name):
    tokenizer = BpeTokenizer(KEEPS[name].to_str())
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.document_id] == 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.document_id]) == text
        assert sizes[np.array(ids, dtype=int)].sum() == len(text.encode())
        assert tokenizer.document_id not in ids
        assert tokenizer.encode_batch([text])[0].tolist() == ids
    again = from_dict(tokenizer.to_dict())
    assert (again.vocab_size, again.document_id) == (tokenizer.vocab_size, tokenizer.document_id)


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_that_changes_texts_is_refused(name):
    with pytest.raises(ValueError, match=r"data\.tokenizer must be byte-level BPE, which returns every text unchanged"):
        BpeTokenizer(CHANGES[name].to_str())


def test_a_text_that_a_tokenizer_changes_is_refused_where_it_is_met():
    removes = pre_tokenizers.Sequence([
        pre_tokenizers.Split("rare word", "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    tokenizer = BpeTokenizer(byte_level(pre_tokenizer=removes).to_str())
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(ValueError, match="changes 'a rare word'"):
            encode("a rare word")


def test_gaps_have_ids_of_their_own_and_no_text():
    tokenizer = BpeTokenizer(spread_out().to_str())
    assert tokenizer.document_id == tokenizer.vocab_size - 1
    assert tokenizer.decode([1, 2]) == ""
    assert len(set(tokenizer.encode("some text"))) > 1


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "t.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"data\.tokenizer must be UTF-8 text, got .*t\.json"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("described", [{}, {"kind": "bpe"}, {"kind": "bpe", "serialized": 3}, {"kind": "words"}])
def test_a_broken_description_is_refused(described):
    with pytest.raises(ValueError, match="tokenizer kind must be byte or bpe"):
        from_dict(described)
