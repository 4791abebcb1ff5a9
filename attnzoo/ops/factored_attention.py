"""Attention over keys and values that are sums of outer products, with or without forming them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.backends import choose
from attnzoo.masks import Visibility
from attnzoo.ops.observation import current_observer
from attnzoo.ops.precision import without_autocast
from attnzoo.ops.score_rules import masked_softmax
from attnzoo.ops.softmax_attention import decodes, softmax_attention, softmax_kernel_obstacle


def tensor_product(a: Tensor, b: Tensor) -> Tensor:
    """Heads (B, T, H, D) of factors a (B, T, R, H) and b (B, T, R, D): (1 / R) sum_r a[r, h] b[r]."""
    return torch.einsum("btrh,btrd->bthd", a / a.shape[2], b)


def factored_attention(
    q: Tensor,
    k_a: Tensor,
    k_b: Tensor,
    v_a: Tensor,
    v_b: Tensor,
    view: Visibility,
    *,
    scale: float,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of tensor products (Zhang et al. 2025, arXiv:2501.06425, section 3): (B, T, H, Dv).

        k_h = (1 / Rk) sum_r k_a[r, h] k_b[r],  v_h = (1 / Rv) sum_r v_a[r, h] v_b[r]

    A few new tokens over a cache read the factors, which all heads share, and form neither keys nor values while that
    takes fewer multiplications ("auto", "eager" and "triton"). Everything else is `softmax_attention` over formed
    heads, and so is what an observer sees.

    Args:
        q: queries (B, T, H, D).
        k_a: head factors of the keys (B, S, Rk, H).
        k_b: feature factors of the keys (B, S, Rk, D).
        v_a: head factors of the values (B, S, Rv, H).
        v_b: feature factors of the values (B, S, Rv, Dv).
        view: which key each query may attend to.
        scale: factor of the scores.
        dropout: probability of dropping a weight.
        backend: as in `softmax_attention`.

    Raises:
        BackendUnavailable: if a named backend cannot serve the call.
    """
    ranks, widths = (k_b.shape[2], v_b.shape[2]), (k_b.shape[3], v_b.shape[3])
    # Without a cache the number of queries is not asked for: an exported program would be tied to it.
    unformed = view.query_start and backend in ("auto", "eager", "triton") and current_observer() is None
    unformed = unformed and view.shards is None
    if unformed and decodes(q, k_b, view, q, k_a, k_b, v_a, v_b) and factors_are_cheaper(q.shape[1], ranks, widths):

        def triton() -> str | None:
            return softmax_kernel_obstacle(q, v_b, None, dropout)

        if choose(backend, "factored_attention", {"triton": triton, "eager": lambda: None}, q.device) == "triton":
            from attnzoo_kernels.decode.factors import decode_factors

            options = view.for_kernel((q.shape[0], q.shape[2], q.shape[1], k_b.shape[1]), q.device)
            del options["documents"]
            return decode_factors(q, k_a, k_b, v_a, v_b, scale=scale, **options)
        return _from_factors(q, k_a, k_b, v_a, v_b, view, scale, dropout)
    k, v = tensor_product(k_a, k_b), tensor_product(v_a, v_b)
    return softmax_attention(q, k, v, view, scale=scale, dropout=dropout, backend=backend)


def factors_are_cheaper(queries: int, ranks: tuple[int, int], widths: tuple[int, int]) -> bool:
    """Whether so many queries over long caches multiply less with the factors (ranks Rk, Rv; widths D, Dv)."""
    factored = sum(rank * width for rank, width in zip(ranks, widths, strict=True))
    return queries * factored <= factored + queries * sum(widths)


def _from_factors(
    q: Tensor, k_a: Tensor, k_b: Tensor, v_a: Tensor, v_b: Tensor, view: Visibility, scale: float, dropout: float
) -> Tensor:
    """All heads are queries of one key for each token and rank; head factors weigh the products."""
    (B, T, H, _), S = q.shape, k_b.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        # Each (B, R, S, ...), as the cache stores them.
        k_a, k_b, v_a, v_b = (factor.transpose(1, 2) for factor in (k_a, k_b, v_a, v_b))
        columns = q.to(dtype).permute(0, 3, 2, 1).flatten(2)[:, None]
        products = (k_b.to(dtype) @ columns).unflatten(-1, (H, T)) * k_a.to(dtype)[..., None]
        scores = products.sum(1).permute(0, 2, 3, 1) * (scale / k_b.shape[1])
        p = F.dropout(masked_softmax(scores, view.dense((B, H, T, S), q.device)), dropout)
        weights = p.permute(0, 3, 1, 2)[:, None] * v_a.to(dtype)[..., None]
        heads = weights.flatten(3).transpose(2, 3).to(v_b.dtype) @ v_b
        out: Tensor = (heads.to(dtype).sum(1) / v_b.shape[1]).unflatten(1, (H, T)).transpose(1, 2)
        return out.to(v_b.dtype)
