"""A trained multi-head or grouped-query layer as multi-head latent attention (Ji et al. 2025, arXiv:2502.14837)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.rotary import Rotary

SELECTIONS = ("2-norm", "high", "low", "uniform")


@dataclass(frozen=True)
class LatentReport:
    """What a conversion kept.

    Attributes:
        rope_pairs: per key/value head the pairs of features that still rotate, ascending.
        score_kept: per key/value head the share of the 2-norm scores in those pairs; None without calibration.
        energy_kept: share of the squared singular values of the compressed keys and values; 1 for svd "none".
        rel_error: sqrt(1 - energy_kept), the relative Frobenius error of keys and values together.
        key_rel_error: that of the non-rotary keys alone.
        value_rel_error: that of the values alone.
        cache_ratio: numbers cached a token, after over before.
        params_before: weights and biases of the source.
        params_after: those of the result.
        output_rel_error: on the calibration states, relative to the source; None without calibration.
        output_rel_error_of_svd: the same relative to the layer after the first step, partial rotation alone.
    """

    rope_pairs: tuple[tuple[int, ...], ...]
    score_kept: tuple[float, ...] | None
    energy_kept: float
    rel_error: float
    key_rel_error: float
    value_rel_error: float
    cache_ratio: float
    params_before: int
    params_after: int
    output_rel_error: float | None
    output_rel_error_of_svd: float | None


@dataclass(frozen=True)
class _Source:
    """Weights of the layer in the factorisation's dtype, by head: q (H, D, E), k (G, D, E), v (G, Dv, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor


