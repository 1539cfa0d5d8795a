"""Putting adapters into a model's layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...core.adapter import Adapter
from ...core.attention import Projection
from ...core.base import Base
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, warn
from ...core.experts import AdaptedExperts, ExpertWeights
from ...core.layer import AdaptedLayer
from ...core.trial import unusual_output
from ...methods.registry import method_of
from .experts import attach, create, layer_for
from .modules import adapted_layers, is_attention, is_expert_weights, tied_parameters, visible_modules
from .modules_to_save import ModulesToSaveWrapper
from .offloading import check_offloaded
from .resolve import modules_to_save_paths, resolve_targets, spelled_out
from .surgery import leave_fused_paths, swap, tie_own_modules
from .tensor_parallel import begin_alike, check_shards


def check_name(name: str) -> None:
    """Adapter names become names of modules and of folders."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_\-]*", name) or hasattr(nn.ModuleDict, name):
        raise HalotuneError(
            f"adapter name {name!r}: use letters, digits, '_' and '-' (it names a folder and a module), and none of the "
            "names that torch.nn.ModuleDict has itself, such as 'keys' or 'update'."
        )


def inject(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    low_cpu_mem_usage: bool,
    autocast_adapter_dtype: bool,
    paths: list[str] | None,
) -> AdapterConfig:
    """Put an adapter named `name` on every target; the model is untouched where an error is raised.

    Args:
        low_cpu_mem_usage: create the parameters on the meta device, to be loaded afterwards.
        autocast_adapter_dtype: parameters in fp32 over a half-precision base; else in the base's dtype.
        paths: the modules to adapt, where they are known already.

    Returns:
        the configuration with its targets spelled out.
    """
    check_name(name)
    if paths is None:
        config, paths = resolve_targets(model, config)
    else:
        config = spelled_out(config, paths, dict(visible_modules(model)))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if isinstance(model, nn.MultiheadAttention):
        raise HalotuneError(
            "the model itself is a torch.nn.MultiheadAttention, and attention is adapted in its place in a model. Make it a "
            "submodule of one."
        )
    modules = dict(visible_modules(model))
    method = method_of(config.peft_type)
    created: dict[str, tuple[AdaptedLayer, Adapter]] = {}
    for path in paths:
        module = modules[path]
        layer = module if isinstance(module, AdaptedLayer) else layer_for(module, path)
        if name in layer.adapters:
            raise HalotuneError(f"{path}: already has an adapter named {name!r}. Delete it first, or use another name.")
        base = layer.base
        with torch.device("meta") if low_cpu_mem_usage else torch.device(base.device):
            try:
                adapter = create(method, layer.base_layer, base.shape, config.at(path))
            except HalotuneError as e:
                raise HalotuneError(f"{path}: {e}") from e
        if is_attention(modules.get(path.rpartition(".")[0])):
            _check_projection(path, base, adapter)
        created[path] = layer, adapter.to(_parameter_dtype(base.dtype, autocast_adapter_dtype))
    to_save = modules_to_save_paths(modules, config)
    check_shards(modules, created, to_save)
    reading = _reading_weights(created)
    if not low_cpu_mem_usage:
        for layer, adapter in created.values():
            adapter.start_from(layer.base)
    begin_alike(created.values())
    _check_free(model, modules, paths, to_save)
    check_offloaded(modules, config, paths, to_save)
    for notice in [*([] if low_cpu_mem_usage else config.notices()), *reading]:
        warn(notice)
    _warn_if_tied(model, [*paths, *to_save])
    holders = _holders(modules, created)
    swap(model, holders)
    for holder in holders.values():
        if isinstance(holder, AdaptedExperts):
            attach(holder)
    wrappers: dict[nn.Module, nn.Module] = {}
    for path, (layer, adapter) in created.items():
        layer.add(name, adapter)
        wrappers[modules[path]] = layer.train(modules[path].training)
    for path in to_save:
        wrapper = modules[path] if isinstance(modules[path], ModulesToSaveWrapper) else ModulesToSaveWrapper(modules[path])
        wrapper.add(name)  # type: ignore[operator]
        wrappers[modules[path]] = wrapper.train(modules[path].training)
    swap(model, {old: new for old, new in wrappers.items() if old is not new})
    leave_fused_paths(model)
    tie_own_modules(model)
    return config


