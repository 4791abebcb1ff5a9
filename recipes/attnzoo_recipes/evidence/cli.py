"""attnzoo-evidence: try a claim of a paper at small scale, and write a page with the verdict."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from attnzoo_recipes.allowlist import ALLOWED
from attnzoo_recipes.checkpointing import read_checkpoint
from attnzoo_recipes.commandline import CONFIG_FOLDERS, config_path
from attnzoo_recipes.compare.cli import CONTINUES, Trained, long_running, train, versions
from attnzoo_recipes.compare.pictures import draw_losses
from attnzoo_recipes.compare.plan import Settings
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.evidence.claim import Claim, Preset
from attnzoo_recipes.evidence.figures import FIGURES, TrainedRun
from attnzoo_recipes.evidence.page import page, verdict
from attnzoo_recipes.files import write_atomically
from attnzoo_recipes.model_config import model_from_checkpoint
from attnzoo_recipes.options import (
    add_allow_import,
    add_format,
    command_line,
    formats_named,
    mistakes_in_one_sentence,
    take_allowed_imports,
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. The user's mistakes end in one sentence on stderr and exit code 2."""
    with mistakes_in_one_sentence("attnzoo-evidence", CONTINUES), long_running("attnzoo-evidence"):
        words, allowed = take_allowed_imports(command_line(args))
        given = _parser().parse_args(words)
        out = Path(given.out)
        if not given.names:
            sys.stdout.write(listing(out))
            return
        formats = formats_named(given.format)
        preset = Preset.read(_file(given.preset, "evidence/presets"), allowed)
        claims = [Claim.read(_file(name, "evidence"), allowed) for name in given.names]
        for claim in claims:
            try_claim(claim, preset, out, given.rates == "common", allowed, formats)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnzoo-evidence",
        description="Train what a claim of a paper is about, several seeds of each, and write a page with the verdict "
        "by the rule in the claim's config. Without a name, list the claims.",
        exit_on_error=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of files in configs/evidence, or paths")
    parser.add_argument("--preset", default="cpu", help="cpu, gpu, or the path of a YAML file like these (default cpu)")
    parser.add_argument(
        "--rates", choices=("common", "all"), default="all",
        help="train at the common learning rate alone, by which the claim is decided, or at all of the preset",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="runs/evidence", help="folder of pages and runs, which claims share (default runs/evidence)"
    )
    add_format(parser)
    add_allow_import(parser)
    return parser


def _file(name: str, folder: str) -> Path:
    return Path(config_path(name if name.endswith((".yaml", ".yml")) else f"{folder}/{name}.yaml"))


def claim_files() -> list[Path]:
    """The claims that come with the package."""
    return sorted({path.name: path for root in CONFIG_FOLDERS for path in (root / "evidence").glob("*.yaml")}.values())


def listing(out: Path) -> str:
    """The claims, one a line, with run times and the verdicts that are in the folder of results."""
    lines = []
    for path in claim_files():
        claim = Claim.read(path)
        lines.append(f"{claim.name}: {claim.title} (cpu: {claim.run_time['cpu']}; gpu: {claim.run_time['gpu']})")
        for results in sorted(out.glob(f"{claim.name}-*.json")):
            try:
                found = json.loads(results.read_text(encoding="utf-8"))
                lines.append(f"    {found['preset']}: {verdict(found)}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{results} must hold results of attnzoo-evidence, got {error!r:.80}") from error
    return "\n".join([*lines, ""])


