"""What a conversion needs of a base model: the names and shapes of its layers. Its weights are never read."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.attention import AdaptedAttention
from ..core.base import base_for, base_kind
from ..core.errors import AdapterFileError, HalotuneError
from ..core.files import locate, read_json
from ..core.layer import AdaptedLayer
from ..core.operator import WeightShape
from ..engine.injection.modules import visible_modules
from ..export.components import COMPONENTS
from .originals import Part, original_names


@dataclass(frozen=True)
class BaseLayers:
    """A base model's layers.

    Attributes:
        class_name, library: its class, and where that is.
        shapes: path -> shape, of every layer that can be adapted.
        paths: of all its modules.
        keys: path -> path in PEFT's files, where that is another: attention's output projection lies in its base there.
        origin: its folder or hub id, where it has one.
        model: it itself, on the meta device perhaps.
    """

    class_name: str
    library: str
    shapes: Mapping[str, WeightShape]
    paths: tuple[str, ...]
    keys: Mapping[str, str]
    origin: str | None = None
    model: nn.Module | None = None

    @classmethod
    def of(cls, model: nn.Module, origin: str | None = None) -> BaseLayers:
        """Of a model, which may lie on the meta device, and may have adapters in it."""
        shapes, paths, keys = {}, [], {}
        for path, module in visible_modules(model):
            if path:
                paths.append(path)
                if isinstance(module, (nn.MultiheadAttention, AdaptedAttention)):
                    keys[f"{path}.out_proj"] = f"{path}.base_layer.out_proj"
                if isinstance(module, AdaptedLayer):
                    shapes[path] = module.base.shape
                elif base_kind(module) is not None:
                    shapes[path] = base_for(module).shape
        return cls(type(model).__name__, type(model).__module__, shapes, tuple(paths), keys, origin, model)

    @cached_property
    def originals(self) -> dict[str, list[Part]]:
        """The names that the model's own authors gave its layers -> where these are here."""
        return original_names(self.class_name, {path: shape.out_features for path, shape in self.shapes.items()})

    @property
    def scripts_use_originals(self) -> bool:
        """Whether sd-scripts trains this model under its original names: all but the UNets before SDXL."""
        return self.class_name != "UNet2DConditionModel" or "add_embedding.linear_1" in self.shapes

    @cached_property
    def index(self) -> dict[str, list[list[Part]]]:
        """A name with `_` for every `.` -> the layers that it may mean; the model's own names go before the originals."""
        index: dict[str, list[list[Part]]] = {}
        for path in self.shapes:
            index.setdefault(path.replace(".", "_"), []).append([Part(path)])
        own = set(index)
        for name, parts in self.originals.items():
            if name.replace(".", "_") not in own:
                index.setdefault(name.replace(".", "_"), []).append(parts)
        return index


def load_bases(where: str | PathLike[str]) -> dict[str, BaseLayers]:
    """The models in a folder or a repository of the hub: of a diffusers pipeline by the components' names, else one, "".

    Only configurations are read; the models are built on the meta device.
    """
    pipeline = _entries(where, "model_index.json")
    if pipeline is not None:
        classes = {name: pipeline[name] for name in COMPONENTS if (pipeline.get(name) or [None])[0] is not None}
        return {name: _build(where, library, cls, name) for name, (library, cls) in classes.items()}
    entries = _entries(where, "config.json")
    if entries is None:
        raise HalotuneError(
            f"{where}: holds neither model_index.json (a diffusers pipeline) nor config.json (a model). Give a model's folder "
            "or hub id; for a model of your own, use halotune.load_lycoris(model, file)."
        )
    if "_class_name" in entries:
        return {"": _build(where, "diffusers", entries["_class_name"])}
    return {"": _build(where, "transformers", (entries.get("architectures") or ["AutoModel"])[0])}


def _entries(where: str | PathLike[str], name: str, subfolder: str = "") -> dict[str, Any] | None:
    try:
        file = locate(where, name, subfolder=subfolder or None)
    except AdapterFileError as e:
        if Path(where).is_dir() or type(e.__cause__).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
            return None
        raise HalotuneError(f"{where}: no base model there ({e}). Give a folder or a hub id.") from e
    return read_json(file)


def _build(where: str | PathLike[str], library: str, class_name: str, subfolder: str = "") -> BaseLayers:
    entries = _entries(where, "config.json", subfolder)
    name = f"{where}/{subfolder}" if subfolder else str(where)
    if library not in ("diffusers", "transformers") or entries is None:
        raise HalotuneError(
            f"{name}: a {class_name} of {library} cannot be built from its configuration alone. Load it and "
            "use halotune.load_lycoris."
        )
    try:
        module: Any = importlib.import_module(library)
    except ImportError:
        raise HalotuneError(f"{name}: a base of {library} needs it. Install it with: pip install {library}") from None
    cls = getattr(module, class_name, None)
    if cls is None:
        raise HalotuneError(
            f"{name}: the installed {library} has no {class_name}. Load the model yourself and use halotune.load_lycoris."
        )
    with torch.device("meta"):
        if library == "diffusers":
            model = cls.from_config(entries)
        elif class_name == "AutoModel":
            model = cls.from_config(module.AutoConfig.for_model(**entries))
        else:
            model = cls(cls.config_class.from_dict(entries))
    return BaseLayers.of(model, str(where))
