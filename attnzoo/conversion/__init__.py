"""From one attention module to another with a stated relation between the two."""

from attnzoo.conversion.calibration import InputStatistics
from attnzoo.conversion.factors import allocate_ranks
from attnzoo.conversion.heads import fold, from_mha, to_gqa, to_kha, to_mae, to_moh
from attnzoo.conversion.latent import LatentReport, latent_energies, mha2mla
from attnzoo.conversion.layers import from_diff_llama, from_qwen3_next, gated_weights
from attnzoo.conversion.starts import to_dcmha, to_gated, to_talking_heads

__all__ = [
    "InputStatistics", "LatentReport", "allocate_ranks", "fold", "from_diff_llama", "from_mha", "from_qwen3_next",
    "gated_weights", "latent_energies", "mha2mla", "to_dcmha", "to_gated", "to_gqa", "to_kha", "to_mae", "to_moh",
    "to_talking_heads",
]  # fmt: skip
