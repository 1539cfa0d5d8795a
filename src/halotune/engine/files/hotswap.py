"""New weights for an adapter in place: no wrapping, no recompilation."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from ...core.config import BOOKKEEPING, AdapterConfig
from ...core.errors import HalotuneError
from ...core.files import WEIGHTS_NAME, locate
from .keys import config_of
from .state_dict import LoadResult, read_tensors, set_peft_model_state_dict

# What may differ between two adapters that run the same code.
_MAY_DIFFER = {*BOOKKEEPING, "init_weights"} - {"peft_type"}


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | PathLike[str], adapter_name: str = "default", **kwargs: Any
) -> LoadResult:
    """Copy the weights of a saved adapter into one that the model has; a compiled model stays compiled.

    Args:
        model: a `PeftModel`, or any module that adapters were put into; also inside `torch.compile`'s wrapper.
        model_name_or_path: the new adapter's folder, or its repository on the hub.
        adapter_name: the adapter whose weights are replaced.
        kwargs: `subfolder`; `revision`, `token`, `cache_dir` … of the hub.

    Raises:
        HalotuneError: the two configurations differ in what they compute.
    """
    model = getattr(model, "_orig_mod", model)
    old, new = config_of(model, adapter_name), AdapterConfig.from_pretrained(model_name_or_path, **kwargs)
    require_same(old, new, adapter_name, model_name_or_path)
    file = locate(model_name_or_path, WEIGHTS_NAME, **kwargs)
    return set_peft_model_state_dict(model, read_tensors(file), adapter_name, file=file)


def require_same(old: AdapterConfig, new: AdapterConfig, name: str, source: object) -> None:
    """Raises where two configurations differ in what their adapters compute."""
    here, there = old.to_dict(), new.to_dict()
    differ = sorted(k for k in {**here, **there} if k not in _MAY_DIFFER and here.get(k) != there.get(k))
    if differ or old.kind != new.kind:
        shown = "; ".join(f"{k}: {here.get(k)!r} here, {there.get(k)!r} there" for k in differ or ["init_weights"])
        raise HalotuneError(
            f"{source}: cannot be swapped into {name!r}, whose configuration differs ({shown}). Use load_adapter with "
            "another name, then set_adapter."
        )
