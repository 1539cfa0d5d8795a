"""The memory that a stretch of work takes."""

from __future__ import annotations

import re
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The largest resident memory of the whole process while the block runs: `peak`, in bytes, or None.

    Linux counts it, and starts anew when it is asked. `getrusage` has the peak of the process's whole life: it would show the
    first method's for all.
    """

    peak: int | None = None

    def __enter__(self) -> PeakMemory:
        try:
            RESET.write_text("5")
            self.counts = True
        except OSError:  # anything but Linux
            self.counts = False
        return self

    def __exit__(self, *_: object) -> None:
        if self.counts and (found := re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)):
            self.peak = 1024 * int(found[1])
