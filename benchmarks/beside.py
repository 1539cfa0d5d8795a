"""This tree beside another checkout of halotune and beside peft, in turn, in one call on one device.

    git archive b816d6d src | tar -x -C OTHER
    python benchmarks/beside.py small --other OTHER --other-commit b816d6d --output results --time-limit 560
    python benchmarks/beside.py cpu-layer --other OTHER --device cpu --output results

Each tree has a worker, a process of its own that stays for the whole call; this tree's measures peft too. In every round each
contender takes its turn: the bare ("frozen") model with each worker, then each adapter, this tree's and the other's one after
the other; in every second round the other tree goes first. One worker works at a time. A worker keeps the base model between
turns (two bases lie on a GPU together), and gives everything else back after each.

Ratios to the bare model are of minima and of medians over all rounds and both workers' bare models; the spread is the
distance of the quartiles over the median. JSON is written after every turn, so whatever stops the call, the turns before are
kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("beside_worker.py")
THIS, OTHER = "this", "other"
MARGIN = 10.0  # seconds before the time limit in which no turn may run
GIB = 2**30
SLOWER = 1.05  # of the other tree's minimum: said below the tables
FORMS = ("auto", "activations", "weights")


# -- what is measured


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        title: its heading; `--only` looks into it.
        contenders: `frozen`, or `ours|peft:method-rRANK`.
        job: what a worker has to know beside the contender.
        once: one round is enough: nothing is timed.
    """

    title: str
    contenders: tuple[str, ...]
    job: dict[str, Any]
    once: bool = False


def training(
    title: str,
    model: str,
    contenders: str,
    *,
    batch: tuple[int, int],
    targets: str = "all-linear",
    steps: int = 5,
    **special: Any,
) -> Case:
    """Whole training steps in bf16; `special`: layers, captured, checkpointing, quantized."""
    job = {"kind": "step", "model": model, "targets": targets, "dtype": "bf16", "batch": batch[0], "tokens": batch[1]}
    job |= {"layers": None, "captured": False, "checkpointing": None, "quantized": False, "warmup": 2, "steps": steps}
    job |= {"trace": not special.get("captured"), **special}
    return Case(f"{title}, {batch[0]} × {batch[1]}", ("frozen", *contenders.split()), job)


def captured_3b() -> Iterator[Case]:
    ours = "ours:hra-r8 ours:hra-r32 ours:loha-r8 ours:loha-r32 ours:bone-r64 ours:bat-r64 ours:lora-r32"
    for targets in ("all-linear", "qv"):
        title = f"3B, captured, {targets}"
        yield training(title, "llama-3b", f"{ours} peft:lora-r32", batch=(4, 768), targets=targets, captured=True)


def small() -> Iterator[Case]:
    who = "ours:hra-r8 ours:loha-r8 ours:bone-r64 ours:bat-r64 ours:lora-r8 peft:lora-r8"
    for batch in ((32, 512), (8, 256)):
        yield training("135M, eager", "llama-135m", who, batch=batch, steps=10)


def one_b() -> Iterator[Case]:
    yield training("1B, eager", "llama-1b", "ours:hra-r8 ours:lora-r32 peft:lora-r32", batch=(4, 768), steps=10)


def checkpointed() -> Iterator[Case]:
    for model in ("llama-1b", "llama-3b"):
        for how in ("non-reentrant", "reentrant"):
            title = f"{model[6:].upper()}, eager, {how} checkpoints"
            yield training(title, model, "ours:hra-r8 ours:lora-r8", batch=(4, 768), checkpointing=how)


def decode() -> Iterator[Case]:
    who = ("frozen", "ours:hra-r8", "ours:loha-r8", "ours:bone-r64", "ours:bat-r64", "ours:lora-r8", "peft:lora-r8")
    options = {"model": "llama-3b", "dtype": "bf16", "batch": 8, "prompt": 16, "steps": 16, "weight_cache": 8.0}
    yield Case("3B, decoding with a budget of 8 GiB for adapted weights, batch 8", who, {"kind": "decode", "options": options})


