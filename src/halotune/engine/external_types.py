"""Other libraries tell adapters by their types. Which types those are is for an integration to say; the engine names none."""

from __future__ import annotations

from collections.abc import Callable

Types = tuple[type, ...]

_functions: list[Callable[[], Types]] = []


def external_types(function: Callable[[], Types]) -> Callable[[], Types]:
    """Have `function` called before a model is wrapped: it makes our layers known to a library, where that is in use.

    It returns the library's types that the wrapped model's class must derive from.
    """
    _functions.append(function)
    return function


def register_external_types() -> Types:
    """Make our layers known, and return the types that a wrapper must take on."""
    return tuple(t for function in _functions for t in function())
