"""`halotune eval RECIPE`: evaluate what a recipe trained."""

from __future__ import annotations

import argparse
import json

from ..core.errors import HalotuneError
from ..recipes import RECIPES
from .main import require
from .options import Commands
from .train import find

KNOWN = [name for name, recipe in RECIPES.items() if recipe.evaluate]


def add(commands: Commands) -> None:
    text = "Evaluate what a recipe trained. `halotune eval RECIPE --help` has its own flags."
    parser = commands.add_parser("eval", description=text)
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(KNOWN))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="the recipe's flags")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = find(args.recipe)
    if recipe.evaluate is None:
        raise HalotuneError(f"{args.recipe} has no evaluation of its own. There are {', '.join(KNOWN)}.")
    require(recipe.extra, recipe.packages)
    from ..recipes.common import processes
    from ..recipes.common.commandline import parse

    config, evaluate = recipe.evaluate
    found = recipe.part(evaluate)(parse(recipe.part(config), args.arguments, f"halotune eval {args.recipe}"))
    if processes.first():
        print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0
