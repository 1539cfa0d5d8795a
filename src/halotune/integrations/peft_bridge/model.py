"""A model of peft's, made fast in place, and made slow again."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ...core.errors import HalotuneError, warn
from ...core.layer import AdaptedLayer
from ...engine.forward.prepare import Scope
from ...engine.injection.activation import per_sample
from ...engine.injection.modules import plain_modules, tied_parameters
from ...methods.registry import methods
from .classes import InFront, put_in_front, runs_own_forward, take_away
from .layer import FastLayer, PeftAdaptedLayer, follow, method_of_layer, say_once

M = TypeVar("M", bound=nn.Module)


def speed_up(model: M) -> M:
    """Let halotune compute the HRA, OFT, LoHa and MiSS / BAT layers of a live peft model, in place.

    Parameters, their names, files, optimizer states and peft's API stay as they are: layers get a class of ours in front of
    their own. Adapters that are added, loaded, switched or deleted later are covered. Where peft is wrong the result is
    right, and a warning says so once. Over a half-precision base products run in its dtype, as peft's LoRA does it.

    Args:
        model: whatever `peft.get_peft_model`, `peft.PeftModel.from_pretrained`, `peft.inject_adapter_in_model` or a
            transformers or diffusers model's `add_adapter` made. Twice is as good as once.

    Returns:
        the same object. A whole-model pickle of it needs halotune to be read; `slow_down` gives one that does not.

    Raises:
        HalotuneError: there is no layer to speed up.
    """
    if not isinstance(model, nn.Module):
        raise HalotuneError(
            f"speed_up: expected a model; got a {type(model).__name__}. Of a pipeline, give the part with the adapters, such "
            "as pipe.unet."
        )
    tuners = _tuners(model)
    for host in [tuner.model for tuner in tuners] or [model]:  # every way to run a base, `generate` too, calls it as a module
        bridge = _bridge_of(host) or Bridge(host)
        bridge.take_in(host)
        if not bridge.fast:
            bridge.remove()
    for tuner in tuners:
        if _is_fast(tuner) and not isinstance(tuner, FastTuner):
            put_in_front(FastTuner, tuner)
    if not _is_fast(model):
        known = ", ".join(m.peft_type for m in methods() if m.from_peft)
        raise HalotuneError(
            f"speed_up: this {type(model).__name__} has no layer of peft's {known} that can be run here. Models made by "
            "halotune.get_peft_model are fast as they are; peft's other methods stay peft's."
        )
    return model


def slow_down(model: M) -> M:
    """Undo `speed_up`: peft's own classes compute again. Merged adapters stay merged, and peft unmerges them its own way.

    Returns:
        the same object.
    """
    for module in list(model.modules()):
        if isinstance(module, InFront):
            take_away(module)
            module.__dict__.pop("_halotune", None)
        if (bridge := _bridge_of(module)) is not None:
            bridge.remove()
    return model


def _tuners(model: nn.Module) -> list[Any]:
    peft = sys.modules.get("peft.tuners.tuners_utils")  # where it was never imported, there is no model of its
    return [] if peft is None else [m for m in model.modules() if isinstance(m, peft.BaseTuner)]


def _is_fast(model: nn.Module) -> bool:
    return any(isinstance(m, FastLayer) for m in model.modules())


def _bridge_of(host: nn.Module) -> Bridge | None:
    owners = (getattr(hook, "__self__", None) for hook in host._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Bridge)), None)


class Bridge(Scope):
    """The hooks of one base model: they find the layers, keep ours up to date, and prepare for all of them at once."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.fast: dict[str, FastLayer] = {}
        self.configs: list[Any] | None = None

    def find(self, model: nn.Module) -> list[AdaptedLayer]:
        return [layer._halotune for layer in self.fast.values()]

    def _begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            if list(map(id, self.configs or ())) != list(map(id, _configs(model))):
                self.take_in(model)
            for layer in self.fast.values():
                follow(layer)
            self._tell()
        super()._begin(model, args, kwargs)

    def take_in(self, host: nn.Module) -> None:
        """Speed up the layers that are new since the last time."""
        self.reset()
        self.configs = _configs(host)
        shared = {n for names in tied_parameters(host) for n in names}
        left: dict[str, str] = {}
        layer: Any
        for path, layer in host.named_modules():
            method = method_of_layer(layer)
            if method is not None and not isinstance(layer, FastLayer):
                try:
                    adapted = PeftAdaptedLayer(layer, method, path)
                    adapted.follow(layer, getattr(layer, layer.adapter_layer_names[0]))
                    if not runs_own_forward(layer):
                        raise HalotuneError("somebody has replaced its forward")
                except HalotuneError as e:
                    left[path] = str(e)
                    continue
                put_in_front(FastLayer, layer)
                layer.__dict__["_halotune"] = adapted  # past nn.Module, which would take it for a submodule
            if isinstance(layer, FastLayer):
                adapted = layer._halotune
                if not adapted.merged:  # else it may have a weight of its own for the time being
                    adapted.tied = f"{path}.base_layer.weight" in shared
                self.fast[path] = layer
        if left:
            path, reason = next(iter(left.items()))
            warn(f"speed_up: {_few(list(left))} stay peft's own, the first because: {reason}")
        self._tell()

    def _tell(self) -> None:
        """Say what peft gets wrong in this model."""
        found: dict[str, list[str]] = {}
        for path, layer in self.fast.items():
            for note in layer._halotune.notes:
                found.setdefault(note, []).append(path)
            layer._halotune.notes.clear()
        for note, paths in found.items():
            say_once(f"{_few(paths)}: {note}.")

    def reset(self) -> None:
        super().reset()
        self.fast, self.configs = {}, None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fast": {}, "configs": None}


