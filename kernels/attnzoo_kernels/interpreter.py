"""Triton's interpreter, which runs kernels on CPU tensors (TRITON_INTERPRET=1), beside a current NumPy."""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Let the interpreter of Triton 3.6 use scalars as loop bounds under NumPy 2.4 and newer.

    It keeps a scalar as an array of shape (1,), and NumPy 2.4 no longer turns one into an int by itself.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "repaired", False):
        return

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        else:
            tensor.__index__ = lambda self: int(self.handle.data.item())

    patched.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
