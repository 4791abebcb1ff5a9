"""How attention modules of transformers are read, by the names of their classes.

Two families can have the same projections and rotate differently, so structure alone never decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.conversion.layers import rotary_of, rotated_width
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.heads import HeadLayout
from attnzoo.modules.mla import MultiHeadLatentAttention

State = dict[str, Tensor]
Read = Callable[[Any, Any], tuple[nn.Module, State]]
Write = Callable[[State, Any], State]


class Family(NamedTuple):
    """How one class of attention modules is read.

    Attributes:
        read: (module, the module that holds it) -> (attnzoo module, its state dict).
        write: (the state dict of a module of attnzoo, the original module without numbers) -> the original's state
            dict, or None.
        projection: where the module that holds it keeps the output projection, if that is outside, such as
            "output.dense".
    """

    read: Read
    write: Write | None = None
    projection: str | None = None


FAMILIES: dict[str, Family] = {}
"""By the name of the class."""


def register_family(name: str, read: Read, *, write: Write | None = None, projection: str | None = None) -> None:
    """Teach `replace` another class of attention modules.

        def read(module, layer):
            attn = attnzoo.GroupedQueryAttention(module.width, module.heads, device="meta")
            return attn, {"q_proj.weight": module.wq.weight, ...}

        register_family("MyAttention", read)

    Args:
        name: of the class; a known name is replaced.
        read: (module, layer), where `layer` is the module that holds it -> an attnzoo module of the same function,
            best made on the meta device, and its state dict. Parameters in the state dict are taken as they are.
        write: (the state dict of the attnzoo module, a module of the class without numbers) -> the state dict of the
            class, without a projection outside; for `restore`.
        projection: path of the output projection inside `layer`, if the class does not have its own. The module that is
            there becomes nn.Identity.
    """
    FAMILIES[name] = Family(read, write, projection)


def family_of(module: nn.Module) -> Family | None:
    """The family of a module's class, or None."""
    return FAMILIES.get(type(module).__name__)


def heads_left(module: Any, layer: Any) -> HeadLayout | None:
    """The heads that `attnzoo.diagnostics.prune_heads` left of an attention module, or None where it has all."""
    layout: HeadLayout | None = getattr(module, "attnzoo_heads", None) or getattr(layer, "attnzoo_heads", None)
    return layout


def _pruned(attn: GroupedQueryAttention, left: HeadLayout | None) -> GroupedQueryAttention:
    """A module with all heads, without those that pruning took."""
    if left is not None:
        attn.prune_heads(left.pruned)
    return attn


# Separate projections under the names of the grouped family


