"""Factors of heads against what models compute: families are told apart by their structure, or refused by name."""

import re

import pytest
import torch
from torch import nn

import attnzoo.diagnostics.layers as al
from attnzoo.diagnostics.heads.observe import capture
from tests.diagnostics import families

pytest.importorskip("transformers")

# Orders of fused rows, norms of queries and keys by many names, of single heads and of all of them, gains of 1 + w.
DOZEN = {
    "Llama": {}, "Qwen3": {}, "Gemma2": {}, "Olmo2": {}, "GPT2": {}, "GPTNeoX": {}, "Bert": {}, "OPT": {},
    "Cohere": {"use_qk_norm": True}, "Cohere2": {}, "StableLm": {"qk_layernorm": True},
    "Persimmon": {"qk_layernorm": True}, "Lfm2": {}, "HunYuanDenseV1": {},
    "GPTBigCode": {"multi_query": False}, "Llama4Text": {},
}  # fmt: skip


def inputs_and_heads(model):
    """Per layer that ran: states (B, E) that queries and keys come from, of one token at position 0, and both.

    Queries are (B, H, D), keys (B, G, D).
    """
    inputs = {}
    for layer in al.attention_layers(model):

        def note(_, args, options, index=layer.index):
            states = args[0] if args else options["hidden_states"]
            other = [options.get(name) for name in ("key_value_states", "encoder_hidden_states")]
            context = next((x for x in other if x is not None), states)
            inputs[index] = (states[:, 0], context[:, 0])

        layer.module.register_forward_pre_hook(note, with_kwargs=True)
    with capture(model, ["queries", "keys"]) as captured, torch.no_grad():
        model(input_ids=torch.tensor([[5], [9], [11]]))
    (found,) = captured.passes
    return {index: (*inputs[index], seen.queries[:, :, 0], seen.keys[:, :, 0]) for index, seen in found.items()}


