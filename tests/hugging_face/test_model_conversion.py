"""Whole models from one mechanism to another."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo
import attnzoo.hugging_face as hf
from attnzoo.conversion import mha2mla
from tests.hugging_face.small import FAMILIES, lifted, small

EXACT = {
    "kha": {"variant": "mlp_qkv"},
    "moh": {"num_shared_heads": 1, "num_routed_active": 3},
    "dcmha": {},
    "talking_heads": {},
    "gated": {},
}
"""Conversions with the function of the source, and their options."""
FIRST = "layer 'model.layers.0.self_attn': "
LATENT = {"rope_dim": 4, "rope_select": "high", "kv_rank": 20}


def ids(rows=2, length=9, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(count=6):
    return (ids(seed=seed) for seed in range(10, 10 + count))


def generated(model, **options):
    return model.generate(input_ids=ids(), max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("mechanism", EXACT)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_conversions_with_an_exact_start(mechanism, family):
    plain = {"gpt2": {"scale_attn_by_inverse_layer_idx": False}, "qwen2": {"layer_types": ["full_attention"] * 2}}
    with lifted():
        model = small(family, **plain.get(family, {}))
        expected = model(ids()).logits
        tokens = generated(model)
        report = hf.convert(model, mechanism, **EXACT[mechanism])
        torch.testing.assert_close(model(ids()).logits, expected, atol=1e-10, rtol=0)
        assert torch.equal(generated(model), tokens)
    assert [layer.index for layer in report.layers] == [0, 1]
    assert {type(attn).__name__ for _, attn in hf.modules(model)} == {layer.after for layer in report.layers}


REFUSED = {
    **{family: {"dcmha": "module must "} for family in ("gemma2", "gemma3", "gpt-oss", "gpt2", "olmo2")},
    **{f: dict.fromkeys(("dcmha", "gated"), "got MultiHeadLatent") for f in ("deepseek-v3", "deepseek-v3-half")},
}
"""What a family is not converted to, and a part of the reason."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_exactly_or_refused(family):
    with lifted():
        for mechanism in ("kha", "dcmha", "gated"):
            model = small(family)
            expected, before = model(ids()).logits, dict(model.named_modules())
            reason = REFUSED.get(family, {}).get(mechanism)
            if reason is None:
                hf.convert(model, mechanism, verify=False)
                assert [name for name, _ in hf.modules(model)]
            else:
                with pytest.raises(ValueError, match=f"layer '.*': .*{reason}"):
                    hf.convert(model, mechanism, verify=False)
                assert dict(model.named_modules()) == before
            torch.testing.assert_close(model(ids()).logits, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("weighting", ["weights", "activations", "two-sided"])
def test_latent_attention_of_full_rank_is_the_source(weighting):
    with lifted():
        model = small("llama")
        expected = model(ids()).logits
        report = hf.convert(model, "mla", calib=batches(), rope_dim=10, kv_rank=20, weighting=weighting)
        torch.testing.assert_close(model(ids()).logits, expected, atol=1e-9, rtol=0)
    assert [layer.latent.rank for layer in report.layers] == [20, 20]


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        *EXACT.items(),
        ("mla", {**LATENT, "weighting": "two-sided"}),
        ("gqa", {"num_kv_heads": 1}),
        ("gqa", {"num_kv_heads": 1, "mode": "mean"}),
    ],
)
def test_a_converted_model_decodes_as_it_computes(mechanism, options):
    model = small("llama")
    takes_calib = mechanism in ("mla", "gqa")
    hf.convert(model, mechanism, calib=batches() if takes_calib else None, **options)
    for how in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        if mechanism == "moh" and "num_beams" in how:
            continue
        cached = generated(model, **how)
        assert torch.equal(cached, generated(model, use_cache=False, num_beams=how.get("num_beams", 1)))


