"""How many examples one attention layer memorises (Mahdavi et al. 2024, arXiv:2306.02010).

A label has to be predicted from a query token and a context of n tokens. With r = min(n, head width) the paper shows
that H heads can memorise H (r - 1) + 1 examples. This file has the task, the paper's one-layer model around any
mechanism, the training experiment, and a test without training: with queries and keys frozen, an output at the query is
linear in the features

    Psi = [a_1 Z, ..., a_H Z, 1]     (N, H d + 1), a_h the weights of head h over the context, Z the context's states

so every scalar labelling of N examples is fitted exactly if and only if rank(Psi) = N.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnzoo
from attnzoo.diagnostics.arguments import TOLERANCE, check_choice, check_tensor
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.heads.observe import observe
from attnzoo.rules import INTEGER, POSITIVE, SIZE, SWITCH, Rule, check, check_sizes, describe

CONTEXTS = ("random", "fixed", "perm")
_BAG = 500
_SATURATED = 0.99
_NUMPY_SEED: Rule = (*INTEGER, (lambda value: 0 <= value < 2**32, "lie in [0, 2^32)"))


@dataclass(frozen=True)
class MemorizationTask:
    """Random examples in the official generator's order, so that a seed gives the official data (needs numpy).

    Args:
        num_examples: N.
        context_size: context tokens n; at most 500 for "perm".
        input_dim: width of a token.
        num_classes: of the labels; ignored for regression.
        classification: labels are classes, else numbers in [0, 1).
        context: "random": one for each example; "fixed": one for all; "perm": n of a bag of 500 tokens, in an order
            drawn for each example.
        seed: of numpy's RandomState.

    Raises:
        ValueError: for an argument outside its rule.
    """

    num_examples: int
    context_size: int = 32
    input_dim: int = 64
    num_classes: int = 100
    classification: bool = True
    context: str = "random"
    seed: int = 42

    def __post_init__(self) -> None:
        check_sizes(
            num_examples=self.num_examples, context_size=self.context_size, input_dim=self.input_dim,
            num_classes=self.num_classes,
        )  # fmt: skip
        check("classification", self.classification, SWITCH)
        check("seed", self.seed, _NUMPY_SEED)
        check_choice("context", self.context, CONTEXTS)
        if self.context == "perm" and self.context_size > _BAG:
            raise ValueError(f"context_size must be at most {_BAG} for context 'perm', got {self.context_size}")

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs (N, n + 1, input_dim) in float32, token 0 the query; labels (N,), int64 or float32."""
        import numpy as np

        draw = np.random.RandomState(self.seed)
        N, n, width = self.num_examples, self.context_size, self.input_dim
        if self.context == "perm":
            bag = draw.uniform(size=(_BAG, width))
            context = np.stack([bag[draw.permutation(_BAG)[:n]] for _ in range(N)])
        else:
            context = draw.uniform(size=(N if self.context == "random" else 1, n, width))
        queries = draw.uniform(size=(N, width))
        x = np.concatenate([queries[:, None], np.broadcast_to(context, (N, n, width))], axis=1)
        if self.classification:
            labels = draw.multinomial(1, np.full(self.num_classes, 1 / self.num_classes), size=N).argmax(-1)
            return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(draw.uniform(size=N).astype(np.float32))


class MemorizationModel(nn.Module):
    """Embedding, sinusoidal positions, one attention layer in which no query sees token 0, decoder at token 0.

    Args:
        attention: makes the layer from embed_dim; `baseline_attention` gives the paper's. It has to take a boolean
            mask and be bidirectional.
        input_dim: width of a token.
        embed_dim: width d.
        num_classes: outputs; 1 for regression.

    Raises:
        ValueError: if the layer is causal, or a size is not at least 1.
    """

    pe: Tensor

    def __init__(
        self,
        attention: Callable[[int], nn.Module],
        input_dim: int = 64,
        embed_dim: int = 64,
        num_classes: int = 100,
        *,
        max_context: int = 512,
    ) -> None:
        super().__init__()
        check_sizes(input_dim=input_dim, embed_dim=embed_dim, num_classes=num_classes, max_context=max_context)
        if not callable(attention):
            raise ValueError(f"attention must make a layer from a width, got {describe(attention)}")
        self.embedding = nn.Linear(input_dim, embed_dim)
        self.attn = attention(embed_dim)
        self.decoder = nn.Linear(embed_dim, num_classes)
        if getattr(self.attn, "causal", False):
            raise ValueError("attention must be made with causal=False, or token 0 would see nothing")
        self.register_buffer("pe", sinusoidal_positions(max_context + 1, embed_dim), persistent=False)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (N, n + 1, input_dim) -> what the attention layer reads, (N, n + 1, d)."""
        width = self.embedding.in_features
        if x.ndim != 3 or x.shape[1] < 2 or x.shape[2] != width:
            raise ValueError(f"x must have shape (N, n + 1, {width}) with n at least 1, got {tuple(x.shape)}")
        if x.shape[1] > self.pe.shape[0]:
            raise ValueError(
                f"x must have at most max_context {self.pe.shape[0] - 1} context tokens, got {x.shape[1] - 1}"
            )
        z: Tensor = self.embedding(x)
        return z + self.pe[: x.shape[1]].to(z.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, n + 1, input_dim) -> outputs at token 0, (N, num_classes)."""
        if x.dtype == torch.float16:
            raise ValueError("x must not be float16: features this close would be told apart by rounding")
        seen = torch.arange(x.shape[1], device=x.device) > 0
        y: Tensor = self.decoder(self.attn(self.embed(x), mask=seen[None, None, None])[:, 0])
        return y

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy for integer targets (N,), mean squared error for others."""
        y = self(x)
        if target.is_floating_point():
            return F.mse_loss(y[:, 0], target.to(y.dtype))
        return F.cross_entropy(y, target)


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """pe[p, 2i] = sin(p / 10000^(2i / width)), pe[p, 2i + 1] = cos of it: (length, width) in float64."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(
        -math.log(10000.0) * torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


