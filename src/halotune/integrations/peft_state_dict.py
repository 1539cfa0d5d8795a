"""PEFT's own `get_peft_model_state_dict` and `set_peft_model_state_dict` on our models; accelerate calls them under FSDP.

They ask the class that PEFT has for a method which tensors are an adapter's, and where those of a file go. For a model of
ours these classes answer what our files hold; for PEFT's own models, what they always did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..engine.files.state_dict import get_peft_model_state_dict, keys_in_model
from ..methods.registry import methods


def answer_for_ours(tuners: dict[Any, Any], base: Any) -> None:
    """Let PEFT's classes answer for our models.

    Args:
        tuners: PEFT's `PEFT_TYPE_TO_TUNER_MAPPING`; a method that it lacks is added.
        base: the class that they derive from.
    """
    if not hasattr(base, "_remap_adapter_state_dict_for_load"):  # before PEFT 0.21
        return
    for method in methods():
        tuners.setdefault(method.peft_type, base)
        for tuner in {base, *(tuners[name] for name in (method.peft_type, *method.aliases) if name in tuners)}:
            _put_before(tuner, "_get_adapter_state_dict", _tensors_of_ours)
            _put_before(tuner, "_remap_adapter_state_dict_for_load", _under_keys_of_ours)


def _put_before(tuner: Any, name: str, ours: Callable[..., Any]) -> None:
    theirs = tuner.__dict__.get(name)
    if theirs is None or hasattr(theirs.__func__, "_halotune"):  # inherited, or done before
        return

    def answer(cls: Any, model: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, AdapterConfig):
            return ours(model, *args, **kwargs)
        return theirs.__func__(cls, model, config, *args, **kwargs)

    answer._halotune = True  # type: ignore[attr-defined]
    setattr(tuner, name, classmethod(answer))


def _tensors_of_ours(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], unwanted_adapter_names: list[str]
) -> dict[str, Tensor]:
    """Under keys from which PEFT takes the adapter's name out, in front of the last part."""
    found = get_peft_model_state_dict(model, state_dict, adapter_name)  # PEFT does not look for a vocabulary in a part
    return {f"{k.rpartition('.')[0]}.{adapter_name}.{k.rpartition('.')[2]}": t for k, t in found.items()}


def _under_keys_of_ours(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the keys of the model's state dict, checked as our own reader checks them."""
    tensors, keys = keys_in_model(model, state_dict, adapter_name)
    return {keys[key]: t for key, t in tensors.items()}
