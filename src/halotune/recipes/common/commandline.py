"""A configuration from flags and YAML files, by jsonargparse: the fields of a dataclass are the flags.

parse(NLUConfig, ["--config", "run.yaml", "--method", "loha", "--r", "4"])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from ...core.errors import HalotuneError
from ...methods.registry import kinds
from .config import SET_BY_RECIPE, RunConfig, adapter_defaults, find_method, unknown

T = TypeVar("T")

NOTE = """Underscores may be written for the dashes of flags. --r 8 is short for --adapter.r 8, and so is every field
of the method's configuration whose name no other flag has. A switch without a value is turned on. Flags win over the file
of --config."""


def parse(kind: type[T], arguments: Sequence[str], prog: str = "halotune") -> T:
    """The configuration of a recipe, or of an evaluation, that these arguments mean.

    Raises:
        HalotuneError: an option or key is unknown (the nearest one is named), has a wrong value, or is missing.
        SystemExit: after --help and --print-config.
    """
    arguments = [_underscored(a) for a in arguments]
    files = {file: _written(file) for file in _values(arguments, "config")}

    def last(name: str) -> str | None:
        given = [*(entries.get(name) for entries in files.values()), *_values(arguments, name)]
        return next((str(value) for value in reversed(given) if value), None)

    method = last("method")
    parser = _parser(kind, prog, method, last("preset"))
    options = {name.lstrip("-"): name for name in parser._option_string_actions if name.startswith("--")}
    adapter = [n.removeprefix("adapter.") for n in options if n.startswith("adapter.")]
    for file, key in [(file, key) for file, entries in files.items() for key in _keys(entries)]:
        if key not in options:
            raise HalotuneError(f"{file}: {_unknown_option(key, _shown(options))}")
    arguments = _normalized(arguments, options, adapter, _switches(kind, parser), _lists(method, kind))
    try:
        found = parser.parse_args(arguments)
    except Exception as e:  # jsonargparse's own have no common class; each says which option, and what was found
        positional = [a.dest for a in parser._actions if not a.option_strings]
        raise HalotuneError(_explained(str(e), positional)) from e
    values = {f.name: getattr(found, f.name) for f in fields(kind) if hasattr(found, f.name)}  # type: ignore[arg-type]
    return kind(**{k: v.as_dict() if isinstance(v, Namespace) else v for k, v in values.items()})


class _Parser(ArgumentParser):
    """jsonargparse's, whose help shows flags as users write them."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--[\w.]+", lambda found: found[0].replace("_", "-"), super().format_help(*args, **kwargs))


def _parser(kind: type, prog: str, method: str | None, preset: str | None) -> ArgumentParser:
    positional = "".join(f" {f.name.upper()}" for f in fields(kind) if not f.kw_only and f.name != "_")
    parser = _Parser(prog=prog, exit_on_error=False, usage=f"{prog}{positional} [--config FILE] FLAG …", epilog=NOTE)
    parser.add_argument("--config", action="config", help="a YAML file with these options; may be given several times")
    if not issubclass(kind, RunConfig):
        parser.add_class_arguments(kind, None, as_positional=True)
        return parser
    parser.add_class_arguments(kind, None, skip={"adapter"})
    name = method or kind.METHOD
    entry, own = find_method(name)
    parser.add_class_arguments(entry.config, "adapter", skip=set(SET_BY_RECIPE))
    defaults = {f"adapter.{k}": v for k, v in adapter_defaults(entry, own, kind.TARGETS, kind.preset_fields(preset)).items()}
    parser.set_defaults({**defaults, "method": name})
    return parser


def _underscored(argument: str) -> str:
    """--freeze-head=true -> --freeze_head=true."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if re.match(r"--[a-zA-Z]", name) else argument


def _values(arguments: Sequence[str], name: str) -> list[str]:
    """The values of an option, before anything is parsed."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == f"--{name}":
            found += [value] if equals else arguments[i + 1 : i + 2]
    return found


def _written(file: str) -> dict[str, Any]:
    """What a file of --config holds."""
    remedy = "Write one with --print-config."
    try:
        entries = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise HalotuneError(f"--config {file}: cannot be read as YAML: {e}. {remedy}") from e
    if not isinstance(entries, dict):
        found = type(entries).__name__
        raise HalotuneError(f"--config {file}: expected options and their values; found a {found}. {remedy}")
    return entries


