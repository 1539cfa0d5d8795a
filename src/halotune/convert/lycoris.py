"""Files of LyCORIS and kohya's scripts: their modules resolved against a base model, read and written.

A key is `{prefix}_{path with _ for .}.{tensor}`. The prefix tells which model of a pipeline the module is of. The path cannot
be split at its `_` alone, so it is looked up among the names of the base model's layers, its own and the original ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import AdapterFileError, HalotuneError, closest
from ..core.lycoris import LycorisForm
from ..core.registry import Method, method_of, methods
from ..engine.targets import matches_suffix, shortest_suffixes
from .base import Base
from .originals import Part

File = str | PathLike[str]
PEFT_PREFIX = "base_model.model."

# prefix in files -> the model of a pipeline that it stands for: the first that the pipeline has. T5 is the third text
# encoder of Stable Diffusion 3, and so numbered for FLUX too, where it is the second. The last six come with dots.
PREFIXES: dict[str, tuple[str, ...]] = {
    "lycoris": ("unet", "transformer"),
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3", "text_encoder_2"),
    "diffusion_model": ("unet", "transformer"),
    "unet": ("unet",),
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
}
Modules = dict[str, dict[str, Tensor]]  # name with `_` -> its tensors


@dataclass(frozen=True)
class LycorisFile:
    """What a file holds, before any base model is looked at.

    Attributes:
        groups: prefix -> its modules; "" holds those without a known one.
    """

    file: File
    method: Method
    groups: dict[str, Modules]
    metadata: dict[str, str]

    @property
    def prefixes(self) -> str:
        """For messages."""
        return ", ".join(p or "no known prefix" for p in self.groups)

    @property
    def form(self) -> LycorisForm:
        assert self.method.lycoris is not None
        return self.method.lycoris


@dataclass(frozen=True)
class Adapter:
    """A configuration and its tensors, under the keys of PEFT's files."""

    config: AdapterConfig
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Resolved(Adapter):
    """One adapter read from a LyCORIS file.

    Attributes:
        prefixes: whose modules it is made of.
        unmatched: names of those modules for which the base has no layer; they are left out.
    """

    prefixes: tuple[str, ...]
    unmatched: tuple[str, ...]


# -- reading


def is_lycoris(tensors: Iterable[str]) -> bool:
    """Whether keys are those of LyCORIS or kohya: a method's tensors, without PEFT's prefix."""
    first = {m.lycoris.required[0] for m in methods() if m.lycoris}
    return any(_split(key)[1] in first and not key.startswith(PEFT_PREFIX) for key in tensors)


def _split(key: str) -> tuple[str, str]:
    """A key's module and tensor; the tensor is "" where no method has one of that name."""
    known = {n for m in methods() if m.lycoris for n in (*m.lycoris.required, *m.lycoris.optional)}
    parts = key.split(".")
    for k in (1, 2):
        if ".".join(parts[-k:]) in known:
            return ".".join(parts[:-k]), ".".join(parts[-k:])
    return key, ""


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: File, prefix: str | None = None) -> LycorisFile:
    """Sort a file's tensors into modules.

    Args:
        prefix: the file's own, where it is none of the usual ones.

    Raises:
        AdapterFileError: it holds something else, or modules that are not whole.
    """
    modules: Modules = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        module, name = _split(key)
        if name:
            modules.setdefault(module, {})[name] = tensor
        else:
            unknown.append(key)
    used = {name for own in modules.values() for name in own}
    found = [m for m in methods() if m.lycoris and m.lycoris.required[0] in used]
    if unknown or len(found) != 1:
        ends = ", ".join(sorted({key.split(".", 1)[-1] for key in unknown} | used)[:12])
        expected = "; or ".join(f"{m.peft_type}: {', '.join(m.lycoris.required)}" for m in methods() if m.lycoris)
        raise AdapterFileError(
            file,
            f"expected modules of one method ({expected}), found tensors named {ends}.",
            key=(unknown or list(tensors))[0],
            remedy="Files that also hold norms, other algorithms or whole weights cannot be converted.",
        )
    method = found[0]
    _check_whole(method, modules, file)
    groups: dict[str, Modules] = {}
    for module, own in modules.items():
        flat = module.replace(".", "_")
        known = [p for p in (*PREFIXES, *([prefix] if prefix else [])) if flat.startswith(f"{p}_")]
        start = max(known, key=len, default="")
        groups.setdefault(start, {})[flat.removeprefix(f"{start}_")] = own
    return LycorisFile(file, method, groups, dict(metadata))


