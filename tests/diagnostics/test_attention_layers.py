"""Attention found in any model, and the weights of its heads."""

import pytest
import torch
from torch import nn

import attnzoo
import attnzoo.diagnostics.layers as al
from attnzoo.diagnostics.heads.observe import capture
from attnzoo_recipes.lm import DecoderLM
from tests import zoo

LINEAR_IN_VALUES = ("mha", "mqa", "gqa", "gta", "kha-linear", "kha-gta", "moh", "moh-norm")
COMMON = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 10, "intermediate_size": 20}


def _hf(name, **extra):
    """A small transformers model of that family with random weights."""
    transformers = pytest.importorskip("transformers")
    plain = {**COMMON, "intermediate_size": 20}
    made = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
        "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 3}),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**GROUPED, "head_dim": 6}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
        "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "attn_logit_softcapping": 1.5,
                   "sliding_window": 4, "query_pre_attn_scalar": 7}),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED),
        "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**plain, "num_key_value_heads": 2}),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 31,
                 "n_positions": 64}),
        "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**plain, "rotary_pct": 0.5}),
        "bert": ("BertConfig", "BertModel", plain),
        "roberta": ("RobertaConfig", "RobertaModel", plain),
        "electra": ("ElectraConfig", "ElectraModel", {**plain, "embedding_size": 24}),
        "distilbert": ("DistilBertConfig", "DistilBertModel", {"dim": 24, "n_layers": 2, "n_heads": 4,
                       "hidden_dim": 20, "vocab_size": 31}),
        "mpnet": ("MPNetConfig", "MPNetModel", plain),
        "opt": ("OPTConfig", "OPTForCausalLM", {**COMMON, "ffn_dim": 20, "word_embed_proj_dim": 24}),
    }  # fmt: skip
    config, model, options = made[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    return getattr(transformers, model)(getattr(transformers, config)(**{**options, **tokens, **extra})).eval()


DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "gpt2", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta", "electra", "distilbert")
FAMILIES = (*DECODERS, *ENCODERS, "mpnet")


def _shaken(model):
    """Norm gains off 1 and everything large enough to matter."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", zoo.MECHANISMS)
def test_every_mechanism_is_found(name):
    module = zoo.build(name)
    (layer,) = al.attention_layers(module)
    assert (layer.name, layer.index, layer.family, layer.module) == ("", 0, "attnzoo", module)
    x = torch.randn(2, 7, zoo.E, dtype=torch.float64)
    seen = []
    handle = layer.hook_heads(lambda heads: seen.append(heads.shape))
    module(x)
    handle.remove()
    module(x)
    assert seen == [(2, 7, layer.num_heads, layer.v_head_dim)]
    if name not in zoo.names("circuits"):
        with pytest.raises(ValueError, match="no fixed matrix gives"):
            layer.ov_factors()
        with pytest.raises(ValueError, match="part must be 'factors'"):
            layer.qk_factors()
        return
    assert all(wv.shape[0] == wo.shape[1] == layer.v_head_dim for wv, wo in layer.ov_factors())
    assert all(not w.requires_grad for pair in layer.ov_factors() + layer.qk_factors() for w in pair)
    assert {wq.shape[0] for wq, _ in layer.qk_factors()} == {wk.shape[0] for _, wk in layer.qk_factors()}


@pytest.mark.parametrize("name", LINEAR_IN_VALUES)
def test_values_of_one_token_go_straight_through(name):
    """A token that sees itself alone: y = sum_h gate_h WO_h WV_h x."""
    module = zoo.build(name, bias=False, **({"knock_v": "linear"} if name == "kha-gta" else {}))
    (layer,) = al.attention_layers(module)
    x = torch.randn(3, 1, zoo.E, dtype=torch.float64)
    gates = module.gates(x, module.q_proj(x).unflatten(-1, (4, -1)))[0] if name.startswith("moh") else torch.ones(4)
    parts = [x @ (wo @ wv).T * gates[..., h, None] for h, (wv, wo) in enumerate(layer.ov_factors())]
    torch.testing.assert_close(module(x), torch.stack(parts).sum(0))


@pytest.mark.parametrize("scope", ["tied", "value"])
def test_knocked_values_have_the_map_in_them(scope):
    module = zoo.build("kha-gta", bias=False, knock_v="linear", knock_scope=scope)
    (layer,) = al.attention_layers(module)
    x = torch.randn(3, 1, zoo.E, dtype=torch.float64)
    torch.testing.assert_close(module(x), sum(x @ (wo @ wv).T for wv, wo in layer.ov_factors()))


@pytest.mark.parametrize("name", ["mla", "mla-pre", "kha-mla"])
def test_latent_values_go_straight_through_but_for_the_statistics(name):
    module = zoo.build(name)
    (layer,) = al.attention_layers(module)
    x = torch.randn(3, 1, zoo.E, dtype=torch.float64)
    expected = sum(x @ (wo @ wv).T for wv, wo in layer.ov_factors())
    ratio = module(x) / expected
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


def test_experts_have_their_own_values():
    module = zoo.build("moa", rope=None)
    module.o_bias = None
    (layer,) = al.attention_layers(module)
    assert len(layer.ov_factors()) == len(layer.qk_factors()) == module.num_experts * module.heads_per_expert
    x = torch.randn(1, 1, zoo.E, dtype=torch.float64)
    chosen, gates = module._gates(module.router_logits(x))
    M, factors = module.heads_per_expert, layer.ov_factors()
    expected = sum(
        gate * x @ (factors[int(n) * M + m][1] @ factors[int(n) * M + m][0]).T
        for n, gate in zip(chosen[0, 0], gates[0, 0], strict=True)
        for m in range(M)
    )
    torch.testing.assert_close(module(x), expected)


def test_factors_follow_pruned_heads():
    module = zoo.build("gqa")
    before = al.attention_layers(module)[0].ov_factors()
    module.prune_heads([0, 3])
    (layer,) = al.attention_layers(module)
    assert (layer.num_heads, layer.num_kv_heads) == (2, 2)
    for h, (wv, wo) in zip((1, 2), layer.ov_factors(), strict=True):
        torch.testing.assert_close(wv, before[h][0])
        torch.testing.assert_close(wo, before[h][1])


def test_layers_of_the_recipe_come_in_depth_order():
    model = DecoderLM(
        50, lambda E: attnzoo.GroupedQueryAttention(E, 4, 2), embed_dim=32, num_layers=3, mlp_dim=16
    )  # fmt: skip
    layers = al.attention_layers(model)
    assert [layer.name for layer in layers] == [f"blocks.{i}.attn" for i in range(3)]
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert layers[1].output is model.blocks[1].attn.o_proj


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_layers(name):
    model = _shaken(_hf(name)).double()
    layers = al.attention_layers(model)
    assert [layer.index for layer in layers] == [0, 1]
    grouped = name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2")
    wide = grouped and name not in ("qwen2", "olmo2")
    for layer in layers:
        assert (layer.num_heads, layer.num_kv_heads) == (4, 2 if grouped else 4)
        assert layer.head_dim == layer.v_head_dim == (10 if wide else 6)
        assert model.get_submodule(layer.name) is layer.module
    seen = []
    for layer in layers:
        layer.hook_heads(lambda heads: seen.append(heads.shape))
    model(input_ids=torch.randint(3, 31, (2, 5)))
    assert seen == [(2, 5, 4, layers[0].v_head_dim)] * 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mpnet"])
def test_factors_give_scores_and_outputs_of_a_hugging_face_model(name):
    """Offset 0: q_t . k_t = x^T WQ^T WK x, up to the norms' statistics; one token: y = sum_h WO_h WV_h x + bias."""
    model = _shaken(_hf(name)).double()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if label.endswith("bias") and "norm" not in label.lower():
                parameter.zero_()
    layer = al.attention_layers(model)[1]
    inputs, outputs = [], []
    layer.module.register_forward_pre_hook(
        lambda _, args, options: inputs.append(args[0] if args else options["hidden_states"]), with_kwargs=True
    )
    layer.output.register_forward_hook(lambda _, __, out: outputs.append(out))
    with capture(model, ["queries", "keys"]) as captured, torch.no_grad():
        model(input_ids=torch.randint(3, 31, (2, 1)))
    x = inputs[0]
    expected = sum(x @ (wo @ wv).T for wv, wo in layer.ov_factors())
    torch.testing.assert_close(outputs[0].view_as(expected), expected)
    q, k = captured.last("queries")[1][:, :, 0], captured.last("keys")[1][:, :, 0]
    found = (q * k.repeat_interleave(4 // k.shape[1], 1)).sum(-1)
    expected = torch.stack([((x @ wq.T) * (x @ wk.T)).sum(-1)[:, 0] for wq, wk in layer.qk_factors()], -1)
    ratio = found / expected
    normed = name in ("qwen3", "gemma3", "olmo2")
    # With a norm each token's (and head's) statistic stays as a positive factor.
    assert (ratio > 0).all()
    if not normed:
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-6, atol=0)
    if name == "olmo2":
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-6, atol=0)
    if name in ("qwen3", "gemma3"):
        for head, (wq, wk) in enumerate(layer.qk_factors()):
            gain_q, gain_k = (
                (norm.weight if name == "qwen3" else 1 + norm.weight).detach().double()
                for norm in (layer.module.q_norm, layer.module.k_norm)
            )
            rms = [(x[:, 0] @ (w / g[:, None]).T).square().mean(-1).sqrt() for w, g in ((wq, gain_q), (wk, gain_k))]
            torch.testing.assert_close(ratio[:, head] * rms[0] * rms[1], torch.ones(2).double(), rtol=1e-4, atol=0)


def test_parts_of_hugging_face_factors():
    (layer, _) = al.attention_layers(_hf("gpt_neox"))
    for (whole, _), (rope, _), (rest, _) in zip(
        layer.qk_factors(), layer.qk_factors("rope"), layer.qk_factors("nope"), strict=True
    ):
        assert rope.shape == rest.shape == (3, 24)
        assert torch.equal(torch.cat([rope, rest]), whole)
    (layer, _) = al.attention_layers(_hf("llama"))
    with pytest.raises(ValueError, match=r"part must be one that layer 'model.layers.0.self_attn' has"):
        layer.qk_factors("nope")
    with pytest.raises(ValueError, match="part must be 'full', 'rope' or 'nope', got 'half'"):
        layer.qk_factors("half")
    (layer, _) = al.attention_layers(_hf("bert"))
    with pytest.raises(ValueError, match="part must be 'full' for a layer without rotary features, got 'rope'"):
        layer.qk_factors("rope")


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 3}])
def test_torch_attention_has_weights_but_takes_no_hooks(sizes):
    module = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
    (layer,) = al.attention_layers(nn.Sequential(module))
    assert (layer.name, layer.num_heads, layer.head_dim, layer.family) == ("0", 2, 4, "torch")
    value = torch.randn(1, 1, sizes.get("vdim", 8))
    expected = module(torch.randn(1, 1, 8), torch.randn(1, 1, sizes.get("kdim", 8)), value)[0]
    found = sum(value @ (wo @ wv).T for wv, wo in layer.ov_factors())
    torch.testing.assert_close(found, expected)
    for use in (lambda: layer.output, lambda: layer.hook_heads(lambda heads: None)):
        with pytest.raises(ValueError, match=r"layer '0' takes no hooks on its heads: torch.nn.Multi.*from_mha"):
            use()


