"""Gated attention: identities at every position, backends, memory, layers of other code, refusals."""

import itertools

import pytest
import torch

import attnzoo
from attnzoo.conversion import from_qwen3_next, gated_weights
from tests.modules.test_golden import construct, load
from tests.modules.test_parity import in_float64
from tests.zoo import E, G, H, gradients

POSITIONS = [
    *((gate, "elementwise") for gate in ("output", "value", "key", "query", "dense")),
    *((gate, "headwise") for gate in ("output", "value", "key", "query")),
]
every_position = pytest.mark.parametrize(("gate", "gate_type"), POSITIONS)
HALF = 2.0
"""What a gate of 1/2 divides by."""


def make(gate="output", gate_type="elementwise", **options):
    """A module whose gates are far from 1/2, in float64."""
    torch.manual_seed(3)
    options = {"init_std": 0.3, "dtype": torch.float64, "v_head_dim": 6} | options
    return attnzoo.GatedAttention(E, H, G, gate=gate, gate_type=gate_type, **options)


def ungated(module, **options):
    """Grouped-query attention with the same weights."""
    base = attnzoo.GroupedQueryAttention(
        E, H, G, v_head_dim=6, causal=module.causal, bias=module.q_proj.bias is not None, dtype=torch.float64, **options
    )
    base.load_state_dict({key: value for key, value in module.state_dict().items() if "g_proj" not in key})
    return base


@every_position
def test_a_gate_of_one_half(gate, gate_type):
    module, x = make(gate, gate_type), torch.randn(2, 9, E).double()
    torch.nn.init.zeros_(module.g_proj.weight)
    base = ungated(module, scale=module.head_dim**-0.5 / HALF if gate in ("key", "query") else None)
    expected = base(x) if gate in ("key", "query") else base(x) / HALF
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)