def test_statistics_from_one_pass_serve_all_layers():
    source, inputs = hf.replace(small("llama"), verify=False), {}
    for name, attn in hf.modules(source):
        attn.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    for batch in batches():
        source(batch)
    expected = {
        name: mha2mla(attn, calib=torch.cat(inputs[name]), weighting="two-sided", **LATENT)[0]
        for name, attn in hf.modules(source)
    }
    model = hf.replace(small("llama"), verify=False)
    report = hf.convert(model, "mla", calib=batches(), weighting="two-sided", **LATENT)
    x = torch.randn(2, 7, 32).double()
    for name, attn in hf.modules(model):
        torch.testing.assert_close(attn(x), expected[name](x), atol=1e-8, rtol=0)
    assert {layer.latent.weighting for layer in report.layers} == {"two-sided"}


def test_calibration_is_of_the_source_even_where_layers_were_replaced():
    with lifted():
        kept, plain = hf.replace(small("llama")), small("llama")
        for model in (kept, plain):
            hf.convert(model, "gqa", calib=batches(), num_kv_heads=1)
        torch.testing.assert_close(kept(ids()).logits, plain(ids()).logits, atol=1e-9, rtol=0)


def test_some_layers_alone():
    model = small("llama")
    expected = type(model.model.layers[0].self_attn)
    report = hf.convert(model, "kha", layers=[1])
    assert type(model.model.layers[0].self_attn) is expected
    assert [(layer.index, layer.name) for layer in report.layers] == [(1, "model.layers.1.self_attn")]
    hf.convert(model, "mla", layers=[0], rope_dim=10, kv_rank=20)
    assert [type(attn).__name__ for _, attn in hf.modules(model)] == [
        "MultiHeadLatentAttention", "KnockingHeadsAttention",
    ]  # fmt: skip


def test_ranks_by_spectra_share_one_budget():
    model = small("llama")
    with torch.no_grad():  # a layer of rank 3
        for linear in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj):
            u, s, vt = torch.linalg.svd(linear.weight)
            linear.weight.copy_(u[:, :3] * s[:3] @ vt[:3])
    uniform = hf.convert(copy.deepcopy(model), "mla", calib=batches(), **LATENT | {"kv_rank": 14})
    report = hf.convert(model, "mla", calib=batches(), rank_allocation="adaptive", **LATENT | {"kv_rank": 14})
    ranks = [layer.latent.rank for layer in report.layers]
    assert sum(ranks) == 28
    assert ranks[0] < 8 < ranks[1]
    assert report.cache_bytes_after == uniform.cache_bytes_after
    errors = [sum(layer.latent.rel_error**2 for layer in one.layers) for one in (report, uniform)]
    assert errors[0] < errors[1]


def test_the_key_weight_of_least_loss_is_taken():
    model = small("llama")
    options = {**LATENT, "kv_rank": 9, "weighting": "two-sided"}
    searched = copy.deepcopy(model)
    report = hf.convert(searched, "mla", calib=batches(), key_weight="search", **options)
    losses = report.chosen["losses"]
    assert list(losses) == [1.0, 2.0, 4.0]
    assert losses[report.chosen["key_weight"]] == min(losses.values()) < max(losses.values())

    def loss_of(model):
        return float(sum(model(batch, labels=batch).loss.detach() for batch in batches())) / 6

    assert loss_of(searched) == pytest.approx(min(losses.values()), rel=1e-5)
    for weight, loss in losses.items():
        single = copy.deepcopy(model)
        hf.convert(single, "mla", calib=batches(), key_weight=weight, **options)
        assert loss_of(single) == pytest.approx(loss, rel=1e-5)
    few = hf.convert(model, "mla", calib=batches(), key_weight=[0.5, 3], **options)
    assert list(few.chosen["losses"]) == [0.5, 3]