def _check_whole(method: Method, modules: Modules, file: File) -> None:
    assert method.lycoris is not None
    allowed = {*method.lycoris.required, *method.lycoris.optional}
    for module, own in modules.items():
        lacking = [n for n in method.lycoris.required if n not in own]
        if lacking or own.keys() - allowed:
            what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(sorted(own.keys() - allowed))}"
            raise AdapterFileError(
                file,
                f"a module of {method.peft_type} {what}.",
                key=module,
                remedy="It is damaged, or of a kind that has no form here.",
            )


def resolve(source: LycorisFile, base: Base, prefixes: Sequence[str]) -> Resolved:
    """The modules under these prefixes as an adapter of a base model.

    Raises:
        AdapterFileError: none of them is a layer of the base, or a name may mean several; or shapes do not fit.
    """
    form, method = source.form, source.method
    fields: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    unmatched: list[str] = []
    for prefix in prefixes:
        for name, theirs in source.groups[prefix].items():
            meanings = _meanings(base, name, form, theirs)
            full = f"{prefix}_{name}".lstrip("_")
            if len(meanings) > 1:
                paths = " and ".join(m[0].path for m in meanings)
                raise AdapterFileError(source.file, f"may mean {paths}.", key=full, remedy="Rename one in the base model.")
            if not meanings:
                unmatched.append(full)
                continue
            for part in meanings[0]:
                if part.path in fields:
                    raise AdapterFileError(
                        source.file, f"{part.path} has another adapter already.", key=full, remedy="Split the file."
                    )
                own = _cut(form, theirs, part, meanings[0], source.file, full)
                fields[part.path], ours = form.read(own, base.shapes[part.path])
                tensors.update({f"{PEFT_PREFIX}{part.path}.{n}": t for n, t in ours.items()})
    if not fields:
        raise _nothing_matches(source, base, unmatched)
    config = _config(method, base, fields, source.file)
    _check_shapes(method, base, config, fields, tensors, source.file)
    return Resolved(config, tensors, tuple(prefixes), tuple(unmatched))


def _meanings(base: Base, name: str, form: LycorisForm, theirs: Mapping[str, Tensor]) -> list[list[Part]]:
    """The layers that a name may mean; of several, those whose number of outputs fits."""
    found = base.index.get(name, [])
    return found if len(found) < 2 else [m for m in found if _fits(base, m, form, theirs)] or found


def _fits(base: Base, parts: Sequence[Part], form: LycorisForm, theirs: Mapping[str, Tensor]) -> bool:
    return sum(base.shapes[p.path].out_features for p in parts) in theirs[form.by_row[0]].shape


def _nothing_matches(source: LycorisFile, base: Base, unmatched: Sequence[str]) -> AdapterFileError:
    near = closest(unmatched[0], list(base.index), n=1) or list(base.index)[:1]
    return AdapterFileError(
        source.file,
        f"none of its {len(unmatched)} modules is a layer of the {base.class_name}, which has {len(base.shapes)}, for example "
        f"{', '.join(near)}.",
        key=unmatched[0],
        remedy="Is this the base model, and the part of the pipeline, that it was trained on?",
    )


def best_prefixes(source: LycorisFile, base: Base) -> list[str]:
    """The prefix whose modules are the base's, or several that share no layer.

    Raises:
        AdapterFileError: two would do, as for the text encoders of SDXL where these are alike.
    """
    matching: dict[str, set[str]] = {}
    for prefix, modules in source.groups.items():
        meant = [(name, base.index[name][0], own) for name, own in modules.items() if name in base.index]
        fitting = {name for name, parts, own in meant if _fits(base, parts, source.form, own)}
        if fitting:
            matching[prefix] = fitting
    whole = [p for p, names in matching.items() if len(names) == len(source.groups[p])]
    best = whole or sorted(matching, key=lambda p: -len(matching[p]))[:1]
    shared = [(a, b) for a in best for b in best if a < b and matching[a] & matching[b]]
    if shared:
        raise AdapterFileError(
            source.file,
            f"its modules under {' and under '.join(shared[0])} are both the {base.class_name}'s.",
            remedy=f"Choose with prefix={shared[0][0]!r} or prefix={shared[0][1]!r}.",
        )
    return best or list(source.groups)


