"""What every recipe's configuration has, and how it is told as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import PurePath
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import yaml  # transformers needs it
from transformers.trainer_utils import SchedulerType

from ...core.config import AdapterConfig, BaseConfig, fits
from ...core.errors import HalotuneError, closest
from ...methods.registry import Kind, Method, kinds

# Fields of an adapter's configuration that a recipe sets itself.
SET_BY_RECIPE = frozenset(f.name for f in fields(BaseConfig))


@dataclass(kw_only=True)
class RunConfig:
    """What the configurations of all recipes have.

    Args:
        model: the base model, a folder or a hub id.
        revision: its revision on the hub.
        method: a method of the library, such as hra, loha, bone, bat, oft, lora; by default hra, or that of `adapter`.
        adapter: the method's own configuration, or fields of it; by default the method's defaults on all linear layers.
        output: the run's folder; by default runs/ and the run's name.
        label: what reports call the run; by default the method and its size.
        seed: of the adapters, the order of the data and dropout.
        epochs: how often the data are gone through; may be a fraction. By default the preset's, else the recipe's.
        max_steps: end after so many optimizer steps, whatever `epochs` says.
        learning_rate: the peak; by default the preset's, else the method's in `halotune.DEFAULT_LEARNING_RATES`, of which
            recipes for pictures take a tenth.
        batch_size: examples of an optimizer step, over all processes.
        micro_batch_size: examples that a process takes at once; by default its whole share of `batch_size`.
        schedule: of the learning rate after the warmup, as transformers names them (linear, cosine, constant …).
        warmup: optimizer steps, or a share of all steps where it is under 1. By default the preset's, else the recipe's.
        weight_decay: of AdamW; the scale-free vectors of an adapter, biases and norms have none.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        precision: fp32; bf16 or fp16 hold the frozen base in that type and compute in it, the trained weights stay in fp32.
        quant: hold the base in 4-bit (nf4) or 8-bit (int8) numbers; needs bitsandbytes.
        gradient_checkpointing: compute activations again in backward, which takes less memory and more time.
        device: auto takes the accelerator where there is one.
        deterministic: the same numbers in every run on a GPU too; slower there.
        log_every: optimizer steps between lines of metrics.jsonl.
        evaluate_every: optimizer steps between evaluations; by default one at the end of each epoch.
        save_every: optimizer steps between checkpoints; by default one at the end of each epoch.
        keep_checkpoints: how many checkpoints are kept.
        tracker: tensorboard, none, or any that transformers' `report_to` knows (wandb, mlflow, trackio …).
        skip_bad_rows: leave out rows that cannot be used, count and list them, instead of ending with an error.
    """

    model: str
    revision: str | None = None
    method: str | None = None
    adapter: AdapterConfig | dict[str, Any] | None = None
    output: str | None = None
    label: str | None = None
    seed: int = 0
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    schedule: str = "linear"
    warmup: float | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    quant: Literal["nf4", "int8"] | None = None
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    deterministic: bool = False
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 1
    tracker: str = "tensorboard"
    skip_bad_rows: bool = False

    RECIPE: ClassVar[str]
    TARGETS: ClassVar[str] = "all-linear"  # of adapters that name none
    METHOD: ClassVar[str] = "hra"
    EPOCHS: ClassVar[float] = 3.0
    RATE: ClassVar[float] = 1.0  # times the method's default learning rate
    WARMUP: ClassVar[float] = 0.06

    def __post_init__(self) -> None:
        check_types(self)
        preset = self.preset_fields(vars(self).get("preset"))
        self.method, self.adapter = resolve_adapter(self.method or None, self.adapter, self.TARGETS, self.METHOD, preset)
        self.fill()
        kind = find_method(self.method)[1]
        self.fill_in(epochs=self.EPOCHS, warmup=self.WARMUP, learning_rate=kind.learning_rate * self.RATE)
        self.label = self.label or f"{kind.title or self.method.upper()} {'='.join(map(str, self.adapter.size))}"
        for name in ("batch_size", "log_every", "keep_checkpoints"):
            self.require(name, getattr(self, name) >= 1, "must be at least 1", "Use a whole number such as 8.")
        for name in ("max_steps", "micro_batch_size", "evaluate_every", "save_every"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "must be at least 1", "Leave it out for the default.")
        for name in ("epochs", "learning_rate"):
            self.require(name, 0 < getattr(self, name) < math.inf, "must be above 0, and finite", "Use a positive number.")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            self.require(name, getattr(self, name) >= 0, "must not be negative", "Use 0 for none.")
        self.require("seed", 0 <= self.seed < 2**32, "must be from 0 to below 2³²", "Use a whole number such as 0.")
        schedules = [s.value for s in SchedulerType]
        if self.schedule not in schedules:
            raise HalotuneError(f"schedule: {unknown(self.schedule, schedules, f'there is no schedule {self.schedule!r}')}")
        self.check()
        self.output = self.output or self.default_output

    @classmethod
    def preset_fields(cls, preset: str | None) -> Mapping[str, Any]:
        """What a preset says of the adapter's configuration, where nothing else is given."""
        return {}

    def check(self) -> None:
        """The recipe's own conditions."""

    def fill(self) -> None:
        """What the recipe fills in where nothing was given, such as a preset's values."""

    def fill_in(self, **values: Any) -> None:
        """Values for the fields that are None."""
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def name(self) -> str:
        """What is trained, without the seed."""
        return f"{self.RECIPE}-{self.method}"

    @property
    def default_output(self) -> str:
        return f"runs/{self.name}-seed{self.seed}"

    def require(self, name: str, condition: bool, problem: str, remedy: str) -> None:
        require(self, name, condition, problem, remedy)


