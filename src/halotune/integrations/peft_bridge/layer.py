"""One layer of peft's that computes as ours does. What it holds, and all that peft does with it, stays peft's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.base import base_for
from ...core.errors import HalotuneError, warn
from ...core.layer import AdaptedLayer
from ...core.prepared import compute_dtype, is_transformed
from ...engine.weights.merge import check_order
from ...methods.registry import Method, method_of, methods
from .classes import InFront

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warn(message)


def method_of_layer(layer: nn.Module) -> Method | None:
    """The method that a layer is of, if peft made it and ours gains by it. peft's parameters have our prefixes."""
    names = getattr(layer, "adapter_layer_names", ())
    if not names or not type(layer).__module__.startswith("peft."):
        return None
    return next((m for m in methods() if m.from_peft and all(n.startswith(m.prefix) for n in names)), None)


class PeftAdaptedLayer(AdaptedLayer):
    """A layer of peft's as one of ours, on the same base layer and the same `Parameter` objects.

    It is no submodule of peft's layer and owns nothing, so names, files and optimizers do not see it. `follow` takes over
    whatever has changed in peft's layer since: parameters may be replaced by loading, sharding, conversions. That is looked
    up once for each layer and forward pass, so it compares objects, and goes past nn.Module's slow ways to get and set them.
    """

    def __init__(self, layer: Any, method: Method, path: str) -> None:
        super().__init__(layer.base_layer, path)
        self.peft_type, self.path = method.peft_type, path
        self.tied = False  # the base's weight is some other module's too
        # Of peft's layer, as seen last: whether it is disabled, active and merged adapters; where it keeps an adapter's parts.
        self.state: tuple[Any, ...] | None = None
        self.sources: dict[str, list[tuple[dict[str, Any], str, Any]]] = {}
        self.notes: list[str] = []  # what peft itself gets wrong here, and has not been said yet

    def follow(self, layer: Any, names: Iterable[str] = ()) -> None:
        """Be as peft's layer is now.

        Args:
            names: adapters that are wanted beside the active ones.
        """
        if self._modules["base_layer"] is not layer._modules["base_layer"]:  # peft replaces it where it cannot write to it
            self.base_layer = layer.base_layer
            self._kind = type(base_for(self.base_layer, self.path))
        state = (layer.disable_adapters, *layer.active_adapters, None, *layer.merged_adapters)
        there = layer._modules[layer.adapter_layer_names[0]]
        if state != self.state:
            elsewhere = [n for n in layer.merged_adapters if n not in self.merged_adapters]  # merged by peft, before
            self.active_adapters = [n for n in layer.active_adapters if n in there and n not in elsewhere]
            self.enabled, self.state = not layer.disable_adapters, state
            from_peft = method_of(self.peft_type).from_peft
            if from_peft and from_peft.several and len(self.active_adapters) > 1:
                self.notes.append(from_peft.several)
        for name in (*self.active_adapters, *(n for n in names if n in there)):
            if not self._is_current(name):
                self._take_over(layer, name)
            adapter = self.adapters[name]
            if adapter.training is not layer.training:
                adapter.train(layer.training)

    def drop(self, name: str) -> None:
        """peft's layer lost this adapter."""
        if name in self.adapters:
            del self.adapters[name], self.scales[name]
        self.sources.pop(name, None)
        self.state = None

    def _is_current(self, name: str) -> bool:
        return name in self.sources and all([kept.get(key) is value for kept, key, value in self.sources[name]])

    def _take_over(self, layer: Any, name: str) -> None:
        """Make the adapter anew, on peft's parameters."""
        from_peft, base = method_of(self.peft_type).from_peft, self.base
        assert from_peft is not None
        with torch.device("meta"):
            adapter = from_peft.adapter(layer, name, base.shape)
        for attribute, own in list(adapter.named_parameters()):
            part, _, inner = attribute.partition(".")  # our `part.inner` is peft's `part[name].inner`
            p = getattr(layer, part)[name]
            p = getattr(p, inner) if inner else p
            if own.shape != p.shape and hasattr(p, "_fsdp_flattened"):
                raise HalotuneError(
                    "speed_up: FSDP1 has flattened peft's parameters, which only peft's own forward finds. Shard the model "
                    "with FSDP2 or DDP, or leave speed_up out (slow_down)"
                )
            if own.shape != p.shape:
                raise HalotuneError(f"{attribute} is {tuple(p.shape)}, where a weight of {base.shape} needs {tuple(own.shape)}")
            (getattr(adapter, part) if inner else adapter)._parameters[inner or part] = p
        if not is_transformed():  # which numbers cannot be looked at
            warning = adapter.loading_warning(*adapter.parameters())
            self.notes += [*from_peft.differs(layer, name, base), *([warning] if warning else [])]
        self.add(name, adapter)
        self.sources[name] = list(_sources(layer, name))


