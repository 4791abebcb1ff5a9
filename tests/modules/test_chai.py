"""Clustered heads: stored figures, an independent form with copied weights, decoding, caches, observers, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import ClusteredHeadAttention
from attnzoo.modules.clustered_cache import ClusteredCache
from attnzoo.modules.heads import HeadLayout
from attnzoo.modules.protocol import MEMBERS, missing_members
from attnzoo.ops.clustered_attention import BLOCK
from attnzoo.ops.head_clustering import cluster_heads, cosine_distance
from attnzoo.ops.observation import observing
from attnzoo.ops.softmax_attention import softmax_attention_reference
from tests.zoo import OPTIONS

GOLDEN = Path(__file__).parents[1] / "golden" / "chai.safetensors"
E, H, D = 24, 6, 10
SIZES = {"mha": (6, 3), "gqa": (3, 3), "gqa-more-clusters": (2, 5), "gqa-one": (3, 1)}
"""Key/value heads G and clusters K."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def trained(G=H, seed=0, **options):
    """A module whose heads attend to different tokens, as an untrained one's do not."""
    torch.manual_seed(seed)
    attn = attnzoo.GroupedQueryAttention(E, H, G, D, v_head_dim=7, bias=True, **options).double().eval()
    for name, parameter in attn.named_parameters():
        if name != "q_norm.weight":
            parameter.normal_(std=0.5 if name.startswith(("q_", "k_", "sinks")) else 0.2)
    return attn


def tokens(B=3, T=19, seed=1):
    return torch.randn(B, T, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_copied_heads(attn, labels, x, **call):
    """The same by a plain module for each sequence, in which every head has its representative's queries and keys."""
    reads, rows = attn.heads.reads, []
    for b, row in enumerate(labels.tolist()):
        heads = [row.index(c) for c in row]
        plain = copy.deepcopy(attn)
        plain.num_kv_heads, plain.heads = attn.num_heads, HeadLayout.of(attn.num_heads)

        def copied(linear, width, heads):
            new = torch.nn.Linear(E, 1, linear.bias is not None).to(linear.weight)
            new.weight = torch.nn.Parameter(torch.cat([linear.weight[h * width : (h + 1) * width] for h in heads]))
            if linear.bias is not None:
                new.bias = torch.nn.Parameter(torch.cat([linear.bias[h * width : (h + 1) * width] for h in heads]))
            return new

        plain.q_proj = copied(attn.q_proj, attn.head_dim, heads)
        plain.k_proj = copied(attn.k_proj, attn.head_dim, [reads[h] for h in heads])
        plain.v_proj = copied(attn.v_proj, attn.v_head_dim, reads)
        if attn.sinks is not None:
            plain.sinks = torch.nn.Parameter(attn.sinks[heads])
        if attn.alibi_slopes is not None:
            plain.alibi_slopes = tuple(attn.alibi_slopes[h] for h in heads)
        one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) and v.shape[0] > 1 else v for k, v in call.items()}
        rows.append(plain(x[b : b + 1], **one))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def stored():
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        c = json.loads(file.metadata()["config"])
    attn = attnzoo.GroupedQueryAttention(
        c["embed_dim"], c["num_heads"], c["num_kv_heads"], c["head_dim"], rope=attnzoo.Rotary(theta=c["rope_theta"])
    )
    weights = {key.removeprefix("weights."): value for key, value in t.items() if key.startswith("weights.")}
    attn.load_state_dict(weights, strict=True)
    return t, c, attn.double().eval()


def assert_near(got, expected, atol=1e-9):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < atol


