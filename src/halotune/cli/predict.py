"""`halotune predict RUN --data FILE`: let a finished run answer the rows of a table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..recipes import RECIPES
from .main import require

if TYPE_CHECKING:
    from .main import Commands


def add(commands: Commands) -> None:
    # All flags are those of the configuration, --help among them: argparse is to see none.
    parser = commands.add_parser("predict", add_help=False, prefix_chars="+")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    recipe = RECIPES["nlu"]
    require(recipe.extra, recipe.packages)
    from ..recipes.common.commandline import parse

    print(recipe.part("predict_nlu")(parse(recipe.part("Prediction"), args.arguments, "halotune predict")))
    return 0
