"""The name that `attnzoo_recipes.data.corpus` had before 0.2.0; it goes with 0.3.0."""

import warnings

from attnzoo_recipes.data.corpus import Corpus

__all__ = ["Corpus"]

warnings.warn(
    "attnzoo_recipes.corpus is attnzoo_recipes.data.corpus since 0.2.0; the old name goes with 0.3.0",
    DeprecationWarning,
    stacklevel=2,
)
