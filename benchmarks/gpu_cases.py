"""The grid of `benchmarks/gpu.py`: what runs in each row, against whom, and what it has to reach.

A row is one call in one shape: our form of it, the peers, and how its answer is checked. Peers that are not installed
are left out and named by `missing_peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
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
from attnzoo.ops.head_mixing import knock_mlp
from attnzoo.ops.latent_attention import latent_attention
from attnzoo.ops.softmax_attention import softmax_attention
from attnzoo.rotary import Rotary, rotary_table, rotate

Inputs = list[Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Goal:
    """Our time may be at most that of `peer` over `ratio`; or "copy" / "tflops": a share of bandwidth, a rate."""

    peer: str
    ratio: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    make gives fresh inputs for a seed; those that require a gradient decide whether the backward pass is timed too.
    check gives (ours, exact, plain): a part of our answer, the same in float64, and in the inputs' dtype by the
    definition, whose error sets the budget.
    """

    case: str
    phase: str
    shape: dict[str, Any]
    make: Callable[[int], Inputs]
    ours: Run
    peers: dict[str, Run]
    check: Callable[[Inputs], tuple[Tensor, Tensor, Tensor]]
    goals: tuple[Goal, ...] = ()
    flops: float = 0.0
    bytes: float = 0.0
    note: str = field(default="", compare=False)


