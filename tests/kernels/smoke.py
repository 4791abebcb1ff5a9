"""A short look at every family of kernels at the tiles that users get: calls, masks with needles, and how both are held
to the definition. `test_gpu_smoke.py` runs them on a GPU, and checks on a CPU that they would find what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.masks import AttentionMask, Visibility
from attnzoo.ops.composed_attention import Composition, composed_attention
from attnzoo.ops.expert_projection import Routes, expert_linear_pieces
from attnzoo.ops.factored_attention import tensor_product
from attnzoo.ops.head_mixing import knock_linear, knock_mlp
from attnzoo.ops.head_routing import routed_attention
from attnzoo.ops.latent_attention import latent_attention
from attnzoo.ops.linear_attention import linear_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotary_table, rotate
from tests.kernels.tolerance import assert_as_good_as, error_of, results

Run = Callable[..., list[Tensor]]
T = 300
"""Not a multiple of any tile."""


@dataclass(frozen=True)
class Case:
    """A call of one family.

    shapes and kinds of its inputs: "x" normal and differentiable, "-" normal and not, "+" small, at least 0
    and differentiable, or a function of (shape, generator) for others. fused and plain take the inputs.
    """

    shapes: tuple[tuple[int, ...], ...]
    kinds: Sequence[str | Callable[..., Tensor]]
    fused: Run
    plain: Run

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """The same numbers on every device, rounded to dtype."""
        generator = torch.Generator().manual_seed(5)
        made = []
        for shape, kind in zip(self.shapes, self.kinds, strict=True):
            if callable(kind):
                other = kind(shape, generator).to(device)
                made.append(other.requires_grad_(other.is_floating_point()))
                continue
            x = torch.randn(shape, generator=generator)
            x = (0.2 * x.relu() if kind == "+" else x).to(device, dtype)
            made.append(x.requires_grad_(kind != "-"))
        return made


def by_backend(shapes: Sequence[tuple[int, ...]], kinds: Any, call: Callable[..., Tensor]) -> Case:
    """A case whose two forms are one operation's "triton" and "eager"."""

    def run(backend: str) -> Run:
        return lambda *x: [call(*x, backend=backend)]

    return Case(tuple(shapes), kinds, run("triton"), run("eager"))


def softmax(D: int, H: int = 4, G: int = 2, R: int = 0, B: int = 2, **words: Any) -> Case:
    shapes = [(B, T, H, D), (B, T, G, D), (B, T, G, D), *([(B, T, H, R), (B, T, 1, R)] if R else [])]

    def call(*x: Tensor, backend: str) -> Tensor:
        shared = {"q_rope": x[3], "k_rope": x[4]} if R else {}
        return softmax_attention(*x[:3], moved(Visibility(**words), x[0].device), backend=backend, **shared)

    return by_backend(shapes, "x" * len(shapes), call)


def decaying(D: int, queries: int = T, keys: int = T) -> Case:
    """Softmax attention with a decay, which decodes if there are fewer queries than keys."""

    def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, backend: str) -> Tensor:
        decay = F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32)) + 2).cumsum(-1)
        return softmax_attention(q, k, v, Visibility(), decay=decay, backend=backend)

    shapes = [(2, queries, 4, D), (2, keys, 2, D), (2, keys, 2, D), (2, 4, keys)]
    return by_backend(shapes, ("x" if queries == keys else "-") * 4, call)


def gated(D: int, width: int) -> Case:
    """Softmax attention with a gate of that many numbers a head."""

    def call(*x: Tensor, backend: str) -> Tensor:
        return softmax_attention(*x[:3], output_gate=x[3], backend=backend)

    return by_backend([(2, T, 4, D), (2, T, 2, D), (2, T, 2, D), (2, T, 4, width)], "xxxx", call)