def test_a_function_of_ones_own():
    model, seen = small("llama"), []

    def change(attn, index, calib):
        seen.append((index, type(attn).__name__, None if calib is None else calib.tokens))
        if index == 0:
            return mha2mla(attn, calib=calib, **LATENT)
        return attnzoo.conversion.to_kha(attn)

    report = hf.convert(model, change, calib=batches(2))
    assert seen == [(0, "GroupedQueryAttention", 36), (1, "GroupedQueryAttention", 36)]
    assert report.mechanism == "custom"
    assert report.layers[0].latent.rank == 20
    assert report.layers[1].latent is None


def test_the_report_is_a_table_and_plain_types():
    model = small("llama", dtype=torch.float32)
    report = hf.convert(model, "mla", calib=batches(), weighting="two-sided", key_weight="search", **LATENT)
    assert json.loads(json.dumps(report.to_dict()))["cache_bytes_after"] == report.cache_bytes_after
    attn = hf.modules(model)[0][1]
    assert report.layers[0].cache_bytes_after == attn.cache_bytes_per_token(torch.float32) == 4 * (20 + 2 * 4)
    assert report.cache_bytes_before == 2 * 4 * 40
    assert report.params_after == sum(p.numel() for _, attn in hf.modules(model) for p in attn.parameters())
    table = str(report).splitlines()
    assert table[0] == f"key_weight: {report.chosen['key_weight']}"
    assert table[2].split() == ["layer", "from", "to", "cache", "bytes/token", "parameters", "rank", "error"]
    assert table[3].startswith("model.layers.0.self_attn  GroupedQueryAttention  MultiHeadLatentAttention  160 -> 112")
    assert table[-1].split()[:4] == ["all", "320", "->", "224"]


class Own(attnzoo.GroupedQueryAttention):
    """A mechanism that no folder could name."""

    @classmethod
    def of(cls, attn, _, __):
        return cls(attn.embed_dim, attn.num_heads)


@pytest.mark.parametrize(
    ("mechanism", "options", "message"),
    [
        ("mha", {}, "mechanism must be a function or one of gqa, mla, kha, moh, dcmha, gated, talking_heads, got"),
        (3, {}, "mechanism must be a function or one of .*, got 3"),
        ("mla", {"rank": 3}, "'mla' has no option 'rank', only rope_dim, kv_rank, "),
        ("kha", {"calib_": 3}, "'kha' has no option 'calib_', only variant, knock_q, knock_k, knock_v, knock_scope"),
        ("dcmha", {"device": "cpu"}, "'dcmha' has no option 'device', only "),
        ("gqa", {"num_kv_heads": "1"}, FIRST + "num_kv_heads must be an integer, got '1'"),
        ("gqa", {"num_kv_heads": 1, "calib": 5}, "calib must be an iterable of batches, or None, got 5"),
        ("gqa", {"num_kv_heads": 1, "calib": {"input_ids": 5}}, "calib must be an iterable of batches, or None, got"),
        ("gqa", {"num_kv_heads": 1, "layers": 5}, "layers must hold numbers from 0 to 1, or be None, got 5"),
        ("gqa", {"num_kv_heads": 1, "layers": "01"}, "layers must hold numbers from 0 to 1, got '0'"),
        ("gqa", {}, "'gqa' needs the option 'num_kv_heads', got none"),
        ("mla", {"kv_rank": 3}, "'mla' needs the option 'rope_dim', got kv_rank"),
        ("gqa", {"num_kv_heads": 1, "mode": "activations"}, "calib must be given to weigh by activations, got None"),
        ("mla", {**LATENT, "weighting": "two-sided"}, "calib must be given to weigh by activations, got None"),
        ("mla", {**LATENT, "rope_select": "2-norm"}, FIRST + "calib must be given with rope_"),
        ("mla", {**LATENT, "kv_rank": 99}, FIRST + "kv_rank must lie between 1 and .* = 32, got"),
        ("mla", {**LATENT, "rank_allocation": "best"}, "rank_allocation must be one of 'uniform', 'adaptive', got"),
        (
            "mla", {**LATENT, "rank_allocation": "adaptive", "svd": "split"},
            "rank_allocation 'adaptive' needs svd 'joint' and a kv_rank, got 'split' and 20",
        ),
        (
            "mla", {**LATENT, "rank_allocation": "adaptive", "kv_rank": None},
            "rank_allocation 'adaptive' needs svd 'joint' and a kv_rank, got 'joint' and None",
        ),
        ("mla", {**LATENT, "key_weight": "search"}, "key_weight must be a number without weighting 'two-sided' and"),
        ("mla", {**LATENT, "key_weight": "best"}, "key_weight must be a number, a list of numbers or 'search', got"),
        ("mla", {**LATENT, "key_weight": [1, -1]}, "key_weight must be positive, got -1"),
        ("gated", {"gate": "input"}, FIRST + "gate must be one of"),
        (lambda *_: None, {}, FIRST + "the function must return an attention module of width 32"),
        (Own.of, {}, "layer 'model.layers.0.self_attn' cannot be saved: attn must be a mechanism"),
        (
            lambda *_: attnzoo.LinearAttention(16, 4), {},
            FIRST + "the function must return an attention module of width 32, got a LinearAttention of width 16$",
        ),
        (attnzoo.LinearAttention, {}, "mechanism must be a name or a function .*, got the class LinearAttention$"),
        ("kha", {"knock_scope": "value"}, FIRST + "knock_scope needs grouped-tied attention, got 'value' with Grouped"),
        ("dcmha", {"rope": None}, FIRST + "rope must be that of module, Rotary.* for an equal layer, got None"),
        (
            "gqa", {"num_kv_heads": 1, "calib": [torch.tensor([[5, 67]])]},
            "calib must hold token ids from 0 to 66, got 5 to 67",
        ),
        (lambda *_: None, {"rank": 2}, "options must not be given with a function, got rank"),
    ],
)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(mechanism, options, message):
    model = small("llama")
    before = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cls, config = type(model), model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        hf.convert(model, mechanism, **options)
    assert dict(model.named_modules()) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (type(model), model.config.to_dict()) == (cls, config)