def check_types(config: Any) -> None:
    """Raise an error about a field of another type, or with none of its words, as Python lets be given. Paths become text."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        hint, value = hints[f.name], getattr(config, f.name)
        if isinstance(value, PurePath):
            setattr(config, f.name, value := str(value))
        choices = [c for h in (hint, *get_args(hint)) if get_origin(h) is Literal for c in get_args(h)]
        if isinstance(value, str) and choices and value not in choices:
            raise HalotuneError(f"{f.name}: {unknown(value, choices, f'there is no {value!r}')}")
        if not fits(value, hint):
            found = f"{value!r} ({type(value).__name__})"
            raise HalotuneError(f"{f.name}: expected {f.type}; got {found}. Give a value of that type.")


def require(config: Any, name: str, condition: bool, problem: str, remedy: str) -> None:
    """Raise an error about a field, unless the condition holds."""
    if not condition:
        raise HalotuneError(f"{name}: {problem}; got {getattr(config, name)!r}. {remedy}")


def resolve_adapter(
    method: str | None,
    adapter: AdapterConfig | Mapping[str, Any] | None,
    targets: str,
    default: str,
    preset: Mapping[str, Any] | None = None,
) -> tuple[str, AdapterConfig]:
    """The method's name in small letters and its configuration, from whichever of the two was given.

    A whole configuration is taken as it is; fields of one win over the preset's.

    Raises:
        HalotuneError: there is no such method or field, or the two contradict each other.
    """
    if isinstance(adapter, AdapterConfig):
        own = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        named = (adapter.kind.upper() if adapter.kind.upper() in kinds() else own).lower()
        if method is not None and method.lower() not in (named, own.lower()):
            raise HalotuneError(f"method: got {method!r}, but adapter is a {type(adapter).__name__}. Leave out one of them.")
        return named, adapter
    name = (method or default).lower()
    entry, kind = find_method(name)
    given = {**adapter_defaults(entry, kind, targets, preset or {}), **(adapter or {})}
    known = [f.name for f in fields(entry.config) if f.name not in SET_BY_RECIPE]
    for key in given:
        if key not in known:
            raise HalotuneError(f"adapter.{key}: {unknown(key, known, f'{entry.config.__name__} has no such field')}")
    return name, entry.config(**given)


def find_method(name: str) -> tuple[Method, Kind]:
    known = {n.lower(): found for n, found in kinds().items()}
    if name.lower() not in known:
        raise HalotuneError(f"method: {unknown(name, list(known), f'there is no method {name!r}')}")
    return known[name.lower()]


def adapter_defaults(method: Method, kind: Kind, targets: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that make a configuration one of this kind, at the method's own default size, or a preset's."""
    size = method.config().size[1]
    own = dict(kind.fields(size)) if size else {}
    known = {f.name for f in fields(method.config)}
    return {"target_modules": targets, **own, **{name: value for name, value in preset.items() if name in known}}


def unknown(name: str, known: list[str], problem: str) -> str:
    initials = [k for k in known if "-" in k[2:] and "".join(word[0] for word in k.strip("-").split("-")) == name.strip("-")]
    words = [k for k in known if "-" in k[2:] and name.strip("-") in k.strip("-").split("-")]
    # --lr is --learning-rate, and --steps the one --inference-steps that there is
    near = initials or (words if len(words) == 1 else closest(name, known, n=1))
    few = f"Known are {', '.join(sorted(known))}." if len(known) < 16 else "See --help for all there are."
    return f"{problem}. " + (f"Did you mean {near[0]}?" if near else few)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as values that JSON and YAML know; reading them gives the same configuration."""
    out: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, AdapterConfig):
            entries = {g.name: getattr(value, g.name) for g in fields(value) if g.name not in SET_BY_RECIPE}
            out[f.name] = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in entries.items()}
        else:
            out[f.name] = plain(value) if is_dataclass(value) else value
    return out


def as_yaml(config: Any) -> str:
    """A configuration as a file that --config reads."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