def _configs(host: nn.Module) -> list[Any]:
    """peft's configurations, which it keeps on the base model: other ones mean other adapters, and new layers perhaps."""
    return list(getattr(host, "peft_config", {}).values())


def _few(paths: Sequence[str]) -> str:
    rest = len(paths) - 1
    return paths[0] + (f" and {rest} more layer{'s' * (rest > 1)}" if rest else "")


class FastTuner(InFront):
    """Goes in front of a tuner's class: mixed batches work, and a model that leaves peft leaves this too."""

    def unload(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The base without adapters, and without a trace of ours."""
        return self._leave(super().unload, *args, **kwargs)  # type: ignore[misc]

    def merge_and_unload(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """The base with the adapters in its weights, and without a trace of ours."""
        return self._leave(super().merge_and_unload, *args, **kwargs)  # type: ignore[misc]

    def _leave(self: Any, by_peft: Any, *args: Any, **kwargs: Any) -> nn.Module:
        bridge = _bridge_of(self.model)
        if bridge is not None:
            bridge.reset()  # else it would hold the snapshots of all layers until the last one is merged
        base = by_peft(*args, **kwargs)
        slow_down(self)
        return base

    @contextmanager
    def _enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What peft enters around a forward pass or `generate`; its HRA, LoHa and MiSS have none, and drop `adapter_names`."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers: dict[str, Any] = {path: m for path, m in plain_modules(self.model) if isinstance(m, BaseTunerLayer)}
        slow = [path for path, m in layers.items() if not isinstance(m, FastLayer)]
        if slow:
            raise HalotuneError(
                f"adapter_names: {_few(slow)} cannot be run here, and peft's own layers would ignore the names."
            )
        say_once("adapter_names: each sample goes through its own adapter; peft ignores the names for this method.")
        for layer in layers.values():
            follow(layer, names)
        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    hook = partial(_with_names, names=names)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            adapted = {path: layer._halotune for path, layer in layers.items()}
            stack.enter_context(per_sample(self.model, names, modules=adapted))
            yield


def _with_names(module: nn.Module, args: Any, kwargs: dict[str, Any], *, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """peft's trained copies of modules take the names as an argument, one per row."""
    repeats = args[0].shape[0] // len(names) if args else 1  # beams
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}
