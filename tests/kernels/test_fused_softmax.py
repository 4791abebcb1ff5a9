"""The softmax attention kernels against the operation's definition: output, log-sum-exp and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, library

import attnzoo
from attnzoo import AttentionMask
from attnzoo_kernels import tuning
from attnzoo_kernels.launch import descriptor
from attnzoo_kernels.softmax_attention import softmax_attention as kernel
from tests.kernels.tiles import SMALL, tile
from tests.kernels.tolerance import assert_as_good_as
from tests.ops.test_softmax_attention import CALLS
from tests.views import attend, view_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Few heads: the interpreter takes a second for every forty programs.
B, T, H, G, D, DV = 2, 37, 2, 1, 5, 7

# The tensors of a call, in this order; those that are absent are None.
NAMES = ("q", "k", "v", "q_rope", "k_rope", "bias", "decay", "output_gate", "sinks", "head_scale")


def draw(
    sizes: dict[str, int], options: dict[str, object], dtype: torch.dtype = torch.float32
) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of a call; options names those beside q, k and v that take part."""
    b, t, s, h, g, d, dv, r = (sizes[x] for x in ("B", "T", "S", "H", "G", "D", "DV", "R"))
    shapes = {"q": (b, t, h, d), "k": (b, s, g, d), "v": (b, s, g, dv)}
    if r:
        shapes |= {"q_rope": (b, t, h, r), "k_rope": (b, s, 1, r)}
    shapes |= {name: shape for name, shape in options.items() if name in NAMES}
    generator = torch.Generator().manual_seed(7)
    tensors = []
    for name, shape in shapes.items():
        kind = torch.float32 if name in ("bias", "decay", "sinks", "head_scale") else dtype
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "decay":
            tensor = torch.nn.functional.logsigmoid(tensor).cumsum(-1)
        tensor = tensor.to(DEVICE, kind)
        tensors.append(tensor.requires_grad_())
    return list(shapes), tensors


def assert_same_as_eager(
    names: list[str], tensors: list[Tensor], call: dict[str, object], config: tuning.Config = SMALL
) -> None:
    """Output and log-sum-exp of the kernel with all gradients, held to the eager form."""
    scale = call.get("scale", (sum(x.shape[3] for n, x in zip(names, tensors, strict=True) if n[0] == "q")) ** -0.5)

    def reference(*given: Tensor) -> tuple[Tensor, Tensor]:
        made = dict(zip(names, given, strict=True))
        out = attend(**made, **{**call, "scale": scale}, backend="eager")
        return out, spelled_out_lse(made, {**call, "scale": scale})

    def fused(*given: Tensor) -> tuple[Tensor, Tensor]:
        return through_the_kernels(dict(zip(names, given, strict=True)), {**call, "scale": scale})

    # Around both passes: the backward kernels take the tile too.
    with tuning.pinned(config):
        assert_as_good_as(fused, reference, *tensors)


