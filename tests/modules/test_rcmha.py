"""Relative convolutional attention: stored figures, what it reduces to, memory, the cache's rows, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo import AttentionMask, RelativeConvAttention
from attnzoo.diagnostics.heads.attention_call import pattern_of
from attnzoo.ops.observation import observing
from attnzoo.ops.relative_scores import RelativeDistances
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "rcmha.safetensors"
E, H, D, T, M = 24, 4, 6, 11, 5
TABLES = ("rel_key", "rel_bias", "content_bias")


def make(*, perturbed=True, **options):
    torch.manual_seed(5)
    attn = RelativeConvAttention(E, H, **{"max_distance": 24, "dtype": torch.float64} | options)
    if perturbed:
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def plain(attn):
    """Multi-head attention with the same projections."""
    options = {"rope": None, "causal": attn.causal, "bias": True, "dtype": torch.float64}
    mha = attnzoo.MultiHeadAttention(E, H, **options)
    zeros = {f"{name}.bias": torch.zeros(E) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mha.load_state_dict(zeros | {key: value for key, value in attn.state_dict().items() if "_proj" in key})
    return mha


def without_convolutions(attn):
    """Filters (0, .., 0, 1) and no bias, in place."""
    with torch.no_grad():
        for conv in (attn.q_conv, attn.k_conv, attn.v_conv):
            conv.bias.zero_()
            conv.weight.zero_()[..., -1] = 1
    return attn


def by_hand(attn, x, memory=None):
    """The equations, by torch's convolution and one gather of tables for each pair of tokens."""
    source, m = x if memory is None else torch.cat([memory, x], 1), attn.max_distance
    queries = source if attn.conv_query_memory else x

    def convolved(layer, conv, z):
        z = F.pad(layer(z), (0, 0, attn.kernel_size - 1, 0)).unflatten(-1, (H, D))
        rows = z.permute(0, 2, 3, 1).flatten(0, 1)
        return F.conv1d(rows, conv.weight, conv.bias, groups=D).unflatten(0, (-1, H)).transpose(2, 3)

    q = convolved(attn.q_proj, attn.q_conv, queries)[:, :, -x.shape[1] :]
    k, v = convolved(attn.k_proj, attn.k_conv, source), convolved(attn.v_proj, attn.v_conv, source)
    S = source.shape[1]
    r = torch.arange(S - x.shape[1], S)[:, None] - torch.arange(S)
    scores = (q + attn.content_bias[:, None]) @ k.transpose(-1, -2)
    scores = scores + torch.einsum("bhtd,tshd->bhts", q, attn.rel_key[m - r]) + attn.rel_bias[m - r].permute(2, 0, 1)
    scores = scores / D**0.5
    if attn.causal:
        scores = scores.masked_fill(r < 0, -torch.inf)
    return attn.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118  (no mapping)
        return tensors, json.loads(file.metadata()["config"])


def stored_module(stored, **options):
    tensors, config = stored
    attn = RelativeConvAttention(**config, **options, dtype=torch.float64).eval()
    attn.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    return attn


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"chunk_size": 5}, {"chunk_size": 1}])
def test_stored_figures(stored, options):
    t, attn = stored[0], stored_module(stored, **options)
    found = gradients(attn, t["input.x"], t["input.w"])
    assert (found["y"] - t["output.y"]).abs().max() < 1e-9
    compared = [key.removeprefix("grad.") for key in t if key.startswith("grad.")]
    assert len(compared) == 5
    for name in compared:
        assert (found[name] - t[f"grad.{name}"]).abs().max() < 1e-9, name
    assert not found["rel_key"][25:].any()  # of future keys
    assert (attn(t["input.x"], memory=t["input.mem"]) - t["output.y_mem"]).abs().max() < 1e-9