def try_claim(
    claim: Claim,
    preset: Preset,
    out: Path,
    common_only: bool = False,
    allowed: Iterable[str] = ALLOWED,
    formats: Sequence[str] = ("png",),
) -> dict[str, Any]:
    """Train what is not finished yet, at the common learning rate first; returns what is written as JSON.

    Args:
        claim: what is tried.
        preset: at what size.
        out: folder for NAME-PRESET.md, .json and the picture. Runs are in its folder cells, which all claims share:
            arms that are the same in two claims are trained once.
        common_only: train at the common learning rate alone.
        allowed: packages that the claim may name.
        formats: of the learning curves: png, pdf, svg.

    Raises:
        ValueError: if the rule is not the one with which the runs in `out` were begun.
    """
    name = f"{claim.name}-{preset.name}"
    _keep_rule(out / "rules" / f"{name}.json", claim)
    results: dict[str, Any] = {}
    for rates in (preset.lrs[:1],) if common_only or len(preset.lrs) == 1 else (preset.lrs[:1], preset.lrs):
        settings = _settings(claim, preset, out, rates, allowed)
        trained = train(settings, [])
        facts = {"equal": trained.equal, "training": trained.training, "date": time.strftime("%Y-%m-%d"),
                 "versions": versions()}  # fmt: skip
        runs = _measured(claim, trained, out / "figures" / f"{name}.json", allowed)
        results = {"claim": claim.to_dict(), "preset": preset.name, "rates": list(rates), "runs": runs, "facts": facts}
        write_atomically(out / f"{name}.json", json.dumps(results, indent=1) + "\n")
        shown = {"rate": rates[0], "bigram": trained.entropies.get("bigram_bits_per_byte")}
        for kind in formats:
            draw_losses(runs, shown, out / f"{name}.{kind}")
        picture = min(formats, key=("png", "svg", "pdf").index)
        write_atomically(out / f"{name}.md", page(results, f"{name}.{picture}"))
        sys.stdout.write(f"{claim.name}: {verdict(results)}; written to {out / name}.md\n")
    return results


def _keep_rule(path: Path, claim: Claim) -> None:
    """Write the rule before the first run; raise ValueError if another one is there."""
    if not path.is_file():
        write_atomically(
            path, json.dumps({"since": time.strftime("%Y-%m-%d %H:%M"), "rule": claim.rule}, indent=1) + "\n"
        )
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["rule"] != claim.rule:
        raise ValueError(
            f"the rule of {claim.name} must be that of {before['since']}, when its runs began ({path}), got another: "
            "give another --out"
        )


def _settings(claim: Claim, preset: Preset, out: Path, rates: Sequence[float], allowed: Iterable[str]) -> Settings:
    """The comparison that a claim asks for."""
    mechanisms = []
    for arm, model in claim.arms.items():
        path = out / "arms" / claim.name / f"{arm}.yaml"
        if model is not None:
            write_atomically(path, yaml.safe_dump({"model": dict(model)}, sort_keys=False))
        mechanisms.append(arm if model is None else str(path))
    sections = {*preset.train, *claim.train}
    laid = {name: {**preset.train.get(name, {}), **claim.train.get(name, {})} for name in sections}
    folder = str(out / "plans" / claim.name)
    return Settings.checked(
        mechanisms, claim.seeds, claim.match, folder, laid, allowed, claim.vary, None, list(rates), str(out / "cells")
    )


def _measured(claim: Claim, trained: Trained, cache: Path, allowed: Iterable[str]) -> list[dict[str, Any]]:
    """The runs with the figures that the checks need."""
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    data = TextDataModule(**trained.plans[0].settings["data"])
    runs = []
    for run in trained.runs:
        run = {**run, "figures": {}}
        if run["status"] == "finished":
            run["figures"]["val_bits_per_byte"] = run["val_bits_per_byte"]
            path = Path(run.pop("checkpoint"))
            wanted = {check.figure for check in claim.checks if run["mechanism"] in (check.arm, check.against)}
            for figure in sorted(wanted - {"val_bits_per_byte"}):
                key = f"{path} {figure}"
                if key not in known:
                    measure = FIGURES[figure].measure
                    assert measure is not None
                    model = model_from_checkpoint(read_checkpoint(path), allowed, f"checkpoint {path}").eval()
                    folder = next(parent.parent for parent in path.parents if parent.name.startswith("version_"))
                    known[key] = measure(TrainedRun(folder, model, data))
                    write_atomically(cache, json.dumps(known, indent=1) + "\n")
                run["figures"][figure] = known[key]
        runs.append(run)
    return runs


if __name__ == "__main__":
    main()