def baseline_attention(num_heads: int, head_dim: int | None = None, v_head_dim: int = 1) -> Callable[[int], nn.Module]:
    """The paper's attention layer, for `MemorizationModel`.

    No biases or rotation, scale 1 / sqrt(d) with the embedding width d, Xavier-uniform weights for each head.

    Args:
        num_heads: H.
        head_dim: width of queries and keys. Default: d, not d / H.
        v_head_dim: width of a head's value.
    """

    def make(embed_dim: int) -> nn.Module:
        width = embed_dim if head_dim is None else head_dim
        attn = attnzoo.GroupedQueryAttention(
            embed_dim, num_heads, num_heads, width, v_head_dim=v_head_dim, rope=None, causal=False,
            scale=embed_dim**-0.5,
        )  # fmt: skip
        with torch.no_grad():
            for linear, rows in ((attn.q_proj, width), (attn.k_proj, width), (attn.v_proj, v_head_dim)):
                for head in torch.split(linear.weight, rows):
                    nn.init.xavier_uniform_(head)
            nn.init.xavier_uniform_(attn.o_proj.weight)
        return attn

    return make


def lower_bound(num_heads: int, context_size: int, head_dim: int) -> int:
    """Examples that H heads can memorise by the paper's theorem: H (min(n, head_dim) - 1) + 1."""
    return num_heads * (min(context_size, head_dim) - 1) + 1


def upper_bound(num_heads: int, context_size: int, embed_dim: int, *, shared: bool) -> int:
    """Largest rank of Psi: H d + 1, and H min(n - 1, d) + 1 if all examples share the context.

    Weights of a head sum to 1, so over a shared context its features have n - 1 degrees of freedom and a constant.
    """
    return num_heads * (min(context_size - 1, embed_dim) if shared else embed_dim) + 1


@dataclass(frozen=True)
class MemorizationRank:
    """Capacity of a layer whose queries and keys are frozen.

    Attributes:
        num_examples: N.
        rank: of Psi; N means that every scalar labelling of these examples is fitted.
        lower_bound: see `lower_bound`.
        upper_bound: see `upper_bound`; the rank is min(N, this) for generic queries and keys.
        lstsq_mse: mean squared residual of fitting targets.
        saturation: share of pairs of example and head whose largest weight exceeds 0.99.
    """

    num_examples: int
    rank: int
    lower_bound: int
    upper_bound: int
    lstsq_mse: float
    saturation: float


