"""A trained layer as a mechanism with more parameters, which start where the function is that of the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attnzoo.conversion.heads import options_of, options_without
from attnzoo.modules.dcmha import DynamicallyComposableAttention
from attnzoo.modules.gated import GatedAttention
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.talking_heads import TalkingHeadsAttention


def to_dcmha(module: GroupedQueryAttention, **options: Any) -> DynamicallyComposableAttention:
    """The same layer as dynamically composable attention whose compositions start as the identity: equal in output.

    Of the generated projections the second factor v and the gate g start at 0, and a static base too; the first
    factor u keeps the official start. So all of them but the layer before u and v have a gradient at the first step.
    (The official start of a new layer is close to the identity only in comparison with random weights.)

    Args:
        module: multi-head, multi-query or grouped-query attention with values as wide as keys, without sinks, soft-cap,
            ALiBi and pruned heads.
        options: further options of `DynamicallyComposableAttention`, which do not change what `module` computes.
    """
    own = options_without(module, ("logit_softcap", "alibi", "sink_tokens", "sink"), "dynamically composable attention")
    if own["qk_norm"] == "joint":
        raise ValueError("module must not have qk_norm 'joint': dynamically composable attention normalises each head")
    if (own.pop("v_head_dim"), module.vdim) != (module.head_dim, module.kdim):
        raise ValueError("module must have v_head_dim equal to head_dim, and vdim to kdim, for composable attention")
    del own["vdim"]
    converted = DynamicallyComposableAttention(
        module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim,
        **own | _new_options(options, own, module),
    )  # fmt: skip
    with torch.no_grad():
        for side in (converted.q_dyn, converted.k_dyn):
            if side is not None:
                nn.init.zeros_(side.w2[..., converted.rank :, :])
                nn.init.zeros_(side.gate.weight)
        for base in (converted.pre_base, converted.post_base):
            if base is not None:
                nn.init.zeros_(base)
    converted.load_state_dict(converted.state_dict() | module.state_dict())
    return converted.train(module.training)


def to_talking_heads(module: GroupedQueryAttention, **options: Any) -> TalkingHeadsAttention:
    """The same layer as talking-heads attention whose mixes start as the identity: equal in output.

    Every query head gets a copy of the key/value head that it reads, so the cache of a grouped layer grows by H / G.

    Args:
        module: multi-head, multi-query or grouped-query attention without QK-norm, sinks, soft-cap, ALiBi and pruned
            heads.
        options: further options of `TalkingHeadsAttention`, which do not change what `module` computes.
    """
    lacking = ("qk_norm", "logit_softcap", "alibi", "sink_tokens", "sink")
    own = options_without(module, lacking, "talking-heads attention")
    if own.pop("vdim") not in (None, module.kdim):
        raise ValueError(f"module must have vdim equal to kdim {module.kdim}, got {module.vdim}")
    converted = TalkingHeadsAttention(
        module.embed_dim, module.num_heads, head_dim=module.head_dim,
        **{"mix_init": "identity"} | own | _new_options(options, own, module),
    )  # fmt: skip
    state = module.state_dict()
    for name in list(state):
        if name.startswith(("k_proj.", "v_proj.")):
            heads = state[name].unflatten(0, (module.num_kv_heads, -1))
            state[name] = heads.repeat_interleave(module.heads.group_size, 0).flatten(0, 1)
    converted.load_state_dict(converted.state_dict() | state)
    return converted.train(module.training)


FREE = ("dropout", "init_std", "backend", "device", "dtype")
"""Options of a source that its conversion may have otherwise."""


def _new_options(options: dict[str, Any], own: dict[str, Any], module: GroupedQueryAttention) -> dict[str, Any]:
    """The options that the source does not have.

    Raises:
        ValueError: for one that says otherwise what the source computes.
    """
    own = own | {name: getattr(module, name) for name in ("embed_dim", "num_heads", "num_kv_heads", "head_dim")}
    new = {name: value for name, value in options.items() if name not in own or own[name] != value}
    for name, value in new.items():
        # A bias that the source lacks starts at 0.
        if name in own and name not in FREE and (name, value) != ("bias", True):
            raise ValueError(f"{name} must be that of module, {own[name]!r:.80}, for an equal layer, got {value!r:.80}")
    return new


DOUBLED = {
    "output": ("o_proj.weight",),
    "value": ("v_proj.",),
    "key": ("k_proj.",),
    "query": ("q_proj.",),
    "dense": ("o_proj.",),
}
"""What makes up for a gate of 1/2, by its position."""


def to_gated(
    module: GroupedQueryAttention, gate: str = "output", gate_type: str = "elementwise", gate_bias: bool | None = None
) -> GatedAttention:
    """The same layer with a sigmoid gate that starts at 1/2 everywhere: equal in output, in every dtype.

    The gate's projection starts at 0, and what is gated is doubled, which rounds nothing.

    Args:
        module: multi-head, multi-query or grouped-query attention without pruned heads.
        gate: position, as in `GatedAttention`.
        gate_type: as there.
        gate_bias: as there.
    """
    converted = GatedAttention(
        module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim, gate=gate, gate_type=gate_type,
        gate_bias=gate_bias, **options_of(module),
    )  # fmt: skip
    state = {
        name: 2 * value if name.startswith(DOUBLED[gate]) else value for name, value in module.state_dict().items()
    }
    gates = {f"g_proj.{name}": torch.zeros_like(value) for name, value in converted.g_proj.state_dict().items()}
    converted.load_state_dict(state | gates)
    return converted.train(module.training)
