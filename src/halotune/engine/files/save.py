"""Writing adapters into folders, in PEFT's format."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.files import CONFIG_NAME, WEIGHTS_NAME, write_together
from ...core.sharded_parameters import has_partitions, reshard, whole
from ...methods.registry import method_of, under_alias
from ..gathering import meet, takes_all
from ..injection.modules import unwrapped
from ..injection.offloading import bring_adapters
from .card import CARD_NAME, write_card
from .experts import as_written, form_of
from .keys import check_readable
from .state_dict import adapter_tensors, filled_with

if TYPE_CHECKING:
    from ..tuner import AdapterModel


def save_adapters(
    tuner: AdapterModel,
    save_directory: str | PathLike[str],
    selected_adapters: list[str] | None,
    save_embedding_layers: bool | Literal["auto"],
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
    peft_type: str | None,
) -> None:
    """Write adapters: `default` into the folder itself, others into subfolders of their names.

    The arguments are those of `PeftModel.save_pretrained`; `state_dict` is that of `tuner`.
    """
    names = list(tuner.peft_config) if selected_adapters is None else selected_adapters
    unknown = [n for n in names if n not in tuner.peft_config]
    if unknown:
        raise HalotuneError(f"selected_adapters: no adapter is named {unknown[0]!r}; there are {sorted(tuner.peft_config)}.")
    folder = Path(save_directory)
    if folder.is_file():
        raise HalotuneError(f"save_pretrained: {folder} is a file. Give a folder.")
    gathers = state_dict is None and takes_all(tuner.model)
    if gathers and not is_main_process and has_partitions(tuner.model):
        return  # of ZeRO-3 accelerate gives the main process alone a state dict, with which it writes alone
    if gathers:
        reshard(tuner.model)
        meet("save_pretrained")
    if not (is_main_process or gathers):
        return
    places = {name: folder if name == "default" else folder / name for name in names}
    how = save_embedding_layers, state_dict, peft_type, gathers
    ready = [prepare(tuner, name, place, *how) for name, place in places.items()]
    for write in ready if is_main_process else ():
        write()


def prepare(
    tuner: AdapterModel,
    name: str,
    folder: Path,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    state_dict: Mapping[str, Tensor] | None = None,
    peft_type: str | None = None,
    gather: bool = False,
) -> Callable[[], None]:
    """What writes one adapter into the folder itself, under the alias `peft_type` of its method if it has that one.

    Args:
        gather: make what is sharded whole, which every process has to do.

    Raises:
        HalotuneError: it could not be read back.
    """
    bring_adapters(tuner.model)
    config = written_config(tuner, name)
    found, beside = adapter_tensors(tuner, name, state_dict or None, save_embedding_layers)  # Trainers pass empty ones, too
    if gather:
        found = {key: None if t is None else whole(t).cpu() for key, t in found.items()}
    tensors = check_readable(
        tuner.model, config, {f"base_model.{key}": t for key, t in found.items()}, {f"base_model.{key}" for key in beside}
    )
    tensors = as_written(tuner.model, name, config, tensors)
    if peft_type is not None and method_of(peft_type).peft_type in method_of(config.peft_type).aliases:
        config, tensors = under_alias(config, tensors, peft_type)
    return partial(write_adapter, folder, config, tensors)


def write_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one adapter in PEFT's format: its tensors (and `metadata` beside them), its configuration and a card."""
    write_together({folder / WEIGHTS_NAME: filled_with(tensors, metadata), folder / CONFIG_NAME: config.write})
    write_card(folder / CARD_NAME, config, sum(parameter_count(t) for t in tensors.values()))


def written_config(tuner: AdapterModel, name: str) -> AdapterConfig:
    """The configuration as it goes into a file: frozen, and with the base's class where no task names it."""
    config = copy.copy(tuner.peft_config[name])
    config.inference_mode = True
    if config.task_type is None and config.auto_mapping is None:
        base = type(unwrapped(tuner.model))
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    if config.target_parameters and (form := form_of(config)):
        config.peft_version = form.version
    return config


def parameter_count(t: Tensor) -> int:
    """How many numbers a tensor holds; packed and partitioned ones count as what they hold."""
    if t.numel() == 0 and hasattr(t, "ds_numel"):
        return int(t.ds_numel)  # type: ignore[attr-defined]  # ZeRO-3 keeps the parameter elsewhere
    if type(t).__name__ == "Params4bit":
        return t.numel() * 2 * t.element_size()
    return t.numel()
