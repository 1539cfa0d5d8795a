"""Deriving for all layers at once: forward hooks on the base model that lend adapters what they need.

Layers of one shape are computed together, once per forward pass of the model. In training nothing is reused between two
passes. Without gradients a result is kept, and used again only where all parameters still hold the same numbers, compared
one by one: no write, however made, is missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.derived import Stack, usable
from ..core.layer import AdaptedLayer, Quick
from ..core.offload import moves_when_called
from .caching import WeightCache
from .siblings import Family, Watch
from .steady import Look, Steady

Running = tuple[AdaptedLayer, Adapter]


class _Group:
    """Adapters that derive alike.

    Attributes:
        adapters: those that share a stack first.
        sizes: of the stacks.
    """

    def __init__(self, adapters: list[Adapter], sizes: list[int], dtype: torch.dtype) -> None:
        self.adapters, self.sizes, self.dtype = adapters, sizes, dtype
        homes = [
            [(m._parameters, name) for m in a.modules() for name, p in m._parameters.items() if p is not None] for a in adapters
        ]
        self.slots = list(zip(*homes, strict=True))  # where the parameters are: they may be replaced
        self.kept: tuple[list[Tensor], list[Stack], list[tuple[Tensor, ...]]] | None = None
        self.recorded = False  # what is lent is part of a graph

    def read(self) -> list[Tensor]:
        """The parameters now, those of all layers together."""
        stacked = [torch.stack([home[name] for home, name in slot]) for slot in self.slots]  # type: ignore[misc]
        for t in stacked:
            if t.requires_grad:  # laid out like the parameters, its pieces become their gradients as they are
                t.register_hook(Tensor.contiguous)
        return stacked

    def lend(self, stacked: list[Tensor], again: bool) -> None:
        """Lend to every adapter; `again`: what was kept."""
        if again and self.kept is not None:
            stacks, parts = self.kept[1:]
        else:
            derived = [usable(t, self.dtype) for t in self.adapters[0].derive(*stacked)]
            self.recorded = any(t.requires_grad for t in derived)
            *pieces, rest = zip(*(t.split([*self.sizes, len(self.adapters) - sum(self.sizes)]) for t in derived), strict=True)
            stacks, parts = [Stack(piece) for piece in pieces], list(zip(*(t.unbind() for t in rest), strict=True))
            self.kept = (stacked, stacks, parts) if _keeps(stacked) else None
        adapters = iter(self.adapters)
        for stack, size in zip(stacks, self.sizes, strict=True):
            for place in range(size):
                next(adapters).loan.share(stack, place, self.dtype)
        for adapter, part in zip(adapters, parts, strict=True):
            adapter.loan.lend(part, self.dtype)

    def end(self) -> None:
        """The pass is over. What is lent stays where gradients flow through it, for recomputation."""
        for adapter in self.adapters:
            adapter.loan.end(self.recorded)


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
        self._forget()
        self.handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def _forget(self) -> None:
        self.steady: Steady | None = None
        self.look: Look | None = None  # at the last pass
        self.quicks: list[tuple[AdaptedLayer, Quick | None]] | None = None  # of the last pass, if it was without gradients
        self.key: Hashable = None
        self.running: list[Running] = []
        self.groups: list[_Group] = []
        self.families: list[Family] = []  # of layers with one running adapter
        self.watch: Watch | None = None  # until it is known which layers are siblings

    def find(self, model: nn.Module) -> list[AdaptedLayer]:
        """The layers to lend to."""
        return [m for m in model.modules() if isinstance(m, AdaptedLayer)]

    def before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a whole model in one graph: layers derive alone, and the compiler arranges it
            return
        if moves_when_called(model):  # that is after this hook: layers derive alone, where they run
            return
        if self.steady is None:
            self.steady = Steady(self.find(model))
        settled = self._look(self.steady)
        read = [group.read() for group in self.groups]
        unchanged = _unchanged(self.groups, read)
        for group, stacked, again in zip(self.groups, read, unchanged, strict=True):
            group.lend(stacked, again)
            if not again:
                self.cache.forget(group.adapters)
        if not (settled and all(unchanged) and self._prepare_as_before()):
            self._prepare_layers(self.steady)

    def _look(self, steady: Steady) -> bool:
        """Arrange anew what has changed since the last pass. Returns whether nothing has."""
        before, self.look, look = self.look, None, steady.look(versions=self.cache.budget > 0)
        settled = before is not None and look.shows_the_same_as(before)
        if not settled:
            self.running = [(layer, adapter) for layer in steady.layers for adapter in layer.running()]
        autocast = _autocast_dtype(self.running)
        key = (autocast, tuple([id(a) for _, a in self.running]))
        if key != self.key:
            self.key, settled = key, False
            self._arrange(autocast, [])
            self.watch = Watch()
        if not settled:
            for family in self.families:
                family.settle()
        self.look = look
        return settled

    def _arrange(self, autocast: torch.dtype | None, siblings: Sequence[Sequence[AdaptedLayer]]) -> None:
        """Which adapters derive together, and which layers run together."""
        alone = _alone(self.running) if autocast is None else {}
        shared = [members for members in siblings if all(layer in alone for layer in members)]
        rest = set(alone) - {layer for members in shared for layer in members}
        found = [*shared, *((layer,) for layer in alone if layer in rest)]
        self.families = [Family(members, [alone[m] for m in members], members[0].base.dtype) for members in found]
        self.groups = _grouped(self.running, autocast, [f.adapters for f in self.families if f.stacked])

    def _prepare_layers(self, steady: Steady) -> None:
        """Give each layer its forward pass as one call."""
        for family in self.families:
            if not (self.cache.budget and self._from_cache(family)) and not family.begin() and len(family.layers) > 1:
                family.broken = True
        if self.watch is not None and torch.is_grad_enabled():
            self.watch = Watch()  # an earlier pass may have failed
            for family in self.families:
                for layer in family.layers:
                    self.watch.on(layer)
        self.quicks = None if torch.is_grad_enabled() else [(layer, layer.quick) for layer in steady.layers]

    def _prepare_as_before(self) -> bool:
        """What the last pass without gradients gave the layers serves this one too, if there was one."""
        if self.quicks is None or torch.is_grad_enabled():
            return False
        for layer, quick in self.quicks:
            layer.set_quick(quick)
        return True

    def cache_weights(self, budget: int) -> None:
        """Keep W' without gradients, up to a budget of bytes."""
        self.cache.clear()
        self.cache.budget = budget
        self.look = self.quicks = None

    def _from_cache(self, family: Family) -> bool:
        """Run these layers on W' kept without gradients, as far as there is room for it."""
        kept = 0
        for (layer, adapter), plain in zip(family.members(), family.plains, strict=True):
            adapted = None if plain is None else self.cache.weight(adapter, plain[0])
            if plain is not None and adapted is not None:
                layer.set_quick(Quick(family.dtype, partial(F.linear, weight=adapted, bias=plain[1]), adapter.loan))
                kept += 1
        return kept > 0

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for group in self.groups:
            group.end()
        intact = [family for family in self.families if family.end()]
        siblings = [family.layers for family in intact if len(family.layers) > 1]
        changed = len(intact) < len(self.families)
        if self.watch is not None and torch.is_grad_enabled() and output is not None:
            kinds = {layer: adapter.family() for f in self.families for layer, adapter in f.members()}
            siblings, changed = self.watch.siblings(kinds), bool(self.watch.runs)
            if not changed:  # no layer ran through this: they are compiled, say, or quantized
                self.families = []
            self.watch = None
        if changed:
            self._arrange(None, siblings)
            self.look = None  # these families have not seen the layers yet

    def reset(self) -> None:
        """Layers were put in or taken out."""
        self.cache.clear()
        self._forget()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        self.cache.clear()
        return {"cache": self.cache, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _autocast_dtype(running: list[Running]) -> torch.dtype | None:
    kind = next(running[0][1].parameters()).device.type if running else "meta"
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _grouped(running: list[Running], autocast: torch.dtype | None, families: list[Sequence[Adapter]]) -> list[_Group]:
    """Adapters that derive alike; those of one family get one stack."""
    chosen: dict[Hashable, list[list[Adapter]]] = {}
    together = {adapter: members for members in families for adapter in members}
    for layer, adapter in running:
        dtype = layer.base.dtype if autocast is None else autocast
        if dtype.is_floating_point and dtype.itemsize > 1:
            p = tuple(adapter.parameters())
            key = (type(adapter), adapter.kin(), tuple((t.shape, t.dtype, t.device) for t in p), dtype)
            others = chosen.setdefault(key, [[]])[0]
            members = together.get(adapter)
            if members is None:
                others.append(adapter)
            elif adapter is members[0]:
                chosen[key].append(list(members))
    groups = []
    for key, (others, *stacks) in chosen.items():
        adapters = [a for members in (*stacks, others) for a in members]
        groups.append(_Group(adapters, [len(members) for members in stacks], key[-1]))  # type: ignore[index]
    return groups


def _alone(running: list[Running]) -> dict[AdaptedLayer, Adapter]:
    """Layers with one running adapter."""
    count = Counter(layer for layer, _ in running)
    return {layer: adapter for layer, adapter in running if count[layer] == 1}
