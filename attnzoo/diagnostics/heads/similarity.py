"""Measures of what single heads do, and of how similar heads are.

Patterns are (B, H, T, T) or (H, T, T), rows of probabilities of queries over keys. `mask` (B, T) says which tokens are
real, True = real; others, padding on either side, count neither as queries nor as keys, and the first token is the
first real one. Averages are over all real tokens together, and nan where there is nothing to average. Logarithms are
natural. Everything is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.diagnostics.arguments import check_choice, check_tensor
from attnzoo.rules import COUNT, INTEGER, NUMBER, SWITCH, Rule, check, check_sizes, describe, is_number

_SHARE: Rule = ((lambda value: is_number(value) and 0 < value <= 1, "lie in (0, 1]"),)
_TOLERANCE = 1e-3
_KL_FLOOR = -40.0
DETECTABLE = ("previous_token_head", "duplicate_token_head", "induction_head")


# Single heads


def attention_entropy(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of a head's rows in nats, (H,)."""
    p, m = _rows(pattern, mask)
    return _mean(_entropy(p), m)


def normalized_entropy(pattern: Tensor, mask: Tensor | None = None, *, causal: bool = True) -> Tensor:
    """Entropy over the log of the number of visible keys, (H,); rows that see one key are left out."""
    p, m = _rows(pattern, mask)
    keys = torch.arange(1, p.shape[-1] + 1, device=p.device) if causal else m.sum(-1, keepdim=True)
    keys = keys.double()
    return _mean(_entropy(p) / keys.log().clamp(min=1e-30), m & (keys > 1))


