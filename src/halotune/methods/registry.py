"""The methods there are: the engine knows none by name. Importing this module imports `halotune.methods`, which fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.adapter import Adapter
from ..core.base import Base
from ..core.config import CLASSES, AdapterConfig
from ..core.errors import HalotuneError, look_up
from ..core.operator import WeightShape
from .lycoris_form import LycorisForm
from .measures import Measures

Rewrite = Callable[[Any, dict[str, Tensor]], tuple[AdapterConfig, dict[str, Tensor]]]


@dataclass(frozen=True)
class FromPeft:
    """What makes a live layer of peft's one of ours. Nothing of peft is imported for it."""

    # peft's layer, the adapter's name, the weight's shape -> our adapter, whose parameters peft's will replace
    adapter: Callable[[Any, str, WeightShape], Adapter]
    # peft's layer, the adapter's name, the base -> what peft itself gets wrong on this layer, a phrase each
    differs: Callable[[Any, str, Base], list[str]]
    several: str | None = None  # what it gets wrong where several adapters of a layer are active, a phrase


@dataclass(frozen=True)
class ExpertsForm:
    """How PEFT's files hold two factors of an adapter on fused experts, A `(E, …)` and B `(E, …)`, which are not shared."""

    names: tuple[str, str]
    write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    # A, B, the number of experts, a weight's shape, whether it is stored transposed, PEFT's version -> our A and B
    read: Callable[[Tensor, Tensor, int, WeightShape, bool, str | None], tuple[Tensor, Tensor]]
    version: str  # PEFT's first that reads what is written


@dataclass(frozen=True)
class Kind:
    """One kind of a method's adapters, as benchmarks and the default learning rates tell them apart."""

    learning_rate: float  # the default
    fields: Callable[[int], Mapping[str, Any]] = lambda r: {"r": r}  # of a configuration of this size, whose scale is 1
    title: str = ""  # how people write it, where that is not in capitals


@dataclass(frozen=True)
class Method:
    """One entry of the registry."""

    peft_type: str  # the name in files, e.g. "HRA"
    prefix: str  # what the names of its parameters begin with, e.g. "hra_"
    config: type[AdapterConfig]
    adapters: tuple[type[Adapter], ...]  # every class that `create` may return
    create: Callable[[WeightShape, AdapterConfig], Adapter]  # from a configuration already resolved for the module
    kinds: Mapping[str, Kind] = field(default_factory=dict)  # by name in capitals
    aliases: Mapping[str, Rewrite] = field(default_factory=dict)  # its other names in files -> what rewrites under that name
    # for the method that represents every low-rank delta, whose adapters have `set_factors(B, A)`: with a scale of 1
    low_rank: Callable[[int], AdapterConfig] | None = None
    lycoris: LycorisForm | None = None
    experts: ExpertsForm | None = None  # where PEFT has a form of its own
    from_peft: FromPeft | None = None  # for methods that gain by it
    measures: Measures | None = None  # without it, saved adapters are looked at with their base model only


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
        HalotuneError: there is no method of this name.
    """
    return look_up(_METHODS, str(getattr(peft_type, "value", peft_type)), "peft_type")


def kinds() -> dict[str, tuple[Method, Kind]]:
    """Every kind of adapter there is, by its name in capitals."""
    return {name: (method, kind) for method in methods() for name, kind in method.kinds.items()}


def low_rank_method() -> Method:
    """The method that represents every low-rank delta."""
    return next(m for m in methods() if m.low_rank)


def low_rank_config(r: int) -> AdapterConfig:
    """Of that method, with a scale of 1."""
    create = low_rank_method().low_rank
    assert create is not None
    return create(r)


def under_alias(config: AdapterConfig, tensors: dict[str, Tensor], peft_type: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """A saved adapter under another name of its method.

    Raises:
        HalotuneError: `peft_type` is no name of its method.
    """
    method = method_of(config.peft_type)
    if method.peft_type == peft_type:
        return config, tensors
    if peft_type not in method.aliases:
        known = ", ".join((method.peft_type, *method.aliases))
        raise HalotuneError(
            f"a {method.peft_type} adapter cannot be written as {peft_type}. Choose one of its method's names: {known}."
        )
    return method.aliases[peft_type](config, tensors)
