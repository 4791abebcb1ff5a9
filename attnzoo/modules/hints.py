"""What a call with arguments of other attention modules is told."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from torch import nn

_PADDING = "give mask=AttentionMask.padding(lengths), or a boolean mask (B, 1, 1, S) with True = may attend"
HINTS = {
    "attn_mask": "give mask=, a boolean tensor with True = may attend",
    "key_padding_mask": _PADDING,
    "attention_mask": _PADDING,
    "need_weights": "attnzoo.diagnostics.capture gives the weights",
    "average_attn_weights": "attnzoo.diagnostics.capture gives the weights",
    "is_causal": "give causal= to the constructor",
    "key": "give context=, or context=(keys, values)",
    "value": "give context=, or context=(keys, values)",
    "position_ids": "give positions=",
    "past_key_values": "give cache=module.init_cache(batch_size, max_length)",
}
"""Arguments of torch.nn.MultiheadAttention and of transformers, and what takes their place."""

_MODULE_CALL = nn.Module.__call__


class HintedCall:
    """Base of a module whose call, where its arguments do not fit, says which of ours do.

    It takes the place of `nn.Module.__call__` and adds no frame to it. While that is patched, as by torch.fx and
    torch.export, it is called.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Give each class a code object of its own: torch.compile counts recompilations by code object."""
        super().__init_subclass__(**options)
        if "__call__" not in vars(cls):
            function: Any = HintedCall.__call__
            cls.__call__ = FunctionType(function.__code__.replace(), function.__globals__, "__call__")  # type: ignore

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, with hooks.

        Raises:
            TypeError: for arguments that forward does not take, with a hint for those of other libraries.
        """
        try:
            if nn.Module.__call__ is not _MODULE_CALL:
                return nn.Module.__call__(self, *args, **kwargs)
            if self._compiled_call_impl is not None:
                return self._compiled_call_impl(*args, **kwargs)
            return self._call_impl(*args, **kwargs)
        except TypeError as error:
            message = misfit(self, args, kwargs)
            if message is None:
                raise
            raise TypeError(message) from error


def misfit(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why these are not arguments of the module's forward; None if they are."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        hints = {name: HINTS[name] for name in kwargs if name in HINTS and name not in signature.parameters}
        given = "".join(f"; in place of {name}, {hint}" for name, hint in hints.items())
        if not hints and len(args) > 2:
            given = "; in place of key and value, give context=, or context=(keys, values)"
        return f"{type(module).__name__}() {error}{given}"
    return None
