"""What a forward pass needs of an adapter's parameters, computed for many layers at once.

Normalised columns, triangular solves, casts: they depend on parameters alone, so the engine computes them for all layers
of one shape together, before the model's forward pass, and lends them to the adapters for the time of that pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Loan:
    """Derived tensors lent to one adapter.

    They may be used while the forward pass that they were made for runs, and again where a checkpointed block of it is
    recomputed in backward. Anything else (a sub-module called alone, after an optimiser's step, say) derives its own.
    """

    __slots__ = ("dtype", "recorded", "running", "tensors")

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] | None = None
        self.dtype: torch.dtype | None = None
        self.running = False
        self.recorded = False

    def lend(self, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.tensors, self.dtype, self.running, self.recorded = tensors, dtype, True, False

    def end(self) -> None:
        """The forward pass is over. Tensors are kept for recomputation only where gradients flow through them."""
        self.running = False
        if self.tensors is not None and not any(t.requires_grad for t in self.tensors):
            self.tensors = None

    def take(self, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The tensors, or None where they are not to be used now."""
        if self.running:
            self.recorded = torch.is_grad_enabled()
            return self.tensors if self.dtype == dtype else None
        if torch.compiler.is_compiling() or self.dtype != dtype:
            return None
        # A reentrant checkpoint runs forward without recording, and its recomputation must reach the parameters itself.
        recomputing = torch._C._current_graph_task_id() != -1
        return self.tensors if recomputing and self.recorded else None

    def __deepcopy__(self, memo: Any) -> Loan:
        return Loan()

    def __reduce__(self) -> Any:
        return Loan, ()