@every_position
def test_an_open_gate_is_grouped_query_attention(gate, gate_type):
    module, x = make(gate, gate_type, gate_bias=True, bias=True), torch.randn(2, 9, E).double()
    torch.nn.init.zeros_(module.g_proj.weight)
    torch.nn.init.constant_(module.g_proj.bias, 50.0)
    torch.testing.assert_close(module(x), ungated(module)(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["output", "value", "key", "query"])
def test_headwise_is_elementwise_with_repeated_rows(gate):
    module, x = make(gate, "headwise", gate_bias=True), torch.randn(2, 9, E).double()
    torch.nn.init.normal_(module.g_proj.bias)
    other = make(gate, gate_bias=True)
    repeats = other.g_proj.out_features // module.g_proj.out_features
    rows = {f"g_proj.{kind}": getattr(module.g_proj, kind).repeat_interleave(repeats, 0) for kind in ("weight", "bias")}
    other.load_state_dict(module.state_dict() | rows)
    torch.testing.assert_close(other(x), module(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@every_position
def test_the_gate_is_a_product_around_plain_layers(gate, gate_type, backend):
    """The same numbers and gradients from hooks on the projections of grouped-query attention."""
    module, x = make(gate, gate_type, backend=backend, bias=True), torch.randn(2, 9, E).double()
    base = ungated(module, backend=backend)
    base.g_proj = module.g_proj
    widths = {"output": 6, "value": 6, "dense": E}

    def factor():
        repeats = widths.get(gate, module.head_dim) if gate_type == "headwise" else 1
        return torch.sigmoid(base.g_proj(base.inputs)).repeat_interleave(repeats, -1)

    base.register_forward_pre_hook(lambda module, args: setattr(module, "inputs", args[0]))
    if gate == "output":
        base.o_proj.register_forward_pre_hook(lambda _, args: args[0] * factor())
    else:
        layer = {"value": base.v_proj, "key": base.k_proj, "query": base.q_proj, "dense": base.o_proj}[gate]
        layer.register_forward_hook(lambda *args: args[2] * factor())
    weight = torch.randn(2, 9, E).double()
    found, expected = gradients(module, x, weight), gradients(base, x, weight)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-11, rtol=0, msg=name)


@pytest.mark.parametrize("gate", ["output", "value", "key", "query", "dense"])
def test_cross_attention_takes_the_gate_from_what_it_multiplies(gate):
    module = make(gate, causal=False, kdim=20, vdim=12, rope=None, bias=True)
    assert module.g_proj.in_features == {"key": 20, "value": 12}.get(gate, E)
    x, key, value = (torch.randn(2, n, width).double() for n, width in ((5, E), (7, 20), (7, 12)))
    z = {"key": key, "value": value}.get(gate, x)
    closed = [torch.zeros_like(z), z]
    with torch.no_grad():
        outputs = []
        for inputs in closed:
            hook = module.g_proj.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs * (args[0] == z).all())
            outputs.append(module(x, (key, value)))
            hook.remove()
        assert not torch.equal(*outputs)
        torch.testing.assert_close(module(x, (key, value)), outputs[1], atol=0, rtol=0)


@every_position
def test_gradients_of_the_gate(gate, gate_type):
    module, x = make(gate, gate_type, gate_bias=True), torch.randn(1, 4, E).double()

    def call(*parameters):
        return torch.func.functional_call(
            module, dict(zip(("g_proj.weight", "g_proj.bias"), parameters, strict=True)), x
        )

    assert torch.autograd.gradcheck(call, (module.g_proj.weight, module.g_proj.bias), fast_mode=True)


@pytest.mark.parametrize(("gate", "gate_type"), [case for case in POSITIONS if case[0] != "dense"])
def test_a_pruned_head_takes_its_gate_along(gate, gate_type):
    module, x = make(gate, gate_type), torch.randn(2, 9, E).double()
    with torch.no_grad():
        module.o_proj.weight.view(E, H, -1)[:, [0, 1, 3]] = 0
    expected, rows = module(x), module.g_proj.out_features
    module.prune_heads([0, 1, 3])
    torch.testing.assert_close(module(x), expected, atol=1e-12, rtol=0)
    assert module.g_proj.out_features == rows // (H if gate in ("output", "query") else G)


@pytest.mark.parametrize("gate", ["output", "value"])
@pytest.mark.parametrize("gate_type", ["elementwise", "headwise"])
def test_training_stores_no_pairs_of_tokens(gate, gate_type):
    def stored(T):
        module, sizes = attnzoo.GatedAttention(E, H, G, gate=gate, gate_type=gate_type, backend="sdpa"), {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module(torch.randn(1, T, E))
        return sum(sizes.values())

    assert stored(512) <= 2.05 * stored(256)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_a_layer_of_qwen3_next(attention_bias, monkeypatch):
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    in_float64(monkeypatch, theirs)
    config = Qwen3NextConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, attention_bias=attention_bias,
        rms_norm_eps=1e-5, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    layer = theirs.Qwen3NextAttention(config, layer_idx=0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module, x = from_qwen3_next(layer), torch.randn(2, 19, 48).double()
    assert module.rope.width(8) == 2
    angles = torch.arange(19)[:, None] * module.rope.frequencies(2)[0].repeat(2)
    mask = torch.full((19, 19), -torch.inf).double().triu(1)[None, None]
    expected = layer(x, position_embeddings=(angles.cos()[None], angles.sin()[None]), attention_mask=mask)[0]
    torch.testing.assert_close(module(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gate_type", ["elementwise", "headwise"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_authors_order_of_rows(gate_type, bias):
    """Rows by key/value head: queries of its heads, then their gates, as their file says row by row."""
    module = make("output", gate_type, qk_norm=True, bias=bias, v_head_dim=None)
    D, width = module.head_dim, module.gate_width
    order = []
    for g in range(G):
        heads = range(g * (H // G), (g + 1) * (H // G))
        order += [h * D + d for h in heads for d in range(D)]
        order += [H * D + h * width + d for h in heads for d in range(width)]
    state = module.state_dict()
    for kind in ("weight", "bias") if bias else ("weight",):
        joined = torch.cat([state[f"q_proj.{kind}"], state.pop(f"g_proj.{kind}")])
        state[f"q_proj.{kind}"] = joined[order]
    assert gated_weights(state, H, G, layout="qiuzh20").keys() == module.state_dict().keys()
    for name, value in gated_weights(state, H, G, layout="qiuzh20").items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_layouts_that_do_not_fit_are_refused():
    state = {"q_proj.weight": torch.zeros(H * 8 + H, E), "k_proj.weight": torch.zeros(G * 8, E)}
    with pytest.raises(
        ValueError, match=r"state must have 32 query rows and those of a gate in q_proj\.weight, got 36"
    ):
        gated_weights(state, H, G, layout="qwen3_next")
    with pytest.raises(ValueError, match="layout must be one of 'qwen3_next', 'qiuzh20', got 'qwen3'"):
        gated_weights(state, H, G, layout="qwen3")


def test_the_stored_figures_hold_for_the_other_order_of_the_rows():
    """Figures made by transformers' layer, its rows joined as there and taken apart again."""
    weights = {key[8:]: value.double() for key, value in load("gated")[0].items() if key.startswith("weights.")}
    q, g = (weights[f"{name}_proj.weight"].unflatten(0, (4, 8)) for name in "qg")
    theirs = {key: value - 1 if "norm" in key else value for key, value in weights.items() if "g_proj" not in key}
    theirs["q_proj.weight"] = torch.stack([q, g], 1).flatten(0, 2)
    module = construct("gated").double()
    module.load_state_dict(gated_weights(theirs, 4, 2, layout="qwen3_next"))
    found = module(load("gated")[0]["input.x"].double())
    torch.testing.assert_close(found, load("gated")[0]["output.y"], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "keys"}, "gate must be one of 'output', 'value', 'key', 'query', 'dense', got 'keys'"),
        ({"gate_type": "channelwise"}, "gate_type must be 'elementwise' or 'headwise', got 'channelwise'"),
        ({"gate": "dense", "gate_type": "headwise"}, "gate_type must be 'elementwise' with gate 'dense', which has no"),
        *(
            ({"gate": gate, "gate_type": "headwise", "qk_norm": True}, f"with gate '{gate}' and qk_norm, which cancels")
            for gate in ("query", "key")
        ),
        ({"gate_bias": 1}, "gate_bias must be True or False, got 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        attnzoo.GatedAttention(E, H, G, **options)


def test_a_joint_norm_of_one_head_cancels_its_gate():
    options = {"gate_type": "headwise", "qk_norm": "joint"}
    for gate, heads in (("key", (H, 1)), ("query", (1, 1))):
        with pytest.raises(ValueError, match=f"with gate '{gate}' and qk_norm, which cancels a factor of a head"):
            attnzoo.GatedAttention(E, *heads, gate=gate, **options)
    for gate, heads in (("key", (H, G)), ("query", (H, 1)), ("value", (H, 1))):
        attnzoo.GatedAttention(E, *heads, gate=gate, **options)


def test_the_gate_starts_anew():
    for init in ("normal", "xavier"):
        module = attnzoo.GatedAttention(64, H, G, init=init, gate_bias=True)
        torch.nn.init.ones_(module.g_proj.bias)
        stds = []
        for std in (None, 0.5):
            module.reset_parameters(std)
            stds.append(float(module.g_proj.weight.detach().std()))
            assert not module.g_proj.bias.any()
        assert stds == pytest.approx([0.02, 0.5], rel=0.1)


def test_costs_count_the_gate():
    for gate, gate_type in itertools.islice(POSITIONS, 9):
        module = make(gate, gate_type)
        assert module.flops_by_part(7)["gate"] == 2 * 7 * module.g_proj.weight.numel()
    cross = make("value", causal=False, kdim=20)
    assert cross.flops_by_part(7, 5)["gate"] == 2 * 5 * cross.g_proj.weight.numel()
