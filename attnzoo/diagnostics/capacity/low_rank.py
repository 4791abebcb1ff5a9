"""The low-rank bottleneck: what head width D allows of T x T logits (Bhojanapalli et al. 2020, arXiv:2002.07028).

Logits of a head, Q K^T / sqrt(D) with Q, K (T, D), have rank D at most, whatever the weights; rotation does not change
that, and masks do not concern it: the unmasked logits are meant. Additive biases and mixing across heads lift it.
Theorem 1: D >= T reaches every positive row-stochastic pattern, D < T does not. Softmax ignores one number per row, so
D = T - 1 is enough.

A pattern, a softmax of logits, is generically of full rank, and a causal one always: its effective rank is informative,
while its numerical rank only reflects the tolerance. The theorem does not say that a head of low rank works badly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.diagnostics.arguments import TOLERANCE, check_tensor
from attnzoo.diagnostics.batches import in_eval_mode, run_batch, tokens_and_mask
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.heads.observe import observe
from attnzoo.rules import NUMBER, Rule, check, is_number, numbers_of

_ROW_SUM = 1e-6
_EPS: Rule = ((lambda value: is_number(value) and 0 < value < 1, "lie in (0, 1)"),)


@dataclass(frozen=True, eq=False)
class MatrixRank:
    """Ranks of matrices, each of the matrices' leading shape; s_1 >= s_2 >= ... are singular values.

    Attributes:
        rank: number of s_i above rtol s_1, integers.
        stable_rank: sum s_i^2 / s_1^2.
        effective_rank: exp(- sum p_i ln p_i) with p_i = s_i / sum s.
        participation_ratio: (sum s_i^2)^2 / sum s_i^4.
    """

    rank: Tensor
    stable_rank: Tensor
    effective_rank: Tensor
    participation_ratio: Tensor


@dataclass(frozen=True)
class RankNumbers:
    """The figures of `MatrixRank` for one head, averaged over a batch."""

    rank: float
    stable_rank: float
    effective_rank: float
    participation_ratio: float


@dataclass(frozen=True)
class HeadRank:
    """One head's row of `attention_rank_report`.

    Attributes:
        layer: index of the layer.
        name: its qualified name.
        head: query head.
        head_dim: width D of queries and keys.
        tokens: T, real ones of the longest sequence.
        logits: of scale Q K^T, before masks, biases, soft-caps and mixing; its rank is D at most.
        pattern: of softmax(logits) over all T keys.
        causal_pattern: of the weights that the model uses.
    """

    layer: int
    name: str
    head: int
    head_dim: int
    tokens: int
    logits: RankNumbers
    pattern: RankNumbers
    causal_pattern: RankNumbers

    @property
    def ratio(self) -> float:
        """D / T; below 1 there is a bottleneck."""
        return self.head_dim / self.tokens


def attention_rank(matrix: Tensor, rtol: float | None = None) -> MatrixRank:
    """Ranks of matrices (..., T, S), of logits or of patterns.

    One singular value decomposition each, in float64 for float64 and else in float32: use T <= 512, and
    `logit_singular_values` for logits.

    Args:
        matrix: (..., T, S).
        rtol: a singular value counts if it exceeds rtol times the largest. Default: 1e-9 in float64, else 1e-5.

    Raises:
        ValueError: for no matrices, numbers that are not finite, or rtol outside [0, 1).
    """
    check_tensor("matrix", matrix)
    if matrix.ndim < 2 or not min(matrix.shape[-2:]):
        raise ValueError(f"matrix must have shape (..., T, S), got {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError("matrix must be finite: give logits without their mask")
    high = torch.promote_types(matrix.dtype, torch.float32)
    return rank_of_singular_values(torch.linalg.svdvals(matrix.detach().to(high)), rtol)


def rank_of_singular_values(values: Tensor, rtol: float | None = None) -> MatrixRank:
    """Ranks from singular values (..., n), descending; all are 0 for a zero matrix. rtol as in `attention_rank`."""
    if rtol is None:
        rtol = 1e-9 if values.dtype == torch.float64 else 1e-5
    check("rtol", rtol, TOLERANCE)
    largest = values[..., :1]
    empty = largest[..., 0] == 0
    s = values / torch.where(largest == 0, torch.ones_like(largest), largest)
    squares = s.square().sum(-1)
    p = s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    effective = torch.exp(-torch.xlogy(p, p).sum(-1))
    participation = squares.square() / s.pow(4).sum(-1).clamp(min=torch.finfo(s.dtype).tiny)
    rank = ((values > rtol * largest) & (values > 0)).sum(-1)
    return MatrixRank(rank, squares, effective.masked_fill(empty, 0), participation)


def logit_singular_values(q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of scale q k^T, (..., min(D, T, S)), from q (..., T, D) and k (..., S, D).

    Those beyond are 0. With thin QR decompositions of q and k only a D x D matrix is decomposed: O(T D^2), exact.
    """
    for name, given in (("q", q), ("k", k)):
        check_tensor(name, given)
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    check("scale", scale, NUMBER)
    if q.ndim < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or not min(*q.shape, *k.shape):
        raise ValueError(f"q and k must be (..., T, D) and (..., S, D), got {tuple(q.shape)} and {tuple(k.shape)}")
    high = torch.promote_types(q.dtype, torch.float32)
    left = torch.linalg.qr(q.detach().to(high), mode="r").R
    right = torch.linalg.qr(k.detach().to(high), mode="r").R
    values: Tensor = torch.linalg.svdvals(abs(scale) * left @ right.mT)
    return values


