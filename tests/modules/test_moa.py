"""Mixture of attention heads: stored figures, grouped projections, gates, losses, refusals."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, MixtureOfAttentionHeads
from attnzoo.ops.expert_projection import Routes, expert_linear, expert_linear_reference
from attnzoo.ops.head_routing import router_losses
from attnzoo.ops.observation import observing
from attnzoo.ops.softmax_attention import softmax_attention
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "moa.safetensors"
E, T = 24, 11


def make(**options):
    torch.manual_seed(5)
    options = {"num_heads": 4, "num_kv_heads": 2, "num_experts": 5} | options
    attn = MixtureOfAttentionHeads(E, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn


def sample(tokens=T):
    return torch.randn(2, tokens, E, dtype=torch.float64)


def stored():
    """Tensors, configuration and the differences of a float32 run."""
    with safe_open(GOLDEN, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return t, *(json.loads(file.metadata()[key]) for key in ("config", "f32_vs_f64_max_abs"))


def golden_module(dtype=torch.float32, **options):
    t, config, _ = stored()
    names = ("num_experts", "num_experts_per_tok", "heads_per_expert", "bias", "out_bias", "causal", "gate_mode")
    sizes = (config["embed_dim"], None, config["num_kv_heads"], config["head_dim"])
    attn = MixtureOfAttentionHeads(*sizes, dtype=dtype, **{name: config[name] for name in names}, **options)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    return attn


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_stored_figures(backend):
    t, _, single = stored()
    for dtype in (torch.float64, torch.float32):
        attn = golden_module(dtype, backend=backend)
        x = t["input.x"].to(dtype)
        results = gradients(attn, x, t["input.w"].to(dtype))
        found = {"output.y": results.pop("y"), **{f"grad.{key}": value for key, value in results.items()}}
        logits = attn.router_logits(x)
        terms, _ = router_losses(logits, *attn._gates(logits), None)
        found["output.router_logits"] = logits.detach()
        for name in ("switch", "z"):
            (grad,) = torch.autograd.grad(terms[name], attn.router.weight, retain_graph=True)
            found |= {f"output.{name}_loss": terms[name].detach().view(1), f"grad_aux.{name}_loss.router.weight": grad}
        expected = (0.01 * terms["switch"] + 0.001 * terms["z"]).item()
        assert attn.aux_loss.item() == pytest.approx(expected, rel=1e-5)
        for key, value in t.items():
            if key.startswith(("output.", "grad")):
                error = float((found[key].double() - value).abs().max())
                assert error < (1e-9 if dtype == torch.float64 else 10 * single[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(8, 16), (6, 5)])
def test_each_row_meets_its_own_matrix(dtype, widths):
    rows, weight = torch.randn(40, widths[0]).to(dtype), torch.randn(5, widths[1], widths[0]).to(dtype)
    expert = torch.randint(0, 4, (40,))  # the last expert gets no row
    routes = Routes.of(expert, 5)
    assert routes.counts.tolist() == [int((expert == n).sum()) for n in range(5)]
    rows.requires_grad_(), weight.requires_grad_()
    found, expected = expert_linear(rows, weight, routes), expert_linear_reference(rows, weight, routes)
    by_hand = torch.stack([weight[e] @ row for e, row in zip(expert.tolist(), rows, strict=True)])
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, by_hand, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(expected, by_hand, atol=tolerance, rtol=tolerance)
    w = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * w).sum(), (rows, weight)),
        torch.autograd.grad((expected * w).sum(), (rows, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)
    assert not torch.autograd.grad(expert_linear(rows, weight, routes).sum(), weight)[0][4].any()


@pytest.mark.parametrize("gate_mode", ["topk_softmax", "softmax_topk", "softmax_topk_norm"])
@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1, "num_heads": 3}, {"causal": False, "bias": True, "rope": None}]
)
def test_grouped_is_the_definition_with_every_gradient(gate_mode, options):
    x, weight = sample(), sample()
    mask = AttentionMask.padding([T, 5])
    grouped, dense = (make(backend=b, gate_mode=gate_mode, **options) for b in ("auto", "eager"))
    expected = gradients(dense, x, weight, mask=mask)
    for key, value in gradients(grouped, x, weight, mask=mask).items():
        torch.testing.assert_close(value, expected[key], atol=1e-11, rtol=0)


def grouped_query(attn, expert=0):
    """Grouped-query attention with the matrices of one expert."""
    M = attn.heads_per_expert
    gqa = attnzoo.GroupedQueryAttention(E, M, attn.num_kv_heads, attn.head_dim, dtype=torch.float64)
    state = {"q_proj.weight": attn.q_experts.weight[expert], "o_proj.weight": attn.o_experts.weight[expert]}
    gqa.load_state_dict(state | {f"{n}_proj.weight": getattr(attn, f"{n}_proj").weight for n in "kv"})
    return gqa


@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (2, 4), (3, 3)])
def test_one_expert_is_grouped_query_attention(groups, heads):
    attn = make(num_kv_heads=groups, num_heads=heads, heads_per_expert=heads, num_experts=1)
    x, weight = sample(), sample()
    found, expected = gradients(attn, x, weight), gradients(grouped_query(attn), x, weight)
    torch.testing.assert_close(found["y"], expected["y"], atol=1e-12, rtol=0)
    torch.testing.assert_close(found["q_experts.weight"][0], expected["q_proj.weight"], atol=1e-11, rtol=0)
    torch.testing.assert_close(found["o_experts.weight"][0], expected["o_proj.weight"], atol=1e-11, rtol=0)
    torch.testing.assert_close(found["k_proj.weight"], expected["k_proj.weight"], atol=1e-11, rtol=0)


def test_equal_experts_make_the_routing_invisible():
    attn, x = make(), sample()
    with torch.no_grad():
        for experts in (attn.q_experts, attn.o_experts):
            experts.weight.copy_(experts.weight[:1].expand_as(experts.weight).clone())
    torch.testing.assert_close(attn(x), grouped_query(attn)(x), atol=1e-12, rtol=0)


def test_all_experts_with_an_indifferent_router_are_more_heads():
    attn, x = make(num_experts=2, num_heads=4), sample()
    with torch.no_grad():
        attn.router.weight.zero_()
    wide = attnzoo.GroupedQueryAttention(E, 4, 2, attn.head_dim, dtype=torch.float64)
    # Head m of expert e reads key/value head m: sorted by key/value head.
    q = attn.q_experts.weight.view(2, 2, -1, E).transpose(0, 1).reshape(-1, E)
    o = attn.o_experts.weight.view(2, E, 2, -1).permute(1, 2, 0, 3).reshape(E, -1) / 2
    state = {"q_proj.weight": q, "o_proj.weight": o}
    wide.load_state_dict(state | {f"{n}_proj.weight": getattr(attn, f"{n}_proj").weight for n in "kv"})
    torch.testing.assert_close(attn(x), wide(x), atol=1e-12, rtol=0)


def test_the_order_of_experts_means_nothing():
    attn, other = make(), make()
    order = torch.tensor([3, 1, 4, 0, 2])
    state = attn.state_dict()
    for name in ("router.weight", "q_experts.weight", "o_experts.weight"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(other(x), attn(x), atol=1e-12, rtol=0)


def test_gate_modes_differ_in_their_gradient():
    x, weight = sample(), sample()
    by_selection, normed, plain = (
        gradients(make(gate_mode=m), x, weight) for m in ("topk_softmax", "softmax_topk_norm", "softmax_topk")
    )
    torch.testing.assert_close(normed["y"], by_selection["y"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(normed["router.weight"], by_selection["router.weight"], rtol=1e-2)
    assert plain["y"].norm() < by_selection["y"].norm()


def test_losses_at_their_ends():
    def losses(logits):
        attn = make()
        return router_losses(logits, *attn._gates(logits), None)[0]

    flat = losses(torch.zeros(2, 10, 5, dtype=torch.float64))
    assert flat["switch"].item() == pytest.approx(1)
    assert flat["mi"].item() == pytest.approx(0, abs=1e-6)
    assert flat["z"].item() == pytest.approx(math.log(5) ** 2)
    sharp = 1e3 * torch.eye(5, dtype=torch.float64).repeat(2, 2, 1)
    assert losses(sharp)["mi"].item() == pytest.approx(-math.log(5), abs=1e-6)
    logits = torch.randn(2, 7, 5, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(losses(logits)["z"], logits)
    size = torch.logsumexp(logits, -1, keepdim=True)
    torch.testing.assert_close(grad, 2 * size * logits.softmax(-1) / 14)
    one = torch.zeros(1, 6, 5, dtype=torch.float64)
    one[..., 0] = 50.0
    assert losses(one)["cv"].item() > 1


def test_padding_among_the_queries_of_cross_attention_is_not_routed():
    attn = make(aux_loss="mi", out_bias=True, causal=False, rope=None, num_experts_per_tok=2)
    x, context = sample(), sample(9)
    attn(x, context, mask=AttentionMask.padding([9, 4]))
    loss, load = attn.aux_loss.item(), attn.routing.load
    real = torch.arange(T + 3).expand(2, -1) < T
    longer = torch.cat([x, sample(3)], 1)
    y = attn(longer, context, mask=AttentionMask.padding([9, 4], real_queries=real))
    assert attn.aux_loss.item() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(attn.routing.load, load)
    torch.testing.assert_close(y[:, T:], attn.o_bias.expand(2, 3, E))


@pytest.mark.parametrize("kind", ["switch_z", "mi", "cv", "none"])
def test_padded_tokens_are_not_routed(kind):
    attn, x = make(aux_loss=kind, out_bias=True), sample().requires_grad_()
    y = attn(x, mask=AttentionMask.padding([T, 5]))
    torch.testing.assert_close(y[1, 5:], attn.o_bias.expand(T - 5, E))
    (grad,) = torch.autograd.grad(y.sum() + (attn.aux_loss if kind != "none" else 0), x)
    assert not grad[1, 5:].any()
    loss, load = attn.aux_loss, attn.routing.load
    longer = torch.cat([x.detach(), sample(3)], 1)
    attn(longer, mask=AttentionMask.padding([T, 5]))
    torch.testing.assert_close(attn.routing.load, load)
    if kind == "none":
        assert loss is None
    else:
        torch.testing.assert_close(attn.aux_loss, loss)
    assert load.sum().item() == pytest.approx(1)
    attn.eval()(longer)
    assert attn.aux_loss is None
    assert attn.routing is None


def test_noise_and_sampling_act_in_training_only():
    attn, x = make(router_noise=True, sample_topk=1), sample()
    draws = [attn(x) for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    chosen, gates = attn._gates(attn.router_logits(x))
    assert all(len(set(pair)) == 2 for pair in chosen.flatten(0, 1).tolist())
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, T).double())
    attn.eval()
    torch.testing.assert_close(attn(x), attn(x), atol=0, rtol=0)


def test_per_head_outputs_pass_through_one_place():
    attn, seen = make(), []
    hook = attn.head_outputs.register_forward_hook(lambda *a: seen.append(a[2]))
    y = attn(sample())
    hook.remove()
    assert seen[0].shape == (2, T, attn.num_heads * attn.v_head_dim)
    hook = attn.head_outputs.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    assert not attn(sample()).any()
    hook.remove()
    assert y.any()


def test_an_observer_sees_the_heads_that_pass_there_in_another_order():
    attn, x, seen, passed = make(heads_per_expert=4, num_heads=8, head_dim=6, v_head_dim=5), sample(), [], []
    attn.head_outputs.register_forward_pre_hook(lambda _, given: passed.append(given[0]))
    with observing(seen.append):
        attn(x)
    (call,) = seen
    order = attn.observed_heads()
    assert sorted(order) == list(range(8))
    assert order != tuple(range(8))
    heads = softmax_attention(call.q, call.k, call.v, call.view, scale=call.rules.scale)[:, :, order]
    gates = attn._gates(attn.router_logits(x))[1].repeat_interleave(4, -1)
    torch.testing.assert_close((heads * gates[..., None]).flatten(2), passed[0])


def test_the_circuits_of_the_chosen_experts_are_what_a_token_reads_and_writes():
    attn, x, seen, passed = (
        make(rope=None, heads_per_expert=4, num_heads=8, head_dim=6, v_head_dim=5),
        sample(1),
        [],
        [],
    )
    attn.head_outputs.register_forward_pre_hook(lambda _, given: passed.append(given[0].view(2, 2, 4, 5)))
    with observing(seen.append):
        y = attn(x)
    ov, qk = attn.ov_circuit(), attn.qk_circuit()
    assert len(ov) == len(qk) == 5 * 4
    chosen, gates = attn._gates(attn.router_logits(x))
    queries = seen[0].q[:, 0, attn.observed_heads()].view(2, 2, 4, 6)
    written = torch.zeros_like(x)
    for b, slot, m in itertools.product(range(2), range(2), range(4)):
        pair = int(chosen[b, 0, slot]) * 4 + m
        torch.testing.assert_close(queries[b, slot, m], qk[pair][0] @ x[b, 0])
        torch.testing.assert_close(seen[0].k[b, 0, m // 2], qk[pair][1] @ x[b, 0])
        torch.testing.assert_close(passed[0][b, slot, m], gates[b, 0, slot] * (ov[pair][0] @ x[b, 0]))
        written[b, 0] += ov[pair][1] @ passed[0][b, slot, m]
    torch.testing.assert_close(y, written)


class Doubled(torch.nn.Module):
    """Twice what a submodule gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return 2 * self.inner(*args, **options)


