"""`halotune report`, its flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_parser

DESCRIPTION = """
Compare runs in one HTML page: a table with mean and deviation over seeds,
learning curves, quality against memory, time and trained parameters, what
the adapters changed layer by layer, and the runs' pictures. The page holds
all that it shows and asks no other place for anything.
"""
EXAMPLES = """
halotune report runs/first                   # writes runs/first/index.html
halotune report runs                         # every run below: runs/index.html
halotune report runs/first sweep --output both.html
"""


def add(commands: Commands) -> None:
    parser = add_parser(commands, "report", DESCRIPTION, EXAMPLES, _run)
    flag = parser.add_argument
    flag("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that holds runs, such as a sweep's")
    flag("--output", type=Path, metavar="FILE", help="(default: index.html in RUN; of several, ./report.html)")


def _run(args: argparse.Namespace) -> int:
    from .main import require

    require("report", ["jinja2"])
    from ..report.page import write_page

    output = args.output or (args.runs[0] / "index.html" if len(args.runs) == 1 else Path("report.html"))
    runs = write_page(args.runs, output)
    print(f"Wrote {output}: {len(runs)} run{'s' * (len(runs) != 1)}, {output.stat().st_size / 1e6:.1f} MB")
    incomplete = [run for run in runs if run.problems]
    if incomplete:
        print(f"{len(incomplete)} of them incomplete: the page says what is missing.")
    return 0