def attention_rank_report(model: nn.Module, batch: Any, rtol: float | None = None) -> list[HeadRank]:
    """Ranks of logits and patterns of every head of a model, averaged over the batch.

    Args:
        model: any model that `attention_layers` understands; run once, in eval mode and without gradients.
        batch: what the model takes: a tensor, a tuple of arguments or a mapping of them, whose "attention_mask" (B, T)
            says which tokens are real; the others count neither as queries nor as keys. T <= 512 is advisable.
        rtol: as in `attention_rank`.

    Returns:
        One row for each layer and query head, in order.

    Raises:
        ValueError: for a layer without softmax patterns.
    """
    if rtol is not None:
        check("rtol", rtol, TOLERANCE)
    rows: list[HeadRank] = []
    mask = tokens_and_mask(batch)[1] if isinstance(batch, Mapping) else None

    def visit(call: AttentionCall) -> None:
        pattern = call.pattern()
        assert call.queries is not None
        assert call.keys is not None
        assert call.rules is not None
        q, k = call.queries, call.keys
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        high = torch.promote_types(q.dtype, torch.float32)
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask is None else mask
        if not bool(real.any()):
            raise ValueError("batch must hold at least one real token, got padding alone")
        # Rows and columns of zeros, and sequences of padding alone, change no rank.
        real = real[real.any(1)].to(q.device)[:, None]
        q, k, pattern = (x if mask is None else x[mask.any(1).to(x.device)] for x in (q, k, pattern))
        q, k = q * real[..., None], k * real[..., None]
        pairs = real[..., None] & real[:, :, None]
        logits = rank_of_singular_values(logit_singular_values(q, k, call.rules.scale), rtol)
        scores = (call.rules.scale * q.to(high) @ k.to(high).mT).masked_fill(~real[:, :, None], -math.inf)
        open_pattern = attention_rank(scores.softmax(-1) * pairs, rtol)
        own = attention_rank(pattern * pairs, rtol)
        tokens = int(real.sum(-1).max())
        for head in range(pattern.shape[1]):
            # A mechanism that composes heads has as many queries as patterns; a routed one may not.
            source = min(head, q.shape[1] - 1) if call.heads is None else call.heads[head]
            rows.append(
                HeadRank(
                    call.layer.index, call.layer.name, head, q.shape[-1], tokens,
                    _numbers(logits, source), _numbers(open_pattern, source), _numbers(own, head),
                )
            )  # fmt: skip

    with in_eval_mode(model), torch.no_grad(), observe(model, visit):
        if isinstance(batch, tuple):
            model(*batch)
        else:
            run_batch(model, batch, mask)
    return sorted(rows, key=lambda row: (row.layer, row.head))


def rank_table(rows: Sequence[HeadRank]) -> list[dict[str, float | int | str]]:
    """Rows of a report as flat dicts ("logits_rank", ...), for a pandas.DataFrame or a CSV writer."""
    table = []
    for row in rows:
        flat: dict[str, float | int | str] = {
            "layer": row.layer, "name": row.name, "head": row.head, "head_dim": row.head_dim, "tokens": row.tokens,
            "head_dim/T": row.ratio,
        }  # fmt: skip
        for part in ("logits", "pattern", "causal_pattern"):
            flat |= {f"{part}_{name}": value for name, value in vars(getattr(row, part)).items()}
        table.append(flat)
    return table


