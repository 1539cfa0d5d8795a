"""The processes that share a job, as torchrun and accelerate launch start them; a job started alone has one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ...core.errors import HalotuneError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the first may grade and write for long; if it fails, the launcher ends the others


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def on_cpu(device: str) -> bool:
    """Whether a configuration's `device` is the processor, here."""
    return device == "cpu" or not torch.accelerator.is_available()


def backend(cpu: bool) -> str | None:
    """What torch.distributed is to talk by; None is accelerate's choice."""
    return "gloo" if cpu and count() > 1 else None


def join(device: str) -> PartialState:
    """Connect this process with the others, and take its accelerator.

    Raises:
        HalotuneError: `device` is one of them alone, and there are several processes.
    """
    if count() > 1 and ":" in device:
        raise HalotuneError(f"device: each of {count()} processes takes one of its own; got {device!r}. Use auto.")
    cpu = on_cpu(device)
    return PartialState(cpu, **({"backend": backend(cpu), "timeout": PATIENCE} if count() > 1 else {}))


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process; the others wait for it."""
    made: list[Any] = [make() if first() else None]
    return broadcast_object_list(made)[0] if count() > 1 else made[0]
