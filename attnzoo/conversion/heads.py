"""Conversions that keep the heads: from torch's module, to fewer key/value heads, to knocking heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.conversion.calibration import Calibration, statistics_of
from attnzoo.conversion.merging import merged_heads
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.gta import GroupedTiedAttention
from attnzoo.modules.kha import KnockingHeadsAttention
from attnzoo.modules.kha_gta import KnockingHeadsTiedAttention
from attnzoo.modules.kha_mla import KnockingHeadsLatentAttention
from attnzoo.modules.mae import MixtureOfAttentiveExperts
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.modules.moh import MixtureOfHeadAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.rules import INTEGER, check, one_of

CALIBRATED = ("activations", "two-sided")
"""Modes of `to_gqa` that choose coordinates by the layer's inputs."""


def from_mha(module: nn.MultiheadAttention, *, causal: bool = False, **options: Any) -> MultiHeadAttention:
    """The same function as a torch.nn.MultiheadAttention, with its weights copied.

    Exact: `from_mha(m)(x)` equals `m(x, x, x)[0]`, and with a context `m(x, context, context)[0]`, for
    batch-first inputs. Rows without a visible key give the output bias here, where torch gives NaN. Mask
    conventions differ: True means "may attend" here and "blocked" there.

    Args:
        module: self- or cross-attention; `add_zero_attn` becomes sink="zero".
        causal: make the result causal, as the torch module is under a causal mask.
        options: further keyword options of `MultiHeadAttention`; rope defaults to None.

    Raises:
        ValueError: if module has bias_k / bias_v (`add_bias_kv=True`), which no mechanism here has.
    """
    if module.bias_k is not None or module.bias_v is not None:
        raise ValueError("module must not have add_bias_kv=True: the extra key and value have no counterpart")
    weight = module.out_proj.weight
    converted = MultiHeadAttention(
        module.embed_dim,
        module.num_heads,
        **{
            "rope": None,
            "bias": module.in_proj_bias is not None,
            "kdim": None if module.kdim == module.embed_dim and causal else module.kdim,
            "vdim": None if module.vdim == module.embed_dim and causal else module.vdim,
            "sink": "zero" if module.add_zero_attn else None,
            "dropout": module.dropout,
            "causal": causal,
            "device": weight.device,
            "dtype": weight.dtype,
            **options,
        },
    )
    if module.in_proj_weight is not None:
        q, k, v = module.in_proj_weight.detach().chunk(3)
    else:
        q, k, v = (w.detach() for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
    state: dict[str, Tensor] = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v}
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.detach().chunk(3)
        state |= {f"{n}_proj.bias": b for n, b in zip("qkv", biases, strict=True)}
    state |= {f"o_proj.{name}": value for name, value in module.out_proj.state_dict().items()}
    converted.load_state_dict(state)
    return converted.train(module.training)


def to_gqa(
    module: GroupedQueryAttention, num_kv_heads: int, mode: str = "mean", *, calib: Calibration | None = None
) -> GroupedQueryAttention:
    """Fewer key/value heads, the start of "uptraining" (Ainslie et al. 2023, section 2.1).

    The keys and values of each group become one head: their mean, the first of them, or the one that tells most of all
    on the calibration inputs. The mean takes for granted that heads share coordinates, which trained heads do not.
    "activations" and "two-sided" give every head coordinates of its own, taken over by its queries and the output
    projection: one complex factor for each pair of features that rotates, so that it commutes with the rotation, and a
    map of the features that do not, and of the values. "two-sided" also weighs heads by their queries and by the
    output projection.

    "mean" and "first" are exact where the heads of every group are equal; the others also where they are equal up to
    such factors and invertible maps.

    Args:
        module: a multi-head or grouped-query module without pruned heads; for calibrated modes without QK-norm.
        num_kv_heads: key/value heads of the result; must divide the module's.
        mode: "mean", "first", "activations" or "two-sided".
        calib: for "activations" and "two-sided": (N, T, E) inputs of the layer, or their `InputStatistics`.
    """
    if type(module) not in (GroupedQueryAttention, MultiHeadAttention):
        raise ValueError(f"module must be multi-head or grouped-query attention, got {type(module).__name__}")
    if module.pruned_heads:
        raise ValueError(f"module must not have pruned heads, got {module.pruned_heads}")
    check("mode", mode, one_of("mean", "first", *CALIBRATED))
    check("num_kv_heads", num_kv_heads, INTEGER)
    if num_kv_heads < 1 or module.num_kv_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide the module's {module.num_kv_heads}, got {num_kv_heads}")
    if module.qk_norm == "joint":
        raise ValueError("module must not have qk_norm 'joint': its statistics are those of all key heads together")
    if mode in CALIBRATED and module.q_norm is not None:
        raise ValueError(f"module must not have qk_norm for mode {mode!r}: queries would have to change before it")
    if mode in CALIBRATED and calib is None:
        raise ValueError(f"calib must be given with mode {mode!r}, got None")
    converted = GroupedQueryAttention(
        module.embed_dim, module.num_heads, num_kv_heads, module.head_dim, **_grouped_options(module)
    )
    state = module.state_dict()
    if mode in CALIBRATED and calib is not None:
        moment = statistics_of(calib, module).moment
        state |= merged_heads(module, num_kv_heads, moment, two_sided=mode == "two-sided")
    else:
        size = module.num_kv_heads // num_kv_heads
        for name in list(state):
            if name.startswith(("k_proj.", "v_proj.")):
                width = module.head_dim if name.startswith("k") else module.v_head_dim
                heads = state[name].unflatten(0, (num_kv_heads, size, width))
                state[name] = (heads.mean(1) if mode == "mean" else heads[:, 0]).flatten(0, 1)
    with torch.no_grad():
        converted.load_state_dict(state)
    return converted.train(module.training)


