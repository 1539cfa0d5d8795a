"""The command line's start: it imports the module of the command that is asked for, and no other."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from safetensors import SafetensorError

from .. import __version__
from ..core.errors import HalotuneError
from .options import BAD_INPUT, Parser

FAILED, INTERRUPTED = 1, 130

# A command is a module here with `add(commands)` -> its line in `halotune --help`.
COMMANDS = {
    "train": "do a whole job: train a model on data, evaluate it, and report",
    "eval": "evaluate what a recipe trained",
    "predict": "let a trained classifier or regression answer the rows of a table",
    "data": "fetch a data set and lay it out for a recipe",
    "inspect": "show a saved adapter layer by layer: sizes, ranks, rotation angles",
    "export": "write an adapter as a LoRA; check which programs can read one",
    "convert": "convert adapters: PEFT, LyCORIS, kohya",
    "merge": "write an adapter into its base model, and save the model",
    "generate": "continue a prompt with an adapter; or draw pictures: generate subject, generate control",
    "chat": "talk to a model with an adapter",
    "demo": "compare all methods on a real model, in minutes",
    "report": "compare runs in one page: table, learning curves, costs, what the adapters changed",
    "bench": "compare speed and memory with peft and lycoris-lora",
}


DRAWING = {"generate subject": "draw", "generate control": "draw_control"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, 1 failed, 2 bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "→" must not end a run
    # Threads that wait for each other spin, by GNU OpenMP's default, and where other programs run too, a thread that spins
    # holds the core that the one it waits for needs: a token then took 4 s instead of 0.1 s. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        return 0


def _run(argv: Sequence[str]) -> int:
    parser = Parser(prog="halotune", description="Fine-tune pretrained models with adapters, and use them.")
    parser.add_argument("--version", action="version", version=f"halotune {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name in argv[:1]:
            module = DRAWING.get(" ".join(argv[:2]), name)
            import_module(f"{__package__}.{module}").add(commands)
        else:
            commands.add_parser(name, help=text)
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    prog = f"{parser.prog} {argv[0]}"
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: warning: {message}\n"
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    # A full disk, a file that is gone: no traceback would explain it. safetensors has a class of its own for all that it meets.
    except (HalotuneError, OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, RuntimeError) and type(e).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print(f"{prog}: error: {' '.join(str(e).split())}", file=sys.stderr)
        return BAD_INPUT if isinstance(e, HalotuneError) else FAILED
    finally:
        warnings.formatwarning = usual


def require(extra: str, packages: Sequence[str]) -> None:
    """Raise an error that names the pip command, unless all the packages of an extra can be imported."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise HalotuneError(f'{", ".join(missing)} not installed. Install with: pip install "halotune[{extra}]"')