def test_heads_can_be_scaled_through_the_hook():
    module = zoo.build("gqa")
    (layer,) = al.attention_layers(module)
    x = torch.randn(2, 5, zoo.E, dtype=torch.float64)
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0]).double()
    handle = layer.hook_heads(lambda heads: heads * scale[:, None])
    scaled = module(x)
    handle.remove()
    with torch.no_grad():
        module.o_proj.weight.mul_(scale.repeat_interleave(layer.v_head_dim))
    torch.testing.assert_close(scaled, module(x))


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match=r"model must contain attention of a known family .*attnzoo.*got Linear"):
        al.attention_layers(nn.Linear(2, 2))


def test_a_layout_that_does_not_fit_is_refused():
    class Gated(nn.Module):
        """Queries and gates in one projection."""

        def __init__(self):
            super().__init__()
            self.head_dim = 4
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n) for n in (16, 8, 8))
            self.o_proj = nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"layer '0' does not fit family 'separate': .* 8 inputs, for 4 query"):
        al.attention_layers(nn.Sequential(Gated()))


def test_users_can_add_a_family():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wkv, self.out = nn.Linear(6, 6, False), nn.Linear(6, 6, False), nn.Linear(6, 6)

        def forward(self, x):
            q, (k, v) = self.wq(x), self.wkv(x).chunk(2, -1)
            q = q.unflatten(-1, (2, 3))
            p = (torch.einsum("bthd,bsd->bhts", q, k) / 3**0.5).softmax(-1)
            return self.out(torch.einsum("bhts,bsd->bthd", p, v).flatten(2))

    def read(name, index, module):
        return al.layer_of(
            name, index, module, "mine", module.out, lambda: (module.wq.weight, *module.wkv.weight.chunk(2)),
            num_heads=2, num_kv_heads=1,
        )  # fmt: skip

    before = dict(al._FAMILIES)
    try:
        al.register_family("mine", lambda module: isinstance(module, Mine), read)
        module = Mine()
        (layer,) = al.attention_layers(nn.Sequential(module))
        x = torch.randn(2, 1, 6)
        expected = sum(x @ (wo @ wv).T for wv, wo in layer.ov_factors()) + module.out.bias
        torch.testing.assert_close(module(x), expected)
        assert (layer.family, layer.num_heads, layer.num_kv_heads, layer.head_dim) == ("mine", 2, 1, 3)
    finally:
        al._FAMILIES.clear()
        al._FAMILIES.update(before)
