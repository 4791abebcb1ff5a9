"""Sigmoid attention: limits, sums over keys, biases, masked rows, refusals."""

import math

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask, SigmoidAttention
from attnzoo.diagnostics.heads.attention_call import pattern_of
from attnzoo.masks import Visibility
from attnzoo.ops.observation import observing
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from tests.zoo import gradients

E, H, G, T = 24, 4, 2, 11
BIASES = (-1.3, "visible", "learned")


def make(logit_bias="visible", *, perturbed=True, **options):
    torch.manual_seed(5)
    if logit_bias == "learned":
        options["context_length"] = 16
    attn = SigmoidAttention(E, H, G, logit_bias=logit_bias, **{"dtype": torch.float64} | options)
    if perturbed:
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def heads(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_hand(attn, x, visible):
    """The equations, without rotation."""
    q = attn.q_proj(x).view(2, -1, H, 6).transpose(1, 2)
    k, v = (
        layer(x).view(2, -1, G, 6).repeat_interleave(H // G, 2).transpose(1, 2) for layer in (attn.k_proj, attn.v_proj)
    )
    bias = attn.logit_bias
    if isinstance(bias, str):
        bias = -torch.log(visible.double().sum(-1, keepdim=True).clamp(min=1))
    elif isinstance(bias, torch.Tensor):
        bias = bias[:, None, None]
    a = torch.sigmoid(q @ k.mT * 6**-0.5 + bias) * visible
    return attn.o_proj((a @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("chunk_size", [3, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_equations(bias, chunk_size, causal):
    attn, x = make(bias, rope=None, causal=causal, chunk_size=chunk_size), sample()
    lengths = torch.tensor([T, 6])
    visible = (torch.arange(T) < lengths[:, None])[:, None, None].expand(2, 1, T, T)
    visible = visible & torch.ones(T, T).tril().bool() if causal else visible
    torch.testing.assert_close(attn(x, mask=AttentionMask.padding(lengths)), by_hand(attn, x, visible))
    keep = torch.rand(2, H, T, T) < 0.6
    torch.testing.assert_close(attn(x, mask=keep), by_hand(attn, x, visible[:1] & keep))


def test_far_below_zero_it_is_softmax_attention_without_its_denominator():
    """sigmoid(s - 30) e^30 is e^s to 1e-13."""
    attn, x = make(-30.0, perturbed=False, init_std=0.15), sample()
    gqa = attnzoo.GroupedQueryAttention(E, H, G, dtype=torch.float64)
    gqa.load_state_dict(attn.state_dict())
    seen = []
    with observing(seen.append):
        attn(x)
    q, k, v = seen[0].q, seen[0].k, seen[0].v
    numerator, denominator = (
        sigmoid_attention(q, k, values * math.exp(30), logit_bias=-30.0) for values in (v, torch.ones_like(v))
    )
    torch.testing.assert_close(attn.o_proj((numerator / denominator).flatten(2)), gqa(x), atol=2e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
def test_without_scores_every_key_of_n_weighs_one_over_n_plus_one(window):
    attn, x = make(sliding_window=window), sample()
    with torch.no_grad():
        attn.q_proj.weight.zero_()
    seen = []
    with observing(seen.append):
        attn(x)
    (call,) = seen
    p = pattern_of(call.q.transpose(1, 2), call.k.transpose(1, 2), call.view, call.rules)
    n = torch.arange(1, T + 1).clamp(max=window or T).double()
    torch.testing.assert_close(p.sum(-1), (n / (n + 1)).expand(2, H, T))
    assert call.operation == "sigmoid_attention"


@pytest.mark.parametrize("bias", [-1.3, torch.tensor([-1.0, 0.5, 0.0, 2.0], dtype=torch.float64)])
def test_keys_split_in_two_add_up_and_a_value_of_zero_is_no_key(bias):
    q, k, v = heads(2, 7, H, 6), heads(2, 9, G, 6), heads(2, 9, G, 5)
    view = Visibility(causal=False)
    whole = sigmoid_attention(q, k, v, view, logit_bias=bias)
    parts = [sigmoid_attention(q, k[:, keys], v[:, keys], view, logit_bias=bias) for keys in (slice(4), slice(4, 9))]
    torch.testing.assert_close(sum(parts), whole, atol=1e-12, rtol=0)
    without = torch.cat([k[:, :4], k[:, 5:]], 1), torch.cat([v[:, :4], v[:, 5:]], 1)
    v[:, 4] = 0
    zeroed = sigmoid_attention(q, k, v, view, logit_bias=bias)
    torch.testing.assert_close(zeroed, sigmoid_attention(q, *without, view, logit_bias=bias), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [[1] * T, [3, 1, 5, 2]])
def test_decoding_is_the_full_forward(bias, window, chunks):
    attn, x = make(bias, sliding_window=window, chunk_size=2), sample()
    cache = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 2.0}, {"alibi": True, "rope": None}, {"output_norm": True}])
def test_chunks_give_the_gradients_of_the_definition(bias, options):
    x, weight = sample(), sample()
    found, expected = (
        gradients(make(bias, chunk_size=2, backend=backend, **options), x, weight) for backend in ("auto", "eager")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-12, rtol=0, msg=name)


def test_the_gradient_of_the_bias_is_the_sum_of_those_of_the_scores():
    q, k, v = heads(1, 5, H, 6), heads(1, 5, H, 6), heads(1, 5, H, 4)
    bias = heads(H).requires_grad_()
    extra = torch.zeros(1, H, 5, 5, dtype=torch.float64, requires_grad=True)
    sigmoid_attention(q, k, v, logit_bias=bias, bias=extra, chunk_size=2).square().sum().backward()
    torch.testing.assert_close(bias.grad, extra.grad.sum((0, 2, 3)))
    assert torch.autograd.gradcheck(
        lambda *inputs: sigmoid_attention(*inputs[:3], logit_bias=inputs[3], softcap=2.0, chunk_size=2),
        [tensor.requires_grad_() for tensor in (q, k, v)] + [bias],
    )


@pytest.mark.parametrize("bias", BIASES)
def test_a_masked_row_is_zero_and_has_no_gradient(bias):
    attn, x = make(bias, chunk_size=4), sample().requires_grad_()
    keep = torch.ones(T, T, dtype=torch.bool)
    keep[3] = False
    y = attn(x, mask=keep)
    assert not y[:, 3].any()
    attn.zero_grad()
    y[:, 3].sum().backward()
    assert not x.grad.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in attn.parameters())


def test_a_learned_bias_starts_at_the_authors_advice():
    attn = make("learned", perturbed=False)
    torch.testing.assert_close(attn.logit_bias.detach(), torch.full((H,), -math.log(16), dtype=torch.float64))
    with torch.no_grad():
        attn.logit_bias.fill_(3)
    attn.reset_parameters()
    torch.testing.assert_close(attn.logit_bias.detach(), torch.full((H,), -math.log(16), dtype=torch.float64))
    assert attn.no_weight_decay() == {"logit_bias"}
    assert make().no_weight_decay() == set()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("steps", [[[1]], [[0, 3]], [[2], [0, 1]], [[0, 1, 2, 3]]])
def test_pruned_is_silenced_before_the_norm(bias, steps):
    attn, x = make(bias, output_norm=True), sample()
    keep = torch.ones(H, dtype=torch.bool)
    keep[[head for step in steps for head in step]] = False
    hook = attn.head_outputs.register_forward_pre_hook(
        lambda _, inputs: (torch.where(keep.repeat_interleave(6), inputs[0], 0.0),)
    )
    expected = attn(x)
    hook.remove()
    for step in steps:
        attn.prune_heads(step)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
    if bias == "learned":
        assert attn.logit_bias.shape == (int(keep.sum()),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink": "zero"}, "sink needs a softmax, which sigmoid attention does not have, got 'zero'"),
        ({"sink_tokens": 2, "sliding_window": 3}, "sink_tokens needs a softmax, .*, got 2"),
        ({"logit_bias": "n"}, "logit_bias must be a finite number, 'visible' or 'learned', got 'n'"),
        ({"logit_bias": math.inf}, "logit_bias must be a finite number, 'visible' or 'learned', got inf"),
        ({"logit_bias": None}, "logit_bias must be a finite number, 'visible' or 'learned', got None"),
        ({"logit_bias": True}, "logit_bias must be a finite number, 'visible' or 'learned', got True"),
        ({"context_length": 5}, "context_length must be given with logit_bias 'learned' and only then, got 5 and 'vis"),
        (
            {"logit_bias": "learned"},
            "context_length must be given with logit_bias 'learned' .*, got None and 'learned'",
        ),
        ({"logit_bias": "learned", "context_length": 0}, "context_length must be at least 1, got 0"),
        ({"output_norm": "rmsnorm"}, "output_norm must be True or False, got 'rmsnorm'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SigmoidAttention(E, H, G, **options)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_backends_that_normalise_are_refused(backend):
    with pytest.raises(attnzoo.BackendUnavailable, match=f"sigmoid_attention has no {backend} backend"):
        make(backend=backend)(sample())
