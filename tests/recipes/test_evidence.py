"""Claims of papers: their configs, the rule that decides, and a small one from end to end."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from attnzoo_recipes.compare.plan import attention_of, feed_forward_of
from attnzoo_recipes.data.module import TextDataModule
from attnzoo_recipes.diagnose.losses import next_token_losses
from attnzoo_recipes.evidence import cli
from attnzoo_recipes.evidence.claim import CONFIRMED, NOT_CONFIRMED, UNDECIDED, Check, Claim, Preset, decide, overall
from attnzoo_recipes.evidence.figures import FIGURES, TrainedRun
from attnzoo_recipes.evidence.page import common_rates, decisions, page, summary, verdict
from attnzoo_recipes.lm import DecoderLM

ROOT = Path(__file__).parents[2]
CLAIMS = sorted((ROOT / "configs" / "evidence").glob("*.yaml"))
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
BELOW, ABOVE = Check("kha", "val_bits_per_byte", "mha", below=0.0), Check("mha", "pruned", above=0.1)


@pytest.mark.parametrize(
    ("check", "values", "expected"),
    [
        (BELOW, [-0.10, -0.11, -0.09], CONFIRMED),
        (BELOW, [0.10, 0.11, 0.09], NOT_CONFIRMED),
        (BELOW, [-0.10, -0.01, 0.05], UNDECIDED),
        (BELOW, [-0.10, -0.11], UNDECIDED),
        (BELOW, [], UNDECIDED),
        (BELOW, [0.0, 0.0, 0.0], UNDECIDED),
        (ABOVE, [0.20, 0.21, 0.19], CONFIRMED),
        (ABOVE, [0.05, 0.06, 0.04], NOT_CONFIRMED),
        (ABOVE, [0.11, 0.12, 0.09], UNDECIDED),
    ],
)
def test_the_rule_decides_planted_figures(check, values, expected):
    assert decide(check, values, 3).verdict == expected


def test_the_interval_is_students():
    # t of 2 degrees of freedom at 97.5 %: 4.3027.
    made = decide(BELOW, [-0.10, -0.11, -0.09], 3)
    assert made.mean == pytest.approx(-0.10)
    assert made.half == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)


def test_a_claim_is_confirmed_by_all_of_its_checks():
    assert overall([CONFIRMED, CONFIRMED]) == CONFIRMED
    assert overall([CONFIRMED, UNDECIDED]) == UNDECIDED
    assert overall([CONFIRMED, UNDECIDED, NOT_CONFIRMED]) == NOT_CONFIRMED
    assert overall([]) == UNDECIDED


def planted(bits, rates=(1e-3,)):
    """Results of a claim whose runs have these bits per byte, by arm and rate."""
    claim = {**Claim.read(ROOT / "configs/evidence/kha_mlp.yaml").to_dict()}
    runs = [
        {
            "mechanism": arm, "rate": rate, "seed": seed, "status": "finished", "detail": "",
            "val_bits_per_byte": value, "figures": {"val_bits_per_byte": value},
            "parameters": 1000, "mlp_dim": 8, "flops_per_token": 1, "cache_bytes_per_token": 1,
        }
        for (arm, rate), values in bits.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    facts = {"equal": "parameters", "training": "2 steps", "date": "2026-01-01", "versions": {"torch": "2"}}
    return {"claim": claim, "preset": "cpu", "rates": list(rates), "runs": runs, "facts": facts}


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([1.90, 1.99, 2.09], CONFIRMED), ([2.10, 2.21, 2.29], NOT_CONFIRMED), ([1.9, 2.2, 2.2], UNDECIDED)],
)
def test_pages_have_the_verdict_of_differences_paired_by_seed(ours, expected):
    results = planted({("mha", 1e-3): [2.0, 2.1, 2.2], ("kha", 1e-3): ours})
    assert verdict(results) == expected
    text = page(results, "a.png")
    assert f"**Verdict: {expected}**" in text
    claim = results["claim"]
    for part in (claim["number"], claim["prediction"], claim["protocol"], claim["run_time"]["cpu"]):
        assert part.strip() in text


def test_the_common_rate_decides_and_the_best_one_is_shown():
    bits = {("mha", 1e-3): [2.0, 2.1, 2.2], ("kha", 1e-3): [2.1, 2.21, 2.29]}
    bits |= {("mha", 3e-3): [2.5, 2.5, 2.5], ("kha", 3e-3): [1.5, 1.61, 1.69]}
    results = planted(bits, (1e-3, 3e-3))
    assert verdict(results) == NOT_CONFIRMED
    text = page(results, "a.png")
    assert "With the best of the rates 0.001, 0.003" in text
    assert [one.verdict for one in decisions(results, {"mha": 1e-3, "kha": 3e-3})] == [CONFIRMED]
    assert text.count("| confirmed |") == 1


def test_a_run_that_failed_leaves_the_claim_undecided():
    results = planted({("mha", 1e-3): [2.0, 2.1, 2.2], ("kha", 1e-3): [1.9, 1.99, 2.09]})
    results["runs"][-1] |= {"status": "diverged", "detail": "not finite", "figures": {}}
    assert verdict(results) == UNDECIDED
    assert "seed 2 at rate 0.001 diverged: not finite" in page(results, "a.png")


@pytest.mark.parametrize("content", ["{bad", "{}", "[]", '{"preset": "cpu", "claim": 3}'])
def test_a_listing_names_results_that_are_none(content, tmp_path, capsys):
    (tmp_path / "gated-cpu.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"attnzoo-evidence: error: {tmp_path}/gated-cpu.json must hold results of attnzoo-evidence, got" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_every_claim_loads(path, tmp_path):
    claim = Claim.read(path)
    assert claim.seeds >= 3
    for text in (claim.number, claim.prediction, claim.protocol, *claim.run_time.values()):
        assert len(text) > 10
    for preset in ("cpu", "gpu"):
        read = Preset.read(ROOT / f"configs/evidence/presets/{preset}.yaml")
        assert len(read.lrs) == 3
        settings = cli._settings(claim, read, tmp_path, read.lrs, ())
        assert settings.mechanisms == tuple(claim.arms)
        for file in settings.configs.values():
            found = Path(file) if Path(file).is_file() else ROOT / "configs" / file
            (feed_forward_of if claim.vary == "feed_forward" else attention_of)(found)


def test_the_claims_that_are_promised_are_there():
    expected = "kha_linear kha_mlp kha_random_start mla mla_spectra dcmha moh_75 moh_50 moa mhla talking_heads gated "
    expected += "gated_sink diff forgetting mqa gqa gta low_rank ffn_depth head_pruning"
    assert {path.stem for path in CLAIMS} == set(expected.split())
    assert cli.claim_files() == CLAIMS
    assert Claim.from_dict(Claim.read(CLAIMS[0]).to_dict()) == Claim.read(CLAIMS[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"mha": {"attention": {"class_path": "subprocess.Popen"}}}}, "names subprocess.Popen"),
        ({"train": {"trainer": {"callbacks": [{"class_path": "os.system"}]}}}, "names os.system"),
        ({"allow_import": "os"}, "got 'allow_import'"),
        ({"seeds": 1}, "seeds of .* must be at least 2"),
        ({"seeds": "3"}, "seeds of .* is of the wrong type, got '3'"),
        ({"match": "time"}, "match of .* must be one of params, flops, none, got 'time'"),
        ({"vary": "model.lr"}, "vary of .* must be one of attention, feed_forward"),
        ({"checks": []}, "at least one check"),
        ({"checks": ["kha"]}, "must be a mapping, got 'kha'"),
        ({"checks": [{"arm": "mla", "figure": "sink", "below": 0}]}, "must name arms among .*, got 'mla'"),
        ({"checks": [{"arm": "mha", "figure": "speed", "below": 0}]}, "figure of a check of .* got 'speed'"),
        ({"checks": [{"arm": "mha", "figure": "sink"}]}, "must hold either below or above"),
        ({"checks": [{"arm": "mha", "figure": "sink", "below": 0, "above": 0}]}, "must hold either below or above"),
        ({"checks": [{"arm": "mha", "figure": "sink", "below": "low"}]}, "below of a check of .* wrong type"),
        ({"run_time": {"cpu": "1 h"}}, "the run time on cpu and gpu"),
        ({"prediction": None}, "lacks 'prediction'"),
    ],
)
def test_a_claim_outside_its_rules_is_one_sentence(change, message, tmp_path, capsys):
    content = yaml.safe_load((ROOT / "configs/evidence/kha_mlp.yaml").read_text()) | change
    path = tmp_path / "claim.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(SystemExit) as stop:
        cli.main([str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("attnzoo-evidence: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "config 'evidence/nothing.yaml' is neither"),
        (["kha_mlp", "--preset", "tpu"], "config 'evidence/presets/tpu.yaml' is neither"),
        (["kha_mlp", "--rates", "best"], "invalid choice: 'best'"),
    ],
)
def test_mistakes_end_in_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of results that tests share, as claims do: what two claims have in common is trained once."""
    return tmp_path_factory.mktemp("evidence")