def nf4() -> Iterator[Case]:
    who = "ours:hra-r8 ours:loha-r8 ours:bone-r64 ours:lora-r8 peft:lora-r8"
    yield training("1B of 8 layers in nf4, eager", "llama-1b", who, batch=(4, 512), steps=10, layers=8, quantized=True)


def oft() -> Iterator[Case]:
    who = "ours:oft-r32 peft:oft-r32 ours:lora-r32"
    for captured in (True, False):
        title = f"3B, OFT of block 32, {'captured' if captured else 'eager'}"
        yield training(title, "llama-3b", who, batch=(4, 768), captured=captured)


def cpu_layer() -> Iterator[Case]:
    who = ("frozen", "ours:hra-r8", "ours:loha-r8", "ours:bone-r64", "ours:lora-r8")
    for dtype in ("bf16", "fp32"):
        options = {"dtype": dtype, "batch": 1, "tokens": 256, "features": (4096, 4096), "steps": 5, "warmup": 2}
        yield Case(f"one layer of 4096 × 4096, 256 tokens, {dtype}", who, {"kind": "layer", "options": options})


def deadzone() -> Iterator[Case]:
    methods = ("hra-r8", "loha-r8", "loha-r32", "bone-r64", "bat-r64", "lora-r32", "oft-r32")
    job = {
        "kind": "deadzone",
        "dtype": "bf16",
        "features": (3072, 3072),
        "rows": 2048,
        "targets": (1e-4, 3e-4, 1e-3, 1e-2, 1e-1),
    }
    for form in FORMS:
        who = tuple(f"{library}:{m}" for m in methods for library in ("ours", *["peft"] * (form == "auto")))
        yield Case(f"what of a change is seen, form {form}", who, {**job, "form": form}, once=True)


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "captured-3b": captured_3b,
    "small": small,
    "1b": one_b,
    "checkpointed": checkpointed,
    "decode": decode,
    "nf4": nf4,
    "deadzone": deadzone,
    "cpu-layer": cpu_layer,
    "oft": oft,
}


def shrunk(job: dict[str, Any]) -> dict[str, Any]:
    """The job at a size for a test: the same code, and figures that mean nothing."""
    tiny: dict[str, dict[str, Any]] = {
        "step": {"model": "llama-tiny", "layers": 1, "batch": 1, "tokens": 8, "warmup": 0, "steps": 2},
        "decode": {"model": "llama-tiny", "layers": 1, "batch": 1, "prompt": 2, "steps": 2, "warmup": 0},
        "layer": {"features": (128, 128), "tokens": 8, "steps": 2, "warmup": 0},
        "deadzone": {"features": (128, 128), "rows": 64, "targets": (1e-3, 1e-1)},
    }
    change = tiny[job["kind"]]
    return {**job, "options": {**job["options"], **change}} if "options" in job else {**job, **change}


# -- who measures it


class Gone(Exception):
    """The worker ended, or did not answer in time."""


