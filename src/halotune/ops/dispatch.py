"""One operation, several implementations: a reference that defines it, and kernels chosen at run time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_forced: list[str] = []


@dataclass(frozen=True)
class Kernel:
    """One implementation. `refuses` says why it cannot run on these arguments, or None."""

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


@dataclass
class Op:
    """A callable: the first kernel that accepts the arguments, else the reference.

    Attributes:
        name: for messages.
        reference: plain torch; the definition.
        kernels: tried in order.
    """

    name: str
    reference: Callable[..., Any]
    kernels: list[Kernel] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        return self.chosen(*args)(*args)

    def chosen(self, *args: Any) -> Callable[..., Any]:
        """The implementation that a call with these arguments runs."""
        forced = _forced[-1] if _forced else None
        if forced == "reference":
            return self.reference
        for kernel in self.kernels:
            if forced not in (None, kernel.backend):
                continue
            reason = kernel.refuses(*args)
            if reason is None:
                return kernel.run
            if forced:
                warnings.warn(f"{self.name}: the {forced} kernel cannot run here: {reason}. Using plain torch.", stacklevel=3)
        return self.reference


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, every op uses this backend: `"reference"` (plain torch), or for example `"triton"`, where it can run.

    Where a forced kernel cannot run, a warning says why and plain torch runs instead.
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