def test_stored_weights_of_attention(stored):
    t, seen = stored[0], []
    with observing(seen.append):
        stored_module(stored)(t["input.x"])
    q, k, pre, view, rules = (getattr(seen[0], name) for name in ("q", "k", "pre", "view", "rules"))
    for rows in (slice(0, 17), slice(3, 9)):
        p = pattern_of(q.transpose(1, 2), k.transpose(1, 2), view, rules, rows, pre)
        assert (p - t["output.attn"][:, :, rows]).abs().max() < 1e-9


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}, {"kernel_size": 8, "conv_query_memory": True}])
@pytest.mark.parametrize("chunk_size", [3, 128])
def test_the_equations(causal, options, chunk_size):
    attn = make(causal=causal, chunk_size=chunk_size, **options)
    x, memory = sample(), sample(M)
    torch.testing.assert_close(attn(x), by_hand(attn, x), atol=1e-12, rtol=0)
    torch.testing.assert_close(attn(x, memory=memory), by_hand(attn, x, memory), atol=1e-12, rtol=0)
    torch.testing.assert_close(attn(x, memory=memory[:, :1]), by_hand(attn, x, memory[:, :1]), atol=1e-12, rtol=0)
    torch.testing.assert_close(attn(x, memory=memory[:, :0]), attn(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_without_convolutions_and_tables_it_is_multi_head_attention(causal):
    attn, x = without_convolutions(make(perturbed=False, causal=causal)), sample()
    torch.testing.assert_close(attn(x), plain(attn)(x), atol=1e-13, rtol=0)


def test_a_bias_of_distances_can_be_alibi():
    attn, x = without_convolutions(make(perturbed=False)), sample()
    mha = attnzoo.MultiHeadAttention(E, H, rope=None, alibi=True, bias=True, dtype=torch.float64)
    mha.load_state_dict(plain(attn).state_dict())
    with torch.no_grad():
        r = attn.max_distance - torch.arange(2 * attn.max_distance, dtype=torch.float64)
        attn.rel_bias.copy_(-r[:, None] * torch.tensor(mha.alibi_slopes) * D**0.5)
    torch.testing.assert_close(attn(x), mha(x), atol=1e-12, rtol=0)


def test_memory_is_what_came_before():
    x, memory = sample(), sample(M)
    for seen in (False, True):
        attn = make(conv_query_memory=seen)
        found, whole = attn(x, memory=memory), attn(torch.cat([memory, x], 1))[:, M:]
        blind = 0 if seen else attn.kernel_size - 1
        torch.testing.assert_close(found[:, blind:], whole[:, blind:], atol=1e-12, rtol=0)
        assert not blind or (found - whole)[:, :blind].abs().amax(-1).min() > 1e-3
    lengths = AttentionMask.padding([M + T, M + 3])
    masked = attn(x, memory=memory, mask=lengths)
    torch.testing.assert_close(masked[1:, :3], attn(x[1:, :3], memory=memory[1:]), atol=1e-12, rtol=0)
    keep = torch.rand(T, M + T) < 0.6
    torch.testing.assert_close(
        attn(x, memory=memory, mask=keep), attn(torch.cat([memory, x], 1), mask=F.pad(keep, (0, 0, M, 0)))[:, M:]
    )


def test_the_gradient_reaches_the_memory():
    attn, memory = make(conv_query_memory=True, chunk_size=2), sample(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, memory: attn(x, memory=memory), (sample(4).requires_grad_(), memory))


def test_the_longest_sequence_reads_the_last_rows_of_the_tables():
    attn = make(causal=False, max_distance=T)
    attn(sample()).square().sum().backward()
    used = attn.rel_bias.grad.abs().amax(-1) > 0
    assert used.tolist() == [False] + [True] * (2 * T - 1)
    with pytest.raises(ValueError, match=f"x must have at most max_distance = {T} tokens, with memory and cache, got"):
        attn(sample(T + 1))


@pytest.mark.parametrize("kernel_size", [1, 2, 5])
def test_the_cache_keeps_the_last_rows_and_cannot_go_back(kernel_size):
    attn, x = make(kernel_size=kernel_size), sample()
    cache = attn.init_cache(2, 16)
    assert cache.nbytes == 2 * attn.state_bytes(16, torch.float64)
    assert cache.nbytes == 2 * 8 * E * (2 * 16 + 3 * (kernel_size - 1))
    with torch.no_grad():
        parts = [attn(part, cache=cache) for part in x.split([1, 1, 5, 0, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), attn(x), atol=1e-12, rtol=0)
        message = f"length must be 0 or {T}: a convolution has kept the last inputs only, got 4"
        with pytest.raises(ValueError, match=message):
            cache.truncate(4)
        with pytest.raises(ValueError, match=f"length must lie between 0 and the {T} cached tokens, got None"):
            cache.truncate(None)
        cache.truncate(T)
        cache.truncate(0)
        torch.testing.assert_close(attn(x, cache=cache), attn(x), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="cache must come from this module's init_cache"):
        make(kernel_size=kernel_size + 1)(x[:, :1], cache=cache)


def test_convolutions_do_not_see_other_documents_whatever_is_in_them():
    attn, x = make(kernel_size=4), sample()
    packed = AttentionMask.packed([0, 3, 4, T, 2 * T])
    y = attn(x, mask=packed)
    changed = x.clone()
    changed[0, :3] = 1e3
    torch.testing.assert_close(attn(changed, mask=packed)[0, 3:], y[0, 3:], atol=0, rtol=0)
    torch.testing.assert_close(attn(x[:1, 4:]), y[:1, 4:], atol=1e-12, rtol=0)


def test_no_tensor_has_a_vector_for_each_pair():
    """The largest tensor of a forward is a chunk's scores."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    tokens, chunk = 256, 16
    attn = RelativeConvAttention(E, H, max_distance=256, chunk_size=chunk, dropout=0.0)
    with torch.no_grad(), Watch():
        attn(torch.randn(1, tokens, E))
    assert largest <= H * chunk * (tokens + chunk)


def test_a_tile_is_a_part_of_the_whole():
    q = torch.randn(2, 9, H, D, dtype=torch.float64)
    keys, bias = torch.randn(40, H, D, dtype=torch.float64), torch.randn(40, H, dtype=torch.float64)
    whole, a = RelativeDistances(q, keys, bias, 0.5, 3), torch.randn(2, H, 9, 12, dtype=torch.float64)
    for rows, columns in ((slice(2, 5), slice(4, 12)), (slice(8, 9), slice(None)), (slice(0, 9), slice(11, 12))):
        part = whole.at(rows, columns)(a[:, :, rows, columns])
        torch.testing.assert_close(part, whole(a)[:, :, rows, columns], atol=1e-12, rtol=0)


def test_a_single_token_s_circuits():
    attn, x = make(bias=False), sample(1)
    with torch.no_grad():
        for conv in (attn.q_conv, attn.k_conv, attn.v_conv):
            conv.bias.zero_()
    y = sum(x @ wv.T @ wo.T for wv, wo in attn.ov_circuit())
    torch.testing.assert_close(attn(x), y, atol=1e-12, rtol=0)
    seen = []
    with observing(seen.append):
        attn(x)
    q, k = seen[0].q[:, 0] - attn.content_bias, seen[0].k[:, 0]
    found = torch.stack([((x @ wq.T) * (x @ wk.T)).sum(-1)[:, 0] for wq, wk in attn.qk_circuit()], 1)
    torch.testing.assert_close(found, (q * k).sum(-1), atol=1e-12, rtol=0)


def test_pruned_heads_are_silent_heads():
    attn, x = make(), sample()
    silent = copy.deepcopy(attn)
    with torch.no_grad():
        silent.o_proj.weight.view(E, H, D)[:, [0, 2]] = 0
    attn.prune_heads([0, 2])
    torch.testing.assert_close(attn(x), silent(x), atol=1e-12, rtol=0)
    assert attn.rel_key.shape == (48, 2, D)


def test_parameters_and_their_start():
    attn = RelativeConvAttention(E, H, 3, 24)
    assert sum(p.numel() for p in attn.parameters()) == 4 * E * E + 2 * E + 3 * D * 4 + 48 * (E + H) + E
    assert not any(getattr(attn, name).any() for name in TABLES)
    torch.manual_seed(1)
    conv = torch.nn.Conv1d(D, D, 3, groups=D)
    torch.manual_seed(1)
    attn.q_conv.reset_parameters()
    torch.testing.assert_close(attn.q_conv.weight, conv.weight)
    torch.testing.assert_close(attn.q_conv.bias, conv.bias)
    assert RelativeConvAttention(E, H).dropout == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim unless head_dim is given, got 5 and 24"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"max_distance": 0}, "max_distance must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"conv_query_memory": 1}, "conv_query_memory must be True or False, got 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeConvAttention(**{"embed_dim": E, "num_heads": H} | options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"context": sample()}, "context must be None: no distance to other sequences is defined; got a torch.float64"),
        ({"memory": sample()[0]}, r"memory must have shape \(B, T, 24\), got \(11, 24\)"),
        ({"memory": sample().float()}, "memory must have the dtype of the weights torch.float64, got torch.float32"),
        ({"memory": sample()[:1]}, "memory must have the batch of x, got 1 and 2"),
        ({"memory": sample(14)}, "x must have at most max_distance = 24 tokens, with memory and cache, got 25"),
        ({"memory": sample(M), "mask": AttentionMask.packed([0, 2 * T])}, "a packed mask needs as many queries as"),
        (
            {"memory": sample(M), "mask": torch.ones(T, T) > 0},
            r"mask must broadcast to \(B, H, T, S\) = \(2, 4, 11, 16\)",
        ),
        ({"memory": sample(M), "cache": make().init_cache(2, 20)}, "memory needs cache=None, got a ConvolutionCache"),
    ],
)
def test_calls_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        make()(sample(), **call)


def test_a_cache_beyond_the_tables_is_refused():
    attn = make(max_distance=T)
    cache = attn.init_cache(2, 2 * T)
    attn(sample(), cache=cache)
    with pytest.raises(ValueError, match="x must have at most max_distance = 11 tokens, with memory and cache, got 12"):
        attn(sample(1), cache=cache)
    assert cache.length == T


def test_there_is_no_kernel():
    with pytest.raises(attnzoo.BackendUnavailable, match=r"no kernel for score maps .* or add relative scores"):
        RelativeConvAttention(E, H, backend="triton")(torch.randn(1, 3, E))
