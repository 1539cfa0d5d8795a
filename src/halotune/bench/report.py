"""What a run shows and keeps: the table, `bench.json`, the chart."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from statistics import quantiles
from typing import Any

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..report.record import read_record
from ..report.table import text_table
from .rows import PROCESSES, Row, short

FILE, FORMAT = "bench.json", 1
GIB, MIB = 2**30, 2**20
NONE = "–"
TITLES = {"frozen": "× frozen", "lora": "× LoRA", "peft_lora": "× peft's LoRA"}
# Okabe and Ito's colours, which the colour-blind can tell apart.
LIBRARIES = {"frozen": "#555555", "ours": "#0072B2", "peft": "#E69F00", "lycoris": "#CC79A7"}
COLOURS = ("#CC79A7", "#009E73", "#D55E00", "#0072B2", "#000000", "#E69F00", "#56B4E9", "#F0E442")  # of the methods
LINES = {"peft": "--", "lycoris": ":"}

# -- the table


def heading(kind: str, setting: dict[str, Any]) -> str:
    """What a reader has to know, in three lines."""
    s = setting
    shape = ", ".join(f"{k} {v}" for k, v in s["shape"].items() if isinstance(v, int))
    where = "" if s["targets"] is None else f", {s['targets']} ({s['adapted_modules']} modules)"
    mode = ("compiled" if s["compiled"] else "eager") + (", in a CUDA graph" if s.get("cuda_graph") else "")
    mode += f", FSDP2 over {s['nproc']} processes beside one" if s.get("nproc") else ""
    size = "" if s["batch"] is None else f", batch {s['batch']} × {s['tokens']} tokens"
    return "\n".join(
        [
            f"{kind}: {s['model']}{where}, {s['dtype']}, {mode}{size}",
            shape,
            f"{s['device']}; {', '.join(f'{k} {v}' for k, v in s['versions'].items())}",
        ]
    )


def table(rows: Sequence[Row]) -> str:
    """One line a row; columns that would be the same or empty all the way down are left out."""
    columns: list[tuple[str, Callable[[Row], str]]] = [("contender", lambda r: str(r.contender))]
    if any(r.point for r in rows):
        columns.append(("at", lambda r: " ".join(f"{k} {v}" for k, v in r.point.items())))
    if len({r.measure for r in rows}) > 1:
        columns.append(("measure", lambda r: r.measure))
    columns += [("trainable", lambda r: NONE if r.trainable is None else f"{r.trainable:,}"), ("ms [min–max]", _time)]
    for name, title in TITLES.items():
        if name in ("frozen", "lora") or any(name in r.ratios for r in rows):
            columns.append((title, lambda r, name=name: f"{r.ratios[name].median:.2f}" if name in r.ratios else NONE))
    if any(r.tokens_per_second for r in rows):
        columns.append(("tokens/s", lambda r: NONE if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}"))
        columns.append(("speed-up", lambda r: NONE if r.speed_up is None else f"{r.speed_up.median:.2f}"))
        columns.append(("÷ frozen's", lambda r: NONE if r.scaling is None else f"{r.scaling:.2f}"))
    if any(r.saved is not None for r in rows):
        columns.append(("kept MiB", lambda r: NONE if r.saved is None else f"{r.saved / MIB:.2f}"))
    columns.append(("peak GiB", lambda r: NONE if r.peak is None else f"{r.peak / GIB:.2f}"))
    columns.append(("× memory", lambda r: NONE if r.memory_ratio is None else f"{r.memory_ratio:.2f}"))
    columns.append(("status", lambda r: textwrap.shorten(r.status, 70, placeholder=" …")))
    body = [[cell(row) for _, cell in columns] for row in rows]
    return text_table([title for title, _ in columns], body, left={"contender", "at", "measure", "status"})


def _time(row: Row) -> str:
    if row.median is None:
        return NONE
    return f"{short(row.median)} [{short(min(row.times))}–{short(max(row.times))}]"


# -- the file


def read_runs(file: Path) -> list[dict[str, Any]]:
    """The runs that are in the file already; none where there is no file."""
    if not file.exists():
        return []
    record = read_record(file, FORMAT)
    if record is not None and isinstance(record.get("runs"), list):
        return record["runs"]
    raise HalotuneError(f"{file}: is not a file of this benchmark, so no run can be added. Choose another --output-dir.")


def as_document(earlier: Sequence[dict[str, Any]], kind: str, date: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The earlier runs and this one."""
    return {"format": FORMAT, "runs": [*earlier, {"kind": kind, "date": date, "rows": [row.to_dict() for row in rows]}]}


