"""Adapted layers that nobody calls: their adapters have no effect, get no gradient, and nothing else would say so.

A module may read the weight of a layer that it holds (a TDNN's kernel, a fused attention), or never use the layer. A pass that
leaves whole parts of the model out (no images, no decoder, experts without tokens) is no such case, so a layer counts only if
the module that holds it ran and the layer did not.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn

from ...core.errors import warn
from ..forward.prepare import is_compiled
from .modules import adapted_layers, is_attention, plain_modules, public_path

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
SHOWN = 8


class Note:
    """A hook that notes the first call of a module, and takes itself off."""

    def __init__(self, first_pass: FirstPass, path: str, module: nn.Module) -> None:
        self.first_pass, self.path = first_pass, path
        self.key = module.register_forward_pre_hook(self).id

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.first_pass.called.add(self.path)
            module._forward_pre_hooks.pop(self.key, None)


class Uncalled:
    """A hook on a layer that the first pass did not call, until somebody does: its adapters have no effect; none is merged."""

    def __init__(self, layer: nn.Module) -> None:
        self.key = layer.register_forward_pre_hook(self).id

    def __call__(self, layer: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            layer._forward_pre_hooks.pop(self.key, None)


def is_uncalled(layer: nn.Module) -> bool:
    return any(isinstance(hook, Uncalled) for hook in layer._forward_pre_hooks.values())


def note_call(layer: nn.Module) -> None:
    """Who computes with the weight that a layer and its adapters have, rather than calling it, says so."""
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, (Note, Uncalled)):
            hook(layer, ())


class FirstPass:
    """Watches layers until the first pass of the model after they were adapted is over. Afterwards no hook is left, but on what
    was not called."""

    def __init__(self) -> None:
        self.holders: dict[str, str] = {}  # path of a layer -> that of the module that holds it
        self.called: set[str] = set()
        self.key = self.compiled = 0

    def watch(self, model: nn.Module) -> None:
        """Watch the adapted layers that were not watched before."""
        modules = dict(plain_modules(model))
        layers = {p: vars(layer) for p, layer in adapted_layers(model).items()}
        new = {p: _holder(p, modules) for p, own in layers.items() if not own.get("watched")}
        for path in new:
            layers[path]["watched"] = True
        new = {p: holder for p, holder in new.items() if not is_attention(modules[holder])}  # its layers are read as weights
        for path in {*new, *(set(new.values()) - set(self.holders.values()))}:
            Note(self, path, modules[path])
        if new and not self.holders:
            self.key = model.register_forward_hook(self.end).id
            self.compiled = _compiled_frames()
        self.holders.update(new)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The hook after a pass of the model."""
        if torch.compiler.is_compiling() or model._forward_hooks.pop(self.key, None) is None:  # another thread was first
            return
        there = adapted_layers(model)
        missed = [p for p, holder in self.holders.items() if p in there and p not in self.called and holder in self.called]
        known = _compiled_frames() == self.compiled and not any(is_compiled(m) for m in model.modules())
        self.remove(model)
        if missed and known:  # compiled code notes nothing
            self._warn(model, missed)

    def _warn(self, model: nn.Module, missed: list[str]) -> None:
        modules, layers = dict(plain_modules(model)), adapted_layers(model)
        idle: Counter[str] = Counter()
        for path in missed:
            container = path.rpartition(".")[0]
            inside = [p for p in layers if p.rpartition(".")[0] == container]
            if isinstance(modules[container], _CONTAINERS) and not set(inside) <= set(missed):
                idle[f"{public_path(container)} ({{}} of {len(inside)})"] += 1
        alone = [p for p in missed if not any(g.startswith(f"{public_path(p.rpartition('.')[0])} (") for g in idle)]
        parts = []
        for path in alone:
            Uncalled(layers[path])
        if alone:
            names = ", ".join(map(public_path, alone[:SHOWN])) + (f" and {len(alone) - SHOWN} more" if alone[SHOWN:] else "")
            parts.append(
                f"{names}: not called in the first pass, though what holds {'it' if len(alone) == 1 else 'them'} was. Adapters "
                "there have no effect and are not trained if the weight is read without calling the layer, or the layer is not "
                "used. Leave such layers out with exclude_modules."
            )
        if idle:
            groups = ", ".join(group.format(n) for group, n in idle.items())
            parts.append(f"Idle in the first pass: {groups}; experts without tokens, say, are trained when they are called.")
        warn(" ".join(parts))

    def remove(self, model: nn.Module) -> None:
        """Take the hooks off."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "first_pass", getattr(hook, "__self__", None)) is self:
                        del hooks[key]
        self.holders, self.called = {}, set()


def _holder(path: str, modules: dict[str, nn.Module]) -> str:
    """The path of the nearest module around that is called itself."""
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(modules[path], _CONTAINERS):
            break
    return path


def _compiled_frames() -> int:
    """How many functions were compiled so far."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else utils.counters["frames"]["total"]
