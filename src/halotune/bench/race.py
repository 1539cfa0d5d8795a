"""Contenders in turn, round after round, in one process: whatever drifts on the machine, drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from .config import BenchConfig
from .contenders import Contender, Unavailable
from .rows import Row, compare, short
from .timing import Clock, no_collection

OUT_OF_TIME = "time limit"
KERNELS = "kernels"


@dataclass
class Turn:
    """What one contender gave in one round; all but the times as in `Row`."""

    times: dict[str, list[float]] = field(default_factory=dict)  # measure -> milliseconds of each repetition
    trainable: int | None = None
    peak: int | None = None
    saved: int | None = None


@dataclass(frozen=True)
class Entry:
    """A contender at a point of a curve (`point` is empty where there is no curve)."""

    contender: Contender
    point: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([str(self.contender), *(f"{k}={v}" for k, v in self.point.items())])


@dataclass(frozen=True)
class Watch:
    """Who follows a run: `say` gets a line at a time; `keep` gets all rows, after each turn."""

    say: Callable[[str], object] = lambda line: None
    keep: Callable[[list[Row]], object] = lambda rows: None


def race(
    config: BenchConfig,
    setting: dict[str, Any],
    entries: Sequence[Entry],
    measures: Sequence[str],
    turn: Callable[..., Turn],
    watch: Watch,
    started: float,
) -> list[Row]:
    """Let every entry take its turn in every round, until the time is up. One that fails is not asked again.

    Args:
        setting: what to write into every row.
        measures: the names of what a turn measures.
        turn: measures one entry; where `KERNELS` are measured, with `profiled=True` these alone. That is asked once, after all
            rounds: a profiler slows down what its process launches later.
        started: when the time began to run, of `time.monotonic`.
    """
    clock = Clock(config.torch_device)
    rows = {(i, m): Row(e.contender, m, setting, e.point) for m in measures for i, e in enumerate(entries)}
    failed: set[int] = set()
    out = list(rows.values())
    profiled = config.rounds if KERNELS in measures else None  # the number of the last round
    with no_collection():
        for number, i in ((n, i) for n in range(config.rounds + (profiled is not None)) for i in range(len(entries))):
            if i in failed:
                continue
            if config.time_limit is not None and time.monotonic() - started > config.time_limit:
                watch.say(f"the time limit of {config.time_limit:g} s is over")
                break
            result, problem = attempt(partial(turn, profiled=True) if number == profiled else turn, entries[i], clock)
            for measure in measures:
                row = rows[i, measure]
                row.problem = problem
                if measure in result.times:
                    row.rounds[number] = result.times[measure]
                    row.trainable, row.saved = result.trainable, result.saved
                    row.peak = max((p for p in (row.peak, result.peak) if p is not None), default=None)
            if problem:
                failed.add(i)
            shown = ", ".join(f"{measure} {short(median(times))} ms" for measure, times in result.times.items())
            named = KERNELS if number == profiled else f"round {number + 1}/{config.rounds}"
            watch.say(f"{named}  {entries[i]}: {problem or shown}")
            compare(out)
            watch.keep(out)
    for row in out:
        if not row.rounds and not row.problem:
            row.problem = OUT_OF_TIME
    compare(out)
    watch.keep(out)
    return out


def attempt(turn: Callable[[Entry], Turn], entry: Entry, clock: Clock) -> tuple[Turn, str | None]:
    """The turn, or an empty one and the reason. A library that breaks is a result, not the end of the others' run."""
    result, problem = Turn(), None
    try:
        result = turn(entry)
    except torch.OutOfMemoryError:
        problem = "out of memory"
    except Unavailable as e:
        problem = str(e)
    except Exception as e:
        problem = f"{type(e).__name__}: {' '.join(str(e).split())}"[:500]
    clock.clean()  # after the exception is gone, and with it the frames that held the tensors
    return result, problem
