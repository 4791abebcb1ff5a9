"""The grid of `benchmarks/gpu.py`: what runs in each row, against whom, and what it has to reach.

A row is one call in one shape: our form of it, the peers, and how its answer is checked. Peers that are not installed
are left out and named by `missing_peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnzoo
from attnzoo.masks import Visibility
from attnzoo.ops.factored_attention import tensor_product
from attnzoo.ops.head_mixing import knock_mlp
from attnzoo.ops.latent_attention import latent_attention
from attnzoo.ops.sigmoid_attention import sigmoid_attention
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotary_table, rotate
from attnzoo_kernels.decode.factors import decode_factors
from attnzoo_kernels.tuning import Config, pinned

Inputs = list[Tensor]
Run = Callable[[Inputs], Tensor]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Goal:
    """Our time may be at most that of `peer` over `ratio`; or "copy" / "tflops": a share of bandwidth, a rate."""

    peer: str
    ratio: float


@dataclass(frozen=True)
class Part:
    """A part of a call that depends on no other: where it lies in the answer and in each input."""

    answer: Index
    inputs: tuple[Index, ...]


WHOLE = Part((), ())


@dataclass(frozen=True)
class Row:
    """One line of the table.

    make gives fresh inputs for a seed; those that require a gradient decide whether the backward pass is timed too.
    formula is the definition, for inputs of any dtype. Our answer and gradients for what `check` makes of the inputs
    are compared with it, in the dtype of the inputs and in float64, on the `parts` of the call. Peers and formulas are
    made when they are first called: a row that nobody runs costs nothing.
    """

    case: str
    phase: str
    shape: dict[str, Any]
    make: Callable[[int], Inputs]
    ours: Run
    formula: Run
    peers: dict[str, Run]
    check: Callable[[Inputs], Inputs] = lambda inputs: inputs
    parts: Sequence[Part] = (WHOLE,)
    goals: tuple[Goal, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    note: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What the options --only and --skip are about."""
        return f"{self.case} {self.phase}"


