"""From one attention module to another with a stated relation between the two."""

from attnzoo.conversion.heads import fold, from_mha, to_gqa, to_kha, to_mae, to_moh
from attnzoo.conversion.latent import LatentReport, mha2mla

__all__ = ["LatentReport", "fold", "from_mha", "mha2mla", "to_gqa", "to_kha", "to_mae", "to_moh"]
