"""Layers whose projections or whole model an adapter wraps: what is read is what they compute."""

import copy

import pytest
import torch
from torch import nn

from attnzoo.diagnostics import analyze_model, attention_layers, head_report
from attnzoo.diagnostics.batches import innermost
from attnzoo.diagnostics.projections import blank, matrix
from tests.diagnostics import families

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT asks models in a way that transformers gives up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

BASE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
LATENT = {
    "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
        "eos_token_id": 1}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    if name == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**BASE, num_key_value_heads=2, bos_token_id=1, eos_token_id=1)
        )
    elif name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    else:
        rank = 10 if name == "deepseek-q" else None
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**BASE, **LATENT, q_lora_rank=rank))
    return families.shaken(model, dtype=torch.float32)


def with_lora(model, target, **options):
    return peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False, lora_dropout=0.1, **options),
    )


CASES = [
    *(("llama", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("gpt2", name) for name in ("c_attn", "c_proj")),
    *(("deepseek", name) for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    *(("deepseek-q", name) for name in ("q_a_proj", "q_b_proj")),
]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_factors_of_an_adapter_are_those_of_the_merged_model(name, target):
    model = model_of(name)
    adapted = with_lora(model, target, fan_in_fan_out=name == "gpt2")
    merged = copy.deepcopy(adapted).merge_and_unload()
    adapted.train()
    own, expected, base = (attention_layers(each)[0] for each in (adapted, merged, model))
    change = 0.0
    for kind in ("qk_factors", "ov_factors"):
        for pair, wanted, before in zip(*(getattr(layer, kind)() for layer in (own, expected, base)), strict=True):
            for found, other, old in zip(pair, wanted, before, strict=True):
                torch.testing.assert_close(found, other, atol=1e-5 * float(other.abs().max()), rtol=1e-5)
                change = max(change, float((found - old).abs().max()))
    assert change > 0.01
    ours, theirs = (analyze_model(each, matrices=("qk", "ov")) for each in (adapted, merged))
    assert [r.lambda_max for r in ours] == pytest.approx([r.lambda_max for r in theirs], rel=1e-3)
    ids = torch.randint(3, 67, (1, 8))
    figures = [head_report(each, [{"input_ids": ids}]).table("entropy") for each in (adapted, merged)]
    torch.testing.assert_close(*figures, atol=1e-5, rtol=1e-5)


def test_projections_that_are_not_linear_are_refused_by_name():
    class Bent(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("needs a GPU")

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    model = model_of("llama")
    attention_layers(model)[0].module.o_proj = Bent(32, 32)
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn' cannot be read: its Bent is not linear"):
        attention_layers(model)[0].ov_factors()
    with pytest.raises(ValueError, match=r"its Broken does not work as a linear layer \(RuntimeError .* needs a GPU\)"):
        matrix(Broken(6, 4))
    pair = Pair(6, 4)
    torch.testing.assert_close(matrix(pair), pair.weight.detach())
    assert blank(Bent(6, 4)).shape == (4, 6)


def test_an_adapter_around_a_whole_attention_module_is_refused_until_it_is_merged():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    adapted = peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["attn"], r=2, init_lora_weights=False))
    (layer,) = attention_layers(adapted)
    for read in (layer.qk_factors, layer.ov_factors):
        with pytest.raises(ValueError, match=r"layer '.*attn' must have its adapter merged to be read, got Multihead"):
            read()
    (layer,) = attention_layers(adapted.merge_and_unload())
    assert layer.qk_factors()[0][0].shape == (4, 8)


def left_padded():
    ids = torch.randint(3, 67, (1, 8), generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    return ids, {"input_ids": tokens, "attention_mask": torch.tensor([[0] * 4 + [1] * 8])}


class Keywords(nn.Module):
    """A wrapper that hands on what it does not name, beside a part of its own."""

    def __init__(self, inner):
        super().__init__()
        self.head, self.inner = nn.Linear(2, 2), inner

    def forward(self, *inputs, **options):
        return self.inner(*inputs, **options)


@pytest.mark.parametrize("wrap", ["none", "peft", "parallel", "keywords", "compiled"])
def test_left_padding_moves_no_figure_of_a_wrapped_model(wrap):
    model = model_of("gpt2")
    if wrap == "peft":
        config = peft.LoraConfig(target_modules=["c_fc"], r=2, fan_in_fan_out=True, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config).eval()
    else:
        wrapped = {
            "none": lambda: model, "parallel": lambda: nn.DataParallel(model), "keywords": lambda: Keywords(model),
            "compiled": lambda: torch.compile(model, backend="eager"),
        }[wrap]()  # fmt: skip
    assert innermost(wrapped) is model
    ids, padded = left_padded()
    alone, left = (head_report(wrapped, [batch]).table("entropy") for batch in ({"input_ids": ids}, padded))
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)


def test_the_decoder_inside_a_wrapper_has_its_own_mask():
    config = transformers.T5Config(
        vocab_size=67, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 67, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :4]}
    plain, wrapped = (head_report(each, [batch]).table("entropy") for each in (model, nn.DataParallel(model)))
    torch.testing.assert_close(wrapped, plain, equal_nan=True)
