"""Forgetting attention: identities of the gate, the Pro options, caches, memory, refusals."""

import math

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask, Rotary
from attnzoo.ops.observation import observing
from attnzoo.ops.softmax_attention import alibi_slopes, softmax_attention
from tests.modules.test_golden import construct, load
from tests.zoo import E, G, H, gradients

T = 11
PRO = {"k_shift": True, "v_shift": True, "qk_norm": True, "output_norm": True, "output_gate": "sigmoid"}


def make(**options):
    """A module whose gates differ, in float64."""
    torch.manual_seed(3)
    return attnzoo.ForgettingAttention(E, H, **{"num_kv_heads": G, "init_std": 0.3, "dtype": torch.float64} | options)


def sample(tokens=T, batch=2):
    return torch.randn(batch, tokens, E, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def plain(module, **options):
    """Grouped-query attention with the same projections."""
    base = attnzoo.GroupedQueryAttention(E, H, G, **{"rope": None, "dtype": torch.float64} | options)
    state = module.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()})
    return base


@pytest.mark.parametrize("options", [{}, {"rope": Rotary(theta=5e5)}, {"sliding_window": 4}, {"qk_norm": "shared"}])
def test_without_a_gate_it_is_grouped_query_attention(options):
    module, x = make(forget_gate=None, **options), sample()
    shared = {"qk_norm": True, "qk_norm_eps": 1e-5} if "qk_norm" in options else options
    expected = plain(module, **shared)(x)
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    gated = make(**options)
    torch.nn.init.zeros_(gated.forget_proj.weight)
    torch.nn.init.constant_(gated.forget_proj.bias, 50.0)
    torch.testing.assert_close(gated(x), plain(gated, **shared)(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("forget_gate", ["fixed", "bias"])
def test_constant_gates_are_alibi(forget_gate):
    slopes = alibi_slopes(H)
    module, x = make(forget_gate=forget_gate, decay_times=(1 / slopes[0], 1 / slopes[-1])), sample()
    torch.testing.assert_close(module(x), plain(module, alibi=True)(x), atol=1e-12, rtol=0)
    assert ("forget_bias" in module.state_dict()) == (forget_gate == "bias")


def test_gates_of_the_shortest_times_start_finite():
    times = (1e-3, 1e6)
    module = attnzoo.ForgettingAttention(8, 2, forget_gate="bias", decay_times=times, dtype=torch.float64)
    log_gates = torch.nn.functional.logsigmoid(module.forget_bias.detach())
    torch.testing.assert_close(log_gates, -1 / torch.tensor(times, dtype=torch.float64), atol=0, rtol=1e-9)


def test_one_time_is_enough_for_one_head():
    module = attnzoo.ForgettingAttention(8, 1, forget_gate="fixed", decay_times=(3, 90))
    assert module.times() == pytest.approx([3.0])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_closed_gate_hides_everything_before_it(backend):
    """As the border of two packed documents."""
    module, x = make(backend=backend), sample()
    hook = module.forget_proj.register_forward_hook(
        lambda _, args, out: torch.where((torch.arange(T) == 4)[:, None], -50.0, out)
    )
    closed = module(x)
    hook.remove()
    packed = module(x, mask=AttentionMask.packed([0, 4, T, T + 4, 2 * T]))
    torch.testing.assert_close(closed, packed, atol=1e-12, rtol=0)


def test_gates_are_those_of_the_tokens_between():
    """The weights, spelled out from gates between key and query."""
    module, x = make(), sample()
    f = torch.sigmoid(module.forget_proj(x))
    q, k = (layer(x).unflatten(2, (-1, 8)) for layer in (module.q_proj, module.k_proj))
    v = module.v_proj(x).unflatten(2, (-1, 8))
    out = torch.zeros(2, T, H, 8).double()
    for b in range(2):
        for h in range(H):
            for i in range(T):
                weights = torch.stack(
                    [
                        (q[b, i, h] @ k[b, j, h // 2] / 8**0.5).exp() * f[b, j + 1 : i + 1, h].prod()
                        for j in range(i + 1)
                    ]
                )
                out[b, i, h] = weights / weights.sum() @ v[b, : i + 1, h // 2]
    torch.testing.assert_close(module(x), module.o_proj(out.flatten(2)), atol=1e-12, rtol=0)


def test_a_constant_in_the_cumulated_gates_changes_nothing():
    q, k, v = (torch.randn(2, T, n, 8).double() for n in (H, G, G))
    c = -torch.rand(2, H, T).double().cumsum(-1)
    bias = -c[:, :, None]
    expected = softmax_attention(q, k, v, bias=bias, backend="eager")
    for backend in ("eager", "sdpa"):
        for constant in (0.0, 100.0):
            found = softmax_attention(q, k, v, decay=c + constant, backend=backend)
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_gradient_of_a_gate_is_what_is_lost_behind_it(backend):
    """d log f_t = the reverse cumulated sum of minus the gradient's column sums; its row sums are 0."""
    q, k, v = (torch.randn(1, T, n, 8).double() for n in (H, G, G))
    gates = -torch.rand(1, H, T).double()
    weight = torch.randn(1, T, H, 8).double()
    bias = torch.zeros(1, H, T, T).double().requires_grad_()
    c = gates.cumsum(-1)
    out = softmax_attention(q, k, v, bias=bias + c[..., None] - c[:, :, None], backend="eager")
    (ds,) = torch.autograd.grad((out * weight).sum(), bias)
    assert ds.sum(-1).abs().max() < 1e-13
    gates.requires_grad_()
    out = softmax_attention(q, k, v, decay=gates.cumsum(-1), backend=backend)
    (found,) = torch.autograd.grad((out * weight).sum(), gates)
    expected = (-ds.sum(-2)).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shift", ["k_shift", "v_shift"])
def test_a_shift_of_nothing_is_none(shift):
    module, x = make(**{shift: True}), sample()
    x[..., 0] = 1e3
    proj = getattr(module, f"{shift[0]}_shift_proj")
    torch.nn.init.zeros_(proj.weight)
    half = module(x)
    with torch.no_grad():
        proj.weight[:, 0] = -1.0
    base = make()
    base.load_state_dict({name: value for name, value in module.state_dict().items() if "shift" not in name})
    torch.testing.assert_close(module(x), base(x), atol=1e-12, rtol=0)
    assert not torch.allclose(half, base(x))


@pytest.mark.parametrize("pro", [False, True])
def test_left_padding_is_the_shorter_batch(pro):
    module, x = make(pro=pro, rope=None), sample()
    real = torch.arange(T)[None] >= torch.tensor([0, 4])[:, None]
    padded = x.where(real[..., None], 7.0)
    mask = AttentionMask(dense_mask=real[:, None, None], real_queries=real)
    found = module(padded, mask=mask)
    torch.testing.assert_close(found[0], module(x[:1])[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1, 4:], module(x[1:, 4:])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("sizes", [[4, T - 4], [1] * T, [3, 2, T - 5]], ids=["at its end", "one by one", "beyond"])
@pytest.mark.parametrize("pro", [False, True])
def test_left_padding_in_pieces_is_left_padding(pro, sizes):
    module, x = make(pro=pro), sample()
    real = torch.arange(T)[None] >= torch.tensor([0, 4])[:, None]
    mask = AttentionMask(dense_mask=real[:, None, None], real_queries=real)
    cache, found = module.init_cache(2, T), []
    with torch.no_grad():
        for part, own in zip(x.split(sizes, 1), real.split(sizes, 1), strict=True):
            seen = real[:, None, None, : cache.length + part.shape[1]]
            found.append(module(part, mask=AttentionMask(dense_mask=seen, real_queries=own), cache=cache))
    difference = (torch.cat(found, 1) - module(x, mask=mask)).where(real[..., None], 0)
    assert difference.abs().max() <= 1e-12


def test_pro_is_the_sum_of_its_options():
    assert make(pro=True).state_dict().keys() == make(**PRO).state_dict().keys()
    x = sample()
    assert torch.equal(make(pro=True)(x), make(**PRO)(x))
    assert make(pro=True, qk_norm="shared").q_norm.weight.shape == (8,)
    assert make(pro=True).q_norm.weight.shape == (32,)


@pytest.mark.parametrize(
    "options", [{}, {"pro": True}, {"forget_gate": "bias", "decay_times": (2, 8), "k_shift": True}]
)
def test_gradients_of_every_parameter(options):
    module, x = attnzoo.ForgettingAttention(8, 2, 1, init_std=0.5, dtype=torch.float64, **options), torch.randn(1, 4, 8)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x.double().requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("pro", [False, True])
def test_a_cache_can_go_back_as_far_as_the_shift_remembers(pro):
    module, x = make(pro=pro).eval(), sample(40)
    with torch.no_grad():
        expected = module(x)
        cache = module.init_cache(2, 40)
        module(x[:, :30], cache=cache)
        for back, more in ((25, 3), (16, 10)):
            cache.truncate(back)
            found = module(x[:, back : back + more], cache=cache)
            torch.testing.assert_close(found, expected[:, back : back + more], atol=1e-12, rtol=0)
        assert cache.length == 26
        if pro:
            # Rows 10 .. 25 are those that are left of the last 16 before each step back.
            with pytest.raises(ValueError, match=r"length must be 0 or at least 15: the token shift needs.*got 14"):
                cache.truncate(14)
        cache.truncate(20)
        cache.truncate(0)
        torch.testing.assert_close(module(x, cache=cache), expected, atol=1e-12, rtol=0)


def test_rows_of_a_beam_take_their_gates_and_shifts_along():
    module, x = make(pro=True).eval(), sample(12)
    with torch.no_grad():
        cache = module.init_cache(2, 12)
        module(x[:, :8], cache=cache)
        cache.reorder(torch.tensor([1, 1]))
        found = module(x[:1, 8:].expand(2, -1, -1), cache=cache)
        expected = module(torch.cat([x[1:, :8], x[:1, 8:]], 1))[:, 8:]
    torch.testing.assert_close(found, expected.expand(2, -1, -1), atol=1e-12, rtol=0)


def test_gates_are_cached_in_single_precision():
    module = attnzoo.ForgettingAttention(64, 4, 2, dtype=torch.bfloat16)
    cache = module.init_cache(3, 10)
    assert [buffer.dtype for buffer in cache.buffers] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert module.cache_bytes_per_token() == 2 * 2 * 32 + 4 * 4
    assert cache.nbytes == 30 * module.cache_bytes_per_token()
    pro = attnzoo.ForgettingAttention(64, 4, 2, dtype=torch.bfloat16, pro=True)
    assert pro.init_cache(1, 10).nbytes == pro.state_bytes(10) == 10 * (2 * 64 + 16) + 16 * 2 * 64


def test_long_decoding_in_half_precision_keeps_its_gates():
    """1,500 tokens with f = 1/2: cumulated gates near -1,000 whose neighbours differ by 0.7."""
    module, x = make(dtype=torch.float32), sample(1500, 1).float()
    torch.nn.init.zeros_(module.forget_proj.weight)
    half, exact = make(dtype=torch.bfloat16), make()
    for other in (half, exact):
        other.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = exact(x.double())[:, -4:]
        cache = half.init_cache(1, 1500)
        half(x[:, :-4].bfloat16(), cache=cache)
        found = torch.cat([half(token.bfloat16(), cache=cache) for token in x[:, -4:].split(1, 1)], 1)
        without = half(x[:, -4:].bfloat16())
    scale = expected.abs().max()
    assert (found.double() - expected).abs().max() < 0.03 * scale
    assert (without.double() - expected).abs().max() > 0.03 * scale


@pytest.mark.parametrize("options", [{}, {"pro": True}, {"pro": True, "rope": Rotary()}])
def test_training_stores_no_pairs_of_tokens(options):
    def stored(tokens):
        module, sizes = attnzoo.ForgettingAttention(E, H, G, backend="sdpa", **options), {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module(torch.randn(1, tokens, E))
        return sum(sizes.values())

    assert stored(512) <= 2.05 * stored(256)


@pytest.mark.parametrize("starts", [None, [0, 300, 610, 700, 980, 1400]], ids=["one", "packed"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"pro": True, "rope": Rotary()}, {"num_kv_heads": 1}])
def test_forgotten_keys_may_be_left_out(options, backend, starts, pairs):
    module, pruned = (make(backend=backend, prune_tolerance=value, **options) for value in (None, -10))
    x, weight, mask = sample(700), sample(700), None if starts is None else AttentionMask.packed(starts)
    with torch.no_grad():
        for one in (module, pruned):
            # The last key/value head forgets nothing.
            one.forget_proj.bias.copy_(torch.tensor([-2.0, -1, 40, 40]))
    expected, found = (gradients(one, x, weight, mask=mask) for one in (module, pruned))
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= math.exp(-10) * value.abs().max(), name
    if options.get("num_kv_heads") == 1 and mask is None:
        # Heads that share a key leave out what all of them have forgotten: nothing.
        assert pairs == [700 * 700 * H]
    else:
        # Forward and again in the backward pass.
        whole = 2 * H * sum((min(t + 128, 700) - t) * min(t + 128, 700) for t in range(0, 700, 128))
        assert sum(pairs) < (1 if options.get("num_kv_heads") == 1 else 0.75) * whole


@pytest.mark.parametrize("tolerance", [-5, -20.0, -math.inf])
def test_decoding_leaves_forgotten_keys_out_too(tolerance, pairs):
    outputs, x = [], sample(300)
    with torch.no_grad():
        for module in (make(), make(prune_tolerance=tolerance)):
            cache = module.init_cache(2, 300)
            outputs.append(torch.cat([module(part, cache=cache) for part in x.split([200, 1, 98, 1], 1)], 1))
    error = (outputs[1] - outputs[0]).abs().max()
    assert error == 0 if tolerance == -math.inf else 0 < error < math.exp(tolerance)
    assert pairs[-1] == 300 * H if tolerance == -math.inf else pairs[-1] < 200 * G


def test_a_mask_that_may_hide_a_token_from_itself_leaves_nothing_out(pairs):
    module, pruned, x = make(), make(prune_tolerance=-1.0), sample(300)
    far = torch.arange(300) < 5
    for mask in (far, AttentionMask.padding([3, 300])):
        assert torch.equal(pruned(x, mask=mask), module(x, mask=mask))
    with observing(lambda _: None):
        assert torch.equal(pruned(x), module(x))
    assert pairs == [300 * 300 * H] * 3


@pytest.fixture
def pairs(monkeypatch):
    """How many pairs of all heads each call of softmax attention in `pruned_attention` has."""
    held = []

    def noted(q, k, *args, **options):
        held.append(q.shape[1] * q.shape[2] * k.shape[1])
        return softmax_attention(q, k, *args, **options)

    monkeypatch.setattr("attnzoo.ops.pruned_attention.softmax_attention", noted)
    monkeypatch.setattr("attnzoo.ops.pruned_attention.CHUNK", 128)
    return held


def test_costs():
    module, base = attnzoo.ForgettingAttention(64, 4, 2), attnzoo.GroupedQueryAttention(64, 4, 2)
    ours, theirs = module.flops_by_part(32), base.flops_by_part(32)
    assert ours == theirs | {"projections": theirs["projections"] + 2 * 32 * 64 * 4}
    pro = attnzoo.ForgettingAttention(64, 4, 2, pro=True).flops_by_part(32)
    assert pro["projections"] == ours["projections"] + 2 * 32 * 64 * (2 * 2 + 64)
    assert attnzoo.cost(module, 2, 32).forward_flops == 2 * sum(ours.values())
    assert module.no_weight_decay() == set()
    assert attnzoo.ForgettingAttention(64, 4, 2, pro=True).no_weight_decay() == {
        "q_norm.weight",
        "k_norm.weight",
        "output_norm.weight",
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pro": True},
        {"forget_gate": "bias", "decay_times": (1, 9)},
        {"forget_gate": "fixed", "decay_times": (1, 9)},
    ],
)
def test_a_pruned_head_takes_its_gate_along(options):
    module, x = make(**options), sample()
    with torch.no_grad():
        module.o_proj.weight.view(E, H, -1)[:, [0, 1, 3]] = 0
    expected = module(x)
    module.prune_heads([0, 1, 3])
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    module.reset_parameters()
    assert module(x).isfinite().all()


def test_the_stored_weights_give_the_learned_bias_too():
    """The fixed gates of the stored figures as a bias, and a bias as it would be stored."""
    tensors, config, _ = load("forgetting_fixed_rope")
    module = construct("forgetting_fixed_rope").double()
    learned = construct_bias(module, config)
    found = gradients(learned, tensors["input.x"].double(), tensors["input.w"].double())
    assert (found["y"] - tensors["output.y"]).abs().max() < 1e-9
    assert (found["x"] - tensors["grad.x"]).abs().max() < 1e-9
    bias = [-math.log(math.expm1(1 / t)) for t in module.times()]
    torch.testing.assert_close(
        learned.forget_bias.detach(), torch.tensor(bias, dtype=torch.float64), atol=1e-12, rtol=0
    )


def construct_bias(module, config):
    """The module with the same weights and learned biases."""
    learned = attnzoo.ForgettingAttention(
        module.embed_dim, module.num_heads, forget_gate="bias", decay_times=config["decay_times"],
        output_gate="silu", rope=module.rope, dtype=torch.float64,
    )  # fmt: skip
    learned.load_state_dict(module.state_dict() | {"forget_bias": learned.forget_bias})
    return learned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "causal must be True: no decay towards later tokens is defined, got causal=False"),
        ({"forget_gate": "learned"}, "forget_gate must be 'data', 'bias', 'fixed' or None, got 'learned'"),
        ({"decay_times": (1, 2)}, r"decay_times must be given with forget_gate 'fixed', .*got \(1, 2\) with 'data'"),
        ({"forget_gate": "fixed"}, "decay_times must be given with forget_gate 'fixed', .*got None with 'fixed'"),
        ({"forget_gate": None, "decay_times": (1, 2)}, r"decay_times must be given .*got \(1, 2\) with None"),
        ({"forget_gate": "bias", "decay_times": (0, 2)}, r"decay_times must be two times with 0 < first <= last"),
        ({"forget_gate": "bias", "decay_times": (3, 2)}, r"decay_times must be two times with 0 < first <= last"),
        ({"output_gate": "swish"}, "output_gate must be None, 'sigmoid' or 'silu', got 'swish'"),
        ({"output_gate": "silu", "output_norm": True}, "output_gate must be 'sigmoid' or None with output_norm"),
        ({"output_gate": "silu", "pro": True}, "output_gate must be 'sigmoid' or None with output_norm"),
        ({"qk_norm": "head"}, "qk_norm must be True, False or 'shared', got 'head'"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"k_shift": 1}, "k_shift must be True or False, got 1"),
        ({"prune_tolerance": 0.0}, "prune_tolerance must be a negative number, got 0.0"),
        ({"prune_tolerance": math.nan}, "prune_tolerance must be a negative number, got nan"),
        ({"prune_tolerance": "-1"}, "prune_tolerance must be a negative number, got '-1'"),
        (
            {"prune_tolerance": -1, "sliding_window": 4},
            "prune_tolerance needs .* no sliding_window, got -1, 'data' and 4",
        ),
        ({"prune_tolerance": -1, "forget_gate": None}, "prune_tolerance needs a forget gate .*, got -1, None and None"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.ForgettingAttention(**{"embed_dim": E, "num_heads": H} | options)


@pytest.mark.parametrize("option", ["sink", "alibi", "logit_softcap", "kdim"])
def test_what_is_not_defined_beside_a_decay_is_no_option(option):
    with pytest.raises(TypeError, match=option):
        attnzoo.ForgettingAttention(E, H, **{option: None})


def test_a_context_is_refused():
    with pytest.raises(ValueError, match="context must be None: no decay to other sequences is defined"):
        make()(sample(), sample())