@pytest.fixture
def tiny(tmp_path, shared, corpus_file):
    """Writes a preset of two steps on the small corpus; returns its path."""

    def made(*lrs):
        train = {
            "model": {"embed_dim": 64, "num_layers": 1, "warmup_steps": 1},
            "data": {"source": "text", "files": [str(corpus_file)], "unit": "line", "val_fraction": 0.2,
                     "tokenizer": "byte", "block_size": 32, "batch_size": 2, "cache_dir": str(shared / "data")},
            "trainer": {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "log_every_n_steps": 1},
            "samples": {"max_new_tokens": 2},
        }  # fmt: skip
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"lrs": list(lrs), "train": train}))
        return path

    return made


@pytest.fixture
def two_seeds(tmp_path):
    """Writes a packaged claim with two seeds; returns its path."""

    def made(name, **change):
        content = yaml.safe_load((ROOT / f"configs/evidence/{name}.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "seeds": 2, **change}))
        return path

    return made


@pytest.mark.slow
def test_a_claim_is_tried_resumed_and_its_rule_kept(tiny, two_seeds, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = [str(two_seeds("gated_sink")), "--preset", str(tiny(1e-3, 3e-3)), "--out", str(out)]
    real, calls = cli.train, []

    def interrupted(settings, passed_on):
        calls.append(settings.rates)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(settings, passed_on)

    monkeypatch.setattr(cli, "train", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 130
    assert calls == [(1e-3,), (1e-3, 3e-3)]
    first = json.loads((out / "gated_sink-tiny.json").read_text())
    assert first["rates"] == [1e-3]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("record.json")}
    assert len(stamps) == 4
    monkeypatch.setattr(cli, "train", real)
    cli.main(words)
    results = json.loads((out / "gated_sink-tiny.json").read_text())
    assert len(list(out.rglob("record.json"))) == 8
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert {(run["mechanism"], run["rate"], run["seed"]) for run in results["runs"]} == {
        (arm, rate, seed) for arm in ("mha", "gated") for rate in (1e-3, 3e-3) for seed in (0, 1)
    }
    sinks = [run["figures"]["sink"] for run in results["runs"]]
    assert len(sinks) == 8
    assert all(0 < value < 1 for value in sinks)
    assert (out / "gated_sink-tiny.md").read_text() == page(results, "gated_sink-tiny.png")
    assert (out / "gated_sink-tiny.png").is_file()
    assert f"written to {out / 'gated_sink-tiny'}.md" in capsys.readouterr().out
    cli.main(["--out", str(out)])
    assert f"tiny: {verdict(results)}" in capsys.readouterr().out
    # Another rule after the runs have begun is refused.
    two_seeds("gated_sink", checks=[{"arm": "gated", "figure": "sink", "against": "mha", "below": 0.5}])
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "the rule of gated_sink must be that of" in capsys.readouterr().err


@pytest.mark.slow
def test_claims_share_runs(tiny, two_seeds, tmp_path):
    common = ["--preset", str(tiny(1e-3)), "--out", str(tmp_path / "out")]
    cli.main([str(two_seeds("gated")), str(two_seeds("gated_sink")), *common])
    assert len(list((tmp_path / "out").rglob("record.json"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_every_claim_trains_two_steps(path, tiny, two_seeds, shared):
    cli.main([str(two_seeds(path.stem)), "--preset", str(tiny(1e-3)), "--out", str(shared)])
    results = json.loads((shared / f"{path.stem}-tiny.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["finished"] * len(results["runs"])
    for check, decided in zip(results["claim"]["checks"], decisions(results, common_rates(results)), strict=True):
        assert decided.seeds == 2, check
        assert math.isfinite(decided.mean)


def test_heads_are_pruned_by_their_importance(corpus_file, tmp_path):
    data = TextDataModule(
        source="text", files=[str(corpus_file)], unit="line", val_fraction=0.2, block_size=16, cache_dir=str(tmp_path)
    )
    torch.manual_seed(0)
    maker = lambda width: __import__("attnzoo").MultiHeadAttention(width, 4, bias=False)  # noqa: E731
    model = DecoderLM(data.tokenizer.vocab_size, maker, embed_dim=32, num_layers=2).eval()
    with torch.no_grad():
        for block in model.layers:  # heads that write nothing cost nothing
            block.attn.o_proj.weight.mul_(20)
            block.attn.o_proj.weight[:, :8] = 0
    run = TrainedRun(tmp_path, model, data)
    batch = data.blocks("val").__getitems__([0, 1])["tokens"]
    assert next_token_losses(model, batch).isfinite().all()
    assert FIGURES["pruned"].measure(run) == pytest.approx(0.0, abs=1e-7)
    assert FIGURES["pruned_at_random"].measure(run) != 0


@pytest.mark.skipif(not RESULTS.is_dir(), reason="there are no results yet")
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_pages_are_those_of_the_results(path):
    results = json.loads(path.read_text())
    assert (ROOT / "docs/reports/evidence" / f"{path.stem}.md").read_text() == page(results, f"{path.stem}.png")
    assert all("Traceback" not in run["detail"] for run in results["runs"])
    # The rule is the one in the config.
    claim = Claim.read(ROOT / f"configs/evidence/{results['claim']['name']}.yaml")
    assert claim.rule == Claim.from_dict(results["claim"]).rule


def test_the_summary_is_that_of_the_results():
    assert summary(RESULTS, "reports/evidence") in (ROOT / "docs/evidence.md").read_text()