def test_stored_figures(stored):
    t, c, attn = stored
    layer = ClusteredHeadAttention(attn, c["num_clusters"], c["probe_tokens"])
    assert_near(layer(t["input.x"]), t["output.y"])
    assert_near(attn(t["input.x"]), t["output.y_mha"])
    assert torch.equal(layer.labels, t["output.labels"])
    assert torch.equal(layer.representatives, t["output.representatives"])
    assert_near(layer.probe(t["input.x"]), t["output.probe"])
    official = ClusteredHeadAttention(attn, c["num_clusters"], c["probe_tokens"], probe_causal=False)
    official(t["input.x"])
    assert torch.equal(official.labels, t["output.labels_noncausal_probe"])
    assert (official.probe(t["input.x"])[:, :, 0] < 1).all()
    assert (t["output.y"] - t["output.y_mha"]).abs().max() > 1e-3


@pytest.mark.parametrize("split", [[20], [7, 1, 3, 1, 8], [5, *[1] * 15], [2, 9, 9]])
def test_stored_output_from_a_cache(stored, split):
    t, c, attn = stored
    layer = ClusteredHeadAttention(attn, c["num_clusters"])
    cache = layer.init_cache(2, 20)
    y = torch.cat([layer(part, cache=cache) for part in t["input.x"].split(split, 1)], 1)
    # A first part that is shorter than the probe is answered before there are clusters.
    plain = split[0] if split[0] < 5 else 0
    expected = torch.cat([t["output.y_mha"][:, :plain], t["output.y"][:, plain:]], 1)
    assert_near(y, expected)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("T", [6, 19])
def test_equals_plain_modules_with_copied_heads(size, option, T):
    G, K = SIZES[size]
    attn, x = trained(G, **OPTIONS[option]), tokens(T=T)
    layer = ClusteredHeadAttention(attn, K)
    y = layer(x)
    assert layer.representatives.shape == (3, K)
    assert_near(y, with_copied_heads(attn, layer.labels, x))
    if K == 1:
        assert not layer.labels.any()


def test_sequences_differ_in_their_clusters():
    labels = []
    for G, K in SIZES.values():
        layer = ClusteredHeadAttention(trained(G), K)
        layer(tokens())
        labels += [layer.labels]
    assert any((one != one[:1]).any() for one in labels)


@pytest.mark.parametrize("alike", [True, False])
def test_more_queries_than_a_block(alike):
    attn, T = trained(), 2 * BLOCK + 5
    x = tokens(1, T).expand(2, -1, -1) if alike else tokens(2, T)
    layer = ClusteredHeadAttention(attn, 2)
    assert_near(layer(x), with_copied_heads(attn, layer.labels, x))
    cache = layer.init_cache(2, T)
    y = torch.cat([layer(part, cache=cache) for part in x.split([7, T - 8, 1], 1)], 1)
    assert_near(y, layer(x))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", [[6, 13], [11, *[1] * 8], [9, 2, 4, 1, 3]])
def test_decoding_equals_the_full_forward(size, option, split):
    G, K = SIZES[size]
    layer, x = ClusteredHeadAttention(trained(G, **OPTIONS[option]), K), tokens()
    cache = layer.init_cache(3, 19)
    y = torch.cat([layer(part, cache=cache) for part in x.split(split, 1)], 1)
    assert cache.length == 19
    assert_near(y, layer(x))


def test_as_many_clusters_as_heads_is_the_wrapped_module():
    attn, x = trained(3), tokens()
    layer = ClusteredHeadAttention(attn, H)
    assert torch.equal(layer(x), attn(x))
    assert layer.labels.tolist() == [list(range(H))] * 3
    cache, own = layer.init_cache(3, 19), attn.init_cache(3, 19)
    for part in x.split([10, 1, 8], 1):
        assert torch.equal(layer(part, cache=cache), attn(part, cache=own))
    assert cache.nbytes == own.nbytes


def test_duplicated_heads_are_found_and_cost_nothing():
    attn, x = trained(), tokens()
    for linear in (attn.q_proj, attn.k_proj):
        for values in (linear.weight, linear.bias):
            heads = values.view(H, D, *values.shape[1:])
            heads[4], heads[5], heads[3] = heads[0], heads[1], heads[1]
    layer = ClusteredHeadAttention(attn, 3)
    assert_near(layer(x), attn(x))
    assert layer.labels.tolist() == [[0, 1, 2, 1, 0, 1]] * 3


