"""What `attnzoo.describe` reads: the arguments that a module was made with."""

from __future__ import annotations

from typing import Any, Self


class Recorded:
    """Base of a module that keeps the arguments of its constructor."""

    made_with: tuple[tuple[Any, ...], dict[str, Any]]
    """Positional and keyword arguments, as they were given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments; subclasses' constructors may change what they pass on."""
        self = super().__new__(cls)
        self.__dict__["made_with"] = (args, kwargs)
        return self
