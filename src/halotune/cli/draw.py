"""`halotune generate RECIPE RUN --prompt …`: pictures of what a run has learned; `generate.py` has the text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .main import require
from .train import find

if TYPE_CHECKING:
    from .main import Commands


def add(commands: Commands) -> None:
    # All flags are those of the configuration, --help among them: argparse is to see none.
    parser = commands.add_parser("generate", add_help=False, prefix_chars="+")
    parser.add_argument("recipe")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    recipe = find(args.recipe)
    require(recipe.extra, recipe.packages)
    from ..recipes.common.commandline import parse
    from ..recipes.subject_pictures import SubjectPictures, draw_subject

    for file in draw_subject(parse(SubjectPictures, args.arguments, f"halotune generate {args.recipe}")):
        print(file)
    return 0