def sigmoid(D: int, **words: Any) -> Case:
    """Sigmoid attention with a bias of each head."""

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return sigmoid_attention(q, k, v, Visibility(**words), logit_bias=bias - 4, backend=backend)

    return by_backend([(2, T, 4, D), (2, T, 2, D), (2, T, 2, D), (4,)], "xxxx", call)


def decode(D: int, tokens: int, S: int = 1000) -> Case:
    shapes = [(2, tokens, 8, D), (2, S, 2, D), (2, S, 2, D)]
    return by_backend(shapes, "---", lambda *x, backend: softmax_attention(*x, Visibility(), backend=backend))


def factored(H: int, D: int, rank: int) -> Case:
    """One token over a cache of factors; keys and values are formed in the plain form."""

    def fused(*x: Tensor) -> list[Tensor]:
        from attnzoo_kernels.decode.factors import decode_factors

        return [decode_factors(*x, scale=D**-0.5, query_start=x[1].shape[1] - 1)]

    def plain(q: Tensor, *x: Tensor) -> list[Tensor]:
        k, v = tensor_product(*x[:2]), tensor_product(*x[2:])
        return [softmax_attention(q, k, v, Visibility(), scale=D**-0.5, backend="eager")]

    shapes = ((2, 1, H, D), *((2, 1000, rank, n) for n in (H, D, H, D)))
    return Case(shapes, "-----", fused, plain)


def latent(H: int, R: int, rope: int) -> Case:
    def call(q: Tensor, q_rope: Tensor, states: Tensor, backend: str) -> Tensor:
        scale = (R + rope) ** -0.5
        return latent_attention(q, q_rope, states, Visibility(), latent_width=R, scale=scale, backend=backend)

    return by_backend([(2, 1, H, R), (2, 1, H, rope), (2, 1000, 1, R + rope)], "---", call)


def composed(M: int, D: int, sides: str, tokens: int = 150) -> Case:
    """M heads; sides: "qk" mixes by queries and keys, "b" by one matrix for all."""
    vectors = [(2, tokens, 1, 2, M), (2, tokens, 1, 2, M), (2, tokens, 1, M)] * len(sides) * 2
    shapes = [*[(2, tokens, M, D)] * 3, *([(1, M, M)] * 2 if sides == "b" else vectors)]

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, backend: str) -> Tensor:
        rest = tuple(0.1 * x for x in rest)
        if sides == "b":
            pre, post = (Composition(x, residual=True) for x in rest)
        else:
            parts: list[Any] = [rest[at : at + 3] for at in range(0, len(rest), 3)]
            names = [{"q": "query", "k": "key"}[side] for side in sides]
            halves = parts[: len(names)], parts[len(names) :]
            pre, post = (Composition(None, True, **dict(zip(names, half, strict=True))) for half in halves)
        return composed_attention(q, k, v, pre, post, Visibility(), scale=D**-0.5, backend=backend)

    return by_backend(shapes, "x" * len(shapes), call)


