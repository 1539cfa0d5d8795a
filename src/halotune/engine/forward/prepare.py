"""Preparing for all layers of one shape together.

A scope is a model with hooks that mark where its forward passes begin and end. The first adapted layer that is called in a
pass, and finds nothing prepared for it, has the pass prepare for all layers that prepare alike. What is prepared lies in the
adapters' slots until the pass ends; each layer looks for itself whether it may use it (`core/prepared.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...core.adapter import Adapter, Weights
from ...core.experts import AdaptedExpertWeights
from ...core.layer import AdaptedLayer
from ...core.prepared import LOCAL, SCOPES, Form, Prepared, Tensors, is_transformed, prepare, seen, stream_of
from ...core.rows import MIXED
from ...ops.rounding import DROPPED
from ..injection.offloading import bring_adapters
from ..training import warn_if_penalty_unused
from .weight_cache import WeightCache

SEEDS = 16  # of the noises of one adapter
PATIENCE = 32  # training passes, of which several may make one optimizer step, before a penalty is missed
BUDGET = 2 * 2**30  # bytes for W' of all layers and its gradients, if nothing else is asked for


class Known(NamedTuple):
    """What was seen of an adapter's parameters; and the number of those that prepare alike."""

    tensors: Tensors
    looks: list[tuple[torch.Size, torch.dtype, torch.device, bool]]
    kind: int


class Member(NamedTuple):
    """An adapter that runs, its layer, and whether no other runs there."""

    layer: AdaptedLayer
    adapter: Adapter
    known: Known
    alone: bool

    def plain(self, dtype: torch.dtype) -> Tensor | None:
        """W, where W' is all that the layer needs: a plain matrix with this adapter alone on it, as it is."""
        dropped = self.adapter.training and self.adapter.dropout
        plain = None if dropped or not self.alone else self.layer.base.plain(dtype)
        return None if plain is None else plain[0]


class _Recomputing(threading.local):
    """The last pass of this thread that a backward computed again. A backward that fails does not call back."""

    task = -1
    running: ForwardPass | None = None

    def clear(self) -> None:
        if self.running is not None:
            self.running.clear()
            self.running = None


class Scope:
    """The hooks of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.cache = WeightCache()
        self.form: Form = "auto"
        self.budget = BUDGET
        self.seed: int | None = None
        self.training_passes = 0
        self._reset()
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _reset(self) -> None:
        self.layers: list[AdaptedLayer] | None = None
        self.parents: list[nn.Module] = []
        self.parts: list[nn.Module] = []  # of the adapters
        self.local = _Recomputing()
        self.known: dict[Adapter, Known] = {}
        self.kinds: dict[Hashable, int] = {}  # what adapters that prepare alike have in common -> their number
        self.places: dict[Adapter, tuple[int, int]] = {}  # its number among adapters, and that of its layer
        self.rounds = False  # whether some W' may be made in training

    def find(self, model: nn.Module) -> list[AdaptedLayer]:
        """The layers that prepare together."""
        return [m for m in model.modules() if isinstance(m, AdaptedLayer)]

    def look(self, model: nn.Module) -> None:
        """Find the layers, and settle their forms, if that was not done since the last change."""
        if self.layers is not None:
            return
        self.layers = self.find(model)
        own = {m for layer in self.layers for m in layer.adapters.modules()}
        self.parents = [m for m in model.modules() if m._modules and m not in own]
        plain = [layer for layer in self.layers if not isinstance(layer, AdaptedExpertWeights)]
        matrices = [p for layer in plain if (p := getattr(layer.base_layer, "weight", None)) is not None]
        fits = 2 * sum([p.nbytes for p in matrices]) <= self.budget  # W', and the gradients that wait for it
        for place, layer in enumerate(self.layers):
            self.parts += [m for m in layer.adapters.modules() if m._parameters]
            adapter: Any
            for adapter in layer.adapters.values():
                self.places[adapter] = len(self.places), place
                SCOPES[adapter] = ref(self)
                adapter.form = self.form if fits else "activations"
                self.rounds |= adapter.makes_weight or adapter.form != "activations"

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if (batch := MIXED.batch) is not None and batch.model is model:
            batch.look(args, kwargs)
        if torch.compiler.is_compiling():  # a whole model in one graph: layers prepare alone, and the compiler arranges it
            return
        if is_transformed():  # nothing is shared, and a tracer would write down that weights were looked at
            return
        if "_is_replica" in vars(model):  # of `DataParallel`: made for this call, it is not to be kept, nor are its layers
            return
        self.look(model)
        if any(["forward" in part.__dict__ for part in self.parts]):  # offloaded since
            bring_adapters(model)
        if model.training and torch.is_grad_enabled():
            self.training_passes += 1
            if self.training_passes == PATIENCE:
                warn_if_penalty_unused(model)
        self.close()  # an earlier pass may have been interrupted past all hooks,
        if torch._C._current_graph_task_id() == -1:
            self.local.clear()  # and an earlier backward
        LOCAL.running = running = ForwardPass(self, LOCAL.running, self._draw_seed(model))
        if torch.is_grad_enabled() and any([is_compiled(m) for m in self.parents]):
            if not any([_is_checkpointed(m) for m in self.parents]):  # else it finds nothing prepared when it runs again
                running.prepare_all()  # compiled code takes what is prepared, and cannot ask for it

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.close()

    def close(self) -> None:
        """The pass of this scope in this thread is over, and those that began within it."""
        passes, running = [], LOCAL.running
        while isinstance(running, ForwardPass):
            passes.append(running)
            if running.scope is self:
                LOCAL.running = running.outer
                for one in passes:
                    one.clear()
                return
            running = running.outer

    def _draw_seed(self, model: nn.Module) -> int | None:
        """One for each pass in training in which W' may be rounded; None where there is none."""
        if not (self.rounds and model.training):
            return None
        dtypes = (layer.base.dtype for layer in self.layers or ())  # now: `model.to` may have changed them
        if not (torch._C._is_any_autocast_enabled() or any(dtype in DROPPED for dtype in dtypes)):
            return None
        seed = int(torch.randint(1 << 62, (), device="cpu"))
        if torch.is_grad_enabled():
            self.seed = seed  # for what its backward runs again
        return seed

    def recomputation(self) -> ForwardPass:
        task = torch._C._current_graph_task_id()
        local = self.local
        if local.running is None or local.task != task:
            local.clear()
            local.task, local.running = task, ForwardPass(self, None, self.seed)
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(local.running.clear)
        return local.running

    def cache_weights(self, budget: int) -> None:
        """Keep W' without gradients, up to a budget of bytes."""
        self.cache.clear()
        self.cache.budget = budget

    def set_form(self, form: Form, budget: int) -> None:
        """See `PeftModel.set_adapter_form`."""
        self.form, self.budget = form, budget
        self._reset()

    def reset(self) -> None:
        """Layers were put in or taken out."""
        self.cache.clear()
        self._reset()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "form": self.form, "budget": self.budget, "handles": self.handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.seed, self.training_passes = None, 0
        self._reset()


