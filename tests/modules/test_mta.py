"""Multi-token attention: what it reduces to, convolutions by hand, documents, cached queries, refusals."""

import itertools
import math

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask, MultiTokenAttention
from attnzoo.diagnostics.heads.observe import observe
from attnzoo.ops.multi_token_attention import TokenMaps
from tests.zoo import gradients

E, H, G, T = 24, 4, 2, 13
PLAIN = {"pre_kernel": None, "post_head_group": None, "head_norm": False}
BOTH = {"pre_kernel": (3, 3), "post_kernel": (2, 5), "pre_head_group": 2, "post_head_group": 4}
FORMS = [
    {"pre_kernel": (3, 3)},
    {"pre_kernel": None, "post_kernel": (3, 5), "head_norm": False},
    {**BOTH, "depth": 1, "gate": "elementwise"},
    {**BOTH, "sliding_window": 4},
    {**BOTH, "key_alignment": "left", "rope": None},
    {**BOTH, "key_alignment": "right", "gate": "headwise", "head_norm": False},
]


def make(*, perturbed=True, **options):
    torch.manual_seed(5)
    attn = MultiTokenAttention(E, H, options.pop("num_kv_heads", G), **{"dtype": torch.float64} | options)
    if perturbed:
        with torch.no_grad():
            for parameter in attn.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def assert_close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def projections(attn):
    return {name: value for name, value in attn.state_dict().items() if "_proj" in name}


def by_hand(attn, x):
    """The equations pair by pair, without rotation."""
    q, k, v = (
        layer(x).view(2, T, heads, 6).repeat_interleave(H // heads, 2).transpose(1, 2)
        for layer, heads in ((attn.q_proj, H), (attn.k_proj, G), (attn.v_proj, G))
    )
    sees = torch.ones(T, T).tril().bool()
    if attn.sliding_window:
        sees &= ~torch.ones(T, T).tril(-attn.sliding_window).bool()

    def conv(a, kernel):
        if kernel is None:
            return a
        _, Cq, Ck = kernel.shape
        left = {"both": (Ck - 1) // 2, "left": Ck - 1, "right": 0}[attn.key_alignment]
        out = torch.zeros_like(a)
        for i in range(T):
            for j in range(T):
                for row in range(Cq):
                    for column in range(Ck):
                        at = i - (Cq - 1) + row, j - left + column
                        if at[0] >= 0 and 0 <= at[1] < T:
                            out[:, :, i, j] += kernel[:, row, column] * a[:, :, at[0], at[1]]
        return out

    def mix(a, matrices):
        if matrices is None:
            return a
        return torch.einsum("bmts,mn->bnts", a, torch.block_diag(*matrices))

    s = mix(conv(6**-0.5 * (q @ k.mT) * sees, attn.pre_kernel), attn.pre_heads)
    p = s.masked_fill(~sees, -math.inf).softmax(-1)
    out = (mix(conv(p, attn.post_kernel) * sees, attn.post_heads) @ v).transpose(1, 2)
    if attn.subln is not None:
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * attn.subln.weight
    out = out * (1 - attn.lambda_init)
    out = out if attn.gate is None else out * torch.sigmoid(out @ attn.gate.weight.T + attn.gate.bias)
    return attn.o_proj(out.flatten(2))


@pytest.mark.parametrize("options", FORMS)
def test_it_is_the_equations(options):
    attn, x = make(**options | {"rope": None}), sample()
    with torch.no_grad():
        assert_close(attn(x), by_hand(attn, x))


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 4, T])
def test_chunks_give_the_gradients_of_the_definition(options, chunk_size):
    x, weight = sample(), sample()
    found, expected = (
        gradients(make(chunk_size=chunk_size, backend=backend, **options), x, weight) for backend in ("auto", "eager")
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-11, rtol=0, msg=name)


def test_it_starts_as_grouped_query_attention_with_a_norm():
    attn, x = make(perturbed=False, head_norm=False, **BOTH), sample()
    gqa = attnzoo.GroupedQueryAttention(E, H, G, dtype=torch.float64)
    gqa.load_state_dict(projections(attn))
    assert_close(attn(x), gqa(x))
    assert not torch.equal(make(perturbed=False, **BOTH)(x), attn(x))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_mixes_alone_are_talking_heads(backend):
    attn = make(num_kv_heads=H, **PLAIN | {"pre_head_group": 2, "post_head_group": 4}, backend=backend)
    talking = attnzoo.TalkingHeadsAttention(E, H, dtype=torch.float64)
    mixes = {"logits_proj": torch.block_diag(*attn.pre_heads), "weights_proj": attn.post_heads[0]}
    talking.load_state_dict(projections(attn) | mixes)
    x = sample()
    assert_close(attn(x), talking(x))


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_without_maps_every_backend_runs(backend):
    attn, x = make(**PLAIN, backend=backend), sample()
    assert_close(attn(x), make(**PLAIN)(x))
    with pytest.raises(attnzoo.BackendUnavailable):
        make(backend="sdpa")(x)


