"""`halotune export`: an adapter as a LoRA, and the check of which programs can read one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import HalotuneError
from ..core.files import CONFIG_NAME
from ..export.components import COMPONENTS
from ..export.rules import RULES
from ..export.runtimes import RUNTIMES
from .options import Commands, integer, names

if TYPE_CHECKING:
    from ..export.lora import ExportReport

OK, BROKEN = 0, 1
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def add(commands: Commands) -> None:
    text = (
        "Write an adapter of any method as a LoRA that gives the same outputs, for programs that read nothing else; "
        "or, with --check alone, say which rules of such a program an adapter breaks."
    )
    parser = commands.add_parser("export", description=text)
    flag = parser.add_argument
    flag(
        "adapter",
        metavar="ADAPTER",
        help="its folder; to convert it, also its repository on the hub; to check it, also one file",
    )
    flag("--to", choices=["lora"], default="lora", help="the format (default: lora)")
    flag("--base", metavar="MODEL", help="folder or hub id of the base model (default: the one that the adapter names)")
    flag("--output", type=Path, metavar="DIR", help="the folder to write; without it, nothing is converted")
    flag("--for", dest="runtime", choices=list(RUNTIMES), default="peft", help="the target runtime (default: peft)")
    flag("--rank", type=integer(1), metavar="R", help="truncate every layer to this rank; the error is printed layer by layer")
    flag(
        "--component",
        metavar="NAME",
        help="the model's part in its pipeline: unet, transformer, text_encoder … (default: the only one of its class)",
    )
    flag("--gguf", action="store_true", help="with --for llama.cpp: write the LoRA as GGUF too, which llama.cpp loads as it is")
    flag("--dtype", choices=list(DTYPES), help="of the tensors (default: the adapter's)")
    flag(
        "--check",
        action="append",
        type=names(RULES, "target runtime"),
        metavar="NAME[,NAME]",
        help=f"check the rules of {', '.join(RULES)}, for what was written, or else for ADAPTER; 1 is the exit status where "
        "one is broken",
    )
    flag("--json", action="store_true", help="print the report as JSON alone to stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..export.header import Header
    from ..export.rules import check

    checked = list(dict.fromkeys(name for given in args.check or [] for name in given))
    if args.output is None and not checked:
        raise HalotuneError("give --output DIR to convert the adapter, or --check NAME to check it.")
    source = _source(args)
    report: dict[str, Any] = {}
    out = sys.stderr if args.json else sys.stdout
    if args.output is not None:
        if args.output.resolve() == Path(args.adapter).resolve():
            raise HalotuneError(f"--output {args.output}: is the adapter's own folder, which would be lost. Give another one.")
        exported = _export(args, source)
        report["export"] = exported.to_dict()
        print(f"{exported}\nWrote {args.output}", file=out)
    problems = []
    if checked:
        header = Header.read(args.output or source, args.base)
        problems = check(header, checked)
        report["check"] = {n: [{"rule": p.rule.name, "found": p.found} for p in problems if p.runtime == n] for n in checked}
        for name in checked:
            found = [str(p) for p in problems if p.runtime == name]
            print("\n".join(found) or f"{name}: reads it{RUNTIMES[name].serving_hint(header.rank)}", file=out)
    if args.json:
        print(json.dumps(report, indent=2))
    return BROKEN if problems else OK


def _source(args: argparse.Namespace) -> str:
    """The adapter itself, where ADAPTER holds one for each of a pipeline's models (`PipelineAdapters.save`)."""
    folder = Path(args.adapter)
    inner = [c for c in COMPONENTS if (folder / c / CONFIG_NAME).is_file()]
    if (folder / CONFIG_NAME).is_file() or not inner:
        return args.adapter
    if args.component not in inner and (args.component or len(inner) > 1):
        raise HalotuneError(f"{folder}: holds adapters of {', '.join(inner)}. Choose one with --component NAME.")
    args.component = args.component or inner[0]
    return str(folder / args.component)


def _export(args: argparse.Namespace, source: str) -> ExportReport:
    import torch

    from .loading import BaseModel, Saved

    saved = Saved.read(source)
    base = BaseModel.load(saved, args.base, component=args.component)
    model = saved.on(base)
    model.active_peft_config.base_model_name_or_path = base.name
    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else next((t.dtype for t in saved.tensors.values()), None)
    component = args.component or base.component
    return model.export(
        args.to, args.output, runtime=args.runtime, rank=args.rank, component=component, dtype=dtype, gguf=args.gguf
    )
