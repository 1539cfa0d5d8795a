"""Flags that several commands have."""

from __future__ import annotations

import argparse
import math
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .main import Commands, Parser

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_parser(commands: Commands, name: str, description: str, examples: str) -> Parser:
    """A command's parser; its description is shown as it is, and examples under the flags."""
    return commands.add_parser(
        name,
        description=description.strip(),
        epilog="examples:\n" + textwrap.indent(examples.strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_flags(parser: Parser, *, device: str) -> None:
    flag = parser.add_argument
    flag("adapter", metavar="ADAPTER", help="an adapter's folder, or its id on the hub")
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


def number(least: float, most: float) -> Any:
    """The type of a flag: a finite number in a range, ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            upper = "" if math.isinf(most) else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number from {least:g}{upper}; got {text!r}")
        return value

    return parse
