"""attnzoo's attention inside models of Hugging Face transformers, weights carried over."""

import attnzoo.hugging_face.interface  # noqa: F401  (registers the attention function)
from attnzoo.description import build, describe
from attnzoo.hugging_face.conversion import convert
from attnzoo.hugging_face.families import register_family
from attnzoo.hugging_face.replacement import modules, replace, restore
from attnzoo.hugging_face.report import ModelReport

__all__ = ["ModelReport", "build", "convert", "describe", "modules", "register_family", "replace", "restore"]
