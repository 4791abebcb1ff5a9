"""What heads do in a forward pass, read without changing it."""

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo import AttentionMask
from attnzoo.adapters import TorchMultiheadAttention
from attnzoo.diagnostics.heads.observe import KINDS, capture, observe
from attnzoo.masks import Visibility
from attnzoo.modules.call import begin
from attnzoo.ops import softmax_attention as softmax
from attnzoo.ops.composed_attention import Composition
from attnzoo.ops.observation import Observation, current_observer
from attnzoo.ops.score_rules import ScoreRules
from attnzoo_recipes.lm import DecoderLM
from tests import zoo
from tests.diagnostics.test_attention_layers import DECODERS, FAMILIES, _hf, _shaken

PATTERNED = [name for name in zoo.MECHANISMS if not name.startswith(("linear", "mhla", "mgk-linear"))]
CASES = [(name, option) for name in PATTERNED for option in zoo.TAKES.get(name, tuple(zoo.OPTIONS))]
UNNORMED = [name for name in PATTERNED if name in zoo.names("unnormed heads")]
B, T = 2, 11


def _calls(model, *args, **options):
    """What was observed, and the output."""
    found = []
    with observe(model, found.append), torch.no_grad():
        out = model(*args, **options)
    return found, out


def _alone(model, *args, **options):
    with torch.no_grad():
        return model(*args, **options)


def _gates(module, x):
    """Factors (B, H, T, 1) of the heads' outputs after attention."""
    if isinstance(module, attnzoo.MixtureOfHeadAttention):
        return module.gates(x, module.project(x, x, x)[0])[0].transpose(1, 2)[..., None]
    if isinstance(module, attnzoo.MixtureOfAttentionHeads):
        gates = module._gates(module.router_logits(x))[1]
        return gates.repeat_interleave(module.heads_per_expert, -1).transpose(1, 2)[..., None]
    if isinstance(module, attnzoo.SelectiveMultiHeadAttention):
        return module.gates(x, begin(module, x))[0].transpose(1, 2)[..., None]
    if isinstance(module, attnzoo.MixtureOfAttentiveExperts):
        z, _ = module.gate_inputs(x, begin(module, x))
        return module.factors(module.gates(z)).transpose(1, 2)[..., None]
    if isinstance(module, attnzoo.ForgettingAttention) and module.g_proj is not None:
        activation = {"silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}[module.output_gate]
        return activation(module.g_proj(x)).unflatten(2, (-1, module.v_head_dim)).transpose(1, 2)
    if isinstance(module, attnzoo.GatedAttention) and module.gate == "output":
        return torch.sigmoid(module.g_proj(x)).unflatten(2, (-1, module.gate_width)).transpose(1, 2)
    return torch.ones(1, dtype=x.dtype)


def _of_heads(module, values):
    """What each head makes of its values (B, H, T, Dv) after attention."""
    if isinstance(module, attnzoo.DifferentialAttention) and module.version == 1:
        norm = module.subln
        return (1 - module.lambda_init) * norm(values.to(norm.weight.dtype)).to(values.dtype)
    if isinstance(module, attnzoo.ForgettingAttention) and module.output_norm is not None:
        return module.output_norm(values.transpose(1, 2)).transpose(1, 2).to(values.dtype)
    if not isinstance(module, attnzoo.MultipleHeadEmbeddingAttention):
        return values
    e = module.v_head_embed.detach()[:, None]
    return values * (1 + e) if module.mode == "mul" else values + e


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize(("name", "option"), CASES)
def test_patterns_times_values_are_the_outputs(name, option, backend):
    module = zoo.build(name, backend=backend, **zoo.OPTIONS[option])
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), out = _calls(module, x)
    assert torch.equal(out, _alone(module, x))
    p = call.pattern()
    assert p.dtype == torch.float64
    assert p.shape == (B, call.layer.num_heads, T, T)
    if name in UNNORMED:
        torch.testing.assert_close(_of_heads(module, p @ call.values_by_head()) * _gates(module, x), call.outputs)
    assert not p.triu(1).any()
    blocks = list(call.pattern_blocks(4))
    assert [rows.start for rows, _ in blocks] == [0, 4, 8]
    torch.testing.assert_close(torch.cat([block for _, block in blocks], 2), p)
    sums = p.sum(-1)
    if name.startswith("diff"):
        factor = module.factor(x).detach()
        share = 1 - (factor if factor.ndim == 0 else factor.transpose(1, 2))
        torch.testing.assert_close(sums, share.expand_as(sums), atol=1e-12, rtol=0)
        assert not torch.allclose(share, torch.ones_like(share))
    elif name.startswith("sigmoid"):
        assert (p < 1).all()
        assert torch.equal((p > 0).sum(-1), call.visible_counts(slice(0, T)).expand(p.shape[:-1]))
    elif not name.startswith(("dcmha", "talking", "mta")):
        if "sink" in option and option != "window-sinks":
            assert (sums < 1).all()
        else:
            # A head that no token has chosen yet sees nothing; hard assignment adds an eps to the denominator.
            seen = (sums > 0) if name == "smha" else torch.ones_like(sums, dtype=torch.bool)
            torch.testing.assert_close(sums, seen.to(sums), atol=0.01 if name == "mgk-hard" else 1e-7, rtol=0)
        assert torch.equal((p > 0).sum(-1), call.visible_counts(slice(0, T)).expand(p.shape[:-1]))