def memorization_rank(
    model: MemorizationModel,
    task: MemorizationTask,
    rtol: float = 1e-9,
    *,
    num_examples: int | None = None,
    targets: Tensor | None = None,
) -> MemorizationRank:
    """Rank of the features Psi, in float64: one forward pass and one decomposition of (N, H d + 1), no training.

    Weights must be neither uniform nor saturated (logits of standard deviation 1 to 3), else singular values fall below
    the tolerance. The bounds assume that the features of each head have width d; queries may have biases and norms.

    Args:
        model: fresh or trained, around any softmax mechanism; left as it is.
        task: for its inputs; its labels are not used.
        rtol: a singular value counts if it exceeds rtol times the largest.
        num_examples: use the first so many examples. Default: all.
        targets: (N,) for the residual. Default: standard normal, seeded with N.

    Raises:
        ValueError: for more examples than the task has, or an argument outside its rule.
    """
    check("rtol", rtol, TOLERANCE)
    if num_examples is not None:
        check("num_examples", num_examples, SIZE)
        if num_examples > task.num_examples:
            raise ValueError(f"num_examples must be at most the task's {task.num_examples}, got {num_examples}")
    psi, weights = memorization_features(model, task.data[0][:num_examples])
    N, H = psi.shape[0], weights.shape[1]
    u, s, _ = torch.linalg.svd(psi, full_matrices=False)
    rank = int((s > rtol * s[0]).sum())
    if targets is None:
        targets = torch.randn(N, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    check_tensor("targets", targets)
    if targets.shape != (N,):
        raise ValueError(f"targets must have shape ({N},), got {tuple(targets.shape)}")
    if not bool(targets.isfinite().all()):
        raise ValueError("targets must be finite, got NaN or infinite ones")
    y = targets.to(psi)
    basis = u[:, :rank]
    d = model.embedding.out_features
    width = int(getattr(model.attn, "head_dim", d))
    return MemorizationRank(
        N,
        rank,
        lower_bound(H, task.context_size, width),
        upper_bound(H, task.context_size, d, shared=task.context == "fixed"),
        float((y - basis @ (basis.T @ y)).square().mean()),
        float((weights.amax(-1) > _SATURATED).double().mean()),
    )


@torch.no_grad()
def memorization_features(model: MemorizationModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Psi (N, H d + 1) and the weights of token 0 over the context (N, H, n), in float64.

    Args:
        model: left as it is.
        x: (N, n + 1, input_dim).

    Raises:
        ValueError: if the mechanism has no attention weights.
    """
    exact = copy.deepcopy(model).double().eval()
    observed: list[Tensor] = []

    def visit(call: AttentionCall) -> None:
        observed.append(call.pattern(slice(0, 1))[:, :, 0, 1:])

    x = x.to(exact.embedding.weight)
    with observe(exact, visit):
        exact(x)
    (weights,) = observed
    states = exact.embed(x)[:, 1:]
    psi = (weights @ states).flatten(1)
    return torch.cat([psi, psi.new_ones(psi.shape[0], 1)], 1), weights


@dataclass(frozen=True)
class MemorizationPoint:
    """One training of `memorization_curve`.

    Attributes:
        num_heads: H.
        num_examples: N.
        load: N over the lower bound H (min(n, head_dim) - 1) + 1.
        accuracy: share of examples memorised, at the step of least loss.
        loss: that loss.
        steps: taken.
        saturation: as in `MemorizationRank`, after training.
    """

    num_heads: int
    num_examples: int
    load: float
    accuracy: float
    loss: float
    steps: int
    saturation: float


def memorization_curve(
    heads: Sequence[int] = (1, 2, 4, 8),
    loads: Sequence[float] = (0.5, 1, 2, 4),
    *,
    attention: Callable[[int], Callable[[int], nn.Module]] = baseline_attention,
    context_size: int = 8,
    embed_dim: int = 16,
    num_classes: int = 10,
    context: str = "fixed",
    steps: int = 5000,
    lr: float = 3e-3,
    seed: int = 42,
) -> list[MemorizationPoint]:
    """Train the model for each number of heads H and N = load * H (n - 1) examples, and count what it memorises.

    Full-batch Adam in float32, stopped when all is memorised. The defaults take minutes on a CPU; the paper's setting
    (d 64, n 32, 100 classes, up to 130 000 examples) takes days. How many examples are memorised grows with H; at the
    paper's size accuracy against load hardly depends on H; at the defaults it does, since with values of width 1 the
    outputs of one or two heads span a line or a plane, on which few classes can be separated. Accuracy beyond load 1
    does not contradict the bound: classes can be guessed, and queries and keys learn too.

    Args:
        heads: numbers of heads.
        loads: multiples of H (n - 1).
        attention: from a number of heads to a maker of the layer, as `MemorizationModel` takes it.
        context_size: n.
        embed_dim: width d of tokens and states.
        num_classes: of the labels.
        context: as in `MemorizationTask`.
        steps: at most.
        lr: learning rate.
        seed: of the data and of the weights.

    Raises:
        ValueError: for an argument outside its rule.
    """
    check("steps", steps, SIZE)
    check("lr", lr, POSITIVE)
    if not callable(attention):
        raise ValueError(f"attention must make a layer from a number of heads, got {describe(attention)}")
    for name, given, rule in (("heads", heads, SIZE), ("loads", loads, POSITIVE)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ValueError(f"{name} must be several numbers, got {describe(given)}")
        for value in given:
            check(name, value, rule)
    points = []
    for H in heads:
        for load in loads:
            N = max(1, round(load * H * (context_size - 1)))
            task = MemorizationTask(N, context_size, embed_dim, num_classes, context=context, seed=seed)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = MemorizationModel(attention(H), embed_dim, embed_dim, num_classes, max_context=context_size)
                points.append(_train(model, task, H, steps, lr))
    return points


def _train(model: MemorizationModel, task: MemorizationTask, heads: int, steps: int, lr: float) -> MemorizationPoint:
    x, target = task.data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    best, accuracy, step = math.inf, 0.0, 0
    for step in range(1, steps + 1):  # noqa: B007  (the last one is reported)
        y = model(x)
        loss = F.cross_entropy(y, target)
        if loss.item() < best:
            best, accuracy = loss.item(), float((y.argmax(-1) == target).double().mean())
            if accuracy == 1:
                break
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    _, weights = memorization_features(model, x)
    width = int(getattr(model.attn, "head_dim", model.embedding.out_features))
    load = task.num_examples / lower_bound(heads, task.context_size, width)
    saturation = float((weights.amax(-1) > _SATURATED).double().mean())
    return MemorizationPoint(heads, task.num_examples, load, accuracy, best, step, saturation)