def to_kha(
    module: GroupedQueryAttention | GroupedTiedAttention | MultiHeadLatentAttention,
    variant: str | None = "auto",
    **kinds: Any,
) -> KnockingHeadsAttention | KnockingHeadsTiedAttention | KnockingHeadsLatentAttention:
    """The same layer with shared head maps that start as the identity: equal in output and in base gradients.

    Args:
        module: multi-head, multi-query, grouped-query, grouped-tied or (decoupled) latent attention without pruned
            heads.
        variant: as in the knocking-heads class over that base.
        kinds: its knock_q, knock_k, knock_v and knock_scope.
    """
    cls = type(module)
    if module.pruned_heads:
        raise ValueError(f"module must not have pruned heads, got {module.pruned_heads}")
    if "knock_scope" in kinds and cls is not GroupedTiedAttention:
        raise ValueError(f"knock_scope needs grouped-tied attention, got {kinds['knock_scope']!r} with {cls.__name__}")
    converted: KnockingHeadsAttention | KnockingHeadsTiedAttention | KnockingHeadsLatentAttention
    options: dict[str, Any] = {"num_kv_heads": module.num_kv_heads, "variant": variant, **kinds}
    if cls in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
        options |= {"head_dim": module.head_dim, **_grouped_options(module)}
        converted = KnockingHeadsAttention(module.embed_dim, module.num_heads, **options)
    elif cls is GroupedTiedAttention:
        options |= {"head_dim": module.head_dim, **_tied_options(module)}
        converted = KnockingHeadsTiedAttention(module.embed_dim, module.num_heads, **options)
    elif cls is MultiHeadLatentAttention:
        options |= _latent_options(module)
        converted = KnockingHeadsLatentAttention(module.embed_dim, module.num_heads, **options)
    else:
        raise ValueError(
            f"module must be of the grouped-query family, grouped-tied or latent attention, got {cls.__name__}"
        )
    converted.load_state_dict(converted.state_dict() | module.state_dict())
    return converted.train(module.training)


def fold(
    module: KnockingHeadsAttention | KnockingHeadsTiedAttention | KnockingHeadsLatentAttention,
) -> GroupedQueryAttention | GroupedTiedAttention | MultiHeadLatentAttention:
    """Knocking heads with linear maps as their plain base: the module's own `fold`, the inverse of `to_kha`."""
    if not isinstance(module, KnockingHeadsAttention | KnockingHeadsTiedAttention | KnockingHeadsLatentAttention):
        raise ValueError(f"module must be knocking-heads attention, got {type(module).__name__}")
    return module.fold()


def to_moh(
    module: GroupedQueryAttention, num_shared_heads: int, num_routed_active: int, *, ste: str = "all"
) -> MixtureOfHeadAttention:
    """A trained layer as mixture of heads for further training (Jin et al. 2024, section 4.4).

    Weights are copied and nothing is new: the router is "query_norm", the first num_shared_heads are always active,
    and each token takes num_routed_active of the others. Exact with all of them; with fewer the silent heads are
    missing at once, and nothing is rescaled.

    Args:
        module: multi-head, multi-query or grouped-query attention without QK-norm, window, sinks, soft-cap, ALiBi and
            pruned heads.
        num_shared_heads: of the result.
        num_routed_active: of the result.
        ste: gradient of the selection, see `MixtureOfHeadAttention`.
    """
    options = options_without(
        module, ("qk_norm", "logit_softcap", "alibi", "sliding_window", "sink"), "mixture-of-head attention"
    )
    converted = MixtureOfHeadAttention(
        module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim, num_shared_heads=num_shared_heads,
        num_routed_active=num_routed_active, router="query_norm", ste=ste, **options,
    )  # fmt: skip
    # The result may have a bias, of 0, that the source lacks.
    converted.load_state_dict(converted.state_dict() | module.state_dict())
    return converted.train(module.training)


