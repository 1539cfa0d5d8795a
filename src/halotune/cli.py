"""The command line. Each subcommand registers itself here, and imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
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
    prog = getattr(args, "prog", parser.prog)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except HalotuneError as e:
        return _fail(prog, e, BAD_INPUT)
    except OSError as e:  # a full disk, a file that is gone: nothing that a traceback would explain
        return _fail(prog, e, FAILED)


def _fail(prog: str, error: Exception, status: int) -> int:
    print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def require(extra: str, packages: Sequence[str]) -> None:
    """Raise an error that names the pip command, unless all the packages of an extra can be imported."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise HalotuneError(f'{", ".join(missing)} not installed. Install with: pip install "halotune[{extra}]"')


# Every command is a module `command` with `add(commands)`; what it needs to run, it imports when it runs.


def _add_demo(commands: Commands) -> None:
    from .demo.command import add

    add(commands)


def _add_bench(commands: Commands) -> None:
    from .bench.command import add

    add(commands)


def _add_convert(commands: Commands) -> None:
    from .convert.command import add

    add(commands)


COMMANDS: tuple[Callable[[Commands], None], ...] = (_add_demo, _add_bench, _add_convert)


if __name__ == "__main__":
    sys.exit(main())