def mha2mla(
    module: GroupedQueryAttention,
    *,
    rope_dim: int,
    kv_rank: int | None = None,
    rope_select: str = "2-norm",
    svd: str = "joint",
    kv_rank_split: tuple[int, int] | None = None,
    balance: str = "up",
    calib: Tensor | None = None,
    uniform_start: int = 0,
    expand_gqa: bool = False,
    factor_dtype: torch.dtype = torch.float64,
) -> tuple[MultiHeadLatentAttention, LatentReport]:
    """Keep the rotation of some pairs of features, and compress the other keys and the values into one latent.

    With rope_dim = head_dim and the full rank the result is the same function as `module`; at full rank with a
    smaller rope_dim it is the layer with partial rotation. Below full rank it is an approximation to fine-tune;
    the paper reports that even the first step costs quality before that.

    Args:
        module: multi-head, multi-query or grouped-query attention with a plain rotary embedding over whole heads.
        rope_dim: features of a head that still rotate, even.
        kv_rank: total width R of the latent (the paper's d_kv times the number of key/value heads).
        rope_select: which pairs: "2-norm" (those with the largest product of query and key norms on the
            calibration states, per key/value head), "high" or "low" frequencies, or "uniform".
        svd: "joint" (keys and values together), "split", or "none" (no compression; kv_rank is not used).
        kv_rank_split: ranks of keys and of values for "split"; their sum is kv_rank. Default: half each.
        balance: "up" puts the singular values into the expansion, so that the down-projection has orthonormal
            rows; "sqrt" shares them.
        calib: (N, T, E) inputs of the layer, for "2-norm" and for the report's output errors.
        uniform_start: first pair of "uniform".
        expand_gqa: repeat keys and values for every query head first.
        factor_dtype: in which the factorisation runs.

    Returns:
        The module, in the source's dtype and on its device, and what it kept.

    Raises:
        ValueError: for an argument outside its rule, or a module with something that latent attention lacks.
    """
    _check_source(module)
    E, D, Dv = module.embed_dim, module.head_dim, module.v_head_dim
    if rope_dim % 2 or not 0 <= rope_dim <= D:
        raise ValueError(f"rope_dim must be even and between 0 and head_dim {D}, got {rope_dim}")
    if svd not in ("joint", "split", "none"):
        raise ValueError(f"svd must be 'joint', 'split' or 'none', got {svd!r}")
    if balance not in ("up", "sqrt"):
        raise ValueError(f"balance must be 'up' or 'sqrt', got {balance!r}")
    if calib is not None and (calib.ndim != 3 or calib.shape[-1] != E):
        raise ValueError(f"calib must have shape (N, T, {E}), got {tuple(calib.shape)}")
    source = _source(module, expand_gqa, factor_dtype)
    H, G = module.num_heads, source.k.shape[0]
    scores = None if calib is None else _scores(source, calib)
    pairs = _selected(rope_select, rope_dim // 2, D // 2, G, scores, uniform_start)
    half = D // 2
    rope_rows = torch.tensor([[*kept, *(k + half for k in kept)] for kept in pairs], dtype=torch.long).view(G, rope_dim)
    nope_rows = torch.tensor([[i for i in range(D) if i % half not in kept] for kept in pairs], dtype=torch.long)
    nope_rows = nope_rows.view(G, D - rope_dim)
    k_nope = _rows(source.k, nope_rows).flatten(0, 1)
    values = source.v.flatten(0, 1)
    down, up_k, up_v, energy = _factors(k_nope, values, svd, kv_rank, kv_rank_split, balance)
    # A head whose features all rotate gets one key feature that is zero, since latent attention has at least one.
    nope = max(D - rope_dim, 1)
    rotary = module.rope
    assert rotary is not None
    frequencies = rotary.frequencies(D)[0]
    biased = module.q_proj.bias is not None
    weight = module.q_proj.weight
    with warnings.catch_warnings():
        # A rank that compresses nothing is what was asked for; the report says what it is.
        warnings.simplefilter("ignore", UserWarning)
        result = MultiHeadLatentAttention(
            E, H, down.shape[0],
            qk_nope_head_dim=nope, qk_rope_head_dim=rope_dim or None, v_head_dim=Dv,
            rope=Rotary(theta=rotary.theta) if rope_dim else None, num_kv_heads=G,
            rope_kv_heads=G if rope_dim else 1,
            rope_inv_freq=torch.stack([frequencies[list(kept)] for kept in pairs]) if rope_dim else None,
            kv_norm=False, kv_b_bias=biased, q_bias=biased, bias=biased or module.o_proj.bias is not None,
            scale=module.scale, kdim=None if module.causal else module.kdim, causal=module.causal,
            dropout=module.dropout, init_std=module.init_std, backend=module.backend, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
    state = _state(source, rope_rows, nope_rows, nope, down, up_k, up_v)
    state["o_proj.weight"] = module.o_proj.weight.detach()
    if module.o_proj.bias is not None:
        state["o_proj.bias"] = module.o_proj.bias.detach()
    # The result may have a bias that the source lacks.
    result.load_state_dict(
        {name: state.get(name, value if name == "rope_inv_freq" else torch.zeros_like(value))
         for name, value in result.state_dict().items()}
    )  # fmt: skip
    result.train(module.training)
    error, partial = None, None
    if calib is not None:
        partial_layer = result
        if svd != "none":
            partial_layer, _ = mha2mla(
                module, rope_dim=rope_dim, rope_select=rope_select, svd="none", calib=calib,
                uniform_start=uniform_start, expand_gqa=expand_gqa, factor_dtype=factor_dtype,
            )  # fmt: skip
        error, partial = (_output_error(result, other, calib) for other in (module, partial_layer))
    numbers = result.kv_lora_rank + (G * rope_dim if rope_dim else 0)
    report = LatentReport(
        rope_pairs=pairs,
        score_kept=None if scores is None else tuple(
            float(scores[g, list(kept)].sum() / scores[g].sum()) for g, kept in enumerate(pairs)
        ),
        energy_kept=energy,
        rel_error=max(0.0, 1 - energy) ** 0.5,
        key_rel_error=_relative(up_k @ down, k_nope),
        value_rel_error=_relative(up_v @ down, values),
        cache_ratio=numbers / (module.num_kv_heads * (D + Dv)),
        params_before=sum(p.numel() for p in module.parameters()),
        params_after=sum(p.numel() for p in result.parameters()),
        output_rel_error=error,
        output_rel_error_of_svd=partial,
    )  # fmt: skip
    return result, report


def _check_source(module: GroupedQueryAttention) -> None:
    """Refuse a layer that partial rotation and a latent cannot express."""
    if type(module) not in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
        raise ValueError(f"module must be multi-head or grouped-query attention, got {type(module).__name__}")
    lacking = {
        "qk_norm": module.q_norm is not None,
        "sliding_window": module.sliding_window is not None,
        "alibi": module.alibi_slopes is not None,
        "sink": module.sink is not None,
        "logit_softcap": module.logit_softcap is not None,
        "pruned heads": bool(module.pruned_heads),
        "vdim": module.vdim != module.kdim,
    }
    for name, present in lacking.items():
        if present:
            raise ValueError(f"module must not have {name}: latent attention has no counterpart")
    rope = module.rope
    if rope is None or rope.style != "half" or rope.scaling is not None or module.rope_dim != module.head_dim:
        raise ValueError(
            f"module must have a plain rotary embedding of style 'half' over whole heads, got {rope} of width "
            f"{module.rope_dim}"
        )


def _source(module: GroupedQueryAttention, expand: bool, dtype: torch.dtype) -> _Source:
    repeats = module.num_heads // module.num_kv_heads if expand else 1

    def heads(name: str, count: int) -> tuple[Tensor, Tensor]:
        linear = getattr(module, f"{name}_proj")
        weight = linear.weight.detach().to(dtype).view(count, -1, linear.in_features)
        bias = weight.new_zeros(weight.shape[:2])
        if linear.bias is not None:
            bias = linear.bias.detach().to(dtype).view(count, -1)
        again = 1 if name == "q" else repeats
        return weight.repeat_interleave(again, 0), bias.repeat_interleave(again, 0)

    (q, q_bias), (k, k_bias), (v, v_bias) = (
        heads(name, module.num_heads if name == "q" else module.num_kv_heads) for name in "qkv"
    )
    return _Source(q, k, v, q_bias, k_bias, v_bias)


def _scores(source: _Source, calib: Tensor) -> Tensor:
    """2-norm scores (G, D / 2): mean norm of each pair of a key, times those of its queries, summed over them."""
    calib = calib.to(source.q)

    def norms(weight: Tensor, bias: Tensor) -> Tensor:
        heads, width = bias.shape
        total = calib.new_zeros(heads, width // 2)
        for sequence in calib:
            features = torch.einsum("te,hde->thd", sequence, weight) + bias
            u, v = features.chunk(2, dim=-1)
            total += torch.sqrt(u.square() + v.square()).mean(0)
        return total / len(calib)

    queries = norms(source.q, source.q_bias)
    keys = norms(source.k, source.k_bias)
    return queries.view(len(keys), -1, keys.shape[1]).sum(1) * keys


def _selected(
    select: str, count: int, total: int, groups: int, scores: Tensor | None, start: int
) -> tuple[tuple[int, ...], ...]:
    """Pairs that keep rotating, ascending, per key/value head."""
    if select not in SELECTIONS:
        raise ValueError(f"rope_select must be one of {', '.join(map(repr, SELECTIONS))}, got {select!r}")
    if count == 0:
        return ((),) * groups
    if select == "2-norm":
        if scores is None:
            raise ValueError("calib must be given with rope_select '2-norm', got None")
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return tuple(tuple(sorted(row)) for row in best.tolist())
    if select == "uniform":
        if total % count or not 0 <= start < total // count:
            raise ValueError(
                f"rope_select 'uniform' needs rope_dim / 2 to divide the {total} pairs and uniform_start below the "
                f"quotient, got {count} and {start}"
            )
        kept = tuple(range(start, total, total // count))
    else:
        kept = tuple(range(count)) if select == "high" else tuple(range(total - count, total))
    return (kept,) * groups


def _rows(heads: Tensor, rows: Tensor) -> Tensor:
    """heads (G, D, ...) at rows (G, n) of each."""
    return torch.stack([head[index.to(head.device)] for head, index in zip(heads, rows, strict=True)])


def _factors(
    keys: Tensor,
    values: Tensor,
    svd: str,
    rank: int | None,
    split: tuple[int, int] | None,
    balance: str,
) -> tuple[Tensor, Tensor, Tensor, float]:
    """down (R, E), and the expansions of keys (G dn, R) and values (G Dv, R); last the energy kept."""
    both = torch.cat([keys, values])
    if svd == "none":
        identity = torch.eye(len(both), dtype=both.dtype, device=both.device)
        return both, identity[: len(keys)], identity[len(keys) :], 1.0
    most = min(both.shape[1], len(both))
    if rank is None or not 1 <= rank <= most:
        raise ValueError(f"kv_rank must lie between 1 and min(E, G (dn + Dv)) = {most}, got {rank}")
    if svd == "joint":
        if split is not None:
            raise ValueError(f"kv_rank_split needs svd 'split', got {split} with 'joint'")
        down, up, kept, total = _truncated(both, rank, balance)
        return down, up[: len(keys)], up[len(keys) :], kept / total
    rk, rv = (rank // 2, rank - rank // 2) if split is None else split
    limits = min(keys.shape), min(values.shape)
    if rk + rv != rank or not 1 <= rk <= limits[0] or not 1 <= rv <= limits[1]:
        raise ValueError(
            f"kv_rank_split must add up to kv_rank {rank}, each at least 1 and at most {limits[0]} and {limits[1]}, "
            f"got {(rk, rv)}"
        )
    down_k, up_k, kept_k, total_k = _truncated(keys, rk, balance)
    down_v, up_v, kept_v, total_v = _truncated(values, rv, balance)
    up_k = torch.cat([up_k, up_k.new_zeros(len(keys), rv)], dim=1)
    up_v = torch.cat([up_v.new_zeros(len(values), rk), up_v], dim=1)
    return torch.cat([down_k, down_v]), up_k, up_v, (kept_k + kept_v) / (total_k + total_v)


def _truncated(matrix: Tensor, rank: int, balance: str) -> tuple[Tensor, Tensor, float, float]:
    """down (rank, E) and up (n, rank) of the best approximation, its energy and the whole."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    left, right = (s, torch.ones_like(s)) if balance == "up" else (s.sqrt(), s.sqrt())
    energy = s.square()
    down, up = right[:rank, None] * vt[:rank], u[:, :rank] * left[:rank]
    return down, up, float(energy[:rank].sum()), float(energy.sum())


def _state(
    source: _Source,
    rope_rows: Tensor,
    nope_rows: Tensor,
    nope: int,
    down: Tensor,
    up_k: Tensor,
    up_v: Tensor,
) -> dict[str, Tensor]:
    """Parameters of the latent layer."""
    H, G = source.q.shape[0], source.k.shape[0]
    per_head = [rows.repeat_interleave(H // G, 0) for rows in (nope_rows, rope_rows)]

    def padded(x: Tensor) -> Tensor:
        """Non-rotary rows (N, dn, ...), with a row of zeros where there is none."""
        return x if x.shape[1] == nope else x.new_zeros(x.shape[0], nope, *x.shape[2:])

    def query(x: Tensor) -> Tensor:
        return torch.cat([padded(_rows(x, per_head[0])), _rows(x, per_head[1])], dim=1).flatten(0, 1)

    def expanded(key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.reshape(G, len(x) // G, *x.shape[1:]) for x in (key, value))
        return torch.cat([padded(key), value], dim=1).flatten(0, 1)

    rope_bias = _rows(source.k_bias, rope_rows).flatten()
    return {
        "q_proj.weight": query(source.q),
        "q_proj.bias": query(source.q_bias),
        "kv_a_proj_with_mqa.weight": torch.cat([down, _rows(source.k, rope_rows).flatten(0, 1)]),
        "kv_a_proj_with_mqa.bias": torch.cat([rope_bias.new_zeros(len(down)), rope_bias]),
        "kv_b_proj.weight": expanded(up_k, up_v),
        "kv_b_proj.bias": expanded(_rows(source.k_bias, nope_rows).flatten(), source.v_bias.flatten()),
    }


def _relative(approximation: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; 0 where there is nothing to approximate."""
    size = float(exact.norm())
    return float((approximation - exact).norm()) / size if size else 0.0


@torch.no_grad()
def _output_error(converted: MultiHeadLatentAttention, other: torch.nn.Module, calib: Tensor) -> float:
    """Relative error of the outputs on the calibration states, without dropout."""
    modes = converted.training, other.training
    converted.eval(), other.eval()
    x = calib.to(converted.o_proj.weight)
    exact = other(x)
    error = float((converted(x) - exact).norm() / exact.norm())
    converted.train(modes[0])
    other.train(modes[1])
    return error
