"""The name that `attnzoo_recipes.diagnose.load_model` had before 0.2.0; it goes with 0.3.0."""

import warnings

from attnzoo_recipes.diagnose.load_model import load_model

__all__ = ["load_model"]

warnings.warn(
    "attnzoo_recipes.load_model is attnzoo_recipes.diagnose.load_model since 0.2.0; the old name goes with 0.3.0",
    DeprecationWarning,
    stacklevel=2,
)