class Bench:
    """Device, dtype and sizes of a run; tiny shrinks every row to what the interpreter can do."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def size(self, full: int, small: int) -> int:
        """A size of the row, or the small one that replaces it."""
        return small if self.tiny else full

    def tensors(self, seed: int, *shapes: tuple[int, ...], grad: bool = False) -> Inputs:
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        factory_kwargs: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "generator": generator}
        return [torch.randn(shape, **factory_kwargs).requires_grad_(grad) for shape in shapes]


def missing_peers(device: str) -> list[str]:
    """Peers that this run cannot compare with, and why."""
    if device == "cpu":
        return ["flash kernels, flex_attention, flash-attn 3 and 4, flash-linear-attention: need a GPU"]
    wanted = {"fa3_fwd_interface": "fa3-fwd", "flash_attn.cute": "flash-attn 4", "fla": "flash-linear-attention"}
    return [f"{name}: not installed" for module, name in wanted.items() if not _has(module)]


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


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


@lru_cache(maxsize=1)
def _flex() -> Any:
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


def _flex_attention(inputs: Inputs, block_mask: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    return _flex()(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001  (flex_attention's signature)
    return i >= j


def _causal_blocks(T: int, device: str) -> Any:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    return flex.create_block_mask(_causal, None, None, T, T, device=device)


def softmax_peers(bench: Bench, causal: bool, T: int, equal_widths: bool = True) -> dict[str, Run]:
    """Everything that computes plain attention here."""
    if bench.device == "cpu":
        return {"sdpa": partial(_sdpa, causal=causal, backend=None)}
    peers: dict[str, Run] = {
        "sdpa flash": partial(_sdpa, causal=causal, backend=SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": partial(_sdpa, causal=causal, backend=SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": partial(_sdpa, causal=causal, backend=SDPBackend.EFFICIENT_ATTENTION),
    }
    if T <= 8192 and equal_widths:
        peers["flex"] = partial(_flex_attention, block_mask=_causal_blocks(T, bench.device) if causal else None)
    if _has("fa3_fwd_interface") and equal_widths:
        fa3 = importlib.import_module("fa3_fwd_interface").flash_attn_func
        peers["fa3"] = lambda x: _first(fa3(*x[:3], causal=causal))
    if _has("flash_attn.cute"):
        fa4 = importlib.import_module("flash_attn.cute").flash_attn_func
        peers["fa4"] = lambda x: _first(fa4(*x[:3], causal=causal))
    if _has("fla") and causal and equal_widths:
        parallel = importlib.import_module("fla.ops.attn.parallel").parallel_attn
        peers["fla"] = lambda x: parallel(*x[:3])
    return peers


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def sampled(inputs: Inputs, ours: Tensor, causal: bool, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Our answer for the first row and the last 64 queries, exact, and by the definition in the inputs' dtype."""
    q, k, v = (x.detach()[:1] for x in inputs[:3])
    rows = min(64, q.shape[1])
    start = k.shape[1] - rows if causal else 0
    q, mine = q[:, -rows:], ours.detach()[:1, -rows:]
    call: dict[str, Any] = {
        "view": Visibility(causal=causal, query_start=start), "scale": scale, "backend": "eager",
    }  # fmt: skip
    group = q.shape[2] // k.shape[2]
    truth, plain = [], []
    # Head by head: scores of all heads at once would not fit in float64.
    for h in range(q.shape[2]):
        part = q[:, :, h : h + 1], k[:, :, h // group : h // group + 1], v[:, :, h // group : h // group + 1]
        truth.append(softmax_attention(*(x.double() for x in part), **call))
        plain.append(softmax_attention(*part, **call))
    return mine, torch.cat(truth, 2), torch.cat(plain, 2)


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
    ours = partial(_ours, causal=causal)
    peers = softmax_peers(bench, causal, t)
    must = 1.10 if causal else 1.20
    for grad in (False, True):
        run_only = {n: p for n, p in peers.items() if not (grad and n == "fa3")}
        goals = (Goal("sdpa flash", 0.85),) if grad else (Goal("sdpa flash", must), Goal("fa3", 0.70))
        if T < 2048:
            goals = ()
        yield Row(
            f"softmax D={D} T={T} {'causal' if causal else 'full'}", "forward+backward" if grad else "forward",
            {"B": b, "T": t, "H": h, "D": d}, partial(_qkv, bench, b, t, t, h, h, d, d, grad), ours, run_only,
            partial(_check_attention, ours=ours, causal=causal), goals, forward * (3.5 if grad else 1.0),
        )  # fmt: skip


def _qkv(bench: Bench, b: int, t: int, s: int, h: int, g: int, d: int, dv: int, grad: bool, seed: int) -> Inputs:
    return bench.tensors(seed, (b, t, h, d), (b, s, g, d), (b, s, g, dv), grad=grad)


def _ours(inputs: Inputs, causal: bool) -> Tensor:
    return softmax_attention(*inputs[:3], Visibility(causal=causal), backend="triton")


def _check_attention(inputs: Inputs, ours: Run, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return sampled(inputs, ours(inputs), causal)


def latent_rows(bench: Bench) -> Iterator[Row]:
    """Latent attention in training: key width 128 + 64 shared, value width 128."""
    b, t, h = bench.size(4, 1), bench.size(4096, 33), bench.size(16, 2)
    d, r = bench.size(128, 16), bench.size(64, 8)
    scale = (d + r) ** -0.5

    def ours(x: Inputs) -> Tensor:
        return softmax_attention(*x[:3], q_rope=x[3], k_rope=x[4], scale=scale, backend="triton")

    def joined(x: Inputs) -> Inputs:
        return [torch.cat([x[0], x[3]], -1), torch.cat([x[1], x[4].expand(-1, -1, h, -1)], -1), x[2]]

    peers: dict[str, Run] = {
        name: (lambda x, run=run: run(joined(x))) for name, run in softmax_peers(bench, True, t, False).items()
    }
    for grad in (False, True):
        forward = 2.0 * b * h * t * t * (2 * d + r) * 0.5
        yield Row(
            "latent 128+64/128 causal", "forward+backward" if grad else "forward", {"B": b, "T": t, "H": h},
            lambda seed, grad=grad: bench.tensors(
                seed, (b, t, h, d), (b, t, h, d), (b, t, h, d), (b, t, h, r), (b, t, 1, r), grad=grad
            ),
            ours, peers, lambda x: sampled(joined(x), ours(x).detach(), True, scale),
            (Goal("sdpa best", 1.05 if grad else 1.15),), forward * (3.5 if grad else 1.0),
        )  # fmt: skip


def decode_rows(bench: Bench) -> Iterator[Row]:
    """One token over a cache, H = 32, D = 128."""
    for G in (8, 32, 1):
        for S in (8192, 32768, 1024):
            for B in (8, 1, 64):
                yield _decode_row(bench, B, S, G)


def _decode_row(bench: Bench, B: int, S: int, G: int) -> Row:
    b, s, h = bench.size(B, min(B, 2)), bench.size(S, 70), bench.size(32, 4)
    g, d = bench.size(G, min(G, 4)), bench.size(128, 16)
    ours = partial(_ours, causal=True)

    def sdpa(x: Inputs) -> Tensor:
        return _sdpa(x, causal=False, backend=None)

    goals = [Goal("sdpa", 2.0 if B == 1 and S == 32768 else 1.0)]
    if B >= 8 and S >= 8192:
        goals.append(Goal("copy", 0.80))
    return Row(
        f"decode G={G} B={B} S={S}", "decode", {"B": b, "S": s, "H": h, "D": d},
        partial(_qkv, bench, b, 1, s, h, g, d, d, False),
        ours, {"sdpa": sdpa}, partial(_check_attention, ours=ours, causal=True), tuple(goals),
        4.0 * b * h * s * d, 2.0 * b * s * g * d * torch.finfo(bench.dtype).bits / 8,
    )  # fmt: skip


def latent_decode_rows(bench: Bench) -> Iterator[Row]:
    """One token of absorbed latent attention, R = 512, dr = 64."""
    for H, goal in ((16, Goal("copy", 0.75)), (128, Goal("tflops", 300.0))):
        for B, S in ((8, 8192), (1, 32768), (64, 8192)):
            b, s, h = bench.size(B, 1), bench.size(S, 70), bench.size(H, 3)
            R, r = bench.size(512, 32), bench.size(64, 16)
            scale = 192**-0.5

            def call(x: Inputs, backend: str = "triton", R: int = R, scale: float = scale) -> Tensor:
                return latent_attention(*x, Visibility(), latent_width=R, scale=scale, backend=backend)

            def expanded(x: Inputs, scale: float = scale) -> Tensor:
                return _sdpa([torch.cat([x[0], x[1]], -1), x[2], x[2]], False, None, scale)

            def check(x: Inputs, call: Any = call) -> tuple[Tensor, Tensor, Tensor]:
                return call(x), call([y.double() for y in x], "eager"), call(x, "eager")

            yield Row(
                f"latent decode H={H} B={B} S={S}", "decode", {"B": b, "S": s, "R": R},
                lambda seed, b=b, s=s, h=h, R=R, r=r: bench.tensors(
                    seed, (b, 1, h, R), (b, 1, h, r), (b, s, 1, R + r)
                ),
                call, {"sdpa": expanded}, check, (goal,) if S * B >= 32768 else (),
                2.0 * b * h * s * (2 * R + r), b * s * (R + r) * torch.finfo(bench.dtype).bits / 8,
            )  # fmt: skip


def qk_norm_rope_rows(bench: Bench) -> Iterator[Row]:
    """QK norm and rotation, without and with a head map, over 16k tokens of 16 heads."""
    from attnzoo_kernels.qk_norm_rope import qk_norm_rope

    t, n, d = bench.size(4096, 33), bench.size(16, 2), bench.size(128, 16)
    b = bench.size(4, 1)
    cos, sin = rotary_table(
        Rotary(), d, torch.arange(t, device=bench.device), dtype=bench.dtype, device=torch.device(bench.device)
    )
    norm = torch.nn.RMSNorm(d, 1e-6, device=bench.device, dtype=bench.dtype)

    def plain(x: Inputs, mapped: bool) -> Tensor:
        z = knock_mlp(x[0], *x[1:4]) if mapped else x[0]
        return rotate(norm(z), cos, sin, "half")

    for mapped in (False, True):

        def ours(x: Inputs, mapped: bool = mapped) -> Tensor:
            mlp = (x[1], x[2], x[3]) if mapped else None
            return qk_norm_rope(x[0], mlp=mlp, norm_weight=norm.weight, norm_eps=1e-6, cos=cos, sin=sin)

        formula = partial(plain, mapped=mapped)
        peers: dict[str, Run] = {"eager": formula}
        if bench.device != "cpu":
            peers["compile"] = torch.compile(formula)

        def check(x: Inputs, ours: Any = ours, formula: Any = formula) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                wide = [y.double() for y in x]
                exact = knock_mlp(wide[0], *wide[1:4]) if formula.keywords["mapped"] else wide[0]
                exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
                return ours(x), rotate(exact, cos.double(), sin.double(), "half"), formula(x)

        for grad in (False, True):
            yield Row(
                f"qk_norm_rope {'gated map, ' if mapped else ''}norm, rotation",
                "forward+backward" if grad else "forward",
                {"B": b, "T": t, "N": n, "D": d},
                lambda seed, grad=grad: bench.tensors(seed, (b, t, n, d), (d, d), (d, d), (d, d), grad=grad),
                ours, peers, check, (Goal("compile", 1.0), *(() if grad or mapped else (Goal("copy", 0.85),))),
                bytes=2.0 * b * t * n * d * torch.finfo(bench.dtype).bits / 8,
            )  # fmt: skip


def module_rows(bench: Bench) -> Iterator[Row]:
    """Whole modules, backend "auto", against bare projections around the same attention."""
    b, t, e, h = bench.size(4, 1), bench.size(4096, 33), bench.size(2048, 32), bench.size(16, 2)
    for G in (h, max(1, h // 4)):
        attn = attnzoo.GroupedQueryAttention(e, h, G, rope=None, device=bench.device, dtype=bench.dtype)
        w = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]).detach()
        o, d = attn.o_proj.weight.detach(), e // h

        def bare(x: Inputs, G: int = G, w: Tensor = w, o: Tensor = o, d: int = d) -> Tensor:
            q, k, v = F.linear(x[0], w).split([h * d, G * d, G * d], -1)
            out = _sdpa([z.unflatten(-1, (-1, d)) for z in (q, k, v)], True, None)
            return F.linear(out.flatten(2), o)

        def ours(x: Inputs, attn: Any = attn) -> Tensor:
            return attn(x[0])

        def check(x: Inputs, ours: Any = ours, bare: Any = bare, attn: Any = attn) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                exact = attnzoo.GroupedQueryAttention(
                    e, h, attn.num_kv_heads, rope=None, backend="eager", device=bench.device, dtype=torch.float64
                )
                exact.load_state_dict({k: v.double() for k, v in attn.state_dict().items()})
                part = x[0][:1, :512]
                return ours(x)[:1, :512], exact(part.double()), bare([part])

        for grad in (False, True):
            yield Row(
                f"module G={G}", "forward+backward" if grad else "forward", {"B": b, "T": t, "E": e, "H": h},
                lambda seed, grad=grad: bench.tensors(seed, (b, t, e), grad=grad), ours, {"bare sdpa": bare}, check,
                (Goal("bare sdpa", 0.98),),
            )  # fmt: skip


GRIDS: dict[str, tuple[Callable[[Bench], Iterator[Row]], ...]] = {
    "standard": (train_rows, latent_rows, decode_rows, latent_decode_rows, qk_norm_rope_rows, module_rows),
    "train": (train_rows, latent_rows),
    "decode": (decode_rows, latent_decode_rows),
}
