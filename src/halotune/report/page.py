"""`halotune report`: one self-contained HTML page from run folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from .gallery import gallery_of, side_by_side
from .rows import Column, Row, columns, curve, rows, settings, shown, title
from .runs import Run, find_runs, flat, read_run

ASSETS = Path(__file__).parent / "assets"
POINTS = 30_000  # of all curves together: about a megabyte
DRAWN = 10  # rows, at first: more lines than that cannot be told apart
FACTS = ("command", "commit", "hardware", "versions")


def write_page(runs: Sequence[Path], output: Path) -> list[Run]:
    """Write the page of run folders, or of folders that hold some; returns the runs, with the problems found in each.

    A run's folder holds `run.json`, `metrics.jsonl`, `changes.json` and `gallery.json`; what is missing is shown as missing.

    Raises:
        HalotuneError: a place is no folder, or holds no run; the output is a folder.
    """
    if output.is_dir():
        raise HalotuneError(f"{output}: is a folder. Give the name of a file to write, such as {output / 'index.html'}.")
    found = [read_run(folder) for folder in find_runs(runs)]
    content = _render(found).encode("utf-8", "replace")  # JSON may hold halves of characters
    write_atomically(output, lambda temporary: temporary.write_bytes(content))
    return found


def _render(runs: list[Run]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    environment.globals["asset"] = lambda name: Markup((ASSETS / name).read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(_content(runs))


def _content(runs: list[Run]) -> dict[str, Any]:
    """What the template shows."""
    table = rows(runs)
    shared, differing = settings(table)
    names = _names(table, differing)
    numbers = columns(table)
    galleries = [
        (_run_name(run, names[row.id]), gallery) for row in table for run in row.runs if (gallery := gallery_of(run))
    ]  # first, for the problems that this finds
    joined = side_by_side(galleries)
    together = ["side by side" + (f" ({i})" if len(joined) > 1 else "") for i in range(1, len(joined) + 1)]
    facts = {str(run.folder): _facts(run) for run in runs}
    common = {k: v for k, v in facts[str(runs[0].folder)].items() if all(own.get(k) == v for own in facts.values())}
    return {
        "heading": runs[0].label if len(runs) == 1 else f"{len(runs)} runs",
        "subheading": " · ".join(str(shared[name]) for name in ("recipe", "method", "model") if name in shared),
        "runs": runs,
        "common": {title(k): shown(v) for k, v in shared.items()} | common,
        "settings": {
            k: _key_name(k, differing) for k in differing if all(k in c for row in table if (c := row.runs[0].config))
        },
        "columns": numbers,
        "lines": [_line(row, names[row.id], differing, facts, common) for row in table],
        "best": _best(table, numbers),
        "substitutes": _substitutes(table, names),
        "galleries": [*zip(together, joined, strict=True), *galleries],
        "drawn": DRAWN,
        "data": _data(table, names, numbers),
    }


@dataclass(frozen=True)
class Line:
    """A row of the table, with what the others do not share.

    Attributes:
        facts: of each run, with its name in the row.
    """

    row: Row
    name: str
    settings: dict[str, str]
    facts: list[tuple[Run, str, dict[str, str]]]

    @property
    def incomplete(self) -> bool:
        return any(run.problems for run in self.row.runs)


def _line(row: Row, name: str, differing: list[str], facts: dict[str, dict[str, str]], common: dict[str, str]) -> Line:
    own = [
        (
            run,
            _run_name(run),
            {k: v for k, v in facts[str(run.folder)].items() if k not in common} | {"folder": run.folder.name},
        )
        for run in row.runs
    ]
    config = row.runs[0].config
    return Line(row, name, {k: shown(config[k]) for k in differing if k in config}, own)


def _facts(run: Run) -> dict[str, str]:
    found = flat({name: run.record.get(name) for name in FACTS})
    return {title(key): shown(value) for key, value in found if value is not None}


def _key_name(key: str, keys: Iterable[str]) -> str:
    """`adapter.r` is called r, unless there is another r."""
    last = key.rpartition(".")[2]
    return title(key if sum(other.rpartition(".")[2] == last for other in keys) > 1 else last)


def _run_name(run: Run, row: str = "") -> str:
    seed = run.text("seed")
    return ", ".join(part for part in (row, f"seed {seed}" if seed else run.folder.name) if part)


def _names(table: list[Row], differing: list[str]) -> dict[str, str]:
    """Row -> its label, with the settings that tell it from others of the same label."""
    out = {}
    for row in table:
        same = [other.runs[0].config for other in table if other.label == row.label]
        config = row.runs[0].config
        apart = [k for k in differing if k in config and any(c.get(k, config[k]) != config[k] for c in same)]
        out[row.id] = ", ".join([row.label, *(f"{_key_name(k, differing)} {shown(config[k])}" for k in apart)])
    return out


def _best(table: list[Row], numbers: list[Column]) -> dict[str, str]:
    """Column -> the row with the best mean, where there are several."""
    out = {}
    for column in numbers:
        means = {row.id: v.mean for row in table if (v := row.value(column.key))}
        if column.better and len(means) > 1:
            out[column.key] = (max if column.better == "up" else min)(means, key=means.__getitem__)
    return out


def _substitutes(table: list[Row], names: dict[str, str]) -> dict[str, list[str]]:
    """What stands for something else -> the rows of which that holds."""
    out: dict[str, list[str]] = {}
    for row in table:
        for text in dict.fromkeys(text for run in row.runs for text in run.substitutes):
            out.setdefault(text, []).append(names[row.id])
    return out


def _data(table: list[Row], names: dict[str, str], numbers: list[Column]) -> dict[str, Any]:
    """What the charts draw."""
    curves: dict[str, dict[str, list[dict[float, float]]]] = {}
    for row in table:
        for run in row.runs:
            for metric, values in run.curves.items():
                curves.setdefault(title(metric), {}).setdefault(row.id, []).append(values)
    most = min(max(POINTS // max(sum(map(len, curves.values())), 1), 10), 200)
    return {
        "rows": [
            {
                "id": row.id,
                "name": names[row.id],
                "values": {
                    c.key: [v.mean / c.unit, v.deviation / c.unit, c.write(v, len(row.counted))]
                    for c in numbers
                    if (v := row.value(c.key))
                },
                "changes": row.changes,
            }
            for row in table
        ],
        "results": [{"key": c.key, "title": c.title, "better": c.better} for c in numbers if not c.is_cost and c.better],
        "costs": [{"key": c.key, "title": c.title} for c in numbers if c.is_cost],
        "curves": {metric: {id: curve(runs, most) for id, runs in of_rows.items()} for metric, of_rows in curves.items()},
    }