def _cut(
    form: LycorisForm, theirs: dict[str, Tensor], part: Part, parts: Sequence[Part], file: File, key: str
) -> dict[str, Tensor]:
    """The tensors of one of the layers that a module consists of."""
    if part.rows is None:
        return theirs
    total = sum(b - a for p in parts for a, b in p.rows or ())
    out = dict(theirs)
    for name in form.by_row:
        if name in theirs:
            t = theirs[name]
            if t.shape[0] != total:
                raise AdapterFileError(
                    file,
                    f"{name} of shape {tuple(t.shape)} cannot be cut into {len(parts)} layers, of {total} outputs together.",
                    key=key,
                    remedy="Lengths of inputs (wd_on_output=False) tie such layers to each other.",
                )
            out[name] = torch.cat([t[a:b] for a, b in part.rows])
    return out


# -- the configuration that modules have in common


def _config(method: Method, base: Base, fields: Mapping[str, dict[str, Any]], file: File) -> AdapterConfig:
    """One configuration for all modules: ranks and scales by pattern, all else must agree."""
    entries: dict[str, Any] = {}
    for name in {n for own in fields.values() for n in own}:
        values = {path: own[name] for path, own in fields.items() if name in own}
        common = Counter(values.values()).most_common(1)[0][0]
        entries[name] = common
        pattern = method.config.PATTERNS.get(name)
        others = {path: v for path, v in values.items() if v != common}
        if pattern:
            entries[pattern] = _patterns(others, list(fields))
        elif others:
            path, value = next(iter(others.items()))
            raise AdapterFileError(
                file,
                f"the modules differ in {name}: {value!r} for {path} ({len(others)} modules), {common!r} for the other "
                f"{len(values) - len(others)}.",
                remedy="An adapter has one setting for all; split the file in two.",
            )
    config = method.config(
        **entries,
        target_modules=_targets(list(fields), base.paths),
        base_model_name_or_path=base.origin,
        auto_mapping={"base_model_class": base.class_name, "parent_library": base.library},
    )
    return config


def _patterns(values: Mapping[str, Hashable], paths: Sequence[str]) -> dict[str, Any]:
    """Patterns that give each of these modules its value and no other one: endings of paths, or the whole paths."""
    short: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        chosen = [path for path in paths if values.get(path) == value]
        short.update({f"{re.escape(s)}": value for s in sorted(shortest_suffixes(chosen, paths))})

    def given(path: str) -> list[Any]:
        return [v for pattern, v in short.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path)]

    if all(given(path) == ([values[path]] if path in values else []) for path in paths):
        return short
    return {f"^{re.escape(path)}": value for path, value in values.items()}


def _targets(chosen: Sequence[str], paths: Sequence[str]) -> set[str] | str:
    """Endings of paths that mean exactly these modules; a regular expression where none do."""
    suffixes = shortest_suffixes(chosen, paths)
    wanted = set(chosen)
    if all((path in wanted) == any(matches_suffix(path, s) for s in suffixes) for path in paths):
        return suffixes
    return "|".join(re.escape(path) for path in chosen)


def _check_shapes(
    method: Method, base: Base, config: AdapterConfig, paths: Iterable[str], tensors: Mapping[str, Tensor], file: File
) -> None:
    for path in paths:
        with torch.device("meta"):
            made = method.create(base.shapes[path], config.at(path))
        for name, p in made.named_parameters():
            t = tensors[f"{PEFT_PREFIX}{path}.{name}"]
            if t.shape != p.shape:
                raise AdapterFileError(
                    file,
                    f"expected {tuple(p.shape)} for {path}, a layer of {base.shapes[path]}; found {tuple(t.shape)}.",
                    key=name,
                    remedy="Is this the base model that it was trained on?",
                )