def _sources(layer: Any, name: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where peft keeps what it knows of an adapter: dictionary, key, and the object there."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        kept: Any = getattr(layer, attribute)
        kept = getattr(kept, "_modules" if isinstance(kept, nn.ModuleDict) else "_parameters", kept)
        yield kept, name, kept.get(name)
        if isinstance(kept.get(name), nn.Dropout):
            yield kept[name].__dict__, "p", kept[name].p
        elif isinstance(kept.get(name), nn.Module):
            yield from ((kept[name]._parameters, inner, p) for inner, p in kept[name]._parameters.items())


def follow(layer: Any, names: Iterable[str] = ()) -> bool:
    """Let the layer's `_halotune` be as the layer is."""
    layer._halotune.follow(layer, names)
    return True


class FastLayer(InFront):
    """Goes in front of a layer's class. `_halotune`, its adapted, computes in its place and merges exactly."""

    _halotune: PeftAdaptedLayer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch.compiler.assume_constant_result(follow)  # while a graph is traced, run it; here, since it imports the compiler

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer, in the dtype of `x` as with peft; calls with further arguments are peft's."""
        adapted = self._halotune
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        follow(self)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return adapted(_as_base_takes(x, adapted)).to(x.dtype)

    # Compiled code is guarded by what `_halotune` holds: so it changes when peft's layer does, not at the next call.

    def set_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self._halotune.state = None
        follow(self)

    def enable_adapters(self: Any, enabled: bool) -> None:
        super().enable_adapters(enabled)  # type: ignore[misc]
        follow(self)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self._halotune.drop(adapter_name)
        follow(self)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:  # may bring a new dtype or device into the same objects
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        self._halotune.sources.clear()
        follow(self)
        return self

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base, after a check for values that are not finite (with or without `safe_merge`).

        A snapshot is kept, from which `unmerge` restores every bit.

        Raises:
            HalotuneError: a merged weight is not finite; or adapters that stay active would have to apply first.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        wanted, adapted = check_adapters_to_merge(self, adapter_names), self._halotune
        follow(self, wanted)
        names = [n for n in dict.fromkeys(wanted) if n in adapted.adapters]
        if not names:
            return
        check_order(adapted.path, adapted, names)
        adapted.base.require_mergeable(adapted.path)
        adapted.check_finite(names, adapted.path)
        if left := [n for n in adapted.active_adapters if n not in (*names, *adapted.merged_adapters)]:
            say_once(f"{left} stay active beside the merged adapters and are applied; peft drops them.")
        if adapted.tied:
            say_once(
                f"{adapted.path} shares its weight; the merge gives it one of its own, where peft changes the other module."
            )
        adapted.merge(names, untie=adapted.tied and not adapted.merged)
        self.merged_adapters.extend(names)

    def unmerge(self: Any) -> None:
        """Put the base's weight back as it was, bit for bit; what peft had merged before, peft takes out."""
        adapted = self._halotune
        ours = adapted.merged_adapters
        if ours and adapted.base.dtype.itemsize < 4:
            say_once(
                f"adapters are unmerged from a snapshot, bit for bit; peft undoes a merge by arithmetic in "
                f"{adapted.base.dtype}, which leaves other weights than before."
            )
        adapted.unmerge()
        self.merged_adapters = [n for n in self.merged_adapters if n not in ours]
        if self.merged_adapters or not ours:
            super().unmerge()  # type: ignore[misc]


def _as_base_takes(x: Tensor, adapted: PeftAdaptedLayer) -> Tensor:
    """`x` in the base's dtype where a plain base takes no other; autocast sees to its own inputs."""
    base = adapted.base
    if base.quantization or not x.is_floating_point() or compute_dtype(x) is not x.dtype:
        return x
    return x.to(base.dtype)
