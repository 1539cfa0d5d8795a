"""What a model of a pipeline needs to have adapters beside what diffusers does with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from types import MethodType
from typing import Any

from torch import nn

from ...core.errors import HalotuneError
from ...core.layer import AdaptedLayer
from ...core.offload import group_hook
from ...engine.injection.in_place import adapters_in, forget
from ...engine.injection.modules import adapted_layers, per_adapter
from ...engine.injection.surgery import remove, taken_out
from ...engine.tuner import AdapterModel


def follow(model: nn.Module, tuner: AdapterModel) -> None:
    """Take notice of what diffusers' own methods, which act on the layers, changed."""
    layers = adapted_layers(model).values()
    left = {n for module in per_adapter(model).values() for n in module.by_name}
    for name in [n for n in tuner.peft_config if n not in left]:
        remove(model, name)
        del tuner.peft_config[name]
    tuner.active = in_order(layer.active_adapters for layer in layers)
    if not tuner.peft_config:
        forget(model)
        tidy(model)


def in_order(sequences: Iterable[Sequence[str]]) -> list[str]:
    """All names of several sequences, in the order that these agree on."""
    sequences = list(sequences)
    graph: TopologicalSorter[str] = TopologicalSorter()
    for names in sequences:
        for i, name in enumerate(names):
            graph.add(name, *names[:i])
    try:
        return list(graph.static_order())
    except CycleError:  # models that were set one by one, with diffusers' methods
        return list(dict.fromkeys(chain.from_iterable(sequences)))


def mark(model: nn.Module) -> None:
    """Let diffusers know that the model has adapters, and replace what would go wrong with them silently."""
    if _is_of_diffusers(model):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    for name, replacement in _REPLACED.items():
        if hasattr(type(model), name):
            model.__dict__[name] = MethodType(_around(getattr(type(model), name), replacement), model)


def tidy(model: nn.Module) -> None:
    """Adapters were taken out."""
    if adapters_in(model) is None:
        for name in _REPLACED:
            model.__dict__.pop(name, None)
        if _is_of_diffusers(model) and not hasattr(model, "peft_config"):
            model.__dict__.pop("_hf_peft_config_loaded", None)
    reapply_group_offloading(model)


def _around(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)  # pipelines read the signature
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, original, *args, **kwargs)

    return method


def _save_pretrained(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Without adapters: with their names among its own the file would be one that no pipeline can load."""
    with taken_out(model):
        return original(model, *args, **kwargs)


def _fuse_qkv_projections(model: nn.Module, original: Callable[..., Any]) -> Any:
    """It takes over the weights alone."""
    if any(layer.running() for layer in adapted_layers(model).values()):
        raise HalotuneError(
            f"fuse_qkv_projections: it would leave out the adapters of the {type(model).__name__}. Fuse these first, or take "
            "them out."
        )
    return original(model)


def _fuse_lora(model: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A LoRA over ours would write to the same weight, and each restore it in its own way."""
    check_alone(model, "fuse_lora")
    return original(model, *args, **kwargs)


_REPLACED = {"save_pretrained": _save_pretrained, "fuse_qkv_projections": _fuse_qkv_projections, "fuse_lora": _fuse_lora}


def check_alone(model: nn.Module, what: str) -> None:
    """A LoRA that diffusers loaded lies around our layers, or where one of ours is to be."""
    base = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    if base is not None and any(isinstance(m, base) and not isinstance(m, AdaptedLayer) for m in model.modules()):
        raise HalotuneError(
            f"{what}: the {type(model).__name__} has layers of peft, such as those of a LoRA from load_lora_weights. Take all "
            "adapters out (pipe.unload_lora_weights), then load halotune's first: LoRAs can be loaded over them."
        )


def _is_of_diffusers(model: nn.Module) -> bool:
    mixin = getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)
    return mixin is not None and isinstance(model, mixin)


def reapply_group_offloading(model: nn.Module) -> None:
    """Group offloading lists a model's parameters once; where layers were put in or taken out it must list them again."""
    if any(group_hook(m) is not None for m in model.modules()):
        from diffusers.hooks import group_offloading

        group_offloading._maybe_remove_and_reapply_group_offloading(model)  # as diffusers does after loading a LoRA


def check_in_memory(model: nn.Module) -> None:
    for module in model.modules():
        hook = group_hook(module)
        if hook is not None and hook.group.offload_to_disk_path is not None:
            raise HalotuneError(
                f"group offloading keeps the weights of the {type(model).__name__} in files, which adapters put in, taken out "
                "or fused now would not reach. Do that first, or offload to memory (without offload_to_disk_path)."
            )