# -- writing


def write(adapter: Adapter, prefix: str, base: Base | None = None, original: bool = False) -> dict[str, Tensor]:
    """An adapter's tensors under LyCORIS' keys.

    Args:
        prefix: as in `PREFIXES`, or any other.
        base: its shapes and original names.
        original: use the names of the model's authors, and their stacked layers.

    Raises:
        HalotuneError: it holds what a LyCORIS file cannot.
    """
    config, method = adapter.config, method_of(adapter.config.peft_type)
    if method.lycoris is None:
        known = ", ".join(m.peft_type for m in methods() if m.lycoris)
        raise HalotuneError(f"LyCORIS has no {method.peft_type} as it is here; its files hold {known}.")
    form = method.lycoris
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        found = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.({method.prefix}.+)", key)
        if found is None:
            raise HalotuneError(f"{key}: LyCORIS files hold adapters alone, no biases and no modules trained whole.")
        modules.setdefault(found[1], {})[found[2]] = tensor
    theirs: dict[str, dict[str, Tensor]] = {}
    for path, own in modules.items():
        try:
            theirs[path] = form.write(config.at(path), own, base.shapes.get(path) if base else None)
        except HalotuneError as e:
            raise HalotuneError(f"{path}: {e}") from e
    named = _joined(form, theirs, base) if original and base else theirs
    out: dict[str, Tensor] = {}
    for path, own in named.items():
        for name, tensor in own.items():
            key = f"{prefix}_{path.replace('.', '_')}.{name}"
            if key in out:
                raise HalotuneError(f"{key}: two modules get this name, which LyCORIS cannot tell apart.")
            out[key] = tensor
    return out


def _joined(form: LycorisForm, modules: Mapping[str, dict[str, Tensor]], base: Base) -> dict[str, dict[str, Tensor]]:
    """Modules under their original names; layers that are stacked there become one."""
    out: dict[str, dict[str, Tensor]] = {}
    left = dict(modules)
    for name, parts in base.originals.items():
        there = [p for p in parts if p.path in left]
        if there:
            out[name] = _stack(form, name, parts, left)
            for p in parts:
                left.pop(p.path, None)
    return {**out, **left}


def _stack(form: LycorisForm, name: str, parts: Sequence[Part], modules: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    if parts[0].rows is None:
        return modules[parts[0].path]
    hint = 'Write the model\'s own names instead: names="model".'
    lacking = [p.path for p in parts if p.path not in modules]
    if lacking:
        raise HalotuneError(f"{name} stacks {len(parts)} layers, of which {', '.join(lacking)} have no adapter. {hint}")
    first = modules[parts[0].path]
    total = sum(b - a for p in parts for a, b in p.rows or ())
    out: dict[str, Tensor] = {}
    for key, t in first.items():
        pieces = [modules[p.path].get(key) for p in parts]
        if key in form.by_row and all(s is not None and s.shape[0] == _count(p) for s, p in zip(pieces, parts, strict=True)):
            out[key] = t.new_empty(total, *t.shape[1:])
            for p, piece in zip(parts, pieces, strict=True):
                start = 0
                for a, b in p.rows or ():
                    out[key][a:b] = piece[start : start + b - a]  # type: ignore[index]
                    start += b - a
        elif all(s is not None and torch.equal(s, t) for s in pieces):
            out[key] = t
        else:
            raise HalotuneError(f"{name} stacks {len(parts)} layers, whose {key} must be one and the same; they differ. {hint}")
    return out


def _count(part: Part) -> int:
    return sum(b - a for a, b in part.rows or ())


def metadata_for(config: AdapterConfig) -> dict[str, str]:
    """What user interfaces show of a file: kohya's names for rank, scale and method."""
    entries = config.to_dict()
    alpha = entries.get("alpha", entries.get("lora_alpha", config.r))
    algo = method_of(config.peft_type).peft_type.lower()
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(alpha),
        "ss_network_args": f'{{"algo": "{algo}"}}',
    }