def spelled_out_lse(made: dict[str, Tensor], call: dict[str, object]) -> Tensor:
    """log(exp(sink) + sum_j exp(s_ij)), (B, H, T), -inf where nothing is visible and there is no sink.

    Without a decay's c_i.
    """
    q, k = made["q"], made["k"]
    high = torch.promote_types(q.dtype, torch.float32)
    (b, t, h, _), s_count = q.shape, k.shape[1]
    view, _ = view_of(call)
    s = torch.einsum("bthd,bshd->bhts", q.to(high), k.to(high).repeat_interleave(h // k.shape[2], 2))
    if "q_rope" in made:
        s = s + torch.einsum("bthr,bsr->bhts", made["q_rope"].to(high), made["k_rope"][:, :, 0].to(high))
    s = s * call["scale"]
    if call.get("softcap"):
        s = call["softcap"] * torch.tanh(s / call["softcap"])
    if call.get("alibi_slopes") is not None:
        i, j = view.indices(t, s_count, q.device)
        s = s - call["alibi_slopes"].to(high)[:, None, None] * (i[:, None] - j).abs()
    if "bias" in made:
        s = s + made["bias"].to(high)
    if "decay" in made:
        s = s - made["decay"].to(high)[:, :, None]
    seen = view.dense((b, h, t, s_count), q.device)
    if seen is not None:
        s = s.masked_fill(~seen, -math.inf)
    sinks = made.get("sinks", call.get("sinks"))
    blind = torch.zeros(s.shape[:-1], dtype=torch.bool, device=s.device)
    if sinks is not None:
        sink = torch.as_tensor(sinks, dtype=high, device=s.device)
        s = torch.cat([s, sink.reshape(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    elif seen is not None:
        # logsumexp of nothing has no derivative.
        blind = blind | ~seen.any(-1)
        s = s.masked_fill(blind[..., None], 0.0)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    return lse.masked_fill(blind, -math.inf).float() if q.dtype != torch.float64 else lse.masked_fill(blind, -math.inf)


def through_the_kernels(made: dict[str, Tensor], call: dict[str, object]) -> tuple[Tensor, Tensor]:
    """What attend(..., backend="triton") runs, with its second output."""
    view, options = view_of(call)
    q, k = made["q"], made["k"]
    seen = view.for_kernel((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q.device)
    per_token = made.get("head_scale")
    if per_token is not None and per_token.ndim == 3:
        # The kernels take a factor of each head; the operation multiplies by one of each token afterwards.
        out, lse = kernel(**{name: x for name, x in made.items() if name != "head_scale"}, **options, **seen)
        return out * per_token[..., None], lse
    return kernel(**made, **options, **seen)


def spread(name: str) -> tuple[dict[str, int], dict[str, object], dict[str, object]]:
    """The operation's named calls in sizes that need several tiles: sizes, extra tensors, options."""
    call = dict(CALLS[name])
    sizes = {"B": 2, "T": 7, "S": call.pop("S", 7), "H": 6, "G": 3, "D": 5, "DV": 4, "R": call.pop("extra", 0)}
    extra = {}
    for tensor in ("sinks", "head_scale", "decay", "output_gate"):
        if isinstance(call.get(tensor), Tensor):
            extra[tensor] = tuple(call.pop(tensor).shape)
    if "bias" in call:
        extra["bias"] = tuple(call.pop("bias").shape)
    if "alibi_slopes" in call:
        call["alibi_slopes"] = call["alibi_slopes"].float().to(DEVICE)
    for key in ("mask", "key_positions"):
        if key in call:
            call[key] = call[key].to(DEVICE)
    return sizes, extra, call


@pytest.mark.parametrize("name", CALLS)
def test_every_feature(name: str) -> None:
    sizes, extra, call = spread(name)
    assert_same_as_eager(*draw(sizes, extra), call)


SIZES = {"B": B, "T": T, "S": T, "H": H, "G": G, "D": D, "DV": DV, "R": 0}
SLOPES = torch.tensor([0.5, 0.0625], device=DEVICE)
# Several tiles of queries and keys, so that every way to skip or to mask a tile is taken; one row of the batch where
# that decides nothing.
LONG: dict[str, tuple[dict[str, int], dict[str, object], dict[str, object]]] = {
    "causal": ({}, {}, {}),
    "bidirectional": ({"B": 1}, {}, {"causal": False}),
    "cross": ({"B": 1, "T": 19, "S": 50}, {}, {"causal": False}),
    "cached prefix": ({"B": 1, "T": 21, "S": 50}, {}, {}),
    "queries beyond the keys": ({"B": 1, "S": 20}, {}, {"query_start": 3}),
    "window": ({"B": 1}, {}, {"window": 6}),
    "wide window": ({"B": 1}, {}, {"window": 33}),
    "bidirectional window": ({"B": 1}, {}, {"window": 9, "causal": False}),
    "window and sink tokens": ({"B": 1, "T": 61, "S": 61}, {}, {"window": 5, "sink_tokens": 3}),
    "window and many sink tokens": ({"B": 1}, {}, {"window": 3, "sink_tokens": 20}),
    "bidirectional window and sink tokens": ({}, {}, {"window": 4, "sink_tokens": 18, "causal": False}),
    "sink tokens to the right of the window": (
        {"B": 1, "T": 5, "S": 37}, {}, {"window": 2, "sink_tokens": 20, "causal": False, "query_start": 0},
    ),
    "sink tokens of documents to the right of the window": (
        {}, {}, {
            "mask": AttentionMask.packed([0, 14, 37, 38, 74]).to(DEVICE), "window": 2, "sink_tokens": 20,
            "causal": False,
        },
    ),
    "padding": ({}, {}, {"mask": AttentionMask.padding([37, 18]).to(DEVICE), "causal": False}),
    "causal padding with an empty row": ({}, {}, {"mask": AttentionMask.padding([0, 33]).to(DEVICE)}),
    "packed": ({}, {}, {"mask": AttentionMask.packed([0, 3, 20, 41, 57, 74]).to(DEVICE)}),
    "packed, bidirectional": ({}, {}, {"mask": AttentionMask.packed([0, 20, 52, 74]).to(DEVICE), "causal": False}),
    "packed, window and sink tokens": (
        {}, {}, {"mask": AttentionMask.packed([0, 35, 41, 74]).to(DEVICE), "window": 4, "sink_tokens": 2},
    ),
    "packed and padded": (
        {}, {}, {"mask": (AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 20])).to(DEVICE)},
    ),
    "dense": ({"B": 1}, {}, {"mask": (torch.arange(T * T) % 7 > 2).view(T, T).to(DEVICE), "causal": False}),
    "dense for every head": ({"B": 1}, {}, {"mask": (torch.arange(H * T * T) % 5 > 0).view(H, T, T).to(DEVICE)}),
    "bias": ({}, {"bias": (B, H, T, T)}, {}),
    "bias of all rows and heads": ({"B": 1}, {"bias": (T, T)}, {"causal": False}),
    "bias of keys": ({}, {"bias": (B, 1, 1, T)}, {"window": 11}),
    "softcap": ({"B": 1}, {}, {"softcap": 0.7}),
    "alibi": ({"B": 1}, {}, {"alibi_slopes": SLOPES}),
    "bidirectional alibi": ({"B": 1}, {}, {"alibi_slopes": SLOPES, "causal": False}),
    "learned sinks": ({"B": 1}, {"sinks": (H,)}, {}),
    "head scale": ({"B": 1}, {"head_scale": (H,)}, {}),
    "head scale of each row": ({}, {"head_scale": (B, H)}, {"causal": False}),
    "decay": ({}, {"decay": (B, H, T)}, {}),
    "decay and cached prefix": ({"T": 21, "S": 50}, {"decay": (B, H, 50)}, {}),
    "decay, window and sink tokens": ({}, {"decay": (B, H, T)}, {"window": 5, "sink_tokens": 3}),
    "decay, packed and padded": (
        {}, {"decay": (B, H, T)},
        {"mask": (AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 0])).to(DEVICE)},
    ),
    "decay of heads that share keys": ({"H": 6, "G": 2, "T": 19, "S": 19}, {"decay": (B, 6, 19)}, {}),
    "decay and dense": ({}, {"decay": (B, H, T)}, {"mask": (torch.arange(T * T) % 7 > 2).view(T, T).to(DEVICE)}),
    "gate": ({}, {"output_gate": (B, T, H, DV)}, {}),
    "gate of heads": ({}, {"output_gate": (B, T, H, 1)}, {"causal": False}),
    "gate, empty rows and sinks": (
        {}, {"output_gate": (B, T, H, DV), "sinks": (H,)}, {"mask": AttentionMask.padding([0, 33]).to(DEVICE)},
    ),
    "decay and gate beside all they take": (
        {"R": 4}, {
            "decay": (B, H, T), "output_gate": (B, T, H, DV), "head_scale": (B, H), "bias": (1, H, T, T),
        }, {
            "alibi_slopes": SLOPES, "window": 7, "sink_tokens": 2, "scale": 0.4,
            "mask": (AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 20])).to(DEVICE),
        },
    ),
    "shared key": ({"B": 1, "R": 6}, {}, {}),
    "one head": ({"B": 1, "H": 1, "G": 1}, {}, {}),
    "groups of several heads": ({"B": 1, "T": 19, "S": 19, "H": 6, "G": 2}, {}, {}),
    "as many groups as heads": ({"B": 1, "G": H}, {}, {}),
    "one query": ({"B": 1, "T": 1, "S": 40}, {}, {}),
    "one key": ({"T": 1, "S": 1}, {}, {}),
    "everything": (
        {"R": 4}, {"sinks": (H,), "head_scale": (B, H), "bias": (1, H, T, T)},
        {
            "softcap": 2.0, "alibi_slopes": SLOPES, "window": 7, "sink_tokens": 2, "scale": 0.4,
            "mask": (AttentionMask.packed([0, 30, 74]) & AttentionMask.padding([35, 20])).to(DEVICE),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_several_tiles(name: str) -> None:
    changed, extra, call = LONG[name]
    assert_same_as_eager(*draw(SIZES | changed, extra), call)


@pytest.mark.parametrize(
    "name",
    [
        "causal", "window and sink tokens", "packed", "softcap", "shared key", "everything", "decay",
        "decay, packed and padded", "decay of heads that share keys", "gate", "gate of heads",
        "decay and gate beside all they take",
    ],
)  # fmt: skip
def test_half_precision(name: str) -> None:
    changed, extra, call = LONG[name]
    assert_same_as_eager(*draw(SIZES | changed, extra, torch.float16), call)


@pytest.mark.parametrize(
    "name",
    [
        "causal", "cross", "queries beyond the keys", "bidirectional window and sink tokens", "packed and padded",
        "causal padding with an empty row", "groups of several heads", "shared key", "learned sinks", "decay",
        "decay, window and sink tokens", "decay and cached prefix",
    ],
)  # fmt: skip
def test_descriptors(name: str) -> None:
    """Heads of 16 and 24 features of float16 begin at multiples of 16 bytes, and no tensor is read for every pair."""
    changed, extra, call = LONG[name]
    names, tensors = draw(SIZES | changed | {"D": 16, "DV": 24}, extra, torch.float16)
    assert all(descriptor(tensors[n], 16) is not None for n in (1, 2))
    assert_same_as_eager(names, tensors, call)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.float(),
        lambda x: x[..., 1:],
        lambda x: torch.zeros(*x.shape[:3], 20, dtype=x.dtype, device=x.device)[..., 4:],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 3, -1),
        lambda x: x.new_zeros(*x.shape[:3], 12),
    ],
    ids=["float32", "an odd address", "odd steps", "one row for all", "one head for all", "odd width"],
)
def test_what_descriptors_cannot_read(make: Callable[[Tensor], Tensor]) -> None:
    """Such keys take the addresses' way, with the same result as their copy."""
    x = torch.randn(2, 37, 3, 16, dtype=torch.float16, device=DEVICE)
    k, v = make(x), make(x * 0.5)
    q = torch.randn(2, 37, k.shape[2], k.shape[3], dtype=k.dtype, device=DEVICE)
    assert descriptor(k, 16) is None
    with tuning.pinned(SMALL):
        out, _ = kernel(q, k, v, scale=0.3)
    assert_as_good_as(lambda *_: out, lambda *given: attend(*given, scale=0.3, backend="eager"), q, k, v)


