"""Module paths as a grid: which layer of the model, and which module of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def split(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Path -> layer and module, e.g. `model.layers.3.self_attn.q_proj` -> `model.layers.3`, `self_attn.q_proj`.

    A layer ends in a number. Of several numbers, the one after which most paths go on alike; where that leaves a choice, the
    first, so that modules keep their longest names. A path without a number has the layer "".
    """
    endings = Counter(module for path in paths for _, module in _ways(path))
    return {path: max(_ways(path), key=lambda way: endings[way[1]], default=("", path)) for path in paths}


def _ways(path: str) -> list[tuple[str, str]]:
    parts = path.split(".")
    cuts = [i for i, part in enumerate(parts[:-1], 1) if part.isdecimal()]
    return [(".".join(parts[:i]), ".".join(parts[i:])) for i in cuts]


def short(names: Iterable[str]) -> dict[str, str]:
    """Layer -> its name without what all have in front, e.g. `model.layers.3` -> `3`."""
    names = list(names)
    parts = [name.split(".") for name in names if name]
    common = 0
    while parts and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return {name: ".".join(name.split(".")[common:]) for name in names}
