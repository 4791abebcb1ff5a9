"""The adapter against torch's own layers that hold a real nn.MultiheadAttention with the same weights."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.adapters import TorchMultiheadAttention

B, T, S, H, D, F = 3, 5, 7, 2, 11, 13
E = H * D
MECHANISMS = [
    attnzoo.MultiHeadAttention,
    attnzoo.MultiQueryAttention,
    attnzoo.GroupedQueryAttention,
    attnzoo.GroupedTiedAttention,
    attnzoo.KnockingHeadsAttention,
]


def same_function(module: nn.MultiheadAttention, causal: bool = False) -> TorchMultiheadAttention:
    """The adapter over a zoo module that holds this module's weights."""
    attn = attnzoo.MultiHeadAttention(
        E, H, rope=None, causal=causal, kdim=None if causal else module.kdim,
        vdim=None if causal else module.vdim, dtype=torch.float64,
    )  # fmt: skip
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    else:
        weights = module.in_proj_weight.split(E)
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    with torch.no_grad():
        for projection, weight, bias in zip(projections, weights, module.in_proj_bias.split(E), strict=True):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
        attn.o_proj.load_state_dict(module.out_proj.state_dict())
    return TorchMultiheadAttention(attn, batch_first=module.batch_first)


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def encoder_layer(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, H, F, 0.0, batch_first=batch_first, dtype=torch.float64)
    return randomise(layer)


def sequences(length: int, batch_first: bool = True, width: int = E) -> Tensor:
    shape = (B, length, width) if batch_first else (length, B, width)
    return torch.randn(shape, dtype=torch.float64)


def padding(keys: int) -> Tensor:
    return torch.arange(keys) >= torch.tensor([keys, 2, keys - 1])[:, None]


def causal_mask(boolean: bool) -> Tensor:
    blocked = torch.ones(T, T, dtype=torch.bool).triu(1)
    return blocked if boolean else torch.zeros(T, T, dtype=torch.float64).masked_fill(blocked, -math.inf)


def per_head_mask() -> Tensor:
    blocked = torch.rand(B * H, T, T) < 0.4
    blocked[..., 0] = False
    return blocked


MASKS = {
    "none": dict,
    "padding": lambda: {"src_key_padding_mask": padding(T)},
    "causal": lambda: {"src_mask": causal_mask(True), "is_causal": True},
    "causal and padding": lambda: {
        "src_mask": causal_mask(False),
        "src_key_padding_mask": torch.zeros(B, T, dtype=torch.float64).masked_fill(padding(T), -math.inf),
        "is_causal": True,
    },
    "per head": lambda: {"src_mask": per_head_mask(), "src_key_padding_mask": torch.zeros(B, T) > 0},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_stands_in_an_encoder_layer(masks, training, batch_first):
    torch.manual_seed(0)
    reference = encoder_layer(batch_first).train(training)
    ours = copy.deepcopy(reference)
    ours.self_attn = same_function(reference.self_attn)
    x = sequences(T, batch_first)
    arguments = masks()
    with torch.set_grad_enabled(training):
        expected, got = reference(x, **arguments), ours.train(training)(x, **arguments)
    torch.testing.assert_close(got, expected)
    if training:
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (got * weight).sum().backward()
        torch.testing.assert_close(ours.linear1.weight.grad, reference.linear1.weight.grad)
        q_grad, _, v_grad = reference.self_attn.in_proj_weight.grad.split(E)
        torch.testing.assert_close(ours.self_attn.attn.q_proj.weight.grad, q_grad)
        torch.testing.assert_close(ours.self_attn.attn.v_proj.weight.grad, v_grad)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_stands_in_a_decoder_layer(training, batch_first):
    torch.manual_seed(1)
    reference = nn.TransformerDecoderLayer(E, H, F, 0.0, batch_first=batch_first, dtype=torch.float64)
    randomise(reference).train(training)
    ours = copy.deepcopy(reference)
    ours.self_attn = same_function(reference.self_attn)
    ours.multihead_attn = same_function(reference.multihead_attn)
    ours.train(training)
    arguments = {
        "tgt_mask": causal_mask(True),
        "tgt_is_causal": True,
        "memory_mask": torch.rand(T, S).argsort(-1) < 2,
        "memory_key_padding_mask": torch.arange(S).expand(B, S) == 3,
    }
    x, memory = sequences(T, batch_first), sequences(S, batch_first)
    torch.testing.assert_close(ours(x, memory, **arguments), reference(x, memory, **arguments))


def test_key_and_value_may_differ_in_width():
    torch.manual_seed(2)
    reference = nn.MultiheadAttention(E, H, kdim=17, vdim=19, batch_first=True, dtype=torch.float64)
    randomise(reference)
    arguments = (sequences(T), sequences(S, width=17), sequences(S, width=19), padding(S), False)
    torch.testing.assert_close(same_function(reference)(*arguments)[0], reference(*arguments)[0])


@pytest.mark.parametrize("training", [True, False])
def test_unbatched_input(training):
    torch.manual_seed(3)
    reference = randomise(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)).train(training)
    ours = same_function(reference).train(training)
    x, y = sequences(T)[0], sequences(S)[0]
    masks = {"key_padding_mask": torch.arange(S) == 2, "attn_mask": torch.rand(H, T, S).argsort(-1) < 2}
    got, weights = ours(x, y, y, **masks)
    expected, _ = reference(x, y, y, need_weights=False, **masks)
    assert weights is None
    assert got.shape == (T, E)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours(x, x, x)[0], reference(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batch(batch_first):
    ours = same_function(nn.MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64))
    x = sequences(T, batch_first).narrow(0 if batch_first else 1, 0, 0)
    out, _ = ours(x, x, x, attn_mask=causal_mask(True))
    assert out.shape == x.shape