def _masks():
    generator = torch.Generator().manual_seed(2)
    dense = torch.rand(B, 1, T, T, generator=generator) < 0.5
    return {
        "padding": AttentionMask.padding([7, 11]),
        "packed": AttentionMask.packed([0, 4, 9, 11, 18, 22]),
        "dense": AttentionMask.dense(dense | torch.eye(T, dtype=torch.bool)),
        "heads": AttentionMask.dense(torch.rand(B, 4, T, T, generator=generator) < 0.5),
        "keys": AttentionMask.dense(torch.rand(B, 1, 1, T, generator=generator) < 0.7),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["padding", "packed", "dense", "heads", "keys"])
@pytest.mark.parametrize("name", ["gqa", "gta", "mla", "dcmha", "dcmha-folded", "talking-heads"])
def test_patterns_follow_masks(name, kind, causal):
    module = zoo.build(name, causal=causal)
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), out = _calls(module, x, mask=_masks()[kind])
    assert torch.equal(out, _alone(module, x, mask=_masks()[kind]))
    p = call.pattern()
    torch.testing.assert_close(p @ call.values_by_head(), call.outputs)
    torch.testing.assert_close(torch.cat([block for _, block in call.pattern_blocks(3)], 2), p)


@pytest.mark.parametrize("option", ["window", "window-sinks"])
def test_windows_in_packed_documents(option):
    module = zoo.build("gqa", **zoo.OPTIONS[option])
    (call,), _ = _calls(module, torch.randn(B, T, zoo.E, dtype=torch.float64), mask=_masks()["packed"])
    torch.testing.assert_close(call.pattern() @ call.values_by_head(), call.outputs)


@pytest.mark.parametrize("name", ["gqa", "kha-mla", "moh", "dcmha", "dcmha-folded", "talking-heads"])
def test_pruned_heads_have_no_patterns(name):
    options = {"num_shared_heads": 1, "num_routed_active": 1} if name == "moh" else {}
    module = zoo.build(name)
    if name == "moh":
        module = attnzoo.MixtureOfHeadAttention(zoo.E, 4, 2, **options).double()
    module.prune_heads([1])
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), _ = _calls(module, x)
    assert call.pattern().shape[1] == 3
    torch.testing.assert_close(call.pattern() @ call.values_by_head() * _gates(module, x), call.outputs)


def test_sparse_routing_gives_patterns_of_all_heads():
    module = zoo.build("moh", sparse=True)
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), _ = _calls(module, x)
    torch.testing.assert_close(call.pattern() @ call.values_by_head() * _gates(module, x), call.outputs)
    module.sparse = False
    (dense,), _ = _calls(module, x)
    torch.testing.assert_close(call.pattern(), dense.pattern())


@pytest.mark.parametrize("name", ["gqa", "gta", "mla", "dcmha", "talking-heads"])
@pytest.mark.parametrize("window", [None, 4])
def test_decoding_shows_the_row_of_the_full_pattern(name, window):
    if name in ("mla",) and window:
        pytest.skip("latent attention has no window")
    options = {} if window is None else {"sliding_window": window}
    module = zoo.build(name, **options)
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (whole,), _ = _calls(module, x)
    cache = module.init_cache(B, T)
    _calls(module, x[:, : T - 1], cache=cache)
    (last,), _ = _calls(module, x[:, T - 1 :], cache=cache)
    p, expected = last.pattern(), whole.pattern()[:, :, T - 1 :]
    if window:
        # The ring holds keys of the window alone, in its own order.
        p = torch.zeros_like(expected).index_add_(-1, last.view.key_positions.clamp(min=0), p)
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(last.outputs, whole.outputs[:, :, T - 1 :])


