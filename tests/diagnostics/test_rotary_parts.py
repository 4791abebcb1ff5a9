"""Which features of a head a layer rotates: seen in what it computes, whatever its configuration says."""

import pytest
import torch

import attnzoo
from attnzoo.diagnostics import analyze_attention, analyze_model, attention_layers
from attnzoo.diagnostics.heads.observe import capture
from attnzoo.diagnostics.layers import NoPartError
from tests.diagnostics import families

transformers = pytest.importorskip("transformers")

NAMES = {
    "Llama": {}, "SmolLM3": {"no_rope_layers": [1, 0]}, "Cohere2": {"layer_types": ["sliding_attention",
    "full_attention"]}, "Llama4Text": {"no_rope_layers": [1, 0]}, "StableLm": {}, "GPTNeoX": {},
    "Exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, "Gemma3Text": {},
    "Glm": {},
}  # fmt: skip


def moved(model):
    """Per layer, the features (D,) of queries that differ between two places that hold equal tokens."""
    with capture(model, ["queries"]) as captured, torch.no_grad():
        model(input_ids=torch.full((1, 4), 5))
    masks = []
    for queries in captured.last("queries"):
        first, second = queries[0, :, 0], queries[0, :, 1]
        masks.append(((second - first).abs() > 1e-9 * first.abs().amax()).any(0))
    return masks


def width_of(layer, part):
    try:
        return layer.qk_factors(part)[0][0].shape[0]
    except NoPartError:
        return 0


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_what_the_model_rotates(name):
    with families.quiet():
        model = families.model_of(name, **NAMES[name])
    for layer, mask in zip(attention_layers(model), moved(model), strict=True):
        assert (width_of(layer, "rope"), width_of(layer, "nope")) == (int(mask.sum()), int((~mask).sum()))
        whole = layer.qk_factors()
        for part, kept in (("rope", mask), ("nope", ~mask)):
            if kept.any():
                for (wq, wk), (all_q, all_k) in zip(layer.qk_factors(part), whole, strict=True):
                    assert torch.equal(wq, all_q[kept])
                    assert torch.equal(wk, all_k[kept])


def test_gpt_j_rotates_half_of_each_head():
    with families.quiet():
        (layer, _) = attention_layers(families.model_of("GPTJ", biases=False))
    assert (width_of(layer, "rope"), width_of(layer, "nope"), layer.head_dim) == (4, 4, 8)


def test_layers_without_rotation_are_left_out_of_a_part():
    with families.quiet():
        model = families.model_of("SmolLM3", no_rope_layers=[1, 0])
    first, second = attention_layers(model)
    assert {record.layer for record in analyze_model(model, part="rope")} == {first.name}
    assert {record.layer for record in analyze_model(model, part="nope")} == {second.name}


@pytest.mark.parametrize("per", ["head", "layer"])
def test_a_part_that_no_layer_has_is_refused(per):
    with families.quiet():
        model = families.model_of("Llama")
    with pytest.raises(
        ValueError, match=r"part must be one that layer 'layers.0.self_attn' has features of, got 'nope'"
    ):
        analyze_model(model, part="nope", per=per)
    module = attnzoo.GroupedQueryAttention(32, 4, 2)
    for analyze in (analyze_model, analyze_attention):
        with pytest.raises(ValueError, match=r"part must be one that .* has features of, got 'nope'"):
            analyze(module, part="nope", per=per)
