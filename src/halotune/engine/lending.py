"""Deriving for all layers at once: forward hooks on the base model that lend adapters what they need.

Layers of one shape are computed together, once per forward pass of the model. In training nothing is reused between two
passes. Without gradients a result is kept, and used again only where all parameters still hold the same numbers, compared
one by one: no write, however made, is missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.layer import AdaptedLayer, Quick
from ..core.offload import moves_when_called
from .caching import WeightCache


class _Group:
    """Adapters that derive alike."""

    def __init__(self, adapters: list[Adapter], dtype: torch.dtype) -> None:
        self.adapters, self.dtype = adapters, dtype
        homes = [
            [(m._parameters, name) for m in a.modules() for name, p in m._parameters.items() if p is not None] for a in adapters
        ]
        self.slots = list(zip(*homes, strict=True))  # where the parameters are: they may be replaced
        self.kept: tuple[list[Tensor], list[tuple[Tensor, ...]]] | None = None

    def read(self) -> list[Tensor]:
        """The parameters now, those of all layers together."""
        return [torch.stack([home[name] for home, name in slot]) for slot in self.slots]  # type: ignore[misc]

    def lend(self, stacked: list[Tensor], again: bool) -> None:
        """Lend to every adapter; `again`: what was kept."""
        if again and self.kept is not None:
            shares = self.kept[1]
        else:
            derived = [t.to(self.dtype).unbind() for t in self.adapters[0].derive(*stacked)]
            shares = list(zip(*derived, strict=True))
            self.kept = (stacked, shares) if _keeps(stacked) else None
        for adapter, share in zip(self.adapters, shares, strict=True):
            adapter.loan.lend(share, self.dtype)


def _keeps(stacked: list[Tensor]) -> bool:
    """Whether what is derived of these may be used in the next pass too."""
    t = stacked[0]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in stacked)
    capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()  # to compare is to synchronize
    return not (recorded or t.is_meta or capturing)


def _unchanged(groups: list[_Group], read: list[list[Tensor]]) -> list[bool]:
    """Which groups' parameters are, number by number, those that were kept. The device is waited for once."""
    known = [g.kept is not None and _keeps(stacked) for g, stacked in zip(groups, read, strict=True)]
    flags = [
        torch.stack([torch.ne(a, b).any() for a, b in zip(g.kept[0], stacked, strict=True)]).any()  # type: ignore[index]
        for g, stacked, k in zip(groups, read, known, strict=True)
        if k
    ]
    one_device = len({f.device for f in flags}) == 1
    differ = iter(torch.stack(flags).tolist() if one_device else [bool(f) for f in flags])
    return [k and not next(differ) for k in known]


class Lending:
    """The hooks of one base model."""

    def __init__(self, model: nn.Module) -> None:
        self.cache = WeightCache()
        self.layers: list[AdaptedLayer] | None = None
        self.key: Hashable = None
        self.groups: list[_Group] = []
        self.alone: list[tuple[AdaptedLayer, Adapter, torch.dtype]] = []  # layers with one running adapter
        self.handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def find(self, model: nn.Module) -> list[AdaptedLayer]:
        """The layers to lend to."""
        return [m for m in model.modules() if isinstance(m, AdaptedLayer)]

    def before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a whole model in one graph: layers derive alone, and the compiler arranges it
            return
        if moves_when_called(model):  # that is after this hook: layers derive alone, where they run
            return
        if self.layers is None:
            self.layers = self.find(model)
            self.key = None
        running = [(layer, adapter) for layer in self.layers for adapter in layer.running()]
        autocast = _autocast_dtype(running)
        key = (autocast, tuple(id(a) for _, a in running))
        if key != self.key:
            self.key, self.groups = key, _grouped(running, autocast)
            self.alone = _alone(running) if autocast is None else []
        read = [group.read() for group in self.groups]
        unchanged = _unchanged(self.groups, read)
        for group, stacked, again in zip(self.groups, read, unchanged, strict=True):
            group.lend(stacked, again)
            if not again:
                self.cache.forget(group.adapters)
        for layer, adapter, dtype in self.alone:
            layer.set_quick(self._quick(layer, adapter, dtype))

    def _quick(self, layer: AdaptedLayer, adapter: Adapter, dtype: torch.dtype) -> Quick | None:
        """The layer's forward pass as one call, where it has no hooks to fire and no scale to apply."""
        plain = layer.base.plain(dtype) if layer.unscaled else None
        if plain is None:
            return None
        if self.cache.budget:
            adapted = self.cache.weight(adapter, plain[0])
            if adapted is not None:
                return Quick(dtype, partial(F.linear, weight=adapted, bias=plain[1]), adapter.loan)
        call = adapter.quick(plain, dtype)
        return None if call is None else Quick(dtype, call, adapter.loan)

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for group in self.groups:
            for adapter in group.adapters:
                adapter.loan.end()
        for layer, _, _ in self.alone:
            layer.set_quick(None)

    def reset(self) -> None:
        """Layers were put in or taken out."""
        self.cache.clear()
        self.layers, self.key, self.groups, self.alone = None, None, [], []

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        self.cache.clear()
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
            key = (type(adapter), adapter.kin(), tuple((t.shape, t.dtype, t.device) for t in p), dtype)
            groups.setdefault(key, []).append(adapter)
    return [_Group(adapters, key[-1]) for key, adapters in groups.items()]  # type: ignore[index]


def _alone(running: list[tuple[AdaptedLayer, Adapter]]) -> list[tuple[AdaptedLayer, Adapter, torch.dtype]]:
    count = Counter(layer for layer, _ in running)
    return [(layer, adapter, layer.base.dtype) for layer, adapter in running if count[layer] == 1]
