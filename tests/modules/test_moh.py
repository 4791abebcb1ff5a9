"""Mixture of heads: stored figures, gates, the sparse form, losses, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import AttentionMask, MixtureOfHeadAttention
from attnzoo.conversion import to_moh
from attnzoo.masks import Visibility
from attnzoo.modules.call import begin
from attnzoo.ops.head_routing import Routing, load_balance_loss, query_norm_gates, routed_attention, top_heads
from attnzoo.ops.observation import observing
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "moh.safetensors"
E, H, G, T = 24, 6, 3, 13


def make(groups=G, **options):
    torch.manual_seed(5)
    options = {"num_shared_heads": 2, "num_routed_active": 2} | options
    attn = MixtureOfHeadAttention(E, H, groups, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def grouped(attn):
    """Grouped-query attention with the same projections."""
    gqa = attnzoo.GroupedQueryAttention(
        E, H, attn.num_kv_heads, causal=attn.causal, bias=attn.q_proj.bias is not None, dtype=torch.float64
    )
    gqa.load_state_dict({k: v for k, v in attn.state_dict().items() if "router" not in k})
    return gqa


def stored():
    """Tensors, configuration and the differences of a float32 run."""
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return t, *(json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64_max_abs"))


def golden_module(dtype=torch.float32, **options):
    t, config, _ = stored()
    names = ("num_shared_heads", "num_routed_active", "router", "gate_form", "bias", "causal")
    sizes = [config[name] for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim")]
    attn = MixtureOfHeadAttention(*sizes, **{name: config[name] for name in names}, dtype=dtype, **options)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    return attn


@pytest.mark.parametrize("options", [{}, {"backend": "eager"}, {"sparse": True}])
def test_stored_figures(options):
    t, _, single = stored()
    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, None)):
        attn = golden_module(dtype, **options)
        x = t["input.x"].to(dtype)
        gates, selected, probability = attn.gates(x, attn.project(x, x, x)[0])
        found = {"output.gates": gates.detach()}
        results = gradients(attn, x, t["input.w"].to(dtype))
        found |= {"output.y": results.pop("y"), **{f"grad.{key}": value for key, value in results.items()}}
        x = x.clone().requires_grad_()
        gates, selected, probability = attn.gates(x, attn.project(x, x, x)[0])
        loss = load_balance_loss(Routing.of(selected, probability, None))
        found["output.load_balance_loss"] = loss.detach().view(1)
        grads = torch.autograd.grad(loss, [x, attn.routed_router.weight])
        found |= {"grad_aux.x": grads[0], "grad_aux.routed_router.weight": grads[1]}
        assert attn.aux_loss.item() == pytest.approx(0.01 * loss.item(), rel=1e-6)
        for key, value in t.items():
            if key.startswith(("output.", "grad")):
                error = float((found[key].double() - value).abs().max())
                assert error < (allowed or 10 * single[key] + 1e-12), key


@pytest.mark.parametrize("options", [{}, {"bias": True, "causal": False}])
def test_with_all_heads_and_indifferent_routers_it_is_grouped_query_attention(options):
    attn = make(num_routed_active=4, **options)
    with torch.no_grad():
        for router in (attn.routed_router, attn.shared_router, attn.type_router):
            router.weight.zero_()
    x, weight = sample(), sample()
    found, expected = gradients(attn, x, weight), gradients(grouped(attn), x, weight)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-11, rtol=0)


def test_the_query_norm_router_with_all_heads_is_grouped_query_attention():
    attn = make(router="query_norm", num_routed_active=4, ste="none")
    x = sample()
    torch.testing.assert_close(attn(x), grouped(attn)(x), atol=1e-12, rtol=0)


OPTIONS = {
    "two_stage": {},
    "paper": {"gate_form": "paper"},
    "none shared": {"num_shared_heads": 0, "num_routed_active": 3},
    "one shared": {"num_shared_heads": 1},
    "all shared": {"num_shared_heads": 6, "num_routed_active": 0},
    "query_norm": {"router": "query_norm", "ste": "active"},
    "query_norm none": {"router": "query_norm", "ste": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("mask", [None, AttentionMask.padding([T, 5]), AttentionMask.packed([0, 4, 17, 26])])
def test_sparse_is_dense_with_every_gradient(name, groups, mask):
    x, weight = sample(), sample()
    dense, sparse = (make(groups, sparse=s, **OPTIONS[name]) for s in (False, True))
    expected = gradients_or_none(dense, x, weight, mask)
    for key, value in gradients_or_none(sparse, x, weight, mask).items():
        torch.testing.assert_close(value, expected[key], atol=1e-11, rtol=0)


def gradients_or_none(module, x, weight, mask):
    """As `gradients`, with zeros for parameters that a case does not use."""
    x = x.detach().requires_grad_()
    y = module(x, mask=mask)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * weight).sum(), [x, *named.values()], allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip([x, *named.values()], grads, strict=True)]
    return {"y": y.detach(), "x": zeros[0], **dict(zip(named, zeros[1:], strict=True))}


def test_small_tiles_change_nothing():
    q, k, v = (torch.randn(2, 40, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    active = torch.rand(2, 40, 4) > 0.6
    whole = attnzoo.ops.softmax_attention.softmax_attention(q, k, v) * active[..., None]
    for rows in (1, 7, 64):
        out = routed_attention(q, k, v, active, scale=8**-0.5, rows_at_once=rows)
        torch.testing.assert_close(out, whole, atol=1e-12, rtol=0)
    none = routed_attention(q, k, v, torch.zeros_like(active), scale=1.0)
    assert not none.any()


def test_documents_padding_and_rows_that_see_nothing_in_small_tiles():
    q, k, v = (torch.randn(2, 40, n, 8, dtype=torch.float64).requires_grad_() for n in (4, 2, 2))
    active = torch.rand(2, 40, 3) > 0.6
    on = torch.cat([torch.ones(2, 40, 1, dtype=torch.bool), active], -1)[..., None]
    for mask in (
        AttentionMask.padding([0, 33]),
        AttentionMask.packed([0, 3, 20, 41, 57, 80]),
        AttentionMask.packed([0, 30, 80]) & AttentionMask.padding([25, 20]),
    ):
        view = Visibility(mask=mask)
        expected = attnzoo.ops.softmax_attention.softmax_attention(q, k, v, view, backend="eager") * on
        out = routed_attention(q, k, v, active, view, scale=8**-0.5, rows_at_once=7)
        weight = torch.randn_like(out)
        pairs = zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (out, expected)), strict=True)
        for found, wanted in ((out, expected), *pairs):
            torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("view", "keys"),
    [(Visibility(causal=False), 5), (Visibility(window=3), 5), (Visibility(), 6), (Visibility(query_start=2), 5)],
)
def test_views_that_routed_attention_does_not_take(view, keys):
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, keys, 2, 4)
    with pytest.raises(ValueError, match="view must be causal, without a window, of as many queries as keys"):
        routed_attention(q, k, k, torch.ones(1, 5, 2, dtype=torch.bool), view, scale=1.0)


@pytest.mark.parametrize("active", [torch.ones(1, 5, 3) > 0, torch.ones(1, 4, 2) > 0, torch.ones(1, 5, 2)])
def test_active_pairs_that_do_not_fit(active):
    q = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"active must be boolean \(B, T, R\) of at most 2 heads"):
        routed_attention(q, q, q, active, scale=1.0)


def test_packed_rows_take_no_dense_mask():
    q = torch.randn(1, 5, 2, 4)
    view = Visibility(mask=AttentionMask.dense(torch.ones(5, 5, dtype=torch.bool)))
    with pytest.raises(attnzoo.BackendUnavailable, match=r"'sdpa' cannot run routed_attention: .* no dense mask"):
        routed_attention(q, q, q, torch.ones(1, 5, 2, dtype=torch.bool), view, scale=1.0, backend="sdpa")


@pytest.mark.parametrize(("sparse", "operation"), [(False, "softmax_attention"), (True, "routed_attention")])
def test_an_observer_sees_all_heads_first_in_either_form(sparse, operation):
    attn, seen = make(sparse=sparse), []
    with observing(seen.append):
        attn(sample())
    assert seen[0].operation == operation
    assert seen[0].q.shape == (2, T, H, E // H)
    assert seen[0].k.shape[2] == G
    assert seen[0].rules.scale == attn.scale


def test_an_empty_batch_is_served_in_the_sparse_form_too():
    attn, x = make(sparse=True), sample()[:0].requires_grad_()
    y = attn(x)
    assert y.shape == (0, T, E)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_long_inputs_with_few_active_heads_go_sparse_by_themselves():
    def sparse(attn, tokens):
        x = sample(tokens)
        q, _, v = attn.project(x, x, x)
        return attn._runs_sparse(q, v, begin(attn, x))

    few = make(num_shared_heads=1, num_routed_active=1)
    assert not sparse(few, 4095)
    assert sparse(few, 4096)
    assert not sparse(make(num_routed_active=4), 4096)


def test_gates_add_up():
    attn, x = make(), sample()
    gates, selected, _ = attn.gates(x, None)
    kinds = 2 * torch.nn.functional.linear(x, attn.type_router.weight).softmax(-1)
    torch.testing.assert_close(gates[..., :2].sum(-1), 2 * kinds[..., 0])
    torch.testing.assert_close(gates[..., 2:].sum(-1), 2 * kinds[..., 1])
    assert ((gates > 0).sum(-1) == 4).all()
    assert (selected.sum(-1) == 2).all()
    paper = make(gate_form="paper").gates(x, None)[0]
    assert (paper.sum(-1) < 1).all()


def test_ties_of_the_query_norm_router_and_its_gradients():
    norms = torch.rand(2, 5, 4, dtype=torch.float64).requires_grad_()
    found = {ste: query_norm_gates(norms, active=2, num_shared=1, ste=ste) for ste in ("all", "active", "none")}
    for ste, (gates, selected, probability) in found.items():
        torch.testing.assert_close(gates[..., 1:].detach(), selected.double())
        assert (gates[..., 0] == 1).all()
        if ste != "none":
            weight = torch.randn(2, 5, 4, dtype=torch.float64)
            used = weight if ste == "all" else weight * selected
            (grad,) = torch.autograd.grad((gates[..., 1:] * weight).sum(), norms, retain_graph=True)
            (expected,) = torch.autograd.grad((probability * used).sum(), norms, retain_graph=True)
            torch.testing.assert_close(grad, expected)
    assert not found["none"][0].requires_grad
    attn, x = make(router="query_norm"), sample()
    q = attn.project(x, x, x)[0]
    assert torch.equal(attn.gates(x, q)[1], attn.gates(x, 3 * q)[1])
    flat = query_norm_gates(torch.ones(1, 1, 3, requires_grad=True), active=1, num_shared=0, ste="all")[0]
    flat.sum().backward()
    assert flat.isfinite().all()


class Doubled(torch.nn.Module):
    """Twice what a submodule gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.out_features = inner.out_features

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("name", ["routed_router", "shared_router", "type_router"])
def test_a_router_that_is_not_a_plain_layer_is_called(name):
    attn, x = make(), sample()
    y, router = attn(x), getattr(attn, name)
    with torch.no_grad():
        router.weight.mul_(0.5)
    assert not torch.allclose(attn(x), y)
    hook = router.register_forward_hook(lambda _, __, out: 2 * out)
    torch.testing.assert_close(attn(x), y)
    hook.remove()
    setattr(attn, name, Doubled(router))
    torch.testing.assert_close(attn(x), y)
    if name != "type_router":
        with pytest.raises(ValueError, match="must be a plain Linear layer to be pruned, got Doubled"):
            attn.prune_heads([5])
        assert attn.q_proj.out_features == E


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    attn, x = make(), sample()
    cache = attn.init_cache(2, T)
    attn(x[:, :4], cache=cache)
    hook = attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attn(x[:, 4:], cache=cache)
    hook.remove()
    assert cache.length == 4
    torch.testing.assert_close(attn(x[:, 4:], cache=cache), attn(x)[:, 4:], atol=1e-12, rtol=0)


