"""Keeping `W'` between forward passes: inference at the price of the bare model, the base untouched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Adapter


class _Kept(NamedTuple):
    """A `W'`, and the W that it was made from."""

    W: Tensor
    version: int
    adapted: Tensor


class WeightCache:
    """`W'` of each layer, kept without gradients up to a budget of bytes.

    Layers are served in their order; those for which there is no room left run as before.
    """

    def __init__(self) -> None:
        self.budget = 0
        self.used = 0
        self._kept: dict[Adapter, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self.used = 0
        self._kept.clear()

    def forget(self, adapters: list[Adapter]) -> None:
        """The parameters of these have changed."""
        for adapter in adapters:
            kept = self._kept.pop(adapter, None)
            self.used -= 0 if kept is None else _bytes(kept.adapted)

    def weight(self, adapter: Adapter, W: Tensor) -> Tensor | None:
        """`W'` of this adapter on W, kept or made now; None where gradients are wanted, or there is no room for it."""
        if torch.is_grad_enabled() or adapter.training:
            self.clear()  # the memory is training's
            return None
        kept = self._kept.get(adapter)
        if kept is not None and kept.W is W and kept.version == W._version:
            return kept.adapted
        self.forget([adapter])
        if self.used + _bytes(W) > self.budget:
            return None
        adapted = adapter.weight(W)
        self._kept[adapter] = _Kept(W, W._version, adapted)
        self.used += _bytes(adapted)
        return adapted


def _bytes(t: Tensor) -> int:
    return t.numel() * t.itemsize
