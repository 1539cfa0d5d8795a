"""`halotune export`: an adapter as a LoRA, and the check of which programs can read one."""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.rules import RULES
from ..export.runtimes import RUNTIMES, component_of

if TYPE_CHECKING:
    from torch import nn

    from ..core.config import AdapterConfig
    from ..engine.model import PeftModel
    from ..export.lora import ExportReport
    from .main import Commands

OK, BROKEN = 0, 1
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_STORED = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def add(commands: Commands) -> None:
    text = (
        "Write an adapter of any method as a LoRA that gives the same outputs, for programs that read nothing else; "
        "or, with --check alone, say which rules of such a program an adapter breaks."
    )
    parser = commands.add_parser(
        "export", help="write an adapter as a LoRA; check which programs can read one", description=text
    )
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
    flag("--rank", type=_count, metavar="R", help="truncate every layer to this rank; the error is printed layer by layer")
    flag("--component", metavar="NAME", help="the model's part in its pipeline: unet, transformer … (default: by its class)")
    flag("--dtype", choices=list(DTYPES), help="of the tensors (default: the adapter's)")
    flag(
        "--check",
        action="append",
        type=_runtimes,
        metavar="NAME[,NAME]",
        help=f"check the rules of {', '.join(RULES)}, for what was written, or else for ADAPTER; 1 is the exit status where "
        "one is broken",
    )
    flag("--json", action="store_true", help="print the report as JSON alone to stdout")
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    from ..core.errors import HalotuneError
    from ..export.header import Header
    from ..export.rules import check

    checked = list(dict.fromkeys(name for names in args.check or [] for name in names))
    if args.output is None and not checked:
        raise HalotuneError("give --output DIR to convert the adapter, or --check NAME to check it.")
    report: dict[str, Any] = {}
    out = sys.stderr if args.json else sys.stdout
    if args.output is not None:
        if args.output.resolve() == Path(args.adapter).resolve():
            raise HalotuneError(f"--output {args.output}: is the adapter's own folder, which would be lost. Give another one.")
        exported = _export(args)
        report["export"] = exported.to_dict()
        print(f"{exported}\nWrote {args.output}", file=out)
    problems = []
    if checked:
        header = Header.read(args.output or args.adapter)
        problems = check(header, checked)
        report["check"] = {n: [{"rule": p.rule.name, "found": p.found} for p in problems if p.runtime == n] for n in checked}
        for name in checked:
            found = [str(p) for p in problems if p.runtime == name]
            print("\n".join(found) or f"{name}: reads it{RUNTIMES[name].serving_hint(header.rank)}", file=out)
    if args.json:
        print(json.dumps(report, indent=2))
    return BROKEN if problems else OK


def _export(args: argparse.Namespace) -> ExportReport:
    import torch

    from ..core.config import AdapterConfig
    from ..core.errors import HalotuneError
    from ..core.files import WEIGHTS_NAME, locate
    from ..export.header import Header

    config = copy.copy(AdapterConfig.from_pretrained(args.adapter))
    config.base_model_name_or_path = base = args.base or config.base_model_name_or_path
    if not base:
        raise HalotuneError(f"{args.adapter}: the configuration names no base model. Give it with --base.")
    if not Path(base).exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise HalotuneError(f"base model {base}: there is no such folder. Give one, or a hub id, with --base.")
    stored = _STORED.get(Header.read(locate(args.adapter, WEIGHTS_NAME)).dtype, "fp32")
    model = _with_adapter(args.adapter, config, args.component)
    dtype = getattr(torch, DTYPES[args.dtype or stored])
    return model.export(args.to, args.output, runtime=args.runtime, rank=args.rank, component=args.component, dtype=dtype)


def _with_adapter(adapter: str, config: AdapterConfig, component: str | None) -> PeftModel:
    """The base model with the adapter on it: transformers' by the adapter's task, diffusers' by the class it names."""
    from ..engine.auto import AutoPeftModel
    from ..engine.model import PeftModel

    mapping = config.auto_mapping or {}
    if str(mapping.get("parent_library")).split(".")[0] != "diffusers":
        return AutoPeftModel.from_pretrained(adapter, config=config, dtype="auto")
    model = _of_diffusers(str(mapping.get("base_model_class")), str(config.base_model_name_or_path), component)
    return PeftModel.from_pretrained(model, adapter)


def _of_diffusers(name: str, base: str, component: str | None) -> nn.Module:
    """A model of this class, from its own folder or from a pipeline's."""
    from .main import require

    require("diffusers", ["diffusers"])
    import diffusers

    alone = Path(base).is_dir() and not (Path(base) / "model_index.json").is_file()
    return getattr(diffusers, name).from_pretrained(base, subfolder=None if alone else component or component_of(name))


def _runtimes(text: str) -> list[str]:
    names = [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in RULES:
            raise argparse.ArgumentTypeError(f"unknown target runtime {name!r}; choose from {', '.join(RULES)}")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)