def test_copies_inside_a_stack_are_independent():
    torch.manual_seed(4)
    layer = encoder_layer(True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    adapted = copy.deepcopy(layer)
    adapted.self_attn = same_function(layer.self_attn)
    ours = nn.TransformerEncoder(adapted, 2, enable_nested_tensor=False).eval()
    first, second = (part.self_attn.attn.q_proj.weight for part in ours.layers)
    assert first is not second
    x = sequences(T)
    arguments = {"mask": causal_mask(True), "src_key_padding_mask": padding(T)}
    with torch.no_grad():
        torch.testing.assert_close(ours(x, **arguments), reference(x, **arguments))


def swapped(stack: nn.Module) -> nn.Module:
    """A copy of an encoder or decoder that exists, with the adapter in place of every attention."""
    ours = copy.deepcopy(stack)
    for layer in ours.layers:
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                setattr(layer, name, same_function(getattr(layer, name)))
    return ours


@pytest.mark.parametrize("grad", ["no_grad", "inference_mode", "enable_grad", "frozen"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}, {"activation": "gelu"}])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_stands_in_an_encoder_that_exists(options, training, grad):
    """The reference takes its fused paths where torch would; there it gives zeros for padding."""
    torch.manual_seed(7)
    options = {"batch_first": True, "dtype": torch.float64} | options
    layer = randomise(nn.TransformerEncoderLayer(E, H, F, 0.0, **options))
    reference = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E, dtype=torch.float64)).train(training)
    ours, first = swapped(reference).train(training), options["batch_first"]
    x, real = sequences(T, first), ~padding(T)
    for module in (reference, ours):
        module.requires_grad_(grad != "frozen")
    with getattr(torch, grad, torch.enable_grad)():
        both = {"mask": causal_mask(False), "src_key_padding_mask": torch.zeros(B, T).double()}
        for arguments in ({}, {"mask": causal_mask(True)}, both):
            torch.testing.assert_close(ours(x, **arguments), reference(x, **arguments))
        fast, slow = (
            module(x, src_key_padding_mask=padding(T)).transpose(0, 0 if first else 1) for module in (reference, ours)
        )
        torch.testing.assert_close(slow[real], fast[real])
        if first and grad != "inference_mode":
            rows = [row[: int(kept.sum())] for row, kept in zip(x, real, strict=True)]
            for layout in (torch.strided, torch.jagged):
                nested = ours(torch.nested.nested_tensor(rows, layout=layout))
                torch.testing.assert_close(torch.cat(list(nested.unbind())), slow[real])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"norm_first": True}])
def test_stands_in_a_decoder_that_exists(options, training):
    torch.manual_seed(8)
    options = {"batch_first": True, "dtype": torch.float64} | options
    layer = randomise(nn.TransformerDecoderLayer(E, H, F, 0.0, **options))
    reference = nn.TransformerDecoder(layer, 2).train(training)
    ours, first = swapped(reference).train(training), options["batch_first"]
    arguments = {
        "tgt_mask": causal_mask(True), "tgt_key_padding_mask": padding(T), "memory_key_padding_mask": padding(S),
    }  # fmt: skip
    x, memory = sequences(T, first), sequences(S, first)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, memory, **arguments), reference(x, memory, **arguments))