def test_the_order_of_routed_heads_means_nothing():
    attn, other = make(6), make(6)
    order = torch.tensor([0, 1, 4, 2, 5, 3])
    state = attn.state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        state[f"{name}.weight"] = state[f"{name}.weight"].view(H, -1, E)[order].flatten(0, 1)
    state["o_proj.weight"] = state["o_proj.weight"].view(E, H, -1)[:, order].flatten(1)
    state["routed_router.weight"] = state["routed_router.weight"][order[2:] - 2]
    other.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(other(x), attn(x), atol=1e-12, rtol=0)


def test_the_loss_is_the_number_of_active_heads_when_balanced():
    uniform = torch.full((2, 5, 4), 0.25, dtype=torch.float64)
    selected = top_heads(torch.rand(2, 5, 4), 2)
    assert load_balance_loss(Routing.of(selected, uniform, None)).item() == pytest.approx(2)
    attn = make(aux_loss_coef=0.5)
    attn(sample())
    assert attn.aux_loss.item() > 0
    assert attnzoo.aux_loss(torch.nn.Sequential(attn, make())) is attn.aux_loss
    assert attn.routing.load.sum().item() == pytest.approx(2)
    assert attn.routing.probability.sum().item() == pytest.approx(1)
    assert 0 < attn.routing.entropy.item() <= torch.tensor(4.0).log().item() + 1e-9
    attn.eval()(sample())
    assert attn.aux_loss is None
    assert attn.routing is None


