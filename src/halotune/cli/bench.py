"""`halotune bench`, from the flags to the exit status."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from ..bench.benches import BENCHES
from ..bench.config import CONTENDERS, BenchConfig, parse_contenders
from ..bench.run import bench
from ..core.errors import HalotuneError
from .options import Commands


def add(commands: Commands) -> None:
    text = (
        "Compare adapters of halotune, peft and lycoris-lora with each other and with the frozen model: a whole "
        "training step, one layer, decoding, merging, loading, or curves over rank and tokens of one layer. The "
        "contenders take turns in one process, so that their ratios hold though a machine's speed drifts."
    )
    parser = commands.add_parser("bench", description=text)
    parser.add_argument("kind", choices=list(BENCHES), metavar="|".join(BENCHES), help="what to measure")
    for f in fields(BenchConfig):
        options = {"flag": f"--{f.name.replace('_', '-')}", **f.metadata}
        parser.add_argument(options.pop("flag"), dest=f.name, default=f.default, **options)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("halotune-bench"), metavar="DIR", help="(default: ./halotune-bench)"
    )
    parser.add_argument("--json", action="store_true", help="print this run's JSON alone to stdout; all else to stderr")
    cuda = torch.cuda.is_available()
    model, device = ("llama-3b", "cuda") if cuda else ("llama-tiny", "cpu")
    parser.set_defaults(model=model, device=device, contenders=CONTENDERS, batch=None, steps=None, run=run)


def run(args: argparse.Namespace) -> int:
    if args.cuda_graph and args.kind != "step":
        raise HalotuneError(f"--cuda-graph captures a training step; {args.kind} has none. Leave it out, or measure step.")
    batch, steps = (8, 16) if args.kind == "decode" else (4, 5)
    chosen = {"contenders": parse_contenders(args.contenders), "batch": args.batch or batch, "steps": args.steps or steps}
    config = BenchConfig(**{f.name: getattr(args, f.name) for f in fields(BenchConfig)} | chosen)
    return bench(args.kind, config, args.output_dir, as_json=args.json)