def test_sequences_of_a_batch_do_not_know_each_other():
    layer, x = ClusteredHeadAttention(trained(), 3), tokens(5)
    y, labels, order = layer(x), layer.labels, torch.tensor([3, 0, 4, 2, 1])
    assert_near(layer(x[order]), y[order], 1e-12)
    assert torch.equal(layer.labels, labels[order])
    for b in range(5):
        assert_near(layer(x[b : b + 1]), y[b : b + 1], 1e-12)


def test_a_sequence_that_holds_no_numbers_spoils_no_other():
    layer, x = ClusteredHeadAttention(trained(), 3), tokens(3)
    expected = layer(x)
    x[1, 2] = torch.nan
    y = layer(x)
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[2], expected[2])
    assert y[1, 2:].isnan().all()
    assert layer.labels.max() == 2


@pytest.mark.parametrize(
    ("pattern", "numbers", "message"),
    [
        ([[1.0]], (1,), "pattern must be a tensor"),
        (torch.ones(4, 5, 5), (2.0,), r"num_clusters must lie between 1 and the 4 heads, got 2\.0"),
        (torch.ones(4, 5, 5), (2, 2.0), r"probe_tokens must lie between 1 and the 5 tokens of the pattern, got 2\.0"),
    ],
)
def test_patterns_that_cannot_be_clustered(pattern, numbers, message):
    with pytest.raises(ValueError, match=message):
        cluster_heads(pattern, *numbers)


def test_clusters_go_by_the_direction_of_weights_however_small_a_sink_leaves_them():
    pattern = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    small = pattern * torch.tensor([1.0, 1e-14, 1e-30, 1.0], dtype=torch.float64)[:, None, None]
    assert torch.equal(cluster_heads(small, 2), cluster_heads(pattern, 2))
    torch.testing.assert_close(cosine_distance(small), cosine_distance(pattern), atol=1e-12, rtol=0)


def test_labels_do_not_depend_on_tokens_after_the_probe():
    layer, x = ClusteredHeadAttention(trained(), 3, 4), tokens()
    y, labels = layer(x), layer.labels
    other = torch.cat([x[:, :4], tokens(seed=5)[:, 4:]], 1)
    z = layer(other)
    assert torch.equal(layer.labels, labels)
    assert_near(z[:, :4], y[:, :4], 1e-12)
    layer(tokens(seed=5))
    assert not torch.equal(layer.labels, labels)


def test_less_than_a_probe_is_plain_attention():
    attn, x = trained(), tokens(T=4)
    layer = ClusteredHeadAttention(attn, 2)
    assert torch.equal(layer(x), attn(x))
    assert layer.labels is None
    cache = layer.init_cache(3, 4)
    assert_near(torch.cat([layer(part, cache=cache) for part in x.split(1, 1)], 1), attn(x))
    assert cache.clusters is None


def test_pruned_heads():
    attn, x = trained(3), tokens()
    attn.prune_heads([1, 2])
    layer = ClusteredHeadAttention(attn, 2)
    y = layer(x)
    assert_near(y, with_copied_heads(attn, layer.labels, x))
    cache = layer.init_cache(3, 19)
    assert_near(torch.cat([layer(part, cache=cache) for part in x.split([12, 1, 6], 1)], 1), y)


def test_padding_on_the_left_does_not_shift_the_probe():
    attn, x = trained(), tokens()
    layer, lengths = ClusteredHeadAttention(attn, 3), (19, 12, 7)
    real = torch.arange(19) >= 19 - torch.tensor(lengths)[:, None]
    positions = (torch.arange(19) - 19 + torch.tensor(lengths)[:, None]).clamp(min=0)
    y, labels = layer(x, mask=real[:, None, None], positions=positions), layer.labels
    cache = layer.init_cache(3, 19)
    parts = [layer(x[:, a:b], mask=real[:, None, None, :b], positions=positions[:, a:b], cache=cache)
             for a, b in ((0, 18), (18, 19))]  # fmt: skip
    for b, length in enumerate(lengths):
        alone = layer(x[b : b + 1, 19 - length :])
        assert_near(y[b : b + 1, 19 - length :], alone)
        assert_near(torch.cat(parts, 1)[b : b + 1, 19 - length :], alone)
        assert torch.equal(layer.labels, labels[b : b + 1])