def read_separate(
    module: Any,
    layer: Any,
    *,
    window: Callable[[Any], int | None] = lambda module: getattr(module, "sliding_window", None),
    qk_norm: Any = False,
    gain: float = 0.0,
    by_layer_type: bool = False,
    sinks: bool = False,
    softcap: bool = False,
) -> tuple[nn.Module, State]:
    """A module with q_proj, k_proj, v_proj and o_proj.

    Args:
        module: the module.
        layer: the module that holds it.
        window: reads its sliding window.
        qk_norm: as in `GroupedQueryAttention`.
        gain: added to the gains of the norms of queries and keys.
        by_layer_type: whether the rotation depends on the type of the layer.
        sinks: whether it has a learned logit `sinks` per head.
        softcap: whether it bounds the scores by `attn_logit_softcapping`.
    """
    width, (rows, embed_dim) = module.head_dim, module.q_proj.weight.shape
    left = heads_left(module, layer)
    H, G = rows // width, module.k_proj.weight.shape[0] // width
    H, G = (H, G) if left is None else (left.total, left.total // left.group_size)
    attn = GroupedQueryAttention(
        embed_dim, H, G, width,
        bias=module.q_proj.bias is not None, o_bias=module.o_proj.bias is not None, qk_norm=qk_norm,
        qk_norm_eps=_eps(module.q_norm) if qk_norm else 1e-6,
        rope=rotary_of(module.config, module.layer_type if by_layer_type else None),
        scale=module.scaling, logit_softcap=module.attn_logit_softcapping if softcap else None,
        sliding_window=window(module), sink="learned" if sinks else None, causal=module.is_causal,
        dropout=module.attention_dropout, device="meta",
    )  # fmt: skip
    state = dict(module.named_parameters())
    if gain:
        # Half precision would round the sum, which the original does not.
        state |= {name: _precise(state[name]) + gain for name in _NORMS}
    return _pruned(attn, left), state


_NORMS = ("q_norm.weight", "k_norm.weight")


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def write_as_it_is(state: State, module: Any) -> State:  # noqa: ARG001
    """A state dict under equal names."""
    return state


def write_separate(state: State, module: Any, *, gain: float = 0.0, **_: Any) -> State:  # noqa: ARG001
    """The inverse of `read_separate`."""
    dtype = state["q_proj.weight"].dtype
    return state | {name: (_precise(state[name]) - gain).to(dtype) for name in _NORMS if gain}


# Fused projections


def read_gpt2(module: Any, layer: Any) -> tuple[nn.Module, State]:
    """GPT-2: one Conv1D (E, 3 E) of queries, keys and values."""
    left = heads_left(module, layer)
    attn = GroupedQueryAttention(
        module.embed_dim, module.num_heads if left is None else left.total, bias=True, rope=None,
        scale=module.scaling, causal=module.is_causal, dropout=module.attn_dropout.p, device="meta",
    )  # fmt: skip
    weights, biases = module.c_attn.weight.T.chunk(3), module.c_attn.bias.chunk(3)
    state = _named(weights, biases)
    return _pruned(attn, left), state | {"o_proj.weight": module.c_proj.weight.T, "o_proj.bias": module.c_proj.bias}


def write_gpt2(state: State, module: Any) -> State:  # noqa: ARG001
    """The inverse of `read_gpt2`."""
    return {
        "c_attn.weight": torch.cat([state[f"{name}.weight"] for name in _PARTS]).T,
        "c_attn.bias": torch.cat([state[f"{name}.bias"] for name in _PARTS]),
        "c_proj.weight": state["o_proj.weight"].T,
        "c_proj.bias": state["o_proj.bias"],
    }


_PARTS = ("q_proj", "k_proj", "v_proj")


def _named(weights: Any, biases: Any = None) -> State:
    state = {f"{name}.weight": weight for name, weight in zip(_PARTS, weights, strict=True)}
    if biases is not None:
        state |= {f"{name}.bias": bias for name, bias in zip(_PARTS, biases, strict=True)}
    return state


def read_gpt_neox(module: Any, layer: Any) -> tuple[nn.Module, State]:
    """GPT-NeoX: one projection, whose rows are (H, 3, D)."""
    width, embed_dim = module.head_size, module.query_key_value.in_features
    attn = GroupedQueryAttention(
        embed_dim, embed_dim // width, bias=module.query_key_value.bias is not None,
        o_bias=module.dense.bias is not None, rope=rotary_of(module.config, dim=module.rotary_ndims),
        scale=module.scaling, causal=module.is_causal, dropout=module.attention_dropout, device="meta",
    )  # fmt: skip

    def parts(fused: Tensor) -> list[Tensor]:
        return [part.flatten(0, 1) for part in fused.unflatten(0, (-1, 3, width)).unbind(1)]

    fused = module.query_key_value
    state = _named(parts(fused.weight), None if fused.bias is None else parts(fused.bias))
    return _pruned(attn, heads_left(module, layer)), state | _under("o_proj", module.dense)


def write_gpt_neox(state: State, module: Any) -> State:
    """The inverse of `read_gpt_neox`."""

    def fused(key: str) -> Tensor:
        heads = [state[f"{name}.{key}"].unflatten(0, (-1, module.head_size)) for name in _PARTS]
        return torch.stack(heads, dim=1).flatten(0, 2)

    keys = [key for key in ("weight", "bias") if f"q_proj.{key}" in state]
    return {f"query_key_value.{key}": fused(key) for key in keys} | _renamed(state, o_proj="dense")


def read_phi3(module: Any, layer: Any) -> tuple[nn.Module, State]:  # noqa: ARG001
    """Phi-3: one projection, whose rows are all queries, all keys, all values."""
    config, width = module.config, module.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    attn = GroupedQueryAttention(
        module.qkv_proj.in_features, H, G, width, bias=module.qkv_proj.bias is not None,
        o_bias=module.o_proj.bias is not None, rope=rotary_of(config, dim=rotated_width(config, width)),
        scale=module.scaling, sliding_window=getattr(config, "sliding_window", None), causal=module.is_causal,
        dropout=module.attention_dropout, device="meta",
    )  # fmt: skip
    rows = [H * width, G * width, G * width]
    bias = module.qkv_proj.bias
    state = _named(module.qkv_proj.weight.split(rows), None if bias is None else bias.split(rows))
    return attn, state | _under("o_proj", module.o_proj)


def write_phi3(state: State, module: Any) -> State:  # noqa: ARG001
    """The inverse of `read_phi3`."""
    keys = [key for key in ("weight", "bias") if f"q_proj.{key}" in state]
    fused = {f"qkv_proj.{key}": torch.cat([state[f"{name}.{key}"] for name in _PARTS]) for key in keys}
    return fused | _renamed(state, o_proj="o_proj")


# Other families


def read_deepseek(module: Any, layer: Any) -> tuple[nn.Module, State]:  # noqa: ARG001
    """DeepSeek-V3: latent attention under the same names."""
    config = module.config
    attn = MultiHeadLatentAttention(
        module.o_proj.out_features, module.num_heads, module.kv_lora_rank, module.q_lora_rank,
        qk_nope_head_dim=module.qk_nope_head_dim, qk_rope_head_dim=module.qk_rope_head_dim,
        v_head_dim=module.v_head_dim, rope=rotary_of(config, style="interleaved" if config.rope_interleave else "half"),
        norm_eps=_eps(module.kv_a_layernorm), bias=module.o_proj.bias is not None, scale=module.scaling,
        causal=module.is_causal, dropout=module.attention_dropout, device="meta",
    )  # fmt: skip
    return attn, dict(module.named_parameters())


def read_bert(module: Any, layer: Any) -> tuple[nn.Module, State]:
    """BERT: projections in `self`, the last in `output`."""
    out, left = layer.output.dense, heads_left(module, layer)
    attn = GroupedQueryAttention(
        module.query.in_features, module.num_attention_heads if left is None else left.total, None,
        module.attention_head_size, bias=module.query.bias is not None, o_bias=out.bias is not None, rope=None,
        scale=module.scaling, causal=module.is_causal, dropout=module.dropout.p, device="meta",
    )  # fmt: skip
    parts = {"q_proj": module.query, "k_proj": module.key, "v_proj": module.value, "o_proj": out}
    state: State = {}
    for name, linear in parts.items():
        state |= _under(name, linear)
    return _pruned(attn, left), state


def write_bert(state: State, module: Any) -> State:  # noqa: ARG001
    """The inverse of `read_bert`, without the last projection."""
    return _renamed(state, q_proj="query", k_proj="key", v_proj="value")


def _under(name: str, linear: Any) -> State:
    return {f"{name}.{key}": parameter for key, parameter in linear.named_parameters()}


def _renamed(state: State, **names: str) -> State:
    """Weights and biases of these projections under other names."""
    return {
        f"{names[name]}.{key}": tensor
        for name, key, tensor in ((*path.rpartition(".")[::2], tensor) for path, tensor in state.items())
        if name in names
    }


def _of_config(module: Any) -> int | None:
    window: int | None = getattr(module.config, "sliding_window", None)
    return window


def _separate(name: str, **options: Any) -> None:
    register_family(name, partial(read_separate, **options), write=partial(write_separate, **options))


_separate("LlamaAttention")
_separate("MistralAttention", window=_of_config)
_separate("Qwen2Attention")
_separate("Qwen3Attention", qk_norm=True)
_separate("Gemma2Attention", softcap=True)
_separate("Gemma3Attention", qk_norm=True, gain=1.0, by_layer_type=True)
_separate("GptOssAttention", sinks=True)
_separate("Olmo2Attention", qk_norm="joint")
register_family("GPT2Attention", read_gpt2, write=write_gpt2)
register_family("GPTNeoXAttention", read_gpt_neox, write=write_gpt_neox)
register_family("Phi3Attention", read_phi3, write=write_phi3)
register_family("DeepseekV3Attention", read_deepseek, write=write_as_it_is)
register_family("BertSelfAttention", read_bert, write=write_bert, projection="output.dense")
