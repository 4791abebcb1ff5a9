"""Mixtures of Gaussian keys: stored figures, the equations, when they are softmax attention, priors, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import AttentionMask, BackendUnavailable, Rotary
from attnzoo.ops.observation import observing
from tests.zoo import E, G, H, build, gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "mgk.safetensors"
D = E // H


def make(*sizes, **options):
    """A module whose parameters matter, in float64."""
    torch.manual_seed(3)
    module = attnzoo.MixtureOfGaussianKeysAttention(
        E, H, *sizes, **{"init_std": 0.3, "dtype": torch.float64, "bias": True} | options
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "pi" or name.endswith("bias"):
                parameter.uniform_(0.2, 0.9)
    return module


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_stored_figures(backend):
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118  (no mapping)
        config = json.loads(file.metadata()["config"])
    config["rope"] = config["rope"] or None
    module = attnzoo.MixtureOfGaussianKeysAttention(**config, backend=backend, dtype=torch.float64)
    module.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    found = gradients(module, tensors["input.x"], tensors["input.w"])
    stored = {key.split(".", 1)[1]: tensors[key] for key in tensors if key.startswith(("grad.", "output."))}
    assert len(stored) == 5
    assert max(float((found[key] - stored[key]).abs().max()) for key in stored) < 1e-9


def by_the_equations(module, x, visible):
    """The output for the dense visibility (B, 1, T, S), pair by pair of queries and keys."""
    B, T, R, groups = *x.shape[:2], module.num_mixtures, module.num_kv_heads
    q = module.q_proj(x).view(B, T, H, 1, 1, D)
    k = module.k_proj(x).view(B, 1, 1, T, -1, groups, D)
    if module.key_shift is not None:
        k = k + module.key_shift
    k = k.repeat_interleave(H // groups, -2).permute(0, 1, 5, 3, 4, 6, 2)[..., 0].expand(-1, -1, -1, -1, R, -1)
    a = torch.tensor(module.precision).double()
    g = -a / (2 * D**0.5) * (q - k).square().sum(-1)
    if module.pi is None:
        e = g.exp().amax(-1)
    else:
        pi = module.pi.clamp(0, 1)
        if module.prior == "position":
            pi = pi[..., :T].repeat_interleave(H // groups, 1).permute(1, 2, 0)
        else:
            pi = pi.view(R, -1).expand(-1, groups).repeat_interleave(H // groups, 1).T[:, None]
        e = (pi * g.exp()).sum(-1)
    e = e.movedim(2, 1) * visible
    w = e / (e.sum(-1, keepdim=True) + module.eps)
    v = module.v_proj(x).view(B, T, groups, D).repeat_interleave(H // groups, 2)
    return module.o_proj(torch.einsum("bhts,bshd->bthd", w, v).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_key": True},
        {"assignment": "hard", "eps": 1e-2},
        {"prior": "global", "eps": 1e-2, "num_mixtures": 3},
        {"prior": "position", "max_positions": 15, "precision": (0.5, 2.0)},
        {"assignment": "soft", "shared_key": True, "prior": "position", "max_positions": 9},
    ],
)
def test_it_is_the_equations(options, backend, causal):
    module, x = make(G, backend=backend, causal=causal, **options).eval(), torch.randn(2, 9, E).double()
    visible = torch.ones(2, 1, 9, 9).bool()
    visible = visible.tril() if causal else visible
    torch.testing.assert_close(module(x), by_the_equations(module, x, visible), atol=1e-12, rtol=0)
    hidden = visible.clone()
    hidden[1, ..., 6:] = False
    expected = by_the_equations(module, x, hidden)
    torch.testing.assert_close(module(x, mask=AttentionMask.padding([9, 6])), expected, atol=1e-12, rtol=0)


def softmax_twin(module, x):
    """Softmax attention with the bias -a |k|^2 / (2 sqrt(D)) on every key."""
    q, k, v = (p(x).view(*x.shape[:2], H, D).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    scores = (q @ k.mT - k.square().sum(-1)[..., None, :] / 2) * D**-0.5
    seen = torch.ones(x.shape[1], x.shape[1]).bool().tril()
    heads = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return module.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("assignment", ["learned", "hard"])
def test_one_key_is_softmax_attention_with_a_bias_by_its_length(assignment):
    module, x = make(num_mixtures=1, assignment=assignment), torch.randn(2, 9, E).double()
    torch.testing.assert_close(module(x), softmax_twin(module, x), atol=1e-12, rtol=0)
    # Keys of one length: plain softmax attention.
    even = make(num_mixtures=1, bias=False)
    with torch.no_grad():
        even.k_proj.weight.copy_(torch.eye(E))
    x = torch.nn.functional.normalize(x.unflatten(-1, (H, D)), dim=-1).flatten(2)
    plain = attnzoo.MultiHeadAttention(E, H, bias=False, rope=None, dtype=torch.float64)
    plain.load_state_dict({key: value for key, value in even.state_dict().items() if key != "pi"})
    torch.testing.assert_close(even(x), plain(x), atol=1e-12, rtol=0)


def test_equal_keys_make_the_prior_cancel():
    two, one = make(shared_key=True, precision=(1.0, 1.0)), make(num_mixtures=1)
    with torch.no_grad():
        two.key_shift.zero_()
    one.load_state_dict(
        {key: value for key, value in two.state_dict().items() if key not in ("pi", "key_shift")} | {"pi": one.pi}
    )
    x = torch.randn(2, 9, E).double()
    torch.testing.assert_close(two(x), one(x), atol=1e-12, rtol=0)


def test_a_prior_of_0_silences_a_key_and_its_scale_means_nothing():
    module, one, x = make(precision=(1.0, 1.0)), make(num_mixtures=1), torch.randn(2, 9, E).double()
    before = module(x)
    with torch.no_grad():
        module.pi *= 0.5
    torch.testing.assert_close(module(x), before, atol=1e-12, rtol=0)
    with torch.no_grad():
        module.pi[1] = 0.0
    first = {key: value[:E] if key.startswith("k_proj") else value for key, value in module.state_dict().items()}
    one.load_state_dict(first | {"pi": one.pi})
    torch.testing.assert_close(module(x), one(x), atol=1e-12, rtol=0)
    assert all(value.isfinite().all() for value in gradients(module, x, torch.ones_like(x)).values())


def test_moving_queries_and_keys_together_changes_nothing():
    module, x = make(G), torch.randn(2, 9, E).double()
    before, step = module(x), torch.randn(D).double()
    with torch.no_grad():
        module.q_proj.bias += step.repeat(H)
        module.k_proj.bias += step.repeat(2 * G)
    torch.testing.assert_close(module(x), before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rope", [None, Rotary()])
def test_shifts_of_a_shared_key_are_biases(rope):
    shared, apart = make(G, shared_key=True, rope=rope), make(G, rope=rope)
    state = shared.state_dict()
    shift = state.pop("key_shift").flatten(1)
    state["k_proj.weight"] = state["k_proj.weight"].repeat(2, 1)
    state["k_proj.bias"] = (state["k_proj.bias"] + shift).flatten()
    apart.load_state_dict(state)
    x = torch.randn(2, 9, E).double()
    torch.testing.assert_close(shared(x), apart(x), atol=1e-12, rtol=0)
    keys = 2 if rope else 1
    assert shared.cache_bytes_per_token(torch.float64) == 8 * G * D * (keys + 1)
    assert apart.cache_bytes_per_token(torch.float64) == 8 * G * D * 3


@pytest.mark.parametrize("causal", [True, False])
def test_the_linear_form_is_linear_attention_with_merged_keys(causal):
    options = {"feature_norm": True, "scale_w": (1.0, 2.0), "eps": 1e-5, "output_scale": D**-0.5}
    module, x = make(G, attention="linear", causal=causal, **options), torch.randn(2, 70, E).double()

    def phi(z):
        z = torch.nn.functional.elu(z) + 1
        return z / z.sum(-1, keepdim=True)

    q, v = phi(module.q_proj(x).view(2, 70, H, D)), module.v_proj(x).view(2, 70, G, D).repeat_interleave(H // G, 2)
    k = phi(module.k_proj(x).view(2, 70, 2, G, D)) * torch.tensor([1.0, 2.0]).double()[:, None, None]
    k = (k * module.pi[..., None]).sum(2).repeat_interleave(H // G, 2)
    s = torch.einsum("bthd,bshd->bhts", q, k)
    s = s.tril() if causal else s
    heads = torch.einsum("bhts,bshd->bthd", s / (s.sum(-1, keepdim=True) + 1e-5), v) * D**-0.5
    for backend in ("eager", "auto"):
        module.backend = backend
        torch.testing.assert_close(module(x), module.o_proj(heads.flatten(2)), atol=1e-12, rtol=0)
    blind = module(x[:, :5], mask=AttentionMask.padding([0, 5]))
    assert torch.equal(blind[0], module.o_proj.bias.expand(5, E))


def responsibilities(module, x, pi, context=None):
    """gamma (B, H, T, S, R) of all pairs under the prior pi (H, S or 1, R)."""
    context = x if context is None else context
    q, k = module.q_proj(x).view(2, -1, H, D), module.k_proj(context).view(2, context.shape[1], 2, H, D)
    distance = (q[:, :, None, None] - k[:, None]).square().sum(-1).permute(0, 4, 1, 2, 3)
    e = (-torch.tensor(module.precision).double() / (2 * D**0.5) * distance).exp() * pi[:, None]
    return e / (e.sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("prior", ["head", "position", "global"])
def test_the_soft_prior_becomes_the_mean_responsibility(prior):
    module, x = make(assignment="soft", prior=prior, max_positions=12), torch.randn(2, 9, E).double()
    with torch.no_grad():
        module.pi[0], module.pi[1] = 0.3, 0.7
    before = module.pi.clone()
    expected = module.eval()(x)
    assert torch.equal(module.pi, before)
    torch.testing.assert_close(module.train()(x), expected, atol=1e-12, rtol=0)
    gamma = responsibilities(module, x, torch.tensor([0.3, 0.7], dtype=torch.float64).expand(H, 1, 2))[..., 0]
    axes = {"head": (0, 2, 3), "position": (0, 2), "global": (0, 1, 2, 3)}[prior]
    first = gamma.mean(axes)
    found = module.pi[..., :9] if prior == "position" else module.pi
    torch.testing.assert_close(found, torch.stack([first, 1 - first]), atol=1e-12, rtol=0)
    if prior == "position":
        assert torch.equal(module.pi[..., 9:], before[..., 9:])
    assert "pi" in module.state_dict()
    assert "pi" not in dict(module.named_parameters())


def test_the_soft_prior_refuses_to_be_recomputed():
    module, x = make(assignment="soft"), torch.randn(2, 9, E).double().requires_grad_()
    y = checkpoint(module, x, use_reentrant=False)
    prior = module.pi.clone()
    with pytest.raises(ValueError, match="'soft' must not be recomputed in the backward pass"):
        y.sum().backward()
    assert torch.equal(module.pi, prior)
    learned = make()
    checkpoint(learned, x, use_reentrant=False).sum().backward()


def test_a_call_that_fails_leaves_the_soft_prior_as_it_was():
    module, x = make(assignment="soft"), torch.randn(2, 9, E).double()
    prior = module.pi.clone()

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = module.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        module(x)
    assert torch.equal(module.pi, prior)
    hook.remove()
    module(x)
    assert not torch.equal(module.pi, prior)


def test_padding_does_not_count_in_the_soft_prior():
    module, x = make(assignment="soft", prior="position", max_positions=9), torch.randn(2, 9, E).double()
    gamma = responsibilities(module, x, module.pi[:, 0, :1].T.expand(H, 1, 2))[..., 0]
    real = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
    weight = (real[:, :, None] & real[:, None]).double()
    module(x, mask=AttentionMask.padding([9, 6]))
    expected = (gamma * weight[:, None]).sum((0, 2)) / (weight.sum((0, 1)) + 1e-6)
    torch.testing.assert_close(module.pi[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("keys", [9, 7])
def test_a_padded_context_says_nothing_about_the_queries_of_the_soft_prior(keys):
    module, x = make(assignment="soft", causal=False), torch.randn(2, 9, E).double()
    context, real = torch.randn(2, keys, E).double(), torch.arange(keys) < torch.tensor([[keys], [4]])
    gamma = responsibilities(module, x, module.pi.T[:, None], context)[..., 0]
    module(x, context, mask=AttentionMask.padding([keys, 4]))
    expected = (gamma * real[:, None, None]).sum((0, 2, 3)) / (9 * real.sum().double() + 1e-6)
    torch.testing.assert_close(module.pi[0], expected, atol=1e-12, rtol=0)


def test_tokens_that_are_no_queries_are_no_keys_of_the_soft_prior():
    module, x = make(assignment="soft", causal=False), torch.randn(2, 9, E).double()
    twin, real = make(assignment="soft", causal=False), torch.arange(9) >= torch.tensor([[0], [3]])
    module(x, mask=AttentionMask(real_queries=real))
    twin(torch.cat([x[:1], x[1:].roll(-3, 1)]), mask=AttentionMask.padding([9, 6]))
    torch.testing.assert_close(module.pi, twin.pi, atol=1e-12, rtol=0)


def test_the_linear_forms_cache_has_floating_states():
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch\.int64"):
        make(attention="linear").init_cache(1, 5, dtype=torch.int64)


def test_documents_of_a_row_have_positions_of_their_own():
    module, x = make(assignment="soft", prior="position", max_positions=6), torch.randn(1, 9, E).double()
    module(x, mask=AttentionMask.packed([0, 6, 9]))
    with pytest.raises(ValueError, match="x must end within max_positions 6, got 9 tokens"):
        module(x)


@pytest.mark.parametrize("options", [{"assignment": "hard"}, {"dropout": 0.2}])
def test_only_the_definition_takes_maxima_and_drops_weights(options):
    for backend in ("sdpa", "flash", "triton"):
        with pytest.raises(BackendUnavailable, match=f"backend '{backend}' cannot run mixture_attention: only the"):
            make(backend=backend, **options)(torch.randn(1, 3, E).double())


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_an_observer_sees_one_score_for_every_position(backend):
    module, x, seen = make(G, backend=backend), torch.randn(2, 9, E).double(), []
    heads = []
    module.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].unflatten(-1, (H, D))))
    with observing(seen.append):
        module(x)
    first = seen[0]
    visible = torch.ones(9, 9).bool().tril()
    weights = first.rules.bias.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, first.v.repeat_interleave(H // G, 2))
    torch.testing.assert_close(heads[0], expected, atol=1e-12, rtol=0)


def test_half_the_heads_take_62_percent_of_the_projections():
    module, whole = attnzoo.MixtureOfGaussianKeysAttention(64, 4, head_dim=8), attnzoo.MultiHeadAttention(64, 8, 8)
    assert module.flops_by_part(10)["projections"] / whole.flops_by_part(10)["projections"] == 0.625
    assert module.flops_by_part(10)["attention"] / whole.flops_by_part(10)["attention"] == 0.75
    assert module.no_weight_decay() == {"pi"}


def test_the_linear_form_costs_what_its_states_cost():
    def attention(module, *lengths):
        return module.flops_by_part(*lengths)["attention"]

    module = make(G, attention="linear", causal=False)
    # D (Dv + 1) numbers of each context token and key/value head are summed, and of each query and head are read.
    for queries, keys in ((10, 3), (3, 10), (4, 4)):
        assert attention(module, queries, keys) == 2 * D * (D + 1) * (keys * G + queries * H)
    causal = make(G, attention="linear")
    assert attention(causal, 1) == 2 * D * (D + 1) * (G + H)
    assert attention(causal, 9) == attention(causal, 64) == 2 * 64 * (D * (D + 1) * (G + H) + 64 * H * (2 * D + 1))
    causal.prune_heads([1])
    # Heads that no longer share their keys evenly have a state each.
    assert attention(causal, 1) == 2 * D * (D + 1) * 2 * (H - 1)


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_key_circuits_are_means_by_prior_and_precision(attention):
    module = make(attention=attention, **({"scale_w": (1.0, 2.0)} if attention == "linear" else {}))
    share = module.pi * torch.tensor(module.precision if attention == "softmax" else (1.0, 2.0))[:, None]
    mean = (share / share.sum(0))[..., None, None] * module.k_proj.weight.view(2, H, D, E)
    for h, (_, k) in enumerate(module.qk_circuit()):
        torch.testing.assert_close(k, mean.sum(0)[h].detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mixtures": 0}, "num_mixtures must be at least 1, got 0"),
        ({"precision": (1.0,)}, r"precision must hold num_mixtures 2 positive numbers, got \(1.0,\)"),
        ({"precision": (1.0, 0.0)}, "precision must hold positive numbers"),
        ({"scale_w": (1.0, -1.0)}, "scale_w must hold positive numbers"),
        ({"assignment": "firm"}, "assignment must be one of 'learned', 'soft', 'hard', got 'firm'"),
        ({"prior": "token"}, "prior must be one of 'head', 'position', 'global', got 'token'"),
        ({"prior": "position"}, "max_positions must be given with prior 'position', got None"),
        ({"prior": "position", "max_positions": 0}, "max_positions must be at least 1, got 0"),
        ({"attention": "linear", "assignment": "hard"}, "attention 'linear' needs assignment 'learned' and no rope"),
        ({"attention": "linear", "rope": Rotary()}, "attention 'linear' needs assignment 'learned' and no rope"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"feature_norm": True}, "feature_norm needs attention 'linear', got True and attention 'softmax'"),
        ({"output_scale": 0.5}, "output_scale needs attention 'linear', got 0.5 and attention 'softmax'"),
        ({"scale_w": (1, 2)}, r"scale_w needs attention 'linear', got \(1.0, 2.0\) and attention 'softmax'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.MixtureOfGaussianKeysAttention(E, H, **options)


def test_a_shift_of_a_single_shared_key_is_warned_of():
    with pytest.warns(UserWarning, match="shared_key with num_mixtures=1 shifts all keys alike"):
        attnzoo.MixtureOfGaussianKeysAttention(E, H, shared_key=True, num_mixtures=1)
    assert build("mgk").num_mixtures == 2
