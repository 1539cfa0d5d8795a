"""Models that accelerate or diffusers offload: what cannot be adapted or trained of them, and where adapters stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...core.attention import AdaptedAttention
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.layer import AdaptedLayer
from ...core.offload import GROUP_OFFLOADING, group_hook, offload_hook


def check_offloaded(
    modules: Mapping[str, nn.Module], config: AdapterConfig, paths: Iterable[str], to_save: Iterable[str]
) -> None:
    """Offloaded weights are there for one call at a time, so nothing of the base can be trained.

    Args:
        modules: the model's modules, by name.
        paths: those to be adapted.
        to_save: those to be fully fine-tuned.

    Raises:
        HalotuneError: the configuration asks for what would get no gradient, or would not run.
    """
    hooks = {n: hook for n, m in modules.items() if (hook := offload_hook(_stored(m))) is not None}
    if not hooks:
        return
    for path in to_save:
        if any(_holds(path, n) for n in hooks):
            raise HalotuneError(
                f"modules_to_save: {path!r} is offloaded by accelerate, so no copy of it can be trained. Keep it on the device "
                "where it runs, or leave it out."
            )
    bias = config.bias
    for n in () if bias == "none" else hooks if bias == "all" else paths:
        if n in hooks and getattr(modules[n], "bias", None) is not None:
            raise HalotuneError(
                f"bias={bias!r}: {n!r} is offloaded by accelerate, so its bias cannot be trained. Keep it on the device where "
                'it runs, or use bias="none".'
            )
    for path in paths:
        for n, hook in hooks.items():
            block = hook.place_submodules or isinstance(modules[n], (nn.MultiheadAttention, AdaptedAttention))
            if n != path and block and _holds(n, path):
                raise HalotuneError(
                    f"{path!r}: accelerate offloads {n!r} as one block, from a map of weights that knows no adapters. Offload "
                    "layer by layer (without preload_module_classes, which attention modules need), or leave it out with "
                    "exclude_modules."
                )


def _stored(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, (AdaptedLayer, AdaptedAttention)) else module


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def bring_adapters(model: nn.Module) -> None:
    """Let adapters stay where they run, in a model that was offloaded layer by layer after they were put in.

    They are small, and read outside their own calls: in a merge, into a file, by the adapter after them.
    """
    for layer in [m for m in model.modules() if isinstance(m, AdaptedLayer)]:
        for part in layer.adapters.modules():
            if part._parameters and "forward" in part.__dict__:
                _release(part)


def _release(part: nn.Module) -> None:
    if (hook := offload_hook(part)) is not None:
        from accelerate.hooks import remove_hook_from_module

        away = dict(part._parameters)
        remove_hook_from_module(part)
        part.to(hook.execution_device)
        for name, p in part._parameters.items():
            if p is not None and (known := away[name]) is not p:  # an optimizer may know the parameter already
                torch.utils.swap_tensors(known, p)
                part._parameters[name] = known
    elif (hook := group_hook(part)) is not None:
        hook.group.onload_()
        if hook.group.stream is not None:
            hook.group.stream.synchronize()
        part._diffusers_hook.remove_hook(GROUP_OFFLOADING, recurse=False)  # type: ignore[union-attr, operator]
    del part.forward  # both leave the class's own there
