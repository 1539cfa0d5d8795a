"""The methods there are. Filled by `halotune.methods`, read by the engine, which knows no method by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .config import AdapterConfig
from .errors import HalotuneError, closest
from .lycoris import LycorisForm
from .operator import WeightShape

Rewrite = Callable[[Any, dict[str, Tensor]], tuple[AdapterConfig, dict[str, Tensor]]]


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        peft_type: the name in files, e.g. "HRA".
        prefix: what the names of its parameters begin with, e.g. "hra_".
        config: the configuration's class.
        adapters: every adapter class that `create` may return.
        create: a new adapter for a weight's shape and a configuration already resolved for that module.
        learning_rates: kind of adapter -> the default learning rate.
        twins: other methods that have the same adapter -> rewrites a configuration and its tensors in that one's names.
        lycoris: how LyCORIS writes it, for methods that LyCORIS has.
    """

    peft_type: str
    prefix: str
    config: type[AdapterConfig]
    adapters: tuple[type[Adapter], ...]
    create: Callable[[WeightShape, AdapterConfig], Adapter]
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    twins: Mapping[str, Rewrite] = field(default_factory=dict)
    lycoris: LycorisForm | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    _METHODS[method.peft_type] = method
    return method


def methods() -> list[Method]:
    return list(_METHODS.values())


def method_of(peft_type: object) -> Method:
    """The method of this name.

    Raises:
        HalotuneError: for a name that no method bears.
    """
    name = str(getattr(peft_type, "value", peft_type))
    if name in _METHODS:
        return _METHODS[name]
    near = closest(name.upper(), list(_METHODS))
    hint = f" Did you mean {near[0]}?" if near else ""
    raise HalotuneError(f"peft_type: expected one of {', '.join(_METHODS)}; got {name!r}.{hint}")
