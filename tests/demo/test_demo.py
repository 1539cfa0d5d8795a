from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import halotune
from halotune.cli.main import main
from halotune.demo import run
from halotune.demo.methods import METHODS

OUT = Path("halotune-demo")


def metrics(folder: Path = OUT) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["methods"]


def adapters(folder: Path = OUT) -> list[str]:
    return sorted(f.parent.name for f in folder.glob("*/adapter_model.safetensors"))


def files(folder: Path = OUT) -> dict[str, float]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def demo(encoder: str, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert main(["demo", "--model", encoder, "--epochs", "0.05", *arguments]) == status
        return capsys.readouterr()

    return call


def test_all_methods(demo, encoder: str) -> None:
    out, err = demo()
    records = metrics()
    assert err == "" and list(records) == list(METHODS) and adapters() == sorted(METHODS)
    for name, r in records.items():
        weights = OUT / name / "adapter_model.safetensors"
        assert r["title"] in out
        assert r["adapter_bytes"] == weights.stat().st_size
        assert r["proof"]["reloads"] and r["proof"]["merges"]
        assert r["curve"]["words"] == [64, 128, 192, 256, 320] and len(r["curve"]["loss"]) == 5
        assert r["curve"]["scores"][-1] == r["after"] and r["before"]["words"] == 0
        assert any(key.endswith("head.weight") for key in load_file(weights))
        config = json.loads((OUT / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == encoder
    assert out.count("✓") == 2 * len(METHODS) and "✗" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert (OUT / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(OUT.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_adapter(demo) -> None:
    for folder in ("a", "b"):
        demo("--method", "hra", "--output-dir", folder)
    demo("--method", "hra", "--output-dir", "c", "--seed", "1")
    a, b, c = (load_file(f"{folder}/hra/adapter_model.safetensors") for folder in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_json_is_alone_on_stdout(demo) -> None:
    out, err = demo("--json", "--method", "lora,bone", "--method", "LoRA", "--output-dir", "[red]")
    records = json.loads(out)["methods"]
    assert records == metrics(Path("[red]")) and sorted(records) == ["bone", "lora"]
    assert "reloaded into a fresh model" in err and "are in [red]" in err


def test_a_later_run_replaces_its_own_methods_alone(demo) -> None:
    demo("--method", "hra,lora")
    before, records = files(), metrics()
    (OUT / "notes.txt").write_text("mine")
    out, _ = demo("--method", "lora", "--seed", "1")
    after = files()
    assert all(after[f] == before[f] for f in before if "/hra/" in f)
    assert all(after[f] != before[f] for f in before if "/lora/adapter_model" in f)
    assert metrics()["hra"] == records["hra"] and metrics()["lora"]["settings"]["seed"] == 1
    assert (OUT / "notes.txt").read_text() == "mine"
    assert "HRA " not in out  # another seed: not to be compared


def test_runs_of_the_same_settings_share_a_table(demo) -> None:
    demo("--method", "hra")
    assert "HRA " in demo("--method", "lora")[0]


def test_an_unreadable_metrics_file_is_replaced(demo) -> None:
    OUT.mkdir()
    (OUT / "metrics.json").write_text("{")
    demo("--method", "hra")
    assert list(metrics()) == ["hra"]


def test_ctrl_c_keeps_what_was_finished(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = run.fit

    def interrupted(task: run.Task, name: str, *rest: Any) -> Any:
        if name == "bone":
            raise KeyboardInterrupt
        return fit(task, name, *rest)

    monkeypatch.setattr(run, "fit", interrupted)
    out, _ = demo(status=130)
    assert "what was finished is kept" in out and "LoHa" in out
    assert adapters() == list(metrics()) == ["hra", "loha"]
    assert (OUT / "learning_curves.png").exists()


def test_an_interrupt_before_the_first_adapter_leaves_nothing(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fit", interrupted)
    assert "nothing was finished" in demo(status=130)[0]
    assert files() == {}


def test_an_interrupted_proof_leaves_the_earlier_adapter(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    demo("--method", "hra")
    before = files()
    monkeypatch.setattr(run, "prove", interrupted)
    demo("--method", "hra", "--seed", "1", status=130)
    assert files() == before


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_sigint_ends_a_real_run(encoder: str) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-m", "halotune", "demo", "--model", encoder]
    process = subprocess.Popen(
        [*command, "--epochs", "0.5", "--method", "hra,loha,bone,bat,lora"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not (OUT / "metrics.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    # transformers imports torchao and bitsandbytes where they are installed, and these log what they miss
    said = [line for line in err.splitlines() if not re.match(r"Failed to load |W\d{4} .*torch/utils/_pytree", line)]
    assert said == [] and "Interrupted" in out and "✓" in out
    assert set(metrics()) <= set(adapters()) and "hra" in metrics()


@pytest.mark.parametrize("tolerance", ["RELOAD_TOLERANCE", "MERGE_TOLERANCE"])
def test_a_failed_proof_is_said_and_fails(demo, monkeypatch: pytest.MonkeyPatch, tolerance: str) -> None:
    monkeypatch.setattr(f"halotune.demo.run.{tolerance}", -1.0)
    out, _ = demo("--method", "hra", status=1)
    assert "✗" in out and "off by" in out


def test_a_divergence_is_an_error_that_keeps_the_rest(
    encoder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(halotune.DEFAULT_LEARNING_RATES, "LORA", 1e38)
    arguments = ["--model", encoder, "--epochs", "0.05", "--method", "hra,lora"]
    assert main(["demo", *arguments]) == 2
    assert "halotune demo: error: LoRA: the loss is " in capsys.readouterr().err
    assert adapters() == list(metrics()) == ["hra"]


def test_a_real_model_learns_real_ratings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halotune.demo.train.SCORED_AT", (1,))  # for speed
    assert main(["demo", "--method", "lora", "--epochs", "0.15"]) == 0
    record = metrics()["lora"]
    assert abs(record["before"]["spearman"]) < 0.3
    assert record["after"]["spearman"] > 0.7 and record["after"]["sign_accuracy"] > 0.8
