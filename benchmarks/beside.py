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
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from beside_cases import SUITES, Case, chosen
from beside_tables import OTHER, THIS, Row, figures, tables

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("beside_worker.py")
MARGIN = 10.0  # seconds before the time limit in which no turn may run


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


# -- one call


@dataclass
class Call:
    workers: dict[str, Worker]
    about: dict[str, dict[str, Any]]
    rounds: int
    deadline: float
    on_cuda: bool = False
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
        """Fill the rows, round after round, until the time is up. A contender that fails is not asked again.

        Kernels come after all rounds, from workers that end with it: a profiler slows down what its process launches later.
        """
        rounds = 1 if case.once else self.rounds
        traced = rounds if case.job.get("trace") and self.on_cuda else None  # the number of the last round
        for number in range(rounds + (traced is not None)):
            for row in turns(rows, number):
                longest = max((r.seconds for r in rows if r.seconds is not None), default=0.0)
                if self.left < (longest if row.seconds is None else 1.2 * row.seconds):
                    print("the time limit is near", file=sys.stderr)
                    return
                if row.problem:
                    continue
                self.turn(case, row, number, trace=number == traced)
                keep()
        for worker in self.workers.values() if traced is not None else ():
            worker.restart()

    def turn(self, case: Case, row: Row, number: int, trace: bool) -> None:
        worker, began = self.workers[row.worker], time.monotonic()
        try:
            answer = worker.ask({**self.job(case), "contender": row.contender, "trace": trace}, self.left)
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
        call = Call(workers, about, args.rounds, deadline, args.device.startswith("cuda"))
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
    for case in chosen(suite, args.only, args.contenders, args.tiny):
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
