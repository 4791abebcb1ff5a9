"""DCMHA: stored figures, its forms, what it reduces to, refusals."""

import copy
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, DynamicallyComposableAttention, Rotary
from attnzoo.masks import Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.observation import observing
from attnzoo.ops.score_rules import masked_softmax
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "dcmha.safetensors"
E, H, T = 24, 4, 13


@cache
def stored():
    with safe_open(GOLDEN, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return found, *(json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64"))


def golden(**options):
    tensors, config, _ = stored()
    config = dict(config)
    theta, config["sliding_window"] = config.pop("rope_base"), config.pop("window")
    config["rope"] = Rotary(theta=theta)
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = DynamicallyComposableAttention(*sizes, dtype=torch.float64, **(config | options))
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return attn


def make(groups=2, **options):
    torch.manual_seed(5)
    attn = DynamicallyComposableAttention(E, H, groups, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


VARIANTS = {
    "plain": {},
    "one group of keys": {"groups": 1},
    "two head groups": {"head_groups": 2},
    "pre only": {"post_compose": False},
    "post only": {"pre_compose": False, "bias": True},
    "query-wise only": {"key_wise": False},
    "key-wise only": {"query_wise": False, "static_base": True},
    "static only": {"query_wise": False, "key_wise": False, "static_base": True},
    "tanh, norm": {"dyn_act": "gelu_tanh", "qk_norm": True, "dyn_hidden_dim": 5},
    "window": {"sliding_window": 4},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"chunk_size": 7}, {"chunk_size": 1}, {}])
def test_stored_figures(options):
    tensors, _, single = stored()
    attn = golden(**options)
    low = gradients(copy.deepcopy(attn).float(), tensors["input.x"].float(), tensors["input.w"].float())
    found = gradients(attn, tensors["input.x"], tensors["input.w"])
    assert (found["y"] - tensors["output.y"]).abs().max() < 1e-9
    assert (low["y"].double() - tensors["output.y"]).abs().max() < 10 * single["y"]
    for key, value in tensors.items():
        if key.startswith("grad."):
            name = key.removeprefix("grad.")
            assert (found[name] - value).abs().max() < 1e-9, key
            assert (low[name].double() - value).abs().max() < 10 * single[f"grad_{name}"], key


def test_the_eps_of_the_norm_matters():
    tensors, _, _ = stored()
    y = golden(dyn_norm_eps=0.0)(tensors["input.x"])
    assert (y - tensors["output.y"]).abs().max() > 1e-9


@every_variant
@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64])
def test_chunked_is_unchunked_with_every_gradient(variant, chunk_size):
    x, weight = sample(), sample()
    expected = gradients(make(backend="eager", **VARIANTS[variant]), x, weight)
    found = gradients(make(chunk_size=chunk_size, **VARIANTS[variant]), x, weight)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-11, rtol=1e-11)


