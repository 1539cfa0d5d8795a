"""`halotune generate control RUN …`: pictures that follow hints, with what a run has learned."""

from __future__ import annotations

import argparse

from ..recipes import RECIPES
from .main import require
from .options import Commands


def add(commands: Commands) -> None:
    text = "Draw pictures that follow hints. `halotune generate control --help` has the flags."
    parser = commands.add_parser("generate", description=text)
    parser.add_argument("recipe", choices=["control"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="the run's folder, and flags")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = RECIPES[args.recipe]
    require(recipe.extra, recipe.packages)
    from ..recipes.common.commandline import parse
    from ..recipes.control_pictures import ControlPictures, draw_control

    for file in draw_control(parse(ControlPictures, args.arguments, "halotune generate control")):
        print(file)
    return 0
