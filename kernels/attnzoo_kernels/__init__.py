"""Triton kernels of attnzoo and their autograd: functions of tensors only.

One package or module per fused operation, named as in `attnzoo.ops`, which imports it where a call needs it.
Importing this package imports neither torch nor triton (unless Triton's interpreter is asked for), and nothing here
imports `attnzoo`.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from attnzoo_kernels import interpreter

    interpreter.repair()
