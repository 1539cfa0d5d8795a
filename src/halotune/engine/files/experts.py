"""Adapters on fused experts in PEFT's files, for the method that PEFT has them of.

PEFT wraps the module of experts once for each of its weights, the last one outermost:

    X.experts.gate_up_proj.lora_A.weight (E, r, in)    <->  X.experts.base_layer.lora_A.weight (E·r, in)
    X.experts.down_proj.lora_A.weight                  <->  X.experts.lora_A.weight

The other methods' tensors are stored as they are, under their own paths.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from os import PathLike

from torch import Tensor, nn

from ...core.config import AdapterConfig
from ...core.errors import AdapterFileError, HalotuneError
from ...core.experts import AdaptedExperts, ExpertsBase
from ...core.layer import AdaptedLayer
from ...methods.registry import ExpertsForm, low_rank_method, method_of
from ..injection.modules import plain_modules
from .keys import PREFIX


def form_of(config: AdapterConfig) -> ExpertsForm | None:
    """PEFT's form of the adapters of this configuration, if it has one."""
    return None if config.expert_sharing else method_of(config.peft_type).experts


def _places(model: nn.Module, name: str) -> Iterator[tuple[str, str, ExpertsBase]]:
    """Where the tensors of each weight with this adapter lie: our path, PEFT's, both without a prefix; and the weight."""
    for path, module in plain_modules(model):
        if isinstance(module, AdaptedExperts):
            layers = {n: m for n, m in module.named_children() if isinstance(m, AdaptedLayer) and name in m.adapters}
            for n, around in nested(layers, module.base_layer).items():
                base = layers[n].base
                assert isinstance(base, ExpertsBase)
                yield _bare(f"{path}.{n}"), _bare(f"{path}{around}"), base


def nested(names: Collection[str], experts: nn.Module) -> dict[str, str]:
    """What PEFT puts behind the path of the experts for each of their weights that have adapters."""
    there = [n for n in (*experts._parameters, *getattr(experts, "parametrizations", ())) if n in names]
    return {n: ".base_layer" * (len(there) - 1 - i) for i, n in enumerate(there)}


def experts_written(layers: Mapping[str, AdaptedLayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an exported LoRA by file key, those of experts in PEFT's form.

    Args:
        layers: all that were exported, by path.
    """
    out, form = dict(tensors), low_rank_method().experts
    holders: dict[str, dict[str, nn.Module]] = {}
    for path, layer in layers.items():
        if isinstance(layer.base, ExpertsBase):
            parent, _, n = path.rpartition(".")
            holders.setdefault(parent, {})[n] = layer.base.module.module
    for parent, names in holders.items():
        for n, around in nested(names, next(iter(names.values()))).items():
            assert form is not None
            pair = form.write(*(out.pop(f"{PREFIX}{parent}.{n}.{leaf}") for leaf in form.names))
            out.update({f"{PREFIX}{parent}{around}.{leaf}": t for leaf, t in zip(form.names, pair, strict=True)})
    return out


def _bare(key: str) -> str:
    """Without the prefixes of a PeftModel, an AdapterModel, and of models whose own first module is called `model`."""
    return re.sub(r"^((base_)?model\.)+", "", key)


def as_written(model: nn.Module, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by file key, those of experts in PEFT's form."""
    out, form = dict(tensors), form_of(config)
    if form is None:
        return out
    full = {_bare(key): key for key in out}
    for ours, theirs, _ in _places(model, name):
        keys = [full.get(f"{ours}.{n}") for n in form.names]
        if None in keys:
            continue
        pair = form.write(*(out.pop(key) for key in keys if key is not None))
        for key, n, t in zip(keys, form.names, pair, strict=True):
            assert key is not None
            out[f"{key.removesuffix(f'{ours}.{n}')}{theirs}.{n}"] = t
    return out


def from_written(
    model: nn.Module, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor], file: str | PathLike[str]
) -> Mapping[str, Tensor]:
    """The tensors of a file by our keys; those that are under our keys already stay.

    Raises:
        AdapterFileError: sizes of no expert here, or such as leave open which form it is.
    """
    form = form_of(config)
    if form is None:
        return tensors
    out = dict(tensors)
    full = {_bare(key): key for key in out}
    for ours, theirs, base in _places(model, name):
        keys = [full.get(f"{theirs}.{n}") for n in form.names]
        if None in keys or any(f"{ours}.{n}" in full for n in form.names):
            continue
        A, B = (out.pop(key) for key in keys if key is not None)
        weights = base.module
        try:
            pair = form.read(A, B, weights.experts, base.shape, weights.module.is_transposed, config.peft_version)
        except HalotuneError as e:
            raise AdapterFileError(
                file, f"{e}.", key=keys[0], remedy="Use the base model and the configuration that belong to this file."
            ) from None
        for key, n, t in zip(keys, form.names, pair, strict=True):
            assert key is not None
            out[f"{key.removesuffix(f'{theirs}.{n}')}{ours}.{n}"] = t
    return out
