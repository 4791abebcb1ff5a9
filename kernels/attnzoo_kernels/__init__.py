"""Triton kernels of attnzoo and their autograd: functions of tensors only.

One file per fused operation, named as in `attnzoo.ops`, which imports it where a call needs it. Importing this
package imports neither torch nor triton, and nothing here imports `attnzoo`.
"""
