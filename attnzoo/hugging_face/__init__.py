"""attnzoo's attention inside models of Hugging Face transformers, weights carried over."""

from attnzoo.hugging_face.families import register_family
from attnzoo.hugging_face.replacement import modules

__all__ = ["modules", "register_family"]
