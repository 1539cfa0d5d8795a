"""`benchmarks/beside.py` at its smallest size: two workers, interleaved rounds, and what is written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("transformers") is None or find_spec("peft") is None:
    pytest.skip("transformers or peft is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "beside.py"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--tiny", "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_two_trees_and_peft_take_turns(tmp_path: Path) -> None:
    flags = ["--other", str(ROOT), "--other-commit", "abc", "--rounds", "2", "--contenders", "hra-r8,ours:lora,peft:lora"]
    done = call("1b", "deadzone", *flags, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr

    steps = json.loads((tmp_path / "beside-1b.json").read_text(encoding="utf-8"))
    assert steps["commits"]["other"] == "abc" and steps["versions"]["this"] == steps["versions"]["other"]
    first = ["this frozen", "other frozen", "this hra-r8", "other hra-r8", "this lora-r32", "other lora-r32", "peft lora-r32"]
    second = ["other frozen", "this frozen", "other hra-r8", "this hra-r8", "other lora-r32", "this lora-r32", "peft lora-r32"]
    assert steps["order"] == [[0, name] for name in first] + [[1, name] for name in second]
    (table,) = steps["cases"]
    assert table["setting"]["shape"]["num_hidden_layers"] == 1
    bare = [t for row in table["rows"][:2] for ms in row["rounds_ms"]["step"].values() for t in ms]
    for row in table["rows"]:
        assert row["problem"] is None and row["measures"]["step"]["rounds"] == 2
        own = [t for ms in row["rounds_ms"]["step"].values() for t in ms]
        assert row["measures"]["step"]["to_frozen"]["min"] == pytest.approx(min(own) / min(bare), rel=1e-2)
        assert (row["measures"]["step"]["to_other"] is None) == (
            row["worker"] == "other" or row["contender"] == "peft:lora-r32"
        )
    assert "| this hra-r8 | 2 |" in (tmp_path / "beside-1b.md").read_text(encoding="utf-8")

    seen = json.loads((tmp_path / "beside-deadzone.json").read_text(encoding="utf-8"))["cases"][0]["rows"]
    assert [row["contender"] for row in seen[:3]] == ["ours:hra-r8", "ours:hra-r8", "peft:hra-r8"]
    for row in seen:
        for values in row["seen"].values():
            assert values["0.1"]["projection"] == pytest.approx(1, abs=0.02)
            assert values["0.001"]["reached"] == pytest.approx(1e-3, rel=0.2)


class Worker:
    """Answers at once, but for the time that a turn takes by the clock; `breaks` fails."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.asked, self.traced, self.restarts = clock, [], [], 0

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        self.asked.append(job["contender"])
        self.traced.append(job["trace"])
        self.clock[0] += 10
        return {"problem": "broke"} if job["contender"] == "breaks" else {"times": {"decode": [1.0]}}

    def restart(self) -> None:
        self.restarts += 1


def test_no_turn_starts_that_would_pass_the_limit_and_no_failure_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    beside = importlib.import_module("beside")
    clock = [0.0]
    monkeypatch.setattr(beside.time, "monotonic", lambda: clock[0])
    worker = Worker(clock)
    run = beside.Call({"this": worker}, {}, rounds=100, deadline=75.0)
    case = beside.Case("a table", ("frozen", "breaks", "ours:hra-r8"), {"kind": "decode"})
    rows = run.entries(case)
    run.run(case, rows, lambda: None)
    assert clock == [70] and worker.restarts == 1
    assert worker.asked == ["frozen", "breaks", "ours:hra-r8"] + 2 * ["frozen", "ours:hra-r8"]
    assert "- this breaks: broke" in beside.tables(case, rows)


def test_kernels_are_traced_after_all_rounds_by_workers_that_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    beside = importlib.import_module("beside")
    for on_cuda in (True, False):
        worker = Worker([0.0])
        run = beside.Call({"this": worker}, {}, rounds=2, deadline=float("inf"), on_cuda=on_cuda)
        case = beside.Case("a table", ("frozen", "ours:hra-r8"), {"kind": "decode", "trace": True})
        run.run(case, run.entries(case), lambda: None)
        assert worker.traced == 4 * [False] + 2 * [True] * on_cuda and worker.restarts == on_cuda
