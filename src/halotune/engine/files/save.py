"""Writing adapters into folders, in PEFT's format."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.files import WEIGHTS_NAME
from ...methods.registry import method_of, under_alias
from ..injection.offloading import bring_adapters
from .card import CARD_NAME, write_card
from .state_dict import get_peft_model_state_dict, write_tensors

if TYPE_CHECKING:
    from ..tuner import AdapterModel


def save_adapters(
    tuner: AdapterModel,
    save_directory: str | PathLike[str],
    *,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    peft_type: str | None = None,
) -> None:
    """Write adapters: `default` into the folder itself, others into subfolders of their names.

    The arguments are those of `PeftModel.save_pretrained`; `state_dict` is that of `tuner`.
    """
    if not safe_serialization:
        raise HalotuneError(
            "save_pretrained: safe_serialization=False would write a pickle, which can run code when it is read. Leave it True."
        )
    names = list(tuner.peft_config) if selected_adapters is None else selected_adapters
    unknown = [n for n in names if n not in tuner.peft_config]
    if unknown:
        raise HalotuneError(f"selected_adapters: no adapter is named {unknown[0]!r}; there are {sorted(tuner.peft_config)}.")
    folder = Path(save_directory)
    if folder.is_file():
        raise HalotuneError(f"save_pretrained: {folder} is a file. Give a folder.")
    if not is_main_process:
        return
    for name in names:
        here = folder if name == "default" else folder / name
        save_adapter(tuner, name, here, save_embedding_layers=save_embedding_layers, state_dict=state_dict, peft_type=peft_type)


def save_adapter(
    tuner: AdapterModel,
    name: str,
    folder: Path,
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    peft_type: str | None = None,
) -> None:
    """Write one adapter into the folder itself, under the alias `peft_type` of its method if it has that one."""
    bring_adapters(tuner.model)
    found = get_peft_model_state_dict(tuner, state_dict, name, save_embedding_layers=save_embedding_layers)
    tensors = {f"base_model.{key}": t for key, t in found.items()}
    config = written_config(tuner, name)
    if peft_type is not None and method_of(peft_type).peft_type in method_of(config.peft_type).aliases:
        config, tensors = under_alias(config, tensors, peft_type)
    write_adapter(folder, config, tensors)


def write_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one adapter in PEFT's format: its tensors (and `metadata` beside them), its configuration and a card."""
    write_tensors(tensors, folder / WEIGHTS_NAME, metadata)
    config.save_pretrained(folder)
    write_card(folder / CARD_NAME, config, sum(parameter_count(t) for t in tensors.values()))


def written_config(tuner: AdapterModel, name: str) -> AdapterConfig:
    """The configuration as it goes into a file: frozen, and with the base's class where no task names it."""
    config = copy.copy(tuner.peft_config[name])
    config.inference_mode = True
    if config.task_type is None and config.auto_mapping is None:
        base = type(tuner.model)
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return config


def parameter_count(t: Tensor) -> int:
    """How many numbers a tensor holds; packed and partitioned ones count as what they hold."""
    if t.numel() == 0 and hasattr(t, "ds_numel"):
        return int(t.ds_numel)  # type: ignore[attr-defined]  # ZeRO-3 keeps the parameter elsewhere
    if type(t).__name__ == "Params4bit":
        return t.numel() * 2 * t.element_size()
    return t.numel()