class Worker:
    """A process whose `import halotune` is the one of a source tree."""

    def __init__(self, name: str, tree: Path, device: str) -> None:
        self.name, self.tree, self.device = name, tree, device
        self.start()

    def start(self) -> None:
        path = [str(self.tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.pipe, far = multiprocessing.Pipe()
        command = [sys.executable, str(WORKER), str(far.fileno()), self.device]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, pass_fds=[far.fileno()], env=environment, stdout=sys.stderr)
        far.close()  # so that the pipe ends with the worker
        self.ready = False

    def greeting(self, seconds: float) -> dict[str, Any]:
        """What the worker says of itself once it has imported everything."""
        about = self._receive(seconds)
        self.ready = True
        if not Path(about["file"]).resolve().is_relative_to(self.tree):
            raise SystemExit(
                f"--{self.name}: expected the halotune of {self.tree}; got {about['file']}. Name a checkout's root."
            )
        return about

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        if not self.ready:
            self.greeting(seconds)
        self.pipe.send(job)
        return self._receive(seconds)

    def _receive(self, seconds: float) -> dict[str, Any]:
        try:
            if self.pipe.poll(max(0.0, seconds)):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            pass
        self.stop()
        raise Gone(f"the worker ended with status {self.process.returncode}, or did not answer in {seconds:.0f} s")

    def stop(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        """After a failure: a broken capture, say, may have broken CUDA for the process."""
        self.stop()
        self.start()


@dataclass
class Row:
    """What one contender gave with one worker: measure -> round -> milliseconds."""

    worker: str
    contender: str
    rounds: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    peak: int | None = None
    launches: int | None = None
    layers: int | None = None
    seen: dict[str, Any] | None = None
    problem: str | None = None
    skipped: bool = False
    seconds: float | None = None  # that the last turn took, all included

    @property
    def name(self) -> str:
        library, _, adapter = self.contender.rpartition(":")
        return f"{'peft' if library == 'peft' else self.worker} {adapter}"

    def times(self, measure: str) -> list[float]:
        return list(chain.from_iterable(self.rounds.get(measure, {}).values()))

    def add(self, number: int, answer: dict[str, Any]) -> None:
        self.problem, self.skipped = answer.get("problem"), answer.get("skipped", False)
        if self.problem:
            return
        for measure, ms in answer["times"].items():
            self.rounds.setdefault(measure, {})[number] = ms
        peaks = [p for p in (self.peak, answer.get("peak")) if p is not None]
        self.peak = max(peaks, default=None)
        self.launches, self.layers, self.seen = answer.get("launches"), answer.get("layers"), answer.get("seen")


def summary(times: list[float]) -> dict[str, float] | None:
    """Minimum and median in ms, and the distance of the quartiles over the median."""
    if not times:
        return None
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"min": min(times), "median": median, "spread": (high - low) / median}


def figures(row: Row, rows: list[Row]) -> dict[str, Any]:
    """All that a table or the file says of a row; `to_frozen` and `to_other` are ratios of minima and of medians."""
    bare = [r for r in rows if r.contender == "frozen"]
    counterpart = [r for r in rows if (r.worker, r.contender) == (OTHER, row.contender) and row.worker == THIS]
    measures = {}
    for measure in row.rounds:
        own = summary(row.times(measure))
        assert own is not None
        measures[measure] = {**own, "rounds": len(row.rounds[measure])}
        for name, group in {"to_frozen": bare, "to_other": counterpart}.items():
            reference = summary([t for r in group for t in r.times(measure)])
            measures[measure][name] = reference and {k: own[k] / reference[k] for k in ("min", "median")}
    launches = min((r.launches for r in bare if r.launches is not None), default=None)
    more = None
    if row.launches is not None and launches is not None and row.layers:
        more = (row.launches - launches) / row.layers
    smallest = min((r.peak for r in bare if r.peak), default=None)
    return {
        "contender": row.contender,
        "worker": row.worker,
        "problem": row.problem,
        "measures": measures,
        "peak_bytes": row.peak,
        "peak_to_frozen": row.peak / smallest if row.peak and smallest else None,
        "launches": row.launches,
        "launches_a_layer": more,
        "seen": row.seen,
        "rounds_ms": {m: {str(i): [round(t, 4) for t in ms] for i, ms in rounds.items()} for m, rounds in row.rounds.items()},
    }


# -- tables


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def tables(case: Case, rows: list[Row]) -> str:
    """A table for each measure, then the problems."""
    shown = [(row, figures(row, rows)) for row in rows if row.rounds or row.seen]
    parts = [f"## {case.title}"]
    for measure in dict.fromkeys(m for row, _ in shown for m in row.rounds):
        head = [
            f"{measure}, ms",
            "rounds",
            "min",
            "median",
            "spread",
            "× frozen, min",
            "× frozen, median",
            "÷ other, min",
            "÷ other, median",
        ]
        first = measure != "kernels"
        head += ["peak GiB", "× frozen", "launches", "more a layer"] if first else []
        body = []
        for row, f in shown:
            m = f["measures"].get(measure)
            if m is None:
                continue
            line = [row.name, str(m["rounds"]), cell(m["min"], ".2f"), cell(m["median"], ".2f"), cell(m["spread"], ".0%")]
            line += [cell(m[to] and m[to][k]) for to in ("to_frozen", "to_other") for k in ("min", "median")]
            if first:
                line += [cell(row.peak and row.peak / GIB, ".2f"), cell(f["peak_to_frozen"], ".2f")]
                line += [cell(row.launches, "d"), cell(f["launches_a_layer"], ".2f")]
            body.append(line)
        parts.append(markdown(*without_empty(head, body)))
    seen = [(row, start, values) for row, _ in shown for start, values in (row.seen or {}).items()]
    if seen:
        head = ["contender", "from", *(f"{float(target):.0e}" for target in seen[0][2])]
        parts.append(markdown(head, [[r.name, start, *(cell(v["projection"]) for v in vs.values())] for r, start, vs in seen]))
    parts += notes(shown, rows)
    return "\n\n".join(parts)


def notes(shown: list[tuple[Row, dict[str, Any]]], rows: list[Row]) -> list[str]:
    """What is slower than in the other tree, and what could not be measured."""
    problems: dict[str, list[str]] = {}
    for row, f in shown:
        for measure, m in f["measures"].items():
            if m["to_other"] and m["to_other"]["min"] > SLOWER and row.contender != "frozen":
                problems.setdefault(f"minimum over {SLOWER} of the other tree's", []).append(f"{row.name} ({measure})")
    for row in rows:
        if row.problem:
            problems.setdefault(row.problem, []).append(row.name)
    return ["\n".join(f"- {', '.join(names)}: {problem}" for problem, names in problems.items())] if problems else []


def without_empty(head: list[str], body: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(head)) if any(line[i] for line in body)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in body]


