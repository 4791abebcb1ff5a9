"""Which backend "auto" takes on a GPU, for every mechanism and feature: the table of docs/backends.md.

python benchmarks/backend_table.py           print it
python benchmarks/backend_table.py --write   put it between the page's markers

No GPU is needed and nothing is launched: tensors without values say that they are on one, and what is called is noted.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from attnzoo import AttentionMask, rotary  # noqa: E402
from attnzoo.ops import flash, softmax_attention  # noqa: E402
from tests.zoo import LACKS, MECHANISMS, OPTIONS, TAKES  # noqa: E402

PAGE = ROOT / "docs" / "backends.md"
BEGIN, END = "<!-- made by benchmarks/backend_table.py -->", "<!-- end -->"
# A number of its own, so that nothing remembered for it is taken for a real GPU's.
DEVICE = torch.device("cuda", 63)
# No width or number of blocks is one of these.
B, T, PAST = 2, 23, 19
ATTENTION = {
    "softmax_attention": "softmax", "decode_attention": "decode", "decode_factors": "factors",
    "composed_attention": "composed",
    "sigmoid_attention": "sigmoid", "linear_attention": "linear", "linear_attention_step": "linear step",
    "routed_attention": "routed",
}  # fmt: skip
"""Operators of our kernels that are attention, and their names in the table."""
PLAIN = (
    "eit",
    "eit-efficient",
    "mgk",
    "mgk-hard",
    "rcmha",
    "mta",
    "mta-full",
    "selective",
)
"""Mechanisms that no kernel of ours covers, of mgk a decoding step."""


@dataclass
class PretendGPU(TorchFunctionMode):
    """Tensors of the meta device are on a GPU, as far as anybody who asks can tell.

    Attributes:
        kernels: operators of our kernels that were called.
        calls: how often each function was.
        sdpa: the masks of calls of scaled_dot_product_attention, and the dtype of their queries.
        quadratic: functions that returned a floating tensor with a number for each pair of tokens.
    """

    kernels: set[str] = field(default_factory=set)
    calls: Counter[str] = field(default_factory=Counter)
    sdpa: list[tuple[Tensor | None, torch.dtype]] = field(default_factory=list)
    quadratic: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        answers: dict[str, object] = {"device": DEVICE, "is_cuda": True, "is_cpu": False, "is_meta": False}
        self.answers = {getattr(Tensor, name).__get__: answer for name, answer in answers.items()}

    def __torch_function__(self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.answers:
            return self.answers[func]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func in (Tensor.__int__, Tensor.item):
            # Number of blocks that packed documents take.
            return 2 * T
        args = tuple(_placed(x) for x in args)
        out = func(*args, **{name: _placed(x) for name, x in (kwargs or {}).items()})
        name = getattr(func, "name", getattr(func, "__name__", ""))
        name = name() if callable(name) else name
        self.calls[name] += 1
        if name.startswith("attnzoo::"):
            self.kernels.add(name.removeprefix("attnzoo::").split(".")[0])
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.sdpa.append((kwargs["attn_mask"], args[0].dtype))
        pairs = isinstance(out, Tensor) and out.is_floating_point() and {*out.shape[-2:]} <= {T, T + PAST}
        if pairs and out.ndim > 1:
            self.quadratic.add(name)
        return out

    def attention(self) -> str:
        """What ran, in the table's words."""
        ours = [word for name, word in ATTENTION.items() if name in self.kernels]
        if self.sdpa:
            ours.append("sdpa" if all(mask is None for mask, _ in self.sdpa) else "sdpa + mask")
        return ", ".join(ours) or ("eager" if self.quadratic else "chunks")


def _placed(x: Any) -> Any:
    on_gpu = isinstance(x, torch.device | str) and str(x).startswith("cuda")
    return torch.device("meta") if on_gpu else x


@contextmanager
def pretend_gpu() -> Iterator[PretendGPU]:
    """A block in which tensors of the meta device are on a GPU with 227 KiB of shared memory, without flash-attn."""
    import attnzoo_kernels
    from attnzoo_kernels import tuning

    # A kernel whose module is imported within would stay one for GPUs after it.
    for module in pkgutil.walk_packages(attnzoo_kernels.__path__, "attnzoo_kernels."):
        importlib.import_module(module.name)
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "is_available", lambda: True), (torch.cuda, "get_device_capability", lambda _: (9, 0)),
            (tuning, "device_limits", lambda _: (132, 227 * 1024, 32)), (flash, "_present", lambda _: False),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict("os.environ", TRITON_INTERPRET="0"))
        stack.callback(softmax_attention._constant.cache_clear)
        stack.callback(lambda: [rotary._tables.pop(key) for key in [*rotary._tables] if key[-1] == DEVICE])
        yield stack.enter_context(PretendGPU())