def test_gradients_are_those_of_the_model_alone():
    module = zoo.build("gqa")
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    weight = torch.randn_like(x)
    expected = zoo.gradients(module, x, weight)
    with capture(module, KINDS) as captured:
        found = zoo.gradients(module, x, weight)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(not captured.last(kind)[0].requires_grad for kind in KINDS)


def test_everything_is_as_before_afterwards():
    model = nn.ModuleList([zoo.build("gqa"), zoo.build("dcmha"), zoo.build("linear")])

    def state():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()), current_observer()

    def interrupted():
        with capture(model, ["outputs"]):
            hooks, observer = state()
            assert hooks > 0
            assert observer is not None
            raise RuntimeError("stop")

    assert state() == (0, None)
    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert state() == (0, None)


def test_modules_of_users_are_seen_whatever_they_call_the_operation_by():
    attend = softmax.softmax_attention

    class Mine(attnzoo.GroupedQueryAttention):
        """No rotation, a window, and the operation by another name."""

        def forward(self, x, **_):
            q, k, v = (
                self.q_proj(x).unflatten(2, (4, 8)),
                *(p(x).unflatten(2, (2, 8)) for p in (self.k_proj, self.v_proj)),
            )
            return self.o_proj(attend(q, k, v, Visibility(window=3), scale=0.7).flatten(2))

    module = Mine(zoo.E, 4, 2, dtype=torch.float64)
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), out = _calls(module, x)
    assert torch.equal(out, _alone(module, x))
    p = call.pattern()
    torch.testing.assert_close(p @ call.values_by_head(), call.outputs)
    assert not p.tril(-3).any()


def test_the_operation_that_delegates_is_the_one_that_counts():
    class Composed(attnzoo.GroupedQueryAttention):
        """Outputs of plain attention, mixed over heads; its observation says so before the operation's own."""

        def forward(self, x, **_):
            q, k, v = (p(x).unflatten(2, (4, 8)) for p in (self.q_proj, self.k_proj, self.v_proj))
            mix = Composition(torch.eye(4, dtype=x.dtype).flip(0)[None], residual=False)
            observer = current_observer()
            if observer is not None:
                view, rules = Visibility(), ScoreRules(0.7)
                same = v[:, :, :1].expand_as(v)
                observer(Observation("composed_attention", q, k, same, view, rules, post=mix))
            out = softmax.softmax_attention(q, k, v[:, :, :1].expand_as(v), scale=0.7)
            return self.o_proj(out.flip(2).flatten(2))

    module = Composed(zoo.E, 4, 4, dtype=torch.float64)
    (call,), _ = _calls(module, torch.randn(B, T, zoo.E, dtype=torch.float64))
    torch.testing.assert_close(call.pattern() @ call.values_by_head(), call.outputs)


def test_heads_of_a_cluster_have_one_pattern():
    module = attnzoo.ClusteredHeadAttention(zoo.build("gqa"), 2).eval()
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    (call,), out = _calls(module, x)
    assert torch.equal(out, _alone(module, x))
    p = call.pattern()
    torch.testing.assert_close(p @ call.values_by_head(), call.outputs)
    shared = module.representatives.gather(1, module.labels)
    torch.testing.assert_close(p, p[torch.arange(B)[:, None], shared])
    assert len(set(shared[0].tolist())) == 2


def test_captures_can_be_nested():
    module = zoo.build("gqa")
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    with capture(module) as outer:
        module(x)
        with capture(module, ["patterns"]) as inner:
            module(2 * x)
        module(3 * x)
    assert len(outer.passes) == 3
    assert len(inner.passes) == 1
    assert torch.equal(outer.passes[1][0].patterns, inner.last("patterns")[0])


def test_a_failed_forward_pass_leaves_nothing_behind():
    module = zoo.build("gqa")
    x = torch.randn(B, T, zoo.E, dtype=torch.float64)
    with capture(module) as captured:
        with pytest.raises(ValueError, match="mask must broadcast"):
            module(x, mask=torch.ones(3, 3, dtype=torch.bool))
        module(x)
        module(x)
    assert len(captured.passes) == 2
    assert torch.equal(captured.passes[0][0].outputs, captured.passes[1][0].outputs)


def _lm(layers=3):
    torch.manual_seed(1)
    return DecoderLM(
        50, lambda E: attnzoo.GroupedQueryAttention(E, 4, 2), embed_dim=32, num_layers=layers, mlp_dim=16
    )  # fmt: skip


