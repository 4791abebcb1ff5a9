"""Numbers for every head of a model: against the measures on whole patterns, and on planted heads."""

import json
import math

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.diagnostics.heads import similarity as s
from attnzoo.diagnostics.heads.measures import MEASURES
from attnzoo.diagnostics.heads.observe import capture
from attnzoo.diagnostics.heads.report import composition_table, head_report, to_bertviz
from attnzoo.diagnostics.layers import attention_layers
from attnzoo_recipes.lm import DecoderLM
from tests import zoo
from tests.diagnostics.test_attention_layers import _hf, _shaken

B, T, V = 3, 13, 9
DIRECT = {
    "entropy": s.attention_entropy, "normalized_entropy": s.normalized_entropy, "distance": s.attention_distance,
    "distance_argmax": s.attention_distance_argmax, "confidence": s.head_confidence, "sink": s.attention_sink,
    "previous_token": s.previous_token_score, "current_token": s.current_token_score,
}  # fmt: skip


def _lm(layers=2, vocab=V, **options):
    torch.manual_seed(1)
    model = DecoderLM(
        vocab, lambda E: attnzoo.GroupedQueryAttention(E, 4, 2, init_std=1.0, **options), embed_dim=32,
        num_layers=layers, mlp_dim=16, init_std=0.4,
    )  # fmt: skip
    return model.double()


