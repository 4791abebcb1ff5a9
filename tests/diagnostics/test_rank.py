"""The low-rank bottleneck: stored figures, ranks of random heads, the theorem's construction, refusals."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import attnzoo
from attnzoo.diagnostics.capacity.low_rank import (
    attention_rank,
    attention_rank_report,
    centred_log_pattern,
    constructive_weights,
    logit_singular_values,
    rank_of_singular_values,
    rank_table,
    representation_error,
)
from attnzoo.rotary import rotary_table, rotate
from tests.diagnostics.test_attention_layers import _hf, _shaken

GOLDEN = Path(__file__).parents[1] / "golden" / "low_rank_bottleneck.safetensors"
MEASURES = ("rank", "stable_rank", "effective_rank", "participation_ratio")


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def causal(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf).softmax(-1)


def test_stored_ranks(stored):
    x = stored["input.x"]
    q, k = ((x @ stored[f"weights.{n}_proj.weight"].double().T).view(2, 16, 4, 4).transpose(1, 2) for n in "qk")
    logits = q @ k.mT / 2
    cases = {
        "logits": (attention_rank(logits), rank_of_singular_values(logit_singular_values(q, k, 0.5))),
        "pattern": (attention_rank(logits.softmax(-1)),),
        "causal_pattern": (attention_rank(causal(logits)),),
    }
    for case, found in cases.items():
        for measure in MEASURES if case == "logits" else MEASURES[1:]:
            for one in found:
                assert (getattr(one, measure) - stored[f"output.{case}_{measure}"]).abs().max() < 1e-9, (case, measure)


def test_stored_representation_error(stored):
    target, tokens = stored["input.target"], stored["input.tokens"]
    assert (representation_error(target) - stored["output.kl_by_head_dim"]).abs().max() < 1e-9
    values = torch.linalg.svdvals(centred_log_pattern(target))
    assert (values - stored["output.target_singular_values"]).abs().max() < 1e-9
    q, k = constructive_weights(tokens, target)
    assert (q - stored["output.constructive_q_proj.weight"]).abs().max() < 1e-9
    assert (k - stored["output.constructive_k_proj.weight"]).abs().max() < 1e-9
    pattern = ((tokens @ q.T) @ (tokens @ k.T).T / math.sqrt(10)).softmax(-1)
    assert (pattern - stored["output.constructive_pattern"]).abs().max() < 1e-9
    assert (pattern - target).abs().max() < 1e-9


@pytest.mark.parametrize(("T", "D"), [(13, 5), (13, 13), (7, 11)])
def test_logits_have_rank_of_the_head_width(T, D):
    q, k = draw(2, 3, T, D), draw(2, 3, T, D, seed=1)
    expected = min(T, D)
    assert (attention_rank(q @ k.mT).rank == expected).all()
    # A number for each row changes the rank by one at most, and the softmax not at all.
    shifted = attention_rank(q @ k.mT + draw(2, 3, T, 1, seed=2)).rank
    assert (shifted == min(T, D + 1)).all()
    # Masks are no part of it, and softmax lifts it.
    assert (attention_rank((q @ k.mT).softmax(-1)).rank == T).all()


def test_rotation_keeps_the_rank():
    rope, T, D = attnzoo.Rotary(), 17, 6
    table = rotary_table(rope, D, torch.arange(T), dtype=torch.float64, device="cpu")
    q, k = (rotate(draw(1, T, 2, D, seed=s), *table, rope.style).transpose(1, 2) for s in (0, 1))
    assert (attention_rank(q @ k.mT).rank == D).all()


@pytest.mark.parametrize(("T", "S", "D"), [(13, 11, 5), (4, 9, 7), (9, 9, 9)])
def test_the_short_way_equals_the_decomposition(T, S, D):
    q, k = draw(2, T, D), draw(2, S, D, seed=1)
    direct = torch.linalg.svdvals(-0.3 * q @ k.mT)
    found = logit_singular_values(q, k, -0.3)
    n = found.shape[-1]
    assert n == min(T, S, D)
    torch.testing.assert_close(found, direct[..., :n])
    assert (direct[..., n:] < 1e-12).all()


def test_measures_of_known_spectra():
    values = torch.tensor([[3.0, 3.0, 3.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    found = rank_of_singular_values(values)
    for measure in MEASURES:
        expected = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(getattr(found, measure).double(), expected, msg=measure)
    decaying = torch.tensor([1.0, 1e-4, 1e-7, 1e-12], dtype=torch.float64)
    assert rank_of_singular_values(decaying).rank == 3
    assert rank_of_singular_values(decaying.float()).rank == 2
    assert rank_of_singular_values(decaying, 1e-3).rank == 1
    # Neither scale nor the order of tokens is seen.
    m, order = draw(7, 7), torch.randperm(7)
    for measure in MEASURES:
        base = getattr(attention_rank(m), measure)
        torch.testing.assert_close(getattr(attention_rank(9 * m[order][:, order]), measure), base)


def test_representation_error_ends_at_zero():
    p = draw(3, 4, 9, 9).mul(2).softmax(-1)
    error = representation_error(p)
    assert error.shape == (3, 4, 9)
    assert (error[..., -2:].abs() < 1e-12).all()
    assert (error[..., :-2] > 1e-6).all()
    assert (error.mean((0, 1)).diff() < 1e-12).all()
    assert torch.equal(representation_error(p, [3, 8]), error[..., [2, 7]])
    assert representation_error(p, [50]).abs().max() < 1e-12
    order = torch.randperm(9)
    torch.testing.assert_close(representation_error(p[..., order, :][..., order]), error, atol=1e-12, rtol=0)


def test_a_head_of_that_width_reaches_its_own_pattern():
    for d in (2, 5):
        p = (draw(11, d) @ draw(d, 11, seed=1)).softmax(-1)
        error = representation_error(p)
        # Rows are centred, which costs one rank at most.
        assert error[d] < 1e-12
        assert error[d - 2] > 1e-4


def test_zeros_need_eps():
    p = causal(draw(6, 6))
    with pytest.raises(ValueError, match="pattern must be positive unless eps is given"):
        representation_error(p)
    error = representation_error(p, eps=1e-6)
    assert error[0] > 0.1
    assert error[-1] < 1e-12


def test_one_dimension_cannot_tell_a_zero_token_anything():
    # Theorem 1's counter-example: tokens 1 and 0, width 1.
    x = torch.tensor([[1.0], [0.0]])
    for weight in (-3.0, 0.1, 40.0):
        assert (weight * x @ x.T).softmax(-1)[1].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="tokens must be linearly independent, got rank 1 of 2"):
        constructive_weights(x, torch.full((2, 2), 0.5))


@pytest.mark.parametrize("G", [1, 2, 4])
def test_report_of_a_module(G):
    attn = attnzoo.GroupedQueryAttention(32, 4, G, 6).double()
    torch.nn.init.normal_(attn.q_proj.weight)
    torch.nn.init.normal_(attn.k_proj.weight)
    x = draw(3, 14, 32)
    rows = attention_rank_report(attn, x)
    assert [(row.layer, row.head, row.head_dim, row.tokens) for row in rows] == [(0, h, 6, 14) for h in range(4)]
    assert rows[0].ratio == 6 / 14
    q, k, _ = attn.project(x, x, x)
    table = rotary_table(attn.rope, 6, torch.arange(14), dtype=torch.float64, device="cpu")
    q, k = (rotate(z, *table, attn.rope.style).transpose(1, 2) for z in (q, k))
    logits = q @ k.repeat_interleave(4 // G, 1).mT * attn.scale
    for part, matrix in (("logits", logits), ("pattern", logits.softmax(-1)), ("causal_pattern", causal(logits))):
        direct = attention_rank(matrix)
        for measure in MEASURES:
            if measure == "rank" and part != "logits":
                continue  # of a pattern it depends on the tolerance
            expected = getattr(direct, measure).double().mean(0)
            found = torch.tensor([getattr(getattr(row, part), measure) for row in rows], dtype=torch.float64)
            torch.testing.assert_close(found, expected, msg=f"{part} {measure}")
    assert all(row.logits.rank == 6 < row.pattern.rank for row in rows)
    table = rank_table(rows)
    assert table[1]["logits_stable_rank"] == rows[1].logits.stable_rank
    assert table[1]["head_dim/T"] == 6 / 14


def test_report_of_a_model_and_of_latent_attention():
    lm = pytest.importorskip("attnzoo_recipes.lm")
    model = lm.DecoderLM(50, lambda width: attnzoo.MultiHeadAttention(width, 4), embed_dim=32, num_layers=2)
    tokens = torch.arange(24).view(2, 12)
    rows = attention_rank_report(model, (tokens,))
    assert [(row.layer, row.head) for row in rows] == [(layer, h) for layer in range(2) for h in range(4)]
    assert all(row.logits.rank <= 8 for row in rows)
    dropping = nn.Sequential(nn.Embedding(50, 32), nn.Dropout(), attnzoo.MultiHeadAttention(32, 4)).train()
    assert attention_rank_report(dropping, tokens) == attention_rank_report(dropping, tokens)
    assert all(part.training for part in dropping.modules())
    latent = attnzoo.MultiHeadLatentAttention(32, 4, 20, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=5).double()
    for row in attention_rank_report(latent, draw(2, 16, 32)):
        assert row.logits.rank <= 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_rank(torch.ones(3)), "matrix must have shape"),
        (lambda: attention_rank(torch.full((2, 2), -math.inf)), "matrix must be finite"),
        (lambda: attention_rank(torch.eye(3), 1.5), r"rtol must lie in \[0, 1\), got 1.5"),
        (lambda: attention_rank(torch.eye(3), "a"), r"rtol must lie in \[0, 1\), got 'a'"),
        (lambda: attention_rank([[1.0]]), r"matrix must be a tensor, got \[\[1.0\]\]"),
        (lambda: attention_rank(torch.ones(3, 3, dtype=torch.complex64)), "matrix must hold real numbers"),
        (lambda: attention_rank(torch.ones(3, 0)), r"matrix must have shape .*, got \(3, 0\)"),
        (lambda: logit_singular_values(None, torch.ones(3, 4)), "q must be a tensor, got None"),
        (lambda: logit_singular_values(torch.ones(3, 4), torch.full((3, 4), math.nan)), "k must be finite"),
        (lambda: logit_singular_values(torch.ones(2, 3, 4), torch.ones(3, 3, 4)), "q and k must be"),
        (lambda: logit_singular_values(torch.ones(3, 4), torch.ones(3, 4), "1"), "scale must be a finite number"),
        (lambda: representation_error(torch.full((2, 2), 0.5), [1.5]), "head_dims must be integers, got 1.5"),
        (lambda: representation_error(torch.full((2, 2), 0.5), 2), "head_dims must be several integers, got 2"),
        (lambda: representation_error(torch.eye(2), eps="a"), r"eps must lie in \(0, 1\), got 'a'"),
        (lambda: representation_error(torch.ones(0, 2, 2)), "pattern must have shape"),
        (lambda: constructive_weights(torch.eye(2), torch.full((2, 2), 0.9)), "pattern must have rows that sum to 1"),
        (lambda: constructive_weights(torch.eye(2) * math.nan, torch.full((2, 2), 0.5)), "tokens must be finite"),
        (lambda: logit_singular_values(torch.ones(3, 2), torch.ones(3, 4)), "q and k must be"),
        (lambda: representation_error(torch.ones(2, 3)), "pattern must have shape"),
        (lambda: representation_error(torch.full((2, 2), math.nan)), "pattern must be finite"),
        (lambda: representation_error(torch.ones(2, 2)), "pattern must have rows that sum to 1"),
        (lambda: representation_error(torch.full((2, 2), 0.5), [0]), r"head_dims must be at least 1 each, got \[0\]"),
        (lambda: representation_error(torch.full((2, 2), 0.5), []), "head_dims must be at least 1 each"),
        (lambda: representation_error(torch.eye(2), eps=0.0), r"eps must lie in \(0, 1\), got 0.0"),
        (lambda: constructive_weights(torch.eye(3), torch.ones(2, 2)), "tokens and pattern must be"),
        (lambda: constructive_weights(torch.eye(2), torch.eye(2)), "pattern must be positive"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_rank(side):
    model = _shaken(_hf("llama")).double()
    rows = [torch.randint(3, 31, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 5)]
    alone = [attention_rank_report(model, {"input_ids": row}) for row in rows]
    gap = torch.zeros(1, 4, dtype=torch.long)
    tokens, mask = (
        torch.cat([long, torch.cat([short, gap] if side == "right" else [gap, short], 1)])
        for long, short in (rows, [torch.ones_like(row) for row in rows])
    )
    places = (mask.cumsum(1) - 1).clamp(min=0)
    both = attention_rank_report(model, {"input_ids": tokens, "attention_mask": mask, "position_ids": places})
    more = {"input_ids": torch.cat([tokens, tokens[:1]]), "attention_mask": torch.cat([mask, 0 * mask[:1]])}
    assert rank_table(attention_rank_report(model, {"input_ids": rows[0]})) == rank_table(alone[0])
    for row, first, second, third in zip(both, *alone, attention_rank_report(model, more), strict=True):
        assert row.tokens == third.tokens == 9
        for part in ("logits", "pattern", "causal_pattern"):
            for name, value in vars(getattr(row, part)).items():
                expected = (getattr(getattr(first, part), name) + getattr(getattr(second, part), name)) / 2
                assert value == pytest.approx(expected, abs=1e-10), (part, name)
                if side == "right":
                    assert getattr(getattr(third, part), name) == pytest.approx(expected, abs=1e-10), (part, name)
    with pytest.raises(ValueError, match="batch must hold at least one real token, got padding alone"):
        attention_rank_report(model, {"input_ids": tokens, "attention_mask": 0 * mask})