@pytest.mark.parametrize("name", ["router", "noise", "q_experts", "o_experts"])
def test_a_submodule_that_is_not_plain_is_called(name):
    attn, x = make(router_noise=True), sample()

    def run():
        torch.manual_seed(3)
        return attn(x)

    y, part = run(), getattr(attn, name)
    with torch.no_grad():
        part.weight.mul_(0.5)
    assert not torch.allclose(run(), y)
    hook = part.register_forward_hook(lambda _, __, out: 2 * out)
    torch.testing.assert_close(run(), y)
    hook.remove()
    setattr(attn, name, Doubled(part))
    torch.testing.assert_close(run(), y)
    if name in ("router", "noise"):
        with pytest.raises(ValueError, match="must be a plain Linear layer to be pruned, got Doubled"):
            attn.prune_heads([0])
        assert attn.pruned_heads == ()


def test_a_call_that_fails_leaves_the_cache_as_it_was():
    attn, x = make(), sample()
    cache = attn.init_cache(2, T)
    attn(x[:, :4], cache=cache)
    hook = attn.head_outputs.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attn(x[:, 4:], cache=cache)
    hook.remove()
    assert cache.length == 4
    torch.testing.assert_close(attn(x[:, 4:], cache=cache), attn(x)[:, 4:], atol=1e-12, rtol=0)


