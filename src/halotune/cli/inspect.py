"""`halotune inspect`, its flags."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..core.errors import HalotuneError
from .options import Commands, add_parser

DESCRIPTION = """
Show what a saved adapter does, layer by layer: norms, the largest singular
value and the effective rank of its delta ΔW = W' − W, and what its method is
about, such as the angles of rotations. What depends on the base weights W
is shown with --base.
"""
EXAMPLES = """
halotune inspect my-adapter
halotune inspect my-adapter --base --plot layers.png
halotune inspect my-adapter --base ./llama --json - | jq .total
"""
NAMED = ""  # --base without a value: the base that the adapter names


def add(commands: Commands) -> None:
    parser = add_parser(commands, "inspect", DESCRIPTION, EXAMPLES, _run)
    flag = parser.add_argument
    flag("adapter", metavar="ADAPTER", help="an adapter's folder, a run's, or its id on the hub")
    flag(
        "--base",
        nargs="?",
        const=NAMED,
        metavar="MODEL",
        help="read the base weights: of this folder or hub id; without a value, of the base that the adapter names",
    )
    flag("--plot", type=Path, metavar="FILE.png", help="draw heat maps over layers and modules")
    flag("--json", metavar="FILE", help="write all figures; - is stdout, and the table then goes to stderr")


def _run(args: argparse.Namespace) -> int:
    from .main import require

    if args.plot is not None:
        require("plot", ["matplotlib"])
        if args.plot.suffix.lower() != ".png":
            raise HalotuneError(f"--plot {args.plot}: a PNG is written. Let the name end in .png.")
    from ..inspect import report
    from ..inspect.figures import measure
    from ..report.record import json_text, write_record
    from .loading import BaseModel, Saved

    saved = Saved.read(args.adapter)
    base = None if args.base is None else BaseModel.load(saved, args.base or None)
    layers = measure(saved, base)
    out = sys.stderr if args.json == "-" else sys.stdout
    parts = [report.heading(saved, base, layers), report.table(saved, layers), report.closing(layers)]
    print("\n\n".join(part for part in parts if part), file=out)
    if args.json == "-":
        print(json_text(report.as_document(saved, base, layers)))
    elif args.json is not None:
        write_record(Path(args.json), report.as_document(saved, base, layers))
        print(f"Wrote {args.json}", file=out)
    if args.plot is not None:
        from ..inspect.plot import plot

        plot(args.plot, saved, layers)
        print(f"Wrote {args.plot}", file=out)
    return 0
