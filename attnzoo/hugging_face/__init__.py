"""attnzoo's attention inside models of Hugging Face transformers, weights carried over."""

import attnzoo.hugging_face.interface  # noqa: F401  (registers the attention function)
from attnzoo.hugging_face.families import register_family
from attnzoo.hugging_face.replacement import modules, replace, restore

__all__ = ["modules", "register_family", "replace", "restore"]
