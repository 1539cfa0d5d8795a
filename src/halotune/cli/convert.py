"""`halotune convert`, from the flags to the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import Commands, add_parser

DESCRIPTION = """
Write an adapter in another format: PEFT's folders, LyCORIS and kohya files, or
under another name of its method. The source's format is recognised. Tensors are
copied bit for bit; the base model's weights are not read.
"""
EXAMPLES = """
halotune convert style.safetensors --to peft --base ./sdxl --output my-adapter
halotune convert my-adapter --to kohya --base ./sdxl --output style.safetensors
halotune convert my-bone --to miss --output my-miss
"""


def add(commands: Commands) -> None:
    parser = add_parser(commands, "convert", DESCRIPTION, EXAMPLES, _run)
    flag = parser.add_argument
    flag("source", metavar="SOURCE", help="a LyCORIS or kohya file, an adapter's folder, or a hub id")
    flag(
        "--to",
        required=True,
        metavar="FORMAT",
        help="peft keeps the method; another name of the method writes it under that one; lycoris names modules as the model "
        "does, kohya as sd-scripts does",
    )
    flag(
        "--base",
        metavar="MODEL",
        help="folder or hub id of the base model or diffusers pipeline; needed to read LyCORIS and kohya files, and to write "
        "the original names of SDXL and FLUX",
    )
    flag("--output", required=True, type=Path, metavar="PATH", help="a folder; for lycoris and kohya a .safetensors file")
    flag("--prefix", metavar="NAME", help="of keys in the LyCORIS file, if not the usual: lycoris, lora_unet, lora_te1 …")
    flag("--names", choices=("model", "original"), help="of modules in the file written (default: as the format has them)")


def _run(args: argparse.Namespace) -> int:
    from ..convert.files import convert_adapter

    print(convert_adapter(args.source, args.output, args.to, base=args.base, prefix=args.prefix, names=args.names))
    return 0
