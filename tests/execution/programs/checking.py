"""Whether a program fails, and the smallest that still does."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .making import NESTED, is_plan, make
from .program import Program
from .running import Run


def failure(program: Program) -> Exception | None:
    """What goes wrong; None where nothing does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", ".*not called in the first pass|Idle in the first pass")  # programs leave layers out
        try:
            Run(program).run()
        except Exception as e:
            return e
    return None


def smaller(value: Any) -> Iterator[Any]:
    """A program's instructions, or a plan, with something left out: much of it first."""
    if is_plan(value):
        for count in {max(len(value) // 2, 1): 0, 1: 0}:
            yield from (value[:i] + value[i + count :] for i in range(0, len(value), count) if len(value) > count)
        for i, step in enumerate(value):  # a nested plan without what is around it
            yield from (value[:i] + plan + value[i + 1 :] for plan in step[1:] if is_plan(plan) and step[0] in NESTED)
    for i, part in enumerate(value):
        if isinstance(part, dict):
            for key in (key for key in part if part[key]):
                yield (*value[:i], {**part, key: type(part[key])()}, *value[i + 1 :])
        if isinstance(part, tuple):
            yield from ((*value[:i], less, *value[i + 1 :]) for less in smaller(part))


def shrunk(program: Program, seconds: float = 20.0) -> Program:
    """Without whatever it also fails without."""
    end, found = time.monotonic() + seconds, True
    while found and time.monotonic() < end:
        found = False
        for instructions in smaller(program.instructions):
            less = replace(program, instructions=instructions)
            if failure(less) is not None:
                program, found = less, True
                break
            if time.monotonic() > end:
                break
    return program


def check(seed: int) -> str | None:
    """Nothing, or what a failing program is and says."""
    program = make(seed)
    if failure(program) is None:
        return None
    program = shrunk(program)
    error = failure(program)
    return f"{program}\n{type(error).__name__}: {error}"


@contextmanager
def eager_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)