def _check_free(model: nn.Module, modules: Mapping[str, nn.Module], paths: Iterable[str], to_save: Iterable[str]) -> None:
    """Refuse what would never run, or hold another adapter."""
    compiled = {m._modules["_orig_mod"] for m in model.modules() if "_orig_mod" in m._modules}
    for path in (*paths, *to_save):
        if path and modules[path] in compiled:
            raise HalotuneError(
                f"{path}: torch.compile wraps this module itself, and would go on calling it without its adapter. Put adapters "
                f"in before it is compiled, or compile it in place: model.{path}.compile()."
            )
    for path in to_save:
        inside = [path] if isinstance(modules[path], AdaptedLayer) else [f"{path}.{n}" for n in adapted_layers(modules[path])]
        if inside:
            raise HalotuneError(
                f"modules_to_save: {path!r} would be copied with the adapters of {inside[0]}, and no file can hold that copy. "
                "Give this adapter the same targets instead, or delete the other first."
            )


def _holders(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> dict[nn.Module, nn.Module]:
    """Attention and experts modules that are to be wrapped, since one of these paths is a projection of theirs."""
    out: dict[nn.Module, nn.Module] = {}
    for path in paths:
        parent = path.rpartition(".")[0]
        holder = modules.get(parent)
        if holder is not None and (isinstance(holder, nn.MultiheadAttention) or is_expert_weights(modules[path])):
            views = (m for n, m in modules.items() if n.startswith(f"{parent}.") and isinstance(m, (Projection, ExpertWeights)))
            owner = next((m.__dict__["owner"] for m in views), holder)
            if owner is not holder:
                out[holder] = owner
    return out


def _reading_weights(created: Mapping[str, tuple[AdaptedLayer, Adapter]]) -> list[str]:
    """Notices on adapters that need the weight itself, of layers that have it in few bits; refused where they cannot."""
    found: list[tuple[str, Adapter, str]] = []
    for path, (layer, adapter) in created.items():
        base = layer.base
        _check_calls(path, base, adapter)
        if not (base.quantization and adapter.reads_weight(base)):
            continue
        if base.opaque:
            raise HalotuneError(
                f"{path}: {type(adapter).__name__} is a map on the weight itself, and that of {base} cannot be read. Use a "
                "method that calls the layer as it is (low-rank deltas and rotations do), or load the base in floats."
            )
        found.append((path, adapter, base.quantization))
    if not found:
        return []
    path, adapter, quantization = found[0]
    return [
        f"{type(adapter).__name__} with r={adapter.rank} may need the weight itself: {len(found)} quantized layers (such as "
        f"{path}, {quantization}) are then dequantized, one at a time, in every forward and backward pass. Methods and ranks "
        "with low-rank factors call the layer as it is."
    ]


def _check_projection(path: str, base: Base, adapter: Adapter) -> None:
    """Attention is run with other weights in the place of its own."""
    if adapter.dropout:
        raise HalotuneError(
            f"{path}: the projections of torch.nn.MultiheadAttention are adapted as weights, where dropout is not defined; "
            f"got {adapter.dropout:g}. Set the dropout to 0, or leave the module out with exclude_modules."
        )
    if not isinstance(base.parameter, nn.Parameter):
        raise HalotuneError(
            f"{path}: the projections of torch.nn.MultiheadAttention are adapted as weights, and this one is computed from "
            "other parameters. Make it a plain parameter first, or leave the module out with exclude_modules."
        )


def _check_calls(path: str, base: Base, adapter: Adapter) -> None:
    """Refuse an adapter on a layer that does not do what it says, as far as this adapter needs it."""
    if base.opaque:
        return
    replaces, reads = adapter.replaces_weight(base), adapter.reads_weight(base)
    if (replaces or reads) and not base.is_product(written=replaces):
        raise HalotuneError(
            f"{path}: {type(adapter).__name__} is a map on the weight itself, and this {type(base.module).__name__} "
            f"{base.does_more}. Use a method that calls the layer as it is (low-rank deltas and rotations do), or leave the "
            "layer out with exclude_modules."
        )
    if not base.takes_weight and not base.quantization and (answer := unusual_output(base)):
        raise HalotuneError(
            f"{path}: this {type(base.module).__name__} {base.shape} {base.does_more}: it gives {answer}. Leave it out with "
            "exclude_modules, or train it in full with modules_to_save."
        )


def _parameter_dtype(base: torch.dtype, autocast: bool) -> torch.dtype:
    half = base in (torch.float16, torch.bfloat16)
    return base if base in (torch.float32, torch.float64) or (half and not autocast) else torch.float32


def _warn_if_tied(model: nn.Module, paths: list[str]) -> None:
    shared = {n: others for others in tied_parameters(model) for n in others}
    for path in paths:
        for key in (f"{path}.weight", f"{path}.base_layer.weight"):
            others = [n for n in shared.get(key, []) if n != key]
            if others:
                warn(
                    f"{path} shares its weight with {', '.join(others)}, which stays as it is: training acts on {path} "
                    "alone, and a merge unties the two."
                )
