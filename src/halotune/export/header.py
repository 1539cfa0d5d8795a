"""What an adapter's files say without their values: names, shapes and the configuration."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.errors import AdapterFileError, HalotuneError
from ..core.files import CONFIG_NAME, WEIGHTS_NAME, locate, read_json
from .runtimes import DIFFUSERS_NAME

METADATA_KEY = "lora_adapter_metadata"  # diffusers' entry in the header of a file: rank, alpha and targets


@dataclass(frozen=True)
class Header:
    """An adapter as its files describe it.

    Attributes:
        file: the safetensors file.
        config: the entries of `adapter_config.json` beside it; empty where there is none.
        shapes: key -> shape.
        metadata: of the safetensors file.
        tied: whether the base's output layer is its embeddings; None where its configuration is not at hand.
    """

    file: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    tied: bool | None = None

    @property
    def rank(self) -> int | None:
        """The configuration's r, where it is one."""
        r = self.config.get("r")
        return r if isinstance(r, int) and r > 0 else None

    @classmethod
    def read(cls, adapter: str | PathLike[str], base: str | None = None) -> Header:
        """Read a folder, or one safetensors file; no tensor is loaded.

        Args:
            base: the base model's folder, where it is not the one that the configuration names.
        """
        from safetensors import SafetensorError, safe_open

        file = _weights(Path(adapter))
        config = file.parent / CONFIG_NAME if file.name == WEIGHTS_NAME else None
        try:
            with safe_open(file, framework="pt") as f:
                shapes = {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}
                metadata = f.metadata() or {}
        except (SafetensorError, OSError) as e:
            raise AdapterFileError(file, f"cannot be read as safetensors: {e}.", remedy="Get or save it again.") from e
        entries = read_json(config) if config and config.is_file() else {}
        return cls(file, entries, shapes, metadata, _tied(base or entries.get("base_model_name_or_path")))


def _tied(base: str | None) -> bool | None:
    """What a base model's configuration says, if it is in a folder here or in the hub's cache."""
    try:
        entries = read_json(locate(base, "config.json", local_files_only=True)) if base else {}
    except HalotuneError:
        return None
    value = entries.get("tie_word_embeddings", (entries.get("text_config") or {}).get("tie_word_embeddings"))
    if value is None and entries and importlib.util.find_spec("transformers"):  # older ones leave out what is a class's default
        with suppress(ValueError, KeyError):
            config = importlib.import_module("transformers").AutoConfig.for_model(**entries)
            value = getattr(config, "tie_word_embeddings", None)
    return value


def _weights(adapter: Path) -> Path:
    if adapter.is_file():
        return adapter
    if not adapter.is_dir():
        raise AdapterFileError(adapter, "there is no such folder or file.", remedy="Give an adapter's folder, or its file.")
    for name in (WEIGHTS_NAME, DIFFUSERS_NAME):
        if (adapter / name).is_file():
            return adapter / name
    others = sorted(adapter.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise AdapterFileError(
        adapter,
        f"holds neither {WEIGHTS_NAME} nor {DIFFUSERS_NAME}, and {len(others)} other safetensors files.",
        remedy="Give the file itself; pickles are never read.",
    )
