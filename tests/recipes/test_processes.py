"""torchrun with two gloo processes: the same numbers as one process, one writer, and resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from halotune.recipes import NLUConfig, train_nlu
from halotune.recipes.common.config import RunConfig, as_yaml
from halotune.recipes.common.run import read_run


@pytest.fixture(scope="module")
def without_dropout(encoder) -> Path:
    """Each process would draw its own."""
    config = BertConfig.from_pretrained(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.save_pretrained(encoder)
    return encoder


def configure(encoder: Path, table: Path, output: Path) -> NLUConfig:
    """48 rows to learn from: 6 steps an epoch."""
    given = {"epochs": 2, "batch_size": 8, "log_every": 1, "save_every": 3, "evaluate_every": 3, "tracker": "none"}
    return NLUConfig(model=str(encoder), task="csv", data=str(table), evaluation=0.2, output=str(output), device="cpu", **given)


def launch(config: RunConfig, file: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    file.write_text(as_yaml(config))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(port), "-m", "halotune", "train", config.RECIPE, "--config", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with file.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def test_two_processes_give_the_numbers_of_one_and_resume(without_dropout, table, tmp_path):
    train_nlu(configure(without_dropout, table, tmp_path / "one"))
    config = configure(without_dropout, table, tmp_path / "two")
    first = launch(config, tmp_path / "two.yaml")
    while first.poll() is None and not any(line["step"] >= 4 for line in lines(tmp_path / "two")):
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    killed_at = max((line["step"] for line in lines(tmp_path / "two")), default=0)
    second = launch(config, tmp_path / "two.yaml")
    assert second.wait() == 0, (tmp_path / "two.log").read_text()[-2000:]
    assert 0 < killed_at and read_run(tmp_path / "two")["hardware"]["processes"] == 2
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]  # one writer: no line is there twice
    for a, b in zip(one, two, strict=True):
        if "evaluation" in a:  # the Trainer's loss of an evaluation counts rows that fill up the last batch; metrics do not
            assert b["evaluation"]["accuracy"] == a["evaluation"]["accuracy"]
        else:
            for name in ("loss", "grad_norm", "learning_rate"):
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6)
    results = [read_run(tmp_path / n)["results"]["last"] for n in ("one", "two")]
    assert results[1]["accuracy"] == results[0]["accuracy"]
