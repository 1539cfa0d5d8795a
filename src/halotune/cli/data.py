"""`halotune data NAME DIR`: data sets, laid out as the recipes expect them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core.errors import HalotuneError
from ..recipes import CHECKED, DATASETS, dataset
from .options import Commands


def add(commands: Commands) -> None:
    text = (
        "Fetch a data set, check it, and lay it out as the recipes expect. A transfer that was cut off goes on where it ended. "
        "What you have already is taken with --from."
    )
    parser = commands.add_parser("data", description=text)
    parser.add_argument("name", choices=list(DATASETS), metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("folder", type=Path, metavar="DIR", help="where it goes")
    parser.add_argument("--only", metavar="PART[,PART]", help="these parts of it alone, such as cola,mrpc (default: all)")
    parser.add_argument("--from", dest="given", type=Path, metavar="FILE", help="take it from this archive, file or folder")
    parser.add_argument(
        "--skip-bad-rows",
        action="store_true",
        help=f"leave out, count and list rows of --from that are broken ({', '.join(CHECKED)})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    module = dataset(args.name)
    parts = [p.strip().lower() for p in args.only.split(",")] if args.only else list(module.PARTS)
    for part in parts:
        if part not in module.PARTS:
            raise HalotuneError(f"--only: {args.name} has no part {part!r}. It has {', '.join(module.PARTS)}.")
    if args.skip_bad_rows and (args.name not in CHECKED or args.given is None):
        raise HalotuneError(
            f"--skip-bad-rows is for rows that are taken with --from, of {', '.join(CHECKED)}. Leave it out here; halotune "
            "train has it, too."
        )
    checked = {"skip_bad_rows": args.skip_bad_rows} if args.name in CHECKED else {}
    for path in module.get(args.folder, parts, args.given, **checked):
        print(path)
    return 0
