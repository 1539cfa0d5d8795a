"""`halotune generate`: the continuation of a prompt, as it comes."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

from ..core.errors import HalotuneError
from ..core.files import read_json
from .main import DRAWING
from .options import Commands, add_model_flags, add_parser, add_sampling_flags

DESCRIPTION = """
Print the continuation of a prompt as the model writes it. The prompt goes to
the model as it is, without a chat template: `halotune chat` uses that.
"""
EXAMPLES = """
halotune generate my-adapter --prompt "Once upon a time"
halotune generate runs/chats --no-adapter --prompt "Once upon a time"
halotune generate subject runs/my-dog --prompt "a qwe dog in the snow"    (pictures; see its own --help)
halotune generate control runs/edges --split val --shard 0/4    (likewise)
halotune generate my-adapter --temperature 0.8 --top-p 0.95 --seed 0 < prompt.txt
"""


def add(commands: Commands) -> None:
    parser = add_parser(commands, "generate", DESCRIPTION, EXAMPLES, _run)
    add_model_flags(parser, device="auto")
    parser.add_argument("--prompt", metavar="TEXT", help="the text to continue; without it, or with -, stdin is read")
    add_sampling_flags(parser, temperature=0.0, max_new_tokens=128)
    parser.add_argument("--no-adapter", action="store_true", help="let the base model answer alone, to compare")


def _run(args: argparse.Namespace) -> int:
    record = Path(args.adapter) / "run.json"
    recipe = read_json(record).get("recipe") if record.is_file() else None
    if f"generate {recipe}" in DRAWING:
        raise HalotuneError(
            f"{args.adapter}: is a run of train {recipe}, which draws pictures. Use halotune generate {recipe}."
        )
    prompt = _prompt(args.prompt)
    from .text import load, stream

    saved, base, tokenizer, sampling = load(args)
    model = base.model if args.no_adapter else saved.on(base)
    with closing(stream(model, tokenizer, tokenizer(prompt, return_tensors="pt"), sampling)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


def _prompt(given: str | None) -> str:
    if given not in (None, "-"):
        text = given
    elif sys.stdin.isatty():
        raise HalotuneError("there is no prompt. Give one with --prompt, or on stdin.")
    else:
        text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise HalotuneError("the prompt is empty. Give some text with --prompt, or on stdin.")
    return text
