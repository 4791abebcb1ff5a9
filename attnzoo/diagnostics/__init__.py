"""Diagnostics of attention: spectra, what single heads do, which of them matter, how alike they are.

Everything takes tensors or models (of this library, of torch, of Hugging Face) and returns numbers; `plots` draws them
and is the one module that needs matplotlib, so it is imported by name: `from attnzoo.diagnostics import plots`.
"""

from attnzoo.diagnostics import similarity
from attnzoo.diagnostics.attention_layers import AttentionLayer, attention_layers, layer_of, register_family
from attnzoo.diagnostics.capture import capture, observe
from attnzoo.diagnostics.clustering import chai_cluster_error, cluster_heads, elbow
from attnzoo.diagnostics.head_calls import HeadCall
from attnzoo.diagnostics.head_gates import HeadGates
from attnzoo.diagnostics.head_masks import head_mask, masked_heads
from attnzoo.diagnostics.head_report import HeadReport, composition_table, head_report, to_bertviz
from attnzoo.diagnostics.memorization import memorization_curve, memorization_rank
from attnzoo.diagnostics.model_spectrum import analyze_model
from attnzoo.diagnostics.paired_statistics import ablation_tests, paired_bootstrap, paired_t_test
from attnzoo.diagnostics.pruning import (
    HeadAblation,
    HeadPruningCurve,
    ablate_heads,
    head_gradients,
    head_importance,
    head_pruning_curve,
)
from attnzoo.diagnostics.rank import attention_rank, attention_rank_report, representation_error
from attnzoo.diagnostics.spectrum import SpectrumRecord, analyze_attention, analyze_matrix
from attnzoo.diagnostics.structural_pruning import prune_heads, pruned_heads, pruning_speed
from attnzoo.diagnostics.weightwatcher import ww_dataframe, ww_details

__all__ = [
    # heads of any model
    "AttentionLayer",
    "attention_layers",
    "layer_of",
    "register_family",
    "HeadCall",
    "capture",
    "observe",
    "HeadReport",
    "composition_table",
    "head_report",
    "to_bertviz",
    "similarity",
    # spectra
    "SpectrumRecord",
    "analyze_attention",
    "analyze_matrix",
    "analyze_model",
    "ww_dataframe",
    "ww_details",
    # importance and pruning
    "HeadAblation",
    "HeadGates",
    "HeadPruningCurve",
    "ablate_heads",
    "ablation_tests",
    "head_gradients",
    "head_importance",
    "head_mask",
    "head_pruning_curve",
    "masked_heads",
    "paired_bootstrap",
    "paired_t_test",
    "prune_heads",
    "pruned_heads",
    "pruning_speed",
    # clusters, rank, memorisation
    "attention_rank",
    "attention_rank_report",
    "chai_cluster_error",
    "cluster_heads",
    "elbow",
    "memorization_curve",
    "memorization_rank",
    "representation_error",
]
