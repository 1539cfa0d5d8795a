"""`halotune bench`, from the flags to the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bench.benches import BENCHES
from ..bench.config import CONTENDERS, DTYPES, BenchConfig, parse_contenders
from ..bench.contenders import spelling
from ..bench.models import PRESETS, TARGETS
from ..bench.run import bench
from ..core.errors import HalotuneError

if TYPE_CHECKING:
    from .main import Commands


def add(commands: Commands) -> None:
    text = (
        "Compare adapters of halotune, peft and lycoris-lora with each other and with the frozen model: a whole "
        "training step, one layer, decoding, merging, loading, or curves over rank and tokens of one layer. The "
        "contenders take turns in one process, so that their ratios hold though a machine's speed drifts."
    )
    parser = commands.add_parser("bench", description=text)
    flag = parser.add_argument
    cuda = torch.cuda.is_available()
    flag("kind", choices=list(BENCHES), metavar="|".join(BENCHES), help="what to measure")
    flag("--model", choices=list(PRESETS), default="llama-3b" if cuda else "llama-tiny", help="(default: %(default)s)")
    flag("--layers", type=_count, metavar="N", help="another number of layers (of a UNet: in each block)")
    flag("--targets", choices=TARGETS, default="all-linear", help="adapted modules; all: convolutions too")
    flag(
        "--contenders",
        default=CONTENDERS,
        metavar="LIST",
        help=f"{spelling()}; with commas (default: %(default)s)",
    )
    flag("--batch", type=_count, metavar="N", help="(default: 4; for decode 8)")
    flag(
        "--tokens",
        type=_count,
        metavar="N",
        help="of a sample; for a UNet, pixels of the latent (default: the model's)",
    )
    flag("--dtype", choices=list(DTYPES), default="bf16", help="(default: bf16)")
    flag("--device", default="cuda" if cuda else "cpu", help="cpu or cuda (default: %(default)s)")
    flag("--rounds", type=_count, default=5, metavar="N", help="turns of every contender (default: 5)")
    flag("--steps-per-round", type=_count, metavar="N", help="timed repetitions of a turn (default: 5; for decode 16)")
    flag("--warmup", type=_integer, default=2, metavar="N", help="repetitions before, not timed (default: 2)")
    flag("--compile", action="store_true", help="compile every layer of the model in full")
    flag("--cuda-graph", action="store_true", help="of step: capture it once and replay it")
    flag("--time-limit", type=float, metavar="SECONDS", help="start no turn after that, and report what was measured")
    flag("--features", type=_features, default=(4096, 4096), metavar="INxOUT", help="of the layer (default: 4096x4096)")
    flag("--prompt", type=_count, default=16, metavar="N", help="tokens before decoding (default: 16)")
    flag(
        "--weight-cache",
        type=float,
        default=8.0,
        metavar="GIB",
        help="for our adapted weights, to decode (default: 8; 0: none)",
    )
    flag("--ranks", type=_counts, default=BenchConfig.ranks, metavar="LIST", help="of scaling (default: 2,4 … 256)")
    flag(
        "--token-counts",
        type=_counts,
        default=BenchConfig.token_counts,
        metavar="LIST",
        help="of scaling (default: 64,256 … 16384)",
    )
    flag("--output-dir", type=Path, default=Path("halotune-bench"), metavar="DIR", help="(default: ./halotune-bench)")
    flag("--json", action="store_true", help="print this run's JSON alone to stdout; all else to stderr")
    parser.set_defaults(run=run, prog=parser.prog)


def run(args: argparse.Namespace) -> int:
    decoding = args.kind == "decode"
    if args.cuda_graph and args.kind != "step":
        raise HalotuneError(f"--cuda-graph captures a training step; {args.kind} has none. Leave it out, or measure step.")
    config = BenchConfig(
        contenders=parse_contenders(args.contenders),
        model=args.model,
        layers=args.layers,
        targets=args.targets,
        batch=args.batch or (8 if decoding else 4),
        tokens=args.tokens,
        dtype=args.dtype,
        device=args.device,
        rounds=args.rounds,
        steps=args.steps_per_round or (16 if decoding else 5),
        warmup=args.warmup,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
        time_limit=args.time_limit,
        features=args.features,
        prompt=args.prompt,
        weight_cache=args.weight_cache,
        ranks=args.ranks,
        token_counts=args.token_counts,
    )
    return bench(args.kind, config, args.output_dir, as_json=args.json)


def _integer(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}; got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return _integer(text, least=1)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _features(text: str) -> tuple[int, int]:
    parts: list[str] = text.lower().split("x")
    count: Callable[[str], int] = _count
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected two sizes such as 4096x11008; got {text!r}")
    return count(parts[0]), count(parts[1])