def test_padded_tokens_are_in_no_loss():
    attn, x = make(), sample()
    attn(x, mask=AttentionMask.padding([T, 5]))
    loss = attn.aux_loss.item()
    longer = torch.cat([x, sample(4)], 1)
    attn(longer, mask=AttentionMask.padding([T, 5]))
    assert attn.aux_loss.item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_padding_among_the_queries_of_cross_attention_is_in_no_loss(router):
    attn, x, context = make(causal=False, rope=None, router=router), sample(), sample(9)
    keys = AttentionMask.padding([9, 4])
    attn(x, context, mask=keys)
    everything, routing = attn.aux_loss.item(), attn.routing
    real = torch.arange(T + 4).expand(2, -1) < T
    longer = torch.cat([x, sample(4)], 1)
    attn(longer, context, mask=AttentionMask.padding([9, 4], real_queries=real))
    assert attn.aux_loss.item() == pytest.approx(everything, rel=1e-12)
    torch.testing.assert_close(attn.routing.load, routing.load)
    # Lengths of keys say nothing about queries: without the mask of the queries all of them count.
    attn(longer, context, mask=keys)
    assert attn.aux_loss.item() != pytest.approx(everything, rel=1e-6)


def test_padding_on_the_left_is_in_no_loss():
    attn, x = make(rope=None), sample()
    attn(x)
    loss = attn.aux_loss.item()
    real = torch.arange(T + 3).expand(2, -1) >= 3
    mask = AttentionMask(dense_mask=real[:, None, None], real_queries=real)
    attn(torch.cat([sample(3), x], 1), mask=mask)
    assert attn.aux_loss.item() == pytest.approx(loss, rel=1e-12)