@pytest.mark.parametrize("sides", [(32, 16), (16, 32), (64, 64)])
@pytest.mark.parametrize("name", ["causal", "bidirectional window and sink tokens", "packed and padded"])
def test_tiles_of_other_shapes(name: str, sides: tuple[int, int]) -> None:
    changed, extra, call = LONG[name]
    assert_same_as_eager(*draw(SIZES | changed, extra), call, tile(*sides))


@pytest.mark.parametrize(
    ("d", "dv", "r"),
    [(1, 1, 0), (8, 8, 0), (33, 5, 0), (64, 128, 0), (80, 96, 0), (192, 128, 0), (256, 17, 0), (3, 40, 17)],
)
def test_any_width(d: int, dv: int, r: int) -> None:
    assert_same_as_eager(*draw(SIZES | {"B": 1, "T": 19, "S": 19, "H": 2, "G": 1, "D": d, "DV": dv, "R": r}, {}), {})


@pytest.mark.parametrize("scale", [-0.7, 0.0, 30.0])
@pytest.mark.parametrize("name", ["causal", "packed and padded", "softcap", "decay"])
def test_any_scale(name: str, scale: float) -> None:
    """30: scores in the hundreds, whose weights hang on their last digits."""
    changed, extra, call = LONG[name]
    assert_same_as_eager(*draw(SIZES | changed, extra), {**call, "scale": scale})


