"""Files of adapters: found in a folder or on the hub, read with errors that name them, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import AdapterFileError, HalotuneError, did_you_mean

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "force_download", "local_files_only")


def locate(model_id: str | PathLike[str], filename: str, *, subfolder: str | None = None, **kwargs: Any) -> Path:
    """The local path of a file of an adapter; downloaded first where `model_id` is a repository of the hub.

    Args:
        model_id: a folder, or `user/repository`.
        filename: the file's name in it.
        subfolder: a folder inside it.
        kwargs: for the hub: `revision`, `cache_dir`, `token`, `force_download`, `local_files_only`.
    """
    check_keywords(kwargs)
    folder = Path(model_id)
    if folder.is_dir():
        file = folder / (subfolder or "") / filename
        if file.is_file():
            return file
        raise AdapterFileError(file, "there is no such file.", remedy=_remedy(file))
    if folder.is_file():
        remedy = "Give the folder that holds it; a LyCORIS or kohya file is read by halotune.load_lycoris(model, file)."
        raise AdapterFileError(folder, "is a file.", remedy=remedy)
    if os.path.isabs(folder) or len(folder.parts) != 2 or str(model_id).startswith((".", "~")):
        raise AdapterFileError(
            folder, "there is no such folder.", remedy="Give an adapter's folder, or a hub id 'user/repository'."
        )
    return _download(str(model_id), filename, subfolder, kwargs)


def check_keywords(kwargs: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raises for a keyword that is neither one of the hub's nor one of these."""
    known = [*also, "subfolder", *_HUB_ARGUMENTS]
    for name in kwargs:
        if name not in known:
            raise HalotuneError(f"there is no keyword {name!r}.{did_you_mean(name, known) or ' Known are ' + ', '.join(known)}")


def _remedy(file: Path) -> str:
    if file.name == WEIGHTS_NAME and (file.parent / PICKLE_NAME).is_file():
        return (
            f"{PICKLE_NAME} lies there, but a pickle can run code, so it is never loaded. Convert it with the package "
            "that wrote it (save_pretrained with safe_serialization=True)."
        )
    inner = sorted(p.parent.name for p in file.parent.glob(f"*/{file.name}"))
    if inner:
        return f"These subfolders hold one: {', '.join(inner)}; name it with subfolder=."
    other = sorted(p.name for p in file.parent.glob("*.safetensors") if p.name != WEIGHTS_NAME)
    if other:
        return (
            f"There is {', '.join(other[:3])}: a LyCORIS or kohya file is loaded with halotune.load_lycoris(model, file), or "
            "converted by halotune convert."
        )
    return "An adapter's folder holds adapter_config.json and adapter_model.safetensors."


def _download(repository: str, filename: str, subfolder: str | None, arguments: dict[str, Any]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise HalotuneError(
            f"{repository}: no such folder here, and reading from the hub needs huggingface-hub. "
            'Install it with: pip install "halotune[hub]"'
        ) from None
    try:
        return Path(hf_hub_download(repository, filename, subfolder=subfolder, **arguments))
    except (OSError, ValueError) as e:  # every error of the hub's client is one of these
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise AdapterFileError(
            f"{repository}/{filename}",
            f"could not be had from the hub: {reason}",
            remedy="Check the name, the revision, the access rights and the network; or give a local folder.",
        ) from e


def read_json(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise AdapterFileError(file, f"cannot be read as JSON: {e}.", remedy="The file is damaged: get it again.") from e
    if not isinstance(entries, dict):
        raise AdapterFileError(
            file,
            f"expected a JSON object, found a {type(entries).__name__}.",
            remedy="Give an adapter's own configuration.",
        )
    return entries


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, then rename it: readers see the old file or the new, never half."""
    write_together({file: write})


def write_together(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """`write_atomically` for files that belong together: none is renamed before all are filled."""
    temporary: dict[Path, Path] = {}
    umask = os.umask(0)
    os.umask(umask)
    try:
        for file, write in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
            os.close(handle)
            temporary[file] = Path(name)
            write(temporary[file])
            with temporary[file].open("rb+") as f:
                os.fsync(f.fileno())
            temporary[file].chmod(0o666 & ~umask)  # mkstemp's own mode is 0600
        for file, filled in temporary.items():
            os.replace(filled, file)
    finally:
        for filled in temporary.values():
            filled.unlink(missing_ok=True)