# -- one call


@dataclass
class Call:
    workers: dict[str, Worker]
    about: dict[str, dict[str, Any]]
    rounds: int
    deadline: float
    order: list[tuple[int, str]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def entries(self, case: Case) -> list[Row]:
        ours = list(self.workers)
        return [Row(w, c) for c in case.contenders for w in ([THIS] if c.startswith("peft") else ours)]

    def job(self, case: Case) -> dict[str, Any]:
        """The case's job with the model's shape written out: the other tree may not know its name."""
        job = dict(case.job)
        if job["kind"] == "step":
            job["shape"] = dict(self.about[THIS]["shapes"][job["model"]])
            if job["layers"] is not None:
                job["shape"]["num_hidden_layers"] = job["layers"]
        return job

    def run(self, case: Case, rows: list[Row], keep: Callable[[], None]) -> None:
        """Fill the rows, round after round, until the time is up. A contender that fails is not asked again."""
        for number in range(1 if case.once else self.rounds):
            for row in turns(rows, number):
                longest = max((r.seconds for r in rows if r.seconds is not None), default=0.0)
                if self.left < (longest if row.seconds is None else 1.2 * row.seconds):
                    print("the time limit is near", file=sys.stderr)
                    return
                if row.problem:
                    continue
                self.turn(case, row, number)
                keep()

    def turn(self, case: Case, row: Row, number: int) -> None:
        worker, began = self.workers[row.worker], time.monotonic()
        try:
            answer = worker.ask({**self.job(case), "contender": row.contender}, self.left)
        except Gone as e:
            answer = {"problem": str(e)}
        row.add(number, answer)
        row.seconds = time.monotonic() - began
        if row.problem and not row.skipped and self.left > 0:
            worker.restart()
        self.order.append((number, row.name))
        shown = ", ".join(f"{m} {min(r[number]):.2f} ms" for m, r in row.rounds.items() if number in r)
        print(f"{case.title}, round {number + 1}, {row.name}: {row.problem or shown or 'done'}", file=sys.stderr, flush=True)


def turns(rows: list[Row], number: int) -> list[Row]:
    """Contenders in order; of one contender the other tree goes first in every second round."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.contender, []).append(row)
    return [row for group in groups.values() for row in (group[::-1] if number % 2 else group)]


def commit(tree: Path) -> str | None:
    """The tree's commit, "-dirty" where it was changed since; None for an export."""
    if not (tree / ".git").exists():
        return None
    told = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--other", type=Path, metavar="PATH", help="root of another checkout, or export, of halotune")
    parser.add_argument("--commit", metavar="ID", help="this tree's commit, where it is no checkout")
    parser.add_argument("--other-commit", metavar="ID", help="the other's, where that is an export")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--only", metavar="TEXT", help="only the tables whose title has it")
    parser.add_argument("--contenders", metavar="TEXT,TEXT", help="only the contenders that hold one of these, and frozen")
    parser.add_argument("--time-limit", type=float, default=86400.0, metavar="SECONDS", help="of the whole call")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where beside-SUITE.json and .md go")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test; the figures mean nothing")
    args = parser.parse_args()

    deadline = time.monotonic() + args.time_limit - MARGIN
    args.output.mkdir(parents=True, exist_ok=True)
    trees = {THIS: ROOT} if args.other is None else {THIS: ROOT, OTHER: args.other.resolve()}
    commits = {THIS: args.commit or commit(ROOT)}
    if args.other is not None:
        commits[OTHER] = args.other_commit or commit(trees[OTHER])
    workers = {name: Worker(name, tree, args.device) for name, tree in trees.items()}  # which start side by side
    try:
        about = {name: worker.greeting(min(120.0, deadline - time.monotonic())) for name, worker in workers.items()}
        call = Call(workers, about, args.rounds, deadline)
        for suite in args.suites:
            measure(suite, call, commits, args)
    except Gone as e:
        raise SystemExit(f"a worker could not start: {e}") from None
    finally:
        for worker in workers.values():
            worker.stop()


