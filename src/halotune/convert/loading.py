"""LyCORIS and kohya files straight into a model and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..core.errors import AdapterFileError, HalotuneError, few, warn
from ..engine.files.keys import config_of
from ..engine.files.load import AdapterSource
from ..engine.files.state_dict import get_peft_model_state_dict, read_metadata, read_tensors, write_tensors
from ..engine.injection.modules import innermost
from ..engine.model import PeftModel
from .base import BaseLayers
from .lycoris import PEFT_PREFIX, LycorisFile, StoredAdapter, parse
from .reading import Resolved, best_prefixes, check_written, resolve
from .writing import metadata_for, write


def read_lycoris(file: str | PathLike[str], prefix: str | None = None) -> LycorisFile:
    """A file's modules and metadata.

    Args:
        file: `….safetensors`.
        prefix: what its keys begin with, where that is none of the usual ones.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise AdapterFileError(
            path,
            "is no safetensors file.",
            remedy="A pickle (.pt, .ckpt, .bin) can run code when it is read, so none ever is: save it as safetensors with the "
            "program that wrote it.",
        )
    if not path.is_file():
        raise AdapterFileError(path, "there is no such file.", remedy="Give the path of a LyCORIS or kohya file.")
    return parse(read_tensors(path), read_metadata(path), path, prefix)


def left_out(source: LycorisFile, used: Sequence[Resolved], *, others: bool = True) -> list[str]:
    """What of a file some adapters do not hold, in words: modules that matched nothing, and other prefixes' modules."""
    out = []
    for names in (found.unmatched for found in used if found.unmatched):
        out.append(f"{len(names)} modules that the base has no layer for ({few(names)})")
    prefixes = {p for found in used for p in found.prefixes}
    if others:
        out += [f"{len(m)} modules under {p or 'no prefix'}" for p, m in source.groups.items() if p not in prefixes]
    return out


def load_lycoris(
    model: nn.Module,
    file: str | PathLike[str],
    adapter_name: str = "default",
    *,
    prefix: str | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """A base model with the adapter in a LyCORIS or kohya file: LoHa or LoRA.

    Args:
        model: the base model, untouched where an error is raised; or a `PeftModel`, which gets one adapter more, inactive.
        file: `….safetensors`.
        adapter_name: what it is called in the model.
        prefix: which modules: `"lora_unet"`, `"lora_te1"` … Left out, those that fit the model; a warning names the others.
        is_trainable: go on training it; else it is frozen.

    Raises:
        AdapterFileError: what was found in the file, what was expected, and the remedy.
    """
    source = read_lycoris(file, prefix)
    base = BaseLayers.of(innermost(model))
    if prefix is not None and prefix not in source.groups:
        raise AdapterFileError(
            file, f"no key begins with {prefix}_; found: {source.prefixes}.", remedy="Give one of these, or none."
        )
    found = resolve(source, base, [prefix] if prefix is not None else best_prefixes(source, base))
    rest = left_out(source, [found], others=prefix is None)
    if rest:
        warn(f"{file}: left out are {' and '.join(rest)}.")
    found.config.inference_mode = not is_trainable
    tensors = AdapterSource(Path(file), found.config, found.tensors, complete=True)
    if isinstance(model, PeftModel):
        model.add_source(tensors, adapter_name)
        return model
    return PeftModel.from_source(model, tensors, adapter_name)


def save_lycoris(
    model: nn.Module,
    file: str | PathLike[str],
    adapter_name: str = "default",
    *,
    prefix: str = "lycoris",
    names: Literal["model", "original"] = "model",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter as LyCORIS does, for ComfyUI, Forge, sd-scripts: LoHa or LoRA.

    Args:
        model: a `PeftModel`, or any module that adapters were put into.
        file: `….safetensors`; it is replaced in one step.
        adapter_name: which adapter.
        prefix: what every key begins with; kohya's are `"lora_unet"`, `"lora_te1"` …
        names: of the modules: the `"model"`'s own, or the `"original"` ones, which sd-scripts uses for SDXL and FLUX.
        dtype: of the tensors; None is as they are.
        metadata: strings stored beside them.
    """
    check_names(names)
    found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    inner = innermost(model)
    root = next((f"{n}." for n, m in model.named_modules() if m is inner and n), "")
    own = {PEFT_PREFIX + k.removeprefix(root): t if dtype is None else t.to(dtype) for k, t in found.items()}
    adapter = StoredAdapter(config_of(model, adapter_name), own)
    base, about = BaseLayers.of(inner), {**metadata_for(adapter.config), **(metadata or {})}
    tensors = write(adapter, prefix, base, original=names == "original")
    path = check_output(file)
    check_written(tensors, about, path, [(prefix, base)])
    write_tensors(tensors, path, about)


def check_names(names: str) -> None:
    if names not in ("model", "original"):
        raise HalotuneError(f"names: expected 'model' or 'original'; got {names!r}.")


def check_output(file: str | PathLike[str]) -> Path:
    path = Path(file)
    if path.suffix != ".safetensors" or path.is_dir():
        raise HalotuneError(f"{path}: a LyCORIS file is one file. Give a name that ends in .safetensors.")
    return path
