"""Writing what a model's adapters compute in the formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.base import TransposedLinear
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, look_up
from ...core.layer import AdaptedLayer
from ...core.sharded_parameters import whole
from ...export.components import Component
from ...export.gguf import GGUF_NAME, gguf_lora, write_gguf
from ...export.header import METADATA_KEY, Header
from ...export.lora import ExportReport, as_lora
from ...export.rules import RULES, check
from ...export.runtimes import RUNTIMES, Runtime
from ...methods.registry import low_rank_config
from ..gathering import whole_adapters
from ..injection.modules import plain_modules, public_path, tied_parameters, visible_modules
from ..injection.resolve import spelled_out
from .experts import experts_written, form_of
from .keys import adapter_keys, check_readable
from .save import write_adapter, written_config
from .state_dict import adapter_tensors, vocabulary_differs, write_tensors

if TYPE_CHECKING:
    from ..tuner import AdapterModel


def export_adapters(
    tuner: AdapterModel,
    to: str,
    folder: str | PathLike[str],
    adapter_name: str | Sequence[str] | None,
    runtime: str,
    rank: int | None,
    component: str | None,
    dtype: torch.dtype | None,
    gguf: bool,
) -> ExportReport:
    """Write adapters as a LoRA; the arguments are those of `PeftModel.export`."""
    if to != "lora":
        raise HalotuneError(f"export: expected the format 'lora'; got {to!r}.")
    if Path(folder).is_file():
        raise HalotuneError(f"export: {folder} is a file. Give a folder.")
    target = look_up(RUNTIMES, runtime, "runtime")
    if gguf and runtime != "llama.cpp":
        raise HalotuneError(f'export: GGUF is for llama.cpp. Give runtime="llama.cpp" (--for llama.cpp); got {runtime!r}.')
    names = _names(tuner, adapter_name)
    with whole_adapters(tuner.model, "export") as writes:
        layers = _exportable(tuner, names, target)
        beside = _beside_the_adapters(tuner, names, target)
        part = None if target.folder else Component.of(type(tuner.model).__name__, component)
        tensors, report = as_lora(layers, names, target, component=part, rank=rank, dtype=dtype)
        config = _lora_config(tuner, names, layers, report.rank)
        grouped = target.convolutions == "basic" and any(layer.base.shape.groups > 1 for layer in layers.values())
        if target.folder and not grouped:  # which peft stores in another form than ours
            check_readable(tuner.model, config, {**tensors, **beside}, beside)
        tensors = experts_written(layers, tensors)
        shared = {name for names in tied_parameters(tuner.model) for name in names}
        tied = any(f"{path}.base_layer.weight" in shared for path in layers)
        converted = gguf_lora(tensors, tuner.model) if gguf else None
        if writes:
            _write({**tensors, **beside}, config, Path(folder), target, part, tied)
            if converted is not None:
                write_gguf(*converted, alpha=report.rank, file=Path(folder) / GGUF_NAME)
        return report


def _names(tuner: AdapterModel, wanted: str | Sequence[str] | None) -> list[str]:
    names = tuner.active_adapters if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [n for n in names if n not in tuner.peft_config]
    if unknown or not names or len(set(names)) < len(names):
        raise HalotuneError(f"adapter_name: expected different names out of {sorted(tuner.peft_config)}; got {names}.")
    if tuner.merged_adapters:
        raise HalotuneError(
            f"export: {', '.join(tuner.merged_adapters)} is merged, and exporting needs the base's own weights. Call "
            "unmerge_adapter() first."
        )
    return names


def _exportable(tuner: AdapterModel, names: Sequence[str], runtime: Runtime) -> dict[str, AdaptedLayer]:
    """The layers with these adapters, by their paths.

    Raises:
        HalotuneError: naming each layer that the runtime cannot represent.
    """
    adapted = {n: m for n, m in plain_modules(tuner.model) if isinstance(m, AdaptedLayer)}  # one that is shared comes twice
    layers = {path: layer for path, layer in adapted.items() if any(n in layer.adapters for n in names)}
    refused: dict[str, list[str]] = {}
    for path, layer in layers.items():
        reason = runtime.refusal(path, layer, shared=sum(layer is other for other in layers.values()) > 1)
        if reason:
            refused.setdefault(reason, []).append(public_path(path))
    if refused:
        shown = "; ".join(f"it {reason}: {', '.join(paths)}" for reason, paths in refused.items())
        raise HalotuneError(
            f"export: {runtime.name} cannot represent this adapter: {shown}. Merge it into the weights (merge_and_unload), or "
            'leave these modules out when training; runtime="halotune" reads all.'
        )
    return layers


def _beside_the_adapters(tuner: AdapterModel, names: Sequence[str], runtime: Runtime) -> dict[str, Tensor]:
    """What the adapters' own files hold beside the adapters: modules fully fine-tuned, embeddings of another size."""
    found: dict[str, Tensor] = {}
    for name in names:
        config = tuner.peft_config[name]
        if config.bias != "none":
            raise HalotuneError(
                f"export: adapter {name!r} trains biases (bias={config.bias!r}), which a LoRA cannot hold. Merge it into "
                'the weights (merge_and_unload), or train with bias="none".'
            )
        resized = vocabulary_differs(tuner.model, config)
        own = {key for key, at in adapter_keys(tuner, name).items() if f".adapters.{name}." in at}
        tensors, _ = adapter_tensors(tuner, name, save_embedding_layers=resized)
        found.update({key: t for key, t in tensors.items() if key not in own and t is not None})
    if found and not runtime.modules_to_save:
        modules = ", ".join(sorted({key.removeprefix("model.").rpartition(".")[0] for key in found}))
        raise HalotuneError(
            f"export: {runtime.name} reads a LoRA alone, and the adapter also holds fully fine-tuned modules: {modules}. Merge "
            'it into the weights (merge_and_unload); runtime="peft" reads them.'
        )
    return {f"base_model.{key}": whole(t).detach().cpu() for key, t in found.items()}


