"""The methods there are: the engine knows none by name. Importing this module imports `halotune.methods`, which fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from ..core.base import Base
from ..core.config import CLASSES, AdapterConfig, look_up
from ..core.operator import WeightShape
from .lycoris_form import LycorisForm
from .measures import Measures

Rewrite = Callable[[Any, dict[str, Tensor]], tuple[AdapterConfig, dict[str, Tensor]]]


@dataclass(frozen=True)
class FromPeft:
    """What makes a live layer of peft's one of ours. Nothing of peft is imported for it.

    Attributes:
        adapter: (peft's layer, the adapter's name, the weight's shape) -> our adapter, whose parameters peft's will replace.
        differs: (peft's layer, the adapter's name, the base) -> what peft itself gets wrong on this layer, a phrase each.
        several: what it gets wrong where several adapters of a layer are active.
    """

    adapter: Callable[[Any, str, WeightShape], Adapter]
    differs: Callable[[Any, str, Base], list[str]]
    several: str | None = None


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
        from_peft: how a live layer of peft's is run as one of ours, for methods that gain by it.
        measures: how its saved adapters are looked at; without it, with their base model only.
    """

    peft_type: str
    prefix: str
    config: type[AdapterConfig]
    adapters: tuple[type[Adapter], ...]
    create: Callable[[WeightShape, AdapterConfig], Adapter]
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    twins: Mapping[str, Rewrite] = field(default_factory=dict)
    lycoris: LycorisForm | None = None
    from_peft: FromPeft | None = None
    measures: Measures | None = None


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    _METHODS[method.peft_type] = method
    CLASSES[method.peft_type] = method.config
    return method


def methods() -> list[Method]:
    return list(_METHODS.values())


def method_of(peft_type: object) -> Method:
    """The method of this name.

    Raises:
        HalotuneError: for a name that no method bears.
    """
    return look_up(_METHODS, peft_type)
