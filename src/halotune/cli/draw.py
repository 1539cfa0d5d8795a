"""`halotune generate subject RUN --prompt …`: pictures of what a run has learned; `generate.py` has the text."""

from __future__ import annotations

import argparse
import math

from ..recipes import RECIPES
from .main import require
from .options import Commands, integer, number

FIELDS = ("prompt", "output", "count", "seed", "scale", "resolution", "inference_steps", "guidance_scale", "device")


def add(commands: Commands) -> None:
    text = "Draw pictures with what a finished run of `halotune train subject` has learned."
    parser = commands.add_parser("generate", description=text)
    flag = parser.add_argument
    flag("recipe", choices=["subject"])
    flag("run_folder", metavar="RUN", help="the run's folder")
    flag("--prompt", required=True, metavar="TEXT", help="what is drawn, with the run's identifier in it")
    flag("--output", metavar="DIR", help="where the pictures go (default: RUN/drawn)")
    flag("--count", type=integer(1), default=1, metavar="N", help="how many, each of the next seed (default: 1)")
    flag("--seed", type=integer(0), default=0, metavar="N", help="of the first one (default: 0)")
    flag("--scale", type=number(-math.inf, math.inf), default=1.0, metavar="S", help="0 is the base, 1 what was trained")
    flag("--resolution", type=integer(8), metavar="PIXELS", help="(default: the run's)")
    flag("--inference-steps", type=integer(1), metavar="N", help="(default: the run's)")
    flag("--guidance-scale", type=number(0, math.inf), metavar="G", help="(default: the run's)")
    flag("--device", choices=["auto", "cpu"], default="auto", help="(default: auto, the accelerator where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    recipe = RECIPES[args.recipe]
    require(recipe.extra, recipe.packages)
    from ..recipes.subject_pictures import SubjectPictures, draw_subject

    for file in draw_subject(SubjectPictures(args.run_folder, **{name: getattr(args, name) for name in FIELDS})):
        print(file)
    return 0
