"""Feed-forward layers: stored figures, identities, refusals, the decoder around them, configs and checkpoints."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo_recipes import generate
from attnzoo_recipes.allowlist import ImportRefusedError
from attnzoo_recipes.checkpointing import newest_valid, read_checkpoint
from attnzoo_recipes.feed_forward import (
    FeedForward,
    MultiHeadMixtureOfExperts,
    SwiGLU,
    hidden_dim_for,
    mh_moe_parity,
)
from attnzoo_recipes.lm import DecoderLM
from attnzoo_recipes.model_config import (
    build_feed_forward,
    check_same_model,
    describe_attention,
    describe_feed_forward,
    model_from_checkpoint,
)
from tests.zoo import gradients

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "feed_forward").glob("*.yaml"))
HERE = "attnzoo_recipes.feed_forward"
E, T = 12, 7


def layer(cls=FeedForward, *sizes, **options):
    torch.manual_seed(3)
    module = cls(E, *sizes, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def moe(**options):
    return layer(MultiHeadMixtureOfExperts, **{"num_experts": 5, "hidden_dim": 6} | options)


def sample(tokens=T, rows=2):
    return torch.randn(rows, tokens, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def decoder(feed_forward=SwiGLU, **options):
    torch.manual_seed(0)
    attention = functools.partial(attnzoo.MultiHeadAttention, num_heads=2)
    options = {"embed_dim": E, "num_layers": 2} | options
    return DecoderLM(11, attention, feed_forward=feed_forward, **options).double()


def set_weights(module, **weights):
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_submodule(name).weight.copy_(weight)
    return module


# depth 1 to 3


def test_layers_are_their_formulas():
    x = sample()
    for activation, phi in (("gelu", F.gelu), ("relu", F.relu), ("identity", lambda x: x)):
        one, two, three = (layer(depth=depth, activation=activation) for depth in (1, 2, 3))
        assert torch.allclose(one(x), phi(x @ one.proj.weight.T), atol=1e-12)
        assert torch.allclose(two(x), phi(x @ two.up_proj.weight.T) @ two.down_proj.weight.T, atol=1e-12)
        hidden = phi(phi(x @ three.up_proj.weight.T) @ three.mid_proj.weight.T)
        assert torch.allclose(three(x), hidden @ three.down_proj.weight.T, atol=1e-12)
    assert FeedForward(E, depth=1).activation == "gelu"


@pytest.mark.parametrize("depth", [2, 3])
def test_the_gated_form_is_its_formula(depth):
    x, ffn = sample(), layer(depth=depth)
    hidden = F.silu(x @ ffn.gate_proj.weight.T) * (x @ ffn.up_proj.weight.T)
    if depth == 3:
        hidden = F.silu(hidden @ ffn.mid_proj.weight.T)
    assert torch.allclose(ffn(x), hidden @ ffn.down_proj.weight.T, atol=1e-12)
    assert ffn.hidden_dim == 32


def test_gated_depth_two_is_swiglu_and_the_mlp_of_llama():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=E, intermediate_size=20, num_attention_heads=2)).double()
    for ours in (FeedForward(E, 20), SwiGLU(E, 20)):
        ours.double().load_state_dict(theirs.state_dict())
        assert torch.allclose(ours(sample()), theirs(sample()), atol=1e-12)


def test_reductions():
    x = sample()
    three = set_weights(layer(hidden_dim=20, depth=3, activation="relu"), mid_proj=torch.eye(20))
    two = layer(hidden_dim=20, activation="relu")
    two.load_state_dict({name: value for name, value in three.state_dict().items() if "mid" not in name})
    assert torch.allclose(three(x), two(x), atol=1e-12)
    wide = set_weights(layer(hidden_dim=E, activation="identity"), up_proj=torch.eye(E))
    one = set_weights(layer(depth=1, activation="identity"), proj=wide.down_proj.weight)
    assert torch.allclose(wide(x), one(x), atol=1e-12)


@pytest.mark.parametrize("make", [
    lambda: layer(depth=1, bias=True), lambda: layer(hidden_dim=5), lambda: layer(hidden_dim=5, depth=3, bias=True),
    lambda: moe(bias=True, shared_dim=5, inner_residual=True),
])  # fmt: skip
def test_gradients_and_tokens_alone(make):
    ffn, x = make(), sample(3)
    assert torch.autograd.gradcheck(ffn, x.requires_grad_(), atol=1e-6)
    changed = x.detach().clone()
    changed[0, 1] += 1
    difference = (ffn(changed) - ffn(x)).abs().amax(-1)
    assert difference[0, 1] > 1e-3
    difference[0, 1] = 0
    assert difference.max() < 1e-12


@pytest.mark.parametrize(("depth", "activation", "sizes"), [
    (1, "gelu", E * E), (2, "relu", 2 * E * 48), (3, "gelu", 2 * E * 48 + 48**2),
    (2, "swiglu", 3 * E * 32), (3, "swiglu", 3 * E * 32 + 32**2),
])  # fmt: skip
def test_costs(depth, activation, sizes):
    ffn = FeedForward(E, depth=depth, activation=activation, bias=True)
    assert sum(p.numel() for p in ffn.parameters() if p.ndim == 2) == sizes
    assert ffn.flops(9) == 2 * 9 * sizes
    if depth > 1:
        assert hidden_dim_for(E, depth, activation, sizes) == ffn.hidden_dim


def test_three_layers_within_the_parameters_of_two():
    assert hidden_dim_for(64, 3, "gelu", 8 * 64**2) == 128
    # Seven blocks of depth 2 and three of depth 3 have the same 84 E^2.
    counts = [
        blocks * (4 * 64**2 + sum(p.numel() for p in FeedForward(64, depth=depth, activation="gelu").parameters()))
        for blocks, depth in ((7, 2), (3, 3))
    ]
    assert counts == [84 * 64**2] * 2


def test_initialisation():
    torch.manual_seed(0)
    ffn = FeedForward(256, 300, depth=3, bias=True)
    ffn.reset_parameters(std=0.02, out_std=0.003)
    stds = {name: layer.weight.std().item() for name, layer in ffn.named_children()}
    expected = {"gate_proj": 0.02, "up_proj": 0.02, "mid_proj": 0.55 / 300**0.5, "down_proj": 0.003}
    assert stds == pytest.approx(expected, rel=0.02)
    assert not any(layer.bias.any() for layer in ffn.children())


def test_dropout_is_of_training_alone():
    for depth in (1, 2, 3):
        ffn = layer(depth=depth, dropout=0.5)
        assert not torch.equal(ffn(sample()), ffn(sample()))
        ffn.eval()
        assert torch.equal(ffn(sample()), ffn(sample()))


@pytest.mark.parametrize(("options", "message"), [
    ({"depth": 0}, "depth must be 1, 2 or 3, got 0: for no feed-forward layer write feed_forward: null"),
    ({"depth": 4}, "depth must be 1, 2 or 3, got 4"),
    ({"depth": True}, "depth must be an integer, got True"),
    ({"depth": 1, "hidden_dim": 8}, "hidden_dim must not be given with depth 1, .* got 8"),
    ({"depth": 1, "activation": "swiglu"}, 'activation must not be "swiglu" with depth 1'),
    ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
    ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ({"bias": "no"}, "bias must be True or False, got 'no'"),
    ({"dtype": torch.int32}, "dtype must be one of .*, got torch.int32"),
    ({"device": "nowhere"}, "device must be a device that is there, got 'nowhere'"),
])  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        FeedForward(E, **options)


def test_widths_that_are_not_there():
    with pytest.raises(ValueError, match="depth must be 2 or 3 to have a hidden width, got 1"):
        hidden_dim_for(E, 1, "gelu", 100)
    with pytest.raises(ValueError, match="parameters must allow a hidden width of at least 1, got 3"):
        hidden_dim_for(E, 2, "gelu", 3)
    with pytest.raises(ValueError, match="parameters must allow a hidden width of at least 1, got -1000"):
        hidden_dim_for(E, 3, "gelu", -1000)
    for number in ("many", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"parameters must be a finite number, got {number!r}"):
            hidden_dim_for(E, 2, "gelu", number)


@pytest.mark.parametrize("make", [
    *(functools.partial(layer, depth=depth) for depth in (1, 2, 3)), functools.partial(layer, SwiGLU), moe,
])  # fmt: skip
@pytest.mark.parametrize(("x", "message"), [
    (torch.ones(2, T, E + 1).double(), rf"x must have shape \(B, T, {E}\), got \(2, {T}, {E + 1}\)"),
    (torch.ones(E + 1).double(), rf"x must have shape \(B, T, {E}\), got \({E + 1},\)"),
    (torch.ones(2, T, E), "x must have the dtype of the weights torch.float64, got torch.float32"),
    (torch.ones(2, T, E).long(), "x must hold real floating-point numbers, got torch.int64"),
    ("tokens", rf"x must be a tensor \(B, T, {E}\), got 'tokens'"),
])  # fmt: skip
def test_inputs_that_are_none(make, x, message):
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_a_layer_takes_rows_of_tokens_too():
    for ffn in (layer(), layer(depth=1), layer(SwiGLU)):
        x = sample()
        assert torch.allclose(ffn(x.flatten(0, 1)), ffn(x).flatten(0, 1), atol=1e-12)


# multi-head mixture of experts


def stored():
    with safe_open(ROOT / "tests" / "golden" / "mh_moe.safetensors", "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return t, json.loads(file.metadata()["config"]), json.loads(file.metadata()["f32_vs_f64_max_abs"])


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stored_figures(dtype, backend):
    t, config, single = stored()
    options = {name: value for name, value in config.items() if name not in ("B", "T")}
    ffn = MultiHeadMixtureOfExperts(**options, aux_loss_coef=1.0, backend=backend, dtype=dtype)
    ffn.load_state_dict({k.removeprefix("weights."): v for k, v in t.items() if k.startswith("weights.")})
    x = t["input.x"].to(dtype)
    results = gradients(ffn, x, t["input.w"].to(dtype))
    found = {"output.y": results.pop("y"), **{f"grad.{key}": value for key, value in results.items()}}
    x.requires_grad_()
    ffn(x)
    found |= {"output.router_logits": ffn.router_logits(x), "output.load_balance_loss": ffn.aux_loss.view(1)}
    sources = {"x": x, "router.weight": ffn.router.weight, "head_proj.weight": ffn.head_proj.weight}
    grads = torch.autograd.grad(ffn.aux_loss, [*sources.values()])
    found |= {f"grad_aux.{name}": grad for name, grad in zip(sources, grads, strict=True)}
    keys = [key for key in t if key.startswith(("output.", "grad"))]
    assert len(keys) == 15
    for key in keys:
        error = (found[key].detach().double() - t[key]).abs().max()
        assert error < (1e-9 if dtype == torch.float64 else 10 * single[key]), key


def expert_by_expert(ffn, x, phi=None):
    """The definition in a loop over tokens, heads and experts."""
    z = ffn.head_proj(x).unflatten(-1, (ffn.num_heads, -1))
    out = torch.zeros_like(z)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in z.shape[:3])).tolist():
        u = z[tuple(at)]
        logits = ffn.router.weight @ u
        best = logits.topk(ffn.num_experts_per_tok).indices
        gates = logits[best].softmax(0) if ffn.gate_mode == "topk_softmax" else logits.softmax(0)[best]
        for gate, e in zip(gates, best, strict=True):
            hidden = ffn.up_experts.weight[e] @ u
            hidden = F.silu(ffn.gate_experts.weight[e] @ u) * hidden if phi is None else phi(hidden)
            out[tuple(at)] += gate * (ffn.down_experts.weight[e] @ hidden)
    if ffn.inner_residual:
        out = out + z
    y = ffn.merge_proj(out.flatten(-2))
    return y if ffn.shared is None else y + ffn.shared(x)


@pytest.mark.parametrize("options", [
    {}, {"num_heads": 1}, {"gate_mode": "topk_softmax", "num_experts_per_tok": 3}, {"num_experts_per_tok": 5},
    {"num_heads": 3, "inner_residual": True, "bias": True}, {"shared_dim": 9}, {"num_experts_per_tok": 1},
])  # fmt: skip
def test_it_is_its_definition(options):
    ffn, x = moe(**options), sample()
    assert torch.allclose(ffn(x), expert_by_expert(ffn, x), atol=1e-10)


@pytest.mark.parametrize(("activation", "phi"), [("relu", F.relu), ("gelu", F.gelu)])
def test_experts_of_two_matrices(activation, phi):
    ffn, x = moe(activation=activation), sample()
    assert "gate_experts.weight" not in ffn.state_dict()
    assert torch.allclose(ffn(x), expert_by_expert(ffn, x, phi), atol=1e-10)


def test_equal_experts_do_not_depend_on_the_router():
    ffn, x = moe(gate_mode="topk_softmax"), sample()
    with torch.no_grad():
        for experts in (ffn.up_experts, ffn.gate_experts, ffn.down_experts):
            experts.weight.copy_(experts.weight[:1].expand_as(experts.weight))
    first = ffn(x)
    nn.init.normal_(ffn.router.weight)
    assert torch.allclose(first, ffn(x), atol=1e-12)


def test_experts_and_heads_may_be_permuted():
    ffn, x = moe(), sample()
    first, order = ffn(x), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for module in (ffn.router, ffn.up_experts, ffn.gate_experts, ffn.down_experts):
            module.weight.copy_(module.weight[order])
        heads = torch.arange(E).view(2, -1).flip(0).flatten()
        ffn.head_proj.weight.copy_(ffn.head_proj.weight[heads])
        ffn.merge_proj.weight.copy_(ffn.merge_proj.weight[:, heads])
    assert torch.allclose(first, ffn(x), atol=1e-12)


def test_balance_loss():
    ffn, x = moe(aux_loss_coef=0.5), sample()
    nn.init.zeros_(ffn.router.weight)
    for count in ("first", "all"):
        ffn.aux_count = count
        ffn(x)
        assert ffn.aux_loss.item() == pytest.approx(0.5)
    ffn = moe(aux_count="all")
    ffn(x)
    logits = ffn.router_logits(x).flatten(0, 2)
    share = F.one_hot(logits.topk(2).indices, 5).sum((0, 1)) / (2 * len(logits))
    assert ffn.aux_loss.item() == pytest.approx(0.01 * 5 * (logits.softmax(-1).mean(0) * share).sum().item())
    (grad,) = torch.autograd.grad(ffn.aux_loss, ffn.down_experts.weight, allow_unused=True)
    assert grad is None
    assert torch.equal(attnzoo.aux_loss(nn.Sequential(ffn)), ffn.aux_loss)
    ffn.eval()
    ffn(x)
    assert ffn.aux_loss is None


def test_padding_is_in_no_loss():
    ffn, x = moe(), sample()
    ffn(x)
    expected = ffn.aux_loss.item()
    real = torch.arange(T + 4).expand(2, -1) < T
    ffn(torch.cat([x, sample(4)], dim=1), mask=real)
    assert ffn.aux_loss.item() == pytest.approx(expected, rel=1e-12)
    ffn(x, mask=torch.zeros(2, T, dtype=torch.bool))
    assert ffn.aux_loss.item() == 0


def test_an_unused_expert_has_a_gradient_of_zero():
    ffn, x = moe(), sample()
    chosen = ffn.router_logits(x[:1, :1]).topk(2).indices.unique()
    ffn(x[:1, :1]).sum().backward()
    for experts in (ffn.up_experts, ffn.gate_experts, ffn.down_experts):
        used = experts.weight.grad.flatten(1).any(1).nonzero()[:, 0]
        assert experts.weight.grad.isfinite().all()
        assert used.tolist() == chosen.tolist()
        assert len(used) < 5


def test_parity_gives_the_sizes_of_the_paper():
    assert mh_moe_parity(768, 2, 2, 2048, 8, 1) == (768, 40, 768, pytest.approx(124 / 3))
    assert mh_moe_parity(768, 3, 3, 2048, 8, 1) == (512, 96, 512, 93)
    assert mh_moe_parity(64, 3, 1, 256, 8, 1, "relu")[2:] == (192, 31)
    usual = MultiHeadMixtureOfExperts(24)
    assert (usual.hidden_dim, usual.num_experts) == (24, 40)
    with pytest.raises(ValueError, match="base_hidden must be a finite number, got nan"):
        mh_moe_parity(768, 2, 2, float("nan"), 8, 1)
    with pytest.raises(ValueError, match=r"base_hidden must leave a hidden width of at least 1, got 500 \(-6 left\)"):
        mh_moe_parity(768, 2, 2, 500, 8, 1)


@pytest.mark.parametrize(("options", "matrices"), [({}, 3), ({"activation": "relu"}, 2), ({"shared_dim": 10}, 3)])
def test_costs_of_the_mixture(options, matrices):
    ffn = moe(num_heads=3, **options)
    shared = 3 * E * options.get("shared_dim", 0)
    parameters = 2 * E * E + 5 * E // 3 + matrices * 5 * 6 * E // 3 + shared
    assert sum(parameter.numel() for parameter in ffn.parameters()) == parameters
    assert ffn.flops(9) == 9 * (4 * E * E + 2 * E * 5 + 2 * matrices * E * 6 * 2 + 2 * shared)


def test_initialisation_of_the_mixture():
    torch.manual_seed(0)
    ffn = MultiHeadMixtureOfExperts(256, num_experts=8, hidden_dim=64, bias=True)
    assert ffn.merge_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    ffn.reset_parameters(std=0.05, out_std=0.003)
    for module, std in (
        (ffn.head_proj, (2 * 256) ** -0.5), (ffn.merge_proj, 0.003), (ffn.router, 0.05), (ffn.down_experts, 0.05),
        (ffn.up_experts, 0.05), (ffn.gate_experts, 0.05),
    ):  # fmt: skip
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 12"),
    ({"num_experts_per_tok": 6}, "num_experts_per_tok must be at most num_experts, got 6 and 5"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1, got 0"),
    ({"num_experts_per_tok": 1, "gate_mode": "topk_softmax"}, "num_experts_per_tok must be at least 2 with gate_mode"),
    ({"num_experts_per_tok": 1, "num_experts": 1}, "num_experts must be at least 2 to be balanced"),
    ({"activation": "identity"}, "activation must be one of"),
    ({"gate_mode": "softmax"}, "gate_mode must be one of"),
    ({"aux_count": "none"}, "aux_count must be one of"),
    ({"backend": "sdpa"}, "backend must be one of"),
    ({"shared_dim": -1}, "shared_dim must not be negative, got -1"),
    ({"aux_loss_coef": -1.0}, "aux_loss_coef must not be negative, got -1"),
    ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
    ({"bias": "no"}, "bias must be True or False, got 'no'"),
    ({"inner_residual": None}, "inner_residual must be True or False, got None"),
    ({"dtype": torch.int32}, "dtype must be one of .*, got torch.int32"),
    (
        {"num_experts_per_tok": 25, "hidden_dim": None, "num_experts": 30},
        "num_experts_per_tok must be at most 24 unless hidden_dim and num_experts are given, got 25",
    ),
])  # fmt: skip
def test_refusals_of_the_mixture(options, message):
    with pytest.raises(ValueError, match=message):
        moe(**options)


@pytest.mark.parametrize("mask", [torch.ones(2, T), torch.ones(2, T + 1, dtype=torch.bool), [[True] * T] * 2])
def test_masks_that_are_none(mask):
    with pytest.raises(ValueError, match=r"mask must be (boolean|a boolean tensor) \(B, T\)"):
        moe()(sample(), mask=mask)


# the decoder around them


def test_a_decoder_without_feed_forward_layers():
    model, plain = decoder(None), decoder()
    assert not [name for name in model.state_dict() if "mlp" in name]
    assert model.out_std == pytest.approx(0.02 / 2**0.5)
    assert plain.out_std == pytest.approx(0.02 / 4**0.5)
    with torch.no_grad():
        for block in plain.layers:
            block.mlp.down_proj.weight.zero_()
    model.load_state_dict({name: value for name, value in plain.state_dict().items() if "mlp" not in name})
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(model(tokens), plain(tokens))
    assert plain.flops(6) - model.flops(6) == 2 * SwiGLU(E).flops(6)


def test_a_parallel_block_has_one_norm():
    serial, parallel = decoder(num_layers=1), decoder(num_layers=1, parallel=True)
    assert not [name for name in parallel.state_dict() if "mlp_norm" in name]
    parallel.load_state_dict({k: v for k, v in serial.state_dict().items() if "mlp_norm" not in k})
    tokens, (block,) = torch.randint(11, (2, 6)), parallel.layers
    x = parallel.embedding(tokens)
    normed = block.attn_norm(x)
    assert torch.allclose(block(x, None, None, None), x + block.attn(normed) + block.mlp(normed), atol=1e-12)
    assert not torch.allclose(serial(tokens), parallel(tokens), atol=1e-6)
    with torch.no_grad():
        for model in (serial, parallel):
            model.layers[0].attn.o_proj.weight.zero_()
    assert torch.allclose(serial(tokens), parallel(tokens), atol=1e-12)


def test_sparse_blocks():
    model = decoder(
        sparse_feed_forward=functools.partial(MultiHeadMixtureOfExperts, num_experts=4), sparse_every=2, num_layers=5
    )
    assert [type(block.mlp).__name__ for block in model.layers] == [
        "SwiGLU", "MultiHeadMixtureOfExperts", "SwiGLU", "MultiHeadMixtureOfExperts", "SwiGLU",
    ]  # fmt: skip
    tokens = torch.randint(11, (2, 6))
    model(tokens)
    losses = [model.layers[i].mlp.aux_loss for i in (1, 3)]
    assert attnzoo.aux_loss(model).item() == pytest.approx(sum(losses).item())
    model.eval()
    caches = model.init_caches(2, 6, dtype=torch.float64)
    steps = torch.cat([model(tokens[:, i : i + 1], caches=caches) for i in range(6)], dim=1)
    assert torch.allclose(steps, model(tokens), atol=1e-10)


def test_the_decoder_tells_the_mixture_what_is_padding():
    model = decoder(functools.partial(MultiHeadMixtureOfExperts, num_experts=4, hidden_dim=6))
    tokens = torch.randint(11, (2, 6))
    model(tokens)
    expected = attnzoo.aux_loss(model).item()
    longer = torch.cat([tokens, tokens.new_zeros(2, 3)], dim=1)
    for mask in (
        AttentionMask.padding([6, 6]),
        AttentionMask(real_queries=torch.arange(9).expand(2, -1) < 6),
    ):
        model(longer, mask=mask)
        assert attnzoo.aux_loss(model).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("feed_forward", "options", "message"), [
    (None, {"parallel": True}, "parallel must be false without a feed-forward layer, got true"),
    (None, {"mlp_dim": 8}, "mlp_dim must not be given unless feed_forward is SwiGLU, .* got 8 and None"),
    (FeedForward, {"mlp_dim": 8}, "mlp_dim must not be given unless .* got 8 and FeedForward"),
    (SwiGLU, {"mlp_dim": 0}, "mlp_dim must be at least 1, got 0"),
    (SwiGLU, {"sparse_every": 0}, "sparse_every must be at least 1, got 0"),
    (nn.Identity, {}, "feed_forward must have .* got Identity without reset_parameters and flops"),
    (lambda width: width, {}, "feed_forward must make an nn.Module from embed_dim, got 12"),
])  # fmt: skip
def test_refusals_of_the_decoder(feed_forward, options, message):
    with pytest.raises(ValueError, match=message):
        decoder(feed_forward, **options)


def test_its_width_is_that_of_swiglu():
    assert decoder(mlp_dim=5).layers[1].mlp.up_proj.out_features == 5
    assert decoder(functools.partial(SwiGLU, mlp_dim=7)).mlp_dim == 7


# configs and checkpoints


def test_all_configs_are_there():
    assert CONFIGS == ["depth0", "depth1", "depth2", "depth3", "mh_moe", "parallel", "swiglu"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_continues_a_text(name, arguments, run, tmp_path, capsys):
    run(arguments("gqa", "--config", f"configs/feed_forward/{name}.yaml"))
    saved = read_checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    described = saved["attnzoo"]["model"]["feed_forward"]
    assert described is None if name == "depth0" else described["class_path"].startswith(HERE)
    capsys.readouterr()
    generate.main([str(tmp_path / "run"), "--prompt", "the cat", "--max-new-tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("the cat")


def test_swiglu_by_name_is_the_default(arguments, run, tmp_path):
    states = []
    for i, words in enumerate(([], ["--config", "configs/feed_forward/swiglu.yaml"])):
        run(arguments("gqa", *words, "--model.mlp_dim=24", f"--trainer.default_root_dir={tmp_path / str(i)}"))
        states.append(read_checkpoint(tmp_path / str(i))["state_dict"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_run_does_not_continue_with_another_layer(arguments, run, tmp_path, capsys):
    run(arguments("gqa"))
    path = f"--ckpt_path={newest_valid(tmp_path / 'run')}"
    for name, words in (("depth1", f"{HERE}.FeedForward"), ("depth0", "no feed_forward")):
        with pytest.raises(SystemExit) as stop:
            run(arguments("gqa", path, "--config", f"configs/feed_forward/{name}.yaml"))
        assert stop.value.code == 2
        assert f"holds a model with {HERE}.SwiGLU, but the configuration asks for {words}" in capsys.readouterr().err


def saved(feed_forward=SwiGLU, **options):
    """A checkpoint of a decoder, and the decoder."""
    model = decoder(feed_forward, **options).float()
    attention = describe_attention(functools.partial(attnzoo.MultiHeadAttention, num_heads=2))
    config = {"vocab_size": 11, "embed_dim": E, "num_layers": 2, **options, "attention": attention}
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    config["feed_forward"] = describe_feed_forward(feed_forward)
    return {"attnzoo": {"model": config}, "state_dict": state}, model.eval()


@pytest.mark.parametrize("feed_forward", [
    SwiGLU, None, functools.partial(FeedForward, depth=3, activation="relu", bias=True),
    functools.partial(MultiHeadMixtureOfExperts, num_experts=4, gate_mode="topk_softmax"),
])  # fmt: skip
def test_checkpoints_load(feed_forward):
    content, model = saved(feed_forward)
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(model_from_checkpoint(content)(tokens), model(tokens))


def test_a_checkpoint_that_describes_none_has_swiglu():
    content, model = saved()
    del content["attnzoo"]["model"]["feed_forward"]
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(model_from_checkpoint(content)(tokens), model(tokens))
    old, now = content["attnzoo"]["model"], saved()[0]["attnzoo"]["model"]
    check_same_model(old, now)
    with pytest.raises(ValueError, match=r"holds a model with .*SwiGLU, but the configuration asks for .*FeedForward"):
        check_same_model(old, now | {"feed_forward": describe_feed_forward(FeedForward)})


@pytest.mark.parametrize("name", [
    "subprocess.Popen", "os.system", "torch.nn.Linear", "attnzoo.MultiHeadAttention", "SwiGLU", "",
    "attnzoo_recipes.lm.DecoderLM", f"{HERE}.torch.hub.load", f"{HERE}.Experts",
])  # fmt: skip
@pytest.mark.parametrize("place", ["feed_forward", "sparse_feed_forward"])
def test_a_checkpoint_names_no_other_class(name, place):
    content, _ = saved()
    content["attnzoo"]["model"][place] = {"class_path": name, "init_args": {}}
    with pytest.raises(ImportRefusedError, match=f"names {name}, which is neither a feed-forward layer of attnzoo nor"):
        model_from_checkpoint(content)


@pytest.mark.parametrize(("init_args", "message"), [
    ({"depth": {"class_path": "subprocess.Popen"}}, "among the options of its feed-forward layer"),
    ({"depth": [[{"class_path": "subprocess.Popen"}]]}, "among the options of its feed-forward layer"),
    ({"depth": "2"}, "has a feed-forward layer whose depth must be int, got '2'"),
    ({"depth": True}, "has a feed-forward layer whose depth must be int, got True"),
    ({"width": 2}, "'width' is no option of FeedForward"),
])  # fmt: skip
def test_options_of_a_checkpoint_are_plain(init_args, message):
    with pytest.raises(ValueError, match=message):
        build_feed_forward({"class_path": f"{HERE}.FeedForward", "init_args": init_args})


@pytest.mark.parametrize("described", ["x", {"class_path": f"{HERE}.SwiGLU"}, {"class_path": 1, "init_args": {}}, []])
def test_descriptions_that_are_none(described):
    content, _ = saved()
    content["attnzoo"]["model"]["feed_forward"] = described
    with pytest.raises(ValueError, match="must describe its model's feed_forward by class_path and init_args"):
        model_from_checkpoint(content)


def test_a_checkpoint_cannot_ask_for_more_memory_than_its_weights():
    content, _ = saved()
    huge = {"class_path": f"{HERE}.FeedForward", "init_args": {"hidden_dim": 10**9}}
    content["attnzoo"]["model"]["feed_forward"] = huge
    with pytest.raises(ValueError, match="has shape"):
        model_from_checkpoint(content)


def test_a_lambda_cannot_be_described():
    with pytest.raises(ValueError, match="feed_forward must be a class or "):
        describe_feed_forward(lambda width: SwiGLU(width))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_units_that_are_split_are_not_dropped(depth):
    ffn = FeedForward(E, depth=depth, dropout=0.1)
    if depth == 2:
        with pytest.raises(ValueError, match=r"dropout must be 0 to split hidden units over ranks, got 0\.1"):
            ffn.tensor_parallel_plan()
    else:
        assert set(ffn.tensor_parallel_plan()) == {1: set(), 3: {"gate_proj", "up_proj", "mid_proj"}}[depth]
