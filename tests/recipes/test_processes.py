"""Two gloo processes: the numbers of one, evaluation shared between them, one writer, and resuming on another number."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import BertConfig

pytest.importorskip("trl")
pytest.importorskip("lm_eval")
pytest.importorskip("pebble")

from halotune.recipes import NLUConfig
from halotune.recipes.common.config import RunConfig, as_yaml
from halotune.recipes.common.run import read_lines, read_run

from .jobs import run
from .problems import base_folder, write_problems

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")

USUAL = {"tracker": "none", "device": "cpu", "log_every": 1}
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@pytest.fixture(scope="module")
def place(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, an encoder without dropout (each process would draw its own), problems, and a task of lm-eval's."""
    folder = tmp_path_factory.mktemp("processes")
    base_folder(folder / "llama")
    write_problems(folder / "train.jsonl", range(80))
    write_problems(folder / "test.jsonl", range(80, 87))
    (folder / "sums.yaml").write_text(TASK.format(file=folder / "test.jsonl"))
    config = BertConfig.from_pretrained(encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.save_pretrained(encoder)
    return folder


def nlu(encoder: Path, table: Path, output: Path) -> dict[str, Any]:
    """48 rows to learn from: 6 steps an epoch; 12 to evaluate on."""
    sizes = {"epochs": 2, "batch_size": 8, "save_every": 3, "evaluate_every": 3, **USUAL}
    return {"model": str(encoder), "task": "csv", "data": str(table), "evaluation": 0.2, "output": str(output), **sizes}


def sft(place: Path, output: Path, **also: Any) -> dict[str, Any]:
    """The held-out rows fill no whole batch of two processes."""
    sizes = {"max_length": 96, "batch_size": 4, "max_steps": 6, "save_every": 2, "evaluate_every": 3, **USUAL}
    data = {"model": str(place / "llama"), "template": "plain", "data": str(place / "train.jsonl"), "evaluation": 0.2}
    return {**data, **sizes, "adapter": {"r": 4}, "output": str(output), **also}


def math(place: Path, output: Path) -> dict[str, Any]:
    """The same rows, with HRA's penalty."""
    return sft(place, output, template="alpaca", max_length=256, adapter={"r": 4, "orthogonality_weight": 0.05})


def answering(adapter: Path, place: Path, output: Path) -> dict[str, Any]:
    """Seven problems, two at once."""
    own = {"suite": "gsm8k", "adapter": str(adapter), "data": str(place / "test.jsonl"), "output": str(output)}
    return {**own, "max_new_tokens": 6, "batch_size": 2, "workers": 1, "device": "cpu"}


def torchrun(*command: str, log: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[2]
    with log.open("ab") as out:
        return subprocess.Popen([*launcher, *command], env=environment, stdout=out, stderr=out, cwd=root)


def kill(launcher: subprocess.Popen[bytes]) -> None:
    """End it and its workers, which its end alone does not end."""
    parent = psutil.Process(launcher.pid)
    running = [parent, *parent.children(recursive=True)]
    for process in running:
        process.kill()
    launcher.wait()
    psutil.wait_procs(running)


def launch(config: RunConfig, file: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """`halotune train` of a configuration."""
    file.write_text(as_yaml(config))
    return torchrun(
        "-m", "halotune", "train", config.RECIPE, "--config", str(file), log=file.with_suffix(".log"), processes=processes
    )


def in_two_processes(jobs: list[list[Any]], file: Path) -> list[Any]:
    file.write_text(json.dumps(jobs))
    process = torchrun("-m", "tests.recipes.jobs", str(file), log=file.with_suffix(".log"))
    assert process.wait() == 0, file.with_suffix(".log").read_text()[-4000:]
    return json.loads(file.with_suffix(".found.json").read_text())


def assert_same(folder: Path, other: Path) -> None:
    """The lines that two runs have logged say the same, and no line is there twice."""
    ours, theirs = (read_lines(f / "metrics.jsonl") for f in (folder, other))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        kept = ("loss", "grad_norm", "learning_rate") if "loss" in a else a["evaluation"]
        found, wanted = (line if "loss" in line else line["evaluation"] for line in (a, b))
        for name in kept:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def alone(place, encoder, table) -> Path:
    """What one process gives."""
    folder = place / "alone"
    run("train_nlu", nlu(encoder, table, folder / "nlu"))
    run("train_sft", sft(place, folder / "sft"))
    run("train_math", math(place, folder / "math"))
    run("evaluate_math", answering(folder / "sft", place, folder / "answers"))
    return folder


def test_two_processes_give_the_numbers_of_one(place, alone, encoder, table, tmp_path):
    """And go on where one stopped, as one does where two stopped."""
    run("train_nlu", nlu(encoder, table, tmp_path / "nlu"), 4)
    run("evaluate_math", answering(alone / "sft", place, tmp_path / "answers"), 1)
    assert read_run(tmp_path / "nlu")["status"] == "failed" and len(read_lines(tmp_path / "answers" / "answers.jsonl")) == 2
    harness = {"tasks": str(place / "sums.yaml"), "adapter": str(alone / "sft"), "device": "cpu"}
    predict = {"run": str(alone / "nlu"), "data": str(table), "device": "cpu"}
    found = in_two_processes(
        [
            ["train_nlu", nlu(encoder, table, tmp_path / "nlu")],
            ["evaluate_nlu", {"run": str(tmp_path / "nlu"), "device": "cpu"}],
            ["predict_nlu", {**predict, "output": str(tmp_path / "two.csv")}],
            ["train_sft", sft(place, tmp_path / "sft"), 3],
            ["train_sft", sft(place, tmp_path / "sft-whole")],
            ["train_math", math(place, tmp_path / "math")],
            ["evaluate_math", answering(alone / "sft", place, tmp_path / "answers")],
            ["evaluate_harness", {**harness, "output": str(tmp_path / "harness")}],
            ["evaluate_math", answering(alone / "sft", place, tmp_path / "stopped"), 1],
        ],
        tmp_path / "jobs.json",
    )
    # understanding of language
    assert_same(tmp_path / "nlu", alone / "nlu")
    assert read_run(tmp_path / "nlu")["hardware"]["processes"] == 2
    assert found[1]["accuracy"] == read_run(alone / "nlu")["results"]["last"]["accuracy"]
    run("predict_nlu", {**predict, "output": str(tmp_path / "one.csv")})
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()

    # instruction tuning
    assert_same(tmp_path / "sft-whole", alone / "sft")
    record = run("train_sft", sft(place, tmp_path / "sft"))
    assert record["status"] == "finished" and record["hardware"]["processes"] == 1
    assert_same(tmp_path / "sft", alone / "sft")

    # mathematics
    assert_same(tmp_path / "math", alone / "math")
    assert all("penalty" in line for line in read_lines(tmp_path / "math" / "metrics.jsonl") if "loss" in line)

    # answers
    assert len(list((tmp_path / "stopped").glob("answers*.jsonl"))) == 2  # each process has kept its own
    run("evaluate_math", answering(alone / "sft", place, tmp_path / "stopped"))
    wanted = read_lines(alone / "answers" / "answers.jsonl")
    assert [line["id"] for line in wanted] == list(range(7))
    for folder in (tmp_path / "answers", tmp_path / "stopped"):
        assert read_lines(folder / "answers.jsonl") == wanted and len(list(folder.glob("answers*"))) == 1
    scores = json.loads((alone / "answers" / "scores.json").read_text())
    assert found[6]["strict"] == scores["strict"] and found[6]["paper"] == scores["paper"]

    # lm-eval's tasks
    own = run("evaluate_harness", {**harness, "output": str(tmp_path / "harness-alone")})
    assert found[7]["sums"]["perplexity,none"] == pytest.approx(own["sums"]["perplexity,none"], rel=1e-5)
    (samples,) = (tmp_path / "harness").rglob("samples_*.jsonl")
    assert [line["doc_id"] for line in read_lines(samples)] == list(range(7))


def test_a_kill_and_the_same_command_again(place, alone, encoder, table, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text(as_yaml(NLUConfig(**nlu(encoder, table, tmp_path / "two"))))

    def steps() -> list[int]:
        return [line["step"] for line in read_lines(tmp_path / "two" / "metrics.jsonl")]

    command = ["-m", "halotune", "train", "nlu", "--config", str(file)]
    first = torchrun(*command, log=tmp_path / "log")
    while first.poll() is None and max(steps(), default=0) < 4:
        time.sleep(0.01)
    kill(first)
    assert max(steps(), default=0) >= 4, (tmp_path / "log").read_text()[-2000:]
    run("train_nlu", nlu(encoder, table, tmp_path / "two"))
    assert_same(tmp_path / "two", alone / "nlu")
