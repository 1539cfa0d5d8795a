"""`halotune bench`, from the flags to the exit status."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import torch

from ..bench import report
from ..bench.benches import BENCHES
from ..bench.config import CONTENDERS, BenchConfig, parse_contenders
from ..bench.race import Watch
from ..bench.rows import Row
from ..bench.sharded import run_sharded_step
from ..core.errors import HalotuneError
from ..report.record import json_text, write_record
from .main import FAILED, INTERRUPTED
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
    """Measure and report. The file is written after every turn, so whatever stops a run, the turns before are kept.

    Returns:
        0; 1 where nothing could be measured; 130 after Ctrl-C.
    """
    if args.cuda_graph and args.kind != "step":
        raise HalotuneError(f"--cuda-graph captures a training step; {args.kind} has none. Leave it out, or measure step.")
    if args.nproc and args.kind != "step":
        raise HalotuneError(
            f"--nproc shares the model of a training step; {args.kind} has none. Leave it out, or measure step."
        )
    batch, steps = (8, 16) if args.kind == "decode" else (4, 5)
    chosen = {"contenders": parse_contenders(args.contenders), "batch": args.batch or batch, "steps": args.steps or steps}
    config = BenchConfig(**{f.name: getattr(args, f.name) for f in fields(BenchConfig)} | chosen)
    kind, output_dir, out = args.kind, args.output_dir, sys.stderr if args.json else sys.stdout
    file = output_dir / report.FILE
    output_dir.mkdir(parents=True, exist_ok=True)  # found out now, not after minutes of measuring
    earlier = report.read_runs(file)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows: list[Row] = []

    def keep(measured: list[Row]) -> None:
        rows[:] = measured
        write_record(file, report.as_document(earlier, kind, date, rows))

    interrupted = False
    try:
        bench = run_sharded_step if config.nproc else BENCHES[kind]
        bench(config, Watch(lambda line: print(line, file=sys.stderr, flush=True), keep))
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
    if args.json:
        print(json_text(report.as_document([], kind, date, rows)))
    measured = any(row.rounds for row in rows)
    return INTERRUPTED if interrupted else 0 if measured else FAILED