# -- the chart


def plot_name(kind: str, setting: dict[str, Any]) -> str:
    s = setting
    sizes = f"{s['shape'].get('in_features')}x{s['shape'].get('out_features')}"
    what = [sizes] if s["targets"] is None else [s["model"], s["targets"]]
    batch = [] if s["batch"] is None else [f"{s['batch']}x{s['tokens']}"]
    batch += [f"fsdp{n}"] if (n := s.get("nproc")) else []
    mode = [name for name, on in {"compiled": s["compiled"], "cuda-graph": s.get("cuda_graph")}.items() if on]
    return "-".join([kind, *what, s["dtype"], *batch, *mode]) + ".png"


def plot(file: Path, kind: str, rows: Sequence[Row]) -> bool:
    """Bars, or lines over the swept size; False where matplotlib is not installed or nothing was measured."""
    measured = [row for row in rows if row.rounds]
    if not measured or not find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in measured:
        panels.setdefault(next(iter(row.point), row.measure), []).append(row)
    bars = not any(row.point for row in measured)
    tallest = max(map(len, panels.values()))
    size = (5.5 * len(panels), 1.6 + 0.32 * tallest if bars else 4.8)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    for axes, (name, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        (_bars if bars else _curves)(axes, name, panel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x" if bars else "both")
    figure.suptitle(heading(kind, measured[0].setting).splitlines()[0], fontsize=10)
    write_atomically(file, lambda temporary: figure.savefig(temporary, format="png"))
    return True


def _bars(axes: Any, name: str, rows: Sequence[Row]) -> None:
    """One bar for each contender: the median, and the quartiles, which one pause of the machine does not move."""
    for i, row in enumerate(rows):
        low, median, high = quantiles(row.times, n=4, method="inclusive") if len(row.times) > 1 else row.times * 3
        spread = [[median - low], [high - median]]
        axes.barh(i, median, xerr=spread, color=LIBRARIES[row.contender.library], ecolor="#999999")
        reference = next(iter(row.ratios.items()), None)
        ratio = f"  {reference[1].median:.2f} {TITLES[reference[0]]}" if reference else ""
        axes.annotate(f" {short(median)} ms{ratio}", (high, i), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [str(row.contender) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.7 * max(row.median or 0.0 for row in rows))
    axes.set_xlabel(f"{name}, ms")


def _curves(axes: Any, name: str, rows: Sequence[Row]) -> None:
    """Time over rank or tokens; where the cost is linear, the slope is 1."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.contender.library, row.contender.method), []).append(row)
    colours = dict(zip(dict.fromkeys(method for _, method in lines if method), cycle(COLOURS), strict=False))
    for (library, method), line in lines.items():
        label = f"{library}:{method}" if method else library
        if name in ("tokens", PROCESSES) and method:
            label = str(line[0].contender)
        style: dict[str, Any] = {
            "color": colours.get(method, LIBRARIES["frozen"]),
            "linestyle": LINES.get(library, "-"),
            "marker": "o",
        }
        axes.plot([r.point[name] for r in line], [r.median for r in line], label=label, markersize=3, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(name)
    axes.set_ylabel(f"{rows[0].measure}, ms")
    axes.legend(frameon=False, fontsize=8)