def to_mae(module: GroupedQueryAttention, num_active: int | None = None, **gate: Any) -> MixtureOfAttentiveExperts:
    """The same layer as a mixture of attentive experts, whose gate starts uniform: equal in output.

    Args:
        module: multi-head, multi-query or grouped-query attention of at least 2 heads, none of them pruned.
        num_active: heads of an expert. Default: all but one.
        gate: gate_input, gate_hidden and training_scheme, see `MixtureOfAttentiveExperts`.
    """
    options = options_of(module)
    converted = MixtureOfAttentiveExperts(
        module.embed_dim, module.num_heads, module.num_kv_heads, module.head_dim, num_active=num_active, **gate,
        **options,
    )  # fmt: skip
    converted.load_state_dict(converted.state_dict() | module.state_dict())
    return converted.train(module.training)


def options_of(module: GroupedQueryAttention) -> dict[str, Any]:
    """Constructor options of a grouped-query module.

    Raises:
        ValueError: if the module is of another family, or has pruned heads.
    """
    if type(module) not in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
        raise ValueError(f"module must be multi-head or grouped-query attention, got {type(module).__name__}")
    if module.pruned_heads:
        raise ValueError(f"module must not have pruned heads, got {module.pruned_heads}")
    return _grouped_options(module)


def options_without(module: GroupedQueryAttention, lacking: tuple[str, ...], result: str) -> dict[str, Any]:
    """The same for a mechanism without the options in `lacking`, without a scale and with a bias on all or none.

    Raises:
        ValueError: also if the module sets one of them.
    """
    options = options_of(module)
    for name in lacking:
        if options[name]:
            raise ValueError(f"module must not have {name}: {result} does not take it")
    if abs(options.pop("scale") - module.head_dim**-0.5) > 1e-12:
        raise ValueError(f"module must have the scale head_dim ** -0.5, got {module.scale}")
    options["bias"] = options.pop("o_bias") or options["bias"]
    implied = {"qk_norm": ("qk_norm_eps",), "sliding_window": ("sink_tokens",)}
    left_out = {"init", *lacking, *(name for option in lacking for name in implied.get(option, ()))}
    return {name: value for name, value in options.items() if name not in left_out}


def _grouped_options(module: Any) -> dict[str, Any]:
    """Constructor options of a grouped-query module."""
    return {
        **_common_options(module),
        "v_head_dim": module.v_head_dim,
        "vdim": None if module.causal else module.vdim,
        "bias": module.q_proj.bias is not None,
        "qk_norm": module.qk_norm,
        "qk_norm_eps": 1e-6 if module.q_norm is None else module.q_norm.eps or 1e-6,
        "logit_softcap": module.logit_softcap,
        "alibi": module.alibi_slopes is not None,
        "sliding_window": module.sliding_window,
        "sink_tokens": module.sink_tokens,
        "sink": module.sink,
        "init": module.init,
        "o_bias": module.o_proj.bias is not None,
    }


def _tied_options(module: Any) -> dict[str, Any]:
    """Constructor options of a grouped-tied module."""
    rope_key = module.k_rope_proj
    return {
        **_common_options(module),
        "rope_head_dim": module.rope_head_dim,
        "bias": module.q_proj.bias is not None,
        "o_bias": module.o_proj.bias is not None,
        "k_rope_bias": rope_key is not None and rope_key.bias is not None,
        "logit_softcap": module.logit_softcap,
        "sliding_window": module.sliding_window,
        "sink_tokens": module.sink_tokens,
        "sink": module.sink,
    }


def _latent_options(module: Any) -> dict[str, Any]:
    """Constructor options of a (decoupled or position-free) latent module."""
    if module.rope_mode == "pre":
        raise ValueError("module must not have rope_mode 'pre': knocking heads map expanded keys")
    return {
        **_common_options(module),
        "kv_lora_rank": module.kv_lora_rank,
        "q_lora_rank": module.q_lora_rank,
        "qk_nope_head_dim": module.qk_nope_head_dim,
        "qk_rope_head_dim": module.qk_rope_head_dim or None,
        "v_head_dim": module.v_head_dim,
        "rope_kv_heads": module.rope_kv_heads,
        "rope_inv_freq": module.rope_inv_freq,
        "kv_norm": module.kv_a_layernorm is not None,
        "norm_eps": 1e-6 if module.kv_a_layernorm is None else module.kv_a_layernorm.eps,
        "kv_b_bias": module.kv_b_proj.bias is not None,
        "q_bias": module.q_lora_rank is None and module.q_proj.bias is not None,
        "bias": module.o_proj.bias is not None,
    }


def _common_options(module: Any) -> dict[str, Any]:
    weight = module.o_proj.weight
    return {
        "kdim": None if module.causal else module.kdim,
        "rope": module.rope,
        "scale": module.scale,
        "causal": module.causal,
        "dropout": module.dropout,
        "init_std": module.init_std,
        "backend": module.backend,
        "device": weight.device,
        "dtype": weight.dtype,
    }