Case = tuple[dict[str, Any], Callable[[nn.Module, Tensor], object]]


def _train(module: nn.Module, x: Tensor, mask: AttentionMask | None = None) -> object:
    return module.train()(x, mask=mask)


def _masked(**parts: tuple[int, ...]) -> Callable[[nn.Module, Tensor], object]:
    """Training with a mask of these parts."""

    def run(module: nn.Module, x: Tensor) -> object:
        dtypes = {"lengths": torch.int64, "cu_seqlens": torch.int32, "dense_mask": torch.bool}
        made = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in parts.items()}
        return _train(module, x, AttentionMask(**made))

    return run


def _decode(tokens: int) -> Callable[[nn.Module, Tensor], object]:
    """So many new tokens after those of a cache."""

    @torch.no_grad()
    def run(module: nn.Module, x: Tensor) -> object:
        cache = module.init_cache(B, PAST + T, device="meta")
        cache.length = PAST
        return module.eval()(x[:, :tokens], cache=cache)

    return run


CASES: dict[str, Case] = {
    "training": ({}, _train),
    "not causal": ({"causal": False}, _train),
    "packed": ({}, _masked(cu_seqlens=(4,))),
    "padding": ({}, _masked(lengths=(B,))),
    "dense mask": ({}, _masked(dense_mask=(B, 1, T, T))),
    "window": (OPTIONS["window"], _train),
    "sink tokens": (OPTIONS["window-sinks"], _train),
    "zero sink": (OPTIONS["zero-sink"], _train),
    "learned sinks": (OPTIONS["learned-sink"], _train),
    "soft-cap": (OPTIONS["softcap"], _train),
    "ALiBi": (OPTIONS["alibi"], _train),
    "dropout": ({"dropout": 0.1}, _train),
    "window, dropout": ({**OPTIONS["window"], "dropout": 0.1}, _train),
    "ALiBi, dropout": ({**OPTIONS["alibi"], "dropout": 0.1}, _train),
    "prefill after a cache": ({}, _decode(T)),
    "decoding": ({}, _decode(1)),
    "decoding, window": (OPTIONS["window"], _decode(1)),
    "decoding, ALiBi": (OPTIONS["alibi"], _decode(1)),
    "decoding, learned sinks": (OPTIONS["learned-sink"], _decode(1)),
}  # fmt: skip


def takes(name: str, case: str) -> bool:
    """Whether a mechanism has the feature."""
    options, _ = CASES[case]
    needed = [option for option, values in OPTIONS.items() if values and values.items() <= options.items()]
    if case == "dense mask" and name.startswith(("linear", "mhla", "mgk-linear")):
        return False
    if "causal" in options and "bidirectional" in LACKS.get(name, ()):
        return False
    if "causal" in options and name == "mhla":
        return True
    return all(option in TAKES.get(name, tuple(OPTIONS)) for option in needed)


# A mixing matrix that is not causal covers 15 tokens.
FEWER = {("mhla-heads", "not causal"): 13}


def noted(name: str, case: str, dtype: torch.dtype = torch.bfloat16) -> PretendGPU:
    """What a mechanism calls in a case."""
    options, run = CASES[case]
    module = MECHANISMS[name](**options, device="meta", dtype=dtype)
    with pretend_gpu() as gpu:
        run(module, torch.empty(B, FEWER.get((name, case), T), module.embed_dim, dtype=dtype, device=DEVICE))
    return gpu


def table(dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, str]]:
    """Mechanism -> case -> the word of the attention that runs; no entry where the mechanism lacks the feature."""
    return {
        name: {case: noted(name, case, dtype).attention() for case in CASES if takes(name, case)} for name in MECHANISMS
    }


def markdown() -> str:
    """The table: a row for each case, a column for mechanisms that agree wherever they have the feature."""
    columns: list[tuple[list[str], dict[str, str]]] = []
    for name, cells in table().items():
        for names, shown in columns:
            if all(shown.get(case, word) == word for case, word in cells.items()):
                names.append(name)
                shown |= cells
                break
        else:
            columns.append(([name], cells))
    rows = [["", *(", ".join(names) for names, _ in columns)], ["---"] * (1 + len(columns))]
    rows += [[case, *(shown.get(case, "") for _, shown in columns)] for case in CASES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def written(page: str, made: str) -> str:
    """The page with what stands between the markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{PAGE.name} must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which backend auto takes on a GPU, for docs/backends.md.")
    parser.add_argument("--write", action="store_true", help="put it into the page instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text(), markdown()))
    else:
        print(markdown())


if __name__ == "__main__":
    main()