def test_a_mask_of_single_heads_hides_scores_from_the_mix_without_kernels_too():
    torch.manual_seed(5)
    attn, x = make(pre_kernel=None, post_kernel=None, pre_head_group=2, post_head_group=4), sample()
    keep = (torch.rand(2, H, T, T) < 0.6) | torch.eye(T, dtype=torch.bool)
    kernels = make(pre_kernel=(1, 1), post_kernel=(1, 1), pre_head_group=2, post_head_group=4)
    kernels.load_state_dict(attn.state_dict(), strict=False)
    with torch.no_grad():
        kernels.pre_kernel.fill_(1)
        kernels.post_kernel.fill_(1)
    assert_close(attn(x, mask=keep), kernels(x, mask=keep))
    attn.backend = "sdpa"
    with pytest.raises(attnzoo.BackendUnavailable, match="multi_token_attention"):
        attn(x, mask=keep)


def test_a_kernel_of_one_number_scales_the_scores_and_one_row_up_reads_the_query_before():
    options = PLAIN | {"pre_kernel": (3, 3), "rope": None}
    attn, x = make(**options), sample()
    with torch.no_grad():
        attn.pre_kernel.zero_()[:, -1, 1] = 1.7
        scaled = make(**PLAIN, rope=None, scale=1.7 * 6**-0.5)
        scaled.load_state_dict(projections(attn))
        assert_close(attn(x), scaled(x))
        attn.pre_kernel.zero_()[:, -2, 1] = 1
        assert_close(attn(x), by_hand(attn, x))


def test_a_kernel_to_the_left_is_a_shifted_one():
    left, both = make(pre_kernel=(2, 3), key_alignment="left"), make(pre_kernel=(2, 5))
    with torch.no_grad():
        for name, value in left.state_dict().items():
            if name != "pre_kernel":
                both.state_dict()[name].copy_(value)
        both.pre_kernel.zero_()[:, :, :3] = left.pre_kernel
    x = sample()
    assert_close(both(x), left(x))


@pytest.mark.parametrize("options", FORMS)
def test_packed_documents_are_separate_also_where_chunks_cut_them(options):
    attn, x = make(chunk_size=3, **options), sample()
    ends = [0, 4, 5, 13, 20, 26]
    y = attn(x, mask=AttentionMask.packed(ends)).flatten(0, 1)
    for start, stop in itertools.pairwise(ends):
        alone = attn(x.flatten(0, 1)[None, start:stop])
        assert_close(y[start:stop], alone[0])
    apart = torch.block_diag(*[torch.ones(b - a, b - a) for a, b in ((0, 4), (4, 5), (5, 13))]).bool()
    # A mask of pairs lets scores of the document before through, unless keys are read to the right alone.
    leaks = (attn(x, mask=apart)[0] - y[:13]).abs().max()
    assert (leaks > 1e-3) == (attn.key_alignment != "right")


def test_the_factor_follows_the_depth():
    attn = make(depth=0)
    assert 1 - attn.lambda_init == pytest.approx(0.8)
    attn.depth = 5
    assert 1 - attn.lambda_init == pytest.approx(0.2 + 0.6 * math.exp(-1.5))
    free = make()
    free.depth = 5
    assert free.lambda_init == 0


def test_observers_see_the_final_weights():
    attn, x, seen = make(chunk_size=4, **BOTH | {"head_norm": False}), sample(), []
    with observe(attn, seen.append), torch.no_grad():
        y = attn(x)
        cache = attn.init_cache(2, T)
        attn(x[:, :9], cache=cache)
        attn(x[:, 9:], cache=cache)
    whole, _, last = seen
    heads = whole.pattern() @ whole.values_by_head()
    assert_close(attn.o_proj(heads.transpose(1, 2).flatten(2)).detach(), y)
    assert_close(torch.cat([block for _, block in whole.pattern_blocks(3)], 2), whole.pattern())
    assert_close(last.pattern(), whole.pattern()[:, :, 9:])


# Cache


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 4, 3], [2] * 6 + [1]])
def test_decoding_is_the_full_forward(options, chunks):
    attn, x = make(chunk_size=2, **options), sample()
    cache = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split(chunks, 1)], 1)
    assert_close(y, attn(x))


@pytest.mark.parametrize("length", [0, 1, 6, 12, 30])
def test_tokens_are_taken_back_as_long_as_their_queries_are_there(length):
    attn, x, draft = make(**BOTH), sample(34), sample(34)
    kept = attn.maps.earlier + 16
    assert kept == 3 + 16
    cache = attn.init_cache(2, 34)
    with torch.no_grad():
        attn(torch.cat([x[:, :length], draft[:, length:]], 1)[:, :31], cache=cache)
        if 0 < length < 31 - 16:
            before = cache.state[0].clone()
            with pytest.raises(ValueError, match=f"length must be 0 or at least 15: .* gone, got {length}"):
                cache.truncate(length)
            assert cache.length == 31
            assert torch.equal(cache.state[0], before)
            return
        cache.truncate(length)
        assert cache.length == length
        y = torch.cat([attn(part, cache=cache) for part in x[:, length:].split(3, 1)], 1)
    assert_close(y, attn(x)[:, length:])


