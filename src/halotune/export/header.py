"""What an adapter's files say without their values: names, shapes and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.errors import AdapterFileError
from ..core.files import CONFIG_NAME, WEIGHTS_NAME, read_json
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
        dtype: of the first tensor, as safetensors writes it: "F32", "BF16" …
    """

    file: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    dtype: str = ""

    @property
    def rank(self) -> int | None:
        """The configuration's r, where it is one."""
        r = self.config.get("r")
        return r if isinstance(r, int) and r > 0 else None

    @classmethod
    def read(cls, adapter: str | PathLike[str]) -> Header:
        """Read a folder, or one safetensors file; no tensor is loaded."""
        from safetensors import SafetensorError, safe_open

        file = _weights(Path(adapter))
        config = file.parent / CONFIG_NAME if file.name == WEIGHTS_NAME else None
        try:
            with safe_open(file, framework="pt") as f:
                slices = {key: f.get_slice(key) for key in f.keys()}
                shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
                dtype = next((str(s.get_dtype()) for s in slices.values()), "")
                metadata = f.metadata() or {}
        except (SafetensorError, OSError) as e:
            raise AdapterFileError(file, f"cannot be read as safetensors: {e}.", remedy="Get or save it again.") from e
        return cls(file, read_json(config) if config and config.is_file() else {}, shapes, metadata, dtype)


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
