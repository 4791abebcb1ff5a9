"""Selective attention: stored F, what it reduces to, who takes what from whom, its cache, refusals."""

import copy

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask, SelectiveAttention
from attnzoo.ops.observation import observing
from tests.modules.test_golden import construct, load
from tests.zoo import gradients

E, H, G, T = 24, 4, 2, 11


def make(*, perturbed=True, **options):
    torch.manual_seed(5)
    attn = SelectiveAttention(E, H, G, **{"dtype": torch.float64} | options)
    if perturbed:
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def removed(attn, x, **call):
    """F (B, T, T), as an observer sees it."""
    seen = []
    with observing(seen.append):
        attn(x, **call)
    return -seen[0].rules.bias[:, 0]


def plain(attn):
    options = {"rope": attn.rope, "sliding_window": attn.sliding_window, "dtype": torch.float64}
    gqa = attnzoo.GroupedQueryAttention(E, H, G, **options)
    gqa.load_state_dict(attn.state_dict())
    return gqa


def test_what_is_removed_is_what_the_reference_removes():
    tensors = load("selective")[0]
    attn = construct("selective").double()
    assert (removed(attn, tensors["input.x"].double()) - tensors["output.removed"]).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{}, {"selection_head": 2, "protect_first": False, "rope": None}])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunk_size", [3, 128])
def test_it_is_softmax_attention_minus_what_was_removed(options, window, chunk_size):
    attn, x = make(sliding_window=window, chunk_size=chunk_size, **options), sample()
    seen = []
    with observing(seen.append):
        plain(attn)(x)
    q, k, v = (z.transpose(1, 2) for z in (seen[0].q, seen[0].k, seen[0].v))
    scores = 6**-0.5 * q @ k.repeat_interleave(2, 1).mT
    hidden = ~torch.ones(T, T).tril().bool() | (torch.ones(T, T).tril(-(window or T)).bool())
    F = torch.zeros(2, T, T, dtype=torch.float64)
    for i in range(T):
        for j in range(1 if attn.protect_first else 0, i):
            for row in range(j + 1, i):
                if not hidden[row, j]:
                    F[:, i, j] += scores[:, attn.selection_head, row, j].relu()
    # Only where the query is late enough to see the key.
    assert_close(removed(attn, x).masked_fill(hidden, 0), F.masked_fill(hidden, 0))
    p = (scores - F[:, None]).masked_fill(hidden, -torch.inf).softmax(-1)
    assert_close(attn(x), attn.o_proj((p @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)))


def test_a_head_without_scores_removes_nothing():
    attn, x = make(selection_head=1), sample()
    assert (attn(x) - plain(attn)(x)).abs().max() > 1e-3
    with torch.no_grad():
        attn.q_proj.weight[6:12] = 0
    assert not removed(attn, x).any()
    assert_close(attn(x), plain(attn)(x))


def test_the_first_token_and_the_token_itself_stay():
    F = removed(make(), sample())
    assert not F[..., 0].any()
    assert not F.diagonal(dim1=1, dim2=2).any()
    assert not F.triu(1).any()
    assert (F.diff(dim=1) >= 0).all()
    assert removed(make(protect_first=False), sample())[..., 0].any()


def test_the_choice_of_a_token_reaches_later_ones_alone():
    attn, x = make(), sample()
    before = removed(attn, x)
    changed = torch.cat([x[:, :5], sample(1), x[:, 6:]], 1)
    after = removed(attn, changed)
    assert torch.equal(after[:, :6, :5], before[:, :6, :5])
    assert not torch.equal(after[:, 6:, :5], before[:, 6:, :5])


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"qk_norm": True, "protect_first": False}])
def test_chunks_give_the_gradients_of_the_definition(chunk_size, options):
    x, weight = sample(), sample()
    found, expected = (
        gradients(make(chunk_size=chunk_size, backend=backend, **options), x, weight) for backend in ("auto", "eager")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-11, rtol=0, msg=name)