def test_what_was_taken_back_is_counted():
    attn, x = make(**BOTH), sample(40)
    cache = attn.init_cache(2, 40)
    with torch.no_grad():
        attn(x[:, :30], cache=cache)
        cache.truncate(20)
        with pytest.raises(ValueError, match="length must be 0 or at least 14"):
            cache.truncate(13)
        cache.truncate(15)
        assert_close(attn(x[:, 15:], cache=cache), attn(x)[:, 15:])
        cache.truncate(0)
        assert_close(attn(x, cache=cache), attn(x))


def test_the_cache_holds_keys_values_and_some_queries():
    attn = make(**BOTH)
    cache = attn.init_cache(3, 40)
    assert cache.nbytes == 8 * 3 * (40 * G * 12 + 19 * H * 6) == 3 * attn.state_bytes(40, torch.float64)
    assert attn.cache_bytes_per_token(torch.float64) == 8 * G * 12
    assert make(**PLAIN).init_cache(3, 40).state[0].numel() == 0


def test_a_mask_of_single_queries_needs_their_scores():
    attn, x = make(), sample()
    cache = attn.init_cache(2, T)
    with torch.no_grad():
        attn(x[:, :6], mask=torch.ones(6, 6, dtype=torch.bool), cache=cache)
        with pytest.raises(ValueError, match="mask must be the same for all queries with a cache"):
            attn(x[:, 6:8], mask=torch.ones(2, 8, dtype=torch.bool), cache=cache)
        assert cache.length == 6
        keys = torch.tensor([True] * 3 + [False] * 2 + [True] * 3)
        y = attn(x[:, 6:8], mask=keys, cache=cache)
    full = torch.ones(8, 8, dtype=torch.bool)
    full[:, 3:5] = False
    assert_close(y[:, 1:], attn(x[:, :8], mask=full)[:, 7:])


# Pruning, costs and refusals


def test_heads_without_mixes_are_pruned_with_their_kernels():
    options = {"pre_kernel": (3, 3), "post_kernel": (2, 3), "post_head_group": None}
    attn, x = make(**options), sample()
    keep = torch.tensor([False, True, True, False])
    hook = attn.o_proj.register_forward_pre_hook(lambda _, i: (torch.where(keep.repeat_interleave(6), i[0], 0.0),))
    expected = attn(x)
    hook.remove()
    attn.prune_heads([0])
    attn.prune_heads([3])
    assert_close(attn(x), expected)
    assert attn.pre_kernel.shape == (2, 3, 3)
    attn.prune_heads([1, 2])
    assert not attn(x).any()
    for name in ("pre_heads", "post_heads"):
        mixed = make(pre_head_group=2, post_head_group=None) if name == "pre_heads" else make()
        with pytest.raises(ValueError, match=f"indices cannot be pruned, since {name} mixes heads"):
            mixed.prune_heads([0])


def test_what_a_pair_costs():
    attn = MultiTokenAttention(64, 4, device="meta")
    parts = attn.flops_by_part(1, 100)
    assert parts["attention"] == 4 * 64 * 100
    assert parts["convolution"] == 2 * 4 * 66 * 100
    assert parts["composition"] == 2 * 4 * 2 * 100


def test_kernels_and_mixes_are_not_decayed():
    assert make(**BOTH).no_weight_decay() == {
        "pre_kernel", "pre_heads", "post_kernel", "post_heads", "subln.weight",
    }  # fmt: skip
    assert TokenMaps().earlier == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "causal must be True: .*, got causal=False"),
        ({"pre_kernel": (0, 3)}, r"pre_kernel \(queries\) must be at least 1, got 0"),
        ({"post_kernel": (2, 0)}, r"post_kernel \(keys\) must be at least 1, got 0"),
        ({"pre_kernel": (2, 4)}, "pre_kernel must have an odd number of keys with key_alignment 'both', got 4"),
        ({"pre_kernel": 3}, r"pre_kernel must be two sizes \(queries, keys\) or None, got 3"),
        ({"pre_head_group": 3}, "pre_head_group must divide num_heads, got 3 and 4"),
        ({"post_head_group": 0}, "post_head_group must be at least 1, got 0"),
        ({"key_alignment": "middle"}, "key_alignment must be one of 'both', 'left', 'right', got 'middle'"),
        ({"gate": "dense"}, "gate must be None, 'headwise' or 'elementwise', got 'dense'"),
        ({"depth": -1}, "depth must not be negative, got -1"),
        ({"depth": 1, "head_norm": False}, "depth needs head_norm=True, got depth=1 and head_norm=False"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_context_is_refused():
    with pytest.raises(ValueError, match=r"context must be None: .*; got a torch.float64 tensor of 3 dimensions"):
        make()(sample(), sample())
