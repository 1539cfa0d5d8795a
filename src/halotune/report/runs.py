"""Run folders, as far as they can be read: what is missing, half written or of another version is noted, never an error."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.errors import HalotuneError

RECORD, METRICS, CHANGES, GALLERY = FILES = ("run.json", "metrics.jsonl", "changes.json", "gallery.json")


@dataclass
class Run:
    """A run folder.

    Attributes:
        folder: where it lies.
        record: `run.json`.
        curves: name of a metric -> step -> value, of `metrics.jsonl`.
        changes: layer -> relative size of its change ‖W' − W‖ / ‖W‖, of `changes.json`.
        gallery: `gallery.json`.
        problems: what could not be read, in words.
    """

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[float, float]] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)
    gallery: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self, name: str) -> str:
        value = self.record.get(name)
        return "" if value is None or isinstance(value, (dict, list)) else str(value)

    @property
    def label(self) -> str:
        return self.text("label") or self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """What was asked for, flat: `adapter.r` -> 8."""
        named = {name: self.text(name) for name in ("recipe", "method", "model") if self.text(name)}
        return {**named, **dict(flat(self.record.get("config")))}

    @cached_property
    def figures(self) -> dict[str, float]:
        """Results and costs, flat: `results.best.accuracy` -> 0.91, `memory.peak_bytes`."""
        return numbers({name: self.record.get(name) for name in ("results", "parameters", "seconds", "memory")})

    @cached_property
    def substitutes(self) -> list[str]:
        found = self.record.get("substitutes")
        return [str(text) for text in found] if isinstance(found, list) else []

    def number(self, *names: str) -> float | None:
        """The number at a path of keys of the record."""
        return numbers(self.record).get(".".join(names))


def flat(entry: Any, front: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects, with their keys joined by dots."""
    if isinstance(entry, dict):
        for key, value in entry.items():
            yield from flat(value, f"{front}.{key}" if front else key)
    elif front:
        yield front, entry


def numbers(entry: Any) -> dict[str, float]:
    """The numbers among the leaves, in float32's range: what is larger is infinite, what is smaller is zero."""
    found = {k: v for k, v in flat(entry) if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: _as_float32(v) for k, v in found.items()}


def _as_float32(x: float) -> float:
    if abs(x) > 3e38:
        return math.inf if x > 0 else -math.inf
    return 0.0 if abs(x) < 1e-37 else float(x)


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run folders among these folders and below them, each once, in the order given, then of their paths."""
    found: dict[Path, Path] = {}
    for place in places:
        if not place.is_dir():
            what = "is a file" if place.exists() else "there is no such folder"
            raise HalotuneError(f"{place}: {what}. Give run folders, or a folder that holds some.")
        before = len(found)
        inside = [place] if _is_run(place) else list(_below(place))
        found.update((folder.resolve(), folder) for folder in inside if folder.resolve() not in found)
        if not inside and len(found) == before:
            raise HalotuneError(
                f"{place}: no run in it: neither the folder nor one below it holds {', '.join(FILES)}. "
                "Give the folder that a training command wrote (its --output), or a folder of such folders."
            )
    return list(found.values())


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _below(place: Path) -> Iterator[Path]:
    for path, folders, _ in os.walk(place):
        folders.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
        if _is_run(Path(path)):
            folders.clear()  # what lies in a run belongs to it
            yield Path(path)


def read_run(folder: Path) -> Run:
    run = Run(folder)
    run.record = _document(run, RECORD, needed=True)
    _read_metrics(run)
    layers = _document(run, CHANGES, needed=True).get("layers")
    if isinstance(layers, dict):
        ends = ".relative_change"
        found = numbers(layers)
        run.changes = {k.removesuffix(ends): v for k, v in found.items() if k.endswith(ends) and math.isfinite(v)}
    run.gallery = _document(run, GALLERY, needed=False)
    return run


def _document(run: Run, name: str, *, needed: bool) -> dict[str, Any]:
    """A JSON object in the run's folder; empty, with the reason noted, where there is none."""
    try:
        document = json.loads((run.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            run.problems.append(f"{name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as e:
        run.problems.append(f"{name} cannot be read as JSON: {e}")
        return {}
    if not isinstance(document, dict):
        run.problems.append(f"{name}: expected a JSON object, found a {type(document).__name__}")
        return {}
    return document


def _read_metrics(run: Run) -> None:
    """Every number of a line is a point of the curve of its name.

    Of two lines of one step, as after a resume, the later counts.
    """
    try:
        lines = (run.folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        run.problems.append(f"{METRICS} is missing" if missing else f"{METRICS} cannot be read: {e}")
        return
    broken = infinite = 0
    for line in filter(str.strip, lines):
        try:
            entries = numbers(json.loads(line))
            step = entries.pop("step")
        except (ValueError, KeyError, RecursionError):
            broken += 1
            continue
        entries.pop("epoch", None)
        for name, value in entries.items():
            if math.isfinite(value) and math.isfinite(step):
                run.curves.setdefault(name, {})[step] = value
            else:
                infinite += 1
    if broken:
        run.problems.append(f"{METRICS}: {broken} of {len(lines)} lines cannot be read, or have no step")
    if infinite:
        run.problems.append(f"{METRICS}: {infinite} values are not finite, and not drawn")
