"""The memory that a stretch of work takes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

STATM = Path("/proc/self/statm")
INTERVAL = 0.01  # seconds: a training step takes twenty times as long


def resident() -> int | None:
    """This process's resident memory in bytes; None where the system does not tell (anything but Linux)."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


class PeakMemory:
    """Samples the resident memory of the whole process while the block runs; `peak` is the largest, in bytes, or None.

    Not `getrusage`, whose peak is that of the process's whole life: it would show the first method's for all.
    """

    def __init__(self) -> None:
        self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak or 0, resident() or 0)

    def __enter__(self) -> PeakMemory:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