def test_layers_and_passes_of_a_language_model():
    model = _lm()
    tokens = torch.randint(0, 50, (B, T))
    with capture(model, KINDS) as captured, torch.no_grad():
        model(tokens)
        model(tokens[:1, :5])
    assert [sorted(records) for records in captured.passes] == [[0, 1, 2]] * 2
    assert captured.passes[0][2].patterns.shape == (B, 4, T, T)
    shapes = {kind: tuple(captured.last(kind)[1].shape) for kind in KINDS}
    assert shapes == {"queries": (1, 4, 5, 8), "keys": (1, 2, 5, 8), "values": (1, 2, 5, 8),
                      "patterns": (1, 4, 5, 5), "outputs": (1, 4, 5, 8)}  # fmt: skip
    with capture(model, ["outputs"], layers=[2]) as captured, torch.no_grad():
        model(tokens)
    assert sorted(captured.passes[0]) == [2]
    assert captured.passes[0][2].patterns is None


def test_modules_behind_torchs_call():
    layer = nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)
    layer.self_attn = TorchMultiheadAttention(zoo.build("gqa", causal=False, dtype=torch.float32))
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with capture(model) as captured, torch.no_grad():
        model(torch.randn(B, T, 32))
    assert [found.name for found in captured.layers] == ["layers.0.self_attn.attn", "layers.1.self_attn.attn"]
    for p in captured.last("patterns"):
        torch.testing.assert_close(p.sum(-1), torch.ones(B, 4, T))


@pytest.mark.parametrize("name", UNNORMED)
def test_half_precision_gives_patterns_in_single(name):
    module = zoo.build(name, dtype=torch.bfloat16)
    x = torch.randn(B, T, zoo.E, dtype=torch.bfloat16)
    (call,), _ = _calls(module, x)
    assert call.pattern().dtype == torch.float32
    expected = _of_heads(module, call.pattern() @ call.values_by_head().float()) * _gates(module, x)
    torch.testing.assert_close(expected, call.outputs.float(), rtol=0.03, atol=0.03)


def test_capture_of_a_part_of_the_model():
    """The root's forward is not called, so passes are told apart by the layers."""
    model = _lm(1)
    x = torch.randn(B, T, 32)
    with capture(model) as captured, torch.no_grad():
        model.blocks[0](x, None, None, None)
        model.blocks[0](2 * x, None, None, None)
    assert len(captured.passes) == 2


