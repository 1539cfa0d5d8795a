"""What was measured: one row for each contender and measure, with ratios to the references beside it."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .contenders import FROZEN, Contender

PROCESSES = "processes"  # the name of a point
OK, NOT_MEASURED = "ok", "not measured"
PACKAGES = ("torch", "transformers", "diffusers", "peft", "lycoris-lora", "triton")

# What rows are compared with: the first contender of the same measure and point that is one of these.
REFERENCES = {"frozen": (FROZEN, ""), "lora": ("ours", "lora"), "peft_lora": ("peft", "lora")}  # library and method


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of the ratio of the two medians of a round, and the rounds' extremes.

    Contenders of one round were measured one after the other, so a machine that drifts between rounds moves both.
    """

    to: str
    median: float
    low: float
    high: float

    @classmethod
    def between(cls, row: Row, reference: Row) -> Ratio | None:
        both = sorted(row.rounds.keys() & reference.rounds.keys())
        ratios = [statistics.median(row.rounds[i]) / statistics.median(reference.rounds[i]) for i in both]
        if not ratios:
            return None
        return cls(str(reference.contender), statistics.median(ratios), min(ratios), max(ratios))


@dataclass
class Row:
    """One contender, one measure."""

    contender: Contender
    measure: str  # what was timed, such as "step" or "backward"
    setting: dict[str, Any]  # where and on what: device, versions, model, shape, dtype, batch …
    point: dict[str, int] = field(default_factory=dict)  # where a curve is measured: the swept size and its value
    rounds: dict[int, list[float]] = field(default_factory=dict)  # round -> milliseconds of each repetition
    trainable: int | None = None  # number of parameters
    peak: int | None = None  # the most memory that was allocated, in bytes, weights included
    saved: int | None = None  # what one forward pass keeps for backward, in bytes
    problem: str | None = None  # why it could not be measured, or not to the end
    ratios: dict[str, Ratio] = field(default_factory=dict)  # of the times, by the name of the reference
    memory_ratio: float | None = None  # of the peak, to the frozen model's
    speed_up: Ratio | None = None  # of the tokens in a second, over the same contender's in one process
    scaling: float | None = None  # the speed-up, to the frozen model's

    @property
    def times(self) -> list[float]:
        return [t for times in self.rounds.values() for t in times]

    @property
    def median(self) -> float | None:
        return statistics.median(self.times) if self.rounds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all processes together, each of which has a batch; None where there is no such curve."""
        if self.median is None or PROCESSES not in self.point:
            return None
        return self.point[PROCESSES] * self.setting["batch"] * self.setting["tokens"] / self.median * 1e3

    @property
    def status(self) -> str:
        return self.problem or (OK if self.rounds else NOT_MEASURED)

    def to_dict(self) -> dict[str, Any]:
        return {
            "contender": str(self.contender),
            "measure": self.measure,
            **self.point,
            "status": self.status,
            "trainable_parameters": self.trainable,
            "ms": None if not self.rounds else {"median": self.median, "min": min(self.times), "max": max(self.times)},
            "ratios": {name: vars(ratio) for name, ratio in self.ratios.items()},
            **(
                {
                    "tokens_per_second": self.tokens_per_second,
                    "speed_up": self.speed_up and vars(self.speed_up),
                    "speed_up_to_frozen": self.scaling,
                }
                if PROCESSES in self.point
                else {}
            ),
            "peak_bytes": self.peak,
            "peak_to_frozen": self.memory_ratio,
            "saved_bytes": self.saved,
            "rounds_ms": {str(i): [round(t, 4) for t in times] for i, times in self.rounds.items()},
            "setting": self.setting,
        }


def compare(rows: Sequence[Row]) -> None:
    """Fill in the ratios."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.measure, *row.point.items()), []).append(row)
    for group in groups.values():
        for name, (library, method) in REFERENCES.items():
            measured = (r for r in group if (r.contender.library, r.contender.method) == (library, method) and r.rounds)
            reference = next(measured, None)
            if reference is None:
                continue
            for row in group:
                if ratio := Ratio.between(row, reference):
                    row.ratios[name] = ratio
                if name == "frozen" and row.peak and reference.peak:
                    row.memory_ratio = row.peak / reference.peak
    alone = {(r.contender, r.measure): r for r in rows if r.point.get(PROCESSES) == 1}
    for row in rows:
        n, one = row.point.get(PROCESSES, 1), alone.get((row.contender, row.measure))
        if n > 1 and one and (time := Ratio.between(row, one)):
            row.speed_up = Ratio(f"{time.to} in one process", n / time.median, n / time.high, n / time.low)
    frozen = next((r.speed_up.median for r in rows if r.speed_up and r.contender.library == FROZEN), None)
    for row in rows:
        row.scaling = row.speed_up.median / frozen if row.speed_up and frozen else None


def short(ms: float) -> str:
    """Three digits, or all those before the point."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:#.3g}"


def versions() -> dict[str, str]:
    """The versions of everything that may matter and is installed."""
    from .. import __version__

    out = {"halotune": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        out["cuda"] = torch.version.cuda
    return out


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _processor() -> str:
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        known = ""
    names = re.findall(r"^model name\s*: (.+)$", known, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()