def _tokens(seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def _patterns(model, tokens, **options):
    with capture(model) as captured, torch.no_grad():
        model(tokens, **options)
    return captured.last("patterns"), captured.last("outputs")


@pytest.mark.parametrize("block", [4, 256])
def test_report_is_what_the_measures_say_of_whole_patterns(block):
    model, tokens = _lm(), _tokens()
    report = head_report(model, [tokens], period=5, block=block)
    patterns, outputs = _patterns(model, tokens)
    assert [layer.name for layer in report.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert report.queries == B * T
    for layer, p, out in zip(report.layers, patterns, outputs, strict=True):
        assert set(DIRECT) == set(MEASURES)
        for name, measure in DIRECT.items():
            torch.testing.assert_close(layer.measures[name], measure(p), msg=name)
        torch.testing.assert_close(layer.measures["induction_stripe"], s.induction_score(p, 5))
        for kind in s.DETECTABLE:
            expected = s.detect_head(p, tokens, kind, exclude_bos=True)
            torch.testing.assert_close(layer.measures[f"detect_{kind}"], expected, msg=kind)
        torch.testing.assert_close(layer.pair_cosine, s.attention_cosine(p))
        torch.testing.assert_close(layer.output_cosine, s.output_cosine(out))
        assert layer.sink_rate == s.sink_rate(p)
        assert layer.note == ""
    torch.testing.assert_close(report.table("entropy")[1], s.attention_entropy(patterns[1]))
    torch.testing.assert_close(report.pair_cosine_mean()[0].item(), s.head_diversity(s.attention_cosine(patterns[0])))


GATED = {
    "gated": ("gate", lambda m, x: m.g_proj(x).view(*x.shape[:2], 4, -1)),
    "gated-value": ("gate", lambda m, x: m.g_proj(x).repeat_interleave(2, -1)[..., None]),
    "gated-dense": ("gate", lambda m, x: m.g_proj(x)[:, :, None].expand(-1, -1, 4, -1)),
    "forgetting": ("forget_gate", lambda m, x: m.forget_proj(x)[..., None]),
    "forgetting-pro": ("gate", lambda m, x: m.g_proj(x).view(*x.shape[:2], 4, -1)),
    "mta-full": ("gate", None),
}


@pytest.mark.parametrize("name", GATED)
def test_gates_are_reported_over_real_tokens(name):
    module = zoo.build(name)
    x = torch.randn(B, T, zoo.E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([13, 6, 9])[:, None]
    # In two batches of unequal size.
    (layer,) = head_report(module, [(x[:2], mask[:2]), (x[2:], mask[2:])]).layers
    gate, logits_of = GATED[name]
    if logits_of is None:
        seen = []
        handle = module.gate.register_forward_hook(lambda *args: seen.append(args[2]))
        module(x, mask=AttentionMask.padding(mask.sum(1)))
        handle.remove()
        logits = seen[0]
    else:
        logits = logits_of(module, x)
    gates = torch.sigmoid(logits.detach())[mask]
    expected = {
        "mean": gates.mean((0, 2)), "min": gates.amin((0, 2)), "max": gates.amax((0, 2)),
        "closed": (gates < 0.1).double().mean((0, 2)),
    }  # fmt: skip
    for figure, values in expected.items():
        torch.testing.assert_close(layer.measures[f"{gate}_{figure}"], values, atol=1e-12, rtol=0)
    assert {key.rsplit("_", 1)[0] for key in layer.measures if "gate_" in key} == (
        {"gate", "forget_gate"} if name == "forgetting-pro" else {gate}
    )
    assert not any(m._forward_hooks for m in module.modules())


def test_padded_queries_do_not_count():
    model, tokens = _lm(), _tokens()
    lengths = torch.tensor([13, 6, 9])
    mask = torch.arange(T) < lengths[:, None]
    report = head_report(model, [(tokens, mask)])
    patterns, outputs = _patterns(model, tokens, mask=AttentionMask.padding(lengths))
    assert report.queries == 28
    for layer, p, out in zip(report.layers, patterns, outputs, strict=True):
        for name, measure in DIRECT.items():
            torch.testing.assert_close(layer.measures[name], measure(p, mask), msg=name)
        torch.testing.assert_close(layer.pair_cosine, s.attention_cosine(p, mask))
        torch.testing.assert_close(layer.output_cosine, s.output_cosine(out, mask))


def test_how_data_is_split_does_not_matter():
    model, tokens = _lm(), _tokens()
    whole, parts = head_report(model, [tokens]), head_report(model, list(tokens.split([1, 2])))
    assert whole.queries == parts.queries
    for one, other in zip(whole.layers, parts.layers, strict=True):
        for name, values in one.measures.items():
            torch.testing.assert_close(values, other.measures[name], msg=name)
        torch.testing.assert_close(one.pair_cosine, other.pair_cosine)
        torch.testing.assert_close(one.output_cosine, other.output_cosine)


def test_sequences_of_different_lengths_are_averaged_by_token():
    model, tokens = _lm(1), _tokens()
    report = head_report(model, [tokens[:1], tokens[1:2, :4]])
    means = [s.attention_entropy(_patterns(model, x)[0][0]) for x in (tokens[:1], tokens[1:2, :4])]
    torch.testing.assert_close(report.layers[0].measures["entropy"], (13 * means[0] + 4 * means[1]) / 17)


def test_entropy_is_the_log_sum_minus_the_mean_score():
    model, tokens = _lm(1), _tokens()
    with capture(model, ["queries", "keys", "patterns"]) as captured, torch.no_grad():
        model(tokens)
    (q,), (k,), (p,) = (captured.last(kind) for kind in ("queries", "keys", "patterns"))
    scores = (q @ k.repeat_interleave(2, 1).mT) * 8**-0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    entropy = scores.logsumexp(-1) - (p * scores.nan_to_num(neginf=0)).sum(-1)
    torch.testing.assert_close(head_report(model, [tokens]).table("entropy")[0], entropy.mean((0, 2)))


def test_agreement_is_minus_disagreement():
    (p,), (outputs,) = _patterns(_lm(1), _tokens())
    torch.testing.assert_close(
        torch.tensor(s.attention_agreement(p)), torch.einsum("bats,bcts->ac", p, p).mean().float() / (B * T)
    )
    torch.testing.assert_close(s.output_agreement(outputs), float(s.output_cosine(outputs).mean()))


class Planted(nn.Module):
    """Heads with a known pattern: the previous token, induction, the first token, any."""

    def __init__(self):
        super().__init__()
        self.attn = attnzoo.MultiHeadAttention(80, 4, 40, rope=None, scale=30.0, bias=False)
        # Features: position (20), token (20) and the token before (20); a one for the first token.
        with torch.no_grad():
            for weight in (self.attn.q_proj.weight, self.attn.k_proj.weight):
                weight.zero_()
            q, k = (w.weight.view(4, 40, 80) for w in (self.attn.q_proj, self.attn.k_proj))
            at = torch.arange(20)
            q[0, at[1:], at[1:]], k[0, at[1:], at[:-1]] = 1, 1
            q[1, at, 20 + at], k[1, at, 40 + at] = 1, 1
            q[2, 0, 60], k[2, 0, 61] = 1, 1

    def forward(self, tokens):
        return self.attn(self.features(tokens))

    def features(self, tokens):
        x = torch.zeros(*tokens.shape, 80)
        length = tokens.shape[1]
        x[:, torch.arange(length), torch.arange(length)] = 1
        x.scatter_(2, 20 + tokens[..., None], 1)
        x[:, 1:].scatter_(2, 40 + tokens[:, :-1, None], 1)
        x[..., 60] = 1
        x[:, 0, 61] = 1
        return x


def test_planted_heads_are_named():
    drawn = torch.stack([torch.randperm(18, generator=torch.Generator().manual_seed(i))[:8] + 2 for i in range(4)])
    tokens = torch.cat([torch.zeros(4, 1, dtype=torch.long), drawn, drawn], 1)
    report = head_report(Planted(), [tokens], period=8)
    (layer,) = report.layers
    found = layer.measures
    for name, head in (("previous_token", 0), ("induction_stripe", 1), ("sink", 2), ("entropy", 3)):
        assert int(found[name].argmax()) == head, name
    assert found["previous_token"][0] > 0.99
    assert found["sink"][2] > 0.99
    assert report.kinds() == {"L0H0": "previous_token_head", "L0H1": "induction_head", "L0H2": "sink_head"}
    assert "L0H3" in report.kinds(0.0)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got 2"):
        report.kinds(2)


def test_sinks_in_the_denominator_leave_out_what_needs_distributions():
    model, tokens = _lm(sink="zero"), _tokens()
    report = head_report(model, [tokens])
    patterns, _ = _patterns(model, tokens)
    for layer, p in zip(report.layers, patterns, strict=True):
        for name in ("entropy", "normalized_entropy", "distance", "distance_argmax"):
            assert layer.measures[name].isnan().all()
        torch.testing.assert_close(layer.measures["confidence"], p.amax(-1).mean((0, 2)))
        assert "rows do not add up to 1" in layer.note
    assert layer.note in str(report)


@pytest.mark.parametrize("name", ["dcmha", "talking-heads"])
def test_composed_weights_have_cosines_alone(name):
    module = zoo.build(name)
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (layer,) = head_report(module, [x]).layers
    patterns, _ = _patterns(module, x)
    assert all(values.isnan().all() for values in layer.measures.values())
    assert math.isnan(layer.sink_rate)
    torch.testing.assert_close(layer.pair_cosine, s.attention_cosine(patterns[0]))
    assert layer.note == "weights are composed over heads and may be negative, so heads have cosines alone"
    assert set(layer.measures) == set(MEASURES)


def test_a_head_without_weights_in_an_example_has_its_cosines_of_the_others():
    model = attnzoo.SelectiveMultiHeadAttention(32, 4, bias=False).double().eval()
    x = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with capture(model) as captured, torch.no_grad():
        model(x)
    (pattern,) = captured.last("patterns")
    assert bool((pattern.flatten(2).norm(dim=-1) == 0).any())
    found = head_report(model, [x[:1], x[1:]]).layers[0].pair_cosine
    assert found.diagonal().tolist() == pytest.approx([1.0] * 4)
    torch.testing.assert_close(found, s.attention_cosine(pattern))


def test_weights_that_are_not_finite_leave_no_figures():
    model = _lm()
    with torch.no_grad():
        attention_layers(model)[1].module.q_proj.weight[0, 0] = math.nan
    first, second = head_report(model, [_tokens()]).layers
    assert not first.note
    assert second.note == "weights are not finite, so heads have no figures"
    assert all(bool(values.isnan().all()) for values in second.measures.values())
    assert math.isnan(second.sink_rate)
    assert all(bool(first.measure(name).isfinite().all()) for name in MEASURES)


def test_one_head_is_like_no_other():
    report = head_report(attnzoo.MultiHeadAttention(8, 1), [torch.randn(2, 5, 8)])
    assert bool(report.pair_cosine_mean().isnan().all())


def test_windows_count_visible_keys():
    """Uniform rows of a window have normalised entropy 1."""
    module = attnzoo.GroupedQueryAttention(32, 4, 2, sliding_window=5)
    with torch.no_grad():
        module.q_proj.weight.zero_()
    report = head_report(module, [torch.randn(B, T, 32)])
    torch.testing.assert_close(report.table("normalized_entropy"), torch.ones(1, 4).double(), atol=1e-6, rtol=0)


def test_layers_with_fewer_heads_are_filled_up():
    model = _lm()
    model.blocks[1].attn.prune_heads([2])
    report = head_report(model, [_tokens()])
    table = report.table("entropy")
    assert table.shape == (2, 4)
    assert table.isnan().tolist() == [[False] * 4, [False] * 3 + [True]]
    assert len(report.to_dataframe()) == 7


def test_plain_types_and_tables():
    report = head_report(_lm(sink="zero"), [_tokens()])
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["queries"] == B * T
    assert stored["layers"][1]["measures"]["sink"] == report.table("sink")[1].tolist()
    assert stored["layers"][0]["measures"]["entropy"] == [None] * 4
    frame = report.to_dataframe()
    assert list(frame.columns[:4]) == ["layer", "head", "label", "name"]
    assert frame["label"].tolist() == s.labels(2, 4)
    assert frame["confidence"].tolist() == report.table("confidence").flatten().tolist()
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("L")] == s.labels(2, 4)
    assert lines[0].split()[7:10] == ["previous_token", "current_token", "detect_previous_token"]
    with pytest.raises(ValueError, match=r"measure must be one of 'entropy', .*, got 'beauty'"):
        report.table("beauty")


def test_training_modes_come_back_and_dropout_is_off():
    model = _lm(dropout=0.5)
    model.train()
    model.blocks[0].attn.eval()
    first, second = head_report(model, [_tokens()]), head_report(model, [_tokens()])
    assert torch.equal(first.layers[1].output_cosine, second.layers[1].output_cosine)
    assert model.training
    assert model.blocks[1].attn.training
    assert not model.blocks[0].attn.training


def test_hugging_face_models_and_batches():
    model = _shaken(_hf("llama")).double()
    tokens = torch.randint(3, 31, (B, T))
    padding = torch.ones_like(tokens)
    padding[1, 5:] = 0
    batch = {"input_ids": tokens, "attention_mask": padding}
    report = head_report(model, [batch], layers=[1])
    with capture(model) as captured, torch.no_grad():
        model(**batch)
    (layer,) = report.layers
    assert (layer.index, layer.num_heads) == (1, 4)
    expected = s.attention_entropy(captured.last("patterns")[1], padding.bool())
    torch.testing.assert_close(layer.measures["entropy"], expected)
    again = head_report(model, [batch], layers=[1], forward=lambda m, b: m(**b, use_cache=False))
    torch.testing.assert_close(again.table("distance"), report.table("distance"))


def test_what_a_report_refuses():
    model = _lm()
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        head_report(model, [])
    with pytest.raises(ValueError, match=r"batches must hold tensors, pairs \(tensor, mask\) or mappings, got str"):
        head_report(model, ["text"])
    with pytest.raises(ValueError, match="mask must be of right padding"):
        head_report(model, [(_tokens(), _tokens() > 3)])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        head_report(model, [_tokens()], block=0)
    with pytest.raises(ValueError, match="period must lie between 1 and the 13 tokens, got 14"):
        head_report(model, [_tokens()], period=14)
    cache = model.init_caches(B, T)
    model(_tokens()[:, :4], caches=cache)
    with pytest.raises(ValueError, match="batches must need no cache, got 9 queries and 13 keys"):
        head_report(model, [_tokens()[:, 4:]], forward=lambda m, x: m(x, caches=cache))
    with pytest.raises(ValueError, match="has no attention patterns: LinearAttention has no softmax"):
        head_report(zoo.build("linear"), [torch.randn(B, T, zoo.E).double()])


def test_labels_are_no_mask():
    model, tokens = _lm(), _tokens()
    expected = head_report(model, [tokens]).table("entropy")
    padded = tokens.roll(1, 1)
    padded[:, 5:], padded[:, :5] = 0, 2
    for labels in (padded, torch.tensor([1, 0, 1]), padded[:, :4].bool()):
        report = head_report(model, [(tokens, labels)], forward=lambda m, batch: m(batch[0]))
        assert torch.equal(report.table("entropy"), expected)
    with pytest.raises(ValueError, match="mask must be True for real tokens and False for others, got a"):
        head_report(model, [(tokens, padded)])
    of_numbers, of_switches = (head_report(model, [(tokens, mask)]) for mask in (padded // 2, padded > 0))
    assert of_numbers.to_dict() == of_switches.to_dict()
    assert of_numbers.queries == 15


def test_composition_of_all_layers():
    model = _lm(3)
    weights = [(layer.qk_factors(), layer.ov_factors()) for layer in attention_layers(model)]
    for mode in "QKV":
        table = composition_table(model, mode)
        assert table.shape == (3, 4, 3, 4)
        for i in range(3):
            for j in range(3):
                if i >= j:
                    assert not table[i, :, j].any()
                    continue
                (wv, wo), (wq, wk), (wv2, wo2) = weights[i][1][2], weights[j][0][3], weights[j][1][3]
                left, right = wo @ wv, {"Q": wk.T @ wq, "K": wq.T @ wk, "V": wo2 @ wv2}[mode]
                expected = (right @ left).norm() / (right.norm() * left.norm())
                torch.testing.assert_close(table[i, 2, j, 3], expected)
    with pytest.raises(ValueError, match="mode must be 'Q', 'K' or 'V', got 'O'"):
        composition_table(model, "O")
    model.blocks[1].attn.prune_heads([0])
    with pytest.raises(ValueError, match=r"model must have equally many heads in every layer, got \[3, 4\]"):
        composition_table(model, "Q")


def test_heads_without_structure_compose_by_chance():
    """Independent matrices: |R L| / (|R| |L|) is 1 / sqrt(E)."""
    model = DecoderLM(
        V, lambda E: attnzoo.MultiHeadAttention(E, 4, bias=False), embed_dim=256, num_layers=3, mlp_dim=16
    )  # fmt: skip
    later = torch.ones(3, 3).triu(1).bool()
    for mode in "QKV":
        scores = composition_table(model, mode).transpose(1, 2)[later]
        torch.testing.assert_close(scores, torch.full_like(scores, 1 / 16), rtol=0.05, atol=0)


def test_composition_of_a_hugging_face_model_and_of_other_widths():
    assert composition_table(_hf("gpt2"), "K").shape == (2, 4, 2, 4)
    wide = nn.ModuleList([zoo.build("mla"), zoo.build("mla")])
    found = composition_table(wide, "Q")
    assert (found[0, :, 1] > 0).all()
    assert (found <= 1 + 1e-9).all()
    module = zoo.build("dcmha")
    module.prune_heads([0])
    with pytest.raises(ValueError, match="model must have one query-key form for each head, got 4 and 3 heads in '0'"):
        composition_table(nn.ModuleList([module]), "Q")


def test_bertviz_takes_patterns_and_tokens():
    model, tokens = _lm(), _tokens()
    words = [str(i) for i in range(T)]
    with capture(model) as captured, torch.no_grad():
        model(tokens)
    attention, shown = to_bertviz(captured, words, example=1)
    assert isinstance(attention, tuple)
    assert [a.shape for a in attention] == [(1, 4, T, T)] * 2
    assert torch.equal(attention[1][0].double(), captured.last("patterns")[1][1].float().double())
    assert shown == words
    with pytest.raises(ValueError, match="tokens must be as many as the patterns' 13, got 2"):
        to_bertviz(captured, ["a", "b"])
    with pytest.raises(ValueError, match="example must lie between 0 and 2, got 3"):
        to_bertviz(captured, words, example=3)


@pytest.mark.slow
def test_long_inputs_need_one_block_of_one_layer():
    """T = 8192: all patterns would be 2 layers of 4 x 8192 x 8192 numbers, 2 GB in float32."""
    import resource

    module = DecoderLM(
        V, lambda E: attnzoo.GroupedQueryAttention(E, 4, 2), embed_dim=32, num_layers=2, mlp_dim=16
    )  # fmt: skip
    tokens = torch.randint(0, V, (1, 8192))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = head_report(module, [tokens], block=64)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert report.queries == 8192
    assert (report.table("normalized_entropy") > 0.9).all()
    assert (after - before) * 1024 < 500e6


# Padding


SIDES = {"right": (0, 6), "left": (6, 0)}
WITH_PATTERNS = [name for name in zoo.MECHANISMS if zoo.build(name).has_patterns]


def _assert_same_figures(one, other):
    assert one.queries == other.queries
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.measures.keys() == b.measures.keys()
        for name, values in a.measures.items():
            torch.testing.assert_close(values, b.measures[name], atol=1e-10, rtol=0, equal_nan=True, msg=name)
        for name in ("pair_cosine", "output_cosine"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-10, rtol=0, equal_nan=True)
        assert a.sink_rate == b.sink_rate or math.isnan(a.sink_rate)
        assert a.note == b.note


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", [*WITH_PATTERNS, "bidirectional", "windowed"])
def test_padding_on_either_side_changes_no_figure(name, side):
    if name == "rcmha" and side == "left":
        pytest.skip("its convolutions and distances see what stands before the text")
    if name == "forgetting-pro" and side == "left":
        pytest.skip("its token shift reads what stands before the text")
    if name == "selective" and side == "left":
        pytest.skip("it protects the first token of a row, which is padding then")
    options = {"bidirectional": {"causal": False}, "windowed": {"sliding_window": 4}}.get(name)
    module = zoo.build(name) if options is None else zoo.build("gqa", **options)
    embed = nn.Embedding(V, zoo.E, dtype=torch.float64)
    x, tokens = 3 * embed(_tokens()[:1, :9]), _tokens()[:1, :9]
    before, after = SIDES[side]
    real = torch.ones(1, 9, dtype=torch.bool)
    padded = (nn.functional.pad(x, (0, 0, before, after), value=2.5), nn.functional.pad(real, (before, after)))
    options = {"period": 3, "block": 4}
    _assert_same_figures(head_report(module, [x], **options), head_report(module, [padded], **options))
    if not module.causal:
        return
    model = DecoderLM(V, lambda E: module, embed_dim=zoo.E, num_layers=1).double()
    padded = (nn.functional.pad(tokens, (before, after), value=4), padded[1])
    _assert_same_figures(head_report(model, [tokens], **options), head_report(model, [padded], **options))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "bert", "gemma2", "opt", "gpt_neox"])
def test_padding_of_hugging_face_models_changes_no_figure(name, side):
    model = _shaken(_hf(name)).double()
    tokens = torch.randint(3, 31, (1, 9), generator=torch.Generator().manual_seed(2))
    before, after = SIDES[side]
    padded = {"input_ids": nn.functional.pad(tokens, (before, after)),
              "attention_mask": nn.functional.pad(torch.ones_like(tokens), (before, after))}  # fmt: skip
    if (name, side) == ("bert", "left"):
        # Its places are those of the padded row unless they are given.
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    _assert_same_figures(head_report(model, [{"input_ids": tokens}], period=3), head_report(model, [padded], period=3))


@pytest.mark.parametrize("side", SIDES)
def test_rows_of_different_lengths_are_their_own_batches(side):
    model, tokens, lengths = _lm(), _tokens(), (13, 1, 6)
    rows = [row[None, :n] for row, n in zip(tokens, lengths, strict=True)]
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    both = torch.stack([torch.nn.functional.pad(row[0], (0, T - row.shape[1])) for row in rows])
    if side == "left":
        real, both = real.flip(1), torch.stack([both[i].roll(T - n) for i, n in enumerate(lengths)])
    _assert_same_figures(head_report(model, rows), head_report(model, [(both, real)]))
    # Rows without a real token count for nothing.
    more = (torch.cat([both, both[:1]]), torch.cat([real, torch.zeros(1, T, dtype=torch.bool)]))
    _assert_same_figures(head_report(model, rows), head_report(model, [more]))


def test_sink_and_previous_token_are_those_of_real_tokens():
    tokens = torch.cat([torch.zeros(1, 1, dtype=torch.long), torch.arange(2, 10)[None]], 1)
    heads = Planted()
    report = head_report(heads, [tokens])

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = heads

        def forward(self, padded, mask):
            pad = padded.shape[1] - tokens.shape[1]
            features = torch.nn.functional.pad(self.inner.features(padded[:, pad:]), (0, 0, pad, 0))
            return self.inner.attn(features, mask=mask)

    left = (torch.nn.functional.pad(tokens, (5, 0)), torch.arange(14)[None] >= 5)
    shifted = head_report(Padded(), [left])
    assert shifted.table("sink")[0, 2] > 0.99
    assert shifted.table("previous_token")[0, 0] > 0.99
    assert shifted.kinds() == report.kinds()


def test_a_token_alone():
    report = head_report(_lm(), [_tokens()[:, :1]])
    for layer in report.layers:
        undefined = {name for name, values in layer.measures.items() if values.isnan().any()}
        assert undefined == {"normalized_entropy", "previous_token", *(f"detect_{kind}" for kind in s.DETECTABLE)}
        assert layer.measures["entropy"].tolist() == [0.0] * 4
        assert layer.measures["sink"].tolist() == layer.measures["current_token"].tolist() == [1.0] * 4
    assert "L0H0" in report.kinds()
    # It adds nothing to what is not defined for it.
    both = head_report(_lm(), [_tokens()[:, :1], _tokens()])
    torch.testing.assert_close(both.table("previous_token"), head_report(_lm(), [_tokens()]).table("previous_token"))
    with pytest.raises(ValueError, match="period must lie between 1 and the 1 tokens, got 2"):
        head_report(_lm(), [_tokens()[:, :1]], period=2)
    nothing = (_tokens(), torch.zeros(B, T, dtype=torch.bool))
    with pytest.raises(ValueError, match="batches must hold at least one real token, got padding alone"):
        head_report(_lm(), [nothing])
    with pytest.raises(ValueError, match=r"mask must have shape \(B, T\), True for real tokens, got \(3, 1, 13, 13\)"):
        head_report(_lm(), [(_tokens(), torch.ones(B, 1, T, T))])
