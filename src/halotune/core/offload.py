"""Weights that are away while their module does not run.

accelerate keeps them on the CPU or on disk, with the module's own tensor on the meta device. diffusers' group offloading
moves the module's own tensors, for the time of a call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def _accelerate_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def offload_hook(module: nn.Module) -> Any | None:
    """The hook that brings the module's weights to where it runs, or None."""
    offloading = (h for h in _accelerate_hooks(module) if getattr(h, "offload", False))
    return next((h for h in offloading if getattr(h, "weights_map", None) is not None), None)


def at_rest(module: nn.Module, name: str) -> Tensor:
    """A tensor of the module, from where accelerate keeps it; still of the meta device where nobody has it."""
    own = getattr(module, name)
    hook = offload_hook(module) if own.is_meta else None
    return own if hook is None else hook.weights_map[name]


GROUP_OFFLOADING = "group_offloading"  # diffusers' name of its hook


def group_hook(module: nn.Module) -> Any | None:
    """The hook of diffusers' group offloading on this module itself, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(GROUP_OFFLOADING)


def is_offloaded(module: nn.Module) -> bool:
    return offload_hook(module) is not None or group_hook(module) is not None


def only_places(module: nn.Module) -> bool:
    """Whether a `forward` set on the module is accelerate's, which brings tensors to a device and calls the class's own."""
    hooks, own = _accelerate_hooks(module), getattr(module, "_old_forward", None)
    return (
        bool(hooks)
        and all(type(h).__name__ == "AlignDevicesHook" for h in hooks)
        and (getattr(own, "__func__", None) is type(module).forward)
    )


def brought(x: Tensor, module: nn.Module) -> Tensor:
    """x where accelerate's hook would bring it in a call of the module: adapters meet it there."""
    devices = [getattr(h, "execution_device", None) for h in _accelerate_hooks(module)]
    return next((x.to(device) for device in devices if device is not None), x)
