"""Runs summed up: a row for each configuration, with mean and deviation over its seeds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from .grid import short, split
from .runs import Run

# Keys of a configuration that tell two runs apart without making them two configurations.
PER_RUN = {"seed", "label", "output", "output_dir", "folder", "run_name"}
# Words in the name of a result. What has none of them is better when it is higher.
LOWER_IS_BETTER = set(
    "loss nll perplexity ppl bpb error errors mse rmse mae wer cer fid kid lpips distance drift forgetting penalty".split()
)
NEITHER = set("entropy step steps epoch epochs count n total samples rows examples tokens seed seconds bytes".split())


@dataclass(frozen=True)
class Value:
    """Mean of a number over the `n` runs that have it, with the sample's standard deviation (0 of one run)."""

    mean: float
    deviation: float
    n: int


@dataclass(frozen=True)
class Row:
    """Runs whose configurations differ in the seed alone."""

    id: str
    runs: list[Run]

    @property
    def label(self) -> str:
        """That of the first run; of several runs, without a seed at its end."""
        label = self.runs[0].label
        return seedless(label) if len(self.runs) > 1 else label

    @property
    def counted(self) -> list[Run]:
        """The runs that enter the means: the finished ones, where there are any."""
        return [run for run in self.runs if run.text("status") == "finished"] or self.runs

    def value(self, key: str) -> Value | None:
        found = [v for run in self.counted if (v := run.figures.get(key)) is not None and math.isfinite(v)]
        return Value(fmean(found), stdev(found) if len(found) > 1 else 0.0, len(found)) if found else None

    @property
    def status(self) -> str:
        """`finished` if all are, else how many are what."""
        counts = Counter(run.text("status") or "unknown" for run in self.runs)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    @cached_property
    def changes(self) -> dict[str, Any] | None:
        """The mean change of each layer, as a grid of modules × layers."""
        names = list(dict.fromkeys(name for run in self.counted for name in run.changes))
        if not names:
            return None
        where = split(names)
        layers = list(dict.fromkeys(layer for layer, _ in where.values()))
        modules = list(dict.fromkeys(module for _, module in where.values()))
        cells: list[list[float | None]] = [[None] * len(layers) for _ in modules]
        for name, (layer, module) in where.items():
            found = fmean(run.changes[name] for run in self.counted if name in run.changes)
            cells[modules.index(module)][layers.index(layer)] = float(f"{found:.3g}")
        short_layers = short(layers)
        return {"layers": [short_layers[layer] for layer in layers], "modules": modules, "cells": cells}


def seedless(label: str) -> str:
    return re.sub(r"[\W_]+seed[\W_]*\d+$", "", label)


def rows(runs: Sequence[Run]) -> list[Row]:
    """In the order of their first runs; inside a row, by seed. Runs that were given other labels are no repetitions."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        known = isinstance(run.record.get("config"), dict)
        same = {k: v for k, v in run.config.items() if k not in PER_RUN} if known else str(run.folder)
        given = seedless(str(run.config.get("label") or ""))
        groups.setdefault(json.dumps([given, same], sort_keys=True), []).append(run)
    return [Row(f"row-{i}", sorted(group, key=_seed)) for i, group in enumerate(groups.values())]


def _seed(run: Run) -> float:
    seed = run.number("seed")
    return math.inf if seed is None or math.isnan(seed) else seed


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        key: of `Run.figures`.
        title: its head.
        better: `up`, `down`, or empty where neither end is the better one.
        unit: what a value is divided by before it is written.
    """

    key: str
    title: str
    better: str
    unit: float = 1.0

    @property
    def is_cost(self) -> bool:
        return not self.key.startswith("results.")

    def write(self, value: Value | None, runs: int = 1) -> str:
        """`0.8433 ± 0.0061`, and of how many where some of so many runs lack it; empty without a value."""
        if value is None:
            return ""
        text = written(value.mean / self.unit, value.deviation / self.unit)
        return f"{text} ({value.n} of {runs})" if value.n < runs else text

    def write_one(self, run: Run) -> str:
        found = run.figures.get(self.key)
        return "" if found is None else written(found / self.unit)


def written(number: float, deviation: float = 0.0) -> str:
    """To the second digit of the deviation; without one to four digits; whole numbers as they are."""
    if not math.isfinite(number):
        return str(number)
    if not deviation and number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    size = deviation or abs(number)
    decimals = max((1 if deviation else 3) - math.floor(math.log10(size)), 0)
    if decimals > 7:
        return f"{number:.3g} ± {deviation:.1g}" if deviation else f"{number:.3g}"
    text = f"{number:,.{decimals}f}"
    return f"{text} ± {deviation:,.{decimals}f}" if deviation else text


def columns(table: Sequence[Row]) -> list[Column]:
    """Results in the order in which they come, then the costs that some run knows."""
    known: dict[str, list[float]] = {}
    for row in table:
        for run in row.runs:
            for key, value in run.figures.items():
                known.setdefault(key, []).append(value)
    results = [Column(key, title(key.removeprefix("results.")), better(key)) for key in known if key.startswith("results.")]
    costs = [
        _cost("parameters.trainable", "trained parameters", known, ((1.0, ""),)),
        _cost("memory.peak_bytes", "peak memory", known, ((2**30, "GiB"), (2**20, "MiB"))),
        _cost("seconds", "time", known, ((3600.0, "h"), (60.0, "min"), (1.0, "s"))),
    ]
    return [*results, *(column for column in costs if column)]


def _cost(key: str, name: str, known: dict[str, list[float]], units: Iterable[tuple[float, str]]) -> Column | None:
    values = [v for v in known.get(key, ()) if math.isfinite(v)]
    if not values:
        return None
    size, unit = next((u for u in units if max(values) >= 2 * u[0]), list(units)[-1])
    return Column(key, f"{name} ({unit})" if unit else name, "down", size)


def title(key: str) -> str:
    return key.replace(".", " ").replace("_", " ")


def better(name: str) -> str:
    words = set(re.split(r"[\W_]+", name.lower()))
    if words & NEITHER:
        return ""
    return "down" if words & LOWER_IS_BETTER and "diversity" not in words else "up"


def settings(table: Sequence[Row]) -> tuple[dict[str, Any], list[str]]:
    """What all configurations share, and the keys in which they differ."""
    configs = [row.runs[0].config for row in table if row.runs[0].config]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in PER_RUN]
    shared = {k: configs[0][k] for k in keys if all(k in c and c[k] == configs[0][k] for c in configs)}
    return shared, [k for k in keys if k not in shared]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def curve(runs: Sequence[dict[float, float]], most: int) -> list[list[float]]:
    """Points [step, mean, least, greatest] over runs, of one run [step, value].

    Neighbouring steps are joined where there are more than `most`, each run's values then averaged first.
    """
    steps = sorted({step for values in runs for step in values})
    width = max(math.ceil(len(steps) / most), 1)
    points = []
    for at in range(0, len(steps), width):
        joined = steps[at : at + width]
        inside = [[values[step] for step in joined if step in values] for values in runs]
        means = [fmean(values) for values in inside if values]
        spread = (min(means), max(means)) if len(runs) > 1 else ()
        points.append([rounded(x) for x in (fmean(joined), fmean(means), *spread)])
    return points


def rounded(x: float) -> float:
    """To five digits: what a chart can show, and a page can hold."""
    near = float(f"{x:.5g}") if abs(x) < 1e4 else round(x)
    return int(near) if near == int(near) else near
