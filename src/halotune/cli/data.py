"""`halotune data NAME DIR`: data sets, laid out as the recipes expect them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import HalotuneError
from ..recipes import DATASETS, dataset

if TYPE_CHECKING:
    from .main import Commands


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
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    module = dataset(args.name)
    parts = [p.strip().lower() for p in args.only.split(",")] if args.only else list(module.PARTS)
    for part in parts:
        if part not in module.PARTS:
            raise HalotuneError(f"--only: {args.name} has no part {part!r}. It has {', '.join(module.PARTS)}.")
    for path in module.get(args.folder, parts, args.given):
        print(path)
    return 0
