"""Linear attention: stored figures, its three forms, feature maps, states, refusals."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import AttentionMask, LinearAttention, Rotary
from attnzoo.modules.call import begin
from attnzoo.ops.feature_maps import FEATURE_MAPS, NON_NEGATIVE, FeatureMap
from tests.zoo import gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "linear.safetensors"
E, H, G, T = 24, 4, 2, 19
LM = {
    "feature_map": "relu",
    "normalize": False,
    "output_norm": "rmsnorm",
    "gate": True,
    "rope": Rotary(),
    "norm_eps": 1e-6,
}


@cache
def stored():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118


def golden(dtype, **options):
    tensors, config = stored()
    config = {**config, "rope": None} | options
    sizes = [config.pop(name) for name in ("embed_dim", "num_heads")]
    attn = LinearAttention(*sizes, **config).to(dtype)
    attn.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return attn


def make(dtype=torch.float64, **options):
    torch.manual_seed(5)
    attn = LinearAttention(E, H, G, **({"chunk_size": 5} | options)).to(dtype)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attn.eval()


def sample(batch=2, tokens=T):
    return torch.randn(batch, tokens, E, dtype=torch.float64)


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 25, 64])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_stored_figures(backend, chunk_size):
    tensors, _ = stored()
    found = gradients(
        golden(torch.float64, backend=backend, chunk_size=chunk_size), tensors["input.x"], tensors["input.w"]
    )
    assert (found["y"] - tensors["output.y"]).abs().max() < 1e-9
    for key, value in tensors.items():
        if key.startswith("grad."):
            assert (found[key.removeprefix("grad.")] - value).abs().max() < 1e-9, key


def test_float32_is_within_ten_times_the_stored_difference():
    tensors, _ = stored()
    found = gradients(golden(torch.float32), tensors["input.x"].float(), tensors["input.w"].float())
    for name, expected in (("y", tensors["output.y"]), ("x", tensors["grad.x"])):
        error = (found[name].double() - expected).abs().max() / expected.abs().max()
        assert error < 10 * 2.2e-7


@pytest.mark.parametrize("options", [{}, LM, {"normalizer_eps": 0.0}], ids=["paper", "language model", "no eps"])
@pytest.mark.parametrize("tokens", [1, 5, 19, 20])
def test_recurrent_is_parallel_is_chunked(options, tokens):
    x = sample(tokens=tokens)
    chunked, quadratic = make(**options), make(backend="eager", **options)
    expected = quadratic(x)
    torch.testing.assert_close(chunked(x), expected, atol=1e-11, rtol=0)
    state = chunked.init_cache(2, tokens)
    with torch.no_grad():
        y = torch.cat([chunked(part, cache=state) for part in x.split(1, 1)], 1)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)


def test_the_recurrence_is_that_of_the_paper():
    attn, x = make(), sample(1)
    q = (torch.nn.functional.elu(attn.q_proj(x)) + 1).view(T, H, -1) * attn.scale
    k = (torch.nn.functional.elu(attn.k_proj(x)) + 1).view(T, G, -1).repeat_interleave(H // G, 1)
    v = attn.v_proj(x).view(T, G, -1).repeat_interleave(H // G, 1)
    S, z, heads = torch.zeros(H, E // H, E // H).double(), torch.zeros(H, E // H).double(), []
    for t in range(T):
        S = S + k[t][..., None] * v[t][:, None]
        z = z + k[t]
        heads.append(torch.einsum("hd,hdv->hv", q[t], S) / ((q[t] * z).sum(-1, keepdim=True) + 1e-6))
    expected = attn.o_proj(torch.stack(heads).flatten(1))
    torch.testing.assert_close(attn(x)[0], expected, atol=1e-12, rtol=0)


def test_a_carried_state_is_one_run():
    attn, x = make(**LM), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        y = torch.cat([attn(part, cache=state) for part in x.split([7, 12], 1)], 1)
    torch.testing.assert_close(y, attn(x), atol=1e-11, rtol=0)
    assert state.length == T


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_feature_map_has_exact_gradients(name, causal):
    normal = name in NON_NEGATIVE
    attn = make(feature_map=name, normalize=normal, output_norm="none" if normal else "rmsnorm", causal=causal,
                feature_eps=0.1, sum_norm=name == "relu", normalizer_eps=1e-3)  # fmt: skip
    x = sample(1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: attn(x), (x, *attn.parameters()), fast_mode=True)


def test_feature_maps_are_their_formulas():
    x = torch.randn(3, 6, dtype=torch.float64)
    hedgehog = FeatureMap("hedgehog", 6, dtype=torch.float64)
    hedgehog.reset_parameters()
    torch.testing.assert_close(hedgehog(x), torch.cat([2 * x, -2 * x], -1).softmax(-1))
    u = torch.cat([x.relu(), (-x).relu()], -1)
    dpfp = FeatureMap("dpfp", 6)
    torch.testing.assert_close(dpfp(x)[:, 12:24], u * torch.roll(u, 2, -1))
    assert dpfp(x).shape == (3, dpfp.out_width) == (3, 48)
    assert (dpfp(x) >= 0).all()
    product = FeatureMap("elementwise_product", 6, dtype=torch.float64)
    torch.testing.assert_close(product(x), product.layer1(x) * product.layer2(x))
    t2r = FeatureMap("t2r", 6, dtype=torch.float64)
    torch.testing.assert_close(t2r(x), t2r.layer(x).relu())
    assert t2r.layer.bias is None


@pytest.mark.slow
def test_one_short_sequence_compiles_with_its_gradient():
    torch.compiler.reset()
    attn, x = make(chunk_size=64, gate=True), sample(1, 7)
    compiled, plain = torch.compile(attn, backend="aot_eager", fullgraph=True), []
    for call in (compiled, attn):
        attn.zero_grad()
        call(x).square().sum().backward()
        plain.append([parameter.grad for parameter in attn.parameters()])
    torch.testing.assert_close(*plain, atol=1e-12, rtol=1e-12)


def test_rows_of_weights_sum_to_one():
    attn = make(normalizer_eps=0.0)
    with torch.no_grad():
        attn.v_proj.weight.zero_()
        attn.v_proj.bias = torch.nn.Parameter(torch.ones(G * E // H).double())
    x = sample()
    torch.testing.assert_close(attn(x), attn.o_proj.weight.sum(1).expand(2, T, E), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_denominator_of_zero_gives_zero(causal):
    module = make(causal=causal, normalizer_eps=0.0, feature_map="elu", bias=False, out_bias=False)
    x = torch.randn(2, 9, module.embed_dim, dtype=torch.float64, requires_grad=True)
    y = module(x, mask=AttentionMask.padding([9, 0]))
    assert not y[1].any()
    expected = gradients(module, x[:1], torch.ones_like(x[:1]))
    found = torch.autograd.grad(y[0].sum(), [x, *module.parameters()])
    assert not found[0][1].any()
    for one, other in zip(found[1:], list(expected.values())[2:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_without_rotation_the_order_of_the_past_means_nothing():
    attn, x = make(), sample(1)
    shuffled = torch.cat([x[:, torch.randperm(T - 1)], x[:, -1:]], 1)
    torch.testing.assert_close(attn(shuffled)[:, -1], attn(x)[:, -1], atol=1e-12, rtol=0)


def test_groups_are_heads_with_equal_keys_and_values():
    attn, full = make(), LinearAttention(E, H, dtype=torch.float64)
    state = attn.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(G, -1, E).repeat_interleave(H // G, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = sample()
    torch.testing.assert_close(full(x), attn(x), atol=1e-12, rtol=0)


def test_the_rank_of_the_weights_is_at_most_the_number_of_features():
    attn = make(causal=False, normalize=False, output_norm="rmsnorm", head_dim=3)
    x = sample(1)
    q, k, *_ = attn.features(x, begin(attn, x))
    weights = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(H // G, 1))
    assert int(torch.linalg.matrix_rank(weights).max()) <= 3


@pytest.mark.parametrize("options", [{}, LM, {"qk_norm": True}, {"bias": True, "out_bias": False}])
def test_bidirectional_and_cross_attention(options):
    attn = make(causal=False, **options)
    x, context = sample(), torch.randn(2, 7, E).double()
    at = (torch.arange(T), torch.arange(7)) if attn.rope else None
    y = attn(x, context, positions=at)
    eager = make(causal=False, backend="eager", **options)
    torch.testing.assert_close(y, eager(x, context, positions=at), atol=1e-11, rtol=0)
    assert not torch.allclose(attn(x), y)
    torch.testing.assert_close(attn(x), eager(x), atol=1e-11, rtol=0)


def test_its_state_does_not_grow():
    attn = attnzoo.LinearAttention(512, 8)
    assert attn.cache_bytes_per_token() == 0
    assert attn.state_bytes(10) == attn.state_bytes(10_000) == 4 * 8 * 64 * 65
    assert attn.init_cache(3, 10).nbytes == attn.init_cache(3, 10_000).nbytes == 3 * attn.state_bytes(1)


def test_a_state_is_reset_reordered_and_not_taken_back():
    attn, x = make(), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        attn(x[:, :7], cache=state)
        with pytest.raises(ValueError, match="length must be 0 or 7: a state cannot give single tokens back, got 3"):
            state.truncate(3)
        state.truncate(7)
        state.reorder(torch.tensor([1, 0]))
        y = attn(x[:, 7:].flip(0), cache=state)
        torch.testing.assert_close(y.flip(0), attn(x)[:, 7:], atol=1e-11, rtol=0)
        with pytest.raises(ValueError, match="cache is full: 19 cached and 1 new tokens exceed its max_length 19"):
            attn(x[:, :1], cache=state)
        state.truncate(0)
        torch.testing.assert_close(attn(x, cache=state), attn(x), atol=1e-11, rtol=0)
    with pytest.raises(ValueError, match="cache was made for states of 2 sequences"):
        attn(sample(3, 1), cache=attn.init_cache(2, 4))
    with pytest.raises(ValueError, match="index must hold 2 integers"):
        state.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match="length must lie between 0 and the 19 cached tokens, got 20"):
        state.truncate(20)


def parts(attn):
    """Every submodule that computes something."""
    return [name for name, part in attn.named_modules() if name and not list(part.children())]


@pytest.mark.parametrize("options", [{}, LM, {"feature_map": "hedgehog", "qk_norm": True}])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_call_that_fails_anywhere_leaves_the_state_as_it_was(options, tokens):
    attn, x = make(**options), sample()
    state = attn.init_cache(2, T)

    def fail(*_):
        raise RuntimeError("failed on purpose")

    with torch.no_grad():
        attn(x[:, :7], cache=state)
        before = [buffer.clone() for buffer in state.buffers]
        for name in parts(attn):
            hook = attn.get_submodule(name).register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="failed on purpose"):
                attn(x[:, 7 : 7 + tokens], cache=state)
            hook.remove()
            assert state.length == 7, name
            assert all(torch.equal(a, b) for a, b in zip(state.buffers, before, strict=True)), name
        y = attn(x[:, 7:], cache=state)
    torch.testing.assert_close(y, attn(x)[:, 7:], atol=1e-11, rtol=0)


@pytest.mark.parametrize("options", [LM, {"feature_map": "hedgehog", "qk_norm": True}])
def test_every_part_is_called_where_it_has_a_hook(options):
    attn, x = make(**options), sample()
    expected = attn(x)
    for name in parts(attn):
        hook = attn.get_submodule(name).register_forward_hook(lambda *args: args[-1].roll(1, -1))
        assert (attn(x) - expected).abs().max() > 1e-3, name
        hook.remove()
    assert torch.equal(attn(x), expected)


def test_a_token_that_follows_a_state_has_its_own_gradient():
    attn, x = make(**LM), sample()
    state = attn.init_cache(2, T)
    with torch.no_grad():
        attn(x[:, :-1], cache=state)
    last, whole = x[:, -1:].clone().requires_grad_(), x.clone().requires_grad_()
    y = attn(last, cache=state)
    state.reset()
    (found,) = torch.autograd.grad(y.square().sum(), last)
    (expected,) = torch.autograd.grad(attn(whole)[:, -1].square().sum(), whole)
    torch.testing.assert_close(found, expected[:, -1:], atol=1e-11, rtol=0)


def test_the_state_of_another_module_is_refused():
    message = "cache must come from this module's init_cache: it was made for states of 2 x 6 x 6 and 2 x 6 with no "
    message += "window, and the module needs states of 2 x 12 x 6 and 2 x 12 with no window"
    with pytest.raises(ValueError, match=message):
        make(feature_map="hedgehog")(sample(), cache=make().init_cache(2, T))


def test_saved_memory_grows_with_the_length():
    attn = LinearAttention(E, H, G, chunk_size=16)
    sizes = []
    for tokens in (256, 512):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attn(torch.randn(1, tokens, E))
        sizes.append(total)
    assert sizes[1] <= 2.1 * sizes[0]


@pytest.mark.parametrize("options", [{}, LM, {"feature_map": "hedgehog"}])
@pytest.mark.parametrize("tokens", [10, 15])
def test_flops_are_those_that_are_counted(options, tokens):
    attn = make(**options)
    with FlopCounterMode(display=False) as counter:
        attn(sample(1, tokens))
    assert attn.flops(tokens) == counter.get_total_flops()
    state = attn.init_cache(1, tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attn(sample(1, 1), cache=state)
    assert attn.flops(1, 5) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_circuits_are_the_weights_of_heads_with_their_gains():
    attn = make(qk_norm=True)
    queries = (attn.q_proj.weight * attn.q_norm.weight[:, None]).view(H, -1, E)
    keys = (attn.k_proj.weight * attn.k_norm.weight[:, None]).view(G, -1, E)
    values, outputs = attn.v_proj.weight.view(G, -1, E), attn.o_proj.weight.view(E, H, -1)
    for h, (wq, wk) in enumerate(attn.qk_circuit()):
        assert torch.equal(wq, queries[h])
        assert torch.equal(wk, keys[h // (H // G)])
    for h, (wv, wo) in enumerate(attn.ov_circuit()):
        assert torch.equal(wv, values[h // (H // G)])
        assert torch.equal(wo, outputs[:, h])


def test_pruned_heads_are_heads_with_output_zero():
    for heads in ([1], [0, 1], [0, 3]):
        attn, x = make(**LM), sample()
        keep = torch.ones(H).double()
        keep[heads] = 0
        hook = attn.o_proj.register_forward_pre_hook(lambda _, i, k=keep: (i[0] * k.repeat_interleave(E // H),))
        expected = attn(x)
        hook.remove()
        attn.prune_heads(heads)
        torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)
        state = attn.init_cache(2, T)
        with torch.no_grad():
            y = torch.cat([attn(part, cache=state) for part in x.split(1, 1)], 1)
        torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)


def test_it_starts_stable_or_says_that_it_does_not():
    with pytest.warns(UserWarning, match="without normalize and output_norm"):
        LinearAttention(E, H, normalize=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"feature_map": "identity"}, "normalize needs features that cannot be negative .*'identity'"),
        ({"feature_map": "elementwise_product"}, "normalize needs features that cannot be negative"),
        ({"feature_map": "exp"}, "feature_map must be one of .*got 'exp'"),
        ({"head_dim": 5, "rope": Rotary()}, "head_dim must be even"),
        ({"rope": Rotary(dim=2)}, "rope must rotate all 6 features"),
        ({"output_norm": "layer"}, "output_norm must be 'none' or 'rmsnorm', got 'layer'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"feature_eps": -1.0}, "feature_eps must not be negative, got -1.0"),
        ({"kdim": 8}, "kdim needs causal=False, got kdim=8"),
        ({"dropout": 1.5}, "dropout must lie in"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(E, H, **options)


def test_calls_that_are_refused():
    attn, x = make(), sample()
    with pytest.raises(ValueError, match=r"mask must be AttentionMask\.padding or \.packed"):
        attn(x, mask=torch.ones(T, T, dtype=torch.bool))
    with pytest.raises(ValueError, match="context needs a module with causal=False"):
        attn(x, x)
    with pytest.raises(ValueError, match="part must be 'full'"):
        attn.qk_circuit("rope")
    with pytest.raises(ValueError, match="prune_heads needs qk_norm=False"):
        make(qk_norm=True).prune_heads([0])
    with pytest.raises(ValueError, match="lengths must have one entry a row, got 1 for 2"):
        attn(x, mask=AttentionMask.padding([3]))
    for backend in ("sdpa", "flash"):
        with pytest.raises(attnzoo.BackendUnavailable, match=f"backend '{backend}' cannot run linear attention: it"):
            make(backend=backend)(x)
    # The interpreter refuses the dtype; without it the device is what is missing, or triton itself.
    named = "got torch.float64|needs CUDA tensors|triton is not installed"
    with pytest.raises(attnzoo.BackendUnavailable, match=f"backend 'triton' cannot run linear attention: .*({named})"):
        make(backend="triton")(x)