def assert_factors_give(layer, x, context, queries, keys, within=1e-6):
    """WQ x and WK x are the queries and keys, up to the statistics of norms, which are positive factors."""
    factors = layer.qk_factors()
    keys = keys.repeat_interleave(layer.num_heads // keys.shape[1], 1)
    for side, (states, found) in enumerate(((x, queries), (context, keys))):
        expected = torch.stack([states @ pair[side].T for pair in factors], 1)
        stretch = found.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(expected * stretch, found, atol=within * float(found.abs().max()), rtol=0)
        if not any("norm" in name.lower() for name, _ in layer.module.named_modules()):
            # A model may scale its queries before attention does.
            torch.testing.assert_close(stretch, stretch[:1, :1].expand_as(stretch), atol=within, rtol=within)


@pytest.mark.parametrize("name", DOZEN)
def test_factors_are_those_of_queries_and_keys(name):
    with families.quiet():
        model = families.model_of(name, biases=False, **DOZEN[name])
    layers = al.attention_layers(model)
    seen = inputs_and_heads(model)
    assert seen.keys() == {layer.index for layer in layers}
    for layer in layers:
        assert_factors_give(layer, *seen[layer.index])


def test_factors_of_latent_attention():
    """Weights multiplied out by hand, gains of the norms of latents included."""
    with families.quiet():
        model = families.model_of("DeepseekV3", q_lora_rank=16, kv_lora_rank=12)
    for layer in al.attention_layers(model):
        m = layer.module
        nope, rope = m.qk_nope_head_dim, m.qk_rope_head_dim
        query = m.q_b_proj.weight @ torch.diag(m.q_a_layernorm.weight) @ m.q_a_proj.weight
        latent, turned = m.kv_a_proj_with_mqa.weight.split([12, rope])
        up = (m.kv_b_proj.weight @ torch.diag(m.kv_a_layernorm.weight)).view(layer.num_heads, -1, 12)
        assert (layer.num_heads, layer.head_dim) == (4, nope + rope)
        for head, ((wq, wk), (wv, wo)) in enumerate(zip(layer.qk_factors(), layer.ov_factors(), strict=True)):
            keys = torch.cat([up[head, :nope] @ latent, turned])
            torch.testing.assert_close(wq.T @ wk, query.view(4, nope + rope, -1)[head].T @ keys)
            out = m.o_proj.weight.view(-1, 4, layer.v_head_dim)[:, head]
            torch.testing.assert_close(wo @ wv, out @ up[head, nope:] @ latent)


class Matmuls(torch.overrides.TorchFunctionMode):
    """Operands of products, for models that compute attention in their own forward."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("matmul", "baddbmm", "bmm", "__matmul__", "scaled_dot_product_attention"):
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            self.operands.append(tensors[-2:] if func.__name__ == "baddbmm" else tensors)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Bloom", {}), ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("Falcon", {"multi_query": True}), ("Falcon", {"multi_query": False}), ("GPTJ", {}),
        ("GPTBigCode", {"multi_query": True}), ("T5Encoder", {}),
    ],
)  # fmt: skip
def test_factors_of_models_with_attention_of_their_own(name, options):
    with families.quiet():
        model = families.model_of(name.removesuffix("Encoder"), biases=False, **options)
    model = model.encoder if name == "T5Encoder" else model
    layer = al.attention_layers(model)[0]
    states = []
    layer.module.register_forward_pre_hook(
        lambda _, args, more: states.append(args[0] if args else more["hidden_states"]), with_kwargs=True
    )
    modes = []

    def enter(*_):
        modes.append(Matmuls())
        modes[-1].__enter__()

    layer.module.register_forward_pre_hook(enter)
    layer.module.register_forward_hook(lambda *_: modes[-1].__exit__(None, None, None))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    q, k = (torch.cat([pair[side] @ states[0][0, 0] for pair in layer.qk_factors()]) for side in range(2))

    def shows(operand, expected):
        """The same numbers, of heads that may share a key."""
        flat = operand.reshape(-1)
        if flat.numel() < expected.numel():
            flat = operand.reshape(layer.num_kv_heads, -1).repeat_interleave(layer.num_heads // layer.num_kv_heads, 0)
        return flat.numel() == expected.numel() and torch.allclose(flat.flatten().double(), expected, atol=1e-5)

    assert any(shows(some[0], q) and shows(some[1], k) for some in modes[0].operands)


class Lookalike(nn.Module):
    """Names of a family that is known, and another order of the rows of heads."""

    def __init__(self, heads_last):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))
        self.num_heads, self.heads_last = 4, heads_last

    def forward(self, hidden_states):
        B, T, _ = hidden_states.shape
        q, k, v = (
            p(hidden_states).view(B, T, 6, 4).permute(0, 3, 1, 2) if self.heads_last
            else p(hidden_states).view(B, T, 4, 6).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # fmt: skip
        heads = (q @ k.mT / 6**0.5).softmax(-1) @ v
        return self.o_proj(heads.transpose(1, 2).flatten(2))


def test_lookalikes_are_refused_by_name():
    known, other = (al.attention_layers(Lookalike(heads_last))[0] for heads_last in (False, True))
    assert torch.equal(known.qk_factors()[1][0], known.module.q_proj.weight[6:12])
    for read in (other.qk_factors, other.ov_factors):
        with pytest.raises(ValueError, match="layer '' cannot be read: Lookalike does not compute the queries, keys"):
            read()


class SharedNorm(Lookalike):
    def __init__(self, norm):
        super().__init__(False)
        self.anything = norm

    def forward(self, hidden_states):
        B, T, _ = hidden_states.shape
        q, k, v = (p(hidden_states).view(B, T, 4, 6).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        heads = (self.anything(q) @ self.anything(k).mT).softmax(-1) @ v
        return self.o_proj(heads.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("norm", [nn.RMSNorm(6), nn.LayerNorm(6)])
def test_norms_are_found_whatever_their_name(norm):
    layer = al.attention_layers(families.shaken(SharedNorm(norm)))[0]
    gain = norm.weight.detach()
    weight = layer.module.q_proj.weight.detach()[6:12]
    centred = weight - weight.mean(0) if isinstance(norm, nn.LayerNorm) else weight
    torch.testing.assert_close(layer.qk_factors()[1][0], gain[:, None] * centred, atol=1e-9, rtol=0)


def test_what_a_norm_cannot_be_is_refused():
    class Bent(nn.Module):
        def forward(self, x):
            return x.abs() + x

    with pytest.raises(ValueError, match="SharedNorm does not compute"):
        al.attention_layers(SharedNorm(Bent()))[0].qk_factors()
    with pytest.raises(ValueError, match="must have its weights to be read, got a module on the meta device"):
        al.attention_layers(SharedNorm(nn.RMSNorm(6)).to("meta"))[0].qk_factors()


def test_a_check_leaves_no_trace():
    model = families.model_of("StableLm", qk_layernorm=True)
    layer = al.attention_layers(model)[0]
    calls = []
    handle = layer.module.q_proj.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = [dict(module.__dict__) for module in model.modules()]
    config = model.config.to_dict()
    layer.qk_factors(), layer.ov_factors()
    assert not calls
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.config.to_dict() == config
    handle.remove()
    layer.module.q_proj(torch.zeros(1, 32).double())
    assert not calls


def refused_with(function):
    """The message of the ValueError that a call raises, or None."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_every_text_family():
    """Found by what transformers holds: each is right, refused by name, or not claimed."""
    right, refused, other = [], [], []
    with families.quiet():
        for name in families.text_families():
            try:
                model = families.model_of(name, False, torch.float32, **dict.fromkeys(families.NORMS, True))
                layers = al.attention_layers(model)
                seen = inputs_and_heads(model)
            except Exception as reason:  # needs other sizes or inputs, or is not claimed
                other.append(f"{name}: {type(reason).__name__}")
                continue
            for layer in layers:
                if layer.index not in seen:
                    continue
                refusal = refused_with(layer.qk_factors)
                if refusal is None:
                    assert_factors_give(layer, *seen[layer.index], within=1e-4)
                    right.append(name)
                else:
                    assert f"cannot be read: {type(layer.module).__name__} does not" in refusal, name
                    refused.append(name)
    assert len(set(right)) >= 90, (sorted(set(right)), sorted(set(refused)), other)


@pytest.mark.slow
def test_every_attention_class_is_read_or_refused_in_a_sentence():
    read = refused = 0
    with families.quiet():
        for cls, configs in families.attention_classes():
            module = families.attention_of(cls, configs)
            if module is None:
                continue
            refusal = refused_with(lambda module=module: al.attention_layers(module)[0].qk_factors())
            read += refusal is None
            sentence = r"model must contain|layer '.*' (cannot be read|does not fit|must have)"
            assert refusal is None or re.match(sentence, refusal), cls
            refused += refusal is not None and "cannot be read" in refusal
    assert read >= 250, (read, refused)