@every_variant
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 4, 3]])
def test_decoding_is_the_full_forward(variant, chunks):
    attn, x = make(**VARIANTS[variant]), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=state) for part in x.split(chunks, 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-12, rtol=0)
    tokens = 4 if attn.sliding_window else T
    assert state.nbytes == 2 * tokens * attn.cache_bytes_per_token(torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_up_vectors_and_gates_it_is_grouped_query_attention(groups):
    attn = make(groups)
    with torch.no_grad():
        for side in (attn.q_dyn, attn.k_dyn):
            side.w2[..., attn.rank :, :] = 0
            side.gate.weight.zero_()
    gqa = attnzoo.GroupedQueryAttention(E, H, groups, dtype=torch.float64)
    gqa.load_state_dict({k: v for k, v in attn.state_dict().items() if "_dyn" not in k})
    x = sample()
    torch.testing.assert_close(attn(x), gqa(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("stage", ["pre", "post"])
def test_gates_alone_scale_scores_or_outputs_of_a_head(stage):
    attn = make(4, rope=None, key_wise=False, pre_compose=stage == "pre", post_compose=stage == "post", backend="eager")
    with torch.no_grad():
        attn.q_dyn.w2[..., attn.rank :, :] = 0
    x = sample()
    gate = 1 + torch.tanh(attn.q_dyn.gate(x)).view(2, T, H)
    q, k, v = (getattr(attn, f"{n}_proj")(x).view(2, T, H, -1) for n in "qkv")
    scores = torch.einsum("bthd,bshd->bhts", q, k) * attn.scale
    if stage == "pre":
        scores = scores * gate.transpose(1, 2)[..., None]
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    heads = torch.einsum("bhts,bshd->bthd", p, v)
    heads = heads * gate[..., None] if stage == "post" else heads
    torch.testing.assert_close(attn(x), attn.o_proj(heads.flatten(2)), atol=1e-12, rtol=0)


def sides(B, T, N, R, M):
    return tuple(torch.randn(s).double() for s in ((B, T, N, R, M), (B, T, N, R, M), (B, T, N, M)))


def test_five_branches_are_one_matrix_for_each_pair():
    N, M, R = 2, 3, 2
    base, query, key = torch.randn(N, M, M).double(), sides(2, 4, N, R, M), sides(2, 5, N, R, M)
    a = torch.randn(2, N * M, 4, 5).double()
    compose = Composition(base, True, query, key)

    def matrices(side):
        u, v, g = side
        return torch.einsum("blnrm,blnrj->blnmj", u, v) + torch.diag_embed(g)

    whole = (torch.eye(M) + base + matrices(query))[:, :, None] + matrices(key)[:, None]
    expected = torch.einsum("bnmts,btsnmj->bnjts", a.view(2, N, M, 4, 5), whole).flatten(1, 2)
    torch.testing.assert_close(compose(a), expected, atol=1e-12, rtol=0)
    b = torch.randn_like(a)
    torch.testing.assert_close(compose(2 * a + b), 2 * compose(a) + compose(b), atol=1e-12, rtol=0)


def test_head_groups_are_a_block_diagonal_composition():
    attn = make(4, head_groups=2, rank=1, query_wise=False, key_wise=False, static_base=True)
    one = make(4, query_wise=False, key_wise=False, static_base=True)
    state = attn.state_dict()
    for name in ("pre_base", "post_base"):
        state[name] = torch.block_diag(*state[name])[None]
    one.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(one(x), attn(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("groups", "head_groups"), [(1, 1), (2, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"static_base": True, "pre_compose": False}])
def test_query_wise_compositions_fold_into_plain_attention(groups, head_groups, options):
    options = {"head_groups": head_groups, "key_wise": False, "rank": 1, **options}
    folded, direct = make(groups, **options), make(groups, backend="eager", **options)
    assert folded.folds
    x, weight = sample(), sample()
    mask = AttentionMask.padding([T, 6])
    expected = gradients(direct, x, weight, mask=mask)
    for key, value in gradients(folded, x, weight, mask=mask).items():
        torch.testing.assert_close(value, expected[key], atol=1e-11, rtol=1e-11)
    sdpa = make(groups, backend="sdpa", **options)
    torch.testing.assert_close(sdpa(x), direct(x), atol=1e-12, rtol=0)


def test_what_does_not_fold_is_refused_by_softmax_backends():
    assert not make().folds
    assert not make(4, key_wise=False).folds
    for backend in ("sdpa", "flash", "triton"):
        operation = "qk_norm_rope" if backend == "triton" else "composed_attention"
        with pytest.raises(attnzoo.BackendUnavailable, match=f"backend '{backend}' cannot run {operation}: "):
            make(backend=backend)(sample())


def test_a_window_of_all_keys_is_none():
    x, wide = sample(), make(sliding_window=T)
    torch.testing.assert_close(wide(x), make()(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("head_groups", [1, 2])
def test_the_order_of_heads_within_a_group_means_nothing(head_groups):
    attn = make(4, head_groups=head_groups, rank=1, static_base=True)
    M = H // head_groups
    order = torch.randperm(M)
    heads = torch.cat([order + n * M for n in range(head_groups)])
    state = attn.state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        state[f"{name}.weight"] = state[f"{name}.weight"].view(H, -1, E)[heads].flatten(0, 1)
    state["o_proj.weight"] = state["o_proj.weight"].view(E, H, -1)[:, heads].flatten(1)
    for side in ("q_dyn", "k_dyn"):
        state[f"{side}.w2"] = state[f"{side}.w2"][..., order]
        gate = state[f"{side}.gate.weight"].view(head_groups, 2, M, E)
        state[f"{side}.gate.weight"] = gate[:, :, order].reshape(-1, E)
    for name in ("pre_base", "post_base"):
        state[name] = state[name][:, order][:, :, order]
    other = make(4, head_groups=head_groups, rank=1, static_base=True)
    other.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(other(x), attn(x), atol=1e-11, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "two head groups", "key-wise only", "tanh, norm"])
def test_derivatives(variant):
    attn, x = make(chunk_size=2, **VARIANTS[variant]), sample(4)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True)


@every_variant
def test_flops_are_those_that_are_counted(variant):
    options = {k: v for k, v in VARIANTS[variant].items() if k != "sliding_window"}
    attn = make(causal=False, backend="eager", **options)
    with FlopCounterMode(display=False) as counter:
        attn(sample()[:1])
    assert attn.flops(T, T) == counter.get_total_flops()


@pytest.mark.parametrize("heads", [[1], [0, 1], [0, 3]])
@pytest.mark.parametrize("variant", ["plain", "query-wise only", "one group of keys"])
def test_pruned_heads_are_heads_with_output_zero(variant, heads):
    attn, x = make(**VARIANTS[variant]), sample()
    keep = torch.ones(H).double()
    keep[heads] = 0
    hook = attn.o_proj.register_forward_pre_hook(lambda _, i: (i[0] * keep.repeat_interleave(E // H),))
    expected = attn(x)
    hook.remove()
    attn.prune_heads(heads)
    assert attn.pruned_heads == tuple(heads)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
    state = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=state) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)


def test_folded_and_pruned():
    for heads in ([0, 1], [1], [2]):
        options = {"head_groups": 2, "key_wise": False, "rank": 1}
        folded, direct = make(2, **options), make(2, backend="eager", **options)
        for attn in (folded, direct):
            attn.prune_heads(heads)
        x = sample()
        torch.testing.assert_close(folded(x), direct(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["plain", "query-wise only", "one group of keys"])
@pytest.mark.parametrize("pruned", [[], [1, 2]])
def test_what_an_observer_is_shown_gives_the_outputs(variant, pruned):
    options = {"groups": 1} if variant == "query-wise only" else {}
    attn, x, seen, heads = make(**VARIANTS[variant], **options), sample(), [], []
    attn.prune_heads(pruned)
    attn.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    with observing(seen.append):
        attn(x)
    first = seen[0]
    assert first.operation == "composed_attention"
    q, k = first.q, first.k.repeat_interleave(H // first.k.shape[2], 2)
    a = first.pre(torch.einsum("bthd,bshd->bhts", q, k) * first.rules.scale)
    w = first.post(masked_softmax(a, first.view.dense(a.shape, a.device)))
    w = w if first.value_heads is None else w[:, first.value_heads]
    v = first.v[
        :, :, [n * first.v.shape[2] // H for n in range(H)] if first.value_groups is None else first.value_groups
    ]
    torch.testing.assert_close(torch.einsum("bhts,bshd->bthd", w, v).flatten(2), heads[0], atol=1e-12, rtol=0)


def test_a_failure_behind_attention_leaves_the_cache_as_it_was():
    for window in (None, 4):
        attn, x = make(sliding_window=window), sample()
        state = attn.init_cache(2, T)
        with torch.no_grad():
            attn(x[:, :6], cache=state)
            hook = attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                attn(x[:, 6:9], cache=state)
            hook.remove()
            assert state.length == 6
            torch.testing.assert_close(attn(x[:, 6:], cache=state), attn(x)[:, 6:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["q_dyn.w1", "k_dyn.gate", "q_norm", "k_norm"])
def test_what_replaces_a_layer_is_called(name):
    attn, x = make(qk_norm=True), sample()
    parent, _, child = name.rpartition(".")
    layer = attn.get_submodule(name)
    before = attn(x)
    handle = layer.register_forward_hook(lambda _, __, out: 2 * out)
    hooked = attn(x)
    handle.remove()
    setattr(attn.get_submodule(parent), child, torch.nn.Sequential(copy.deepcopy(layer), Twice()))
    torch.testing.assert_close(attn(x), hooked, atol=1e-12, rtol=0)
    assert not torch.allclose(hooked, before)


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def test_chunks_inside_transforms():
    attn, x = make(chunk_size=5), sample().requires_grad_()
    (expected,) = torch.autograd.grad(attn(x).square().sum(), x)
    found = torch.func.grad(lambda x: attn(x).square().sum())(x)
    torch.testing.assert_close(found, expected)
    rows = torch.func.vmap(torch.func.grad(lambda row: attn(row[None]).square().sum()))(x)
    torch.testing.assert_close(rows, expected)


def test_mixes_fold_where_groups_share_key_and_value():
    q, k, v = torch.randn(2, T, 3, 6).double(), torch.randn(2, T, 1, 6).double(), torch.randn(2, T, 1, 5).double()
    pre, post = Composition(torch.randn(1, 3, 4).double(), False), Composition(torch.randn(1, 4, 2).double(), False)
    call = {"view": Visibility(window=4), "scale": 0.4}
    expected = composed_attention(q, k, v, pre, post, **call, backend="eager")
    torch.testing.assert_close(composed_attention(q, k, v, pre, post, **call, backend="sdpa"), expected)
    chosen = composed_attention(q, k, v, pre, post, **call, value_heads=(1,))
    torch.testing.assert_close(chosen, expected[:, :, 1:])


def test_saved_memory_grows_with_the_length():
    attn, sizes = DynamicallyComposableAttention(E, H, 2, chunk_size=16), []
    for tokens in (256, 512):
        kept = {}

        def pack(x, kept=kept):
            # Chunks refer to the same queries, keys and values: a storage counts once.
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = attn(torch.randn(1, tokens, E))
        sizes.append(sum(kept.values()))
        assert y.grad_fn is not None
    assert sizes[1] <= 2.1 * sizes[0]


def test_cross_attention_takes_both_sides_from_their_inputs():
    attn = make(causal=False, kdim=9, rope=None)
    x, context = sample(), torch.randn(2, 5, 9).double()
    y = attn(x, context)
    eager = make(causal=False, kdim=9, rope=None, backend="eager", chunk_size=4)
    torch.testing.assert_close(y, eager(x, context), atol=1e-12, rtol=0)
    changed = context.clone()
    changed[:, 2] += 1
    assert not torch.allclose(attn(x, changed), y)


def test_the_cache_is_little_more_than_that_of_multi_head_attention():
    attn = DynamicallyComposableAttention(1024, 16)
    plain = attnzoo.MultiHeadAttention(1024, 16)
    extra = attn.cache_bytes_per_token() / plain.cache_bytes_per_token() - 1
    assert extra == pytest.approx(5 / 64)
    assert sum(p.numel() for p in attn.parameters()) == 4 * 1024**2 + 20 * 1024 * 16 + 64 * 16**2


def test_the_start_is_close_to_multi_head_attention():
    torch.manual_seed(0)
    attn = DynamicallyComposableAttention(1024, 16)
    (u, v, g), _ = attn.q_dyn(torch.randn(1, 400, 1024))
    assert u.square().mean().sqrt().item() == pytest.approx(0.7, abs=0.1)
    assert v.square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.3)
    assert g.square().mean().sqrt().item() == pytest.approx(0.007, rel=0.3)
    mha = attnzoo.MultiHeadAttention(1024, 16, bias=False)
    mha.load_state_dict({k: v for k, v in attn.state_dict().items() if "_dyn" not in k})
    x = torch.randn(1, 32, 1024)
    difference = (attn(x) - mha(x)).norm() / mha(x).norm()
    assert 1e-4 < difference < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_groups": 3}, "head_groups must divide num_heads, got 3 and 4"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 5}, "rank must be at most the 4 heads of a group, got 5"),
        ({"dyn_hidden_dim": 0}, "dyn_hidden_dim must be at least 1, got 0"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"sliding_window": 3, "causal": False}, "sliding_window needs causal=True, got 3 and causal=False"),
        ({"pre_compose": False, "post_compose": False}, "pre_compose or post_compose must be True"),
        ({"query_wise": False, "key_wise": False}, "query_wise, key_wise or static_base must be True"),
        ({"dyn_act": "relu"}, "dyn_act must be one of 'gelu', 'gelu_tanh', got 'relu'"),
        ({"kdim": 3}, "kdim needs causal=False, got kdim=3"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicallyComposableAttention(E, H, **options)
