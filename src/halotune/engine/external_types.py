"""Other libraries tell adapters by their types. Which types those are is for an integration to say; the engine names none."""

from __future__ import annotations

from collections.abc import Callable

# Called before a model is wrapped: each makes our layers known to a library, where that is in use, and returns the library's
# types that the wrapped model's class must derive from.
external_types: list[Callable[[], tuple[type, ...]]] = []


def register_external_types() -> tuple[type, ...]:
    """Make our layers known, and return the types that a wrapper must take on."""
    return tuple(t for function in external_types for t in function())
