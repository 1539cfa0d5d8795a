"""A run's folder: what it holds, when it is refused, and how it goes on after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import TrainerCallback

from halotune import HalotuneError, PeftModel
from halotune.recipes import NLUConfig, train_nlu
from halotune.recipes.common import trainer as recipe_trainer
from halotune.recipes.common.run import FAILED, FINISHED, INTERRUPTED, RUNNING, Run, read_run

EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "evaluation")


def configure(encoder: Path, table: Path, output: Path, **kwargs: Any) -> NLUConfig:
    """60 rows, 48 of them to learn from, in batches of 8: 6 steps an epoch, 12 in all; a checkpoint every 5."""
    given = {"epochs": 2, "batch_size": 8, "log_every": 1, "save_every": 5, "evaluate_every": 4, "tracker": "none", **kwargs}
    return NLUConfig(model=str(encoder), task="csv", data=str(table), evaluation=0.2, output=str(output), device="cpu", **given)


def measured(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: line[k] for k in EXACT if k in line} for line in lines]


@pytest.fixture(scope="module")
def whole(encoder, table, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_nlu(configure(encoder, table, folder))
    return folder


def test_a_finished_run_has_it_all(whole):
    record = read_run(whole)
    assert record["status"] == FINISHED
    assert {
        "recipe",
        "label",
        "command",
        "config",
        "seed",
        "method",
        "model",
        "versions",
        "hardware",
        "commit",
    } <= record.keys()
    assert record["parameters"]["trainable"] < record["parameters"]["total"]
    assert record["seconds"] > 0 and record["memory"]["peak_bytes"] > 0
    assert record["results"].keys() == {"last", "best", "best_step"}
    assert yaml.safe_load((whole / "config.yaml").read_text()) == record["config"]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "evaluation" in line] == [4, 8, 12]
    assert {"learning_rate", "tokens_per_second", "memory_bytes"} <= lines[0].keys()
    changes = json.loads((whole / "changes.json").read_text())["layers"]
    assert len(changes) == 13 and all(0 < layer["relative_change"] < 1 for layer in changes.values())
    assert len((whole / "predictions" / "validation.jsonl").read_text().splitlines()) == 12
    for name in ("adapter", "best"):
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(os.listdir(whole / name))
        assert not list((whole / name).glob("*.bin"))
    assert [f.name for f in (whole / "checkpoints").iterdir()] == ["checkpoint-12"]
    assert "matthews" not in (page := (whole / "index.html").read_text()) and "accuracy" in page


def test_best_is_the_adapter_of_the_best_evaluation(whole, encoder, table):
    """It answers as that evaluation said."""
    from halotune.recipes import NLUEvaluation, evaluate_nlu

    lines = [line for line in measured(whole) if "evaluation" in line]
    best = max(lines, key=lambda line: line["evaluation"]["accuracy"])
    assert read_run(whole)["results"]["best_step"] == best["step"]
    assert evaluate_nlu(NLUEvaluation(str(whole), which="best", device="cpu"))["accuracy"] == best["evaluation"]["accuracy"]
    assert evaluate_nlu(NLUEvaluation(str(whole), device="cpu"))["accuracy"] == lines[-1]["evaluation"]["accuracy"]


def test_a_finished_run_is_left_alone_and_says_so(whole, encoder, table, capsys):
    before = {f: f.stat().st_mtime_ns for f in whole.rglob("*")}
    record = train_nlu(configure(encoder, table, whole))
    assert "finished already; nothing was done" in capsys.readouterr().err
    assert record == read_run(whole)
    assert {f: f.stat().st_mtime_ns for f in whole.rglob("*")} == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_before_its_page_gets_it_when_it_is_started_again(encoder, table, tmp_path, capsys):
    config = configure(encoder, table, tmp_path / "run", max_steps=1)
    assert in_child(killed_before_its_page, config) == -signal.SIGKILL
    record = read_run(tmp_path / "run")
    assert record["status"] == FINISHED and not (tmp_path / "run" / "index.html").exists()
    assert train_nlu(config) == record
    assert "finished already; nothing was done" in capsys.readouterr().err
    assert "accuracy" in (tmp_path / "run" / "index.html").read_text()


def killed_before_its_page(config: NLUConfig) -> None:
    Run.write_page = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    train_nlu(config)


def in_child(job: Callable[..., Any], *args: Any) -> int:
    """Run it in a process of its own; how that ended (−9: killed)."""
    process = get_context("fork").Process(target=job, args=args)
    process.start()
    process.join()
    return process.exitcode


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_after(step: int, config: NLUConfig) -> None:
    usual = recipe_trainer.RunTrainer.train_run

    def train_run(self: Any) -> None:
        self.add_callback(KillAt(step))
        usual(self)

    recipe_trainer.RunTrainer.train_run = train_run
    train_nlu(config)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", [1, 5, 6, 9, 12])
def test_after_a_kill_at_any_step_the_numbers_are_those_of_an_uninterrupted_run(whole, encoder, table, tmp_path, step):
    """To the bit: losses, evaluations and the adapter; the model has dropout, and the kill falls in either epoch."""
    config = configure(encoder, table, tmp_path / "run")
    assert in_child(killed_after, step, config) == -signal.SIGKILL
    assert read_run(tmp_path / "run")["status"] == RUNNING
    train_nlu(config)
    assert measured(tmp_path / "run") == measured(whole)
    for name in ("adapter", "best"):
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (tmp_path / "run", whole))
        assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def killed_in_checkpoint(write: int, config: NLUConfig) -> None:
    """Killed at the `write`-th time that something is flushed to the disk: inside a checkpoint, best/ or adapter/."""
    count = 0
    usual = recipe_trainer._flush

    def flush(folder: Path) -> None:
        nonlocal count
        count += 1
        if count == write:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(folder)

    recipe_trainer._flush = flush
    train_nlu(config)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("write", [1, 2, 4])
def test_a_checkpoint_is_complete_or_not_there(whole, encoder, table, tmp_path, write):
    config = configure(encoder, table, tmp_path / "run")
    assert in_child(killed_in_checkpoint, write, config) == -signal.SIGKILL
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(os.listdir(checkpoint))
    train_nlu(config)
    assert measured(tmp_path / "run") == measured(whole)


def test_several_methods_accumulation_and_a_penalty_resume_alike(encoder, table, tmp_path):
    """Batches of two micro-batches, HRA's penalty, logging and saving out of step with each other."""
    own = {"adapter": {"r": 4, "orthogonality_weight": 1e-3}, "micro_batch_size": 4, "log_every": 4, "save_every": 3}
    train_nlu(configure(encoder, table, tmp_path / "whole", **own))
    config = configure(encoder, table, tmp_path / "run", **own)
    assert in_child(killed_after, 8, config) == -signal.SIGKILL
    train_nlu(config)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


