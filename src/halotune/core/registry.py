"""The methods there are. Filled by `halotune.methods` at the first look, read by the engine, which knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .base import Base
from .config import AdapterConfig
from .errors import HalotuneError, closest
from .lycoris import LycorisForm
from .measures import Measures
from .operator import WeightShape

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
    return method


def _filled() -> dict[str, Method]:
    import_module("halotune.methods")  # by its name: no code here depends on a method
    return _METHODS


def methods() -> list[Method]:
    return list(_filled().values())


def method_of(peft_type: object) -> Method:
    """The method of this name.

    Raises:
        HalotuneError: for a name that no method bears.
    """
    name = str(getattr(peft_type, "value", peft_type))
    known = _filled()
    if name in known:
        return known[name]
    near = closest(name.upper(), list(known))
    hint = f" Did you mean {near[0]}?" if near else ""
    raise HalotuneError(f"peft_type: expected one of {', '.join(known)}; got {name!r}.{hint}")
