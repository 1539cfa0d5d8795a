"""Deriving for all layers at once: forward hooks on the base model that lend adapters what they need.

Layers of one shape are computed together, once per forward pass of the model. In training nothing is reused between two
passes. Without gradients a result is kept, and used again only where all parameters still hold the same numbers, compared
one by one: no write, however made, is missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.layer import AdaptedLayer, Quick
from ..core.offload import moves_when_called


class _Group:
    """Adapters that derive alike."""

    def __init__(self, adapters: list[Adapter], dtype: torch.dtype) -> None:
        self.adapters, self.dtype = adapters, dtype
        self.kept: tuple[list[Tensor], list[tuple[Tensor, ...]]] | None = None

    def lend(self) -> None:
        slots = zip(*(a.parameters() for a in self.adapters), strict=True)
        stacked = [torch.stack(parameters) for parameters in slots]
        keeping = not (torch.is_grad_enabled() and any(t.requires_grad for t in stacked)) and _may_synchronize(stacked[0])
        if keeping and self.kept is not None and all(map(torch.equal, self.kept[0], stacked)):
            shares = self.kept[1]
        else:
            derived = [t.to(self.dtype).unbind() for t in self.adapters[0].derive(*stacked)]
            shares = list(zip(*derived, strict=True))
            self.kept = (stacked, shares) if keeping else None
        for adapter, share in zip(self.adapters, shares, strict=True):
            adapter.loan.lend(share, self.dtype)


def _may_synchronize(t: Tensor) -> bool:
    return not t.is_meta and not (t.is_cuda and torch.cuda.is_current_stream_capturing())


class Lending:
    """The hooks of one base model."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[AdaptedLayer] | None = None
        self.key: Hashable = None
        self.groups: list[_Group] = []
        self.alone: list[tuple[AdaptedLayer, Adapter, torch.dtype]] = []  # layers with one running adapter
        self.handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a whole model in one graph: layers derive alone, and the compiler arranges it
            return
        if moves_when_called(model):  # that is after this hook: layers derive alone, where they run
            return
        if self.layers is None:
            self.layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
            self.key = None
        running = [(layer, adapter) for layer in self.layers for adapter in layer.running()]
        autocast = _autocast_dtype(running)
        key = (autocast, tuple(id(a) for _, a in running))
        if key != self.key:
            self.key, self.groups = key, _grouped(running, autocast)
            self.alone = _alone(running) if autocast is None else []
        for group in self.groups:
            group.lend()
        for layer, adapter, dtype in self.alone:
            layer.quick = _quick(layer, adapter, dtype)

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for group in self.groups:
            for adapter in group.adapters:
                adapter.loan.end()
        for layer, _, _ in self.alone:
            layer.quick = None

    def reset(self) -> None:
        """Layers were put in or taken out."""
        self.layers, self.key, self.groups, self.alone = None, None, [], []

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": None, "key": None, "groups": [], "alone": []}


def _autocast_dtype(running: list[tuple[AdaptedLayer, Adapter]]) -> torch.dtype | None:
    kind = next(running[0][1].parameters()).device.type if running else "meta"
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _grouped(running: list[tuple[AdaptedLayer, Adapter]], autocast: torch.dtype | None) -> list[_Group]:
    groups: dict[Hashable, list[Adapter]] = {}
    for layer, adapter in running:
        dtype = layer.base.dtype if autocast is None else autocast
        if dtype.is_floating_point and dtype.itemsize > 1:
            p = tuple(adapter.parameters())
            key = (type(adapter), adapter.shape, adapter.kin(), tuple((t.shape, t.dtype, t.device) for t in p), dtype)
            groups.setdefault(key, []).append(adapter)
    return [_Group(adapters, key[-1]) for key, adapters in groups.items()]  # type: ignore[index]


def _alone(running: list[tuple[AdaptedLayer, Adapter]]) -> list[tuple[AdaptedLayer, Adapter, torch.dtype]]:
    count = Counter(layer for layer, _ in running)
    return [(layer, adapter, layer.base.dtype) for layer, adapter in running if count[layer] == 1]


def _quick(layer: AdaptedLayer, adapter: Adapter, dtype: torch.dtype) -> Quick | None:
    """The layer's forward pass as one call, where it has no hooks to fire and no scale to apply."""
    if any(s != 1.0 for s in layer.scales.values()):
        return None
    call = adapter.quick(layer.base.plain(dtype), dtype)
    return None if call is None else Quick(dtype, call, adapter.loan)
