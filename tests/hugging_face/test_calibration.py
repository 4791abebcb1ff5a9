"""What calibration reads and keeps."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo.hugging_face as hf
from attnzoo.conversion import InputStatistics
from attnzoo.hugging_face.calibration import calibrate, mean_loss
from tests.hugging_face.small import small

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def ids(rows=2, length=9, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def replaced():
    model = hf.replace(small("llama"), verify=False)
    return model, dict(hf.modules(model))


def inputs_of(model, batch):
    """The inputs of the attention layers."""
    found = {}
    for name, attn in hf.modules(model):
        attn.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0].detach()))
    model(**batch)
    return found


def test_statistics_are_those_of_the_layers_inputs():
    model, sources = replaced()
    batches = [{"input_ids": ids(seed=seed)} for seed in range(3)]
    statistics, kept = calibrate(model, sources, batches, pair_norms=True)
    assert kept == []
    for name in NAMES:
        expected = InputStatistics(32, sources[name])
        for batch in batches:
            expected.update(inputs_of(model, batch)[name])
        assert statistics[name].tokens == 54
        torch.testing.assert_close(statistics[name].moment, expected.moment)
        for found, norms in zip(statistics[name].pair_norms, expected.pair_norms, strict=True):
            torch.testing.assert_close(found, norms)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_tokens_count_in_nothing(side):
    model, sources = replaced()
    tokens, pad = ids(1, 6), torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pad, tokens] if side == "left" else [tokens, pad], dim=1)
    mask = (padded > 0).long()
    plain, _ = calibrate(model, sources, [tokens], pair_norms=False)
    for batch in ((padded, mask), {"input_ids": padded, "attention_mask": mask}):
        found, _ = calibrate(model, sources, [batch], pair_norms=False)
        for name in NAMES:
            assert found[name].tokens == 6
            torch.testing.assert_close(found[name].moment, plain[name].moment, atol=1e-5, rtol=1e-4)


def test_batches_are_read_once_and_memory_does_not_grow():
    model, sources = replaced()
    read = []

    def stream(count):
        for seed in range(count):
            read.append(seed)
            yield ids(seed=seed)

    sizes = []
    for count in (2, 20):
        read.clear()
        statistics, kept = calibrate(model, sources, stream(count), pair_norms=True, kept_tokens=20)
        assert read == list(range(count))
        assert len(kept) == 2
        sizes.append([one._sums.numel() + sum(n.numel() for n in one._norms) for one in statistics.values()])
        assert all(one.tokens == count * 18 for one in statistics.values())
    assert sizes[0] == sizes[1]


def test_the_model_is_left_as_it_was():
    model, sources = replaced()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, sources, [ids()], pair_norms=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for name in NAMES for module in [model.get_submodule(name)])
    with pytest.raises(IndexError):
        calibrate(model, sources, [torch.full((1, 4), 1000)], pair_norms=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for name in NAMES for module in [model.get_submodule(name)])


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ([], "calib must hold at least one batch with a token, got none"),
        ([torch.zeros(2, 0, dtype=torch.long)], "calib must hold at least one batch with a token, got none"),
        (["text"], r"calib must hold token ids \(B, T\), mappings or pairs \(token ids, mask\), got str"),
        ([torch.randn(2, 3)], r"calib must hold token ids \(B, T\)"),
        ([torch.zeros(3, dtype=torch.long)], r"calib must hold token ids \(B, T\)"),
        ([torch.randn(2, 3)], "got a torch.float32 tensor of 2 dimensions"),
        ([{"input_ids": [[1, 2]]}], r"calib must hold tensors as input_ids, got \[\[1, 2\]\]"),
        ([(ids(), ids())], r"calib must have masks of 0 and 1 in the shape of the ids \("),
        ([(ids(), torch.ones(1, 2))], r"calib must have masks of 0 and 1 in the shape of the ids \("),
    ],
)
def test_what_calibration_cannot_read_is_refused(calib, message):
    with pytest.raises(ValueError, match=message):
        calibrate(*replaced(), calib, pair_norms=False)


def test_the_mean_loss_is_transformers_own():
    model, _ = replaced()
    batch = {"input_ids": ids()}
    torch.testing.assert_close(
        mean_loss(model, [batch]), float(model(**batch, labels=ids()).loss.detach()), rtol=1e-5, atol=0
    )
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids()], dim=1)
    mask = (padded > 0).long()
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3] = -100
    expected = model(input_ids=padded, attention_mask=mask, labels=labels).loss
    assert mean_loss(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
    with pytest.raises(ValueError, match="model must return logits of token ids to have a loss, got a"):
        mean_loss(model.model, [batch])
    with pytest.raises(ValueError, match="batches must hold a token to predict, got none"):
        mean_loss(model, [])
