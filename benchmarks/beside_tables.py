"""What `beside.py` says of what was measured: ratios, tables, notes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from beside_cases import Case

THIS, OTHER = "this", "other"
GIB = 2**30
SLOWER = 1.05  # of the other tree's minimum: said below the tables


@dataclass
class Row:
    """What one contender gave with one worker: measure -> round -> milliseconds."""

    worker: str
    contender: str
    rounds: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    peak: int | None = None
    launches: int | None = None
    layers: int | None = None
    seen: dict[str, Any] | None = None
    problem: str | None = None
    skipped: bool = False
    seconds: float | None = None  # that the last turn took, all included

    @property
    def name(self) -> str:
        library, _, adapter = self.contender.rpartition(":")
        return f"{'peft' if library == 'peft' else self.worker} {adapter}"

    def times(self, measure: str) -> list[float]:
        return list(chain.from_iterable(self.rounds.get(measure, {}).values()))

    def add(self, number: int, answer: dict[str, Any]) -> None:
        self.problem, self.skipped = answer.get("problem"), answer.get("skipped", False)
        if self.problem:
            return
        for measure, ms in answer["times"].items():
            self.rounds.setdefault(measure, {})[number] = ms
        peaks = [p for p in (self.peak, answer.get("peak")) if p is not None]
        self.peak = max(peaks, default=None)
        self.launches, self.layers, self.seen = answer.get("launches"), answer.get("layers"), answer.get("seen")


def summary(times: list[float]) -> dict[str, float] | None:
    """Minimum and median in ms, and the distance of the quartiles over the median."""
    if not times:
        return None
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"min": min(times), "median": median, "spread": (high - low) / median}


def figures(row: Row, rows: list[Row]) -> dict[str, Any]:
    """All that a table or the file says of a row; `to_frozen` and `to_other` are ratios of minima and of medians."""
    bare = [r for r in rows if r.contender == "frozen"]
    counterpart = [r for r in rows if (r.worker, r.contender) == (OTHER, row.contender) and row.worker == THIS]
    measures = {}
    for measure in row.rounds:
        own = summary(row.times(measure))
        assert own is not None
        measures[measure] = {**own, "rounds": len(row.rounds[measure])}
        for name, group in {"to_frozen": bare, "to_other": counterpart}.items():
            reference = summary([t for r in group for t in r.times(measure)])
            measures[measure][name] = reference and {k: own[k] / reference[k] for k in ("min", "median")}
    launches = min((r.launches for r in bare if r.launches is not None), default=None)
    more = None
    if row.launches is not None and launches is not None and row.layers:
        more = (row.launches - launches) / row.layers
    smallest = min((r.peak for r in bare if r.peak), default=None)
    return {
        "contender": row.contender,
        "worker": row.worker,
        "problem": row.problem,
        "measures": measures,
        "peak_bytes": row.peak,
        "peak_to_frozen": row.peak / smallest if row.peak and smallest else None,
        "launches": row.launches,
        "launches_a_layer": more,
        "seen": row.seen,
        "rounds_ms": {m: {str(i): [round(t, 4) for t in ms] for i, ms in rounds.items()} for m, rounds in row.rounds.items()},
    }


# -- tables

Column = tuple[str, Callable[[Row, dict[str, Any], dict[str, Any]], str]]  # title; row, its figures, those of a measure -> text
COLUMNS: list[Column] = [
    ("rounds", lambda row, f, m: cell(m["rounds"], "d")),
    ("min", lambda row, f, m: cell(m["min"], ".2f")),
    ("median", lambda row, f, m: cell(m["median"], ".2f")),
    ("spread", lambda row, f, m: cell(m["spread"], ".0%")),
    ("× frozen, min", lambda row, f, m: cell(m["to_frozen"] and m["to_frozen"]["min"])),
    ("× frozen, median", lambda row, f, m: cell(m["to_frozen"] and m["to_frozen"]["median"])),
    ("÷ other, min", lambda row, f, m: cell(m["to_other"] and m["to_other"]["min"])),
    ("÷ other, median", lambda row, f, m: cell(m["to_other"] and m["to_other"]["median"])),
]
OF_THE_STEP: list[Column] = [
    ("peak GiB", lambda row, f, m: cell(row.peak and row.peak / GIB, ".2f")),
    ("× frozen", lambda row, f, m: cell(f["peak_to_frozen"], ".2f")),
    ("launches", lambda row, f, m: cell(row.launches, "d")),
    ("more a layer", lambda row, f, m: cell(f["launches_a_layer"], ".2f")),
]


def tables(case: Case, rows: list[Row]) -> str:
    """A table for each measure, then the problems."""
    shown = [(row, figures(row, rows)) for row in rows if row.rounds or row.seen]
    parts = [f"## {case.title}"]
    for measure in dict.fromkeys(m for row, _ in shown for m in row.rounds):
        columns = COLUMNS + OF_THE_STEP * (measure != "kernels")
        lines = [(row, f, f["measures"][measure]) for row, f in shown if measure in f["measures"]]
        body = [[row.name, *(text(row, f, m) for _, text in columns)] for row, f, m in lines]
        parts.append(markdown(*without_empty([f"{measure}, ms", *(title for title, _ in columns)], body)))
    seen = [(row, start, values) for row, _ in shown for start, values in (row.seen or {}).items()]
    if seen:
        head = ["contender", "from", *(f"{float(target):.0e}" for target in seen[0][2])]
        parts.append(markdown(head, [[r.name, start, *(cell(v["projection"]) for v in vs.values())] for r, start, vs in seen]))
    parts += notes(shown, rows)
    return "\n\n".join(parts)


def notes(shown: list[tuple[Row, dict[str, Any]]], rows: list[Row]) -> list[str]:
    """What is slower than in the other tree, and what could not be measured."""
    problems: dict[str, list[str]] = {}
    for row, f in shown:
        for measure, m in f["measures"].items():
            if m["to_other"] and m["to_other"]["min"] > SLOWER and row.contender != "frozen":
                problems.setdefault(f"minimum over {SLOWER} of the other tree's", []).append(f"{row.name} ({measure})")
    for row in rows:
        if row.problem:
            problems.setdefault(row.problem, []).append(row.name)
    return ["\n".join(f"- {', '.join(names)}: {problem}" for problem, names in problems.items())] if problems else []


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def without_empty(head: list[str], body: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(head)) if any(line[i] for line in body)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in body]
