"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeAlias

BAD_INPUT = 2
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Errors take one line; the usage is under --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_parser(
    commands: Commands, name: str, description: str, examples: str, run: Callable[[argparse.Namespace], int] | None = None
) -> Parser:
    """The parser of a command that `run` runs; its description is shown as it is, and examples under the flags."""
    parser = commands.add_parser(
        name,
        description=description.strip(),
        epilog="examples:\n" + textwrap.indent(examples.strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model_flags(parser: Parser, *, device: str) -> None:
    flag = parser.add_argument
    flag("adapter", metavar="ADAPTER", help="an adapter's folder, a run's, or its id on the hub")
    flag("--base", metavar="MODEL", help="the base model's folder or hub id (default: the one that the adapter names)")
    flag("--dtype", choices=DTYPES, default="auto", help="of the base (default: auto, as it is stored)")
    flag("--device", default=device, help=f"such as cpu, cuda, cuda:1 (default: {device})")


def add_sampling_flags(parser: Parser, *, temperature: float, max_new_tokens: int) -> None:
    flag = parser.add_argument
    flag("--max-new-tokens", type=integer(1), default=max_new_tokens, metavar="N", help="(default: %(default)s)")
    flag(
        "--temperature",
        type=number(0, math.inf),
        default=temperature,
        metavar="T",
        help="0 takes the likeliest token each time (default: %(default)g)",
    )
    flag("--top-p", type=number(0, 1), default=1.0, metavar="P", help="sample from the likeliest P alone (default: 1)")
    flag("--seed", type=integer(0), metavar="N", help="of the sampling")


def integer(least: int) -> Any:
    """The type of a flag: a whole number, at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to 2^63 - 1; got {text!r}")
        return int(text)

    return parse


def integers(separator: str) -> Any:
    """The type of a flag: whole numbers from 1."""
    return lambda text: tuple(integer(1)(part.strip()) for part in text.split(separator))


def names(known: Collection[str], what: str) -> Any:
    """The type of a flag: some of the known names, with commas."""

    def parse(text: str) -> list[str]:
        found = [name.strip().lower() for name in text.split(",")]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
        return found

    return parse


def number(least: float, most: float, *, above: bool = False) -> Any:
    """The type of a flag: a finite number in a range, ends included; or, with `above`, without the least."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value) or (above and value == least):
            upper = "" if math.isinf(most) else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {'above' if above else 'from'} {least:g}{upper}; got {text!r}")
        return value

    return parse