def test_pruned_experts_are_never_chosen():
    attn, x = make(router_noise=True).eval(), sample()
    logits = attn.router_logits(x)
    logits[..., [1, 4]] = float("-inf")
    chosen, gates = attn._gates(logits)
    attn.prune_heads([4])
    attn.prune_heads([1])
    assert attn.pruned_heads == (1, 4)
    found, found_gates = attn._gates(attn.router_logits(x))
    torch.testing.assert_close(torch.tensor([0, 2, 3])[found], chosen)
    torch.testing.assert_close(found_gates, gates)
    assert attn(x).shape == attn.train()(x).shape == x.shape
    assert attn.router.out_features == attn.noise.out_features == attn.num_experts == 3
    with pytest.raises(ValueError, match="indices must leave at least num_experts_per_tok 2 experts, got 1"):
        attn.prune_heads([0, 2])


def test_the_cost_is_that_of_grouped_query_attention_and_a_router():
    attn = make(causal=False, rope=None)
    gqa = attnzoo.GroupedQueryAttention(E, 4, 2, causal=False, rope=None)
    assert attn.flops(T, T) == gqa.flops(T, T) + 2 * T * E * 5
    with FlopCounterMode(display=False) as counter:
        attn(sample()[:1])
    router = 2 * T * E * 5
    assert counter.get_total_flops() <= attn.flops(T, T)
    assert counter.get_total_flops() >= attn.flops_by_part(T, T)["projections"] + router