def test_another_configuration_is_refused_and_named(whole, encoder, table):
    with pytest.raises(HalotuneError, match=r"another configuration \(learning_rate: 0.01 there, 0.5 here\)"):
        train_nlu(configure(encoder, table, whole, learning_rate=0.5))
    Run(configure(encoder, table, whole, label="another name"))  # changes no number


def test_a_folder_that_is_no_run_is_refused(encoder, table, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(HalotuneError, match=r"holds thesis.tex and no run.json"):
        train_nlu(configure(encoder, table, tmp_path))
    with pytest.raises(HalotuneError, match=r"thesis.tex: is a file. Give another --output"):
        train_nlu(configure(encoder, table, tmp_path / "thesis.tex"))
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(HalotuneError, match=r"run.json: holds no JSON object"):
        train_nlu(configure(encoder, table, tmp_path))


def test_a_kill_before_the_first_step_leaves_nothing_in_the_way(encoder, table, tmp_path):
    """The Trainer makes the folder of checkpoints before there is a run.json; a file may have been half written."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / ".run.json.x.tmp").write_text("{")
    assert train_nlu(configure(encoder, table, tmp_path, max_steps=1))["status"] == FINISHED
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(HalotuneError, match=r"holds .* and no run.json"):  # these checkpoints are somebody's
        train_nlu(configure(encoder, table, tmp_path, max_steps=1))


def test_a_run_has_one_writer(encoder, table, tmp_path):
    config = configure(encoder, table, tmp_path / "run")
    with Run(config).open(), pytest.raises(HalotuneError, match="another process writes into it"), Run(config).open():
        pass
    with FileLock(tmp_path / "run" / ".lock", timeout=0):
        pass  # it is given back


def test_how_a_run_ended_is_written_down(encoder, table, tmp_path, capsys):
    config = configure(encoder, table, tmp_path / "run")
    with pytest.raises(ZeroDivisionError), Run(config).open():
        1 / 0  # noqa: B018
    assert read_run(tmp_path / "run")["status"] == FAILED
    assert read_run(tmp_path / "run")["error"] == "ZeroDivisionError: division by zero"
    with pytest.raises(KeyboardInterrupt), Run(config).open():
        os.kill(os.getpid(), signal.SIGTERM)
    assert read_run(tmp_path / "run")["status"] == INTERRUPTED
    assert "interrupted; the same command goes on after step 0" in capsys.readouterr().err


def test_a_line_that_was_not_finished_is_left_out(encoder, table, tmp_path):
    run = Run(configure(encoder, table, tmp_path / "run"))
    with run.open():
        run.append({"step": 1, "loss": float("nan")})
        run.append({"step": 2, "loss": 1.0})
        with (run.folder / "metrics.jsonl").open("a") as f:
            f.write('{"step": 3, "lo')
        assert run.metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}]
        run.rewind(1)
        assert run.metrics() == [{"step": 1, "loss": None}]


def test_a_dry_run_shows_a_batch_and_its_cost_and_writes_nothing(encoder, table, tmp_path, capsys):
    train_nlu(configure(encoder, table, tmp_path / "runs" / "run"), dry_run=True)
    out = capsys.readouterr().out
    assert out.count("→ positive") + out.count("→ negative") == 8
    assert "trained parameters: " in out and "two steps: " in out and f"would be written to {tmp_path / 'runs' / 'run'}" in out
    assert list(tmp_path.iterdir()) == []


def test_deterministic_is_set_before_cuda_starts(encoder, table, tmp_path, monkeypatch):
    """CUDA and cuBLAS read these variables once, when a model is put there."""
    found: list[Any] = []

    def load(*args: Any) -> Any:
        found.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.are_deterministic_algorithms_enabled()))
        raise InterruptedError

    monkeypatch.setattr("halotune.recipes.nlu.load_classifier", load)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # so that they are restored
    for deterministic in (False, True):
        with pytest.raises(InterruptedError):
            train_nlu(configure(encoder, table, tmp_path / "run", deterministic=deterministic))
    torch.use_deterministic_algorithms(False)
    assert found == [("", False), (":16:8", True)]


def test_the_adapter_is_pefts_and_stands_alone(whole, encoder):
    from transformers import AutoModelForSequenceClassification

    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(encoder), whole / "adapter")
    assert model.merge_and_unload().config.model_type == "bert"
