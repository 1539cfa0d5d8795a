"""Layers that are given the same input: found by watching one training pass, and run together in the next ones.

The first of them to be called computes the outputs of all; each of the others then takes its own, if it was called with the
very tensor that the first one got, and nobody wrote to that in between. Without gradients every layer runs alone: the same
input gives the same bits, in the first pass as in any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.derived import Stack
from ..core.fused import Site
from ..core.layer import AdaptedLayer, Quick

Call = Callable[[Tensor], Tensor]
Joint = Callable[[Tensor], tuple[Tensor, ...]]
Plain = tuple[Tensor, Tensor | None]  # a matrix W, and a bias


class Watch:
    """Which layers follow each other with the same input."""

    def __init__(self) -> None:
        self.runs: list[list[AdaptedLayer]] = []
        self.last: tuple[ReferenceType[Tensor], int] | None = None

    def on(self, layer: AdaptedLayer) -> None:
        """Watch this layer, in this pass of the model."""
        quick = layer.quick
        if quick is not None:
            layer.set_quick(quick._replace(call=partial(self._call, layer, quick.call)))

    def _call(self, layer: AdaptedLayer, call: Call, x: Tensor) -> Tensor:
        if x.is_inference():  # whether anybody writes to it cannot be told
            self.last = None
        elif self.last is not None and self.last[0]() is x and self.last[1] == x._version:
            self.runs[-1].append(layer)
        else:
            self.last = ref(x), x._version
            self.runs.append([layer])
        return call(x)

    def siblings(self, kinds: Mapping[AdaptedLayer, Hashable]) -> list[tuple[AdaptedLayer, ...]]:
        """Layers of one kind (None is none), in the order of their calls; those that ran more than once have no siblings."""
        count = Counter(layer for run in self.runs for layer in run)
        found: dict[Hashable, list[AdaptedLayer]] = {}
        for i, run in enumerate(self.runs):
            for layer in run:
                if count[layer] == 1 and kinds.get(layer) is not None:
                    found.setdefault((i, kinds[layer]), []).append(layer)
        return [tuple(members) for members in found.values() if len(members) > 1]


class _Waiting(NamedTuple):
    """An output that was computed ahead, and what it was computed for."""

    x: Tensor
    version: int
    y: Tensor


class Family:
    """Siblings, or one layer: what gives each of them its forward pass as one call, for the time of a pass of the model."""

    def __init__(self, layers: Sequence[AdaptedLayer], adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
        self.layers, self.adapters, self.dtype = layers, adapters, dtype
        calls: list[Call] = (
            [self.only] if len(layers) == 1 else [self.first, *(partial(self.later, i) for i in range(1, len(layers)))]
        )
        self.quicks = [Quick(dtype, call, adapter.loan) for call, adapter in zip(calls, adapters, strict=True)]
        self.singles = [Family([layer], [adapter], dtype) for layer, adapter in self.members()] if len(layers) > 1 else []
        self.plains: list[Plain | None] = [None] * len(layers)
        self.joint: Joint | None = None
        self.lent: list[Any] = []  # what joint was made from
        self.waiting: list[_Waiting | None] = [None] * len(layers)
        self.broken = False  # the model does not call them as it did when it was watched

    def members(self) -> Iterator[tuple[AdaptedLayer, Adapter]]:
        return zip(self.layers, self.adapters, strict=True)

    def settle(self) -> None:
        """Look at the bases: they are as they will be in the next passes."""
        self.joint = None
        self.plains = [self._plain(layer, adapter) for layer, adapter in self.members()]
        for single, plain in zip(self.singles, self.plains, strict=False):
            single.joint, single.plains = None, [plain]

    def _plain(self, layer: AdaptedLayer, adapter: Adapter) -> Plain | None:
        """The base's matrix and bias, where the layer has no hooks to fire, no scale to apply, and nothing to drop."""
        return layer.base.plain(self.dtype) if layer.unscaled and adapter.may_be_plain() else None

    def begin(self) -> bool:
        """Get ready for a pass. Returns whether all bases are plain, and the layers will run through this."""
        recorded = torch.is_grad_enabled()
        if self.singles and not recorded:
            return all([single.begin() for single in self.singles])
        for single in self.singles:
            single.joint = None
        loans = [adapter.loan for adapter in self.adapters]
        lent = [loan.tensors if loan.stack is None else loan.stack for loan in loans]
        if self.joint is None or None in lent or not all(map(is_, lent, self.lent)):
            self.joint, self.lent = self._bind(loans[0].stack), lent
        if self.joint is None:
            return False
        for layer, quick in zip(self.layers, self.quicks, strict=True):
            layer.set_quick(quick)
        return True

    def _bind(self, stack: Stack | None) -> Joint | None:
        """All layers on what is lent, as one call."""
        if None in self.plains:
            return None
        whole = stack.tensors if stack is not None and len(stack) == len(self.layers) else None
        if whole is None and self.stacked and self.singles:
            return None
        sites = [
            Site(*plain, adapter.derived(self.dtype) if whole is None else ())
            for plain, adapter in zip(self.plains, self.adapters, strict=True)
            if plain is not None
        ]
        return self.adapters[0].on_plain(sites, whole)

    @property
    def stacked(self) -> bool:
        return self.adapters[0].stacked

    def only(self, x: Tensor) -> Tensor:
        return self.joint(x)[0]  # type: ignore[misc]

    def first(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or x.is_inference() or _saved_tensors_are_hooked():
            return self.alone(0, x)
        y, *others = self.joint(x)  # type: ignore[misc]
        version = x._version
        self.waiting[1:] = [_Waiting(x, version, other) for other in others]
        return y

    def later(self, i: int, x: Tensor) -> Tensor:
        waiting, self.waiting[i] = self.waiting[i], None
        if waiting is not None:
            if waiting.x is x and waiting.version == x._version and torch.is_grad_enabled():
                return waiting.y
            self.broken = True
        return self.alone(i, x)

    def alone(self, i: int, x: Tensor) -> Tensor:
        """The i-th layer by itself."""
        call = self.adapters[i].quick(self.plains[i], self.dtype)
        assert call is not None
        return call(x)

    def end(self) -> bool:
        """The pass is over. Returns whether every output was taken by its layer."""
        intact = not self.broken and not any(self.waiting)
        if torch.is_grad_enabled():
            self.joint = None  # it holds a graph; without one it may serve again
        self.waiting = [None] * len(self.layers)
        for layer in self.layers:
            layer.set_quick(None)
        return intact


def _saved_tensors_are_hooked() -> bool:
    """Whether somebody handles what is saved for backward. A checkpoint does: when it runs a layer again, this layer must
    save what it saved before, and then layers run alone."""
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
