"""A LyCORIS file's modules as an adapter of a base model.

A module's name cannot be split at its `_` alone, so it is looked up among the names of the base model's layers, its own and
the original ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig, matching
from ..core.errors import AdapterFileError, closest
from ..engine.injection.targets import matches_suffix, shortest_suffixes
from ..methods.lycoris_form import LycorisForm
from ..methods.registry import Method
from .base import BaseLayers
from .lycoris import PEFT_PREFIX, LycorisFile, StoredAdapter, parse
from .originals import Part
from .rows import cut


@dataclass(frozen=True)
class Resolved(StoredAdapter):
    """One adapter read from a LyCORIS file.

    Attributes:
        prefixes: whose modules it is made of.
        unmatched: names of those modules for which the base has no layer; they are left out.
    """

    prefixes: tuple[str, ...]
    unmatched: tuple[str, ...]


def resolve(source: LycorisFile, base: BaseLayers, prefixes: Sequence[str]) -> Resolved:
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
            meanings = base.index.get(name, [])
            if len(meanings) > 1:
                meanings = [m for m in meanings if _fits(base, m, form, theirs)] or meanings
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
                own = cut(form, theirs, part, meanings[0], source.file, full)
                fields[part.path], ours = form.read(own, base.shapes[part.path])
                tensors.update({_key(base, part.path, n): t for n, t in ours.items()})
    if not fields:
        raise _nothing_matches(source, base, unmatched)
    config = _config(method, base, fields, source.file)
    _check_shapes(method, base, config, fields, tensors, source.file)
    return Resolved(config, tensors, tuple(prefixes), tuple(unmatched))


def _key(base: BaseLayers, path: str, name: str) -> str:
    return f"{PEFT_PREFIX}{base.keys.get(path, path)}.{name}"


def _fits(base: BaseLayers, parts: Sequence[Part], form: LycorisForm, theirs: Mapping[str, Tensor]) -> bool:
    """Whether layers that a name may mean have as many outputs as the module."""
    return sum(base.shapes[p.path].out_features for p in parts) in theirs[form.by_row[0]].shape


def _nothing_matches(source: LycorisFile, base: BaseLayers, unmatched: Sequence[str]) -> AdapterFileError:
    near = closest(unmatched[0], list(base.index), n=1) or list(base.index)[:1]
    return AdapterFileError(
        source.file,
        f"none of its {len(unmatched)} modules is a layer of the {base.class_name}, which has {len(base.shapes)}, for example "
        f"{', '.join(near)}.",
        key=unmatched[0],
        remedy="Give the base model, and the part of the pipeline, that it was trained on.",
    )


def check_written(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path, parts: Sequence[tuple[str, BaseLayers]]
) -> None:
    """Refuse to write what would not be read back.

    Args:
        parts: for each model, what the names of its modules begin with, and its layers.

    Raises:
        AdapterFileError: a tensor is missing, or does not fit, or no model has a layer of that name.
    """
    unread: dict[str, set[str]] = {}  # of each prefix, which several models may share
    for prefix, base in parts:
        source = parse(tensors, metadata, file, prefix)
        names = set(resolve(source, base, [prefix]).unmatched)
        unread[prefix] = unread.get(prefix, names) & names
    if left := set().union(*unread.values()):
        raise AdapterFileError(
            file,
            f"{len(left)} of its modules are of no layer of the model, such as {min(left)}, so nothing would read them.",
            remedy="Give the base model that the adapter was trained on.",
        )


def best_prefixes(source: LycorisFile, base: BaseLayers) -> list[str]:
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
    complete = [p for p, names in matching.items() if len(names) == len(source.groups[p])]
    best = complete or sorted(matching, key=lambda p: -len(matching[p]))[:1]
    shared = [(a, b) for a in best for b in best if a < b and matching[a] & matching[b]]
    if shared:
        raise AdapterFileError(
            source.file,
            f"its modules under {' and under '.join(shared[0])} are both the {base.class_name}'s.",
            remedy=f"Choose with prefix={shared[0][0]!r} or prefix={shared[0][1]!r}.",
        )
    return best or list(source.groups)


# -- the configuration that modules have in common


def _config(method: Method, base: BaseLayers, fields: Mapping[str, dict[str, Any]], file: Path) -> AdapterConfig:
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
                remedy="Split the file in two: an adapter has one setting for all.",
            )
    return method.config(
        **entries,
        inference_mode=True,
        target_modules=_targets(list(fields), base.paths),
        base_model_name_or_path=base.origin,
        auto_mapping={"base_model_class": base.class_name, "parent_library": base.library},
    )


def _patterns(values: Mapping[str, Hashable], paths: Sequence[str]) -> dict[str, Any]:
    """Patterns that give each of these modules its value and no other one: endings of paths, or the whole paths."""
    short: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        chosen = [path for path in paths if values.get(path) == value]
        short.update({re.escape(s): value for s in sorted(shortest_suffixes(chosen, paths))})
    if all(matching(short, path) == ([values[path]] if path in values else []) for path in paths):
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
    method: Method,
    base: BaseLayers,
    config: AdapterConfig,
    paths: Iterable[str],
    tensors: Mapping[str, Tensor],
    file: Path,
) -> None:
    for path in paths:
        with torch.device("meta"):
            made = method.create(base.shapes[path], config.at(path))
        for name, p in made.named_parameters():
            t = tensors[_key(base, path, name)]
            if t.shape != p.shape:
                raise AdapterFileError(
                    file,
                    f"expected {tuple(p.shape)} for {path}, a layer of {base.shapes[path]}; found {tuple(t.shape)}.",
                    key=name,
                    remedy="Give the base model that it was trained on.",
                )
