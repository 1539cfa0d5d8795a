"""One operation, two implementations: a reference that defines it, and a kernel, chosen at run time."""

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
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

_forced: list[str] = []
MOST = 4096  # prepared calls of one op: sequence lengths vary, so not every one is kept for ever


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel. Each function takes the arguments of the reference."""

    module: str  # imported where the kernel is first needed
    function: str  # in it: -> what runs on these arguments and on all that are `alike`
    cannot: Callable[..., str | None]  # -> why it cannot run on these, on whatever device
    faster: Callable[..., bool]  # -> whether it is faster there than the reference

    def prepare(self, *args: Any) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), self.function)(*args)

    def refuses(self, *args: Any) -> str | None:
        return _triton_refuses(args[0]) or self.cannot(*args)

    def wins(self, *args: Any) -> bool:
        return self.faster(*args) and self.refuses(*args) is None


@dataclass
class Op:
    """A callable: the kernel where it can run on the arguments and wins, else the reference.

    The kernel knows no derivatives, so with gradients enabled it is the reference: inside an autograd function they are not.
    Under `torch.compile` the compiler sees into it, and launches kernels itself.
    """

    name: str  # for messages, and in `torch.ops.halotune`
    reference: Callable[..., Any]  # plain torch; an argument `inplace` comes last, and is False in compiled graphs
    like: Callable[..., Any]  # from the arguments, empty tensors like the result
    kernel: Kernel
    # Called `again` in backward: the compiler, which sees both calls, then must not see into plain torch, or it would keep the
    # first result for the second call.
    repeats: bool = False
    prepared: dict[Any, Callable[..., Any]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        schema = torch.library.infer_schema(self.reference, mutates_args=())
        self.may_be_inplace = "inplace" in schema
        again = f"{self.name}_again" if self.repeats else self.name
        self.node = self._register(self.name, schema)
        self.node_again = self._register(again, schema) if self.repeats else self.node

    def _register(self, name: str, schema: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = self.prepare(*args)(*args)
            return tuple(t.clone() for t in result) if isinstance(result, tuple) else result  # results may not share memory

        def see_into(mode: Any, node: Any, types: Any, args: Any, kwargs: Any) -> Any:
            run = self.prepare(*args)
            if run is self.reference and self.repeats:
                return mode.__torch_dispatch__(node, types, args, kwargs)
            with mode, traced():
                return run(*args)

        node = torch.library.custom_op(f"halotune::{name}", run, mutates_args=(), schema=schema)
        node.register_fake(self.like)
        node.register_torch_dispatch(FunctionalTensorMode, see_into)  # the compiler's first pass
        return getattr(torch.ops.halotune, name)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.node(*args[:-1], False) if self.may_be_inplace else self.node(*args)
        if torch.is_grad_enabled():  # autograd records what runs now, as where a second derivative is wanted
            return self.reference(*args)
        if _forced:
            return self.prepare(*args)(*args)
        if not args[0].is_cuda:  # no kernel wins there, and its time is that of launches
            return self.reference(*args)
        try:
            key = alike(args)
            run = self.prepared.get(key)
        except TypeError:  # the sizes are symbols
            return self.prepare(*args)(*args)
        if run is None:
            if len(self.prepared) >= MOST:
                self.prepared.clear()
            run = self.prepared[key] = self.prepare(*args)
        return run(*args)

    def call(self, again: bool, *args: Any) -> Any:
        """A call that, if `again`, repeats an earlier one whose result nobody keeps for it."""
        return self.node_again(*args) if again and torch.compiler.is_compiling() else self(*args)

    def prepare(self, *args: Any) -> Callable[..., Any]:
        """What a call with arguments like these runs."""
        kernel = self.choice(*args)
        return self.reference if kernel is None else kernel.prepare(*args)

    def choice(self, *args: Any) -> Kernel | None:
        """The kernel, if a call with these arguments runs it; None for the reference."""
        kernel = self.kernel
        if not _forced:
            return kernel if kernel.wins(*args) else None
        if _forced[-1] != "triton":
            return None
        if (reason := kernel.refuses(*args)) is None:
            return kernel
        warnings.warn(f"{self.name}: the triton kernel cannot run here: {reason}. Using plain torch.", stacklevel=4)
        return None


def is_half_on_gpu(W: Tensor, *_: object) -> bool:
    """Where kernels that go over whole weights win."""
    return W.is_cuda and W.dtype.itemsize == 2


def alike(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal for arguments that differ in nothing but their tensors' numbers and addresses."""
    return tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in args])


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


_traced: list[bool] = []


@contextmanager
def traced() -> Iterator[None]:
    """Inside, kernels are not launched but written down for the compiler."""
    _traced.append(True)
    try:
        yield
    finally:
        _traced.pop()


def is_traced() -> bool:
    return bool(_traced)


def _triton_refuses(x: Any) -> str | None:
    if not _triton_is_installed():
        return "triton is not installed"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":  # whose interpreter runs kernels on a CPU, to test them
        return f"it needs a CUDA device, and the tensor is on {x.device}"
    if x.dtype.itemsize not in (2, 4) or not x.dtype.is_floating_point:
        return f"there is none for {x.dtype}"
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
