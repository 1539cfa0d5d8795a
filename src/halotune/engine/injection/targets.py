"""Which modules a configuration names. Pure: names in, names out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError, closest, warn

ALL_LINEAR = "all-linear"


def matches(name: str, pattern: str | Collection[str] | None) -> bool:
    """A string is a regular expression matched in full; a collection holds names matched as suffixes."""
    if not pattern:
        return False
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(matches_suffix(name, p) for p in pattern)


def matches_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def layer_index(name: str, patterns: str | Collection[str] | None) -> int | None:
    """The index of the layer that a module lies in: the number after one of the lists named, or after the first list."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or [r"[^.]+"]:
        found = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)\.", name + ".")
        if found:
            return int(found[1])
    return None


def select(
    config: AdapterConfig,
    names: Iterable[str],
    linear: Collection[str],
    adaptable: Collection[str],
    to_save: Collection[str] = (),
) -> list[str]:
    """The modules to adapt.

    Args:
        config: its `target_modules` is not None.
        names: every module's name.
        linear: the names that "all-linear" means.
        adaptable: the names whose modules can be adapted, for suggestions.
        to_save: names of modules that are fully fine-tuned; a target that means one of these is no mistake.

    Raises:
        HalotuneError: nothing matched.
    """
    target = config.target_modules
    assert target is not None
    found = [n for n in names if (n in linear if target == ALL_LINEAR else matches(n, target))]
    if not found:
        raise HalotuneError(f"target_modules={_shown(target)}: no module of the model matches. {_hint(target, adaptable)}")
    if not isinstance(target, str):
        missed = sorted(t for t in target if not any(matches_suffix(n, t) for n in (*found, *to_save)))
        if missed:
            warn(f"target_modules: no module matches {', '.join(missed)}. {_hint(missed, adaptable)}")
    kept = [n for n in found if not matches(n, config.exclude_modules)]
    if not kept:
        raise HalotuneError(
            f"target_modules={_shown(target)}: exclude_modules={_shown(config.exclude_modules)} leaves none of the "
            f"{len(found)} modules that match. Exclude fewer."
        )
    return _of_layers(config, kept)


def select_parameters(
    config: AdapterConfig, experts: Collection[str], adaptable: Collection[str], others: Mapping[str, str] | None = None
) -> list[str]:
    """What `target_parameters` names: weights of fused experts, or the `weight` of a module that can be adapted.

    Args:
        others: the model's other parameters, and what each is.

    Raises:
        HalotuneError: a name that means nothing.
    """
    found: dict[str, None] = {}
    for wanted in sorted(config.target_parameters or ()):
        own = [n for n in experts if matches_suffix(n, wanted)]
        own += [n for n in adaptable if matches_suffix(f"{n}.weight", wanted)]
        if not own:
            known = sorted({".".join(n.split(".")[-2:]) for n in experts})
            is_other = next((f" ({n} is {what})" for n, what in (others or {}).items() if matches_suffix(n, wanted)), "")
            raise HalotuneError(
                f"target_parameters: {wanted!r} names no weight that can be adapted{is_other}. "
                + (f"Weights of fused experts here: {', '.join(known)}. " if known else "The model has no fused experts. ")
                + "Modules are named in target_modules, and a router is trained in full with modules_to_save."
            )
        found.update(dict.fromkeys(own))
    kept = [n for n in found if not matches(n, config.exclude_modules)]
    return _of_layers(config, kept) if kept else []


def _of_layers(config: AdapterConfig, found: list[str]) -> list[str]:
    wanted = config.layers_to_transform
    if wanted is None:
        return found
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    at = {n: layer_index(n, config.layers_pattern) for n in found}
    kept = [n for n in found if at[n] in indices]
    if not kept:
        there = sorted({i for i in at.values() if i is not None})
        raise HalotuneError(
            f"layers_to_transform={sorted(indices)}, layers_pattern={config.layers_pattern!r}: no layer of these matches. "
            + (f"The targets lie in layers {there}." if there else "No target lies in a numbered list of that name.")
        )
    return kept


def _hint(wanted: str | Collection[str], adaptable: Collection[str]) -> str:
    last = sorted({n.rsplit(".", 1)[-1] for n in adaptable if not n.rsplit(".", 1)[-1].isdigit()})
    terms = re.findall(r"\w+", wanted) if isinstance(wanted, str) else [w.rsplit(".", 1)[-1] for w in wanted]
    near = list(dict.fromkeys(c for t in terms for c in closest(t, last)))
    how = "A string is a regular expression for the whole path; list names to match endings. "
    how = how if isinstance(wanted, str) else ""
    if near:
        return f"{how}The closest names are {', '.join(near[:6])}."
    return f"{how}Modules that can be adapted: {', '.join(last[:12])}{' …' if len(last) > 12 else ''}."


def _shown(target: object) -> str:
    return repr(sorted(target) if isinstance(target, (set, frozenset)) else target)


def shortest_suffixes(chosen: Collection[str], all_names: Collection[str]) -> set[str]:
    """The shortest suffixes that match exactly the chosen names: what "all-linear" is written as in a file."""
    others = set(all_names) - set(chosen)
    out: set[str] = set()
    for name in chosen:
        parts = name.split(".")
        for k in range(len(parts) - 1, -1, -1):
            suffix = ".".join(parts[k:])
            if k == 0 or not (suffix.isdigit() or any(matches_suffix(o, suffix) for o in others)):
                out.add(suffix)
                break
    return out