def test_a_head_scaled_to_nothing_still_has_a_gradient() -> None:
    names, tensors = draw(SIZES, {"head_scale": (H,)})
    with torch.no_grad():
        tensors[-1][::2] = 0.0
    assert_same_as_eager(names, tensors, {})
    out = attend(**dict(zip(names, tensors, strict=True)), backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), tensors[-1])
    assert (grad != 0).all()


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_pairs_of_features(data: st.DataObject) -> None:
    assert_a_drawn_call(data)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.timeout(3000)
def test_many_combinations_of_features(data: st.DataObject) -> None:
    assert_a_drawn_call(data)


def assert_a_drawn_call(data: st.DataObject) -> None:
    """A call with drawn sizes and any set of features."""
    groups = data.draw(st.integers(1, 3))
    t = data.draw(st.sampled_from([1, 2, 7, 16, 17, 31, 40]))
    s = data.draw(st.sampled_from([t, t + 1, t + 13, t + 32]))
    sizes = {
        "B": data.draw(st.integers(1, 2)), "T": t, "S": s, "H": groups * data.draw(st.integers(1, 2)), "G": groups,
        "D": data.draw(st.sampled_from([1, 4, 11, 16, 20])), "DV": data.draw(st.sampled_from([1, 5, 16, 18])),
        "R": data.draw(st.sampled_from([0, 0, 3])),
    }  # fmt: skip
    rows, heads = sizes["B"], sizes["H"]
    call: dict[str, object] = {"causal": data.draw(st.booleans())}
    extra: dict[str, object] = {}
    if data.draw(st.booleans()):
        call["window"] = data.draw(st.integers(1, s))
        call["sink_tokens"] = data.draw(st.sampled_from([0, 1, 5, 17]))
    kind = data.draw(st.sampled_from(["none", "padding", "packed", "dense", "padding and dense"]))
    if kind == "packed" and s == t:
        ends = data.draw(st.lists(st.integers(0, rows * t), max_size=5))
        call["mask"] = AttentionMask.packed(sorted([0, *ends, rows * t])).to(DEVICE)
    elif "padding" in kind:
        call["mask"] = AttentionMask.padding([data.draw(st.integers(0, s)) for _ in range(rows)]).to(DEVICE)
    if "dense" in kind:
        shape = data.draw(st.sampled_from([(t, s), (heads, t, s), (rows, 1, 1, s), (rows, heads, t, s)]))
        dense = torch.rand(shape, generator=torch.Generator().manual_seed(t)).to(DEVICE) > 0.3
        call["mask"] = dense if "mask" not in call else call["mask"] & dense
    for name, shapes in (
        ("bias", [(t, s), (heads, t, s), (rows, heads, t, s)]),
        ("sinks", [(heads,)]),
        ("head_scale", [(heads,), (rows, heads)]),
        ("output_gate", [(rows, t, heads, 1), (rows, t, heads, sizes["DV"])]),
    ):
        if data.draw(st.booleans()):
            extra[name] = data.draw(st.sampled_from(shapes))
    if "sinks" not in extra and data.draw(st.booleans()):
        call["sinks"] = 0.5
    if data.draw(st.booleans()):
        call["softcap"] = data.draw(st.sampled_from([0.5, 30.0]))
    if data.draw(st.booleans()):
        call["alibi_slopes"] = torch.linspace(0, 1, heads, device=DEVICE)
    if not {"softcap", "sinks"} & (call.keys() | extra.keys()) and data.draw(st.booleans()):
        extra["decay"] = (rows, heads, s)
    assert_same_as_eager(*draw(sizes, extra), call)


