"""Runs side by side on all devices, a sitting at a time: what one leaves undone, the next one goes on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

Point = TypeVar("Point")
MISSING = "missing"  # of a cell of a table


def told(record: Mapping[str, Any]) -> str:
    """A run's record as it is kept; where it ran is nobody's business."""
    return json.dumps({name: value for name, value in record.items() if name != "directory"}, ensure_ascii=False)


def keep(text: str, folder: Path, target: Path, *, whole: bool) -> None:
    """Leave what a run has to tell, of a `whole` one also what it logged and changed. `run.json` comes last: where it is, the
    run is complete."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "changes.json") if whole else ():
        if (folder / name).is_file():  # a run of another library has none
            shutil.copyfile(folder / name, target / name)
    temporary = target / ".run.json"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.rename(target / "run.json")


def read(target: Path) -> dict[str, Any] | None:
    """What `keep` left there."""
    file = target / "run.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_result(file: Path, entries: Mapping[str, Any]) -> None:
    """Under another name first: where it is, it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}")
    part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def best_rate(tried: Mapping[float, Mapping[str, Any] | None], score: Callable[[Any], float]) -> tuple[float | None, bool]:
    """The learning rate whose run's record has the highest score, of those that were run; and whether all were."""
    found = {rate: score(record) for rate, record in tried.items() if record is not None}
    return max(found, key=lambda rate: found[rate], default=None), len(found) == len(tried)


def devices() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` is set to for a process of one device: each of those here; "" where there are none."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [""]
    return [str(i) for i in range(len(listed.splitlines()))]


def take(free: Any, threads: int) -> None:
    """Begin a worker: with a device of its own, before anything asks for one, and its share of the cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
    os.environ["OMP_NUM_THREADS"] = str(threads)


def sitting(
    missing: Callable[[], Iterable[Point]],
    work: Callable[[Point, Namespace], str],
    args: Namespace,
    kind: Callable[[Point], Hashable] = lambda point: None,
) -> None:
    """Work on what is missing, and start nothing that would not end in time.

    Args:
        missing: what is to be run and can be run now, in order.
        work: one run, in a process of its own; its name.
        args: `workers` (on each device), `minutes` and `grace`, and what `work` reads.
        kind: points of one kind take about as long.
    """
    end = time.monotonic() + 60 * args.minutes
    running: dict[Future[str], Point] = {}
    started: dict[Future[str], float] = {}
    failed: list[Point] = []
    longest: dict[Hashable, float] = {}
    context = multiprocessing.get_context("spawn")
    seats = args.workers * devices()
    free = context.Queue()
    for device in seats:
        free.put(device)
    threads = max(1, (os.cpu_count() or 1) // len(seats))
    with ProcessPoolExecutor(len(seats), mp_context=context, initializer=take, initargs=(free, threads)) as pool:
        while True:
            waiting = [p for p in missing() if p not in running.values() and p not in failed]
            for point in waiting[: len(seats) - len(running)]:
                if time.monotonic() + longest.get(kind(point), 0.0) < end:
                    future = pool.submit(work, point, args)
                    running[future], started[future] = point, time.monotonic()
            if not running:
                break
            done, _ = wait(running, timeout=max(end - time.monotonic(), 0) + args.grace, return_when=FIRST_COMPLETED)
            if not done:
                print(f"{len(running)} runs did not end in time and are left out: the next sitting makes them", flush=True)
                for process in (pool._processes or {}).values():
                    process.terminate()
                break
            for future in done:
                point, seconds = running.pop(future), time.monotonic() - started[future]
                longest[kind(point)] = max(longest.get(kind(point), 0.0), seconds)
                if error := future.exception():  # out of memory, say: this sitting goes on without it
                    failed.append(point)
                print(
                    f"{f'{point}: {type(error).__name__}: {error}' if error else future.result()}: {seconds:.0f} s", flush=True
                )
    print(f"{sum(1 for _ in missing())} runs are to be started next")