def test_an_error_in_a_search_leaves_the_model_as_it_was():
    model = small("llama")
    before = dict(model.named_modules())
    embedded = [{"inputs_embeds": torch.randn(2, 5, 32).double()}]
    with pytest.raises(ValueError, match="key_weight must be a number without weighting 'two-sided' and token ids"):
        hf.convert(model, "mla", calib=embedded, key_weight="search", weighting="two-sided", **LATENT)
    broken, count = model.lm_head.forward, []

    def fail(x):
        count.append(1)
        if len(count) > 6:  # after calibration
            raise RuntimeError("out of memory")
        return broken(x)

    model.lm_head.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        hf.convert(model, "mla", calib=batches(), verify=False, key_weight="search", weighting="two-sided", **LATENT)
    del model.lm_head.forward
    assert dict(model.named_modules()) == before


def test_layers_that_can_be_converted_are_named():
    model = small("qwen2")
    with pytest.raises(
        ValueError,
        match=FIRST + r"module must not have sliding_window: .*; layers=\[1\] takes the others",
    ):
        hf.convert(model, "mla", rope_dim=8, kv_rank=16)
    hf.convert(model, "mla", layers=[1], rope_dim=8, kv_rank=16)
    for family, reason in (
        ("qwen3", "qk_norm"),
        ("gemma2", "sliding_window"),
        ("llama-yarn", "plain rotary embedding"),
    ):
        with pytest.raises(ValueError, match=f"{FIRST}module must .*{reason}"):
            hf.convert(small(family), "mla", rope_dim=10, kv_rank=20)


def test_training_goes_on_after_a_conversion():
    model = small("llama", dtype=torch.float32).train()
    hf.convert(model, "mla", calib=batches(), weighting="two-sided", **LATENT)
    assert model.training
    assert all(attn.training for _, attn in hf.modules(model))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