def test_tiles_that_no_query_sees_are_never_read() -> None:
    """NaN in them would reach the output, since 0 times NaN is NaN."""
    _, (q, k, v) = draw(SIZES | {"T": 32, "S": 96, "B": 1}, {})
    k, v = k.detach().clone(), v.detach().clone()
    k[:, 16:32], v[:, 16:32] = math.nan, math.nan
    k[:, 80:], v[:, 80:] = math.nan, math.nan
    with tuning.pinned(SMALL):
        # Queries 32 .. 63 see keys 28 .. 63 less those before 32, and sink tokens 0 .. 3.
        out, lse = kernel(q[:, 4:], k, v, scale=0.3, window=5, sink_tokens=4, query_start=36)
        out2, _ = kernel(q[:, 4:], k[:, :80], v[:, :80], scale=0.3, window=5, sink_tokens=4, query_start=36)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert torch.equal(out, out2)


def test_strides_do_not_matter() -> None:
    names, tensors = draw(SIZES | {"R": 4}, {})
    plain = attend(**dict(zip(names, tensors, strict=True)), backend="triton")
    strided = {}
    for name, x in zip(names, tensors, strict=True):
        big = torch.randn(x.shape[0], x.shape[2], x.shape[1] * 2, x.shape[3] * 3, device=DEVICE)
        view = big[:, :, ::2, ::3].transpose(1, 2)
        view.copy_(x.detach())
        strided[name] = view
    assert torch.equal(attend(**strided, backend="triton"), plain)
    rows = {name: x[:1].detach().expand(B, -1, -1, -1) for name, x in zip(names, tensors, strict=True)}
    out = attend(**rows, backend="triton")
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[:1], attend(**{n: x[:1] for n, x in rows.items()}, backend="triton"))


