"""Adapters in a model that stays itself, with no wrapper around it: a pipeline's UNet, say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.wrapper import Wrapper
from ..tuner import AdapterModel

_KEY = "_halotune_adapters"


def adapters_in(model: nn.Module) -> AdapterModel | None:
    """The adapters that `add_in_place` put into a model, or None."""
    return model.__dict__.get(_KEY)


def add_in_place(model: nn.Module, adapter_name: str, peft_config: AdapterConfig, **kwargs: Any) -> AdapterModel:
    """Put an adapter into a model in place; all its adapters are returned.

    They lie beside the model's modules, not among them; `model.peft_config` holds their configurations. `kwargs` are those of
    `AdapterModel.add_adapter`.
    """
    if isinstance(model, Wrapper):
        raise HalotuneError(f"the model is a {type(model).__name__} already. Use its add_adapter, or unload() it first.")
    if adapters_in(model) is None:
        model.__dict__[_KEY] = AdapterModel(model, {})
    tuner: AdapterModel = model.__dict__[_KEY]
    try:
        tuner.add_adapter(adapter_name, peft_config, **kwargs)
    except BaseException:
        if not tuner.peft_config:
            forget(model)
        raise
    configs = {**getattr(model, "peft_config", {}), **tuner.peft_config}  # other libraries' adapters stand there, too
    model.peft_config = configs  # type: ignore[assignment]
    return tuner


def remove_in_place(model: nn.Module, adapter_name: str) -> None:
    """Take one of the adapters out that `add_in_place` put in; without the last one the model is as it was."""
    tuner: AdapterModel = model.__dict__[_KEY]
    if len(tuner.peft_config) == 1:
        forget(model)
    else:
        _unpublish(model, [adapter_name])
        tuner.delete_adapter(adapter_name)


def forget(model: nn.Module, *, merged: bool = False) -> None:
    """Take out all adapters that `add_in_place` put in; the model is as it was, or with the merged ones for good."""
    tuner: AdapterModel = model.__dict__.pop(_KEY)
    _unpublish(model, tuner.peft_config)
    if merged:
        tuner.merge_and_unload(adapter_names=tuner.merged_adapters)
    else:
        tuner.unload()


def _unpublish(model: nn.Module, names: Iterable[str]) -> None:
    left = {n: c for n, c in getattr(model, "peft_config", {}).items() if n not in names}
    model.__dict__.pop("peft_config", None)
    if left:
        model.peft_config = left  # type: ignore[assignment]