def test_every_document_keeps_its_first_token():
    attn, x = make(chunk_size=3), sample()
    F = removed(attn, x, mask=AttentionMask.packed([0, 4, 11, 22]))
    assert not F[0, :, [0, 4]].any()
    assert F[0, :, 5:].any()
    assert not F[0, 4:, :4].diff(dim=0).any()


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 2, 3]])
def test_decoding_is_the_full_forward(window, chunks):
    attn, x = make(sliding_window=window, chunk_size=2), sample()
    cache = attn.init_cache(2, T + 3)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split(chunks, 1)], 1)
    assert_close(y, attn(x))
    rows = cache.ROWS + 1
    assert attn.cache_bytes_per_token(torch.bfloat16) == 2 * 2 * G * 6 + 4 * rows
    assert cache.nbytes == 2 * (T + 3) * attn.cache_bytes_per_token(torch.float64)


@pytest.mark.parametrize(
    "change", [lambda cache: None, lambda cache: cache.reorder(torch.tensor([0, 1])), copy.deepcopy]
)
def test_gradients_pass_what_was_cached_in_inference_mode(change):
    attn, x = make(chunk_size=2), sample()
    cache = attn.init_cache(2, T)
    with torch.inference_mode():
        attn(x[:, :4], cache=cache)
        cache = change(cache) or cache
    y = attn(x[:, 4:], cache=cache)
    assert_close(y, attn(x)[:, 4:])
    y.sum().backward()
    assert attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"prune_threshold": 0.4}])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 17, 15], [39, 1]])
def test_the_last_16_tokens_can_be_taken_back(options, chunks):
    attn, x, other = make(chunk_size=5, **options), sample(45), sample(20)
    with torch.no_grad():
        expected, cache = attn(x), attn.init_cache(2, 45)
        for part in torch.cat([x[:, :25], other[:, :15]], 1).split(chunks, 1):
            attn(part, cache=cache)
        with pytest.raises(ValueError, match=r"length must be 0 or at least 24: what earlier tokens .* 16 .*, got 23"):
            cache.truncate(23)
        cache.truncate(25)
        assert_close(attn(x[:, 25:28], cache=cache), expected[:, 25:28])
        # One row was left, and three are new.
        cache.truncate(24)
        with pytest.raises(ValueError, match=r"length must be 0 or at least 24: .*, got 23"):
            cache.truncate(23)
        assert_close(attn(x[:, 24:], cache=cache), expected[:, 24:])
        cache.truncate(0)
        assert not cache.state[0].any()
        assert_close(attn(x, cache=cache), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 9}, {"qk_norm": True, "protect_first": False}])
@pytest.mark.parametrize("chunks", [[1] * 60, [7, 1, 30, 22], [59, 1]])
def test_a_cache_evicts_what_is_dropped(options, chunks, batch, monkeypatch):
    monkeypatch.setattr("attnzoo.cache.SelectionCache.PLACES", 8)
    attn, x = make(prune_threshold=0.3, chunk_size=5, **options), sample(60)[:batch]
    keep = torch.rand(batch, 1, 1, 60) < 0.9
    with torch.no_grad():
        for mask in (None, keep):
            expected, cache, start, outputs, held = attn(x, mask=mask), attn.init_cache(batch, 60), 0, [], []
            for part in x.split(chunks, 1):
                stop = start + part.shape[1]
                outputs.append(attn(part, mask=None if mask is None else mask[..., :stop], cache=cache))
                held.append(cache.positions.shape[0])
                start = stop
            assert_close(torch.cat(outputs, 1), expected)
    assert cache.length == 60
    if len(chunks) > 2:
        assert held[-1] < 55
        assert cache.buffers[0].shape[2] < 60 or chunks[0] > 1


