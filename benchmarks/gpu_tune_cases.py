"""The sweeps of `benchmarks/gpu_tune.py`: which kernel, in which call, with which tiles beside those of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Bench, Inputs
from torch import Tensor

from attnzoo.rotary import Rotary, rotary_table
from attnzoo_kernels.tuning import Config

Call = Callable[[Config | None], Sequence[Tensor]]
"""The timed call: the candidate, None for the table's tiles -> its results."""


@dataclass(frozen=True)
class Sweep:
    """Candidates for one kernel.

    Attributes:
        name: what --only is about.
        kernel: the name in the tables.
        shape: sizes of the call.
        make: makes the inputs and returns the call. Within a stream that the call is timed in.
        candidates: tiles beside the table's. A tile "splits" is for the call, 0 for its own choice.
    """

    name: str
    kernel: str
    shape: dict[str, int]
    make: Callable[[], Call]
    candidates: list[Config]

    def tiles(self) -> list[str]:
        """The names of the kernel's tiles."""
        return [name for name in self.candidates[0].tiles if name != "splits"]


QUERIES_KEYS = ("BLOCK_T", "BLOCK_S")
SPLIT = (*QUERIES_KEYS, "splits")


def configs(names: Sequence[str], text: str) -> list[Config]:
    """Candidates written as "128x64/8/3": tiles, warps and stages."""
    found = []
    for words in (candidate.split("/") for candidate in text.split()):
        tiles = [int(size) for size in words[0].split("x")]
        found.append(Config(dict(zip(names, tiles, strict=True)), int(words[1]), int(words[2])))
    return found


def forward(run: Callable[[Config | None], Tensor]) -> Call:
    """The call alone."""

    def call(config: Config | None) -> Sequence[Tensor]:
        with torch.no_grad():
            return (run(config),)

    return call


def backward(y: Tensor, inputs: Inputs) -> Call:
    """Gradients of those inputs that require one, again and again from one forward pass."""
    wanted = [x for x in inputs if x.requires_grad]
    weight = torch.randn(y.shape, generator=torch.Generator(y.device).manual_seed(1), device=y.device).to(y.dtype)
    return lambda _: torch.autograd.grad(y, wanted, weight, retain_graph=True)


def made(run: Callable[[Inputs], Tensor], inputs: Inputs, needed: Sequence[int]) -> Call:
    """The forward call, or the backward pass where inputs with these numbers need a gradient."""
    if not needed:
        return forward(lambda _: run(inputs))
    inputs = [x.detach().requires_grad_(n in needed) for n, x in enumerate(inputs)]
    return backward(run(inputs), inputs)