def centred_log_pattern(pattern: Tensor) -> Tensor:
    """M = log P minus its mean in each row, (..., n, n): logits of the pattern, of rank n - 1 at most."""
    logs = pattern.double().log()
    return logs - logs.mean(-1, keepdim=True)


def representation_error(
    pattern: Tensor, head_dims: Sequence[int] | None = None, *, eps: float | None = None
) -> Tensor:
    """What heads of smaller width would lose of a pattern, in nats: mean KL(P_i || softmax(M_d)_i) over rows i.

    M_d is the best approximation of rank d of M (`centred_log_pattern`) in the Frobenius norm. An upper bound of the
    best KL that head width d can reach with free tokens; 0 for d >= n - 1. As a rule it falls with d.

    Args:
        pattern: (..., n, n), positive, rows summing to 1.
        head_dims: widths d. Default: 1 .. n.
        eps: raise smaller entries to this and normalise again; for causal patterns, whose zeros have no logarithm.

    Returns:
        (..., len(head_dims)) in float64.

    Raises:
        ValueError: for a pattern that is not finite, not positive without eps, or no distribution; for a width that is
            not an integer of at least 1.
    """
    check_tensor("pattern", pattern)
    if pattern.ndim < 2 or pattern.shape[-1] != pattern.shape[-2] or not pattern.numel():
        raise ValueError(f"pattern must have shape (..., n, n), got {tuple(pattern.shape)}")
    p = _distributions(pattern)
    if eps is not None:
        check("eps", eps, _EPS)
        p = p.clamp(min=eps)
        p = p / p.sum(-1, keepdim=True)
    if not bool((p > 0).all()):
        raise ValueError(f"pattern must be positive unless eps is given, got an entry of {float(p.min())}")
    n = p.shape[-1]
    dims = list(range(1, n + 1)) if head_dims is None else numbers_of("head_dims", head_dims)
    if not dims or min(dims) < 1:
        raise ValueError(f"head_dims must be at least 1 each, got {dims}")
    u, s, vh = torch.linalg.svd(centred_log_pattern(p))
    errors = []
    for d in dims:
        m = (u[..., :d] * s[..., None, :d]) @ vh[..., :d, :]
        errors.append((p * (p.log() - m.log_softmax(-1))).sum(-1).mean(-1))
    return torch.stack(errors, -1)


def _distributions(pattern: Tensor) -> Tensor:
    """The pattern in float64; raises ValueError unless it is finite and its rows sum to 1."""
    p = pattern.detach().double()
    if not bool(p.isfinite().all()):
        raise ValueError("pattern must be finite, got nan or inf")
    if float((p.sum(-1) - 1).abs().max()) > _ROW_SUM:
        raise ValueError(f"pattern must have rows that sum to 1, one is off by {(p.sum(-1) - 1).abs().max():.2g}")
    return p


def constructive_weights(tokens: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem 1's weights (q_proj (n, E), k_proj (n, E)) of a head of width D = n that make this pattern.

    For tokens X: X q_proj^T is the identity and softmax(X q_proj^T (X k_proj^T)^T / sqrt(n)) is the pattern. Where the
    paper takes log P, this takes M (`centred_log_pattern`), which has the same softmax.

    Args:
        tokens: X (n, E) of rank n.
        pattern: (n, n), positive, rows summing to 1.

    Raises:
        ValueError: if the shapes do not fit, the tokens are dependent or not finite, or the pattern is not a positive
            distribution.
    """
    check_tensor("tokens", tokens)
    check_tensor("pattern", pattern)
    n = tokens.shape[0] if tokens.ndim else 0
    if tokens.ndim != 2 or tuple(pattern.shape) != (n, n) or not n:
        raise ValueError(
            f"tokens and pattern must be (n, E) and (n, n), got {tuple(tokens.shape)} and {tuple(pattern.shape)}"
        )
    if not bool((_distributions(pattern) > 0).all()):
        raise ValueError(f"pattern must be positive, got an entry of {float(pattern.min())}")
    x = tokens.double()
    if not bool(x.isfinite().all()):
        raise ValueError("tokens must be finite, got NaN or infinite entries")
    rank = int(torch.linalg.matrix_rank(x))
    if rank < n:
        raise ValueError(f"tokens must be linearly independent, got rank {rank} of {n}")
    inverse = torch.linalg.pinv(x)
    return inverse.mT.contiguous(), math.sqrt(n) * centred_log_pattern(pattern) @ inverse.mT


def _numbers(ranks: MatrixRank, head: int) -> RankNumbers:
    return RankNumbers(**{name: float(value[:, head].double().mean()) for name, value in vars(ranks).items()})