def test_padding_on_the_right():
    layer, x = ClusteredHeadAttention(trained(), 3), tokens()
    y = layer(x, mask=attnzoo.AttentionMask.padding([19, 9, 5]))
    for b, length in enumerate((19, 9, 5)):
        assert_near(y[b : b + 1, :length], layer(x[b : b + 1, :length]))


def test_a_cache_holds_the_keys_of_representatives_only():
    attn, x = trained(), tokens()
    layer, number = ClusteredHeadAttention(attn, 2), 8
    cache, full = layer.init_cache(3, 19), attn.init_cache(3, 19)
    layer(x, cache=cache)
    assert [s.shape for s in cache.buffers] == [(3, 2, 19, D), (3, H, 19, 7)]
    assert full.nbytes == 3 * 19 * H * (D + 7) * number
    assert cache.nbytes == 3 * 19 * (2 * D + H * 7) * number == 3 * 19 * layer.cache_bytes_per_token(torch.float64)
    grouped = ClusteredHeadAttention(trained(2), 5)
    cache = grouped.init_cache(3, 19)
    grouped(x, cache=cache)
    reads = {h // 3 for row in grouped.representatives.tolist() for h in row}
    assert cache.buffers[0].shape[1] == len(reads) <= 2


def test_no_tensor_of_all_scores_and_no_score_twice():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    T = 6 * BLOCK
    layer, x = ClusteredHeadAttention(trained(), 2), tokens(1, T)
    with Watch():
        layer(x)
    assert largest < T * T / 4
    cache = layer.init_cache(1, T + 1)
    layer(x, cache=cache)
    with FlopCounterMode(display=False) as counted:
        layer(x[:, :1], cache=cache)
    assert counted.get_total_flops() == layer.flops(1, T + 1) < layer.attn.flops(1, T + 1)
    with FlopCounterMode(display=False) as counted:
        layer(x)
    # The counter sees whole blocks where causality cuts them, and the other heads of the probe.
    assert layer.flops(T) < counted.get_total_flops() < 1.15 * layer.flops(T) < layer.attn.flops(T)


def test_reorder_truncate_and_reset():
    layer, x = ClusteredHeadAttention(trained(3), 3), tokens()
    full, cache, order = layer(x), layer.init_cache(3, 19), torch.tensor([2, 0, 0])
    layer(x[:, :12], cache=cache)
    cache.reorder(order)
    assert_near(layer(x[order, 12:], cache=cache), full[order, 12:])
    cache.truncate(12)
    assert_near(layer(x[order, 12:], cache=cache), full[order, 12:])
    with pytest.raises(ValueError, match="length must be 0 or at least the probe_tokens 5"):
        cache.truncate(3)
    cache.truncate(0)
    assert cache.clusters is None
    assert_near(layer(x, cache=cache), full)
    cache.reset()
    layer(x[:, :4], cache=cache)
    cache.reorder(order)
    assert_near(layer(x[order, 4:], cache=cache), full[order, 4:])


def test_gradients_where_they_are_asked_for():
    attn, x = trained(), tokens()
    layer = ClusteredHeadAttention(attn, 3, allow_grad=True).train()
    with torch.enable_grad():
        found = []
        for call in (layer, lambda x: with_copied_heads(attn, layer.labels, x)):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad((call(leaf) * tokens(seed=9)).sum(), leaf)[0])
    assert_near(found[0], found[1])


