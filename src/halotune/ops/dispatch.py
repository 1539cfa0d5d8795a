"""One operation, several implementations: a reference that defines it, and kernels chosen at run time."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

_forced: list[str] = []


@dataclass(frozen=True)
class Kernel:
    """One implementation.

    Attributes:
        backend: its name.
        run: with the arguments of the reference.
        refuses: why it cannot run on these arguments, or None.
        wins: whether it is faster there than the reference.
    """

    backend: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    wins: Callable[..., bool]


@dataclass
class Op:
    """A callable: the first kernel that can run on the arguments and wins there, else the reference.

    Under `torch.compile` it is one node of the graph, which the compiler does not look into.

    Attributes:
        name: for messages, and in `torch.ops.halotune`.
        reference: plain torch; the definition. An argument `inplace` comes last, and is False in compiled graphs.
        like: from the arguments, empty tensors like the result.
        kernels: tried in order.
    """

    name: str
    reference: Callable[..., Any]
    like: Callable[..., Any]
    kernels: list[Kernel] = field(default_factory=list)

    def __post_init__(self) -> None:
        schema = torch.library.infer_schema(self.reference, mutates_args=())
        self.may_be_inplace = "inplace" in schema
        self.node, self.node_again = (self._register(name, schema) for name in (self.name, f"{self.name}_again"))

    def _register(self, name: str, schema: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = self.chosen(*args)(*args)
            return tuple(t.clone() for t in result) if isinstance(result, tuple) else result  # results may not share memory

        torch.library.custom_op(f"halotune::{name}", run, mutates_args=(), schema=schema).register_fake(self.like)
        return getattr(torch.ops.halotune, name)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.node(*args[:-1], False) if self.may_be_inplace else self.node(*args)
        return self.chosen(*args)(*args)

    def again(self, *args: Any) -> Any:
        """A call that repeats an earlier one: the compiler, which sees both, must not keep the first result for it."""
        return self.node_again(*args) if torch.compiler.is_compiling() else self(*args)

    def chosen(self, *args: Any) -> Callable[..., Any]:
        """The implementation that a call with these arguments runs."""
        if _forced:
            return self._forced(_forced[-1], *args)
        for kernel in self.kernels:
            if kernel.wins(*args) and kernel.refuses(*args) is None:
                return kernel.run
        return self.reference

    def _forced(self, backend: str, *args: Any) -> Callable[..., Any]:
        for kernel in self.kernels:
            if kernel.backend == backend:
                reason = kernel.refuses(*args)
                if reason is None:
                    return kernel.run
                warnings.warn(f"{self.name}: the {backend} kernel cannot run here: {reason}. Using plain torch.", stacklevel=4)
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


def triton_kernel(module: str, function: str, refuses: Callable[..., str | None], wins: Callable[..., bool]) -> Kernel:
    """The kernel `function` of `module`, imported at its first call. Triton must be installed, and the device suit it."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    def refusal(*args: Any) -> str | None:
        return _triton_refuses(args[0]) or refuses(*args)

    return Kernel("triton", run, refusal, wins)


def _triton_refuses(x: Any) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed"
    if not x.is_cuda and not _triton_interprets():
        return f"it needs a CUDA device, and the tensor is on {x.device}"
    if x.dtype.itemsize not in (2, 4) or not x.dtype.is_floating_point:
        return f"there is none for {x.dtype}"
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _triton_interprets() -> bool:
    """Triton's interpreter runs kernels on a CPU, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"
