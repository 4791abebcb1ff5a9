"""Triton's interpreter, which runs kernels on CPU tensors (TRITON_INTERPRET=1), beside a current NumPy."""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Mend what the interpreter of Triton 3.6 does unlike a GPU, or not at all under NumPy 2.4 and newer.

    It keeps a scalar as an array of shape (1,), which NumPy 2.4 no longer turns into a loop bound by itself. And its
    fma rounds the product, where the instruction rounds once.
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

    def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        # A product of float32 is exact in float64.
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    patched.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_fma = create_fma
