"""How attention modules of transformers are read, by the names of their classes.

Two families can have the same projections and rotate differently, so structure alone never decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.rotary import Rotary

State = dict[str, Tensor]
Read = Callable[[Any, Any], tuple[nn.Module, State]]
Write = Callable[[State], State]


class Family(NamedTuple):
    """How one class of attention modules is read.

    Attributes:
        read: (module, the module that holds it) -> (attnzoo module, its state dict).
        write: the state dict of a module of attnzoo -> that of the original class, or None.
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
        write: the state dict of the attnzoo module -> that of the class, for `restore`.
        projection: path of the output projection inside `layer`, if the class does not have its own. The module that is
            there becomes nn.Identity.
    """
    FAMILIES[name] = Family(read, write, projection)


def family_of(module: nn.Module) -> Family | None:
    """The family of a module's class, or None."""
    return FAMILIES.get(type(module).__name__)


def rotary_of(config: Any, layer_type: str | None = None, *, style: str = "half", dim: int | None = None) -> Rotary:
    """The rotation that a configuration of transformers describes.

    Args:
        config: with `rope_parameters`, for all layers or by their types.
        layer_type: key of the latter.
        style: layout of the rotated pairs.
        dim: rotary width. Default: the whole head.
    """
    parameters = config.rope_parameters
    parameters = parameters.get(layer_type, parameters)
    kind = parameters.get("rope_type", "default")
    scaling = None
    if kind != "default":
        own = ("rope_theta", "partial_rotary_factor")
        scaling = {key: value for key, value in parameters.items() if key not in own and value is not None}
        scaling |= {"max_position_embeddings": config.max_position_embeddings}
    return Rotary(float(parameters["rope_theta"]), dim, style, scaling)


def rotated_width(config: Any, head_dim: int) -> int | None:
    """Features of a head that rotate, None for all of them."""
    width = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return None if width == head_dim else width


# Separate projections under the names of the grouped family


def read_separate(
    module: Any,
    layer: Any,  # noqa: ARG001  (the signature of a reader)
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
    attn = GroupedQueryAttention(
        embed_dim, rows // width, module.k_proj.weight.shape[0] // width, width,
        bias=module.q_proj.bias is not None, o_bias=module.o_proj.bias is not None, qk_norm=qk_norm,
        qk_norm_eps=_eps(module.q_norm) if qk_norm else 1e-6,
        rope=rotary_of(module.config, module.layer_type if by_layer_type else None),
        scale=module.scaling, logit_softcap=module.attn_logit_softcapping if softcap else None,
        sliding_window=window(module), sink="learned" if sinks else None, causal=module.is_causal,
        dropout=module.attention_dropout, device="meta",
    )  # fmt: skip
    state = dict(module.named_parameters())
    if gain:
        state |= {name: state[name] + gain for name in _NORMS}
    return attn, state


_NORMS = ("q_norm.weight", "k_norm.weight")


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def _as_it_is(state: State) -> State:
    return state


# Fused projections


def read_gpt2(module: Any, layer: Any) -> tuple[nn.Module, State]:  # noqa: ARG001
    """GPT-2: one Conv1D (E, 3 E) of queries, keys and values."""
    attn = GroupedQueryAttention(
        module.embed_dim, module.num_heads, bias=True, rope=None, scale=module.scaling, causal=module.is_causal,
        dropout=module.attn_dropout.p, device="meta",
    )  # fmt: skip
    weights, biases = module.c_attn.weight.T.chunk(3), module.c_attn.bias.chunk(3)
    return attn, _named(weights, biases) | {"o_proj.weight": module.c_proj.weight.T, "o_proj.bias": module.c_proj.bias}


def write_gpt2(state: State) -> State:
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


register_family("LlamaAttention", read_separate, write=_as_it_is)
register_family("GPT2Attention", read_gpt2, write=write_gpt2)