def test_the_loss_reaches_the_router_through_probabilities_alone():
    attn = make()
    attn(sample())
    grads = torch.autograd.grad(attn.aux_loss, list(attn.parameters()), allow_unused=True)
    reached = {n for (n, _), g in zip(attn.named_parameters(), grads, strict=True) if g is not None}
    assert reached == {"routed_router.weight"}


@pytest.mark.parametrize("name", ["two_stage", "query_norm"])
def test_derivatives(name):
    attn = make(**OPTIONS[name]).eval()
    # Widely separated scores: differences must not change the selection.
    x = torch.linspace(-3, 3, 3 * E, dtype=torch.float64).sin().view(1, 3, E).requires_grad_()
    if name == "query_norm":
        attn.ste = "none"
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("heads", [[0], [3], [1, 4, 5]])
def test_pruning_is_a_router_logit_of_minus_infinity(heads):
    attn = make(num_routed_active=1)
    x = sample()
    routed, shared = attn.routed_router.weight, attn.shared_router.weight
    expected_gates = attn.gates(x, None)[0]
    logits = torch.nn.functional.linear(x, routed)
    of_shared = torch.nn.functional.linear(x, shared)
    for h in heads:
        if h < 2:
            of_shared[..., h] = float("-inf")
        else:
            logits[..., h - 2] = float("-inf")
    from attnzoo.ops.head_routing import two_stage_gates

    kinds = torch.nn.functional.linear(x, attn.type_router.weight)
    gates = two_stage_gates(logits, of_shared, kinds, active=1, num_shared=2, form="scaled")[0]
    kept = [h for h in range(H) if h not in heads]
    attn.prune_heads(heads)
    found = attn.gates(x, None)[0]
    torch.testing.assert_close(found, gates[..., kept], atol=1e-12, rtol=0)
    assert expected_gates.shape[-1] == H
    assert attn(x).shape == x.shape


