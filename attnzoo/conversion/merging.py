"""Key/value heads merged in coordinates of their own: the mathematics of `to_gqa` with mode "activations"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnzoo.conversion.factors import roots
from attnzoo.modules.gqa import GroupedQueryAttention


@torch.no_grad()
def merged_heads(
    module: GroupedQueryAttention, num_kv_heads: int, moment: Tensor, *, two_sided: bool = False
) -> dict[str, Tensor]:
    """Weights and biases of all projections after merging the heads of each group, for the moment C of [x, 1].

    Features that rotate together are one complex number z = k_i + i k_j. For the z of a group's n heads, Z [x, 1]
    (n, E + 1), the best single one is t^H Z, with t the first left singular vector of Z C^1/2, since a head's score
    Re(q conj(z)) turns by the same angle whatever t multiplies both: q of head g becomes q conj(t_g). Of features that
    do not rotate, stacked as V (n d, E + 1), the best d are W^T V, with W the first d left singular vectors of
    V C^1/2; queries, or the columns of the output projection, are multiplied by W's rows of their head.

    Two-sided, the heads are first multiplied by A, the root of the second moment of their queries or of the Gram matrix
    of the output projection's columns, and what reads them by A's inverse.
    """
    root, _ = roots(moment)
    groups, n = num_kv_heads, module.num_kv_heads // num_kv_heads
    q, k, v = (_with_bias(linear, root) for linear in (module.q_proj, module.k_proj, module.v_proj))
    q = q.unflatten(0, (groups, n, -1, module.head_dim))
    k = k.unflatten(0, (groups, n, module.head_dim))
    v = v.unflatten(0, (groups, n, module.v_head_dim))
    out = module.o_proj.weight.to(root).unflatten(1, (groups, n, -1, module.v_head_dim)).permute(1, 2, 3, 4, 0)
    first, second = _pairs(module)
    still = [i for i in range(module.head_dim) if i not in {*first, *second}]
    keys, queries = torch.zeros_like(k[:, 0]), torch.zeros_like(q)

    a = torch.complex(q[..., first, :], q[..., second, :])
    z = torch.complex(k[:, :, first], k[:, :, second])
    if two_sided:
        # Of a query's turns all are alike: its size is what counts.
        size = (a @ root.to(a.dtype)).abs().square().sum((2, 4)).sqrt()[..., None]
        size = size.clamp(min=1e-6 * float(size.max()) or 1.0) if size.numel() else size
        z, a = z * size, a / size[:, :, None]
    z = z.transpose(1, 2)
    t = torch.linalg.svd(z @ root.to(z.dtype), full_matrices=False).U[..., :1]
    merged = (t.mH @ z).squeeze(2)
    turned = a * t.conj().transpose(1, 2)[:, :, None]
    keys[:, first], keys[:, second] = merged.real, merged.imag
    queries[..., first, :], queries[..., second, :] = turned.real, turned.imag

    keys[:, still], queries[..., still, :] = _shared_subspace(k[:, :, still], q[..., still, :], root, root, two_sided)
    values, out = _shared_subspace(v, out, root, None, two_sided)
    state = {
        f"{name}_proj.{kind}": part
        for name, matrix in (("q", queries.flatten(0, 3)), ("k", keys.flatten(0, 1)), ("v", values.flatten(0, 1)))
        for kind, part in (("weight", matrix[:, :-1]), ("bias", matrix[:, -1]))
        if kind == "weight" or module.q_proj.bias is not None
    }
    return state | {"o_proj.weight": out.permute(4, 0, 1, 2, 3).flatten(1)}


def _with_bias(linear: nn.Linear, like: Tensor) -> Tensor:
    """Weight (n, E) with the bias, or zeros, as one more column."""
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    return torch.cat([linear.weight.to(like), bias.to(like)[:, None]], dim=1)


def _pairs(module: GroupedQueryAttention) -> tuple[list[int], list[int]]:
    """The two features of each pair that rotates."""
    features, half = list(range(module.rope_dim)), module.rope_dim // 2
    if module.rope is not None and module.rope.style != "half":
        return features[0::2], features[1::2]
    return features[:half], features[half:]


def _shared_subspace(
    heads: Tensor, readers: Tensor, root: Tensor, reader_root: Tensor | None, two_sided: bool
) -> tuple[Tensor, Tensor]:
    """The merged heads (G, d, E + 1) of heads (G, n, d, E + 1), and the readers (G, n, R, d, F) of what became of them.

    A head and its readers meet in a product over d.
    """
    if two_sided:
        seen = readers if reader_root is None else readers @ reader_root
        scale, inverse = roots(torch.einsum("gnrif,gnrjf->gnij", seen, seen))
        heads, readers = scale @ heads, inverse[:, :, None] @ readers
    stacked = heads.flatten(1, 2)
    w = torch.linalg.svd(stacked @ root, full_matrices=False).U[..., : heads.shape[2]]
    w = torch.nn.functional.pad(w, (0, heads.shape[2] - w.shape[-1]))
    maps = w.unflatten(1, heads.shape[1:3])
    return w.mT @ stacked, maps.mT[:, :, None] @ readers