def measure(suite: str, call: Call, commits: dict[str, str | None], args: argparse.Namespace) -> None:
    """Measure the suite's cases, print their tables, and write both files."""
    cases: list[tuple[Case, list[Row]]] = []
    call.order = []
    record = {
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": call.about[THIS]["hardware"],
        "versions": {name: about["versions"] for name, about in call.about.items()},
        "commits": commits,
        "rounds": call.rounds,
        "tiny": args.tiny,
    }

    def keep() -> None:
        shown = [{"title": c.title, "setting": call.job(c), "rows": [figures(row, rows) for row in rows]} for c, rows in cases]
        temporary = args.output / f"beside-{suite}.part"
        temporary.write_text(json.dumps({**record, "cases": shown, "order": call.order}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.output / f"beside-{suite}.json")

    named = ", ".join(f"{name} {id or 'unknown'}" for name, id in commits.items())
    parts = [f"# {suite}{' (tiny)' * args.tiny}: {record['hardware']}, commits: {named}"]
    print(parts[0], flush=True)
    for case in SUITES[suite]():
        if args.only and args.only not in case.title:
            continue
        if args.tiny:
            case = Case(case.title, case.contenders, shrunk(case.job), case.once)
        if args.contenders:
            wanted = args.contenders.split(",")
            chosen = tuple(c for c in case.contenders if c == "frozen" or any(text in c for text in wanted))
            case = Case(case.title, chosen, case.job, case.once)
        rows = call.entries(case)
        cases.append((case, rows))
        call.run(case, rows, keep)
        for row in rows:
            if not row.seconds:
                row.problem = "not measured: time limit"
        keep()
        parts.append(tables(case, rows))
        print(f"\n{parts[-1]}", flush=True)
        (args.output / f"beside-{suite}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