@pytest.mark.parametrize("ste", ["all", "active", "none"])
def test_the_one_routed_head_that_pruning_leaves_is_always_on(ste):
    attn, x = make(router="query_norm", num_shared_heads=4, num_routed_active=1, ste=ste), sample()
    attn.prune_heads([5])
    found = gradients(attn, x, torch.randn_like(x))
    gqa = grouped(make(router="query_norm", num_shared_heads=4, num_routed_active=1))
    gqa.prune_heads([5])
    torch.testing.assert_close(found["y"], gqa(x), atol=1e-12, rtol=0)
    assert all(value.isfinite().all() for value in found.values())
    assert attn.aux_loss.item() == pytest.approx(attn.aux_loss_coef)


def test_a_trained_layer_becomes_a_mixture():
    for source in (
        attnzoo.MultiHeadAttention(E, H, dtype=torch.float64),
        attnzoo.GroupedQueryAttention(E, H, G, dtype=torch.float64, causal=False, v_head_dim=5),
    ):
        x = sample()
        all_heads = to_moh(source, 2, 4)
        torch.testing.assert_close(all_heads(x), source(x), atol=1e-12, rtol=0)
        assert all_heads.router == "query_norm"
        fewer = to_moh(source, 3, 1)
        assert not torch.allclose(fewer(x), source(x))
    with pytest.raises(ValueError, match="module must be multi-head or grouped-query attention, got Grouped"):
        to_moh(attnzoo.GroupedTiedAttention(E, H), 2, 2)
    with pytest.raises(ValueError, match="module must not have qk_norm"):
        to_moh(attnzoo.GroupedQueryAttention(E, H, qk_norm=True), 2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads, got 4 and 6"),
        ({"num_shared_heads": 7}, "num_shared_heads must lie between 0 and num_heads 6, got 7"),
        ({"num_shared_heads": 0, "num_routed_active": 0}, "must not both be 0"),
        ({"num_shared_heads": 4, "num_routed_active": 3}, "num_routed_active must lie between 0 and the 2 routed"),
        ({"num_shared_heads": 4, "num_routed_active": 0}, "num_routed_active must be at least 1 unless all"),
        (
            {"router": "query_norm", "num_shared_heads": 5, "num_routed_active": 1},
            "needs at least 2 routed heads, got 1",
        ),
        ({"router": "top"}, "router must be one of 'two_stage', 'query_norm', got 'top'"),
        ({"gate_form": "binary"}, "gate_form of router 'two_stage' must be one of .*got 'binary'"),
        ({"router": "query_norm", "gate_form": "scaled"}, "gate_form of router 'query_norm' must be one of"),
        ({"ste": "some"}, "ste must be 'all', 'active' or 'none', got 'some'"),
        ({"ste": "active"}, "ste needs router 'query_norm'.*got 'active' and 'two_stage'"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef must not be negative, got -1.0"),
        ({"sparse": "yes"}, "sparse must be True, False or 'auto', got 'yes'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfHeadAttention(E, H, **options)


def test_calls_that_the_sparse_form_cannot_serve():
    x = sample()
    with pytest.raises(ValueError, match="ste='all' needs the outputs of all heads; choose ste='active'"):
        make(router="query_norm", sparse=True)(x)
    with pytest.raises(ValueError, match="a dense mask has an entry for every pair"):
        make(sparse=True)(x, mask=torch.ones(T, T, dtype=torch.bool))
    with pytest.raises(ValueError, match="sparse=True cannot run: it is for causal self-attention"):
        make(sparse=True, causal=False)(x)
    with pytest.raises(ValueError, match=r"it has no dropout, got 0\.5"):
        make(sparse=True, dropout=0.5)(x)
    with pytest.raises(ValueError, match="it runs with backend 'auto', 'sdpa' or 'triton', got 'eager'"):
        make(sparse=True, backend="eager")(x)
    attn = make(sparse=True)
    cache = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=cache) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="indices must leave at least num_routed_active 2 routed heads, got 1"):
        attn.prune_heads([3, 4, 5])
    with pytest.raises(ValueError, match="indices must leave a shared head"):
        attn.prune_heads([0, 1])