def test_the_two_sizes_of_a_user():
    attn = MixtureOfAttentionHeads(512, 8)
    assert (attn.num_experts, attn.num_experts_per_tok, attn.heads_per_expert, attn.num_kv_heads) == (16, 8, 1, 1)
    assert attn.head_dim == 64
    jet = MixtureOfAttentionHeads(64, None, 4, 8, num_experts=8, num_experts_per_tok=2)
    assert (jet.num_heads, jet.heads_per_expert) == (8, 4)
    assert attn.router.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("gate_mode", ["topk_softmax", "softmax_topk", "softmax_topk_norm"])
def test_derivatives(gate_mode):
    attn = make(gate_mode=gate_mode, num_experts=3).eval()
    x = torch.linspace(-3, 3, 3 * E, dtype=torch.float64).sin().view(1, 3, E).requires_grad_()
    if gate_mode == "softmax_topk_norm":
        # The detached sum is no part of the derivative that differences see.
        y = attn(x)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
        return
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 1}, "num_experts_per_tok must be at most num_experts, got 2 and 1"),
        ({"heads_per_expert": 3}, "heads_per_expert must be a multiple of num_kv_heads, got 3 and 2"),
        ({"num_heads": 5}, "num_heads must be num_experts_per_tok .* heads_per_expert, got 5, 2 and 2"),
        ({"num_experts_per_tok": 3}, "num_heads must be num_experts_per_tok .*, got 4, 3 and 2"),
        ({"sample_topk": 3}, "sample_topk must lie between 0 and num_experts_per_tok 2, got 3"),
        ({"gate_mode": "hard"}, "gate_mode must be one of .*got 'hard'"),
        ({"aux_loss": "entropy"}, "aux_loss must be one of .*got 'entropy'"),
        ({"z_coef": -0.1}, "z_coef must not be negative, got -0.1"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_heads": 10}, "num_heads must divide embed_dim unless head_dim is given, got 10 and 24"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
