"""The README's table of costs is what the benchmark measured, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = {
    "HRA r8": "ours:hra-r8",
    "HRA r32": "ours:hra-r32",
    "LoHa r8": "ours:loha-r8",
    "LoHa r32": "ours:loha-r32",
    "Bone r64": "ours:bone-r64",
    "BAT r64": "ours:bat-r64",
    "LoRA r32": "ours:lora-r32",
    "peft's LoRA r32": "peft:lora-r32",
}


def measured(name: str) -> dict[tuple[str, str, str], dict]:
    """(targets, contender, measure) -> row of 4 × 768 tokens, not compiled."""
    runs = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["runs"]
    rows = [row for run in runs for row in run["rows"]]
    return {
        (row["setting"]["targets"], row["contender"], row["measure"]): row
        for row in rows
        if row["setting"]["tokens"] == 768 and not row["setting"]["compiled"]
    }


def test_every_figure_of_the_table():
    captured, eager = measured("h100-cuda-graph.json"), measured("h100-step.json")
    assert all(row["setting"]["cuda_graph"] for row in captured.values())
    assert not any(row["setting"]["cuda_graph"] for row in eager.values())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = {m[1].strip(): m[2] for m in re.finditer(r"^\| ([^|]+) \|(( [\d.]+ \|){8})$", text, re.M)}
    assert found.keys() == NAMES.keys()
    for name, cells in found.items():
        expected = []
        for targets in ("qv", "all-linear"):
            graph, step, kernels = (
                rows[targets, NAMES[name], measure]
                for rows, measure in ((captured, "step"), (eager, "step"), (eager, "kernels"))
            )
            expected += [row["ratios"]["frozen"]["median"] for row in (graph, kernels, step)]
            expected.append(step["peak_to_frozen"])
        assert cells.split(" | ") == f" {' | '.join(f'{e:.2f}' for e in expected)} |".split(" | "), name
