"""A trained multi-head or grouped-query layer as multi-head latent attention (Ji et al. 2025, arXiv:2502.14837)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.conversion.calibration import Calibration, statistics_of
from attnzoo.conversion.factors import Weighted, roots
from attnzoo.modules.gqa import GroupedQueryAttention
from attnzoo.modules.mha import MultiHeadAttention
from attnzoo.modules.mla import MultiHeadLatentAttention
from attnzoo.modules.mqa import MultiQueryAttention
from attnzoo.rotary import Rotary
from attnzoo.rules import COUNT, INTEGER, POSITIVE, RULES, SIZES, SWITCH, check, one_of

SELECTIONS = ("2-norm", "high", "low", "uniform")
WEIGHTINGS = ("weights", "activations", "two-sided")


@dataclass(frozen=True)
class LatentReport:
    """What a conversion kept.

    Attributes:
        rope_pairs: per key/value head the pairs of features that still rotate, ascending.
        score_kept: per key/value head the share of the 2-norm scores in those pairs; None without calibration.
        energy_kept: share of the squared singular values of the compressed keys and values, in the norm of the
            weighting; 1 for svd "none".
        rel_error: sqrt(1 - energy_kept), the relative error of keys and values together in that norm (Frobenius for
            weighting "weights").
        key_rel_error: that of the non-rotary keys alone; with a weighting their root mean square error on the
            calibration inputs, relative to their own.
        value_rel_error: that of the values alone.
        cache_ratio: numbers cached a token, after over before.
        params_before: weights and biases of the source.
        params_after: those of the result.
        output_rel_error: on the calibration states, relative to the source; None without such states.
        output_rel_error_of_svd: the same relative to the layer after the first step, partial rotation alone.
        weighting: that of the approximation.
        rank: width R of the latent.
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
    weighting: str = "weights"
    rank: int = 0


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
    weighting: str | None = None,
    key_weight: float = 1.0,
    calib: Calibration | None = None,
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
        weighting: what the factorisation keeps as much of as it can. "weights": the weights, as in the paper.
            "activations": the keys and values of the calibration inputs, (M - M_R) C^1/2 with C their second moment
            (Zhou et al. 2026, CARE, arXiv:2603.17946). "two-sided": what the layer makes of them, keys weighed
            besides by the second moment of their queries and values by the output projection, either block scaled
            to norm 1. Default: "activations" with calib, else "weights".
        key_weight: of the keys against the values, with weighting "two-sided".
        calib: (N, T, E) inputs of the layer, for "2-norm", for the weightings and for the report's output errors; or
            the `InputStatistics` of such inputs, without output errors.
        uniform_start: first pair of "uniform".
        expand_gqa: repeat keys and values for every query head first.
        factor_dtype: in which the factorisation runs.

    Returns:
        The module, in the source's dtype and on its device, and what it kept.

    Raises:
        ValueError: for an argument outside its rule, or a module with something that latent attention lacks.
    """
    if balance not in ("up", "sqrt"):
        raise ValueError(f"balance must be 'up' or 'sqrt', got {balance!r}")
    if svd not in ("joint", "split", "none"):
        raise ValueError(f"svd must be 'joint', 'split' or 'none', got {svd!r}")
    plan = _Plan.of(
        module, rope_dim=rope_dim, rope_select=rope_select, weighting=weighting, key_weight=key_weight, calib=calib,
        uniform_start=uniform_start, expand_gqa=expand_gqa, factor_dtype=factor_dtype,
    )  # fmt: skip
    E, D, Dv = module.embed_dim, module.head_dim, module.v_head_dim
    source, pairs, rope_rows, nope_rows = plan.source, plan.pairs, plan.rope_rows, plan.nope_rows
    H, G = module.num_heads, source.k.shape[0]
    k_nope, values = plan.keys.matrix, plan.values.matrix
    down, up_k, up_v, energy = _factors(plan, svd, kv_rank, kv_rank_split, balance)
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
    if isinstance(calib, Tensor):
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
        score_kept=None if plan.scores is None else tuple(
            float(plan.scores[g, list(kept)].sum() / plan.scores[g].sum()) for g, kept in enumerate(pairs)
        ),
        energy_kept=energy,
        rel_error=max(0.0, 1 - energy) ** 0.5,
        key_rel_error=_relative(up_k @ down, k_nope, plan.keys.columns),
        value_rel_error=_relative(up_v @ down, values, plan.keys.columns),
        cache_ratio=numbers / (module.num_kv_heads * (D + Dv)),
        params_before=sum(p.numel() for p in module.parameters()),
        params_after=sum(p.numel() for p in result.parameters()),
        output_rel_error=error,
        output_rel_error_of_svd=partial,
        weighting=plan.weighting,
        rank=result.kv_lora_rank,
    )  # fmt: skip
    return result, report


def latent_energies(module: GroupedQueryAttention, **options: Any) -> Tensor:
    """Squared singular values of what `mha2mla` with svd "joint" would compress, descending; for `allocate_ranks`.

    Args:
        module: as for `mha2mla`.
        options: its rope_dim, rope_select, weighting, key_weight, calib, uniform_start, expand_gqa and factor_dtype.
    """
    return _Plan.of(module, **options).both.energies


@dataclass(frozen=True)
class _Plan:
    """What is compressed, and in which norm: keys without rotation (G dn, E) and values (G Dv, E)."""

    source: _Source
    pairs: tuple[tuple[int, ...], ...]
    rope_rows: Tensor
    nope_rows: Tensor
    scores: Tensor | None
    weighting: str
    keys: Weighted
    values: Weighted

    @classmethod
    def of(
        cls,
        module: GroupedQueryAttention,
        *,
        rope_dim: int,
        rope_select: str = "2-norm",
        weighting: str | None = None,
        key_weight: float = 1.0,
        calib: Calibration | None = None,
        uniform_start: int = 0,
        expand_gqa: bool = False,
        factor_dtype: torch.dtype = torch.float64,
    ) -> _Plan:
        _check_source(module)
        D, half = module.head_dim, module.head_dim // 2
        for name, value, rule in (
            ("rope_dim", rope_dim, INTEGER), ("uniform_start", uniform_start, COUNT),
            ("expand_gqa", expand_gqa, SWITCH), ("factor_dtype", factor_dtype, RULES["dtype"]),
        ):  # fmt: skip
            check(name, value, rule)
        if rope_dim % 2 or not 0 <= rope_dim <= D:
            raise ValueError(f"rope_dim must be even and between 0 and head_dim {D}, got {rope_dim}")
        if weighting is None:
            weighting = "weights" if calib is None else "activations"
        check("weighting", weighting, one_of(*WEIGHTINGS))
        if weighting != "weights" and calib is None:
            raise ValueError(f"calib must be given with weighting {weighting!r}, got None")
        check("key_weight", key_weight, POSITIVE)
        if key_weight != 1 and weighting != "two-sided":
            raise ValueError(f"key_weight needs weighting 'two-sided', got {key_weight} with {weighting!r}")
        statistics = None if calib is None else statistics_of(calib, module)
        source = _source(module, expand_gqa, factor_dtype)
        groups = source.k.shape[0]
        norms = None if statistics is None else statistics.pair_norms
        scores = None if norms is None else _scores(*norms, groups)
        if scores is None and calib is not None and rope_select == "2-norm" and 0 < rope_dim < D:
            raise ValueError("calib must have norms of pairs with rope_select '2-norm': create it with the module")
        pairs = _selected(rope_select, rope_dim // 2, half, groups, scores, uniform_start)
        rope_rows = torch.tensor([[*kept, *(k + half for k in kept)] for kept in pairs], dtype=torch.long)
        nope_rows = torch.tensor([[i for i in range(D) if i % half not in kept] for kept in pairs], dtype=torch.long)
        rope_rows, nope_rows = rope_rows.view(groups, rope_dim), nope_rows.view(groups, D - rope_dim)
        keys = Weighted(_rows(source.k, nope_rows).flatten(0, 1))
        values = Weighted(source.v.flatten(0, 1))
        if statistics is not None and weighting != "weights":
            moment = statistics.moment.to(source.q)
            columns, _ = roots(moment[:-1, :-1])
            keys, values = replace(keys, columns=columns), replace(values, columns=columns)
            if weighting == "two-sided":
                readers = _readers(module, source, nope_rows, moment)
                keys, values = (
                    _scaled(replace(block, rows=tuple(torch.block_diag(*root) for root in roots(reader))), size)
                    for block, reader, size in zip((keys, values), readers, (key_weight, 1.0), strict=True)
                )
        return cls(source, pairs, rope_rows, nope_rows, scores, weighting, keys, values)

    @property
    def both(self) -> Weighted:
        """Keys and values as one matrix."""
        keys, values = self.keys, self.values
        if not len(keys.matrix):
            return values
        rows = None
        if keys.rows is not None and values.rows is not None:
            rows = tuple(torch.block_diag(*blocks) for blocks in zip(keys.rows, values.rows, strict=True))
        return Weighted(torch.cat([keys.matrix, values.matrix]), keys.columns, rows)


def _readers(
    module: GroupedQueryAttention, source: _Source, nope_rows: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor]:
    """Per key/value head the second moments of what multiplies its keys (G, dn, dn) and its values (G, Dv, Dv)."""
    groups = len(nope_rows)
    queries = torch.cat([source.q, source.q_bias[..., None]], dim=-1).unflatten(0, (groups, -1))
    # The same features of every query head that reads a key.
    index = nope_rows.to(queries.device)[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
    queries = queries.gather(2, index)
    outputs = module.o_proj.weight.detach().to(source.q).unflatten(1, (groups, -1, module.v_head_dim))
    return (
        torch.einsum("ghie,ef,ghjf->gij", queries, moment, queries),
        torch.einsum("eghi,eghj->gij", outputs, outputs),
    )


def _scaled(block: Weighted, size: float) -> Weighted:
    """The block with A such that ||A M S|| = size."""
    norm = float(block.of(block.matrix).norm())
    if not norm or block.rows is None:
        return block
    root, inverse = block.rows
    return replace(block, rows=(root * (size / norm), inverse * (norm / size)))


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


def _scores(queries: Tensor, keys: Tensor, groups: int) -> Tensor:
    """2-norm scores (G, D / 2): mean norm of each pair of a key, times those of its queries, summed over them."""
    readers: Tensor = queries.unflatten(0, (groups, -1)).sum(dim=1)
    return readers * keys.repeat_interleave(groups // len(keys), 0)


def _selected(
    select: str, count: int, total: int, groups: int, scores: Tensor | None, start: int
) -> tuple[tuple[int, ...], ...]:
    """Pairs that keep rotating, ascending, per key/value head."""
    if select not in SELECTIONS:
        raise ValueError(f"rope_select must be one of {', '.join(map(repr, SELECTIONS))}, got {select!r}")
    if count == 0:
        return ((),) * groups
    if select == "2-norm" and count < total:
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
        kept = tuple(range(total - count, total)) if select == "low" else tuple(range(count))
    return (kept,) * groups


def _rows(heads: Tensor, rows: Tensor) -> Tensor:
    """heads (G, D, ...) at rows (G, n) of each."""
    return torch.stack([head[index.to(head.device)] for head, index in zip(heads, rows, strict=True)])


def _factors(
    plan: _Plan, svd: str, rank: int | None, split: tuple[int, int] | None, balance: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """down (R, E), and the expansions of keys (G dn, R) and values (G Dv, R); last the energy kept."""
    keys, values, both = plan.keys.matrix, plan.values.matrix, plan.both
    if svd == "none":
        down = both.matrix
        identity = torch.eye(len(down), dtype=down.dtype, device=down.device)
        return down, identity[: len(keys)], identity[len(keys) :], 1.0
    most = min(both.matrix.shape)
    if rank is not None:
        check("kv_rank", rank, INTEGER)
    if rank is None or not 1 <= rank <= most:
        raise ValueError(f"kv_rank must lie between 1 and min(E, G (dn + Dv)) = {most}, got {rank}")
    if svd == "joint":
        if split is not None:
            raise ValueError(f"kv_rank_split needs svd 'split', got {split} with 'joint'")
        down, up, kept, total = both.truncated(rank, balance)
        return down, up[: len(keys)], up[len(keys) :], kept / total if total else 1.0
    if split is not None:
        check("kv_rank_split", split, SIZES)
    rk, rv = (rank // 2, rank - rank // 2) if split is None else split
    limits = min(keys.shape), min(values.shape)
    if rk + rv != rank or not 1 <= rk <= limits[0] or not 1 <= rv <= limits[1]:
        raise ValueError(
            f"kv_rank_split must add up to kv_rank {rank}, each at least 1 and at most {limits[0]} and {limits[1]}, "
            f"got {(rk, rv)}"
        )
    down_k, up_k, kept_k, total_k = plan.keys.truncated(rk, balance)
    down_v, up_v, kept_v, total_v = plan.values.truncated(rv, balance)
    up_k = torch.cat([up_k, up_k.new_zeros(len(keys), rv)], dim=1)
    up_v = torch.cat([up_v.new_zeros(len(values), rk), up_v], dim=1)
    total = total_k + total_v
    return torch.cat([down_k, down_v]), up_k, up_v, (kept_k + kept_v) / total if total else 1.0


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


def _relative(approximation: Tensor, exact: Tensor, columns: Tensor | None) -> float:
    """Relative Frobenius error, of the matrices times `columns`; 0 where there is nothing to approximate."""
    error = approximation - exact
    if columns is not None:
        error, exact = error @ columns, exact @ columns
    size = float(exact.norm())
    return float(error.norm()) / size if size else 0.0


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
