"""`halotune train RECIPE`, from the flags to the run's folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from ..core.errors import HalotuneError, closest
from ..recipes import RECIPES, Recipe
from .main import require
from .options import Commands, integer

TRAINED = [name for name, recipe in RECIPES.items() if recipe.train]


def add(commands: Commands) -> None:
    text = (
        "Do a whole job: data, adapter, training, evaluation and a report, in one folder. The same command again goes on where "
        "a run was interrupted. `halotune train RECIPE --help` has the recipe's own flags."
    )
    parser = commands.add_parser("train", description=text)
    parser.add_argument("recipe", metavar="RECIPE", help=", ".join(TRAINED))
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="the recipe's flags; --config FILE, --print-config"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = find(args.recipe)
    if not recipe.train:
        raise HalotuneError(f"{args.recipe} trains nothing; there are {', '.join(TRAINED)}. It is run by halotune eval.")
    require(recipe.extra, recipe.packages)
    from ..recipes.common.commandline import parse

    how, rest = _how(args.arguments, f"halotune train {args.recipe}")
    kind = recipe.part(recipe.config)
    if how.parallel and not how.sweep:
        raise HalotuneError("--parallel belongs to --sweep. Leave it out: a single run takes the cores that there are.")
    if how.sweep:
        from ..recipes.common.sweep import show, sweep

        if how.dry_run:
            recipe.part(recipe.train)(show(kind, rest, how.sweep), dry_run=True)
        else:
            sweep(kind, rest, how.sweep, how.parallel or 1)
        return 0
    config = parse(kind, rest, f"halotune train {args.recipe}")
    command = shlex.join(["halotune", *sys.argv[1:]])
    recipe.part(recipe.train)(config, dry_run=how.dry_run, command=command)
    return 0


def find(name: str) -> Recipe:
    """The recipe of this name."""
    if name not in RECIPES:
        near = closest(name, list(RECIPES), n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(RECIPES)}."
        raise HalotuneError(f"there is no recipe {name!r}. {remedy}")
    return RECIPES[name]


def _how(arguments: list[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """The flags that say how to run, which are no part of a run's configuration; and all others."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    flag: Any = parser.add_argument_group("how to run").add_argument
    flag(
        "--dry-run",
        action="store_true",
        help="show the first batch, the cost of two steps and what would be written; write nothing",
    )
    flag("--sweep", nargs="+", metavar="NAME=VALUE,…", help="train every combination, each in its folder; average over seeds")
    flag("--parallel", type=integer(1), metavar="N", help="so many runs of a sweep side by side (default: 1)")
    if "--help" in arguments or "-h" in arguments:
        parser.print_help()
        print()
    return parser.parse_known_args(arguments)