def softmax_sweeps(bench: Bench) -> Iterator[Sweep]:
    """Causal attention, 16k tokens, by part, width, heads of a group and width of the shared part.

    Of the backward pass, which walks queries for keys, one kernel at a time.
    """
    from attnzoo_kernels.softmax_attention import softmax_attention

    tables = {
        ("fwd", 64, 1, 0): "128x128/8/2 128x64/8/2 128x64/8/3 128x64/4/2 128x64/4/3 128x64/4/4 64x64/4/2 64x64/4/3 "
        "64x64/4/4 64x32/4/3 64x32/4/4 64x128/4/3 128x128/8/3 128x32/4/4 256x64/8/3",
        ("fwd", 128, 1, 0): "128x128/8/2 128x64/8/2 128x64/8/3 128x64/8/4 64x64/4/2 64x64/4/3 64x64/4/4 64x32/4/3 "
        "64x32/4/4 64x128/4/3 128x64/4/3 128x128/8/3 64x128/4/2",
        ("dkdv", 64, 1, 0): "64x64/4/1 64x64/4/2 64x64/4/3 64x128/4/2 128x128/8/2 32x128/4/2 32x128/8/2 64x64/8/2 "
        "64x128/8/3 128x64/8/2 128x64/4/1 128x64/4/2 128x64/4/3 64x128/8/1 256x64/4/1",
        ("dkdv", 128, 1, 0): "64x64/4/1 64x64/4/2 64x64/4/3 64x128/4/2 128x128/8/2 32x128/4/2 32x128/8/2 64x64/8/2 "
        "64x128/8/3 128x64/8/2 128x64/4/1 128x64/4/2 32x64/4/2 32x64/4/3 64x128/8/1",
        ("dq", 64, 1, 0): "128x64/8/3 128x64/8/4 128x64/4/2 128x64/4/3 128x128/8/2 64x64/4/2 64x64/4/3 64x64/4/4 "
        "64x32/4/4 128x32/8/2 128x32/4/3 64x128/4/2",
        ("dq", 128, 1, 0): "128x64/8/3 128x64/8/4 128x64/8/1 128x128/8/1 64x64/4/1 64x64/4/2 64x64/4/3 64x32/4/3 "
        "64x32/4/4 128x32/8/3 128x32/4/2 64x128/4/2",
        ("fwd", 256, 1, 0): "64x32/4/2 64x32/4/3 64x64/4/2",
        ("fwd", 128, 1, 64): "64x64/4/2 64x64/4/3 64x32/4/3 128x64/8/2 128x64/8/3 64x32/4/4",
        ("dkdv", 64, 4, 0): "128x64/4/2 64x64/4/3 64x64/4/2",
        ("dkdv", 128, 4, 0): "64x64/4/2 64x128/8/2 32x64/4/2 64x64/4/1",
        ("dkdv", 128, 1, 64): "64x64/4/2 64x128/8/2 32x64/4/2 64x64/4/1 32x64/4/3",
        ("dq", 128, 1, 64): "64x64/4/2 64x32/4/3 128x64/8/1 128x32/8/3 64x32/4/2",
    }
    needed = {"fwd": (), "dkdv": (1, 2, 4), "dq": (0, 3)}
    for (part, D, members, R), candidates in tables.items():
        b, t, d = bench.size(4, 1), bench.size(4096, 33), bench.size(D, 16)
        h, g, r = (
            bench.size(2048 // D, 2),
            bench.size(2048 // D // members, 2 // min(members, 2)),
            R and bench.size(R, 16),
        )

        def run(x: Inputs, scale: float = (d + r) ** -0.5) -> Tensor:
            shared = dict(zip(("q_rope", "k_rope"), x[3:], strict=False))
            return softmax_attention(*x[:3], scale=scale, **shared)[0]

        def make(
            run: Any = run, sizes: tuple[int, ...] = (b, t, h, g, d, r), needed: Sequence[int] = needed[part]
        ) -> Call:
            b, t, h, g, d, r = sizes
            shared = [(b, t, h, r), (b, t, 1, r)] if r else []
            return made(run, bench.tensors(0, (b, t, h, d), (b, t, g, d), (b, t, g, d), *shared), needed)

        kernel = "softmax_attention_fwd" if part == "fwd" else f"softmax_attention_bwd_{part}"
        shape = {"B": b, "T": t, "H": h, "D": d} | ({"G": g} if members > 1 else {}) | ({"R": r} if R else {})
        more = (f"_g{members}" if members > 1 else "") + (f"_r{R}" if R else "")
        yield Sweep(f"softmax_{part}_{D}{more}", kernel, shape, make, configs(QUERIES_KEYS, candidates))


def decode_sweeps(bench: Bench) -> Iterator[Sweep]:
    """One token over a cache: grouped heads, then the latents of all heads."""
    from attnzoo_kernels.decode import decode_attention, latent_decode

    tables = {
        8: "16x64x0/4/2 16x64x2/4/3 16x64x8/4/3 16x64x16/4/3 16x64x0/8/3 16x64x0/4/4 16x128x0/4/2 16x128x0/8/2 "
        "16x128x0/4/3 16x32x0/4/3 16x32x8/4/4 16x32x0/2/4",
        64: "16x64x0/4/2 16x64x2/4/3 16x64x4/4/3 16x64x0/8/3 16x64x0/4/4 16x128x0/4/2 16x128x0/8/2 16x32x0/4/3 "
        "16x32x0/4/4 16x32x0/2/4",
    }
    for B, candidates in tables.items():
        b, s, h = bench.size(B, min(B, 2)), bench.size(8192, 70), bench.size(32, 4)
        g, d = bench.size(8, 2), bench.size(128, 16)

        def make(b: int = b, s: int = s, h: int = h, g: int = g, d: int = d) -> Call:
            x = bench.tensors(0, (b, 1, h, d), (b, s, g, d), (b, s, g, d))
            return forward(lambda c: decode_attention(*x, scale=d**-0.5, query_start=s - 1, num_splits=_splits(c)))

        shape = {"B": b, "S": s, "H": h, "G": g, "D": d}
        yield Sweep(f"decode_b{B}", "decode_attention_fwd", shape, make, configs(SPLIT, candidates))
    tables = {
        16: "16x64x8/4/2 16x64x32/4/2 16x64x0/8/2 16x64x0/4/1 16x32x0/4/2 16x32x0/4/3 16x32x0/4/4 16x32x32/4/2 "
        "16x32x0/8/3 16x128x0/8/1",
        128: "64x64x4/8/2 64x64x16/8/2 64x64x0/8/1 64x32x0/8/2 64x32x0/8/3 64x32x0/4/2 32x64x0/8/2 32x64x0/4/2 "
        "32x32x0/4/3 128x32x0/8/2 64x64x0/16/2",
    }
    for H, candidates in tables.items():
        b, s, h = bench.size(8, 1), bench.size(8192, 70), bench.size(H, 3)
        r, rope = bench.size(512, 32), bench.size(64, 16)

        def make(b: int = b, s: int = s, h: int = h, r: int = r, rope: int = rope) -> Call:
            q, q_rope, kept = bench.tensors(0, (b, 1, h, r), (b, 1, h, rope), (b, s, r + rope))
            scale, x = 192**-0.5, (q, q_rope, kept[..., :r], kept[..., r:])
            return forward(lambda c: latent_decode(*x, scale=scale, query_start=s - 1, num_splits=_splits(c)))

        shape = {"B": b, "S": s, "H": h, "R": r, "rope": rope}
        yield Sweep(f"latent_h{H}", "decode_attention_fwd", shape, make, configs(SPLIT, candidates))


def _splits(config: Config | None) -> int | None:
    return None if config is None else config.tiles["splits"] or None


def norm_sweeps(bench: Bench) -> Iterator[Sweep]:
    """QK norm and rotation without a head map, 16k tokens of 16 heads."""
    from attnzoo_kernels.qk_norm_rope import qk_norm_rope

    b, t, n, d = bench.size(4, 1), bench.size(4096, 33), bench.size(16, 2), bench.size(128, 16)

    def make(needed: Sequence[int]) -> Call:
        device = torch.device(bench.device)
        cos, sin = rotary_table(Rotary(), d, torch.arange(t, device=device), dtype=bench.dtype, device=device)

        def run(x: Inputs) -> Tensor:
            return qk_norm_rope(x[0], norm_weight=x[1], norm_eps=1e-6, cos=cos, sin=sin)

        return made(run, bench.tensors(0, (b, t, n, d), (d,)), needed)

    tables = {
        "fwd": ("qk_norm_rope_fwd", (), "64/4/1 64/8/1 32/8/1 32/2/1 16/4/1 16/2/1 8/4/1 8/2/1 8/1/1 4/1/1 4/4/1"),
        "bwd": ("qk_norm_rope_bwd_input", (0, 1), "64/4/1 64/8/1 32/8/1 16/4/1 16/4/2 16/2/1 8/4/1 8/2/1 4/1/1"),
    }
    for part, (kernel, needed, candidates) in tables.items():
        shape = {"B": b, "T": t, "N": n, "D": d}
        yield Sweep(f"norm_{part}", kernel, shape, partial(make, needed), configs(("BLOCK_M",), candidates))


def composed_sweeps(bench: Bench) -> Iterator[Sweep]:
    """DCMHA's core, mixing by matrices of every query and every key; by heads and part."""
    from attnzoo_kernels.composed_attention import composed_attention

    of_queries, of_keys = (0, 3, 5), (1, 2, 4, 6)
    tables: dict[tuple[int, str], tuple[Sequence[int], str]] = {
        (16, "fwd_stats"): ((), "32x32/8/1 16x32/8/2 16x32/4/2 32x16/8/2 32x32/4/2 32x64/8/1"),
        (16, "fwd_out"): ((), "32x16/8/1 16x16/8/2 16x16/4/2 16x32/8/1 16x32/8/2 32x32/8/1"),
        (16, "bwd_delta"): (of_queries, "16x16/8/1 16x16/8/2 16x32/8/1 16x16/4/1"),
        (16, "bwd_dq"): (of_queries, "16x16/8/1 16x16/4/2 16x16/4/1"),
        (16, "bwd_dkdv"): (of_keys, "16x16/8/2 16x16/4/1 16x16/4/2"),
        (8, "fwd_stats"): ((), "16x32/4/2 16x32/8/2 32x32/8/2 16x64/4/2"),
        (8, "fwd_out"): ((), "16x32/4/2 16x32/8/2 16x16/8/2 16x32/4/1"),
        (8, "bwd_delta"): (of_queries, "16x16/4/2 16x16/8/2 16x32/8/2"),
        (8, "bwd_dq"): (of_queries, "16x16/4/2 16x16/8/2 16x32/8/1 32x16/8/2"),
        (8, "bwd_dkdv"): (of_keys, "16x16/4/2 16x32/8/2 16x16/8/1 32x16/8/1"),
    }
    for (M, part), (needed, candidates) in tables.items():
        b, t, m, d = bench.size(16 // M, 1), bench.size(2048, 33), bench.size(M, 4), bench.size(64, 16)

        def run(x: Inputs, scale: float = d**-0.5) -> Tensor:
            sides = dict(zip(("q_pre", "k_pre", "q_post", "k_post"), x[3:], strict=True))
            return composed_attention(*x[:3], scale=scale, **sides)

        def make(run: Any = run, sizes: tuple[int, ...] = (b, t, m, d), needed: Sequence[int] = needed) -> Call:
            b, t, m, _ = sizes
            mixing = [0.1 * x for x in bench.tensors(9, *[(b, t, 1, m, m)] * 4)]
            return made(run, [*bench.tensors(0, *[sizes] * 3), *mixing], needed)

        shape = {"B": b, "T": t, "M": m, "D": d}
        kernel, tiles = f"composed_attention_{part}", configs(QUERIES_KEYS, candidates)
        yield Sweep(f"composed_{part}" + ("" if M == 16 else f"_m{M}"), kernel, shape, make, tiles)


def linear_sweeps(bench: Bench) -> Iterator[Sweep]:
    """MHLA's core, causal: the whole forward pass, one of its kernels at a time."""
    from attnzoo_kernels.linear_attention import linear_attention

    b, t, h, d = bench.size(2, 1), bench.size(8192, 40), bench.size(16, 2), bench.size(128, 16)
    size = bench.size(64, 8)

    def make() -> Call:
        q, k, v = bench.tensors(0, *[(b, t, h, d)] * 3)
        weights = bench.tensors(3, (1, 1, t // size, t // size))[0].float().tril()
        x = q.relu(), k.relu(), v
        return forward(lambda _: linear_attention(*x, size=size, causal=True, weights=weights)[0])

    tokens, blocks = ("BLOCK_T", "BLOCK_A", "BLOCK_Z"), ("BLOCK_I", "BLOCK_J", "BLOCK_E")
    tables = {
        "state": (tokens, "64x128x128/8/2 64x128x128/4/2 64x128x64/4/2 64x64x64/4/2 64x64x128/8/2 32x128x128/8/3"),
        "mix": (
            blocks,
            "128x64x128/8/2 128x16x128/8/3 128x32x128/8/3 128x32x64/4/2 128x32x256/8/2 64x32x128/4/2 64x64x128/8/2",
        ),
        "tile": (
            tokens,
            "64x128x128/8/2 64x128x128/4/2 64x128x64/4/2 64x64x128/4/2 64x64x64/4/2 64x32x128/8/3 32x128x128/4/2",
        ),
    }
    for part, (names, candidates) in tables.items():
        shape = {"B": b, "T": t, "H": h, "D": d, "size": size}
        yield Sweep(f"linear_{part}", f"linear_attention_{part}", shape, make, configs(names, candidates))


def routed_sweeps(bench: Bench) -> Iterator[Sweep]:
    """Mixture of heads, half of all (token, head) pairs active; by width and part."""
    from attnzoo_kernels.head_routing import routed_attention

    tables: dict[tuple[int, str], tuple[Sequence[int], str]] = {
        (128, "fwd"): ((), "128x128/8/1 128x64/8/2 128x64/8/3 64x64/4/2 64x64/4/3 64x128/4/2"),
        (128, "bwd_dkdv"): ((1, 2), "32x128/8/3 32x128/8/1 64x128/8/1 64x128/8/2 64x64/4/2 64x64/8/2 32x64/4/2"),
        (128, "bwd_dq"): ((0,), "128x64/8/3 128x64/8/1 128x32/8/2 64x64/4/2 64x64/8/2 64x32/4/2"),
        (64, "fwd"): ((), "64x64/4/3 64x64/4/2 128x64/8/3"),
        (64, "bwd_dkdv"): ((1, 2), "32x64/4/2 64x64/4/2 128x64/4/2 64x128/8/2"),
        (64, "bwd_dq"): ((0,), "128x64/8/3 64x64/4/2 64x64/4/3"),
    }
    for (D, part), (needed, candidates) in tables.items():
        b, t, h, d = bench.size(2, 1), bench.size(4096, 33), bench.size(2048 // D, 4), bench.size(D, 16)

        def make(sizes: tuple[int, ...] = (b, t, h, d), needed: Sequence[int] = needed) -> Call:
            active = bench.tensors(7, sizes[:3])[0].argsort(-1).argsort(-1) < sizes[2] // 2
            scale = sizes[3] ** -0.5
            return made(lambda x: routed_attention(*x, active, scale=scale), bench.tensors(0, *[sizes] * 3), needed)

        shape = {"B": b, "T": t, "H": h, "D": d}
        kernel, tiles = f"head_routing_{part}", configs(QUERIES_KEYS, candidates)
        yield Sweep(f"routed_{part}" + ("" if D == 128 else f"_{D}"), kernel, shape, make, tiles)


def decay_sweeps(bench: Bench) -> Iterator[Sweep]:
    """Causal attention with a decay, by width and part."""
    from attnzoo_kernels.softmax_attention import softmax_attention

    tables: dict[tuple[int, str], tuple[Sequence[int], str]] = {
        (128, "fwd"): ((), "128x64/8/2 128x64/8/3 128x128/8/1 64x64/4/3 64x128/4/2 128x64/4/2"),
        (128, "bwd_dkdv"): ((1, 2, 3), "32x128/8/2 64x64/4/2 64x64/8/2 64x128/8/1 32x128/4/2 128x64/8/2"),
        (128, "bwd_dq"): ((0,), "128x64/8/2 64x64/4/2"),
        (64, "fwd"): ((), "128x64/4/2 128x64/4/3 128x128/8/2 64x64/4/2"),
        (64, "bwd_dkdv"): ((1, 2, 3), "64x64/4/2 64x128/8/2 64x64/4/1"),
    }
    for (D, part), (needed, candidates) in tables.items():
        b, t, h, d = bench.size(4, 1), bench.size(4096, 33), bench.size(2048 // D, 2), bench.size(D, 16)

        def run(x: Inputs, scale: float = d**-0.5) -> Tensor:
            return softmax_attention(*x[:3], scale=scale, decay=x[3])[0]

        def make(run: Any = run, sizes: tuple[int, ...] = (b, t, h, d), needed: Sequence[int] = needed) -> Call:
            gates = bench.tensors(3, (sizes[0], sizes[2], sizes[1]))[0].float()
            return made(run, [*bench.tensors(0, *[sizes] * 3), F.logsigmoid(gates + 4).cumsum(-1)], needed)

        shape = {"B": b, "T": t, "H": h, "D": d}
        kernel, tiles = f"softmax_attention_{part}", configs(QUERIES_KEYS, candidates)
        name = f"decay_{part.removeprefix('bwd_')}" + ("" if D == 128 else f"_{D}")
        yield Sweep(name, kernel, shape, make, tiles)


SWEEPS: tuple[Callable[[Bench], Iterator[Sweep]], ...] = (
    softmax_sweeps, decode_sweeps, norm_sweeps, composed_sweeps, linear_sweeps, routed_sweeps, decay_sweeps,
)  # fmt: skip
"""In the order in which they run."""
