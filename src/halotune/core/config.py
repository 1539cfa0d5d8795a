"""Configurations: which modules are adapted, and the file format that holds them. All fields and their checks, once."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from .errors import AdapterFileError, HalotuneError, did_you_mean, look_up
from .files import CONFIG_NAME, locate, read_json, write_atomically


class TaskType(str, Enum):
    """What the base model does; it chooses the wrapper class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def beyond_peft(default: Any = MISSING, default_factory: Any = MISSING) -> Any:
    """A field that PEFT's files do not know: written only where it is set."""
    return field(default=default, default_factory=default_factory, metadata={"beyond_peft": True})


@dataclass(kw_only=True)
class BaseConfig:
    """What every PEFT configuration holds.

    Args:
        task_type: one of `TaskType`; it chooses the wrapper class.
        peft_type: set by the class; a different value is an error.
        auto_mapping: class and library of the base model, for `AutoPeftModel`.
        base_model_name_or_path: where the base model came from.
        revision: its revision on the hub.
        inference_mode: adapters are frozen.
    """

    task_type: TaskType | str | None = None
    peft_type: str | None = None  # a member of `PeftType`, once it is set
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False


BOOKKEEPING = frozenset(f.name for f in fields(BaseConfig))  # what an adapter computes does not depend on it