def attention_distance(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of |i - j| under the pattern, in tokens, (H,)."""
    p, m = _rows(pattern, mask)
    at = torch.arange(p.shape[-1], device=p.device)
    return _mean((p * (at[:, None] - at).abs()).sum(-1), m)


def attention_distance_argmax(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean distance to the key with the largest weight, in tokens, (H,)."""
    p, m = _rows(pattern, mask)
    at = torch.arange(p.shape[-1], device=p.device)
    return _mean((at - p.argmax(-1)).abs().double(), m)


def head_confidence(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean largest weight of a row (Voita et al. 2019), (H,)."""
    p, m = _rows(pattern, mask)
    return _mean(p.amax(-1), m)


def attention_sink(pattern: Tensor, mask: Tensor | None = None, *, k: int = 0, exclude_self: bool = False) -> Tensor:
    """Mean weight on key k over the queries from k on (Gu et al. 2024), or those after it, (H,)."""
    check("k", k, COUNT)
    check("exclude_self", exclude_self, SWITCH)
    p, m = _rows(pattern, mask)
    if k >= p.shape[-1]:
        raise ValueError(f"k must be one of the {p.shape[-1]} keys, got {k}")
    at = torch.arange(p.shape[-1], device=p.device)
    return _mean(p[..., k], m & (at > k if exclude_self else at >= k))


def sink_rate(pattern: Tensor, mask: Tensor | None = None, *, eps: float = 0.3, k: int = 0) -> float:
    """Share of heads whose mean weight on key k exceeds eps."""
    check("eps", eps, NUMBER)
    weight = attention_sink(pattern, mask, k=k)
    return float((weight > eps).double().where(weight.isfinite(), weight).mean())


def previous_token_score(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean weight on the token before, (H,)."""
    return _diagonal(pattern, mask, 1)


def current_token_score(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean weight on the token itself, (H,)."""
    return _diagonal(pattern, mask, 0)


def induction_score(pattern: Tensor, period: int, mask: Tensor | None = None) -> Tensor:
    """Mean weight on the token after the last occurrence, for tokens [BOS] + r + r with r of `period` tokens, (H,)."""
    check("period", period, INTEGER)
    return _diagonal(pattern, mask, period - 1)


def detect_head(
    pattern: Tensor,
    tokens: Tensor,
    name: str,
    error_measure: str = "mul",
    *,
    mask: Tensor | None = None,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    round: int | None = 3,
) -> Tensor:
    """How well heads match a known kind, as TransformerLens's detect_head scores it, (H,).

    Args:
        pattern: (B, H, T, T) of whole sequences.
        tokens: (B, T) integers.
        name: "previous_token_head", "duplicate_token_head" or "induction_head".
        error_measure: "mul", the share of the weight on the kind's pairs, or "abs", 1 - T mean |A - M|.
        mask: (B, T), the real tokens. Default: all.
        exclude_bos: leave the first key out.
        exclude_current_token: leave the diagonal out.
        round: decimals of "abs", which the original rounds to 3; None for all.
    """
    check_choice("name", name, DETECTABLE)
    if error_measure not in ("mul", "abs"):
        raise ValueError(f"error_measure must be 'mul' or 'abs', got {error_measure!r}")
    for option, value in (("exclude_bos", exclude_bos), ("exclude_current_token", exclude_current_token)):
        check(option, value, SWITCH)
    if round is not None:
        check("round", round, INTEGER)
    p, m = _rows(pattern, mask)
    T = p.shape[-1]
    check_tensor("tokens", tokens)
    if tokens.is_floating_point() or tuple(tokens.shape) != (p.shape[0], T):
        raise ValueError(
            f"tokens must be integers of shape {(p.shape[0], T)}, got {tokens.dtype} {tuple(tokens.shape)}"
        )
    at = torch.arange(T, device=p.device)
    if mask is not None:
        tokens, some = tokens.gather(1, real_first(mask)), mask.any(1)
        tokens, p, m = tokens[some], p[some], m[some]
    same = tokens[:, :, None] == tokens[:, None, :]
    if name == "previous_token_head":
        wanted = (at[:, None] - at == 1).expand(p.shape[0], T, T)
    elif name == "duplicate_token_head":
        wanted = same & (at < at[:, None])
    else:
        # Key j counts if the token before it is the query's.
        wanted = torch.zeros_like(same)
        wanted[:, :, 1:] = same[:, :, :-1] & (at[1:] <= at[:, None]) & (at[:-1] < at[:, None])
    target = (wanted & m.mT & m).double()[:, None]
    if exclude_bos:
        p = p * (at > 0)
    if exclude_current_token:
        p = p * (at[:, None] != at)
    if error_measure == "mul":
        return ((p * target).sum((-1, -2)) / p.sum((-1, -2))).mean(0)
    score = 1 - (p - target).abs().sum((-1, -2)) / m.sum(-1)
    return (score if round is None else torch.round(score, decimals=round)).mean(0)


def copying_score(w_o: Tensor, w_v: Tensor, embed: Tensor, unembed: Tensor) -> Tensor:
    """Whether a head's output raises the logits of the token it reads (Elhage et al. 2021), (H,), in [-1, 1].

    sum of the eigenvalues of W_U W_o W_v W_E^T over the sum of their sizes, on a product of head width.

    Args:
        w_o: (H, E, D) output weights by head.
        w_v: (H, D, E) value weights by head.
        embed: (V, E).
        unembed: (V, E).
    """
    for name, matrix, ndim in (("w_o", w_o, 3), ("w_v", w_v, 3), ("embed", embed, 2), ("unembed", unembed, 2)):
        check_tensor(name, matrix)
        if matrix.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got {tuple(matrix.shape)}")
    (H, E, D), vocabulary = w_o.shape, embed.shape[0]
    for name, matrix, shape in (
        ("w_v", w_v, (H, D, E)), ("embed", embed, (vocabulary, E)), ("unembed", unembed, (vocabulary, E)),
    ):  # fmt: skip
        if tuple(matrix.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(matrix.shape)}")
    middle = embed.double().T @ unembed.double()
    values = torch.linalg.eigvals(w_v.double() @ middle @ w_o.double())
    score: Tensor = (values.sum(-1) / values.abs().sum(-1)).real
    return score


def value_weighted_pattern(pattern: Tensor, value: Tensor) -> Tensor:
    """A_ij |v_j| (B, H, T, T), from values (B, H, T, Dv): not a distribution."""
    p, v = _four(pattern), _four(value, "value")
    if v.shape[:3] != (*p.shape[:2], p.shape[-1]):
        raise ValueError(f"value must have shape {(*p.shape[:2], p.shape[-1])} and a width, got {tuple(value.shape)}")
    lengths: Tensor = torch.linalg.vector_norm(v.double(), dim=-1)
    return p.double() * lengths[..., None, :]


# Pairs of heads


def attention_cosine(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine of whole patterns, mean over the examples in which both heads attend to anything, (H, H)."""
    p, _ = _rows(pattern, mask, probabilities=False)
    flat = p.flatten(2)
    return cosines(flat @ flat.mT).nanmean(0)


def attention_correlation(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pearson correlation of the entries j <= i, mean over the examples in which both heads' differ, (H, H)."""
    p, m = _rows(pattern, mask, probabilities=False)
    T = p.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=p.device).tril()
    correlations = p.new_full((p.shape[0], p.shape[1], p.shape[1]), math.nan)
    for place, (one, valid) in enumerate(zip(p, m[:, 0], strict=True)):
        entries = one[:, seen & valid[:, None]]
        entries = entries - entries.mean(-1, keepdim=True)
        correlations[place] = cosines(entries @ entries.mT)
    return correlations.nanmean(0)


def attention_kl(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean KL(A_a || A_b) over queries, row a, column b, (H, H); the log of 0 counts as -40."""
    p, m = _rows(pattern, mask)
    logs = torch.where(p > 0, p.clamp(min=1e-300).log(), torch.full_like(p, _KL_FLOOR))
    total = m.sum()
    own = (p * logs).sum((0, 2, 3)) / total
    cross = torch.einsum("baij,bcij->ac", p, logs) / total
    return own[:, None] - cross


def attention_js(pattern: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean Jensen-Shannon divergence over queries in nats, at most ln 2, (H, H)."""
    p, m = _rows(pattern, mask)
    entropy = _entropy(p)
    heads = p.shape[1]
    divergence = p.new_zeros(heads, heads)
    for a in range(heads):
        middle = _entropy((p + p[:, a : a + 1]) / 2) - (entropy + entropy[:, a : a + 1]) / 2
        divergence[a] = _mean(middle, m)
    return divergence


def output_cosine(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cosine of head outputs (B, H, T, Dv) of a token, (H, H)."""
    x = _four(outputs, "outputs").double()
    m = _query_mask(x, mask)
    x = torch.nn.functional.normalize(x, dim=-1).masked_fill(~m[..., None], 0.0)
    return torch.einsum("batd,bctd->ac", x, x) / m.sum()


def value_cosine(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same of values (B, H, T, Dv), expanded to query heads, (H, H)."""
    return output_cosine(values, mask)


def linear_cka(outputs: Tensor, mask: Tensor | None = None, *, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of head outputs (B, H, T, Dv) (Kornblith et al. 2019), (H, H).

    Biased upwards with few tokens; unbiased=True uses the U-statistic, which holds n x n Gram matrices.
    """
    check("unbiased", unbiased, SWITCH)
    x = _tokens(outputs, mask)
    if not unbiased:
        x = x - x.mean(1, keepdim=True)
        norms: Tensor = torch.linalg.vector_norm((x.mT @ x).flatten(1), dim=-1)
        cross: Tensor = torch.einsum("and,cne->acde", x, x).flatten(2).square().sum(-1)
        biased: Tensor = cross / (norms[:, None] * norms)
        return biased
    gram = x @ x.mT
    gram = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    n = gram.shape[-1]
    if n < 4:
        raise ValueError(f"outputs must have at least 4 tokens for the unbiased form, got {n}")
    sums, totals = gram.sum(-1), gram.sum((-1, -2))
    trace = torch.einsum("aij,cij->ac", gram, gram)
    hsic = trace + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ sums.T)
    own = hsic.diagonal()
    alignment: Tensor = hsic / (own[:, None] * own).sqrt()
    return alignment


def svcca(outputs: Tensor, mask: Tensor | None = None, *, variance: float = 0.99) -> Tensor:
    """Mean canonical correlation of the directions that hold `variance` of the energy (Raghu et al. 2017), (H, H).

    A head whose outputs are the same for all tokens has no directions: NaN.
    """
    check("variance", variance, _SHARE)
    bases = []
    for x in _tokens(outputs, mask):
        centred = x - x.mean(0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        varies = bool((s > s.numel() * 2.0**-52 * torch.linalg.vector_norm(x)).any())
        bases.append(u[:, : int((share < variance).sum()) + 1] if varies else u[:, :0])
    correlation = torch.zeros(len(bases), len(bases), dtype=torch.float64, device=outputs.device)
    for a, left in enumerate(bases):
        for b, right in enumerate(bases):
            correlation[a, b] = torch.linalg.svdvals(left.T @ right).clamp(max=1).mean()
    return correlation


def composition_scores(
    earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor, Tensor, Tensor], mode: str
) -> Tensor:
    """How much later heads read from earlier ones (Elhage et al. 2021): |R L| / (|R| |L|), row = earlier, (H, H).

    Without rotation and norms. L = W_o W_v of an earlier head; R = (W_q^T W_k)^T, W_q^T W_k or W_o W_v of a later one
    for mode "Q", "K" or "V". No (E, E) matrix is formed.

    Args:
        earlier: (W_o (H, E, D), W_v (H, D, E)).
        later: (W_q, W_k, W_v (H, D, E), W_o (H, E, D)).
        mode: "Q", "K" or "V".
    """
    if mode not in ("Q", "K", "V"):
        raise ValueError(f"mode must be 'Q', 'K' or 'V', got {mode!r}")
    for name, given, count, writes in (("earlier", earlier, 2, 0), ("later", later, 4, 3)):
        if not isinstance(given, tuple | list) or len(given) != count:
            raise ValueError(f"{name} must be {count} tensors, got {describe(given)}")
        for place, matrix in enumerate(given):
            check_tensor(name, matrix)
            side = 1 if place == writes else 2
            fits = matrix.ndim == 3 and matrix.shape[0] == given[0].shape[0]
            if not fits or matrix.shape[side] != earlier[0].shape[1]:
                raise ValueError(f"{name} must be (H, D, E) and (H, E, D) of one model, got {tuple(matrix.shape)}")
    out, into = (x.double() for x in earlier)
    w_q, w_k, w_v, w_o = (x.double() for x in later)
    left, right = {"Q": (w_k.mT, w_q), "K": (w_q.mT, w_k), "V": (w_o, w_v)}[mode]
    scale_l = _product_norm(out, into)
    scale_r = _product_norm(left, right)
    middle = torch.einsum("bde,aef->abdf", right, out)
    whole = (left.mT @ left)[None] @ middle
    gram = into @ into.mT
    size: Tensor = torch.einsum("abdf,abdg,afg->ab", whole, middle, gram).clamp(min=0).sqrt()
    return size / (scale_l[:, None] * scale_r)


def disagreement(kind: str, *, pattern: Tensor | None = None, vectors: Tensor | None = None,
                 mask: Tensor | None = None) -> float:  # fmt: skip
    """Disagreement of a layer's heads (Li et al. 2018), over all H^2 pairs, a head with itself included.

    kind: "position" (- mean inner product of patterns), "output" or "subspace" (- mean cosine of head outputs, or of
    values, given as vectors (B, H, T, Dv)).
    """
    if kind == "position":
        if pattern is None:
            raise ValueError("pattern must be given for disagreement 'position', got None")
        p, m = _rows(pattern, mask, probabilities=False)
        total = p.sum(1).square().sum()
        return -float(total / m.sum()) / p.shape[1] ** 2
    if kind not in ("output", "subspace"):
        raise ValueError(f"kind must be 'position', 'output' or 'subspace', got {kind!r}")
    if vectors is None:
        raise ValueError(f"vectors must be given for disagreement {kind!r}, got None")
    return -float(output_cosine(vectors, mask).mean())


def attention_agreement(pattern: Tensor, mask: Tensor | None = None) -> float:
    """Mean inner product of the patterns of a layer's heads: minus `disagreement` "position"."""
    return -disagreement("position", pattern=pattern, mask=mask)


def output_agreement(outputs: Tensor, mask: Tensor | None = None) -> float:
    """Mean cosine of the outputs (B, H, T, Dv) of a layer's heads: minus `disagreement` "output"."""
    return -disagreement("output", vectors=outputs, mask=mask)


def head_diversity(pairs: Tensor) -> float:
    """Mean of a pair matrix (H, H) off its diagonal; NaN for a single head."""
    check_tensor("pairs", pairs)
    if pairs.ndim != 2 or pairs.shape[0] != pairs.shape[1]:
        raise ValueError(f"pairs must have shape (H, H), got {tuple(pairs.shape)}")
    off = ~torch.eye(pairs.shape[0], dtype=torch.bool, device=pairs.device)
    return float(pairs[off].double().mean())


def cosines(gram: Tensor) -> Tensor:
    """Inner products (..., H, H) of vectors over their lengths; NaN for one of length 0."""
    size = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    return gram / (size[..., :, None] * size[..., None, :])


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norms of left @ right, by head."""
    return ((left.mT @ left) * (right @ right.mT)).sum((-1, -2)).clamp(min=0).sqrt()


def _four(x: Tensor, name: str = "pattern") -> Tensor:
    check_tensor(name, x)
    if x.ndim not in (3, 4):
        last = "T" if name == "pattern" else "Dv"
        raise ValueError(f"{name} must have shape (B, H, T, {last}) or (H, T, {last}), got {tuple(x.shape)}")
    return x if x.ndim == 4 else x[None]


def _rows(pattern: Tensor, mask: Tensor | None, probabilities: bool = True) -> tuple[Tensor, Tensor]:
    """Pattern (B, H, T, T) in float64, real tokens first and 0 elsewhere, and which rows are real, (B, 1, T).

    Raises for rows that are not distributions over the real tokens.
    """
    p = _four(pattern).double()
    if p.shape[-1] != p.shape[-2] or not p.shape[-1]:
        raise ValueError(f"pattern must have as many keys as queries, got {tuple(pattern.shape)}")
    m = _query_mask(p, mask)
    if mask is not None:
        p = real_tokens_first(p, mask, mask)
        m = m.gather(-1, real_first(mask)[:, None])
    if not bool(p.isfinite().all()):
        raise ValueError("pattern must be finite where tokens are real, got NaN or infinite entries")
    if probabilities:
        rows = p.sum(-1)[m.expand(p.shape[:3])]
        if bool(((rows - 1).abs() > _TOLERANCE).any()) or bool((p < -_TOLERANCE).any()):
            raise ValueError("pattern must hold distributions: rows of this one do not sum to 1, or are negative")
    return p, m


def real_tokens_first(pattern: Tensor, mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Pattern (B, H, T, S) with real queries (B, T) and keys (B, S) first, and 0 elsewhere."""
    for dim, real in ((-2, mask), (-1, key_mask)):
        if real is not None:
            order, shape = real_first(real), (len(real), 1, -1, 1) if dim == -2 else (len(real), 1, 1, -1)
            there = real.gather(1, order).view(shape)
            pattern = pattern.gather(dim, order.view(shape).expand_as(pattern)).masked_fill(~there, 0.0)
    return pattern


def real_first(mask: Tensor) -> Tensor:
    """Places (B, T) of the tokens with the real ones first, each group in its order."""
    return torch.sort(mask.logical_not().byte(), dim=1, stable=True).indices


def _query_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    B, _, T = x.shape[:3]
    if mask is None:
        return torch.ones(B, 1, T, dtype=torch.bool, device=x.device)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or tuple(mask.shape) != (B, T):
        raise ValueError(f"mask must be boolean of shape {(B, T)}, got {mask.dtype} {tuple(mask.shape)}")
    return mask[:, None]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the counting rows of all examples of values (B, H, T), (H,)."""
    return (values * mask).sum((0, 2)) / mask.expand(values.shape[0], 1, values.shape[2]).sum()


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _diagonal(pattern: Tensor, mask: Tensor | None, offset: int) -> Tensor:
    p, m = _rows(pattern, mask)
    if not 0 <= offset < max(p.shape[-1], 2):
        raise ValueError(f"offset must lie between 0 and the {p.shape[-1]} keys, got {offset}")
    values = p.diagonal(-offset, -2, -1)
    return _mean(values, m[..., offset:])


def _tokens(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Counting tokens of all examples by head, (H, n, Dv)."""
    x = _four(outputs, "outputs").double()
    m = _query_mask(x, mask)[:, 0]
    x = x.transpose(1, 2)[m].transpose(0, 1)
    if not bool(x.isfinite().all()):
        raise ValueError("outputs must be finite where tokens are real, got NaN or infinite entries")
    return x


def labels(layers: int, heads: int) -> list[str]:
    """ "L0H0", "L0H1", ... as TransformerLens names heads."""
    check_sizes(layers=layers, heads=heads)
    return [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]


MAX_JS = math.log(2)
"""The largest Jensen-Shannon divergence, in nats."""
