"""Time and memory of work on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Times stretches of work: with events on a CUDA device, whose work is asynchronous, else with the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def laps(self, *parts: Callable[[], object]) -> list[float]:
        """Run the parts one after the other; the milliseconds that each took."""
        if not self.cuda:
            marks = [time.perf_counter()]
            for part in parts:
                part()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)  # every repetition starts from an idle device
        events[0].record(stream)
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record(stream)
        events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def busy(self, work: Callable[[], object]) -> float:
        """Milliseconds that a CUDA device spends in kernels, whatever it waits for in between.

        Take all laps first: the profiler stays attached, and slows down every later launch of the process (pytorch#144455).
        """
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize(self.device)
        events: Any = profile.events()
        return sum(e.self_device_time_total for e in events if e.device_type.name == "CUDA") / 1e3

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """The most that was allocated since `forget_peak`, in bytes, weights included; None where it cannot be told.

        The resident memory of a process on a CPU is no answer: the allocator keeps what earlier contenders freed.
        """
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    def clean(self) -> None:
        """Give memory back, so that the next contender finds what the first one found."""
        collect()
        if self.cuda:
            torch.cuda.empty_cache()


def collect() -> None:
    """Collect, and set what lives on aside: the next time, a million objects of imported libraries need no look."""
    gc.collect()
    gc.freeze()


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector at rest: its pauses would fall on whoever is timed at the time."""
    was_on = gc.isenabled()
    collect()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def saved_bytes(forward: Callable[[], object], parameters: Iterable[nn.Parameter]) -> int:
    """What a forward pass keeps for backward: the storages of all tensors that autograd saves, less parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result  # alive until here, so that no address was used twice
    return sum(kept.values())
