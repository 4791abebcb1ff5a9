"""The name that `attnzoo_recipes.data.tokenizers` had before 0.2.0; it goes with 0.3.0."""

import warnings

from attnzoo_recipes.data.tokenizers import BpeTokenizer

__all__ = ["BpeTokenizer"]

warnings.warn(
    "attnzoo_recipes.tokenization is attnzoo_recipes.data.tokenizers since 0.2.0; the old name goes with 0.3.0",
    DeprecationWarning,
    stacklevel=2,
)