def test_evicted_tokens_stay_away_and_others_come_back(monkeypatch):
    monkeypatch.setattr("attnzoo.cache.SelectionCache.PLACES", 4)
    attn, x, other = make(prune_threshold=0.3), sample(60), sample(10)
    with torch.no_grad():
        expected, cache = attn(x), attn.init_cache(2, 60)
        for token in torch.cat([x[:, :40], other], 1).split(1, 1):
            attn(token, cache=cache)
        assert cache.positions.shape[0] < 45
        cache.truncate(40)
        cache.reorder(torch.tensor([1, 0]))
        y = torch.cat([attn(token, cache=cache) for token in x[[1, 0], 40:].split(1, 1)], 1)
        assert_close(y, expected[[1, 0], 40:])
        with pytest.raises(ValueError, match="cache is full: 60 cached and 1 new tokens exceed its max_length 60"):
            attn(x[:, :1], cache=cache)
        with pytest.raises(ValueError, match=r"cache must come from .* and 0\.3 .* and 0\.5 "):
            make(prune_threshold=0.5)(x[:, :1], cache=cache)
        cache.reset()
        assert_close(torch.cat([attn(part, cache=cache) for part in x.split(20, 1)], 1), expected)


def test_a_call_that_fails_takes_evictions_back(monkeypatch):
    monkeypatch.setattr("attnzoo.cache.SelectionCache.PLACES", 4)
    attn, x = make(prune_threshold=0.3), sample(60)
    with torch.no_grad():
        expected, cache = attn(x), attn.init_cache(2, 60)
        outputs = []
        for token in x.split(1, 1):
            hook = attn.o_proj.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                attn(token, cache=cache)
            hook.remove()
            outputs.append(attn(token, cache=cache))
    assert_close(torch.cat(outputs, 1), expected)


def test_a_threshold_drops_the_keys_that_are_no_longer_needed():
    """By the error that it promises, and for keys that come back to no one."""
    x, base = sample(), make(init_std=0.4)
    F = removed(base, x).detach()
    for threshold in (0.1, 0.5, 2.0):
        attn = make(init_std=0.4, prune_threshold=threshold)
        seen = []
        with observing(seen.append):
            y = attn(x)
        dropped = F.gt(threshold)
        assert dropped.any()
        assert torch.equal(seen[0].rules.bias[:, 0] == -torch.inf, dropped)
        assert_close(y, attention(base, x, dropped[:, None]))
    assert torch.equal(make(init_std=0.4, prune_threshold=F.max().item())(x), base(x))


def attention(attn, x, dropped):
    """The output where these keys are hidden, by the additive bias of the definition."""
    seen = []
    with observing(seen.append):
        attn(x)
    q, k, v = (z.transpose(1, 2) for z in (seen[0].q, seen[0].k, seen[0].v))
    hidden = dropped | ~torch.ones(T, T).tril().bool()
    scores = 6**-0.5 * q @ k.repeat_interleave(2, 1).mT + seen[0].rules.bias
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return attn.o_proj((p @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("steps", [[[1]], [[0, 3]], [[3], [1]]])
def test_pruned_is_silenced(steps):
    attn, x = make(selection_head=2), sample()
    keep = torch.ones(H, dtype=torch.bool)
    keep[[head for step in steps for head in step]] = False
    hook = attn.o_proj.register_forward_pre_hook(lambda _, i: (torch.where(keep.repeat_interleave(6), i[0], 0.0),))
    expected = attn(x)
    hook.remove()
    for step in steps:
        attn.prune_heads(step)
    assert_close(attn(x), expected)
    with pytest.raises(ValueError, match=r"indices must not name the selection head 2, got \[2\]"):
        attn.prune_heads([2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_head": 4}, "selection_head must be below num_heads, got 4 and 4"),
        ({"selection_head": -1}, "selection_head must not be negative, got -1"),
        ({"selection_head": None}, "selection_head must be an integer, got None"),
        ({"protect_first": 1}, "protect_first must be True or False, got 1"),
        ({"prune_threshold": 0.0}, "prune_threshold must be positive, got 0.0"),
        ({"prune_threshold": "10"}, "prune_threshold must be a finite number, got '10'"),
        ({"causal": False}, "causal must be True: queries choose for later ones, got causal=False"),
        ({"sink": "zero"}, "sink is not defined for selective attention, got 'zero'"),
        ({"alibi": True, "rope": None}, "alibi is not defined for selective attention, got True"),
        ({"logit_softcap": 2.0}, "logit_softcap is not defined for selective attention, got 2.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_context_is_refused():
    with pytest.raises(ValueError, match="context must be None: its tokens choose nothing"):
        make()(sample(), sample())