def linear(D: int, mixed: bool, causal: bool = True) -> Case:
    n = -(-T // 64)
    shapes = [(2, T, 4, D), (2, T, 2, D), (2, T, 2, D), *([(n, n)] if mixed else [])]

    def call(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor | None = None, *, backend: str) -> Tensor:
        out = linear_attention(q, k, v, size=64, causal=causal, mixing=mixing, backend=backend)[0]
        # The kernels keep sums in float32.
        return out.to(torch.promote_types(out.dtype, torch.float32))

    return by_backend(shapes, "++x+"[: len(shapes)], call)


def routed(D: int) -> Case:
    def active(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    def fused(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, on: Tensor) -> list[Tensor]:
        return [routed_attention(q, k, v, on, Visibility(), scale=D**-0.5, gates=gates, backend="triton")]

    def plain(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, on: Tensor) -> list[Tensor]:
        out = softmax_attention(q, k, v, Visibility(), scale=D**-0.5, backend="eager")
        return [out * (gates.to(out.dtype) * on)[..., None]]

    shapes = ((2, T, 8, D), (2, T, 2, D), (2, T, 2, D), (2, T, 8), (2, T, 8))
    return Case(shapes, ("x", "x", "x", "x", active), fused, plain)


def experts(inner: int, outer: int) -> Case:
    def chosen(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(0, 6, shape, generator=generator)

    def call(x: Tensor, weight: Tensor, gates: Tensor, expert: Tensor, backend: str) -> Tensor:
        # The last of seven experts gets nothing.
        return expert_linear_pieces(x, weight, Routes.of(expert.flatten(), 7), gates=gates, backend=backend)

    return by_backend([(T, 1, 2, inner), (7, outer, inner), (T, 2), (T, 2)], ["x", "x", "x", chosen], call)


def norm_rope(D: int, matrices: int) -> Case:
    shapes = [(2, T, 3, D), (D,), *[(D, D)] * matrices]

    def tables(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        return rotary_table(Rotary(), D, torch.arange(T, device=x.device), dtype=wide, device=x.device)

    def fused(z: Tensor, norm: Tensor, *maps: Tensor) -> list[Tensor]:
        from attnzoo_kernels.qk_norm_rope import qk_norm_rope

        cos, sin = tables(z)
        maps = tuple(D**-0.5 * x for x in maps)
        head_map: dict[str, Any] = {0: {}, 1: {"linear": maps[:1] and maps[0]}, 3: {"mlp": maps}}[matrices]
        return [qk_norm_rope(z, **head_map, norm_weight=norm, norm_eps=1e-6, cos=cos, sin=sin)]

    def plain(z: Tensor, norm: Tensor, *maps: Tensor) -> list[Tensor]:
        maps = tuple(D**-0.5 * x for x in maps)
        z = {0: lambda: z, 1: lambda: knock_linear(z, *maps), 3: lambda: knock_mlp(z, *maps)}[matrices]()
        return [rotate(F.rms_norm(z, norm.shape, norm, 1e-6), *tables(z), "half")]

    return Case(tuple(shapes), "x" * len(shapes), fused, plain)


def finish(D: int) -> Case:
    def fused(o: Tensor, weight: Tensor, gate: Tensor) -> list[Tensor]:
        from attnzoo_kernels.linear_attention import linear_attention_finish

        return [linear_attention_finish(o.float(), weight, gate, eps=1e-6, dtype=o.dtype)]

    def plain(o: Tensor, weight: Tensor, gate: Tensor) -> list[Tensor]:
        return [F.rms_norm(o, weight.shape, weight, 1e-6) * F.silu(gate)]

    return Case(((2, T, 3, D), (D,), (2, T, 3, D)), "xxx", fused, plain)


# Family -> its calls. The families' names are the beginnings of the rows of benchmarks/gpu.py.
CASES: dict[str, dict[str, Case]] = {
    "softmax": {
        **{f"{D} causal": softmax(D) for D in (64, 80, 128, 256)},
        "128 full, as many groups as heads": softmax(128, G=4, causal=False),
        "128 window and sink tokens": softmax(128, window=70, sink_tokens=3),
        "128 packed": softmax(128, mask=AttentionMask.packed([0, 100, 300, 333, 600])),
        "64 one group": softmax(64, G=1),
    },
    "decay": {"64": decaying(64), "128": decaying(128), "128, one token": decaying(128, queries=1, keys=1000)},
    "gated": {"128": gated(128, 128), "80": gated(80, 80), "64 by head": gated(64, 1)},
    "sigmoid": {"64": sigmoid(64), "128": sigmoid(128), "80 window": sigmoid(80, window=70)},
    "latent": {"128+64": softmax(128, G=4, R=64), "64+64": softmax(64, R=64)},
    "decode": {
        f"{D}, {n} tokens": decode(D, n) for D, n in ((64, 1), (80, 1), (128, 1), (256, 1), (128, 5), (128, 16))
    },
    "latent decode": {"16 heads": latent(16, 512, 64), "128 heads": latent(128, 512, 64), "256+32": latent(8, 256, 32)},
    "factors": {"47 heads of 64": factored(47, 64, 2), "8 heads of 128": factored(8, 128, 1)},
    "dcmha": {
        "8 heads of 64": composed(8, 64, "qk"), "8 heads of 128": composed(8, 128, "qk"),
        "16 heads of 64, query side": composed(16, 64, "q"), "talking heads": composed(4, 80, "b"),
    },
    "mhla": {
        "64": linear(64, False), "128 mixed": linear(128, True), "80 mixed, full": linear(80, True, False),
        "norm and gate": finish(128),
    },
    "moh": {str(D): routed(D) for D in (64, 80, 128)},
    "moa": {"512 to 128": experts(512, 128), "80 to 200": experts(80, 200)},
    "qk_norm_rope": {
        "64": norm_rope(64, 0), "80 linear": norm_rope(80, 1), "128 gated": norm_rope(128, 3),
        "256 gated": norm_rope(256, 3),
    },
}  # fmt: skip


def assert_good(case: Case, inputs: list[Tensor], fused: Run | None = None) -> None:
    """Answer and gradients as near to float64 as the definition's are, and twice the same to the last bit."""
    fused = fused or case.fused
    assert_as_good_as(fused, case.plain, *inputs, least=LEAST)
    wanted = [x for x in inputs if x.requires_grad]
    runs = []
    for _ in range(2):
        out = fused(*inputs)
        total = sum(y.float().square().sum() for y in out)
        runs.append([*out, *(torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ())])
    for n, (one, two) in enumerate(zip(*runs, strict=True)):
        assert (one is None and two is None) or torch.equal(one, two), f"result {n} differs between two runs"


LEAST = 1e-2
"""A result's error counts relative to its largest value, or to this one where that is smaller."""


# Needles. Scores rise, or fall, with the place of the key, so steeply that each query sees little but its last, or its
# first, visible key. Values spell the place: an answer of another key is off by 1 and more, whatever the dtype, and so
# are the gradients. Keys that are not there have the score 0, which is more than any falling one. Where visible keys
# end in the middle, as after sink tokens, places are turned so that a key there has the largest score.

STEP = 4.0
"""What a score differs by from its neighbour's: e^-4 of the weight goes to the next key."""


@dataclass(frozen=True)
class Masks:
    """Sizes of a call and who sees whom in it; turns: keys that come last in the order of the scores, see above."""

    view: Visibility
    queries: int = T
    keys: int = T
    turns: tuple[int, ...] = (-1,)

    def needles(self, sign: float, dtype: torch.dtype, device: str, turn: int = -1, **sizes: int) -> list[Tensor]:
        """`needles` of these sizes, that require gradients where kernels with a backward pass take the masks."""
        place = (torch.arange(self.keys) - turn - 1) % self.keys
        made = needles(place, self.queries, sign, dtype, device, **sizes)
        return [x.requires_grad_(self in MASKS.values()) for x in made]


def moved(view: Visibility, device: torch.device | str) -> Visibility:
    """The view with its tensors on the device."""
    mask, positions = view.mask, view.key_positions
    return replace(
        view,
        mask=None if mask is None else mask.to(device),
        key_positions=None if positions is None else positions.to(device),
    )


DOCUMENTS = AttentionMask.packed([0, 1, 64, 130, 300, 428, 600])
PADDED = AttentionMask.padding([T, 129])
STRIPES = AttentionMask.dense((torch.arange(T)[:, None] * 7 + torch.arange(T)) % 11 > 4)
RING = (torch.arange(256) + 37) % 256 + 44
MASKS: dict[str, Masks] = {
    "causal": Masks(Visibility()),
    "full": Masks(Visibility(causal=False)),
    "cross": Masks(Visibility(causal=False), keys=391),
    "cached prefix": Masks(Visibility(), queries=70),
    "later keys": Masks(Visibility(query_start=100), queries=150),
    "window": Masks(Visibility(window=65)),
    "narrow window": Masks(Visibility(window=1)),
    "window both ways": Masks(Visibility(causal=False, window=65)),
    "window and sink tokens": Masks(Visibility(window=33, sink_tokens=5), turns=(-1, 5)),
    "padded": Masks(Visibility(mask=PADDED)),
    "padded, full": Masks(Visibility(causal=False, mask=PADDED)),
    "packed": Masks(Visibility(mask=DOCUMENTS)),
    "packed, full": Masks(Visibility(causal=False, mask=DOCUMENTS)),
    "packed, window and sink tokens": Masks(Visibility(window=20, sink_tokens=2, mask=DOCUMENTS), turns=(-1, 132)),
    "dense": Masks(Visibility(mask=STRIPES)),
}  # fmt: skip
# What the decoding kernels take: few queries, more keys.
DECODING: dict[str, Masks] = {
    "one token": Masks(Visibility(), queries=1, keys=1000),
    "five tokens": Masks(Visibility(), queries=5, keys=1000),
    "later keys": Masks(Visibility(query_start=700), queries=3, keys=1000),
    "window": Masks(Visibility(window=129), queries=3, keys=1000),
    "window and sink tokens": Masks(Visibility(window=40, sink_tokens=3), queries=2, keys=1000, turns=(-1, 3)),
    "padded": Masks(Visibility(mask=AttentionMask.padding([257, 40])), queries=1, keys=300),
    "ring": Masks(Visibility(window=200, query_start=299, key_positions=RING), queries=1, keys=256),
    "dense": Masks(
        Visibility(mask=AttentionMask.dense((torch.arange(2 * T).view(2, 1, 1, T) * 5) % 7 > 2)), queries=1
    ),
}  # fmt: skip
# What each family's kernels take of these.
WITHOUT_WINDOWS = ("causal", "padded", "packed")
COMPOSED = ("causal", "full", "cross", "cached prefix", "later keys", "window", "padded", "packed", "dense")
LATENT = ("one token", "five tokens", "later keys", "padded", "dense")


def needles(
    place: Tensor, queries: int, sign: float, dtype: torch.dtype, device: str, *, heads: int = 4, groups: int = 2,
    width: int = 64,
) -> list[Tensor]:  # fmt: skip
    """q, k and v whose scores are `sign * STEP` times the place of the key; to be called with scale 1."""
    k = torch.zeros(2, len(place), groups, width)
    k[..., 0], k[..., 1] = (place // 16)[:, None], (place % 16)[:, None]
    q = torch.zeros(2, queries, heads, width)
    q[..., 0], q[..., 1] = sign * STEP * 16, sign * STEP
    v = spelled(place, width)[:, None].expand(2, -1, groups, -1)
    return [x.to(device, dtype).contiguous() for x in (q, k, v)]


def spelled(place: Tensor, width: int) -> Tensor:
    """(..., width) of -1 and 1: the digits of each place in base 2, over and over."""
    return ((place[..., None] >> torch.arange(width) % 10) & 1) * 2.0 - 1.0


Attend = Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]
"""Attention of q, k and v with scale 1."""


def definition(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
    return softmax_attention(q, k, v, view, scale=1.0, backend="eager")


def assert_needles_found(attend: Attend, masks: Masks, dtype: torch.dtype, device: str, **sizes: int) -> None:
    """Every query's answer is its last, and its first, visible key's value; gradients are the definition's."""
    view = moved(masks.view, device)
    for turn, sign in product(masks.turns, (1.0, -1.0)):
        q, _, v = inputs = masks.needles(sign, dtype, device, turn, **sizes)
        place = (torch.arange(masks.keys) - turn - 1) % masks.keys
        out = attend(*inputs, view)
        shape = (2, q.shape[2], masks.queries, masks.keys)
        seen = view.dense(shape, torch.device(device))
        seen = torch.ones(shape, dtype=torch.bool, device=device) if seen is None else seen.expand(shape)
        order = place.to(device) + 1 if sign > 0 else masks.keys - place.to(device)
        edge = (seen * order).argmax(-1)
        expected = v.detach().repeat_interleave(q.shape[2] // v.shape[2], 2).transpose(1, 2)
        expected = expected.gather(2, edge[..., None].expand(-1, -1, -1, v.shape[3]))
        expected = (expected * seen.any(-1, keepdim=True)).transpose(1, 2)
        wrong = ~((out.detach().double() - expected.double()).abs() < 0.1).all(-1)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} queries see another {_edge(sign)} key"
        # Answers near 300 are rounded by 1 in bfloat16, and with them what the gradients subtract: float16 tells.
        if q.requires_grad and dtype != torch.bfloat16:
            # Differences of neighbours' gradients are weighted by the places: their rounding is too, up to 20 times.
            exact = results(lambda *x: [definition(*x, view)], *(x.detach().double().requires_grad_() for x in inputs))
            found = results(lambda *x: [attend(*x, view)], *inputs)
            for name, value in found.items():
                error = error_of(value, exact[name], LEAST)
                assert error < 0.25, f"{name}: relative error {error:.2e}, another key is seen"


def _edge(sign: float) -> str:
    return "last" if sign > 0 else "first"


def through_softmax(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
    return softmax_attention(q, k, v, view, scale=1.0, backend="triton")


def through_latent(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
    """Absorbed latent attention, whose latents hold the two features of the score and then the value."""
    latent = torch.cat([k[..., :2], v], -1)
    query = F.pad(q[..., :2], (0, v.shape[3]))
    u = latent_attention(query, None, latent, view, latent_width=latent.shape[3], scale=1.0, backend="triton")
    return u[..., 2:]


def through_composed(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
    """Heads that are mixed with weights of 0, by queries and keys."""
    heads = q.shape[2]
    zero = Composition(
        query=tuple(q.new_zeros(*q.shape[:2], 1, *shape) for shape in ((1, heads), (1, heads), (heads,))),
        key=tuple(k.new_zeros(*k.shape[:2], 1, *shape) for shape in ((1, heads), (1, heads), (heads,))),
    )  # fmt: skip
    return composed_attention(q, k, v, zero, zero, view, scale=1.0, backend="triton")


def through_routed(q: Tensor, k: Tensor, v: Tensor, view: Visibility) -> Tensor:
    """All heads active."""
    active = torch.ones(q.shape[:3], dtype=torch.bool, device=q.device)
    return routed_attention(q, k, v, active, view, scale=1.0, backend="triton")


# Family -> how it attends, in which masks, and the sizes of its heads.
NEEDLES: dict[str, tuple[Attend, dict[str, Masks], dict[str, int]]] = {
    "softmax": (through_softmax, MASKS, {}),
    "decode": (through_softmax, DECODING, {"heads": 8, "width": 128}),
    "latent decode": (
        through_latent,
        {name: DECODING[name] for name in LATENT},
        {"heads": 16, "groups": 1, "width": 510},
    ),
    "dcmha": (through_composed, {name: MASKS[name] for name in COMPOSED}, {"heads": 8, "groups": 8}),
    "moh": (through_routed, {name: MASKS[name] for name in WITHOUT_WINDOWS}, {}),
}


def assert_sums_stop(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, device: str) -> None:
    """Causal linear attention: feature n of the answer is 1 from token PLACES[n] on and 0 before."""
    places = torch.tensor([0, 1, 15, 16, 62, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, T - 2, T - 1])
    q = torch.zeros(2, T, 4, 64)
    q[..., 0] = 1.0
    v = torch.zeros(2, T, 2, len(places))
    v[:, places, :, torch.arange(len(places))] = 1.0
    out = attend(*(x.to(device, dtype) for x in (q, q[:, :, :2].contiguous(), v)))
    expected = (torch.arange(T)[:, None] >= places).to(out.dtype)[None, :, None].expand(2, -1, 4, -1)
    assert torch.equal(out.cpu(), expected), "a query sums up to another token than its own"


def assert_experts_found(project: Run, dtype: torch.dtype, device: str) -> None:
    """Each expert's matrix gives the expert's number."""
    chosen = torch.randint(0, 6, (T, 2), generator=torch.Generator().manual_seed(2)).to(device)
    x = torch.zeros(T, 1, 2, 64, dtype=dtype, device=device)
    x[..., 0] = 1.0
    weight = torch.zeros(7, 32, 64, dtype=dtype, device=device)
    weight[:, :, 0] = torch.arange(1, 8, device=device, dtype=dtype)[:, None]
    out = project(x, weight, Routes.of(chosen.flatten(), 7))[0]
    expected = (chosen + 1)[:, None, :, None].expand_as(out)
    assert torch.equal(out.float(), expected.float()), "a row is multiplied by another expert's matrix"


# Memory.


def far_apart(inputs: Sequence[Tensor], step: int = 2**31) -> list[Tensor]:
    """Copies whose second row begins `step` elements after the first, in one piece of memory; others as they are."""
    rows = [x for x in inputs if x.is_floating_point() and x.shape[0] == 2]
    places = [0]
    for x in rows:
        places.append(places[-1] + -(-x[0].numel() // 8) * 8)
    memory = torch.zeros(step + places[-1], dtype=rows[0].dtype, device=rows[0].device)
    copies = {}
    for x, place in zip(rows, places, strict=False):
        copy = memory.as_strided(x.shape, (step, *x[0].contiguous().stride()), place)
        copies[id(x)] = copy.copy_(x.detach()).detach().requires_grad_(x.requires_grad)
    return [copies.get(id(x), x) for x in inputs]


def misaligned(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies that begin one element after a boundary of 16 bytes."""
    copies = []
    for x in inputs:
        memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
        copies.append(memory.copy_(x.detach()).detach().requires_grad_(x.requires_grad))
    return copies


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call in a CUDA graph: each replay reads what its inputs hold then, and gives the same tensor."""
    stream = torch.cuda.Stream()
    # What the current stream has still to do is what the call reads.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


# Features of softmax attention among which "auto" has to choose a backend.


def feature(S: int = 200, tokens: int | None = None, R: int = 0, D: int = 64, **words: Any) -> Callable[..., Any]:
    """A function of (dtype, device) that gives differentiable inputs by name and the call's other options.

    words: an option, or the shape of a tensor in float32 for bias, sinks, head_scale and alibi_slopes.
    """

    def made(dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        generator = torch.Generator().manual_seed(4)
        n = S if tokens is None else tokens
        shapes = {"q": (2, n, 4, D), "k": (2, S, 2, D), "v": (2, S, 2, D)}
        shapes |= {"q_rope": (2, n, 4, R), "k_rope": (2, S, 1, R)} if R else {}
        inputs = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
        options = dict(words)
        for name in ("bias", "sinks", "head_scale"):
            if isinstance(options.get(name), tuple):
                inputs[name] = torch.randn(options.pop(name), generator=generator).to(device)
        if "alibi_slopes" in options:
            options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
        if "mask" in options:
            options["mask"] = options["mask"].to(device)
        return inputs, options

    return made


FEATURES: dict[str, Callable[..., Any]] = {
    "causal": feature(),
    "full": feature(causal=False),
    "alibi": feature(alibi_slopes=True),
    "bias": feature(bias=(4, 200, 200)),
    "bias of keys": feature(bias=(2, 1, 1, 200), causal=False),
    "a sink of 0": feature(sinks=0.0),
    "a sink of 2": feature(sinks=2.0),
    "learned sinks": feature(sinks=(4,)),
    "window": feature(window=40),
    "window and sink tokens": feature(window=40, sink_tokens=3),
    "packed": feature(mask=AttentionMask.packed([0, 64, 200, 333, 400])),
    "padded": feature(mask=AttentionMask.padding([200, 77])),
    "padded, full": feature(mask=AttentionMask.padding([200, 77]), causal=False),
    "dense": feature(mask=AttentionMask.dense((torch.arange(200 * 200) % 7 > 2).view(200, 200)), causal=False),
    "soft-cap": feature(softcap=2.0),
    "cached prefix": feature(tokens=50),
    "one token": feature(tokens=1),
    "one token with alibi": feature(tokens=1, alibi_slopes=True),
    "shared keys": feature(R=32),
    "head scale": feature(head_scale=(4,)),
    "wide": feature(D=128),
    "packed, window, alibi, sinks": feature(
        mask=AttentionMask.packed([0, 64, 200, 333, 400]), window=40, alibi_slopes=True, sinks=(4,)
    ),
}

# Calls that take the interpreter a second or two.
QUICK = (
    ("softmax", "64 causal"), ("decode", "64, 1 tokens"), ("decode", "window"), ("latent decode", "padded"),
)  # fmt: skip

# Kernel -> a side of its tile and what that is in half precision at the least. A product of a warpgroup takes 64 rows.
LARGE = {
    "softmax_attention_fwd_kernel": ("BLOCK_T", 64),
    "softmax_attention_bwd_dq_kernel": ("BLOCK_T", 64),
    "softmax_attention_bwd_dkdv_kernel": ("BLOCK_S", 64),
    "sigmoid_attention_fwd_kernel": ("BLOCK_T", 64),
    "sigmoid_attention_bwd_dq_kernel": ("BLOCK_T", 128),
    "sigmoid_attention_bwd_dkdv_kernel": ("BLOCK_S", 64),
    "decode_attention_fwd_kernel": ("BLOCK_S", 32),
    "head_routing_fwd_kernel": ("BLOCK_T", 64),
    "head_routing_bwd_dq_kernel": ("BLOCK_T", 64),
    "head_routing_bwd_dkdv_kernel": ("BLOCK_S", 64),
    "expert_projection_rows_kernel": ("BLOCK_T", 128),
    "expert_projection_bwd_weights_kernel": ("BLOCK_T", 128),
    "linear_attention_tile_kernel": ("BLOCK_T", 64),
    "linear_attention_state_kernel": ("BLOCK_T", 64),
}


# For `benchmarks/gpu.py --compile-only`, which compiles what the tests will launch in many processes at a time.


def rows(bench: Any) -> Iterator[Any]:
    """Every call and every mask in bfloat16 and float16, as rows of the benchmark; in float16 alone on a CPU."""
    from gpu_cases import Row

    def row(family: str, name: str, dtype: torch.dtype, make: Callable[[int], list[Tensor]], ours: Any) -> Any:
        return Row(f"{family} {name}", str(dtype), {}, make, ours, ours, {})

    device = bench.device
    for dtype in (torch.float16,) if device == "cpu" else (torch.bfloat16, torch.float16):
        for family, cases in CASES.items():
            for name, case in cases.items():
                make = partial(case.inputs, dtype, device)
                yield row(family, name, dtype, lambda _, make=make: make(), lambda x, case=case: case.fused(*x)[0])
        for family, (run, kinds, sizes) in NEEDLES.items():
            for name, masks in kinds.items():
                make = partial(masks.needles, 1.0, dtype, device, **sizes)
                ours = partial(_attended, run, moved(masks.view, device))
                yield row(family, name, dtype, lambda _, make=make: make(), ours)


def _attended(run: Attend, view: Visibility, x: list[Tensor]) -> Tensor:
    return run(*x, view)


ROWS = (rows,)
