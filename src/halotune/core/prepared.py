"""What forward passes need of adapters' parameters, and by what a layer tells that it may use it.

Normalised columns, triangular solves, casts, whole weights W': they depend on parameters alone. A *pass* of a model in a
thread prepares them for all layers of one shape together (`engine/forward`) and leaves them in each adapter's `Slot`. A layer
looks at its slot at every call, and uses what is there only if nothing that it was made from has changed; else it prepares for
itself. So a layer that is called alone, twice, in another order or not at all is right by construction.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

Seen = tuple[Tensor, int, int, bool]


def seen(tensors: Sequence[Tensor]) -> tuple[Seen, ...]:
    """Identity, address, version, `requires_grad` of each. Writes that torch does not record (`.data`, numpy) are not seen."""
    return tuple([(t, t.data_ptr(), t._version, t.requires_grad) for t in tensors])


def unchanged(before: tuple[Seen, ...], tensors: Sequence[Tensor]) -> bool:
    """Whether these are the tensors that were seen, as they were."""
    if len(before) != len(tensors):
        return False
    for (tensor, address, version, grad), t in zip(before, tensors, strict=True):
        if t is not tensor or t._version != version or t.requires_grad is not grad or t.data_ptr() != address:
            return False
    return True


def stream_of(t: Tensor) -> int:
    """The CUDA stream on which work is queued now; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(t.get_device()) if t.is_cuda else 0


@dataclass(slots=True)
class Prepared:
    """What was prepared for one adapter.

    Attributes:
        factors: what `Adapter.prepare` gives, in `dtype`, contiguous; empty where W' was made instead.
        adapted: W' `(out, in)`, or None.
        dtype: that of the products.
        recorded: made with gradients enabled, so that it may be part of a graph.
        stream: where its numbers are computed.
        made_from: the parameters; and W, for W'.
    """

    factors: tuple[Tensor, ...]
    adapted: Tensor | None
    dtype: torch.dtype | None
    recorded: bool
    stream: int
    made_from: tuple[Seen, ...]

    def release(self) -> None:
        """It serves no more, in whatever thread."""
        self.factors, self.adapted, self.dtype, self.made_from = (), None, None, ()

    def serves(self, dtype: torch.dtype, parameters: Sequence[Tensor], W: Tensor | None, as_weight: bool) -> bool:
        """Whether it is what would be made now, for a layer with the plain matrix W, or with none.

        Args:
            as_weight: W' is wanted; where nothing is recorded, either is as good.
        """
        recording = torch.is_grad_enabled()
        if self.dtype is not dtype or (recording and not self.recorded):
            return False
        if (self.adapted is not None) is not as_weight and (recording or as_weight or W is None):
            return False
        if self.adapted is not None and W is not None:
            parameters = (*parameters, W)
        return unchanged(self.made_from, parameters) and self.stream == stream_of(parameters[0])


class Slot(threading.local):
    """The place for what is prepared for one adapter, in this thread. Copies and pickles of it are empty."""

    prepared: Prepared | None = None

    def __deepcopy__(self, memo: Any) -> Slot:
        return Slot()

    def __reduce__(self) -> Any:
        return Slot, ()


class Pass(Protocol):
    """One forward pass of a model in one thread, or what a backward pass computes again."""

    def prepare_for(self, adapter: Any, dtype: torch.dtype, as_weight: bool) -> None:
        """Fill the slots of all adapters that prepare together with this one, if that was not tried in this pass yet.

        Args:
            as_weight: with W', else with factors.
        """
        ...

    def seed(self, adapter: Any) -> int | None:
        """Of the noise by which W' of this adapter is rounded; None draws it from torch's generator."""
        ...


class Scope(Protocol):
    """A model whose layers prepare together."""

    def recomputation(self) -> Pass:
        """The pass of the backward that is running in this thread."""
        ...


class _Local(threading.local):
    running: Pass | None = None


LOCAL = _Local()
SCOPES: WeakKeyDictionary[Any, ref[Scope]] = WeakKeyDictionary()  # of each adapter that was found in one


def pass_of(adapter: Any) -> Pass | None:
    """The pass that is running in this thread; None where a layer is called by itself."""
    if LOCAL.running is not None:
        adapter.__dict__["alone"] = False  # past nn.Module's slow way to set it
        return LOCAL.running
    if torch._C._current_graph_task_id() == -1:
        adapter.__dict__["alone"] = True
    if adapter.alone:  # and so it is when a checkpoint runs it again
        return None
    scope = SCOPES.get(adapter)  # a checkpoint runs its layers again, which on CUDA happens in a thread of autograd's
    found = None if scope is None else scope()
    return None if found is None else found.recomputation()


def is_transformed() -> bool:
    """Whether somebody looks at, or replaces, every single operation: functorch's transforms, forward-mode derivatives,
    `torch.jit.trace`, dispatch modes (fake tensors, selective checkpoints). Then a pass is plain torch, and shares nothing."""
    return not torch.compiler.is_compiling() and (
        torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
