"""What operations refuse before they compute: tensors, rules and views that do not fit each other."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.masks import AttentionMask, Visibility, broadcasts
from attnzoo.ops.score_rules import ScoreRules
from attnzoo.rules import describe


def check_states(q: Tensor, k: Tensor, v: Tensor, view: Visibility, *, same_groups: bool = True) -> None:
    """Refuse q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv) and a view that do not fit each other.

    Without same_groups values may have other groups than keys.
    """
    if not isinstance(view, Visibility):
        raise ValueError(f"view must be a Visibility, got {describe(view)}")
    if view.mask is not None and not isinstance(view.mask, AttentionMask):
        raise ValueError(f"view.mask must be an AttentionMask, got {describe(view.mask)}")
    if view.window is not None and view.window < 1:
        raise ValueError(f"view.window must be at least 1, got {view.window}")
    check_sizes(q, k, v, same_groups=same_groups)
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if view.causal and view.query_start is None and view.shards is None and q.shape[1] > k.shape[1]:
        raise ValueError(f"causal attention needs T <= S, got {q.shape[1]} queries and {k.shape[1]} keys")


def check_sizes(q: Tensor, k: Tensor, v: Tensor, *, same_groups: bool = True) -> None:
    """The part of `check_states` that holds for operations without a softmax too."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q, k and v must have 4 dimensions, got {q.ndim}, {k.ndim} and {v.ndim}")
    if k.shape[:2] != v.shape[:2] or (same_groups and k.shape[2] != v.shape[2]):
        raise ValueError(f"k and v must agree in (B, S, G), got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and width, got {tuple(q.shape)} and {tuple(k.shape)}")
    heads, groups = q.shape[2], k.shape[2]
    if heads and (not groups or heads % groups):
        raise ValueError(f"num_kv_heads must divide num_heads, got {groups} and {heads}")


def check_rules(q: Tensor, k: Tensor, v: Tensor, rules: ScoreRules) -> None:
    """Refuse rules that do not fit q (B, T, H, D), k (B, S, G, D) and v (B, S, G, Dv)."""
    (B, T, heads, _), S = q.shape, k.shape[1]
    if rules.softcap is not None and not rules.softcap > 0:
        raise ValueError(f"softcap must be positive, got {rules.softcap}")
    of_heads = {"alibi_slopes": rules.alibi_slopes, "sinks": rules.sinks, "logit_bias": rules.sigmoid_bias}
    for name, numbers in of_heads.items():
        if isinstance(numbers, Tensor) and numbers.shape != (heads,):
            raise ValueError(f"{name} must have shape ({heads},), got {tuple(numbers.shape)}")
    if isinstance(rules.sigmoid_bias, str) and rules.sigmoid_bias != "visible":
        raise ValueError(f"logit_bias must be a number, a tensor or 'visible', got {rules.sigmoid_bias!r}")
    q_rope, k_rope, head_scale, bias = rules.q_rope, rules.k_rope, rules.head_scale, rules.bias
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope must be given together")
    if q_rope is not None and k_rope is not None:
        queries, keys = (*q.shape[:3], q_rope.shape[-1]), (*k.shape[:2], 1, q_rope.shape[-1])
        if q_rope.shape != queries or k_rope.shape != keys:
            raise ValueError(
                f"q_rope must be (B, T, H, R) and k_rope (B, S, 1, R), got {tuple(q_rope.shape)} "
                f"and {tuple(k_rope.shape)}"
            )
    by_rank = {1: (heads,), 2: (B, heads), 3: (B, T, heads)}
    if head_scale is not None and tuple(head_scale.shape) != by_rank.get(head_scale.ndim):
        raise ValueError(
            f"head_scale must be ({heads},), ({B}, {heads}) or ({B}, {T}, {heads}), got shape {tuple(head_scale.shape)}"
        )
    if (gate := rules.output_gate) is not None:
        shapes = ((B, T, heads, v.shape[3]), (B, T, heads, 1))
        if gate.shape not in shapes or not gate.is_floating_point():
            raise ValueError(
                f"output_gate must be a floating tensor {shapes[0]} or {shapes[1]}, got {gate.dtype} of shape "
                f"{tuple(gate.shape)}"
            )
    if (decay := rules.decay) is not None:
        if decay.shape != (B, heads, S) or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"decay must be a float32 or float64 tensor {(B, heads, S)}, got {decay.dtype} of shape "
                f"{tuple(decay.shape)}"
            )
        if rules.sinks is not None:
            raise ValueError("decay must not be given together with sinks")
    if bias is None:
        return
    if not bias.is_floating_point():
        raise ValueError(f"bias must be a floating tensor, got {bias.dtype}")
    shape = (B, heads, T, S)
    if not broadcasts(bias, shape):
        raise ValueError(f"bias must broadcast to (B, H, T, S) = {shape}, got shape {tuple(bias.shape)}")
