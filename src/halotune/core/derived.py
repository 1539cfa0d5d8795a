"""What a forward pass needs of an adapter's parameters, computed for many layers at once.

Normalised columns, triangular solves, casts: they depend on parameters alone, so the engine computes them for all layers
of one shape together, before the model's forward pass, and lends them to the adapters for the time of that pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def usable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As kernels want it: in their dtype, and contiguous."""
    return t.to(dtype, memory_format=torch.contiguous_format).contiguous()  # `to` alone leaves what has the dtype already


class Stack:
    """What was derived for s layers, as tensors `(s, …)`."""

    __slots__ = ("_parts", "_recorded", "tensors")

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors
        self._recorded = torch.is_grad_enabled()
        self._parts: list[tuple[Tensor, ...]] | None = None

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def part(self, i: int) -> tuple[Tensor, ...]:
        """What belongs to the i-th layer."""
        if torch.is_grad_enabled() is not self._recorded:
            return tuple([t[i] for t in self.tensors])
        if self._parts is None:
            self._parts = list(zip(*(t.unbind() for t in self.tensors), strict=True))
        return self._parts[i]


class Loan:
    """Derived tensors lent to one adapter.

    They may be used while the forward pass that they were made for runs, and again where a checkpointed block of it is
    recomputed in backward. Anything else (a sub-module called alone, after an optimiser's step, say) derives its own.
    """

    __slots__ = ("dtype", "place", "recorded", "running", "stack", "tensors")

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] | None = None
        self.stack: Stack | None = None  # shared with siblings
        self.place = 0
        self.dtype: torch.dtype | None = None
        self.running = False
        self.recorded = False

    def lend(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.tensors, self.stack, self.dtype, self.running, self.recorded = tensors, None, dtype, True, False

    def share(self, stack: Stack, place: int, dtype: torch.dtype) -> None:
        """Lend a place in a stack."""
        self.tensors, self.stack, self.place = None, stack, place
        self.dtype, self.running, self.recorded = dtype, True, False

    def end(self, keep: bool) -> None:
        """The forward pass is over. `keep` what is lent, for recomputation."""
        self.running = False
        if not keep:
            self.tensors = self.stack = None

    def take(self, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The tensors, or None where they are not to be used now."""
        if self.running:
            self.recorded = torch.is_grad_enabled()
            return self._lent() if self.dtype == dtype else None
        if torch.compiler.is_compiling() or self.dtype != dtype:
            return None
        # A reentrant checkpoint runs forward without recording, and its recomputation must reach the parameters itself.
        recomputing = torch._C._current_graph_task_id() != -1
        return self._lent() if recomputing and self.recorded else None

    def _lent(self) -> tuple[Tensor, ...] | None:
        return self.tensors if self.stack is None else self.stack.part(self.place)

    def __deepcopy__(self, memo: Any) -> Loan:
        return Loan()

    def __reduce__(self) -> Any:
        return Loan, ()