def test_bfloat16_is_as_good_as_the_plain_form():
    attn, x = trained(), tokens()
    layer = ClusteredHeadAttention(attn, 3)
    exact, labels = layer(x), layer.labels
    half = copy.deepcopy(layer).to(torch.bfloat16)
    got = half(x.bfloat16())
    if not torch.equal(half.labels, labels):
        pytest.skip("rounding chose other clusters")
    plain = with_copied_heads(half.attn, labels, x.bfloat16())
    budget, floor = (plain - exact).abs().max(), torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * budget + floor


def test_autocast_with_a_cache():
    layer, x = ClusteredHeadAttention(trained().float(), 3), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = layer.init_cache(3, 19, dtype=torch.bfloat16)
        y = torch.cat([layer(part, cache=cache) for part in x.split([9, 1, 9], 1)], 1)
        torch.testing.assert_close(y, layer(x), atol=0.05, rtol=0.05)


def test_empty_batches_and_calls():
    layer = ClusteredHeadAttention(trained(), 3)
    assert layer(tokens()[:0]).shape == (0, 19, E)
    assert layer(tokens()[:, :0]).shape == (3, 0, E)
    cache = layer.init_cache(3, 19)
    layer(tokens()[:, :9], cache=cache)
    assert layer(tokens()[:, :0], cache=cache).shape == (3, 0, E)
    assert cache.length == 9


def test_the_wrapper_shares_weights_and_mode():
    attn = trained()
    layer = ClusteredHeadAttention(attn, 3)
    assert layer.attn is attn
    assert not layer.training
    assert set(layer.state_dict()) == {f"attn.{name}" for name in attn.state_dict()}
    assert (layer.embed_dim, layer.num_heads, layer.causal) == (E, H, True)
    assert "num_clusters=3" in repr(layer)


def test_it_fulfils_the_contract_with_the_heads_of_the_wrapped_module():
    attn = trained(3)
    attn.prune_heads([1])
    layer = ClusteredHeadAttention(attn, 3)
    assert not missing_members(layer)
    own = {"aux_loss", "has_patterns", "factored_circuits", "flops", "flops_by_part", "init_cache", "state_bytes"}
    own |= {"cache_bytes_per_token", "no_weight_decay", "prune_heads"}
    for name in set(MEMBERS) - own:
        assert getattr(layer, name) == getattr(attn, name), name
    assert layer.heads.kept == (0, 2, 3, 4, 5)
    assert layer.head_outputs is attn.o_proj
    assert layer.no_weight_decay() == set()
    assert layer.flops(19) == sum(layer.flops_by_part(19).values())
    for counts in ((5, 3), (-1,), (2.5,)):
        with pytest.raises(ValueError, match=r"(S must be at least T|T must not be|T must be an integer)"):
            layer.flops(*counts)


@pytest.mark.parametrize("clusters", [3, H])
def test_dropout_is_applied_only_where_every_head_is_a_cluster(clusters):
    layer, x = ClusteredHeadAttention(trained(dropout=0.5), clusters).train(), tokens()
    for T in (3, 19):
        assert torch.equal(layer(x[:, :T]), layer(x[:, :T])) == (clusters < H)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 7, "sink_tokens": 2}])
def test_bytes_of_a_state(options):
    layer = ClusteredHeadAttention(trained(**options), 3)
    cache = layer.init_cache(1, 19)
    layer(tokens(1), cache=cache)
    assert layer.state_bytes(19, torch.float64) == cache.nbytes


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", ["mha", "gqa-more-clusters"])
def test_an_observer_sees_the_weights_of_all_heads(size, option):
    G, K = SIZES[size]
    layer, x = ClusteredHeadAttention(trained(G, **OPTIONS[option]), K), tokens()
    cache, seen = layer.init_cache(3, 19), []
    with observing(seen.append):
        y = torch.cat([layer(part, cache=cache) for part in x.split([3, 10, 6], 1)], 1)
    assert [o.operation for o in seen] == ["softmax_attention"] * 3
    outputs = []
    for o in seen:
        k, v = (part.repeat_interleave(H // part.shape[2], 2) for part in (o.k, o.v))
        outputs.append(softmax_attention_reference(o.q, k, v, o.view, o.rules))
    assert_near(layer.attn.o_proj(torch.cat(outputs, 1).flatten(2)), y)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4, "sink_tokens": 1}])
