"""Multiple-head embeddings: stored figures, the multi-head module that they stand for, what cancels, refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import attnzoo
from attnzoo import AttentionMask, Rotary
from tests.zoo import E, H, gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "mhe.safetensors"
ROPES = {
    "none": None,
    "half": Rotary(),
    "interleaved": Rotary(style="interleaved"),
    "to-half": Rotary(style="interleaved_to_half"),
    "partial": Rotary(dim=4),
    "partial-to-half": Rotary(dim=4, style="interleaved_to_half"),
    "scaled": Rotary(scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}),
}


def make(**options):
    """A module with embeddings that matter, in float64."""
    torch.manual_seed(3)
    return attnzoo.MultipleHeadEmbeddingAttention(
        E, H, **{"embed_init_std": 0.5, "init_std": 0.3, "dtype": torch.float64} | options
    )


def multi_head(attn, **options):
    """The multi-head module with a projection of its own for every head, with the same function."""
    given = {"bias": True, "rope": attn.rope, "causal": attn.causal, "backend": "eager", "dtype": torch.float64}
    module = attnzoo.MultiHeadAttention(E, H, **given | options)
    with torch.no_grad():
        module.o_proj.weight.copy_(attn.o_proj.weight)
        for name in "qkv":
            seed, own = getattr(attn, f"{name}_proj"), getattr(module, f"{name}_proj")
            e = getattr(attn, f"{name}_head_embed")
            bias = torch.zeros(len(seed.weight)).double() if seed.bias is None else seed.bias
            weight = seed.weight.expand(H, -1, -1)
            own.weight.copy_((weight * (1 + e)[..., None] if attn.mode == "mul" else weight).flatten(0, 1))
            own.bias.copy_((bias * (1 + e) if attn.mode == "mul" else bias + e).flatten())
    return module


def test_the_stored_figures():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118  (no mapping)
        config = json.loads(file.metadata()["config"])
    names = ("embed_dim", "num_heads", "head_dim", "mode", "bias", "rope", "causal")
    module = attnzoo.MultipleHeadEmbeddingAttention(**{name: config[name] for name in names}, dtype=torch.float64)
    module.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    for backend in ("eager", "sdpa"):
        module.backend = backend
        found = gradients(module, tensors["input.x"], tensors["input.w"])
        stored = {key.split(".", 1)[1]: tensors[key] for key in tensors if key.startswith(("grad.", "output."))}
        assert found.keys() == stored.keys()
        assert max(float((found[key] - stored[key]).abs().max()) for key in stored) < 1e-9


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["mul", "add"])
def test_it_is_multi_head_attention_with_derived_weights(mode, causal, rope):
    attn = make(mode=mode, causal=causal, rope=ROPES[rope], bias=True, o_bias=False)
    module, x = multi_head(attn, o_bias=False), torch.randn(2, 13, E).double()
    heads = torch.rand(2, H, 13, 13) < 0.7
    for mask in (None, AttentionMask.padding([13, 6]), AttentionMask.packed([0, 5, 20, 26]), heads, heads & False):
        torch.testing.assert_close(attn(x, mask=mask), module(x, mask=mask), atol=1e-12, rtol=0)
    if not causal:
        context, pair = torch.randn(2, 7, E).double(), (torch.arange(13), 3 * torch.arange(7))
        found, expected = (m(x, context, positions=pair if ROPES[rope] else None) for m in (attn, module))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        nothing = (torch.arange(13), torch.arange(0)) if ROPES[rope] else None
        assert not attn(x, context[:, :0], positions=nothing).any()


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_dropped_weights_take_their_share_of_the_values_embedding(mode):
    attn = make(mode=mode, dropout=0.5, backend="eager")
    module, x = multi_head(attn, o_bias=False, dropout=0.5), torch.randn(2, 13, E).double()
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_a_query_without_a_key_in_its_window_gets_zeros(mode):
    attn, x, context = make(mode=mode, causal=False, sliding_window=2), *torch.randn(2, 2, 7, E).double()
    y = attn(x, context[:, :3])
    assert not y[:, :3].any()
    distance = torch.arange(-4, 3)[:, None] - torch.arange(3)
    attn.sliding_window = None
    torch.testing.assert_close(attn(x, context[:, :3], mask=distance.abs() < 2), y, atol=1e-12, rtol=0)
    attn.sliding_window = 2
    assert attn.flops_by_part(7, 3)["attention"] == 2 * H * 2 * attn.head_dim * int((distance.abs() < 2).sum())


def test_without_a_rotation_what_is_added_to_keys_cancels():
    attn, x = make(mode="add"), torch.randn(2, 9, E).double()
    y = attn(x)
    y.square().sum().backward()
    assert torch.equal(attn.k_head_embed.grad, torch.zeros_like(attn.k_head_embed))
    with torch.no_grad():
        attn.k_head_embed.normal_()
    assert torch.equal(attn(x), y)
    rotated = make(mode="add", rope=Rotary(dim=4))
    rotated(x).square().sum().backward()
    assert rotated.k_head_embed.grad[:, :4].abs().min() > 0
    assert not rotated.k_head_embed.grad[:, 4:].any()


@pytest.mark.parametrize("mode", ["mul", "add"])
def test_equal_embeddings_make_equal_heads_and_none_a_single_head(mode):
    attn, x = make(mode=mode, rope=Rotary()), torch.randn(2, 9, E).double()
    heads = []
    attn.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].unflatten(-1, (H, -1))))
    attn(x)
    assert (heads[0] - heads[0][:, :, :1]).abs().max() > 0.1
    with torch.no_grad():
        for name in ("q_head_embed", "k_head_embed", "v_head_embed"):
            getattr(attn, name).copy_(getattr(attn, name)[:1].expand(H, -1))
    attn(x)
    torch.testing.assert_close(heads[1], heads[1][:, :, :1].expand_as(heads[1]), atol=1e-13, rtol=0)
    one = attnzoo.MultipleHeadEmbeddingAttention(E, 1, mode=mode, embed_init_std=0.0, dtype=torch.float64)
    plain = attnzoo.MultiHeadAttention(E, 1, bias=False, rope=None, dtype=torch.float64)
    plain.load_state_dict({key: value for key, value in one.state_dict().items() if "embed" not in key})
    torch.testing.assert_close(one(x), plain(x), atol=1e-14, rtol=0)


@pytest.mark.parametrize("mode", ["mul", "add"])
@pytest.mark.parametrize("rope", ["none", "half", "partial"])
def test_parameters_and_cache_are_those_of_one_head(mode, rope):
    attn = attnzoo.MultipleHeadEmbeddingAttention(64, 8, mode=mode, rope=ROPES[rope])
    assert sum(p.numel() for p in attn.parameters()) == 3 * 64 * 8 + 3 * 8 * 8 + 64 * 64
    rotary = {"none": 0, "half": 8, "partial": 4}[rope]
    assert attn.cache_bytes_per_token(torch.float32) == 4 * (2 * 8 + rotary)
    assert attn.no_weight_decay() == {"q_head_embed", "k_head_embed", "v_head_embed"}
    counted = attn.flops_by_part(1, 33)
    assert counted == {"projections": 2 * 64 * (3 * 8 + 64), "attention": 2 * 8 * (16 + rotary) * 33}


def test_circuits_are_those_of_the_derived_module():
    attn = make()
    module = multi_head(attn)
    for own, derived in ((attn.qk_circuit(), module.qk_circuit()), (attn.ov_circuit(), module.ov_circuit())):
        for (a, b), (c, d) in zip(own, derived, strict=True):
            product = (b @ a, d @ c) if a.shape[0] != E and b.shape[0] == E else (a.T @ b, c.T @ d)
            torch.testing.assert_close(*product, atol=1e-12, rtol=0)


def test_embeddings_start_as_told():
    torch.manual_seed(0)
    attn = attnzoo.MultipleHeadEmbeddingAttention(512, 64, embed_init_std=0.3)
    attn.reset_parameters(std=1.0)
    assert attn.q_head_embed.std().item() == pytest.approx(0.3, rel=0.1)
    assert attn.q_proj.weight.std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sum"}, "mode must be 'mul' or 'add', got 'sum'"),
        ({"qk_norm": True}, "qk_norm cannot be had with mode 'mul', got True"),
        ({"mode": "add", "logit_softcap": 3.0}, "logit_softcap cannot be had with mode 'add', got 3.0"),
        ({"mode": "add", "sink": "zero"}, "sink cannot be had with mode 'add', got 'zero'"),
        ({"embed_init_std": -1.0}, "embed_init_std must not be negative, got -1.0"),
        ({"head_dim": 7, "rope": Rotary()}, "head_dim must be even and at least 2 to be rotated, got 7"),
        ({"num_heads": 5}, "num_heads must divide embed_dim unless head_dim is given, got 5 and 32"),
        ({"num_heads": 0, "head_dim": 8}, "num_heads must be at least 1, got 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.MultipleHeadEmbeddingAttention(**{"embed_dim": E, "num_heads": H} | options)


def test_groups_are_no_argument():
    with pytest.raises(ValueError, match="num_kv_heads must be 1, got 2"):
        attnzoo.MultipleHeadEmbeddingAttention(32, 4, num_kv_heads=2)
