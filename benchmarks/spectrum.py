"""Speed of spectra beside WeightWatcher's, false alarms and detection, and what the callbacks cost.

    python benchmarks/spectrum.py [--out benchmarks/results/spectrum.jsonl] [--only speed detection callbacks]

speed: query-key spectra of all heads of a 30-layer model against the product null, by analyze_model; and
    WeightWatcher's analyze (weightwatcher 0.7.7, for this alone) on the model's attention matrices in the same
    process, on all four of a layer and on q and k alone. Without that package the ratios are left out.
detection: share of random matrices, products and heads with an outlier, and of planted spikes that are found.
callbacks: share of the quickstart's training time that SpectrumCallback and HeadStatisticsCallback take at their
    default interval: --steps steps are trained, and the cost of their records at 0, 10 and 100 is scaled to the
    four of 800 steps; imports count as part of the first.

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import append_lines, environment
from torch import nn

import attnzoo
from attnzoo.diagnostics.layers import attention_layers
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.spectra.spectrum import analyze_matrix

LAYERS, E, H, G, D = 30, 576, 9, 3, 64
DRAWS = 200
Row = dict[str, Any]


def speed(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of ours, and WeightWatcher's over ours."""
    torch.manual_seed(0)
    model = nn.ModuleList([attnzoo.GroupedQueryAttention(E, H, G, head_dim=D, bias=False) for _ in range(LAYERS)])
    shape = {"layers": LAYERS, "H": H, "G": G, "D": D, "E": E}
    analyze_model(model[0])
    records = analyze_model(model)
    ours, own_cpu = seconds(lambda: analyze_model(model), options.rounds)
    error = largest_error(model, records)
    if len(records) != LAYERS * H or error > 1e-10:
        raise SystemExit(f"{len(records)} records, off by {error}")
    yield row("speed", "analyze_model", "seconds", ours, "<=", 30.0, ms=ours * 1e3, error=error, shape=shape)
    try:
        weightwatcher = importlib.import_module("weightwatcher")
    except ImportError:
        print("weightwatcher is not installed: no comparison")
        return
    logging.disable(logging.WARNING)
    for case, names in (("all four matrices", "qkvo"), ("q and k alone", "qk")):
        matrices = nn.ModuleList([getattr(layer, f"{name}_proj") for layer in model for name in names])
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            details = weightwatcher.WeightWatcher(model=matrices).analyze()
            theirs, cpu = seconds(lambda m=matrices: weightwatcher.WeightWatcher(model=m).analyze(), options.rounds)
            # Once more beside it: a machine that others use changes from minute to minute.
            again, cpu_again = seconds(lambda: analyze_model(model), options.rounds)
            ours, own_cpu = min(ours, again), min(own_cpu, cpu_again)
        if len(details) != len(matrices):
            raise SystemExit(f"WeightWatcher analysed {len(details)} of {len(matrices)} matrices")
        goal = ">=" if names == "qkvo" else None
        used = {"matrices": len(matrices), "cpu_ratio": round(cpu / own_cpu, 2), "own_cpu_ms": round(own_cpu * 1e3, 1)}
        yield row("speed", f"weightwatcher, {case}", "time over analyze_model's", theirs / ours, goal, 5.0,
                  ms=theirs * 1e3, shape=shape | used)  # fmt: skip