def _keys(entries: Mapping[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key, value in entries.items():
        nested = isinstance(value, dict) and prefix + str(key) == "adapter"
        out += _keys(value, f"{key}.") if nested else [prefix + str(key)]
    return out


def _normalized(
    arguments: Sequence[str], options: Mapping[str, str], adapter: Sequence[str], switches: set[str], lists: set[str]
) -> list[str]:
    """Short forms written out, switches given their value, unknown options refused; files first, so that flags win."""
    out: list[str] = []
    files: list[str] = []
    for i, argument in enumerate(arguments):
        if not re.match(r"--[a-zA-Z]", argument):
            before = out[-1][2:] if out and i and re.match(r"--[a-zA-Z]", arguments[i - 1]) else ""
            value = _as_list(argument) if before in lists else argument
            (files if i and arguments[i - 1] == "--config" else out).append(value)
            continue
        if argument == "--config":
            files.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in options and name in adapter:
            name = f"adapter.{name}"
        if name not in options:
            raise HalotuneError(_unknown_option(_flag(name), [_flag(known) for known in (*_shown(options), *adapter)]))
        value = _as_list(value) if name in lists else value
        alone = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
        out.append(f"--{name}" + (equals + value if equals else "=true" if name in switches and alone else ""))
    return files + out


def _flag(name: str) -> str:
    """A field as a flag, as users write it: --learning-rate."""
    return "--" + name.replace("_", "-")


def _as_list(value: str) -> str:
    """q_proj,v_proj -> [q_proj,v_proj], where names of modules are asked for: a text would be a regular expression."""
    return f"[{value}]" if re.fullmatch(r"[\w.]+(, *[\w.]+)*", value) and value not in ("all-linear", "null") else value


def _lists(method: str | None, kind: type) -> set[str]:
    """The options of the method's configuration that take names."""
    if not issubclass(kind, RunConfig):
        return set()
    hints = get_type_hints(find_method(method or kind.METHOD)[0].config)
    return {f"adapter.{name}" for name, hint in hints.items() if list[str] in get_args(hint)}


def _unknown_option(name: str, known: list[str]) -> str:
    field = name.removeprefix("--").removeprefix("adapter.").replace("-", "_")
    owners = [n.lower() for n, (method, _) in kinds().items() if field in method.config.__dataclass_fields__]
    if owners and field not in SET_BY_RECIPE:
        return f"{name} is an option of {', '.join(owners)}. Choose it with --method {owners[0]}, or leave the option out."
    return unknown(name, known, f"there is no option {name}")


def _shown(options: Mapping[str, str]) -> list[str]:
    return [name for name in options if not name.endswith("+") and name != "adapter"]


def _switches(kind: type, parser: ArgumentParser) -> set[str]:
    """The options that are true or false."""
    own = {name for name, hint in get_type_hints(kind).items() if hint is bool or set(get_args(hint)) == {bool, type(None)}}
    return own | {a.dest for a in parser._actions if isinstance(getattr(a, "default", None), bool)}


def _explained(message: str, positional: Sequence[str]) -> str:
    message = " ".join(message.split())
    if missing := re.search(r"following arguments are required: (.*)", message):
        names = (name.upper() if name in positional else _flag(name) for name in missing[1].split(", "))
        return f"needed, and not given: {', '.join(names)}."
    if re.search(r'Parser key "adapter": Unable to load', message):
        return "--adapter: expected a YAML file with fields of the method's configuration. Give them one by one: --adapter.r 8."
    option = re.search(r'Parser key "([^"]*)"', message)
    value = re.search(r"(?:Got|Given) value: (.*?)$", message)
    if not option or not value:
        return f"{message.rstrip('.')}. See --help."
    listed = re.search(r"Literal\[(.*?)\]", message)
    kinds_of = list(dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message)))
    expected = f"one of {listed[1]}" if listed else " or ".join(k for k in kinds_of if k != "NoneType") or "another value"
    return f"{_flag(option[1])}: expected {expected}; got {value[1]}. See --help."