def test_nested_tensors_carry_gradients():
    ours = same_function(randomise(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)))
    rows = [torch.randn(length, E, dtype=torch.float64, requires_grad=True) for length in (4, 1, 3)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.as_nested_tensor(rows, layout=layout)
        (y, _), weights = ours(x, x, x), [torch.randn(len(row), E).double() for row in rows]
        found = torch.autograd.grad(sum((a * w).sum() for a, w in zip(y.unbind(), weights, strict=True)), rows)
        for row, weight, grad in zip(rows, weights, found, strict=True):
            alone = ours(row, row, row)[0]
            torch.testing.assert_close(grad, torch.autograd.grad((alone * weight).sum(), row)[0])


def test_padding_is_in_no_routers_loss():
    attn = attnzoo.MixtureOfHeadAttention(24, 4, causal=False, rope=None, dtype=torch.float64)
    ours, x = TorchMultiheadAttention(attn), sequences(T, width=24)
    first = x[:, :3]
    ours(first, first, first)
    loss = attn.aux_loss.item()
    ours(x, x, x, key_padding_mask=torch.arange(T).expand(B, T) >= 3)
    assert attn.aux_loss.item() == pytest.approx(loss, rel=1e-12)


def test_a_causal_module_needs_no_mask():
    torch.manual_seed(5)
    reference = randomise(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64))
    ours = same_function(reference, causal=True)
    x = sequences(T)
    expected, _ = reference(x, x, x, attn_mask=causal_mask(True), need_weights=False)
    torch.testing.assert_close(ours(x, x, x)[0], expected)
    torch.testing.assert_close(ours(x, x, x, is_causal=True)[0], expected)
    torch.testing.assert_close(ours(x, x, x, attn_mask=causal_mask(False), is_causal=True)[0], expected)


def test_a_query_without_keys_gives_the_output_bias():
    ours = same_function(randomise(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)))
    blocked = torch.zeros(T, T, dtype=torch.bool)
    blocked[2] = True
    x = sequences(T)
    out, _ = ours(x, x, x, attn_mask=blocked)
    torch.testing.assert_close(out[:, 2], ours.attn.o_proj.bias.expand(B, E))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_mechanism_stands_in_an_encoder_layer(mechanism):
    torch.manual_seed(6)
    layer = nn.TransformerEncoderLayer(24, 2, F, 0.0, batch_first=True)
    layer.self_attn = TorchMultiheadAttention(mechanism(24, 2, causal=False))
    randomise(layer.self_attn)
    x = torch.randn(B, T, 24)
    trained = layer(x, src_key_padding_mask=padding(T))
    trained.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.self_attn.attn.parameters())
    with torch.no_grad():
        evaluated = layer.eval()(x, src_key_padding_mask=padding(T))
    torch.testing.assert_close(evaluated, trained.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"need_weights": True}, "need_weights must be False, got True"),
        ({"is_causal": True}, "is_causal needs attn_mask or a module with causal=True"),
        ({"attn_mask": torch.full((T, T), 0.5)}, "attn_mask must hold 0 and -inf alone"),
        ({"attn_mask": torch.full((T, T), math.nan)}, "attn_mask must hold 0 and -inf alone"),
        ({"key_padding_mask": torch.ones(B, T)}, "key_padding_mask must hold 0 and -inf alone"),
        ({"key_padding_mask": torch.ones(B, T, dtype=torch.int64)}, "must be boolean or floating, got"),
        ({"key_padding_mask": torch.zeros(T, B)}, r"key_padding_mask must have shape \(3, 5\), got \(5, 3\)"),
        ({"attn_mask": torch.zeros(1, T)}, r"must have shape \(5, 5\) or \(6, 5, 5\), got \(1, 5\)"),
        ({"attn_mask": torch.zeros(B, T, T)}, r"or \(6, 5, 5\), got \(3, 5, 5\)"),
    ],
)
def test_refuses(arguments, message):
    ours = same_function(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64))
    x = sequences(T)
    with pytest.raises(ValueError, match=message):
        ours(x, x, x, **arguments)


def test_refuses_mixed_dimensions_and_modules_that_are_no_attention():
    ours = same_function(nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64))
    x = sequences(T)
    with pytest.raises(ValueError, match="got 3, 2 and 3 dimensions"):
        ours(x, x[0], x)
    with pytest.raises(ValueError, match="attn must be an attention module of the zoo, got Linear"):
        TorchMultiheadAttention(nn.Linear(3, 3))


def test_cross_attention_needs_a_module_that_is_not_causal():
    ours = TorchMultiheadAttention(attnzoo.MultiHeadAttention(E, H, rope=None, dtype=torch.float64))
    x, y = sequences(T), sequences(S)
    with pytest.raises(ValueError, match="context needs a module with causal=False"):
        ours(x, y, y)
