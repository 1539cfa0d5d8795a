"""An adapter's folder: the index of the models that it is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ...core.errors import AdapterFileError, HalotuneError
from ...core.files import CONFIG_NAME, locate, read_json

INDEX_NAME = "adapter_index.json"


def read_index(
    folder: str | PathLike[str], models: Iterable[str], wanted: Sequence[str] | None, hub: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The name that an adapter was saved under, and the models that it is for."""
    local = Path(folder)
    if local.is_dir() and not (local / INDEX_NAME).is_file():  # written model by model, as with peft
        name: Any = "default"
        held = [c for c in models if (local / c / CONFIG_NAME).is_file()]
        if not held:
            raise AdapterFileError(
                local,
                f"holds neither {INDEX_NAME} nor a folder with {CONFIG_NAME} for any of {', '.join(models)}.",
                remedy="Give a folder that PipelineAdapters.save wrote, or one with an adapter's folder for each model.",
            )
    else:
        file = locate(folder, INDEX_NAME, **hub)
        index = read_json(file)
        name = index.get("adapter_name")
        held = [str(c) for c in index.get("components") or ()]
        if not isinstance(name, str) or not isinstance(index.get("components"), dict) or not held:
            raise AdapterFileError(
                file,
                "expected a text under adapter_name and the models' names under components.",
                remedy="Remove the file to load the folders beside it by their names, or save the adapter again.",
            )
    strange = [c for c in wanted or () if c not in held]
    if strange:
        raise HalotuneError(f"{folder}: holds no adapter for {strange[0]!r}, but for {', '.join(held)}.")
    return name, held if wanted is None else list(wanted)