class ForwardPass:
    """One pass of a scope in a thread."""

    def __init__(self, scope: Scope, outer: Any, seed: int | None) -> None:
        self.scope, self.outer, self.first_seed = scope, outer, seed
        self.groups: dict[Hashable, list[Member]] | None = None
        self.kinds: dict[Adapter, Hashable] = {}
        self.in_parts = False  # parameters are whole only while the unit that holds them runs
        self.tried: set[Hashable] = set()
        self.filled: list[Prepared] = []

    def prepare_for(self, adapter: Adapter, dtype: torch.dtype, as_weight: bool) -> None:
        if self.groups is None:
            self.groups = self._grouped()
        if self.in_parts and adapter not in self.kinds:
            self._group_unit(adapter)
        kind = self.kinds.get(adapter)
        attempt = kind, dtype, torch.is_grad_enabled(), as_weight
        if kind is None or attempt in self.tried:
            return
        self.tried.add(attempt)
        members = self.groups[kind]
        if members[0].layer.base.dtype is not dtype and not _is_autocast(members[0].known.tensors[0], dtype):
            return
        if as_weight:
            self._prepare_weights(members, dtype)
            return
        kept = self._kept_weights(kind, members, dtype)
        rest = [m for m in members if m.adapter not in kept]
        if len(rest) > 1:
            made = prepare(rest[0].adapter.prepares(dtype), [m.known.tensors for m in rest])  # whichever asks, one seed
            self._fill([(m, factors, None, m.known.tensors) for m, factors in zip(rest, made, strict=True)], dtype)

    def seed(self, adapter: Adapter) -> int | None:
        if self.first_seed is None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return None  # a captured step draws anew in every replay
        return self.first_seed + SEEDS * self.scope.places.get(adapter, (0, 0))[0]

    def prepare_all(self) -> None:
        """For every adapter, in the dtype that its layer runs in."""
        self.groups = self._grouped() if self.groups is None else self.groups
        for members in self.groups.values():
            kind = members[0].known.tensors[0].device.type
            autocast = torch.is_autocast_enabled(kind)
            self.prepare_for(
                members[0].adapter, torch.get_autocast_dtype(kind) if autocast else members[0].layer.base.dtype, False
            )

    def _grouped(self) -> dict[Hashable, list[Member]]:
        """Adapters that prepare alike; none yet where some parameter is not at hand."""
        groups: dict[Hashable, list[Member]] = {}
        if _gradients_may_be_missed():
            return groups
        for layer in self.scope.layers or ():
            members = self._members(layer)
            if members is None:
                self.kinds.clear()
                self.in_parts = True
                return {}
            for member in members:
                self.kinds[member.adapter] = kind = member.known.kind
                groups.setdefault(kind, []).append(member)
        return groups

    def _group_unit(self, adapter: Adapter) -> None:
        """Group this adapter with those after it in the model, as far as their parameters are whole now: a unit of FSDP2."""
        assert self.groups is not None
        layers = self.scope.layers or []
        _, start = self.scope.places.get(adapter, (0, len(layers)))
        for layer in layers[start:]:
            members = self._members(layer)
            if members is None or any(m.adapter in self.kinds for m in members):
                return
            for member in members:
                self.kinds[member.adapter] = unit = (start, member.known.kind)
                self.groups.setdefault(unit, []).append(member)

    def _members(self, layer: AdaptedLayer) -> list[Member] | None:
        """The adapters that run on a layer; None where the parameters of one are not at hand."""
        scope, members = self.scope, []
        running = layer.running()
        for adapter in running:
            tensors = adapter.tensors()
            looks = [(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors]
            known = scope.known.get(adapter)
            if known is None or known.looks != looks or not all(map(is_, known.tensors, tensors)):
                if not all([_is_at_hand(t) for t in tensors]):
                    return None
                alike = type(adapter), adapter.batch_key(), adapter.shard, layer.base.dtype, *looks
                known = Known(tensors, looks, scope.kinds.setdefault(alike, len(scope.kinds)))
                scope.known[adapter] = known
            members.append(Member(layer, adapter, known, len(running) == 1))
        return members

    def _prepare_weights(self, members: list[Member], dtype: torch.dtype) -> None:
        """W' of all of them, in training."""
        shapes: dict[torch.Size, list[tuple[Member, Tensor]]] = {}
        for member in members:
            if (W := member.plain(dtype)) is not None:
                shapes.setdefault(W.shape, []).append((member, W))
        for pairs in shapes.values():
            adapter = pairs[0][0].adapter
            weights = Weights(adapter, dtype, [W for _, W in pairs], adapter.dither(dtype))
            made = prepare(weights, [m.known.tensors for m, _ in pairs])
            self._fill([(m, (), new, (*m.known.tensors, W)) for (m, W), (new,) in zip(pairs, made, strict=True)], dtype)

    def _kept_weights(self, kind: Hashable, members: list[Member], dtype: torch.dtype) -> set[Adapter]:
        """Serve those members for which there is room in the cache with W'; which they are."""
        cache = self.scope.cache
        if not cache.budget or self.in_parts:  # whole weights are not kept beside parts
            return set()
        if torch.is_grad_enabled() or any([m.adapter.training for m in members]):
            cache.clear()  # the memory is training's
            return set()
        matrices = [m.plain(dtype) for m in members]
        found = cache.weights(kind, [m.adapter for m in members], [m.known.tensors for m in members], matrices)
        there = [(m, W, new) for m, W, new in zip(members, matrices, found, strict=True) if W is not None and new is not None]
        self._fill([(m, (), new, (*m.known.tensors, W)) for m, W, new in there], dtype)
        return {m.adapter for m, _, _ in there}

    def _fill(self, made: list[tuple[Member, Tensors, Tensor | None, Tensors]], dtype: torch.dtype) -> None:
        """Leave factors, or W', and what they were made from where each adapter looks for them."""
        recorded = torch.is_grad_enabled()
        for member, factors, adapted, made_from in made:
            adapter, stream = member.adapter, stream_of(made_from[0])
            adapter.slot.prepared = ready = Prepared(factors, adapted, dtype, recorded, stream, seen(made_from))
            vars(adapter)["alone"] = False
            self.filled.append(ready)

    def clear(self) -> None:
        """The pass is over: what was prepared lives on only in graphs that use it."""
        for prepared in self.filled:
            prepared.release()
        self.filled, self.groups, self.kinds = [], None, {}


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether transformers, or torch's `apply_activation_checkpointing`, runs the module in a checkpoint."""
    return vars(module).get("gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"


def _is_at_hand(t: Tensor) -> bool:
    """Whether a parameter may be read at any time: no part of a sharded, flat, offloaded or replicated one."""
    return (
        type(t) is nn.Parameter
        and not (t.is_meta or t.is_inference())
        and t.numel() > 0
        and not (hasattr(t, "_fsdp_flattened") or hasattr(t, "ds_id"))
    )


def _is_autocast(t: Tensor, dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled(t.device.type) and torch.get_autocast_dtype(t.device.type) is dtype


def _gradients_may_be_missed() -> bool:
    """Whether data-parallel training looks for parameters without a gradient: one node for all layers would hide them."""
    ddp = DistributedDataParallel._active_ddp_module
    return ddp is not None and torch.is_grad_enabled() and bool(ddp.find_unused_parameters or ddp.static_graph)
