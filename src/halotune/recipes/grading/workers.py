"""Answers graded in processes that are stopped when one takes too long: nothing that a model writes can hang or crash a run.

sympy can spend hours on "9^{9^{9^9}}", and Python cannot interrupt the arithmetic inside: the process has to end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context

from ...core.errors import HalotuneError
from . import paper, strict

RULES = {"strict": strict.right, "paper": paper.right}
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """One answer to grade."""

    suite: str  # gsm8k, math
    answer: str
    gold: str  # the dataset's worked solution
    rules: tuple[str, ...] = ("strict", "paper")


@dataclass(frozen=True)
class Grade:
    """What came of it.

    Attributes:
        right: rule -> whether the answer is right.
        final: the final answer in one way of writing, for votes; None where there is none.
        failed: which rules could not grade it, and why; it counts as wrong by those.
    """

    right: dict[str, bool]
    final: str | None = None
    failed: str | None = None


def grade(task: Task) -> Grade:
    """Grade one answer, here and now."""
    right = {rule: bool(RULES[rule](task.suite, task.answer, task.gold)) for rule in task.rules}
    return Grade(right, strict.final(task.suite, task.answer) if "strict" in task.rules else None)


TRIVIAL = Task("gsm8k", "1", "#### 1")
START = 120.0  # seconds for a process to import what it needs


def grade_all(tasks: Iterable[Task], *, workers: int | None = None, seconds: float = 10.0, gib: float = 4.0) -> Iterator[Grade]:
    """The grades of all answers, in their order. Each rule grades by itself: what one of them hangs on, another may know.

    Args:
        workers: processes; None is one to each core.
        seconds: that one answer may take by one rule.
        gib: of memory that a process may have.

    Raises:
        HalotuneError: no process can grade anything.
    """
    from pebble import ProcessExpired, ProcessPool  # type: ignore[import-not-found]

    tasks = list(tasks)
    context = get_context("forkserver" if os.name == "posix" else "spawn")  # fork copies a CUDA context and its locks
    with ProcessPool(workers or cores(), initializer=_prepare, initargs=(gib,), context=context) as pool:
        try:
            pool.schedule(grade, args=[TRIVIAL], timeout=START).result()
        except Exception as e:  # else every answer would count as wrong
            raise HalotuneError(
                f"the processes that grade cannot work ({type(e).__name__}: {e}). In a script, call this under "
                "`if __name__ == '__main__':`, since they import the script."
            ) from e
        alone = [replace(task, rules=(rule,)) for task in tasks for rule in task.rules]
        found = pool.map(grade, alone, timeout=seconds, chunksize=1).result()
        for task in tasks:
            right, final, failed = dict.fromkeys(task.rules, False), None, []
            for rule in task.rules:
                try:
                    one: Grade = next(found)
                    right[rule], final = one.right[rule], one.final or final
                except TimeoutError:
                    failed.append(f"{rule}: took more than {seconds:g} s")
                except ProcessExpired as e:
                    failed.append(f"{rule}: ended the process ({e.exitcode})")
                except (Exception, RecursionError) as e:
                    failed.append(f"{rule}: {type(e).__name__}")
            yield Grade(right, final, "; ".join(failed) or None)


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(gib: float) -> None:
    logging.disable(logging.WARNING)  # math-verify reports every text that is no formula
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(gib * GIB), int(gib * GIB)))
    import math_verify  # noqa: F401  (a second, which no answer should be charged with)
    from latex2sympy2_extended import latex2sympy  # noqa: F401
