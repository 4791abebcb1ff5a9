"""From one attention module to another with a stated relation between the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.mha import MultiHeadAttention


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


def to_gqa(module: GroupedQueryAttention, num_kv_heads: int, mode: str = "mean") -> GroupedQueryAttention:
    """Fewer key/value heads, the start of "uptraining" (Ainslie et al. 2023, section 2.1).

    The keys and values of each group become one head: their mean, or the first of them. Exact where the
    heads of every group are equal already.

    Args:
        module: a multi-head or grouped-query module without pruned heads.
        num_kv_heads: key/value heads of the result; must divide the module's.
        mode: "mean" or "first".
    """
    if type(module) not in (GroupedQueryAttention, MultiHeadAttention):
        raise ValueError(f"module must be multi-head or grouped-query attention, got {type(module).__name__}")
    if module.pruned_heads:
        raise ValueError(f"module must not have pruned heads, got {module.pruned_heads}")
    if mode not in ("mean", "first"):
        raise ValueError(f"mode must be 'mean' or 'first', got {mode!r}")
    if num_kv_heads < 1 or module.num_kv_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide the module's {module.num_kv_heads}, got {num_kv_heads}")
    weight = module.q_proj.weight
    converted = GroupedQueryAttention(
        module.embed_dim,
        module.num_heads,
        num_kv_heads,
        module.head_dim,
        v_head_dim=module.v_head_dim,
        kdim=None if module.causal else module.kdim,
        vdim=None if module.causal else module.vdim,
        bias=module.q_proj.bias is not None,
        o_bias=module.o_proj.bias is not None,
        qk_norm=module.q_norm is not None,
        qk_norm_eps=1e-6 if module.q_norm is None else module.q_norm.eps or 1e-6,
        rope=module.rope,
        scale=module.scale,
        logit_softcap=module.logit_softcap,
        alibi=module.alibi_slopes is not None,
        sliding_window=module.sliding_window,
        sink_tokens=module.sink_tokens,
        sink=module.sink,
        causal=module.causal,
        dropout=module.dropout,
        init=module.init,
        init_std=module.init_std,
        backend=module.backend,
        device=weight.device,
        dtype=weight.dtype,
    )
    size = module.num_kv_heads // num_kv_heads
    state = module.state_dict()
    for name in list(state):
        if name.startswith(("k_proj.", "v_proj.")):
            width = module.head_dim if name.startswith("k") else module.v_head_dim
            heads = state[name].unflatten(0, (num_kv_heads, size, width))
            state[name] = (heads.mean(1) if mode == "mean" else heads[:, 0]).flatten(0, 1)
    with torch.no_grad():
        converted.load_state_dict(state)
    return converted.train(module.training)
