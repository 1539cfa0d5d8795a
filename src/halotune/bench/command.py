"""`halotune bench`, from the flags to the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import HalotuneError
from . import report
from .benches import BENCHES
from .config import CONTENDERS, DTYPES, BenchConfig, parse_contenders
from .models import PRESETS, TARGETS
from .race import Watch
from .rows import Row

if TYPE_CHECKING:
    from ..cli import Commands

MEASURED, NOTHING_MEASURED, INTERRUPTED = 0, 1, 130


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
        help="frozen, or ours|peft|lycoris:hra|loha|bone|bat|lora-rN, with commas (default: %(default)s)",
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
    flag("--warmup", type=_whole, default=2, metavar="N", help="repetitions before, not timed (default: 2)")
    flag("--compile", action="store_true", help="compile every layer of the model in full")
    flag("--cuda-graph", action="store_true", help="of step: capture it once and replay it")
    flag("--time-limit", type=float, metavar="SECONDS", help="start no turn after that, and report what was measured")
    flag("--features", type=_features, default=(4096, 4096), metavar="INxOUT", help="of the layer (default: 4096x4096)")
    flag("--prompt", type=_count, default=16, metavar="N", help="tokens before decoding (default: 16)")
    flag("--weight-cache", type=float, default=8.0, metavar="GIB", help="of our BAT and LoHa, to decode (default: 8; 0: none)")
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


def bench(kind: str, config: BenchConfig, output_dir: Path, *, as_json: bool = False) -> int:
    """Measure and report. The file is written after every turn, so whatever stops a run, the turns before are kept.

    Returns:
        0; 1 where nothing could be measured; 130 after Ctrl-C.
    """
    out = sys.stderr if as_json else sys.stdout
    file = output_dir / report.FILE
    output_dir.mkdir(parents=True, exist_ok=True)  # found out now, not after minutes of measuring
    earlier = report.read_runs(file)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows: list[Row] = []

    def keep(measured: list[Row]) -> None:
        rows[:] = measured
        report.write_runs(file, [*earlier, report.run_record(kind, date, rows)])

    interrupted = False
    try:
        BENCHES[kind](config, Watch(lambda line: print(line, file=sys.stderr, flush=True), keep))
    except KeyboardInterrupt:
        interrupted = True
    if rows:
        print(f"{report.heading(kind, rows[0].setting)}\n\n{report.table(rows)}\n", file=out)
        written = [file.name]
        chart = output_dir / report.plot_name(kind, rows[0].setting)
        if report.plot(chart, kind, rows):
            written.append(chart.name)
        elif not find_spec("matplotlib"):
            print("No chart: matplotlib is not installed.", file=out)
        print(f"Wrote {' and '.join(written)} to {output_dir}", file=out)
    if as_json:
        print(report.as_json([report.run_record(kind, date, rows)]))
    measured = any(row.rounds for row in rows)
    return INTERRUPTED if interrupted else MEASURED if measured else NOTHING_MEASURED


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}; got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, least=1)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part.strip()) for part in text.split(","))


def _features(text: str) -> tuple[int, int]:
    parts: list[str] = text.lower().split("x")
    count: Callable[[str], int] = _count
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected two sizes such as 4096x11008; got {text!r}")
    return count(parts[0]), count(parts[1])
