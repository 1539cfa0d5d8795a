"""`--sweep`: which runs it is, that they are started, left alone, tried again, and averaged."""

from __future__ import annotations

import json

import pytest

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes import NLUConfig
from halotune.recipes.common import sweep as sweeping
from halotune.recipes.common.run import read_run
from halotune.recipes.common.sweep import averages, grid, sweep, table


def test_the_grid():
    assert grid(["seed=0,1", "learning-rate=1e-3"]) == [
        {"seed": "0", "learning_rate": "1e-3"},
        {"seed": "1", "learning_rate": "1e-3"},
    ]
    assert grid(["target_modules=[query,key],all-linear"]) == [
        {"target_modules": "[query,key]"},
        {"target_modules": "all-linear"},
    ]
    for wrong in ("seed", "seed=", "=1"):
        with pytest.raises(HalotuneError, match="expected NAME=VALUE,VALUE"):
            grid([wrong])


def finished(folder, results, seconds=1.0):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": "finished", "results": results, "seconds": seconds}))
    return folder


def test_mean_and_deviation_are_over_the_seeds(tmp_path):
    scores = {("0", "1e-3"): 0.5, ("1", "1e-3"): 0.7, ("2", "1e-3"): 0.9, ("0", "3e-3"): 0.4}
    runs = {
        finished(tmp_path / f"{seed}-{rate}", {"last": {"accuracy": score}}): {"seed": seed, "learning_rate": rate}
        for (seed, rate), score in scores.items()
    }
    rows = averages(runs)
    assert [row["values"] for row in rows] == [{"learning_rate": "1e-3"}, {"learning_rate": "3e-3"}]
    assert rows[0]["results"]["last.accuracy"] == {"mean": pytest.approx(0.7), "deviation": pytest.approx(0.2), "n": 3}
    assert rows[1]["results"]["last.accuracy"] == {"mean": 0.4, "deviation": None, "n": 1}
    assert "0.7000 ± 0.2000" in table(rows)
    many = [{**row, "results": {f"result {i}": row["results"]["last.accuracy"] for i in range(20)}} for row in rows]
    head, _, *lines = table(many).split("\n")  # no terminal is so wide: a line for each result
    assert head.split() == ["learning_rate", "1e-3", "3e-3"] and len(lines) == 20
    assert lines[0].split("  ")[0].strip() == "result 0" and lines[0].endswith("0.4000")


@pytest.fixture
def flags(encoder, table_file, tmp_path):
    return [
        *("--model", str(encoder), "--task", "csv", "--data", str(table_file), "--output", str(tmp_path / "sweep")),
        *("--max-steps", "2", "--batch-size", "8", "--tracker", "none", "--device", "cpu"),
    ]


@pytest.fixture
def table_file(table):
    return table


def test_a_sweep_trains_each_run_in_its_own_process_and_goes_on_where_it_ended(flags, tmp_path, capsys, monkeypatch):
    """Two side by side; one of them is killed in its log, and is tried again by the same command."""
    assert main(["train", "nlu", *flags, "--sweep", "seed=0,1", "--parallel", "2"]) == 0
    root = tmp_path / "sweep"
    assert {f.name for f in root.iterdir()} == {"seed=0", "seed=1", "sweep.json", "index.html"}
    records = [read_run(root / f"seed={seed}") for seed in (0, 1)]
    assert [r["seed"] for r in records] == [0, 1] and all(r["status"] == "finished" for r in records)
    assert records[0]["results"] != records[1]["results"]
    rows = json.loads((root / "sweep.json").read_text())["rows"]
    mean = sum(r["results"]["last"]["loss"] for r in records) / 2
    assert rows[0]["results"]["last.loss"]["mean"] == pytest.approx(mean) and rows[0]["results"]["last.loss"]["n"] == 2
    assert " ± " in capsys.readouterr().out

    (root / "seed=0" / "index.html").unlink()  # as a kill leaves it
    (root / "seed=1" / "run.json").unlink()
    started = []
    monkeypatch.setattr(sweeping, "_train", lambda recipe, folder: started.append(folder.name) or 1)
    assert main(["train", "nlu", *flags, "--sweep", "seed=0,1"]) == 2
    assert started == ["seed=0", "seed=1"]
    assert "2 of 2 runs failed, such as" in capsys.readouterr().err


def test_all_runs_are_checked_before_the_first_starts(flags, monkeypatch):
    monkeypatch.setattr(sweeping, "_train", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(HalotuneError, match="there is no method 'lorra'"):
        sweep(NLUConfig, flags, ["method=hra,lorra"])
    with pytest.raises(HalotuneError, match="there is no option --sed"):
        sweep(NLUConfig, flags, ["sed=0,1"])
    with pytest.raises(HalotuneError, match="--sweep: the runs of a sweep have folders of their own"):
        sweep(NLUConfig, flags, ["output=a,b"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HalotuneError, match="--sweep starts its runs itself"):
        sweep(NLUConfig, flags, ["seed=0,1"])


def test_a_dry_run_of_a_sweep_lists_its_runs_shows_the_first_and_starts_none(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeping, "_train", lambda *_: pytest.fail("a run was started"))
    assert main(["train", "nlu", *flags, "--sweep", "seed=0,1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'sweep'}: 2 runs" in out and "  seed=1\n" in out and "two steps: " in out
    assert not (tmp_path / "sweep").exists()


def test_runs_side_by_side_are_those_of_a_sweep(flags, capsys):
    assert main(["train", "nlu", *flags, "--parallel", "2"]) == 2
    assert "--parallel belongs to --sweep" in capsys.readouterr().err