def seconds(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The least wall-clock and the least processor time of a call."""
    wall, cpu = [], []
    for _ in range(rounds):
        start, started = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - started)
    return min(wall), min(cpu)


def largest_error(model: nn.Module, records: list[Any]) -> float:
    """Relative difference of the largest eigenvalues from those of the formed E x E products, of three layers."""
    known = {(record.layer, record.head): record for record in records}
    worst = 0.0
    for layer in attention_layers(model)[:: LAYERS // 3]:
        for head, (query, key) in enumerate(layer.qk_factors()):
            top = float(torch.linalg.matrix_norm(query.double().T @ key.double(), 2).square())
            worst = max(worst, abs(known[layer.name, head].lambda_max / top - 1))
    return worst


def detection(_: argparse.Namespace) -> Iterator[Row]:
    """At the sizes at which the library's documentation promises it."""

    def noise(*size: int, seed: int) -> torch.Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    shape = {"draws": DRAWS}
    alarms = sum(analyze_matrix(noise(300, 150, seed=s)).outlier_count != 0 for s in range(DRAWS))
    yield row("detection", "noise 300 x 150", "false alarms", alarms / DRAWS, "<=", 0.025, shape=shape)
    for sizes in ((576, 64, 576), (192, 192, 192)):
        alarms = 0
        for s in range(DRAWS):
            factors = [noise(*pair, seed=9973 * s + i) for i, pair in enumerate(itertools.pairwise(sizes))]
            alarms += analyze_matrix(factors).outlier_count != 0
        yield row("detection", f"product of noise {sizes}", "false alarms", alarms / DRAWS, "<=", 0.025, shape=shape)
    for theta, rule, bound in ((1.5, ">=", 0.95), (1.2, None, 0.0), (0.6, None, 0.0)):
        found = 0
        for s in range(DRAWS):
            u, v = (nn.functional.normalize(noise(n, seed=10_000 + 2 * s + i), dim=0) for i, n in enumerate((300, 150)))
            W = noise(300, 150, seed=s) / 300**0.5 + theta * torch.outer(u, v)
            found += analyze_matrix(W).outlier_count != 0
        yield row("detection", f"spike {theta} in 300 x 150", "found", found / DRAWS, rule, bound, shape=shape)


def callbacks(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds of records and pictures over those of training."""
    import functools

    import lightning as L
    import yaml

    from attnzoo_recipes.callbacks.diagnostics import HeadStatisticsCallback, SpectrumCallback
    from attnzoo_recipes.callbacks.progress import Throughput
    from attnzoo_recipes.data.module import TextDataModule
    from attnzoo_recipes.training import Pretraining

    folder = Path(__file__).resolve().parent.parent / "configs"
    base, quick = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("pretrain", "quickstart"))
    sizes, whole = {**base["model"], **quick["model"]}, quick["trainer"]["max_steps"]
    data = TextDataModule(**{**base["data"], **quick["data"]})
    trained = options.steps
    recorded = sum(step <= trained for step in (0, 10, 100))
    made = [SpectrumCallback(), HeadStatisticsCallback()]
    throughput = Throughput()
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        L.seed_everything(0, verbose=False)
        attention = functools.partial(attnzoo.MultiHeadAttention, num_heads=8, bias=False)
        trainer = L.Trainer(
            max_steps=trained, accelerator="cpu", logger=L.pytorch.loggers.CSVLogger(out), gradient_clip_val=1.0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=10,
            limit_val_batches=0, use_distributed_sampler=False, callbacks=[throughput, *made],
        )  # fmt: skip
        trainer.fit(Pretraining(attention, **{**sizes, "betas": tuple(sizes["betas"])}), datamodule=data)
    spent = sum(callback.seconds for callback in made)
    # Lightning's clock runs on while callbacks work.
    a_step = (throughput.seconds - sum(callback.seconds - callback.seconds_at_end for callback in made)) / trained
    for callback in made:
        per_record = (callback.seconds - callback.seconds_at_end) / recorded
        cost = 4 * per_record + callback.seconds_at_end
        yield row("callbacks", type(callback).__name__, "share of the quickstart", cost / (whole * a_step), "<=", 0.02,
                  ms=per_record * 1e3, shape={"steps": whole, "records": 4, "step_ms": a_step * 1e3,
                                              "pictures_ms": callback.seconds_at_end * 1e3})  # fmt: skip
    print(f"{spent:.2f} s of callbacks, {a_step * 1e3:.0f} ms a step")


def row(suite: str, case: str, phase: str, ratio: float, rule: str | None, bound: float, **more: Any) -> Row:
    """A result line with its verdict."""
    passed = {None: True, "<=": ratio <= bound, ">=": ratio >= bound}[rule]
    made = {
        "suite": suite, "case": case, "phase": phase, "ms": None, "ratio": round(ratio, 4), "noise": None,
        "error": None, "rule": rule, "bound": bound if rule else None, "passed": passed, **more,
    }  # fmt: skip
    verdict = "" if rule is None else f"{rule} {bound}  {'pass' if passed else 'FAIL'}"
    print(f"{suite:<10} {case:<34} {phase:<26} {ratio:9.4f}  {verdict}", flush=True)
    return made


def main() -> int:
    suites = {"speed": speed, "detection": detection, "callbacks": callbacks}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(suites), default=list(suites))
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts (default 3)")
    parser.add_argument("--steps", type=int, default=110, help="trained for callbacks, at least 10 (default 110)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = environment(("attnzoo", "weightwatcher"))
    rows = [{**found, **about} for name in options.only for found in suites[name](options)]
    if options.out:
        append_lines(options.out, rows)
    return int(not all(found["passed"] for found in rows))


if __name__ == "__main__":
    raise SystemExit(main())