@pytest.mark.parametrize("split", [[2, 1, 16], [3, 5, 11], [5, 1, 13], [9, 3, 7]])
def test_a_call_that_fails_leaves_the_cache_as_it_was(split, options):
    """While there are too few tokens, where heads are clustered, and after that."""
    layer, x = ClusteredHeadAttention(trained(**options), 3), tokens()

    def fail(*_):
        raise RuntimeError("at the last moment")

    def decoded(failing):
        cache, outputs, first = layer.init_cache(3, 19), [], 0
        for part in x.split(split, 1):
            if failing:
                before = cache.states, cache.clusters, cache.length
                wrong = torch.ones(2, 40, dtype=torch.bool)
                with pytest.raises(ValueError, match="mask must broadcast"):
                    layer(part, mask=wrong, cache=cache)
                hook = layer.attn.o_proj.register_forward_pre_hook(fail)
                with pytest.raises(RuntimeError, match="at the last moment"):
                    layer(part + 1, cache=cache)
                hook.remove()
                assert (cache.states, cache.clusters, cache.length) == before == (*before[:2], first)
            outputs.append(layer(part, cache=cache))
            first += part.shape[1]
        return torch.cat(outputs, 1)

    assert torch.equal(decoded(True), decoded(False))


class WithAdapter(torch.nn.Linear):
    """As adapters are: a subclass whose output is not that of its weight."""

    def forward(self, x):
        return super().forward(x) + 0.3 * x[..., -1:]


