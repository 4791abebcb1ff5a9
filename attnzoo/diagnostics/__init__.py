"""Diagnostics of attention: spectra, what single heads do, which of them matter, and how similar they are.

Everything takes tensors or models (of this library, of torch, of Hugging Face) and returns numbers; `plots` draws them
and is the one module that needs matplotlib, so it is imported by name: `from attnzoo.diagnostics import plots`.
"""

from attnzoo.diagnostics.capacity.low_rank import attention_rank, attention_rank_report, representation_error
from attnzoo.diagnostics.capacity.memorization import memorization_curve, memorization_rank
from attnzoo.diagnostics.heads import similarity
from attnzoo.diagnostics.heads.attention_call import AttentionCall
from attnzoo.diagnostics.heads.clusters import chai_cluster_error, cluster_heads, elbow
from attnzoo.diagnostics.heads.observe import capture, observe
from attnzoo.diagnostics.heads.report import HeadReport, composition_table, head_report, to_bertviz
from attnzoo.diagnostics.layers import AttentionLayer, attention_layers, layer_of, register_family
from attnzoo.diagnostics.pruning.ablation import HeadAblation, ablate_heads
from attnzoo.diagnostics.pruning.curves import HeadPruningCurve, head_pruning_curve
from attnzoo.diagnostics.pruning.gates import HeadGates
from attnzoo.diagnostics.pruning.importance import head_gradients, head_importance
from attnzoo.diagnostics.pruning.masks import head_mask, masked_heads
from attnzoo.diagnostics.pruning.paired_tests import ablation_tests, paired_bootstrap, paired_t_test
from attnzoo.diagnostics.pruning.speed import pruning_speed
from attnzoo.diagnostics.pruning.structural import load_pruned, prune_heads, pruned_heads
from attnzoo.diagnostics.spectra.models import analyze_model
from attnzoo.diagnostics.spectra.spectrum import SpectrumRecord, analyze_attention, analyze_matrix
from attnzoo.diagnostics.spectra.weightwatcher import ww_dataframe, ww_details

__all__ = [
    # heads of any model
    "AttentionLayer",
    "attention_layers",
    "layer_of",
    "register_family",
    "AttentionCall",
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
    "load_pruned",
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
