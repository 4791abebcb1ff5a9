"""Order, splits, token files and tokenizers."""

import json
from collections import Counter
from math import log2

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnzoo_recipes.data import packing
from attnzoo_recipes.data.corpus import Corpus
from attnzoo_recipes.data.module import TextDataModule, boundaries
from attnzoo_recipes.data.order import EndlessBatches, PaddedBatches, permuted
from attnzoo_recipes.data.packing import PackedCorpus, pack, split_of
from attnzoo_recipes.data.tokenizers import DOCUMENT, BpeTokenizer, ByteTokenizer, from_dict


def take(sampler, count):
    batches = iter(sampler)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 4096, 4097])
def test_the_order_is_a_permutation(size):
    assert sorted(permuted(np.arange(size), size, seed=3)) == list(range(size))


def test_the_order_depends_on_the_seed_and_looks_random():
    first, second = (permuted(np.arange(2000), 2000, seed) for seed in (0, 1))
    assert (first == second).mean() < 0.01
    assert (first == np.arange(2000)).mean() < 0.01
    assert abs(np.corrcoef(np.arange(2000), first)[0, 1]) < 0.1


def test_each_pass_draws_every_block_once_and_in_another_order():
    drawn = np.concatenate(take(EndlessBatches(12, 4, seed=0), 6))
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert list(drawn[:12]) != list(drawn[12:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one(world_size):
    alone = take(EndlessBatches(50, 8, seed=1), 20)
    shared = [take(EndlessBatches(50, 8, 1, 0, rank, world_size), 20) for rank in range(world_size)]
    assert [[index for shares in shared for index in shares[i]] for i in range(20)] == alone


def test_the_order_continues_after_any_number_of_samples():
    assert take(EndlessBatches(50, 8, seed=1), 20)[13:] == take(EndlessBatches(50, 8, seed=1, start=13 * 8), 7)


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_reads_every_block_once_with_equally_many_batches(world_size):
    parts = [list(PaddedBatches(21, 4, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {6}
    assert sorted(i for part in parts for batch in part for i in batch if i >= 0) == list(range(21))


def packed(corpus_file, folder, tokenizer="byte", **options):
    corpus = Corpus("text", (str(corpus_file),), unit="line")
    return pack(corpus, tokenizer, options.get("vocab_size", 300), 0.2, 0.2, folder)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_token_files_hold_every_document_once_in_its_split(tokenizer, corpus_file, tmp_path):
    found = packed(corpus_file, tmp_path, tokenizer)
    lines = corpus_file.read_text().splitlines()
    for split in packing.SPLITS:
        ids = found.tokens(split).tolist()
        starts = [i for i, token in enumerate(ids) if token == found.tokenizer.document_id]
        texts = [found.tokenizer.decode(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
        assert texts == [line for line in lines if split_of(line, 0.2, 0.2) == split]
        counts = found.meta["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)


def test_entropies_are_those_of_the_text(corpus_file, tmp_path):
    found = packed(corpus_file, tmp_path)
    lines = [line for line in corpus_file.read_text().splitlines() if split_of(line, 0.2, 0.2) == "val"]
    single, pairs, contexts = Counter(), Counter(), Counter()
    for line in lines:
        for before, letter in zip(["start", *line], line, strict=False):
            single[letter] += 1
            pairs[before, letter] += 1
            contexts[before] += 1
    total = sum(single.values())
    unigram = -sum(n * log2(n / total) for n in single.values()) / total
    bigram = -sum(n * log2(n / contexts[before]) for (before, _), n in pairs.items()) / total
    assert found.meta["splits"]["val"]["unigram_bits_per_byte"] == pytest.approx(unigram, rel=1e-12)
    assert found.meta["splits"]["val"]["bigram_bits_per_byte"] == pytest.approx(bigram, rel=1e-12)


def test_token_files_are_made_once_and_anew_for_other_content(corpus_file, tmp_path):
    first = packed(corpus_file, tmp_path)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    again = packed(corpus_file, tmp_path)
    assert (again.folder / "train.bin").stat().st_mtime_ns == written
    changed = tmp_path / corpus_file.name
    changed.write_text(corpus_file.read_text() + "\nmore")
    assert packed(changed, tmp_path).folder != first.folder
    assert packed(corpus_file, tmp_path, "bpe").folder != first.folder


def test_an_interrupted_build_leaves_nothing(corpus_file, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, "save_tokenizer", fail)
    with pytest.raises(KeyboardInterrupt):
        packed(corpus_file, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parquet_and_json_hold_the_same_documents(corpus_file, tmp_path):
    from datasets import Dataset

    lines = corpus_file.read_text().splitlines()
    rows = Dataset.from_dict({"body": lines})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    for source, name in (("parquet", "rows.parquet"), ("json", "rows.jsonl")):
        corpus = Corpus(source, (str(tmp_path / name),), text_field="body", max_documents=50)
        assert list(corpus.documents()) == lines[:50]


def test_the_standard_library_is_a_corpus():
    corpus = Corpus(max_documents=20)
    texts = list(corpus.documents())
    assert len(texts) == 20
    assert sum(map(len, texts)) > 10_000
    assert len(corpus.paths()) > 300


def test_batches_are_blocks_with_the_boundaries_of_documents(corpus_file, tmp_path):
    data = TextDataModule(
        source="text",
        files=[str(corpus_file)],
        unit="line",
        block_size=64,
        batch_size=3,
        val_fraction=0.2,
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ids = data.packed.tokens("train")
    for tokens, targets, index in zip(batch["tokens"], batch["targets"], batch["index"].tolist(), strict=True):
        assert tokens.tolist() == ids[index * 64 : index * 64 + 64].tolist()
        assert targets.tolist() == ids[index * 64 + 1 : index * 64 + 65].tolist()
    expected = [b * 64 + t for b in range(3) for t in range(64) if t == 0 or batch["tokens"][b, t] == 256]
    assert batch["cu_seqlens"].tolist() == [*expected, 192]
    assert batch["cu_seqlens"].dtype == torch.int32


class Reader(L.LightningModule):
    """Notes which blocks it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.read = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.read.append(batch["index"].tolist())
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        """Training alone is looked at."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")
def test_a_trainer_continues_its_data_and_another_begins_them(corpus_file, tmp_path):
    def trainer(steps):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return L.Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, **quiet)

    data = TextDataModule(
        source="text", files=[str(corpus_file)], unit="line", block_size=16, batch_size=3, cache_dir=str(tmp_path)
    )
    expected = take(EndlessBatches(len(data.blocks("train")), 3, seed=0), 6)
    reader, first = Reader(), trainer(2)
    first.fit(reader, data)
    first.fit_loop.epoch_loop.max_steps = 4
    first.fit(reader, data)
    assert reader.read == expected[:4]
    assert data.state_dict()["samples"] == 12
    first.save_checkpoint(tmp_path / "twice.ckpt")
    for path, steps, read in ((tmp_path / "twice.ckpt", 6, expected[4:]), (None, 2, expected[:2])):
        reader = Reader()
        trainer(steps).fit(reader, data, ckpt_path=path)
        assert reader.read == read


def test_a_row_that_only_fills_a_batch_is_not_predicted(corpus_file, tmp_path):
    data = TextDataModule(source="text", files=[str(corpus_file)], unit="line", block_size=16, cache_dir=str(tmp_path))
    batch = data.blocks("train").__getitems__([0, -1])
    assert (batch["targets"][1] == -100).all()
    assert (batch["targets"][0] >= 0).all()
    assert boundaries(batch["tokens"], 256)[-1] == 32


@pytest.fixture(scope="module")
def bpe(corpus_file):
    return BpeTokenizer.train(iter(corpus_file.read_text().splitlines()), 320)


@settings(deadline=None, derandomize=True)
@given(text=st.text())
def test_tokenizers_return_every_text_and_know_its_bytes(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.encode_batch([text])[0].tolist() == ids


def test_the_document_token_cannot_be_written_in_a_text(bpe):
    text = f"a{DOCUMENT}b {DOCUMENT}"
    ids = bpe.encode(text)
    assert bpe.document_id not in ids
    assert bpe.decode(ids) == text
    assert bpe.encode_batch([text])[0].tolist() == ids


def test_tokenizers_survive_their_description(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.encode("the cat") == tokenizer.encode("the cat")
        assert again.vocab_size == tokenizer.vocab_size


def test_a_word_level_tokenizer_is_refused():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        BpeTokenizer(words.to_str())


def test_token_files_open_again(corpus_file, tmp_path):
    found = packed(corpus_file, tmp_path, "bpe")
    again = PackedCorpus.open(found.folder)
    assert again.meta == found.meta
    assert np.array_equal(again.tokens("train"), found.tokens("train"))
