"""Measures of heads and of pairs of heads: stored figures, ends, planted heads."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from attnzoo.diagnostics.heads import similarity as s

GOLDEN = Path(__file__).parents[1] / "golden" / "similarity.safetensors"


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def patterns(B=2, H=3, T=7, seed=0):
    scores = torch.randn(B, H, T, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)


def test_stored_figures(stored):
    t, config = stored
    p, tokens = t["input.pattern"], t["input.tokens"]
    values, outputs = t["input.value"], t["input.head_output"]
    H, D = config["num_heads"], config["head_dim"]
    found = {
        "entropy": s.attention_entropy(p), "normalized_entropy": s.normalized_entropy(p),
        "distance": s.attention_distance(p), "distance_argmax": s.attention_distance_argmax(p),
        "confidence": s.head_confidence(p), "sink": s.attention_sink(p),
        "sink_exclude_self": s.attention_sink(p, exclude_self=True),
        "previous_token": s.previous_token_score(p), "current_token": s.current_token_score(p),
        "induction_stripe": s.induction_score(p, config["period"]),
        "value_weighted_pattern": s.value_weighted_pattern(p, values),
        "pair_cosine": s.attention_cosine(p), "pair_pearson": s.attention_correlation(p),
        "pair_kl": s.attention_kl(p), "pair_js": s.attention_js(p), "pair_output_cosine": s.output_cosine(outputs),
        "pair_value_cosine": s.value_cosine(values), "pair_cka": s.linear_cka(outputs),
        "pair_cka_unbiased": s.linear_cka(outputs, unbiased=True), "pair_svcca": s.svcca(outputs),
        "disagreement_position": s.disagreement("position", pattern=p),
        "disagreement_output": s.disagreement("output", vectors=outputs),
        "disagreement_subspace": s.disagreement("subspace", vectors=values),
    }  # fmt: skip
    for name in s.DETECTABLE:
        for measure in ("mul", "abs"):
            found[f"detect_{name}_{measure}"] = s.detect_head(p, tokens, name, measure)
    weights = {n: t[f"weights.{n}_proj.weight"].double() for n in "qkvo"}

    def heads(layer):
        q, k, v = (weights[n][layer].view(H, D, -1) for n in "qkv")
        return q, k, v, weights["o"][layer].view(-1, H, D).transpose(0, 1)

    _, _, v, o = heads(0)
    for mode in "QKV":
        found[f"composition_{mode}"] = s.composition_scores((o, v), heads(1), mode)
    found["copying_score"] = s.copying_score(o, v, t["weights.embed.weight"], t["weights.unembed.weight"])
    expected = {key.removeprefix("output."): value for key, value in t.items() if key.startswith("output.")}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        got = torch.as_tensor(found[name], dtype=torch.float64).reshape(value.shape)
        assert (got - value.double()).abs().max() < 1e-9, name


def test_uniform_and_one_hot_rows():
    T = 6
    uniform = (torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]).expand(1, 2, T, T)
    torch.testing.assert_close(s.normalized_entropy(uniform), torch.ones(2).double(), atol=1e-6, rtol=0)
    hot = torch.eye(T).expand(1, 2, T, T)
    assert s.attention_entropy(hot).tolist() == [0, 0]
    assert s.head_confidence(hot).tolist() == [1, 1]
    assert s.current_token_score(hot).tolist() == [1, 1]
    assert s.attention_distance(hot).tolist() == [0, 0]
    assert s.sink_rate(uniform) == 1.0
    assert s.sink_rate(hot) == 0.0


def test_a_head_is_like_itself():
    p = patterns()
    p[:, 2] = p[:, 0]
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    x[:, 2] = x[:, 0]
    for pairs in (s.attention_cosine(p), s.attention_correlation(p), s.output_cosine(x), s.linear_cka(x), s.svcca(x)):
        torch.testing.assert_close(pairs.diagonal(), torch.ones(3).double())
        assert pairs[0, 2].item() == pytest.approx(1)
        torch.testing.assert_close(pairs, pairs.T)
    for pairs in (s.attention_kl(p), s.attention_js(p)):
        assert pairs[0, 2].item() == pytest.approx(0, abs=1e-12)
        assert pairs[0, 1] > 0
    assert (s.attention_js(p) <= s.MAX_JS).all()
    assert (torch.linalg.eigvalsh(s.attention_cosine(p)) > -1e-12).all()
    assert 0 < s.head_diversity(s.attention_cosine(p)) < 1


def test_cka_does_not_know_bases_and_scale():
    x = torch.randn(3, 2, 9, 4, dtype=torch.float64)
    turned = x.clone()
    turned[:, 1] = 5 * x[:, 1] @ torch.linalg.qr(torch.randn(4, 4).double()).Q
    for unbiased in (False, True):
        torch.testing.assert_close(s.linear_cka(turned, unbiased=unbiased), s.linear_cka(x, unbiased=unbiased))


def padded(x, before, fill, *dims):
    """A tensor of 6 tokens along these dimensions with `before` tokens in front and as many after as make 9."""
    for dim in dims:
        whole = x.new_full((*x.shape[:dim], 9, *x.shape[dim + 1 :]), fill)
        whole.narrow(dim, before, 6).copy_(x)
        x = whole
    return x


@pytest.mark.parametrize("before", [0, 1, 3])
def test_padding_does_not_count(before):
    short = patterns(B=1, T=6)
    p = padded(short, before, 0.0, 2, 3)
    # What padded queries see does not matter.
    p[:, :, :before, 0], p[:, :, before + 6 :, before] = 1.0, 1.0
    mask = padded(torch.ones(1, 6, dtype=torch.bool), before, False, 1)
    for name in ("attention_entropy", "normalized_entropy", "attention_distance", "attention_distance_argmax",
                 "head_confidence", "attention_sink", "previous_token_score", "current_token_score",
                 "attention_cosine", "attention_correlation", "attention_kl", "attention_js"):  # fmt: skip
        torch.testing.assert_close(getattr(s, name)(p, mask), getattr(s, name)(short), msg=name, atol=1e-12, rtol=0)
        twice, once = torch.cat([p, p]), torch.cat([mask, torch.zeros_like(mask)])
        torch.testing.assert_close(getattr(s, name)(twice, once), getattr(s, name)(short), msg=name, atol=1e-12, rtol=0)
    assert s.sink_rate(p, mask, eps=0.4) == s.sink_rate(short, eps=0.4)
    torch.testing.assert_close(s.induction_score(p, 3, mask), s.induction_score(short, 3))
    torch.testing.assert_close(
        s.normalized_entropy(p, mask, causal=False), s.normalized_entropy(short, causal=False), atol=1e-12, rtol=0
    )
    assert s.attention_agreement(p, mask) == pytest.approx(s.attention_agreement(short), abs=1e-12)
    tokens = torch.tensor([[3, 1, 3, 1, 2, 3]])
    for name in s.DETECTABLE:
        for measure in ("mul", "abs"):
            for bos in (False, True):
                options = {"name": name, "error_measure": measure, "exclude_bos": bos, "round": None}
                found = s.detect_head(p, padded(tokens, before, 3, 1), mask=mask, **options)
                torch.testing.assert_close(found, s.detect_head(short, tokens, **options), atol=1e-12, rtol=0)
    few = torch.randn(1, 3, 6, 4, dtype=torch.float64)
    x = padded(few, before, math.nan, 2)
    for name in ("output_cosine", "linear_cka", "svcca"):
        torch.testing.assert_close(getattr(s, name)(x, mask), getattr(s, name)(few), msg=name)
    with pytest.raises(ValueError, match="rows of this one do not sum to 1"):
        s.attention_entropy(patterns(B=1, T=9).flip(-1), torch.arange(9)[None] > 2)


def test_a_token_alone():
    one = torch.ones(1, 2, 1, 1)
    for name in ("attention_entropy", "attention_distance", "attention_distance_argmax"):
        assert getattr(s, name)(one).tolist() == [0.0, 0.0], name
    for name in ("head_confidence", "attention_sink", "current_token_score"):
        assert getattr(s, name)(one).tolist() == [1.0, 1.0], name
    for name in ("normalized_entropy", "previous_token_score", "attention_correlation"):
        assert getattr(s, name)(one).isnan().all(), name
    assert s.attention_cosine(one).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert s.attention_js(one).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", s.DETECTABLE)
@pytest.mark.parametrize("measure", ["mul", "abs"])
def test_planted_heads_rank_first(name, measure):
    tokens = torch.tensor([[9, 1, 2, 3, 4, 1, 2, 3, 4]])
    T = tokens.shape[1]
    p = patterns(1, 4, T)
    at = torch.arange(T)
    source = {
        "previous_token_head": (at - 1).clamp(min=0),
        "duplicate_token_head": torch.where(at > 4, at - 4, at),
        "induction_head": torch.where(at > 4, at - 3, at),
    }[name]
    p[0, 2] = torch.nn.functional.one_hot(source, T).double()
    assert s.detect_head(p, tokens, name, measure).argmax() == 2
    if name == "induction_head":
        assert s.induction_score(p, 4).argmax() == 2


def test_three_dimensions_are_one_example():
    p = patterns(1)
    torch.testing.assert_close(s.attention_entropy(p[0]), s.attention_entropy(p))
    assert s.labels(1, 2) == ["L0H0", "L0H1"]


def test_what_is_not_defined_in_an_example_is_left_out():
    p = patterns(3)
    silent, short = p.clone(), torch.tensor([[True] * 7, [True] * 7, [True] + [False] * 6])
    silent[0, 1] = 0
    cosine, whole = s.attention_cosine(silent), s.attention_cosine(p)
    torch.testing.assert_close(cosine[1], torch.stack([s.attention_cosine(p[1:])[1, h] for h in range(3)]))
    torch.testing.assert_close(cosine[0, 2], whole[0, 2])
    assert cosine.diagonal().tolist() == pytest.approx([1.0] * 3)
    # One token has one entry, which correlates with nothing.
    torch.testing.assert_close(s.attention_correlation(p, short), s.attention_correlation(p[:2]))
    none = torch.zeros(3, 7, dtype=torch.bool)
    for figure in (s.attention_cosine(p, none), s.attention_correlation(p, none), s.attention_entropy(p, none)):
        assert bool(figure.isnan().all())
    assert math.isnan(s.sink_rate(p, none))
    assert math.isnan(s.head_diversity(torch.ones(1, 1)))


def test_a_head_that_never_changes_has_no_directions():
    outputs = torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(0))
    expected = s.svcca(outputs)
    outputs[:, 1] = 0.3
    found = s.svcca(outputs)
    assert bool(found[1].isnan().all())
    assert bool(found[:, 1].isnan().all())
    torch.testing.assert_close(found[0, 2], expected[0, 2])


def test_numbers_at_padding_may_be_anything():
    p, mask = patterns(), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    spoilt = p.clone()
    spoilt[1, :, 4:] = math.nan
    torch.testing.assert_close(s.attention_entropy(spoilt, mask), s.attention_entropy(p, mask))
    outputs = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    expected = [measure(outputs, mask) for measure in (s.output_cosine, s.linear_cka, s.svcca)]
    outputs[1, :, 4:] = math.nan
    for measure, figure in zip((s.output_cosine, s.linear_cka, s.svcca), expected, strict=True):
        torch.testing.assert_close(measure(outputs, mask), figure)


TENSORS = {
    "pattern": [
        s.attention_entropy, s.normalized_entropy, s.attention_distance, s.attention_distance_argmax, s.head_confidence,
        s.attention_sink, s.sink_rate, s.previous_token_score, s.current_token_score, s.attention_cosine,
        s.attention_correlation, s.attention_kl, s.attention_js,
    ],
    "outputs": [s.output_cosine, s.value_cosine, s.linear_cka, s.svcca],
    "pairs": [s.head_diversity],
}  # fmt: skip


@pytest.mark.parametrize(("name", "measure"), [(name, one) for name, some in TENSORS.items() for one in some])
def test_other_things_than_tensors_are_refused(name, measure):
    for given in (None, "x", [[1.0]], 1.0):
        with pytest.raises(ValueError, match=f"{name} must be a tensor, got "):
            measure(given)
    complex_ones = torch.ones((2, 3, 3, 3) if name != "pairs" else (3, 3), dtype=torch.complex64)
    with pytest.raises(ValueError, match=f"{name} must hold real numbers, got torch.complex64"):
        measure(complex_ones)
    if name == "pattern":
        with pytest.raises(ValueError, match="pattern must be finite where tokens are real"):
            measure(torch.full((2, 3, 3), math.nan))
        with pytest.raises(ValueError, match="mask must be a tensor, got "):
            measure(patterns(), [True] * 7)


FACTORS = (torch.ones(2, 8, 4), torch.ones(2, 4, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: s.attention_sink(patterns(), k=7), "k must be one of the 7 keys, got 7"),
        (lambda: s.attention_sink(patterns(), k=-1), "k must not be negative, got -1"),
        (lambda: s.sink_rate(patterns(), eps=math.nan), "eps must be a finite number, got nan"),
        (lambda: s.induction_score(patterns(), 2.5), "period must be an integer, got 2.5"),
        (
            lambda: s.detect_head(patterns(), torch.zeros(1, 7).long(), "induction_head"),
            r"tokens must be integers of shape \(2, 7\), got torch.int64 \(1, 7\)",
        ),
        (lambda: s.detect_head(patterns(), torch.zeros(2, 7), "induction_head"), "tokens must be integers of shape"),
        (
            lambda: s.detect_head(patterns(), torch.zeros(2, 7).long(), "induction_head", exclude_bos="no"),
            "exclude_bos must be True or False, got 'no'",
        ),
        (lambda: s.svcca(torch.ones(1, 2, 3, 4), variance=2), r"variance must lie in \(0, 1\], got 2"),
        (lambda: s.head_diversity(torch.ones(2, 3)), r"pairs must have shape \(H, H\), got \(2, 3\)"),
        (lambda: s.value_weighted_pattern(patterns(), torch.ones(2, 1, 7, 4)), r"value must have shape \(2, 3, 7\)"),
        (
            lambda: s.copying_score(*FACTORS, torch.ones(5, 7), torch.ones(5, 8)),
            r"embed must have shape \(5, 8\), got \(5, 7\)",
        ),
        (lambda: s.copying_score(FACTORS[0], None, torch.ones(5, 8), torch.ones(5, 8)), "w_v must be a tensor, got N"),
        (lambda: s.composition_scores(FACTORS, FACTORS, "Q"), "later must be 4 tensors"),
        (lambda: s.composition_scores(FACTORS, FACTORS * 2, "Q"), "later must be .* of one model, got"),
        (lambda: s.linear_cka(torch.full((1, 2, 5, 4), math.inf)), "outputs must be finite where tokens are real"),
        (lambda: s.attention_entropy(torch.ones(2, 3, 3)), "pattern must hold distributions"),
        (lambda: s.attention_kl(-patterns()), "pattern must hold distributions"),
        (lambda: s.attention_entropy(torch.ones(3, 3)), "pattern must have shape"),
        (lambda: s.attention_entropy(patterns()[..., :5]), "pattern must have as many keys as queries"),
        (lambda: s.attention_entropy(patterns(), torch.ones(2, 7)), "mask must be boolean of shape"),
        (lambda: s.detect_head(patterns(), torch.zeros(2, 7), "name_head"), "name must be one of"),
        (lambda: s.detect_head(patterns(), torch.zeros(2, 7), "induction_head", "sum"), "error_measure must be"),
        (lambda: s.disagreement("layer"), "kind must be"),
        (lambda: s.disagreement("position"), "pattern must be given"),
        (lambda: s.disagreement("output"), "vectors must be given"),
        (lambda: s.induction_score(patterns(), 20), "offset must lie between"),
        (lambda: s.linear_cka(torch.randn(1, 2, 3, 4), unbiased=True), "at least 4 tokens"),
        (lambda: s.composition_scores((torch.ones(1, 2, 1),) * 2, (torch.ones(1, 1, 2),) * 4, "O"), "mode must be"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