def _lora_config(tuner: AdapterModel, names: Sequence[str], layers: Mapping[str, AdaptedLayer], rank: int) -> AdapterConfig:
    like = written_config(tuner, names[0])
    visible = dict(visible_modules(tuner.model))
    named = spelled_out(like, [public_path(path) for path in layers], visible)
    modules_to_save = sorted({m for n in names for m in tuner.peft_config[n].modules_to_save or []})
    entries = {
        "target_modules": sorted(named.target_modules or ()),
        "target_parameters": sorted(named.target_parameters or ()) or None,
        "modules_to_save": modules_to_save or None,
        "fan_in_fan_out": any(isinstance(layer.base, TransposedLinear) for layer in layers.values()),
        "task_type": like.task_type,
        "base_model_name_or_path": like.base_model_name_or_path,
        "revision": like.revision,
        "auto_mapping": like.auto_mapping,
        "inference_mode": True,
    }
    config = replace(low_rank_config(rank), **entries)
    if config.target_parameters and (form := form_of(config)):
        config.peft_version = form.version
    return config


def _write(
    tensors: dict[str, Tensor], config: AdapterConfig, folder: Path, runtime: Runtime, component: Component | None, tied: bool
) -> None:
    """Write the files, once they keep every rule of the runtime."""
    file, entries = folder / runtime.file, config.to_dict()
    metadata: dict[str, str] = {}
    if component is not None and not any(key.endswith(".alpha") for key in tensors):
        needed = {f"{component.name}.{key}": entries[key] for key in ("r", "lora_alpha", "target_modules")}
        metadata[METADATA_KEY] = json.dumps(needed)
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    header = Header(file, entries, shapes, metadata, tied=tied)
    problems = check(header, runtime.name) if runtime.name in RULES else []
    if problems:
        raise HalotuneError("export: nothing was written. " + " ".join(map(str, problems)))
    if runtime.folder:
        write_adapter(folder, config, tensors)
    else:
        write_tensors(tensors, file, metadata)
