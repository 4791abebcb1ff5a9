"""Windows that begin anywhere, attention across documents, and masks only where a document begins inside a row."""

import numpy as np
import pytest
import torch

import attnzoo
from attnzoo_recipes.data.module import Blocks, TextDataModule
from attnzoo_recipes.training import Pretraining


@pytest.fixture
def data(corpus_file, tmp_path):
    def made(**options):
        return TextDataModule(
            source="text", files=[str(corpus_file)], unit="line", cache_dir=str(tmp_path / "data"), val_fraction=0.2,
            **{"block_size": 32, "batch_size": 4, **options},
        )  # fmt: skip

    return made


def drawn(module, count):
    batches = iter(module.train_dataloader())
    return [next(batches) for _ in range(count)]


def test_random_windows_begin_anywhere_and_follow_from_their_number(data):
    module = data(windows="random")
    tokens = module.packed.tokens("train").astype(np.int64)
    first, again = drawn(module, 30), drawn(data(windows="random"), 30)
    starts = torch.cat([batch["index"] for batch in first])
    assert len(set((starts % 32).tolist())) > 20
    assert len(starts.unique()) == 120, "drawn without replacement"
    assert int(starts.max()) > len(tokens) * 0.9
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
        for row, target, start in zip(one["tokens"], one["targets"], one["index"].tolist(), strict=True):
            assert row.tolist() == tokens[start : start + 32].tolist()
            assert target.tolist() == tokens[start + 1 : start + 33].tolist()


def test_the_last_window_ends_with_the_last_token():
    windows = Blocks(np.arange(100), 10, 256, stride=1)
    assert len(windows) == 90
    assert windows.__getitems__([89])["targets"][0, -1] == 99
    assert len(Blocks(np.arange(100), 10, 256)) == 9
    assert len(Blocks(np.arange(10), 10, 256)) == len(Blocks(np.arange(10), 10, 256, stride=1)) == 0


def test_validation_keeps_its_blocks(data):
    sets = [
        [batch["tokens"] for batch in data(windows=windows).val_dataloader()[0]] for windows in ("blocks", "random")
    ]
    assert torch.equal(torch.cat(sets[0]), torch.cat(sets[1]))


def test_boundaries_are_given_only_where_a_document_begins_inside_a_row():
    tokens = np.array([9, 1, 2, 3, 9, 4, 5, 6, 7, 8, 1, 2, 3, 4, 9, 5, 6])
    whole = Blocks(tokens, 4, 9).__getitems__([0, 1, 2])
    assert "cu_seqlens" not in whole
    inside = Blocks(tokens, 4, 9).__getitems__([1, 3])
    assert inside["cu_seqlens"].tolist() == [0, 4, 6, 8]
    assert "cu_seqlens" not in Blocks(tokens, 4, 9, crossing=True).__getitems__([1, 3])


def test_without_a_border_attention_is_plainly_causal(monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **options):
        seen.append((options.get("is_causal"), options.get("attn_mask")))
        return original(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    module = Pretraining(lambda width: attnzoo.MultiHeadAttention(width, 4), vocab_size=10, embed_dim=32)
    module.configure_model()
    module.compile_model = False
    tokens = np.array([9, 1, 2, 3, 9, 4, 5, 6, 7, 8, 1, 2, 3, 4, 9, 5, 6])
    for rows, crossing in (([0, 1], False), ([3], True), ([3], False)):
        seen.clear()
        module._hidden(Blocks(tokens, 4, 9, crossing=crossing).__getitems__(rows))
        masks = {mask is not None for _, mask in seen}
        causal = {bool(is_causal) for is_causal, _ in seen}
        if rows == [3] and not crossing:
            assert causal <= {False}
        else:
            assert (causal, masks) == ({True}, {False})


def test_a_mask_without_borders_changes_nothing(data):
    torch.manual_seed(0)
    module = Pretraining(lambda width: attnzoo.MultiHeadAttention(width, 4), vocab_size=257, embed_dim=32)
    module.configure_model()
    batch = {"tokens": torch.randint(0, 255, (3, 32)), "targets": torch.randint(0, 255, (3, 32))}
    plain = module._hidden(batch)
    masked = module._hidden({**batch, "cu_seqlens": torch.tensor([0, 32, 64, 96], dtype=torch.int32)})
    torch.testing.assert_close(plain, masked, atol=1e-5, rtol=1e-5)


def test_attention_crosses_documents_by_option(data):
    assert any("cu_seqlens" in batch for batch in drawn(data(), 5))
    assert not any("cu_seqlens" in batch for batch in drawn(data(cross_documents=True), 5))


def test_a_checkpoint_of_other_windows_is_refused(data):
    state = data().state_dict()
    with pytest.raises(ValueError, match="windows was blocks, now random"):
        data(windows="random").load_state_dict(state)
    del state["windows"]
    data().load_state_dict(state)
    with pytest.raises(ValueError, match="windows must be blocks or random, got 'all'"):
        data(windows="all")