class Bench:
    """Device, dtype and sizes of a run; tiny shrinks every row to what the interpreter can do."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = device
        self.gpu = device != "cpu"
        self.tiny = tiny
        self.dtype = torch.bfloat16 if self.gpu else torch.float32

    def size(self, full: int, small: int) -> int:
        """A size of the row, or the small one that replaces it."""
        return small if self.tiny else full

    def tensors(self, seed: int, *shapes: tuple[int, ...], grad: bool = False) -> Inputs:
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        factory_kwargs: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "generator": generator}
        return [torch.randn(shape, **factory_kwargs).requires_grad_(grad) for shape in shapes]


def missing_peers(bench: Bench) -> list[str]:
    """Peers that this run cannot compare with, and why."""
    if not bench.gpu:
        return ["flash kernels, flex_attention, flash-attn 3 and 4, flash-linear-attention: need a GPU"]
    wanted = {"fa3_fwd_interface": "fa3-fwd", "flash_attn.cute": "flash-attn 4", "fla": "flash-linear-attention"}
    return [f"{name}: not installed" for module, name in wanted.items() if not _has(module)]


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiled(run: Run, **options: Any) -> Run:
    """The function compiled as one graph, anew for all shapes and gradients that it meets.

    torch.compile counts compiled forms of one function wherever they were asked for, and beyond its limit runs the
    function as it is, which would be another peer. So the forms of former shapes are dropped, and a function that does
    not compile raises.
    """
    forms: dict[Any, Run] = {}

    def call(inputs: Inputs) -> Tensor:
        key = torch.is_grad_enabled(), *((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key not in forms:
            torch._dynamo.reset()
            forms.clear()
            forms[key] = torch.compile(run, fullgraph=True, dynamic=False, **options)
        return forms[key](inputs)

    return call


# Softmax attention


def _sdpa(inputs: Inputs, causal: bool, backend: SDPBackend | None, scale: float | None = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    gqa = q.shape[1] != k.shape[1]
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa, scale=scale)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa, scale=scale)
    return out.transpose(1, 2)


def _flex_attention(inputs: Inputs, blocks: Callable[[], Any], run: Callable[[], Any]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    return run()(q, k, v, block_mask=blocks(), enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def flex_peer(causal: bool, T: int, device: str, **options: Any) -> Run:
    """FlexAttention, compiled for this row alone; the blocks of its mask are made once."""
    flex = lru_cache(maxsize=1)(lambda: importlib.import_module("torch.nn.attention.flex_attention"))

    @lru_cache(maxsize=1)
    def blocks() -> Any:
        return flex().create_block_mask(_causal, None, None, T, T, device=device) if causal else None

    @lru_cache(maxsize=1)
    def run() -> Any:
        torch._dynamo.reset()
        return torch.compile(flex().flex_attention, fullgraph=True, dynamic=False, **options)

    return partial(_flex_attention, blocks=blocks, run=run)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001  (flex_attention's signature)
    return i >= j


def softmax_peers(bench: Bench, causal: bool, T: int, equal_widths: bool = True) -> dict[str, Run]:
    """Everything that computes plain attention here."""
    if not bench.gpu:
        return {"sdpa": partial(_sdpa, causal=causal, backend=None)}
    peers: dict[str, Run] = {
        "sdpa flash": partial(_sdpa, causal=causal, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(_sdpa, causal=causal, backend=SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": partial(_sdpa, causal=causal, backend=SDPBackend.EFFICIENT_ATTENTION),
    }
    if T <= 8192 and equal_widths:
        peers["flex"] = flex_peer(causal, T, bench.device)
    if _has("fa3_fwd_interface") and equal_widths:
        peers["fa3"] = _package("fa3_fwd_interface", "flash_attn_func", causal=causal)
    if _has("flash_attn.cute"):
        peers["fa4"] = _package("flash_attn.cute", "flash_attn_func", causal=causal)
    if _has("fla") and causal and equal_widths:
        peers["fla"] = _package("fla.ops.attn.parallel", "parallel_attn")
    return peers


def _package(module: str, function: str, **options: Any) -> Run:
    return lambda x: _first(getattr(importlib.import_module(module), function)(*x[:3], **options))


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def head_parts(rows: int, heads: int, groups: int, more: int = 0) -> list[Part]:
    """The first group of the first row and the last of the last: of q, k, v, and of `more` inputs (B, T, H, ...)."""
    size = heads // groups
    found = []
    for b, g in sorted({(0, 0), (rows - 1, groups - 1)}):
        of_heads, of_group = (
            (slice(b, b + 1), slice(None), slice(*span)) for span in ((g * size, g * size + size), (g, g + 1))
        )
        found.append(Part(of_heads, (of_heads, of_group, of_group, *[of_heads] * more)))
    return found


def first_row(inputs: Inputs) -> Inputs:
    """The first row of the batch."""
    return [x[:1] for x in inputs]


def train_rows(bench: Bench) -> Iterator[Row]:
    """Training and prefill: B T = 16k, H D = 2048."""
    shapes = [
        (T, D, causal) for causal in (True, False) for D in (128, 64) for T in (4096, 2048, 8192, 1024, 16384, 512)
    ]
    shapes += [(4096, 256, True), (4095, 80, True)]
    for T, D, causal in shapes:
        yield from _attention_rows(bench, T, D, causal)


def _attention_rows(bench: Bench, T: int, D: int, causal: bool) -> Iterator[Row]:
    b, t, h, d = (
        bench.size(max(1, 16384 // T), 1), bench.size(T, 33), bench.size(2048 // D, 2), bench.size(D, 16),
    )  # fmt: skip
    forward = 4.0 * b * h * t * t * d * (0.5 if causal else 1.0)
    peers = softmax_peers(bench, causal, t)
    must = 1.10 if causal else 1.20
    for grad in (False, True):
        run_only = {n: p for n, p in peers.items() if not (grad and n == "fa3")}
        goals = (Goal("sdpa flash", 0.85),) if grad else (Goal("sdpa flash", must), Goal("fa3", 0.70))
        yield Row(
            f"softmax D={D} T={T} {'causal' if causal else 'full'}", "forward+backward" if grad else "forward",
            {"B": b, "T": t, "H": h, "D": d}, partial(_qkv, bench, b, t, t, h, h, d, d, grad),
            partial(_attention, causal=causal), partial(_attention, causal=causal, backend="eager"), run_only,
            parts=head_parts(b, h, h), goals=goals if T >= 2048 else (), flops=forward * (3.5 if grad else 1.0),
        )  # fmt: skip


def _qkv(bench: Bench, b: int, t: int, s: int, h: int, g: int, d: int, dv: int, grad: bool, seed: int) -> Inputs:
    return bench.tensors(seed, (b, t, h, d), (b, s, g, d), (b, s, g, dv), grad=grad)


def _attention(inputs: Inputs, causal: bool, backend: str = "triton") -> Tensor:
    return softmax_attention(*inputs[:3], Visibility(causal=causal), backend=backend)


def candidate_rows(bench: Bench) -> Iterator[Row]:
    """Tiles that may replace those of the table, which are the peer: a ratio above 1 is a faster candidate."""
    for D, tiles, warps, stages in ((64, (128, 128), 8, 2), (128, (128, 128), 8, 2), (128, (128, 64), 8, 3)):
        config = Config(dict(zip(("BLOCK_T", "BLOCK_S"), tiles, strict=True)), warps, stages)
        for causal in (True, False):

            def ours(x: Inputs, config: Config = config, causal: bool = causal) -> Tensor:
                with pinned(config):
                    return _attention(x, causal)

            b, t, h, d = bench.size(4, 1), bench.size(4096, 33), bench.size(2048 // D, 2), bench.size(D, 16)
            yield Row(
                f"candidate D={D} {tiles[0]}x{tiles[1]}/{warps}/{stages} {'causal' if causal else 'full'}", "forward",
                {"B": b, "T": t, "H": h, "D": d}, partial(_qkv, bench, b, t, t, h, h, d, d, False), ours,
                partial(_attention, causal=causal, backend="eager"), {"table": partial(_attention, causal=causal)},
                parts=head_parts(b, h, h), flops=4.0 * b * h * t * t * d * (0.5 if causal else 1.0),
            )  # fmt: skip


def latent_rows(bench: Bench) -> Iterator[Row]:
    """Latent attention in training: key width 128 + 64 shared, value width 128."""
    b, t, h = bench.size(4, 1), bench.size(4096, 33), bench.size(16, 2)
    d, r = bench.size(128, 16), bench.size(64, 8)

    def ours(x: Inputs, backend: str = "triton") -> Tensor:
        return softmax_attention(*x[:3], q_rope=x[3], k_rope=x[4], scale=(d + r) ** -0.5, backend=backend)

    def joined(x: Inputs) -> Inputs:
        return [torch.cat([x[0], x[3]], -1), torch.cat([x[1], x[4].expand(-1, -1, h, -1)], -1), x[2]]

    peers: dict[str, Run] = {
        name: (lambda x, run=run: run(joined(x))) for name, run in softmax_peers(bench, True, t, False).items()
    }
    # The shared key's gradient is a sum over all heads of a row.
    row = (slice(b - 1, b),)
    for grad in (False, True):
        forward = 2.0 * b * h * t * t * (2 * d + r) * 0.5
        yield Row(
            "latent 128+64/128 causal", "forward+backward" if grad else "forward", {"B": b, "T": t, "H": h},
            lambda seed, grad=grad: bench.tensors(
                seed, (b, t, h, d), (b, t, h, d), (b, t, h, d), (b, t, h, r), (b, t, 1, r), grad=grad
            ),
            ours, partial(ours, backend="eager"), peers, parts=(Part(row, (row,) * 5),),
            goals=(Goal("sdpa best", 1.05 if grad else 1.15),), flops=forward * (3.5 if grad else 1.0),
        )  # fmt: skip


def extended_rows(bench: Bench) -> Iterator[Row]:
    """Softmax attention with a decay or a gate of its outputs, beside plain attention and a gate in a second pass."""
    for D in (128, 64):
        b, t, h, d = bench.size(4, 1), bench.size(4096, 33), bench.size(2048 // D, 2), bench.size(D, 16)
        qkv = [(b, t, h, d)] * 3

        def decayed(x: Inputs, backend: str = "triton") -> Tensor:
            decay = F.logsigmoid(x[3].to(torch.promote_types(x[3].dtype, torch.float32)) + 4).cumsum(-1)
            return softmax_attention(*x[:3], decay=decay, backend=backend)

        def gated(x: Inputs, backend: str = "triton") -> Tensor:
            return softmax_attention(*x[:3], output_gate=x[3], backend=backend)

        def apart(x: Inputs) -> Tensor:
            return _attention(x, True) * torch.sigmoid(x[3])

        plain = partial(_attention, causal=True)
        peers: dict[str, dict[str, Run]] = {"decay": {"plain": plain}, "gated": {"plain": plain, "two passes": apart}}
        if _has("fla"):
            peers["decay"]["fla"] = _forgetting
        for case, ours, more in (("decay", decayed, (b, h, t)), ("gated", gated, (b, t, h, d))):
            parts = head_parts(b, h, h, more=1)
            if case == "decay":
                parts = [Part(p.answer, (*p.inputs[:3], p.answer[::2])) for p in parts]
            for grad in (False, True):
                goals = (Goal("plain", 0.88), *(() if case == "decay" else (Goal("two passes", 1.0),)))
                yield Row(
                    f"{case} D={D} T=4096", "forward+backward" if grad else "forward", {"B": b, "T": t, "H": h, "D": d},
                    lambda seed, shapes=(*qkv, more), grad=grad: bench.tensors(seed, *shapes, grad=grad),
                    ours, partial(ours, backend="eager"), peers[case], parts=parts, goals=goals,
                    flops=2.0 * b * h * t * t * d * (3.5 if grad else 1.0),
                )  # fmt: skip


def sigmoid_rows(bench: Bench) -> Iterator[Row]:
    """Sigmoid attention, causal, beside softmax attention of the same sizes."""
    for D in (128, 64):
        b, t, h, d = bench.size(4, 1), bench.size(4096, 33), bench.size(2048 // D, 2), bench.size(D, 16)

        def ours(x: Inputs, backend: str = "triton") -> Tensor:
            return sigmoid_attention(*x[:3], backend=backend)

        for grad in (False, True):
            yield Row(
                f"sigmoid D={D} T=4096", "forward+backward" if grad else "forward", {"B": b, "T": t, "H": h, "D": d},
                partial(_qkv, bench, b, t, t, h, h, d, d, grad), ours, partial(ours, backend="eager"),
                {"softmax": partial(_attention, causal=True)}, parts=head_parts(b, h, h),
                goals=(Goal("softmax", 1.0),), flops=2.0 * b * h * t * t * d * (3.5 if grad else 1.0),
            )  # fmt: skip


def _forgetting(x: Inputs) -> Tensor:
    run = importlib.import_module("fla.ops.forgetting_attn.parallel").parallel_forgetting_attn
    return _first(run(*x[:3], F.logsigmoid(x[3].float() + 4).transpose(1, 2)))


def decode_rows(bench: Bench) -> Iterator[Row]:
    """One token over a cache, H = 32, D = 128."""
    for G in (8, 32, 1):
        for S in (8192, 32768, 1024):
            for B in (8, 1, 64):
                yield _decode_row(bench, B, S, G)


def _decode_row(bench: Bench, B: int, S: int, G: int) -> Row:
    b, s, h = bench.size(B, min(B, 2)), bench.size(S, 70), bench.size(32, 4)
    g, d = bench.size(G, min(G, 4)), bench.size(128, 16)
    goals = [Goal("sdpa", 2.0 if B == 1 and S == 32768 else 1.0)]
    if B >= 8 and S >= 8192:
        goals.append(Goal("copy", 0.80))
    return Row(
        f"decode G={G} B={B} S={S}", "decode", {"B": b, "S": s, "H": h, "D": d},
        partial(_qkv, bench, b, 1, s, h, g, d, d, False), partial(_attention, causal=True),
        partial(_attention, causal=True, backend="eager"), {"sdpa": partial(_sdpa, causal=False, backend=None)},
        parts=head_parts(b, h, g), goals=tuple(goals), flops=4.0 * b * h * s * d,
        bytes=2.0 * b * s * g * d * torch.finfo(bench.dtype).bits / 8,
    )  # fmt: skip


def latent_decode_rows(bench: Bench) -> Iterator[Row]:
    """One token of absorbed latent attention, R = 512, dr = 64."""
    scale = 192**-0.5
    for H, goal in ((16, Goal("copy", 0.75)), (128, Goal("tflops", 300.0))):
        for B, S in ((8, 8192), (1, 32768), (64, 8192)):
            b, s, h = bench.size(B, 1), bench.size(S, 70), bench.size(H, 3)
            R, r = bench.size(512, 32), bench.size(64, 16)

            def call(x: Inputs, backend: str = "triton", R: int = R) -> Tensor:
                return latent_attention(*x, Visibility(), latent_width=R, scale=scale, backend=backend)

            def expanded(x: Inputs) -> Tensor:
                return _sdpa([torch.cat([x[0], x[1]], -1), x[2], x[2]], False, None, scale)

            row = (slice(b - 1, b),)
            yield Row(
                f"latent decode H={H} B={B} S={S}", "decode", {"B": b, "S": s, "R": R},
                lambda seed, b=b, s=s, h=h, R=R, r=r: bench.tensors(
                    seed, (b, 1, h, R), (b, 1, h, r), (b, s, 1, R + r)
                ),
                call, partial(call, backend="eager"), {"sdpa": expanded}, parts=(Part(row, (row,) * 3),),
                goals=(goal,) if S * B >= 32768 else (), flops=2.0 * b * h * s * (2 * R + r),
                bytes=b * s * (R + r) * torch.finfo(bench.dtype).bits / 8,
            )  # fmt: skip


def factor_rows(bench: Bench) -> Iterator[Row]:
    """One token over a cache of factors of rank 2, 47 heads of 64, beside attention that forms keys and values."""
    for B, S in ((8, 8192), (1, 32768)):
        b, s, h = bench.size(B, 1), bench.size(S, 70), bench.size(47, 3)
        d = bench.size(64, 16)

        def ours(x: Inputs) -> Tensor:
            return decode_factors(*x, scale=0.125, query_start=x[1].shape[1] - 1)

        def formula(x: Inputs) -> Tensor:
            k, v = tensor_product(*x[1:3]), tensor_product(*x[3:])
            return softmax_attention(x[0], k, v, scale=0.125, backend="eager")

        row = (slice(b - 1, b),)
        yield Row(
            f"factors H=47 B={B} S={S}", "decode", {"B": b, "S": s, "H": h, "D": d},
            lambda seed, b=b, s=s, h=h, d=d: bench.tensors(
                seed, (b, 1, h, d), (b, s, 2, h), (b, s, 2, d), (b, s, 2, h), (b, s, 2, d)
            ),
            ours, formula, {"formed": formula}, parts=(Part(row, (row,) * 5),), goals=(Goal("formed", 1.0),),
            flops=8.0 * b * h * s * d, bytes=4.0 * b * s * (h + d) * torch.finfo(bench.dtype).bits / 8,
        )  # fmt: skip


def qk_norm_rope_rows(bench: Bench) -> Iterator[Row]:
    """QK norm and rotation, without and with a head map, over 16k tokens of 16 heads."""
    t, n, d = bench.size(4096, 33), bench.size(16, 2), bench.size(128, 16)
    b = bench.size(4, 1)

    @lru_cache(maxsize=1)
    def tables() -> tuple[Tensor, Tensor]:
        device = torch.device(bench.device)
        return rotary_table(Rotary(), d, torch.arange(t, device=device), dtype=bench.dtype, device=device)

    def ours(x: Inputs, mapped: bool) -> Tensor:
        from attnzoo_kernels.qk_norm_rope import qk_norm_rope

        cos, sin = tables()
        mlp = (x[2], x[3], x[4]) if mapped else None
        return qk_norm_rope(x[0], mlp=mlp, norm_weight=x[1], norm_eps=1e-6, cos=cos, sin=sin)

    def formula(x: Inputs, mapped: bool) -> Tensor:
        z = knock_mlp(x[0], *x[2:5]) if mapped else x[0]
        cos, sin = (table.to(z.dtype) for table in tables())
        return rotate(F.rms_norm(z, x[1].shape, x[1], 1e-6), cos, sin, "half")

    for mapped in (False, True):
        plain = partial(formula, mapped=mapped)
        peers: dict[str, Run] = {"eager": plain}
        if bench.gpu:
            peers["compile"] = compiled(plain)
        shapes = (b, t, n, d), (d,), *([(d, d)] * 3 if mapped else [])
        for grad in (False, True):
            yield Row(
                f"qk_norm_rope {'gated map, ' if mapped else ''}norm, rotation",
                "forward+backward" if grad else "forward",
                {"B": b, "T": t, "N": n, "D": d},
                lambda seed, grad=grad, shapes=shapes: bench.tensors(seed, *shapes, grad=grad),
                partial(ours, mapped=mapped), plain, peers,
                goals=(Goal("compile", 1.0), *(() if grad or mapped else (Goal("copy", 0.85),))),
                bytes=2.0 * b * t * n * d * torch.finfo(bench.dtype).bits / 8,
            )  # fmt: skip


def module_rows(bench: Bench) -> Iterator[Row]:
    """Whole modules, backend "auto", against bare projections around the same attention."""
    b, t, e, h = bench.size(4, 1), bench.size(4096, 33), bench.size(2048, 32), bench.size(16, 2)
    for G in (h, max(1, h // 4)):

        @lru_cache(maxsize=3)
        def module(backend: str, dtype: torch.dtype, G: int = G) -> Any:
            torch.manual_seed(0)
            made = attnzoo.GroupedQueryAttention(
                e, h, G, rope=None, backend=backend, device=bench.device, dtype=bench.dtype
            )
            return made.requires_grad_(False).to(dtype)

        def ours(x: Inputs, module: Any = module) -> Tensor:
            return module("auto", x[0].dtype)(x[0])

        def formula(x: Inputs, module: Any = module) -> Tensor:
            return module("eager", x[0].dtype)(x[0])

        @lru_cache(maxsize=1)
        def weights(module: Any = module) -> tuple[Tensor, Tensor]:
            attn = module("auto", bench.dtype)
            return torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]), attn.o_proj.weight

        def bare(x: Inputs, G: int = G, weights: Any = weights) -> Tensor:
            (w, o), d = weights(), e // h
            q, k, v = F.linear(x[0], w).split([h * d, G * d, G * d], -1)
            out = _sdpa([z.unflatten(-1, (-1, d)) for z in (q, k, v)], True, None)
            return F.linear(out.flatten(2), o)

        for grad in (False, True):
            yield Row(
                f"module G={G}", "forward+backward" if grad else "forward", {"B": b, "T": t, "E": e, "H": h},
                lambda seed, grad=grad: bench.tensors(seed, (b, t, e), grad=grad), ours, formula, {"bare sdpa": bare},
                lambda x: [x[0][:1, :512]], goals=(Goal("bare sdpa", 0.98),),
            )  # fmt: skip


GRIDS: dict[str, tuple[Callable[[Bench], Iterator[Row]], ...]] = {
    "train": (train_rows, latent_rows, extended_rows, sigmoid_rows),
    "decode": (decode_rows, latent_decode_rows, factor_rows),
    "others": (qk_norm_rope_rows, module_rows),
    "candidates": (candidate_rows,),
}
