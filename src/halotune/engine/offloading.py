"""What cannot be adapted or trained of a model that accelerate offloads: refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..core.attention import AdaptedAttention
from ..core.config import AdapterConfig
from ..core.errors import HalotuneError
from ..core.layer import AdaptedLayer
from ..core.offload import offload_hook


def check_offloaded(
    modules: Mapping[str, nn.Module], config: AdapterConfig, paths: Iterable[str], whole: Iterable[str]
) -> None:
    """Offloaded weights are there for one call at a time, so nothing of the base can be trained.

    Args:
        modules: the model's modules, by name.
        paths: those to be adapted.
        whole: those to be trained whole.

    Raises:
        HalotuneError: the configuration asks for what would get no gradient, or would not run.
    """
    hooks = {n: hook for n, m in modules.items() if (hook := offload_hook(_stored(m))) is not None}
    if not hooks:
        return
    for path in whole:
        if any(_holds(path, n) for n in hooks):
            raise HalotuneError(
                f"modules_to_save: {path!r} is offloaded by accelerate, so no copy of it can be trained. Keep it on the device "
                "where it runs, or leave it out."
            )
    bias = getattr(config, "bias", "none")
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