@dataclass(kw_only=True)
class AdapterConfig(BaseConfig):
    """The fields that all methods share.

    Args:
        target_modules: which modules get an adapter: names matched as suffixes, a regular expression matched in full,
            `"all-linear"` (every linear layer but the output layer, and fused experts), or None for the architecture's usual
            ones, if target_parameters names none.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: only layers of these indices.
        layers_pattern: name(s) of the list of layers, where the usual ones do not match.
        target_parameters: names of fused experts' weights that get adapters, matched as endings: `"experts.gate_up_proj"`.
        expert_sharing: one adapter for all experts of a weight, instead of one for each.
        modules_to_save: modules fully fine-tuned and stored beside the adapter.
        r: the rank: the number of reflections, of columns, or the side of a block.
        bias: which biases of the base are trained: `"none"`, `"all"`, or the method's own name for those of its layers.
        rank_pattern: name or regular expression -> r, for modules whose rank differs.
    """

    target_modules: list[str] | set[str] | tuple[str, ...] | str | None = None
    exclude_modules: list[str] | set[str] | tuple[str, ...] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = beyond_peft(default_factory=dict)
    target_parameters: list[str] | set[str] | tuple[str, ...] | None = beyond_peft(None)
    expert_sharing: bool = beyond_peft(False)

    r: int = 8
    bias: str = beyond_peft("none")

    # The method's name in files; the choices of bias; keys of PEFT's files that mean nothing here, with the values under
    # which they mean nothing; keys that make the adapter another one, with its name; and our field -> PEFT's name in files.
    TYPE: ClassVar[str]
    BIASES: ClassVar[tuple[str, ...]] = ("none",)
    INERT: ClassVar[dict[str, tuple[Any, ...]]] = {}
    FOREIGN: ClassVar[dict[str, str]] = {}
    FILE_NAMES: ClassVar[dict[str, str]] = {}
    PATTERNS: ClassVar[dict[str, str]] = {"r": "rank_pattern"}

    is_prompt_learning: ClassVar[bool] = False  # asked for by code written for PEFT

    def __post_init__(self) -> None:
        own = str(_value(self.TYPE))
        if self.peft_type is not None and _value(self.peft_type) != own:
            raise HalotuneError(
                f"{type(self).__name__}: peft_type is {own}; got {_value(self.peft_type)!r}. "
                "Leave it out, or use the configuration class of that method."
            )
        self.peft_type = peft_type_of(own)
        self._check_types()
        self._check_patterns()
        if self.task_type is not None:
            self.require_choice("task_type", [c.value for c in TaskType])
            self.task_type = TaskType(self.task_type)
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(names := getattr(self, name), (list, tuple)):
                setattr(self, name, set(names))
        if self.layers_pattern and self.layers_to_transform is None:
            raise self.error("layers_pattern", "needs layers_to_transform, which is None", "Give the layers' indices.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise self.error(
                "layers_to_transform",
                f"works with a list of target_modules; got the string {self.target_modules!r}",
                "Write the indices into the regular expression, or list the modules' names.",
            )
        self.check()

    def check(self) -> None:
        """The method's own conditions on its fields."""
        field, size = self.size
        for name, n in {field: size, **self.rank_pattern}.items():
            if n < 1:
                raise self.error(name, f"must be at least 1; got {n}", "Use a positive number, such as 8.")
        self.require_choice("bias", self.BIASES)

    @property
    def size(self) -> tuple[str, int]:
        """The field that says how large an adapter is, which `rank_pattern` gives for single modules; and its value."""
        return "r", self.r

    @property
    def kind(self) -> str:
        """Which kind of adapter the configuration means, where its method has several; else ""."""
        return ""

    def notices(self) -> list[str]:
        """What a user should know before training starts; warned of once, at wrapping."""
        return []

    def error(self, name: str, problem: str, remedy: str) -> HalotuneError:
        return HalotuneError(f"{type(self).__name__}.{name}: {problem}. {remedy}")

    def require_choice(self, name: str, choices: Collection[Any]) -> None:
        value = getattr(self, name)
        if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
            listed = ", ".join(repr(c) for c in choices)
            hint = did_you_mean(str(value), [c for c in choices if isinstance(c, str)])
            raise self.error(name, f"expected one of {listed}; got {value!r}", f"Use one of these, spelled exactly so.{hint}")

    def require_share(self, name: str) -> None:
        if not 0.0 <= getattr(self, name) < 1.0:
            raise self.error(name, f"must lie in [0, 1); got {getattr(self, name)}", "Use a probability, 0 for none.")

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(value, hints[f.name]):
                expected = str(f.type).replace("typing.", "")
                raise self.error(
                    f.name, f"expected {expected}; got {value!r} ({type(value).__name__})", "Give a value of that type."
                )

    def _check_patterns(self) -> None:
        named = {f: getattr(self, f) for f in ("target_modules", "exclude_modules", "layers_pattern")}
        listed = [(f, [v] if isinstance(v, str) else []) for f, v in named.items()]
        listed += [(f, list(getattr(self, f, {}))) for f in self.PATTERNS.values()]
        for name, patterns in listed:
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as e:
                    raise self.error(
                        name,
                        f"{pattern!r} is no regular expression ({e})",
                        'Anything is ".*" there; or list names, which match as endings of paths.',
                    ) from None

    # -- one module's share of the configuration

    def at(self, name: str) -> Self:
        """The configuration of the module `name`: its entries of `rank_pattern` and the like filled in."""
        own: dict[str, Any] = {}
        for target, patterns in self.PATTERNS.items():
            if found := matching(getattr(self, patterns, {}), name):
                own[self.size[0] if target == "r" else target] = found[0]
        return replace(self, **own) if own else self

    def combined(self, r: int) -> Self:
        """The configuration of an adapter made of several of this method."""
        return replace(self, r=r, rank_pattern={})

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """The entries of `adapter_config.json`, under PEFT's names."""
        out, usual = {}, type(self)()
        for f in fields(self):
            value = getattr(self, f.name)
            if not (f.metadata.get("beyond_peft") and value == getattr(usual, f.name)):
                out[self.FILE_NAMES.get(f.name, f.name)] = _jsonable(value)
        return out

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Self:
        """The configuration that `to_dict`, or PEFT, wrote.

        Raises:
            HalotuneError: for an entry that we do not know and that is not plainly switched off.
        """
        foreign = cls.foreign(entries)
        if foreign is not None:
            raise HalotuneError(" ".join(foreign))
        ours = {v: k for k, v in cls.FILE_NAMES.items()}
        known = {f.name for f in fields(cls)}
        kept: dict[str, Any] = {}
        for key, value in entries.items():
            name = ours.get(key, key)
            if name in known:
                kept[name] = value
            elif not (value in (None, False) or value == {} or value == [] or value in cls.INERT.get(key, ())):
                raise HalotuneError(
                    f"{cls.__name__}.{key}: not supported, and set to {value!r}.{did_you_mean(key, known)} Remove it if the "
                    "adapter does not depend on it."
                )
        return cls(**kept)

    @classmethod
    def foreign(cls, entries: Mapping[str, Any]) -> tuple[str, str] | None:
        """Of an adapter of PEFT's that is none of ours: what it is, and what reads it; None for ours."""
        found = next((key for key in cls.FOREIGN if entries.get(key)), None)
        if found is None:
            return None
        return (
            f"{cls.__name__}.{found}: set to {entries[found]!r}: the adapter is {cls.FOREIGN[found]}, which is not supported.",
            "peft reads it: merge it there into the weights (merge_and_unload), or train the adapter without.",
        )

    @classmethod
    def from_pretrained(cls, model_id: str | PathLike[str], subfolder: str | None = None, **kwargs: Any) -> AdapterConfig:
        """The configuration in a folder, or in a repository of the hub; of whichever method it is of."""
        file = locate(model_id, CONFIG_NAME, subfolder=subfolder, **kwargs)
        entries = read_json(file)
        if "peft_type" not in entries:
            raise AdapterFileError(
                file,
                "is missing.",
                key="peft_type",
                remedy=f"Give an adapter's folder; peft_type names the method, one of {', '.join(CLASSES)}.",
            )
        try:
            kind = look_up(CLASSES, str(_value(entries["peft_type"])), "peft_type")
            foreign = kind.foreign(entries)
            if foreign is not None:
                raise AdapterFileError(file, foreign[0], remedy=foreign[1])
            config = kind.from_dict(entries)
        except AdapterFileError:
            raise
        except HalotuneError as e:
            raise AdapterFileError(file, str(e), remedy="Fix the file, or save the adapter again.") from e
        if not isinstance(config, cls):
            raise HalotuneError(
                f"{file}: holds a {_value(config.peft_type)} adapter, not a {cls.__name__}. "
                "Read it with PeftConfig.from_pretrained."
            )
        return config

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Write `adapter_config.json` into the folder, atomically."""
        write_atomically(Path(save_directory) / CONFIG_NAME, self.write)

    def write(self, file: Path) -> None:
        """Write the entries of `adapter_config.json` into this file."""
        file.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")


CLASSES: dict[str, type[AdapterConfig]] = {}  # by the name in files; registering a method adds its own


def matching(patterns: Mapping[str, Any], path: str) -> list[Any]:
    """What patterns, which match endings of paths, give a module; the first counts."""
    return [value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path)]


def peft_types() -> Any:
    """`PeftType`: the enumeration of all methods' names in files."""
    return _enumeration(tuple(CLASSES))


@lru_cache
def _enumeration(names: tuple[str, ...]) -> Any:
    enumeration: Any = Enum("PeftType", {name: name for name in names}, type=str, module="halotune")
    enumeration.__reduce_ex__ = lambda self, protocol: (peft_type_of, (self.value,))  # there may be more methods by then
    return enumeration


def peft_type_of(name: str) -> Any:
    """The member of `PeftType` of this name; the name itself for a method that is not registered."""
    return peft_types()[name] if name in CLASSES else name


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else _value(value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type; True is no int, and an int is a fine float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (list, set, tuple):
        return isinstance(value, origin) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)
