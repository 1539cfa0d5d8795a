"""Reading a saved adapter: its configuration and its tensors, from a folder or the hub."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.config import AdapterConfig
from ...core.errors import AdapterFileError
from ...core.files import WEIGHTS_NAME, check_keywords, locate
from .keys import PREFIX
from .state_dict import read_tensors

# The keywords of `from_pretrained` and `load_adapter`.
_KEYWORDS = (
    "adapter_name",
    "is_trainable",
    "config",
    "torch_device",
    "autocast_adapter_dtype",
    "low_cpu_mem_usage",
    "key_mapping",
    "ignore_mismatched_sizes",
)
# PEFT's, without effect: an adapter lies where its layers do.
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index", "ephemeral_gpu_offload")


@dataclass
class AdapterSource:
    """An adapter's configuration and tensors, as read."""

    file: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    complete: bool  # every parameter comes from the file, so none needs to be initialised

    @classmethod
    def read(
        cls,
        model_id: str | PathLike[str],
        config: AdapterConfig | None,
        is_trainable: bool,
        key_mapping: Mapping[str, str] | None,
        *,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> AdapterSource:
        check_keywords(kwargs, (*_KEYWORDS, *_PLACEMENT))
        kwargs = {k: v for k, v in kwargs.items() if k not in (*_KEYWORDS, *_PLACEMENT)}
        config = copy.copy(config or AdapterConfig.from_pretrained(model_id, subfolder=subfolder, **kwargs))
        config.inference_mode = not is_trainable
        file = locate(model_id, WEIGHTS_NAME, subfolder=subfolder, **kwargs)
        tensors = _renamed(read_tensors(file), key_mapping, file)
        return cls(file, config, tensors, complete=not ignore_mismatched_sizes)


def _renamed(tensors: dict[str, Tensor], mapping: Mapping[str, str] | None, file: Path) -> dict[str, Tensor]:
    """Keys by the first pattern that matches; as in PEFT, the prefix of all keys is left out for that."""
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        new = key.removeprefix(PREFIX)
        for pattern, replacement in (mapping or {}).items():
            new, n = re.subn(pattern, replacement, new)
            if n:
                break
        new = new if new == key or new.startswith(PREFIX) else PREFIX + new
        if new in out:
            raise AdapterFileError(file, f"key_mapping gives {new} twice.", key=key, remedy="Make the mapping one to one.")
        out[new] = tensor
    return out
