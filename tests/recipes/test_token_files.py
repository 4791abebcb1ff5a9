"""Ready token files and tokenizers as sources."""

import hashlib
import json
import pickle
import types

import numpy as np
import pytest

from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.module import MAIN, TextDataModule
from attnzoo_recipes.data.packing import open_tokens, pack
from attnzoo_recipes.data.tokenizers import BpeTokenizer, load_tokenizer

GPT2S_END = "<|endoftext|>"


@pytest.fixture
def packed(corpus_file, tmp_path):
    return pack(Corpus("text", (str(corpus_file),), unit="line"), "bpe", 300, 0.2, 0.1, tmp_path / "made")


@pytest.fixture
def nanogpt(corpus_file, tmp_path):
    """A folder of train.bin and val.bin, and the tokenizer.json, with GPT-2's token at the end of each document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[GPT2S_END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    lines = corpus_file.read_text().splitlines()
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "nano"
    folder.mkdir()
    end = tokenizer.token_to_id(GPT2S_END)
    for name, part in (("train", lines[:45]), ("val", lines[45:])):
        ids = [i for line in part for i in (*tokenizer.encode(line).ids, end)]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{name}.bin")
    return folder, tmp_path / "tokenizer.json", lines


def test_a_folder_of_the_recipe_is_a_source(packed):
    data = TextDataModule(source="tokens", files=[str(packed.folder)], block_size=16)
    for split in ("train", "val", "test"):
        assert np.array_equal(data.packed.tokens(split), packed.tokens(split))
    assert data.packed.key == packed.key
    assert data.tokenizer.to_dict() == packed.tokenizer.to_dict()


def test_a_tokenizer_that_was_trained_is_accepted_back(packed, corpus_file, tmp_path):
    corpus = Corpus("text", (str(corpus_file),), unit="line")
    for name in (packed.folder, packed.folder / "tokenizer.json"):
        again = pack(corpus, str(name), 0, 0.2, 0.1, tmp_path / "again")
        assert again.tokenizer.to_dict() == packed.tokenizer.to_dict()
        assert np.array_equal(again.tokens("train"), packed.tokens("train"))


def test_files_of_nanogpt_are_a_source(nanogpt):
    folder, tokenizer, lines = nanogpt
    data = TextDataModule(
        source="tokens", files=[str(folder)], tokenizer=str(tokenizer), document_token=GPT2S_END, block_size=16
    )
    packed, split = data.validation[MAIN]
    assert packed.tokenizer.decode(packed.tokens(split).tolist()) == "".join(lines[45:])
    assert data.packed.meta["splits"]["train"]["documents"] == 45
    assert data.packed.tokens("test").size == 3 * len(np.fromfile(folder / "train.bin", np.uint16)) // 60
    rows = data.blocks("train").__getitems__([0, 1, 2, 3])
    ends = (rows["tokens"] == data.tokenizer.document_id).flatten().nonzero().flatten().tolist()
    assert set(ends) <= set(rows["cu_seqlens"].tolist())


def test_the_end_of_one_file_is_for_validation(nanogpt):
    folder, tokenizer, _ = nanogpt
    ids = np.fromfile(folder / "train.bin", np.uint16)
    made = open_tokens(folder / "train.bin", str(tokenizer), GPT2S_END, (0.25, 0.125))
    parts = [made.tokens(split) for split in ("train", "val", "test")]
    assert np.array_equal(np.concatenate(parts), ids)
    assert [part.size for part in parts[1:]] == [len(ids) // 4, len(ids) // 8]
    assert made.key != open_tokens(folder / "train.bin", str(tokenizer), GPT2S_END, (0.25, 0.1)).key


def test_token_files_for_training_and_validation(nanogpt):
    folder, tokenizer, _ = nanogpt
    data = TextDataModule(
        source="tokens", files=[str(folder / "train.bin")], tokenizer=str(tokenizer), document_token=GPT2S_END,
        val_source="tokens", val_files=[str(folder / "val.bin")], test_fraction=0.0, block_size=16,
    )  # fmt: skip
    packed, split = data.validation[MAIN]
    assert np.array_equal(packed.tokens(split), np.fromfile(folder / "val.bin", np.uint16))
    assert np.array_equal(data.packed.tokens("train"), np.fromfile(folder / "train.bin", np.uint16))


def test_training_on_them(nanogpt, arguments, run, tmp_path):
    folder, tokenizer, _ = nanogpt
    words = [f"--data.files=['{folder}']", "--data.source=tokens", f"--data.tokenizer={tokenizer}",
             f"--data.document_token={GPT2S_END}", "--trainer.val_check_interval=2"]  # fmt: skip
    run(arguments("mha", *words))
    saved = read_checkpoint(tmp_path / "run")
    assert saved["attnzoo"]["tokenizer"]["document"] == GPT2S_END
    assert not (tmp_path / "data").exists(), "nothing is tokenised"


def test_other_content_is_another_corpus(nanogpt):
    folder, tokenizer, _ = nanogpt
    keys = set()
    for _ in range(2):
        keys.add(open_tokens(folder, str(tokenizer), GPT2S_END, (0.1, 0.1)).key)
    assert len(keys) == 1
    ids = np.fromfile(folder / "val.bin", np.uint16)
    ids[3] ^= 1
    ids.tofile(folder / "val.bin")
    keys.add(open_tokens(folder, str(tokenizer), GPT2S_END, (0.1, 0.1)).key)
    assert len(keys) == 2


def test_mistakes(nanogpt, packed, tmp_path):
    folder, tokenizer, _ = nanogpt
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    np.array([1, 2, 60_000], dtype=np.uint16).tofile(tmp_path / "large.bin")
    for name, got in (("odd", "3 bytes"), ("empty", "0 bytes"), ("large", "the id 60000")):
        with pytest.raises(ValueError, match=f"{name}.bin must hold ids below 301 of 2 bytes each, got {got}"):
            open_tokens(tmp_path / f"{name}.bin", str(tokenizer), None, (0.1, 0.1))
    with pytest.raises(ValueError, match=r"data.tokenizer must be the path of the tokens' tokenizer.json, or byte"):
        open_tokens(folder, "bpe", None, (0.1, 0.1))
    with pytest.raises(ValueError, match=r"data.files must name a folder with meta.json or train.bin"):
        open_tokens(tmp_path / "none", "byte", None, (0.1, 0.1))
    with pytest.raises(ValueError, match=r"data.document_token must be a token of the tokenizer, got 'none'"):
        load_tokenizer(tokenizer, "none")
    with pytest.raises(ValueError, match=r"data.files must name one folder or .bin file of tokens"):
        TextDataModule(source="tokens", files=["a", "b"])
    with pytest.raises(ValueError, match=r"data.document_token must be given for a tokenizer.json alone"):
        pack(Corpus(), "byte", 0, 0.1, 0.1, tmp_path, GPT2S_END)
    with pytest.raises(ValueError, match="must hold tokens of the training text's tokenizer, got another's"):
        TextDataModule(
            source="tokens", files=[str(folder)], tokenizer=str(tokenizer), val_source="tokens",
            val_files=[str(packed.folder)],
        ).prepare_data()  # fmt: skip


def test_a_document_token_cannot_be_written_in_a_text(nanogpt):
    _, path, _ = nanogpt
    tokenizer = load_tokenizer(path, GPT2S_END)
    assert isinstance(tokenizer, BpeTokenizer)
    ids = tokenizer.encode(f"a {GPT2S_END} b")
    assert tokenizer.document_id not in ids
    assert tokenizer.decode(ids) == f"a {GPT2S_END} b"
    assert tokenizer.token_bytes()[tokenizer.document_id] == 0


def test_hub_revisions_are_part_of_the_key(monkeypatch):
    import huggingface_hub

    class Api:
        def dataset_info(self, name, revision=None):
            if revision == "gone":
                raise OSError("offline")
            return type("Info", (), {"sha": f"commit of {revision}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *a, **options: asked.append(options["revision"]) or [{"text": "x"}]
    )
    for revision, commit in ((None, "commit of None"), ("v2", "commit of v2"), ("gone", "gone")):
        corpus = Corpus("hub", name="some/set", revision=revision)
        assert corpus.fingerprint()["revision"] == commit
        assert list(corpus.documents()) == ["x"]
        assert asked.pop() == commit
    with pytest.raises(ValueError, match=r"data.revision must be given for data.source hub alone, got 'v2' for text"):
        Corpus("text", ("x",), revision="v2")


def test_the_folder_of_a_tokenizer_is_read_as_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "byte"}))
    assert load_tokenizer(tmp_path).vocab_size == 257


def test_other_processes_take_the_word_of_the_first(corpus_file, tmp_path, monkeypatch):
    """Only the first process reads and hashes files."""
    options = {
        "source": "text", "files": [str(corpus_file)], "unit": "line", "cache_dir": str(tmp_path / "data"),
        "val_fraction": 0.2, "block_size": 16, "val_sets": {"same": {"source": "text", "files": [str(corpus_file)]}},
        "mixture": {"again": {"source": "text", "files": [str(corpus_file)], "unit": "line", "weight": 1}},
    }  # fmt: skip
    sent = []
    modules = [TextDataModule(**options) for _ in range(2)]
    for rank, module in enumerate(modules):
        strategy = types.SimpleNamespace(broadcast=lambda made: pickle.loads(sent[-1]) if made is None else made)
        module.trainer = types.SimpleNamespace(world_size=2, global_rank=rank, strategy=strategy)
    modules[0].prepare_data()
    modules[0].setup("fit")
    sent.append(pickle.dumps((modules[0].packed, modules[0]._mixed, modules[0]._evaluated)))

    def no_hashing(*arguments, **options):
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", no_hashing)
    modules[1].setup("fit")
    for name, (packed, split) in modules[1].validation.items():
        first, _ = modules[0].validation[name]
        assert np.array_equal(packed.tokens(split), first.tokens(split))
    assert modules[1].key == modules[0].key
    with pytest.raises(AssertionError, match="hashed again"):
        TextDataModule(**options).prepare_data()