@pytest.mark.parametrize("B", [1, 3])
def test_projections_that_are_not_plain_are_called(B):
    def changed(change):
        attn = trained()
        for name in ("q_proj", "k_proj"):
            change(attn, name, getattr(attn, name))
        layer = ClusteredHeadAttention(attn, 3)
        return layer(tokens(B)), layer.labels

    def adapter(attn, name, linear):
        linear.__class__ = WithAdapter

    def hook(attn, name, linear):
        linear.register_forward_hook(lambda _, inputs, out: out + 0.3 * inputs[0][..., -1:])

    def merged(attn, name, linear):
        linear.weight[:, -1] += 0.3

    (y, labels), *others = [changed(change) for change in (merged, adapter, hook)]
    for z, found in others:
        assert_near(z, y)
        assert torch.equal(found, labels)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_clustering_cannot_be_traced():
    layer, x = ClusteredHeadAttention(trained(), 3), tokens()
    y, message = layer(x), "x must have values where heads are clustered, which the first 5 tokens decide"
    with pytest.raises(ValueError, match=message), FakeTensorMode():
        ClusteredHeadAttention(attnzoo.MultiHeadAttention(E, H, head_dim=D).eval(), 3)(torch.randn(3, 19, E))
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(layer).to("meta")(x.to("meta"))
    with pytest.raises(ValueError, match=message):
        torch.jit.trace(layer, x)
    with pytest.raises(ValueError, match=message):
        torch.export.export(layer, (x,))
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(layer)(x[None])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("prompt", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_decoding_compiles_and_a_prompt_with_graph_breaks(prompt):
    layer, x = ClusteredHeadAttention(trained(), 3), tokens()
    y, cache = layer(x), layer.init_cache(3, 19)
    first = torch.compile(layer, backend="eager") if prompt else layer
    assert_near(first(x[:, :9], cache=cache), y[:, :9])
    decode = torch.compile(layer, backend="eager", fullgraph=True)
    assert_near(torch.cat([decode(part, cache=cache) for part in x[:, 9:].split([1, 9], 1)], 1), y[:, 9:])


def test_one_key_head_is_warned_about():
    with pytest.warns(UserWarning, match="save no key cache"):
        ClusteredHeadAttention(attnzoo.MultiQueryAttention(E, H), 2)


def clustered_cache():
    layer = ClusteredHeadAttention(trained(), 3)
    cache = layer.init_cache(3, 19)
    layer(tokens()[:, :10], cache=cache)
    return layer, cache


def with_cache(x):
    layer, cache = clustered_cache()
    return layer(x, cache=cache)


def with_cache_of(other):
    return ClusteredHeadAttention(trained(), 3)(tokens(), cache=other.init_cache(3, 19))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClusteredHeadAttention(trained(), 7), "num_clusters must be at most num_heads, got 7 and 6"),
        (lambda: ClusteredHeadAttention(trained(), 0), "num_clusters must be at least 1"),
        (lambda: ClusteredHeadAttention(trained(), 2, 0), "probe_tokens must be at least 1"),
        (lambda: ClusteredHeadAttention(trained(causal=False), 2), "attn must be causal"),
        (lambda: ClusteredHeadAttention(attnzoo.DynamicallyComposableAttention(E, H), 2), "attn must be .* got Dynam"),
        (lambda: ClusteredHeadAttention(attnzoo.MixtureOfHeadAttention(E, H), 2), "attn must be .* got MixtureOfHead"),
        (lambda: ClusteredHeadAttention(attnzoo.KnockingHeadsAttention(E, H), 2), "attn must be .* got _?Knocking"),
        (lambda: ClusteredHeadAttention(trained(), 2)(tokens(), tokens()), "context must be None"),
        (lambda: ClusteredHeadAttention(trained(), 2)(tokens()[..., 1:]), "x must have shape"),
        (lambda: ClusteredHeadAttention(trained(), 2).probe(tokens(T=3)), "x must have at least the probe_tokens 5"),
        (
            lambda: ClusteredHeadAttention(trained(), 2)(tokens(), mask=torch.ones(H, 19, 19).bool()),
            "mask must be the same for all heads",
        ),
        (
            lambda: ClusteredHeadAttention(trained(), 2)(tokens(), mask=attnzoo.AttentionMask.packed([0, 9, 57])),
            "mask must not be packed",
        ),
        (
            lambda: ClusteredHeadAttention(trained(), 2)(tokens(), mask=attnzoo.AttentionMask.padding([19, 4, 9])),
            "mask must leave every row at least the probe_tokens 5, got a row with 4",
        ),
        (lambda: with_cache(tokens()), "cache is full: 10 cached and 19 new"),
        (lambda: with_cache(tokens(2)), "cache was made for states of 3 sequences"),
        (lambda: ClusteredHeadAttention(trained(), 2).init_cache(3, 0), "max_length must be at least 1"),
        (lambda: with_cache_of(trained()), "cache must come from this module's init_cache, got a KeyValueCache"),
        (
            lambda: with_cache_of(ClusteredHeadAttention(trained(3), 3)),
            "6 x 10 and 3 x 10 and 3 x 7 with no window, 3 clusters by 5 probe tokens, .* needs states of 6 x 10",
        ),
        (lambda: with_cache_of(ClusteredHeadAttention(trained(), 2)), "2 clusters by 5 .* needs .* 3 clusters by 5 "),
        (lambda: with_cache_of(ClusteredHeadAttention(trained(), 3, 4)), "3 clusters by 4 .* needs .* clusters by 5 "),
        (
            lambda: with_cache_of(ClusteredHeadAttention(trained(sliding_window=9, sink_tokens=2), 3)),
            "a window of 9 and 2 sink tokens, .* needs .* with no window",
        ),
        (lambda: ClusteredHeadAttention(trained(), 2).prune_heads([1]), r"indices must be pruned .* got \[1\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_training_is_refused():
    layer = ClusteredHeadAttention(trained().train(), 2)
    with torch.enable_grad(), pytest.raises(ValueError, match="is for inference"):
        layer(tokens())
    assert isinstance(layer.init_cache(3, 19), ClusteredCache)
    with torch.inference_mode():
        assert layer(tokens()).shape == (3, 19, E)