@pytest.mark.parametrize(("shape", "keys"), [((0, 3, 4, 8), 3), ((2, 0, 4, 8), 3), ((2, 3, 4, 8), 0)])
def test_empty_calls(shape: tuple[int, ...], keys: int) -> None:
    q = torch.randn(shape, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(shape[0], keys, 2, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    out = attend(q, k, v, causal=False, backend="triton")
    assert torch.equal(out, torch.zeros(shape, device=DEVICE))
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_scores_stay_finite(size: float) -> None:
    _, (q, k, v) = draw(SIZES, {})
    out = attend(q * size, k, v, backend="triton")
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max() * 1.001
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_two_runs_are_bitwise_equal() -> None:
    names, tensors = draw(SIZES, {"sinks": (H,), "head_scale": (B, H)})

    def run() -> list[Tensor]:
        out = attend(**dict(zip(names, tensors, strict=True)), backend="triton")
        return [out, *torch.autograd.grad((out * out).sum(), tensors)]

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two)


def test_gradients_nobody_needs_are_not_computed() -> None:
    _, (q, k, v) = draw(SIZES, {})
    out = attend(q, k.detach(), v.detach(), backend="triton")
    (dq,) = torch.autograd.grad(out.sum(), q)
    everything = attend(q, k, v, backend="triton")
    assert torch.equal(dq, torch.autograd.grad(everything.sum(), (q, k, v))[0])


def test_the_rounding_of_the_answer_does_not_add_up_in_the_gates() -> None:
    """Values far from 0 leave the gates' gradients as they are, and round the answer that these subtract.

    With the keys' part of the gradient alone the error is nine times the definition's.
    """
    q, k, v, do = (torch.randn(2, 45, 4, 8, device=DEVICE) for _ in range(4))
    v, gates = v + 20, torch.randn(2, 4, 45, device=DEVICE) + 3

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        f = gates.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        heads = (x.half().to(dtype) for x in (q, k, v))
        out = attend(*heads, decay=torch.nn.functional.logsigmoid(f).cumsum(-1), backend=backend)
        return torch.autograd.grad(out, f, do.half().to(dtype))[0].double()

    exact = gradient(torch.float64, "eager")
    error, own = ((gradient(torch.float16, x) - exact).abs().max() for x in ("triton", "eager"))
    assert error <= 6 * own


def test_a_second_derivative_is_refused() -> None:
    _, (q, k, v) = draw(SIZES | {"T": 5, "S": 5}, {})
    out = attend(q, k, v, backend="triton")
    (dq,) = torch.autograd.grad((out * out).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="softmax_attention_backward"):
        dq.sum().backward()


@pytest.mark.parametrize("name", ["causal", "everything", "decay", "gate"])
def test_registration(name: str) -> None:
    """torch's own checks of the operator: schema, fake tensors, autograd registration."""
    changed, extra, call = LONG[name]
    names, tensors = draw(
        SIZES | changed | {"H": 2, "G": 1, "B": 1},
        {n: (1, *s[1:]) for n, s in extra.items() if n in ("bias", "decay", "output_gate")},
    )
    made = dict(zip(names, tensors, strict=True))
    arguments = (
        made["q"], made["k"], made["v"], made.get("q_rope"), made.get("k_rope"), made.get("output_gate"),
        made.get("decay"), None, None, None, None, None, None, None, None, None, 0.3, call.get("softcap", 0.0),
        call.get("window", 0), call.get("sink_tokens", 0), 0, True,
    )  # fmt: skip
    library.opcheck(torch.ops.attnzoo.softmax_attention.default, arguments)


def test_compiled_whole() -> None:
    names, tensors = draw(SIZES, {"sinks": (H,)})
    mask = AttentionMask.packed([0, 30, 74]).to(DEVICE)

    def run(*given: Tensor) -> Tensor:
        return attend(**dict(zip(names, given, strict=True)), mask=mask, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, fast = run(*tensors), compiled(*tensors)
    assert torch.equal(plain, fast)
    for one, two in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (plain, fast)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, "the kernels have no dropout, got 0.1"),
        ({"dtype": torch.float64}, "the kernels take float16, bfloat16 and float32, got torch.float64"),
        ({"decay": True}, "the kernels add no decay to soft-capped scores, got softcap 5.0"),
        ({"D": 257}, "the kernels take heads up to 256 wide, got 257"),
    ],
)
def test_what_the_kernels_refuse(change: dict[str, object], message: str) -> None:
    dtype, dropout = change.get("dtype", torch.float32), change.get("dropout", 0.0)
    _, (q, k, v) = draw(SIZES | {"D": change.get("D", D), "T": 3, "S": 3}, {}, dtype)
    options = {"decay": torch.zeros(B, H, 3, device=DEVICE), "softcap": 5.0} if "decay" in change else {}
    with pytest.raises(attnzoo.BackendUnavailable, match=f"backend 'triton' cannot run softmax_attention: {message}"):
        attend(q, k, v, dropout=dropout, **options, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter on a CPU")
def test_bfloat16_is_not_left_to_the_interpreter() -> None:
    _, (q, k, v) = draw(SIZES, {}, torch.bfloat16)
    with pytest.raises(attnzoo.BackendUnavailable, match="Triton's interpreter multiplies bfloat16 wrongly"):
        attend(q, k, v, backend="triton")


def test_masks_are_checked_before_a_kernel_runs() -> None:
    _, (q, k, v) = draw(SIZES | {"T": 3, "S": 5}, {})
    for mask, message in (
        (AttentionMask.padding([5]), "lengths must have one entry a row, got 1 for 2"),
        (AttentionMask.padding([5, 6]), "lengths must be at most the 5 keys, got 6"),
        (AttentionMask.packed([0, 6]), "a packed mask needs as many queries as keys, got 3 queries and 5 keys"),
        (AttentionMask.dense(torch.ones(4, 5, dtype=torch.bool)), "mask must broadcast"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, mask=mask.to(DEVICE), backend="triton")


@pytest.mark.parametrize("name", ["causal", "everything", "decay and gate beside all they take"])
def test_the_kernels_are_what_the_operation_calls(name: str) -> None:
    """A guard of the tests above: backend="triton" and the kernel are one thing."""
    changed, extra, call = LONG[name]
    made = dict(zip(*draw(SIZES | changed, extra), strict=True))
    call = {"scale": 0.3, **call}
    direct = through_the_kernels(made, call)[0]
    assert torch.equal(direct, attend(**made, **call, backend="triton"))
