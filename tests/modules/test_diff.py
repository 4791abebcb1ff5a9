"""Differential attention: identities of both versions, depth, layers of transformers, memory, refusals."""

import math

import pytest
import torch

import attnzoo
from attnzoo import AttentionMask, Rotary
from attnzoo.conversion import from_diff_llama
from attnzoo.diagnostics import capture
from attnzoo.modules.call import begin
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.differential_attention import differential_attention
from attnzoo.ops.qk_norm_rope import qk_norm_rope
from attnzoo_recipes.lm import DecoderLM
from tests.modules.test_parity import in_float64
from tests.zoo import E, G, H, gradients

T = 11
every_version = pytest.mark.parametrize("version", [1, 2])


def make(version=1, **options):
    """A module whose lambdas are far from their start, in float64."""
    torch.manual_seed(3)
    options = {"init_std": 0.3, "dtype": torch.float64} | options
    return attnzoo.DifferentialAttention(E, H, G, version=version, **options)


def sample(tokens=T):
    return torch.randn(2, tokens, E, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def of_map(module, part, **options):
    """Grouped-query attention with the weights of one map, and with an output projection that does nothing."""
    D, Dv = module.head_dim, module.v_head_dim
    base = attnzoo.GroupedQueryAttention(
        E, H, G, D, v_head_dim=Dv, rope=module.rope, causal=module.causal, dtype=torch.float64, **options
    )
    q, k = module.q_proj.weight.detach(), module.k_proj.weight.detach()
    k = k.view(G, -1, D, E)[:, part if module.version == 1 else 0]
    with torch.no_grad():
        base.q_proj.weight.copy_(q.view(H, 2, D, E)[:, part].flatten(0, 1))
        base.k_proj.weight.copy_(k.flatten(0, 1))
        base.v_proj.weight.copy_(module.v_proj.weight)
    base.o_proj = torch.nn.Identity()
    return base


def spelled_out(module, x, **call):
    """Both maps apart, then their difference, norm and projection."""
    first, second = (of_map(module, part)(x, **call).unflatten(2, (H, -1)) for part in (0, 1))
    if module.version == 2:
        return module.o_proj((first - torch.sigmoid(module.lambda_proj(x))[..., None] * second).flatten(2))
    q1, k1, q2, k2 = (getattr(module, f"lambda_{name}") for name in ("q1", "k1", "q2", "k2"))
    factor = (q1 @ k1).exp() - (q2 @ k2).exp() + module.lambda_init
    o = first - factor * second
    o = (1 - module.lambda_init) * o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * module.subln.weight
    return module.o_proj(o.flatten(2))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
@every_version
def test_it_is_the_difference_of_two_grouped_query_attentions(version, causal, backend):
    module, x = make(version, causal=causal, backend=backend), sample()
    for mask in (None, AttentionMask.padding([T, 7]), torch.rand(2, H, T, T) > 0.2):
        torch.testing.assert_close(module(x, mask=mask), spelled_out(module, x, mask=mask), atol=1e-11, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_version
def test_it_is_a_composition_of_weights(version, backend):
    """Attention of 2 H heads whose weights are mixed by [1, -lambda] gives the same."""
    module, x = make(version, backend=backend), sample()
    factor = torch.tensor(0.7).double()
    call = begin(module, x)
    q = qk_norm_rope(module.q_proj(x).view(2, T, 2 * H, -1), call.q_table)
    k = qk_norm_rope(module.k_proj(x).view(2, T, -1, module.head_dim), call.k_table)
    v = module.v_proj(x).view(2, T, G, -1)
    found = differential_attention(q, k.flatten(2).unflatten(2, (G, -1)), v, factor, scale=0.4, backend=backend)
    if version == 1:
        k = k.unflatten(2, (G, 2)).repeat_interleave(H // G, 2).flatten(2, 3)
    matrix = torch.tensor([1.0, -0.7]).double().view(1, 2, 1).expand(H, 2, 1)
    expected = composed_attention(
        q, k, v, None, Composition(matrix, residual=False), call.view, scale=0.4, chunk_size=4
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_lambda_of_zero_leaves_the_first_map():
    module, x = make(lambda_init=0.0), sample()
    for name in ("lambda_q1", "lambda_q2"):
        torch.nn.init.zeros_(getattr(module, name))
    o = of_map(module, 0)(x).unflatten(2, (H, -1))
    expected = module.o_proj(module.subln(o).flatten(2))
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    module = make(2, bias=True)
    torch.nn.init.constant_(module.lambda_proj.bias, -60.0)
    torch.nn.init.zeros_(module.lambda_proj.weight)
    expected = module.o_proj(of_map(module, 0)(x))
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


def test_equal_maps_leave_the_sign_of_what_is_over():
    module, x = make(norm_eps=0.0), sample()
    with torch.no_grad():
        for proj, heads in ((module.q_proj, H), (module.k_proj, G)):
            parts = proj.weight.view(heads, 2, -1, E)
            parts[:, 1] = parts[:, 0]
        module.lambda_q1.zero_()
        outputs = []
        for strength in (-2.0, 0.5):
            module.lambda_q2.fill_(strength)
            module.lambda_k2.fill_(1.0)
            assert (module.factor(x) > 1) == (strength < 0)
            outputs.append(module(x))
    torch.testing.assert_close(outputs[0], -outputs[1], atol=1e-11, rtol=0)


def test_the_norm_hides_the_scale_of_values():
    for version in (1, 2):
        module, x = make(version, norm_eps=0.0), sample()
        before = module(x)
        with torch.no_grad():
            module.v_proj.weight.mul_(3.0)
        assert torch.allclose(module(x), before) == (version == 1)


def test_depth_sets_lambda_init_alone():
    for depth, expected in ((0, 0.2), (1, 0.8 - 0.6 * math.exp(-0.3)), (1000, 0.8)):
        assert make(depth=depth).lambda_init == pytest.approx(expected, abs=1e-12)
    module, x = make(), sample()
    module.depth = 7
    other = make(depth=7)
    assert torch.equal(module(x), other(x))
    other.depth = 0
    assert not torch.equal(module(x), other(x))
    assert make(lambda_init=0.5, depth=3).lambda_init == 0.5


def test_a_decoder_tells_its_layers_their_depth():
    model = DecoderLM(50, lambda embed_dim: attnzoo.DifferentialAttention(embed_dim, 2), embed_dim=32, num_layers=3)
    assert [block.attn.depth for block in model.layers] == [0, 1, 2]
    assert [block.attn.lambda_init for block in model.layers] == [make(depth=i).lambda_init for i in range(3)]


@every_version
def test_gradients_of_lambda(version):
    module, x = make(version, bias=True), sample(4)[:1]
    names = [name for name, _ in module.named_parameters() if "lambda" in name or "subln" in name]

    def call(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, tuple(map(module.get_parameter, names)), fast_mode=True)


def test_the_gradient_of_the_factor_is_what_it_multiplies():
    """d factor = -sum dO . a2, for one number and for one of each token."""
    q, k, v = (torch.randn(2, T, n, d).double() for n, d in ((2 * H, 3), (G, 6), (G, 5)))
    weight = torch.randn(2, T, H, 5).double()
    second = -differential_attention(q, k, v, torch.tensor(1.0).double(), scale=0.5)
    second = second + differential_attention(q, k, v, torch.tensor(0.0).double(), scale=0.5)
    for factor in (torch.rand(()).double(), torch.rand(2, T, H).double()):
        out = differential_attention(q, k, v, factor.requires_grad_(), scale=0.5)
        (found,) = torch.autograd.grad((out * weight).sum(), factor)
        expected = -(second * weight).sum(-1)
        torch.testing.assert_close(found, expected.sum() if factor.ndim == 0 else expected, atol=1e-11, rtol=0)


@every_version
def test_rows_of_the_map_add_up_to_one_minus_lambda(version):
    module, x = make(version), sample()
    with capture(module, ["patterns"]) as captured:
        module(x)
    factor = module.factor(x)
    expected = 1 - (factor.expand(2, T, H) if factor.ndim == 0 else factor)
    found = captured.last("patterns")[0].sum(-1).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@every_version
def test_heads_can_change_places(version):
    module, other, x = make(version), make(version), sample()
    heads = torch.tensor([3, 2, 1, 0])

    def rows(weight, order):
        return weight.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    state = module.state_dict()
    for name in ("q_proj", "k_proj", "v_proj", "lambda_proj"):
        if f"{name}.weight" in state:
            order = heads if name in ("q_proj", "lambda_proj") else torch.tensor([1, 0])
            state[f"{name}.weight"] = rows(state[f"{name}.weight"], order)
    state["o_proj.weight"] = rows(state["o_proj.weight"].T, heads).T
    other.load_state_dict(state)
    assert not torch.equal(other.q_proj.weight, module.q_proj.weight)
    torch.testing.assert_close(other(x), module(x), atol=1e-12, rtol=0)


@every_version
def test_circuits_are_of_one_map(version):
    module = make(version, rope=None, qk_norm=True)
    torch.nn.init.normal_(module.q_norm.weight)
    D, q, k = module.head_dim, module.q_proj.weight, module.k_proj.weight
    for index, part in enumerate(("first", "second")):
        for h, (wq, wk) in enumerate(module.qk_circuit(part)):
            g = h // (H // G)
            row = (2 * g + index if version == 1 else g) * D
            expected = (q[(2 * h + index) * D :][:D] * module.q_norm.weight[:, None]).T @ k[row : row + D]
            torch.testing.assert_close(wq.T @ wk, expected.detach(), atol=1e-12, rtol=0)
    for pair, first in zip(module.qk_circuit(), module.qk_circuit("first"), strict=True):
        assert all(map(torch.equal, pair, first))
    with pytest.raises(ValueError, match="part must be 'full', 'rope' or 'nope', got 'third'"):
        module.qk_circuit("third")
    assert [(wv.shape, wo.shape) for wv, wo in module.ov_circuit()] == H * [
        ((module.v_head_dim, E), (E, module.v_head_dim))
    ]


@every_version
def test_training_stores_no_pairs_of_tokens(version):
    def stored(tokens):
        module, sizes = attnzoo.DifferentialAttention(E, H, G, version=version, backend="sdpa"), {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module(torch.randn(1, tokens, E))
        return sum(sizes.values())

    assert stored(512) <= 2.05 * stored(256)


def test_sizes_and_costs_of_both_versions():
    one, two = attnzoo.DifferentialAttention(64, 4), attnzoo.DifferentialAttention(64, 4, 2, version=2)
    assert (one.head_dim, one.v_head_dim) == (8, 16)
    assert sum(p.numel() for p in one.parameters()) == 4 * 64 * 64 + 6 * 8
    assert one.cache_bytes_per_token(torch.float32) == 4 * 4 * 4 * 8
    assert (two.head_dim, two.v_head_dim) == (16, 16)
    assert two.cache_bytes_per_token(torch.float32) == 4 * 2 * 32
    mha = attnzoo.MultiHeadAttention(64, 8).flops_by_part(32)
    assert one.flops_by_part(32) == {"projections": mha["projections"], "attention": 3 * mha["attention"] // 2}
    gqa = attnzoo.GroupedQueryAttention(64, 4, 2).flops_by_part(32)
    assert two.flops_by_part(32)["attention"] == 2 * gqa["attention"]
    assert two.flops_by_part(32)["projections"] == gqa["projections"] + 2 * 32 * 64 * (4 * 16 + 4)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_a_layer_of_diff_llama(attention_bias, monkeypatch):
    theirs = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    from transformers import DiffLlamaConfig

    in_float64(monkeypatch, theirs)
    config = DiffLlamaConfig(
        hidden_size=48, num_attention_heads=8, num_key_value_heads=4, head_dim=6, attention_bias=attention_bias,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, attn_implementation="eager",
    )  # fmt: skip
    layer = theirs.DiffLlamaAttention(config, layer_idx=2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module, x = from_diff_llama(layer), torch.randn(2, 19, 48).double()
    assert (module.num_heads, module.num_kv_heads, module.depth) == (4, 2, 2)
    assert not module.subln.weight.requires_grad
    angles = torch.arange(19)[:, None] * module.rope.frequencies(6)[0].repeat(2)
    mask = torch.full((19, 19), -torch.inf).double().triu(1)[None, None]
    expected = layer(x, position_embeddings=(angles.cos()[None], angles.sin()[None]), attention_mask=mask)[0]
    torch.testing.assert_close(module(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "version must be 1 or 2, got 3"),
        ({"version": "2"}, "version must be an integer, got '2'"),
        ({"depth": -1}, "depth must not be negative, got -1"),
        ({"lambda_init": 1.0}, r"lambda_init must lie in \[0, 1\), got 1.0"),
        ({"version": 2, "depth": 1}, "depth and lambda_init mean nothing in version 2, got depth=1 and lambda_init=No"),
        ({"version": 2, "lambda_init": 0.5}, "depth and lambda_init mean nothing in version 2, got depth=0 and"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"embed_dim": 36}, "num_heads must divide embed_dim / 2 in version 1 unless head_dim is given, got 4 and 36"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"kdim": 20}, "kdim needs causal=False, got kdim=20"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.DifferentialAttention(**{"embed_dim": E, "num_heads": H} | options)


def test_there_is_no_sink():
    with pytest.raises(TypeError, match="sink"):
        attnzoo.DifferentialAttention(E, H, sink="zero")


def test_the_two_norms_are_apart():
    """qk_norm normalises parts of D features, subln heads of 2 D; a rotation of each part keeps positions relative."""
    module = make(qk_norm=True, rope=Rotary(style="interleaved"))
    assert (module.q_norm.weight.shape, module.subln.weight.shape) == ((4,), (8,))
    x = sample()
    found = gradients(module, x, torch.ones_like(x))
    shifted = module(x, positions=torch.arange(5, 5 + T))
    torch.testing.assert_close(shifted, found["y"], atol=1e-12, rtol=0)
