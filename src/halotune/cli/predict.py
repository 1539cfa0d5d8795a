"""`halotune predict RUN --data FILE`: let a finished run answer the rows of a table."""

from __future__ import annotations

import argparse

from ..recipes import RECIPES
from .main import require
from .options import Commands, integer


def add(commands: Commands) -> None:
    text = "Let a finished run of `halotune train nlu` answer the rows of a table."
    parser = commands.add_parser("predict", description=text)
    flag = parser.add_argument
    flag("run_folder", metavar="RUN", help="the run's folder")
    flag("--data", required=True, metavar="FILE", help="csv, tsv, jsonl, json or parquet, with the columns of the run's texts")
    flag("--output", metavar="FILE", help="the csv file to write (default: in RUN/predictions/, under the name of --data)")
    flag("--which", choices=["last", "best"], default="last", help="the last adapter, or the best evaluation's (default: last)")
    flag("--batch-size", type=integer(1), default=64, metavar="N", help="examples at once (default: 64)")
    flag("--device", choices=["auto", "cpu"], default="auto", help="(default: auto, the accelerator where there is one)")
    flag("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, and count them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = RECIPES["nlu"]
    require(recipe.extra, recipe.packages)
    from ..recipes import Prediction, predict_nlu
    from ..recipes.common import processes

    fields = ("data", "output", "which", "batch_size", "device", "skip_bad_rows")
    file = predict_nlu(Prediction(args.run_folder, **{name: getattr(args, name) for name in fields}))

    if processes.first():
        print(file)
    return 0