@pytest.mark.parametrize("name", ["linear", "linear-lm", "mhla", "mhla-heads"])
def test_mechanisms_without_a_softmax_have_everything_else(name):
    module = zoo.build(name)
    x = torch.randn(B, T if name != "mhla-heads" else 10, zoo.E, dtype=torch.float64)
    with capture(module, ["queries", "keys", "values", "outputs"]) as captured, torch.no_grad():
        out = module(x)
    assert captured.last("queries")[0].shape == (B, 4, x.shape[1], 8)
    assert captured.last("keys")[0].shape == captured.last("values")[0].shape == (B, 2, x.shape[1], 8)
    torch.testing.assert_close(captured.last("values")[0].transpose(1, 2).flatten(2), module.v_proj(x))
    torch.testing.assert_close(module.o_proj(captured.last("outputs")[0].transpose(1, 2).flatten(2)), out)
    with pytest.raises(ValueError, match=r"layer '' has no attention patterns: \w+ has no softmax over keys"):
        capture(module).__enter__()
    (call,), _ = _calls(module, x)
    with pytest.raises(ValueError, match=r"has no attention patterns: .* no softmax"):
        call.pattern()


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_patterns_are_those_of_the_eager_path(name):
    if name == "mpnet":
        pytest.skip("MPNet computes its attention in its own forward; a test below says how it is refused")
    model = _shaken(_hf(name))
    tokens = torch.randint(3, 31, (B, T))
    padding = torch.ones_like(tokens)
    padding[0, 8:] = 0
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=padding, output_attentions=True)
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and name == "gemma2":
            continue
        model.set_attn_implementation(implementation)
        with capture(model, KINDS) as captured, torch.no_grad():
            found = model(input_ids=tokens, attention_mask=padding)
        assert model.config._attn_implementation == implementation
        real = padding.bool()
        key = "logits" if name in DECODERS else "last_hidden_state"
        torch.testing.assert_close(found[key][real], expected[key][real], rtol=1e-4, atol=1e-4)
        for layer, attention in enumerate(expected.attentions):
            p = captured.last("patterns")[layer]
            rows = real[:, None, :, None].expand_as(p)
            torch.testing.assert_close(p[rows], attention[rows], rtol=1e-4, atol=1e-5)
            v = captured.last("values")[layer]
            v = v.repeat_interleave(4 // v.shape[1], 1)
            rows = rows[..., :1].expand_as(v)
            torch.testing.assert_close((p @ v)[rows], captured.last("outputs")[layer][rows], rtol=1e-4, atol=1e-5)


def test_hugging_face_decoding_with_a_cache():
    model = _shaken(_hf("llama")).double()
    tokens = torch.randint(3, 31, (B, T))
    whole, _ = _calls(model, input_ids=tokens)
    with torch.no_grad():
        cache = model(input_ids=tokens[:, : T - 1], use_cache=True).past_key_values
    last, _ = _calls(model, input_ids=tokens[:, T - 1 :], past_key_values=cache)
    for full, one in zip(whole, last, strict=True):
        torch.testing.assert_close(one.pattern(), full.pattern()[:, :, T - 1 :])


def test_hugging_face_float64_is_float64():
    model = _shaken(_hf("llama")).double()
    (call, _), _ = _calls(model, input_ids=torch.randint(3, 31, (B, T)))
    assert call.pattern().dtype == torch.float64
    torch.testing.assert_close(call.pattern() @ call.values_by_head(), call.outputs, rtol=0, atol=1e-12)


def test_learned_sinks_of_a_hugging_face_model():
    """gpt-oss passes a logit of nothing for each head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=31,
        intermediate_size=16, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        sliding_window=4, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, 31, (B, T))
    with torch.no_grad():
        expected = model(input_ids=tokens, output_attentions=True)
    calls, out = _calls(model, input_ids=tokens)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for call, attention in zip(calls, expected.attentions, strict=True):
        torch.testing.assert_close(call.pattern(), attention, rtol=1e-4, atol=1e-6)
        assert (call.pattern().sum(-1) < 1).all()


def test_attention_inside_a_models_own_forward_is_refused():
    model = _hf("mpnet")
    refused = pytest.raises(ValueError, match="no attention patterns: MPNetSelfAttention computes its attention inside")
    with refused, capture(model), torch.no_grad():
        model(input_ids=torch.randint(3, 31, (B, T)))
    with capture(model, ["outputs"]) as captured, torch.no_grad():
        model(input_ids=torch.randint(3, 31, (B, T)))
    assert captured.last("outputs")[0].shape == (B, 4, T, 6)


def test_a_module_whose_parts_are_used_by_another_has_outputs_alone():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = zoo.build("gqa")

        def forward(self, x):
            return self.attn.o_proj(x)

    model, x = Around(), torch.randn(B, T, zoo.E, dtype=torch.float64)
    with capture(model, ["outputs"]) as captured:
        model(x)
    assert torch.equal(captured.last("outputs")[0].transpose(1, 2).flatten(2), x)
    refused = pytest.raises(ValueError, match=r"no attention patterns: the forward of .* was not called")
    with refused, capture(model):
        model(x)


def test_what_cannot_be_captured_says_why():
    module = zoo.build("gqa")
    with pytest.raises(ValueError, match=r"what must name some of 'queries', .* got \('maps',\)"):
        capture(module, ["maps"]).__enter__()
    with pytest.raises(ValueError, match="layers must lie between 0 and 0, got 1"):
        capture(module, layers=[1]).__enter__()
    for layers, message in (([0.0], "layers must be integers, got 0.0"), (0, "layers must be several integers, got 0")):
        with pytest.raises(ValueError, match=message):
            capture(module, layers=layers).__enter__()
    with pytest.raises(ValueError, match=r"takes no hooks on its heads: .*attnzoo.conversion.from_mha"):
        capture(nn.MultiheadAttention(8, 2)).__enter__()
    with capture(module, ["outputs"]) as captured:
        with pytest.raises(ValueError, match="capture must contain a forward pass of the model, got none"):
            captured.last("outputs")
        with pytest.raises(ValueError, match="kind must be one of the captured 'outputs', got 'patterns'"):
            captured.last("patterns")
    (call,), _ = _calls(module, torch.randn(1, 3, zoo.E, dtype=torch.float64))
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        next(call.pattern_blocks(0))
    with pytest.raises(ValueError, match=r"block must be an integer, got 1\.5"):
        next(call.pattern_blocks(1.5))


def test_a_layer_that_runs_twice_in_a_pass_is_refused_by_capture_and_observed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = zoo.build("gqa")

        def forward(self, x):
            return self.attn(self.attn(x))

    model, x = Twice(), torch.randn(B, T, zoo.E, dtype=torch.float64)
    assert len(_calls(model, x)[0]) == 2
    refused = pytest.raises(ValueError, match="layer 'attn' runs more than once in a forward pass: use observe")
    with refused, capture(model):
        model(x)
