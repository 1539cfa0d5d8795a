"""`--sweep seed=0,1,2 learning_rate=1e-3,3e-3`: every combination is a run of its own, and the seeds are averaged.

OUTPUT/seed=0,learning_rate=1e-3/    a run's folder, as ever; and log.txt, what it said
OUTPUT/sweep.json                    mean and standard deviation over the seeds of every other combination
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...core.errors import HalotuneError
from ...core.files import write_atomically
from ...report.page import write_page
from ...report.record import write_record
from ...report.table import text_table
from . import processes
from .commandline import parse
from .config import RunConfig, as_yaml
from .run import PAGE, finite, is_finished, read_run, said


def grid(axes: Iterable[str]) -> list[dict[str, str]]:
    """["seed=0,1", "r=8,16"] -> [{"seed": "0", "r": "8"}, …]; a comma inside brackets separates nothing."""
    values: dict[str, list[str]] = {}
    for axis in axes:
        name, equals, listed = axis.partition("=")
        if name == "output":
            raise HalotuneError("--sweep: the runs of a sweep have folders of their own, below --output. Leave output out.")
        found = [v for v in re.split(r",(?![^\[]*\])", listed) if v]
        if not equals or not name or not found:
            raise HalotuneError(f"--sweep: expected NAME=VALUE,VALUE; got {axis!r}. Write for example seed=0,1,2.")
        values[name.replace("-", "_")] = found
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def sweep(kind: type[RunConfig], arguments: Sequence[str], axes: Sequence[str], parallel: int = 1) -> list[dict[str, Any]]:
    """Train every combination that is not finished, `parallel` at a time, each in a process of its own.

    Returns:
        the rows of sweep.json.
    """
    root, runs = _planned(kind, arguments, axes)
    for folder, (_, config) in runs.items():
        text = as_yaml(config)
        write_atomically(folder / "config.yaml", lambda file, text=text: file.write_text(text, encoding="utf-8"))
    open_ones = [folder for folder in runs if not is_finished(folder)]
    said(f"{root}: {len(runs)} runs, {len(runs) - len(open_ones)} of them finished already")
    with ThreadPoolExecutor(parallel) as pool, tqdm(total=len(open_ones), unit="run", disable=not sys.stderr.isatty()) as bar:
        failed = []
        for folder, status in pool.map(lambda folder: (folder, _train(kind.RECIPE, folder)), open_ones):
            bar.update()
            failed += [folder] * (status != 0)
            said(f"{folder}: {'finished' if status == 0 else f'failed; {folder}/log.txt says why'}")
    rows = averages({folder: point for folder, (point, _) in runs.items() if folder not in failed})
    write_record(root / "sweep.json", {"axes": list(axes), "rows": finite(rows)})
    print(table(rows))
    if rows:
        write_page([root], root / PAGE)
    if failed:
        raise HalotuneError(
            f"{len(failed)} of {len(runs)} runs failed, such as {failed[0]}: see its log.txt. The same command tries again."
        )
    return rows


def show(kind: type[RunConfig], arguments: Sequence[str], axes: Sequence[str]) -> RunConfig:
    """Print which runs a sweep would train; the configuration of the first of them."""
    root, runs = _planned(kind, arguments, axes)
    print(f"{root}: {len(runs)} runs; what follows is the first")
    for folder in runs:
        print(f"  {folder.name}{': finished already' if is_finished(folder) else ''}")
    return next(iter(runs.values()))[1]


def _planned(
    kind: type[RunConfig], arguments: Sequence[str], axes: Sequence[str]
) -> tuple[Path, dict[Path, tuple[dict[str, str], RunConfig]]]:
    """The sweep's folder, and of each run's folder what is varied and the whole configuration; all of them are checked."""
    if processes.count() > 1:
        raise HalotuneError("--sweep starts its runs itself. Leave out accelerate launch or torchrun, or --sweep.")
    points = grid(axes)
    first = _configure(kind, arguments, points[0])
    root = Path(f"runs/{first.name}-sweep" if first.output == first.default_output else str(first.output))
    folders = [root / ",".join(f"{k}={v}" for k, v in point.items()).replace("/", "_") for point in points]
    return root, {f: (p, _configure(kind, arguments, p | {"output": str(f)})) for f, p in zip(folders, points, strict=True)}


def _configure(kind: type[RunConfig], arguments: Sequence[str], point: Mapping[str, str]) -> RunConfig:
    return parse(kind, [*arguments, *(f"--{name}={value}" for name, value in point.items())], "halotune train")


def _train(recipe: str, folder: Path) -> int:
    command = [sys.executable, "-m", "halotune", "train", recipe, "--config", str(folder / "config.yaml")]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode


def averages(runs: Mapping[Path, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (of the sample, n − 1) of every result over the seeds of equal other values."""
    groups: dict[str, list[tuple[Path, Mapping[str, str]]]] = {}
    for folder, point in runs.items():
        groups.setdefault(json.dumps({k: v for k, v in point.items() if k != "seed"}), []).append((folder, point))
    rows = []
    for key, members in groups.items():
        records = [read_run(folder) or {} for folder, _ in members]
        results = [_numbers(r.get("results", {})) | _numbers({"seconds": r.get("seconds")}) for r in records]
        names = [n for n in results[0] if all(n in r for r in results)]
        figures = {}
        for name in names:
            values = [r[name] for r in results]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            figures[name] = {"mean": statistics.fmean(values), "deviation": deviation, "n": len(values)}
        rows.append({"values": json.loads(key), "folders": [f.name for f, _ in members], "results": figures})
    return rows


def _numbers(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            out |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            out[prefix + name] = float(value)
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: what was varied, then mean ± deviation; a column each where a line would not fit into the terminal."""
    if not rows:
        return "no run has finished"
    varied = list(rows[0]["values"])
    names = [n for n in rows[0]["results"] if not n.endswith("step")]

    def shown(figure: Mapping[str, Any] | None) -> str:
        if figure is None:
            return "–"
        spread = "" if figure["deviation"] is None else f" ± {figure['deviation']:.4f}"
        return f"{figure['mean']:.4f}{spread}"

    lines = [[*(row["values"][v] for v in varied), *(shown(row["results"].get(n)) for n in names)] for row in rows]
    text = text_table([*varied, *names], lines, left=varied)
    if len(text.partition("\n")[0]) <= shutil.get_terminal_size().columns:
        return text
    head, *turned = zip([*varied, *names], *lines, strict=True)
    return text_table(head, turned, left=head[:1])
