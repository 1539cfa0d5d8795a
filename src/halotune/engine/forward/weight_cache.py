"""Keeping `W'` between forward passes: inference at the price of the bare model, the base untouched."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.prepared import Seen, Tensors, seen, unchanged


class _Kept(NamedTuple):
    """A `W'`, and the W that it was made from."""

    source: list[Seen]
    adapted: Tensor


class WeightCache:
    """`W'` of each layer, kept without gradients up to a budget of bytes.

    Layers are served in their order; those for which there is no room left run as before. Adapters' parameters are compared
    number by number, so that no write to them is missed, however made; base weights by identity, address and version.
    """

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget
        self.used = 0
        self._kept: dict[Adapter, _Kept] = {}
        self._numbers: dict[Hashable, tuple[list[Adapter], Tensors]] = {}  # of the parameters

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self.used = 0
        self._kept.clear()
        self._numbers.clear()

    def __reduce__(self) -> Any:
        return WeightCache, (self.budget,)

    def weights(
        self, key: Hashable, adapters: list[Adapter], tensors: Sequence[Tensors], matrices: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """`W'` of each adapter on its matrix, kept or made now; None where there is no matrix, or no room for it."""
        first = tensors[0][0]
        if first.is_meta or (first.is_cuda and torch.cuda.is_current_stream_capturing()):  # to compare is to wait for numbers
            return [None] * len(adapters)
        for adapter, changed in zip(adapters, self._changed(key, adapters, tensors), strict=True):
            if changed:
                self._forget(adapter)
        return [None if W is None else self._weight(adapter, W) for adapter, W in zip(adapters, matrices, strict=True)]

    def _changed(self, key: Hashable, adapters: list[Adapter], tensors: Sequence[Tensors]) -> list[bool]:
        numbers = tuple([torch.stack(list(kind)) for kind in zip(*tensors, strict=True)])
        before, self._numbers[key] = self._numbers.get(key), (adapters, numbers)
        if before is None or before[0] != adapters:
            return [True] * len(adapters)
        flags = [torch.ne(a, b).reshape(len(a), -1).any(1) for a, b in zip(before[1], numbers, strict=True)]
        return torch.stack(flags).any(0).tolist()

    def _weight(self, adapter: Adapter, W: Tensor) -> Tensor | None:
        kept = self._kept.get(adapter)
        if kept is not None and not W.is_inference() and unchanged(kept.source, [W]):
            return kept.adapted
        self._forget(adapter)
        if W.is_inference() or self.used + W.nbytes > self.budget:
            return None
        with torch.inference_mode(False), torch.no_grad():  # it may serve outside of inference mode
            adapted = adapter.weight(W)
        self._kept[adapter] = _Kept(seen([W]), adapted)
        self.used += adapted.nbytes
        return adapted

    def _forget(self, adapter: Adapter) -> None:
        kept = self._kept.pop(adapter, None)
        self.used -= 0 if kept is None else kept.adapted.nbytes
