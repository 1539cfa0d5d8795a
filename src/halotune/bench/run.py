"""One run of a benchmark, from its configuration to what is shown and kept."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from ..report.record import json_text, write_record
from . import report
from .benches import BENCHES
from .config import BenchConfig
from .race import Watch
from .rows import Row

MEASURED, NOTHING_MEASURED, INTERRUPTED = 0, 1, 130


def bench(kind: str, config: BenchConfig, output_dir: Path, *, as_json: bool = False) -> int:
    """Measure and report. The file is written after every turn, so whatever stops a run, the turns before are kept.

    Returns:
        0; 1 where nothing could be measured; 130 after Ctrl-C.
    """
    out = sys.stderr if as_json else sys.stdout
    file = output_dir / report.FILE
    output_dir.mkdir(parents=True, exist_ok=True)  # found out now, not after minutes of measuring
    earlier = report.read_runs(file)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows: list[Row] = []

    def keep(measured: list[Row]) -> None:
        rows[:] = measured
        write_record(file, report.as_document([*earlier, report.run_record(kind, date, rows)]))

    interrupted = False
    try:
        BENCHES[kind](config, Watch(lambda line: print(line, file=sys.stderr, flush=True), keep))
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        print(f"{report.heading(kind, rows[0].setting)}\n\n{report.table(rows)}\n", file=out)
        written = [file.name]
        chart = output_dir / report.plot_name(kind, rows[0].setting)
        if report.plot(chart, kind, rows):
            written.append(chart.name)
        elif not find_spec("matplotlib"):
            print("No chart: matplotlib is not installed.", file=out)
        print(f"Wrote {' and '.join(written)} to {output_dir}", file=out)
    if as_json:
        print(json_text(report.as_document([report.run_record(kind, date, rows)])))
    measured = any(row.rounds for row in rows)
    return INTERRUPTED if interrupted else MEASURED if measured else NOTHING_MEASURED
