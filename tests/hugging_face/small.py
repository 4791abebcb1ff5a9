"""Small random models of every family that attnzoo.hugging_face knows."""

# ruff: noqa: C408  (options of constructors)

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import transformers

SIZES = dict(
    vocab_size=67, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=96, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    sliding_window=6, tie_word_embeddings=False,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 4.0,
    "truncate": False,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e3, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 12,
}  # fmt: skip
TYPES = ["sliding_attention", "full_attention"]
FUSED = dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=2)

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", dict(attention_bias=True)),
    "llama3": ("Llama", dict(rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24})),
    "llama-linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0})),
    "llama-dynamic": ("Llama", dict(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e3, "factor": 3.0}, max_position_embeddings=12)),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN)),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", dict(layer_types=TYPES, use_sliding_window=True)),
    "qwen3": ("Qwen3", dict(layer_types=TYPES, use_sliding_window=True)),
    "gemma2": ("Gemma2", dict(query_pre_attn_scalar=7, attn_logit_softcapping=2.0, layer_types=TYPES)),
    "gemma3": ("Gemma3", dict(query_pre_attn_scalar=7, layer_types=TYPES, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}})),
    "gpt-oss": ("GptOss", dict(
        rope_parameters=YARN, layer_types=TYPES, num_local_experts=3, num_experts_per_tok=2, attention_bias=True)),
    "gpt2": ("GPT2", dict(scale_attn_by_inverse_layer_idx=True, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)),
    "gpt-neox": ("GPTNeoX", FUSED | dict(rope_parameters={
        "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.4})),
    "phi3": ("Phi3", FUSED | dict(rope_parameters=LONGROPE | {"partial_rotary_factor": 0.4},
        original_max_position_embeddings=12)),
    "olmo2": ("Olmo2", {}),
    "deepseek-v3": ("DeepseekV3", dict(
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}, q_lora_rank=12, kv_lora_rank=14,
        qk_nope_head_dim=6, qk_rope_head_dim=4, head_dim=4, v_head_dim=9, moe_intermediate_size=16, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, num_key_value_heads=4,
        attention_bias=True)),
    "deepseek-v3-half": ("DeepseekV3", dict(
        q_lora_rank=None, kv_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=4, head_dim=4, v_head_dim=9,
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, num_key_value_heads=4, rope_interleave=False)),
    "bert-decoder": ("Bert", dict(is_decoder=True, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)),
    "bert": ("Bert", dict(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)),
}  # fmt: skip
CAUSAL = [name for name in FAMILIES if name != "bert"]
HEADS = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "bert-decoder": "BertLMHeadModel"}


def config_of(name, **options):
    kind, own = FAMILIES[name]
    cls = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    default = cls()
    given = {**SIZES, **own, **options}
    if kind == "GPT2":
        given = {**given, "n_positions": given["max_position_embeddings"]}
    return cls(**{key: value for key, value in given.items() if hasattr(default, key) or key in own})


def small(name, seed=0, dtype=torch.float64, std=0.3, **options):
    """A random model whose attention is far from uniform, in eval mode."""
    torch.manual_seed(seed)
    kind = FAMILIES[name][0]
    cls = getattr(transformers, HEADS.get(name, f"{kind}ForCausalLM"))
    config = config_of(name, **options)
    config._experts_implementation = "eager"  # grouped products take no float64
    model = cls(config)
    if kind == "Gemma2":
        # transformers 5.5 takes sdpa by itself, which leaves the soft-cap out.
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return torch.nn.Module.to(model, dtype).eval()


@contextmanager
def lifted():
    """float32 in transformers' own code is float64: norms, softmax and rotation tables."""
    single, to = torch.float32, torch.Tensor.to

    def to_double(self, *args, **kwargs):
        args = [torch.float64 if arg is single else arg for arg in args]
        kwargs = {key: torch.float64 if value is single else value for key, value in kwargs.items()}
        return to(self, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", to_double))
        for name in ("float32", "float"):
            stack.enter_context(mock.patch.object(torch, name, torch.float64))
        stack.callback(torch.set_default_dtype, single)
        torch.set_default_dtype(torch.float64)
        yield
