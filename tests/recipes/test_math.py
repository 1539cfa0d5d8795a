"""A whole job of mathematics on two cores: train, be killed, go on, answer, be graded, merge, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("math_verify")
pytest.importorskip("pebble")
pytest.importorskip("trl")
pytest.importorskip("jsonargparse")
pytest.importorskip("peft")

from halotune.cli.main import main
from halotune.core.errors import HalotuneError
from halotune.recipes import MathConfig, MathEvaluation, evaluate_math, train_math
from halotune.recipes.common.run import read_lines, read_run
from halotune.recipes.language.answers import Answers

from .problems import base_folder, problem, write_problems

pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing:FutureWarning",
    "ignore:.*lora_alpha:UserWarning",
)
QUIET = {"tracker": "none", "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, problems to learn from and to be tested on."""
    folder = tmp_path_factory.mktemp("math")
    base_folder(folder / "base")
    write_problems(folder / "train.jsonl", range(80))
    write_problems(folder / "test.jsonl", range(80, 90))
    return folder


def flags(place: Path, name: str) -> dict[str, Any]:
    sizes = {"max_length": 256, "batch_size": 4, "max_steps": 6, "log_every": 1, "save_every": 2, "evaluate_every": 3}
    data = {"model": str(place / "base"), "data": str(place / "train.jsonl"), "evaluation": 0.1}
    return {**data, **sizes, **QUIET, "adapter": {"r": 4}, "output": str(place / name)}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run without interruption."""
    train_math(MathConfig(**flags(place, "whole")))
    return place / "whole"


def test_a_run_that_is_killed_goes_on_to_the_bit(place: Path, whole: Path) -> None:
    options = flags(place, "killed")
    command = [sys.executable, "-m", "halotune", "train", "math", f"--r={options.pop('adapter')['r']}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums are the same to the bit
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=threads)
    while process.poll() is None and not list((place / "killed").glob("checkpoints/checkpoint-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    assert list((place / "killed").glob("checkpoints/checkpoint-*")), error
    record = train_math(MathConfig(**flags(place, "killed")))
    assert record["status"] == "finished" and losses(place / "killed") == losses(whole)
    again = train_math(MathConfig(**flags(place, "killed")))  # a finished run is left alone
    assert again == record
    results = record["results"]
    assert results["last"]["loss"] < losses(whole)[0][1] and results["best_step"] in (3, 6)
    weights = [(f / "adapter" / "adapter_model.safetensors").read_bytes() for f in (place / "killed", whole)]
    assert weights[0] == weights[1]


def evaluation(place: Path, whole: Path, **changes: Any) -> MathEvaluation:
    usual = {"suite": "gsm8k", "adapter": str(whole), "data": str(place / "test.jsonl"), "max_new_tokens": 6, "device": "cpu"}
    return MathEvaluation(**{**usual, "batch_size": 4, "workers": 1, **changes})


def test_answers_are_kept_and_graded(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = evaluation(place, whole)
    scores = evaluate_math(config)
    folder = whole / "predictions" / "gsm8k"
    lines = read_lines(folder / "answers.jsonl")
    assert sorted(line["id"] for line in lines) == list(range(10)) and scores["strict"]["of"] == 10
    assert read_run(whole)["results"]["gsm8k"]["strict"] == scores["strict"]["accuracy"]
    assert "gsm8k strict" in (whole / "index.html").read_text()
    text = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(text[:5]) + text[5][:20])  # as a killed process leaves it
    assert len(Answers(folder / "answers.jsonl").found) == 5
    (folder / "answers.jsonl").write_text("".join(text[:6]).rstrip("\n"))  # as an editor, or a download, may leave it
    assert len(Answers(folder / "answers.jsonl").found) == 6
    evaluate_math(config)
    again = read_lines(folder / "answers.jsonl")
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, lines))
    assert "right (95 % interval" in capsys.readouterr().err
    with pytest.raises(HalotuneError, match="another max_new_tokens"):
        evaluate_math(evaluation(place, whole, max_new_tokens=7))


def test_stored_answers_are_graded(place: Path, tmp_path: Path) -> None:
    """The right answers are right by both rules; the majority of three wins over one that is wrong."""
    lines = []
    for i in range(10):
        gold = problem(80 + i)["answer"].rsplit("#### ")[-1]
        said = [gold, "1", gold] if i % 2 else ["1", "2", gold]
        lines += [{"id": i, "sample": k, "answer": f"So.\nThe answer is: {s}"} for k, s in enumerate(said)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {"suite": "gsm8k", "answers": str(file), "data": str(place / "test.jsonl"), "workers": 1}
    scores = evaluate_math(MathEvaluation(**options, samples=3, output=str(tmp_path / "scores")))
    for rule in ("strict", "paper"):
        assert scores[rule]["right"] == 5 and scores[rule]["any_of_samples"] == 1
        assert scores[rule]["mean_of_samples"] == pytest.approx(0.5)
    assert len(read_lines(tmp_path / "scores" / "grades.jsonl")) == 30


def test_the_base_alone_is_the_row_to_compare_with(place: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"suite": "gsm8k", "model": str(place / "base"), "data": str(place / "test.jsonl"), "limit": 2}
    scores = evaluate_math(MathEvaluation(**options, max_new_tokens=2, device="cpu", workers=1, output=str(tmp_path / "out")))
    assert scores["adapter"] is None and scores["strict"]["of"] == 2


def test_merge_and_export_give_the_same_model(place: Path, whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from halotune import PeftModel

    adapter = str(whole / "adapter")
    assert main(["merge", adapter, "--output", str(tmp_path / "merged")]) == 0
    assert main(["export", adapter, "--base", str(place / "base"), "--output", str(tmp_path / "lora"), "--for", "peft"]) == 0
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        fresh = AutoModelForCausalLM.from_pretrained(place / "base")
        exported = PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).eval()(ids).logits
    assert not torch.allclose(adapted, plain, atol=1e-4)
    assert torch.allclose(adapted, merged, atol=1e-4) and torch.allclose(adapted, exported, atol=1e-4)


def test_harness_runs_a_local_task_on_the_adapter(place: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    from halotune.recipes import HarnessEvaluation, evaluate_harness
    from halotune.recipes.harness import _known

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    task = tmp_path / "problems.yaml"
    task.write_text(
        f"task: our_problems\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {place / 'test.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['one', 'two']\n"
        "doc_to_target: 0\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    options = {"tasks": str(task), "device": "cpu", "output": str(tmp_path / "out"), "limit": 4}
    found = evaluate_harness(HarnessEvaluation(adapter=str(whole), **options))
    assert 0 <= found["our_problems"]["acc,none"] <= 1
    [samples] = (tmp_path / "out").rglob("samples_our_problems_*.jsonl")
    adapted = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    samples.unlink()
    evaluate_harness(HarnessEvaluation(model=str(place / "base"), **options))
    [samples] = (tmp_path / "out").rglob("samples_our_problems_*.jsonl")
    bare = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert len(adapted) == 4 and adapted != bare  # the adapter is at work
    with pytest.raises(HalotuneError, match="Did you mean gsm8k"):
        _known("gsm8l", SimpleNamespace(all_tasks=["gsm8k", "hellaswag"]))


def test_presets_are_the_papers_and_flags_win() -> None:
    paper = MathConfig(model="m", data="d", preset="paper")
    assert (paper.epochs, paper.learning_rate, paper.batch_size, paper.schedule, paper.packing) == (
        2.0,
        3e-5,
        32,
        "cosine",
        False,
    )
    assert paper.adapter.r == 32 and paper.adapter.orthogonality_weight == 1e-4  # type: ignore[union-attr]
    own = MathConfig(model="m", data="d", preset="paper-code", learning_rate=1e-3, adapter={"r": 4})
    assert own.learning_rate == 1e-3 and own.adapter.r == 4 and own.max_length == 512  # type: ignore[union-attr]
    assert own.adapter.orthogonality_norm == "unsquared"  # type: ignore[union-attr]
    with pytest.raises(HalotuneError, match="preset: is for HRA"):
        MathConfig(model="m", data="d", preset="paper", method="lora")


def test_rates_are_a_language_models() -> None:
    assert MathConfig(model="m", data="d").learning_rate == pytest.approx(1e-3)  # HRA's own is 1e-2
    assert MathConfig(model="m", data="d", learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [("limit", 0), ("limit", -1), ("workers", 0), ("seconds", 0.0), ("top_p", 3.0), ("top_p", 0.0), ("temperature", -1.0)],
)
def test_numbers_without_a_meaning_are_refused(field: str, value: float) -> None:
    with pytest.raises(HalotuneError, match=rf"^{field}: must .*; got {value}\. Use "):
        MathEvaluation(suite="gsm8k", model="m", **{field: value})


def test_vllm_that_is_not_there_is_an_error(place: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(HalotuneError, match=r"vllm cannot be imported .* or use --backend transformers"):
        evaluate_math(evaluation(place, whole, backend="vllm", output=str(tmp_path / "out")))
    # What was asked for in vain binds no one.
    assert evaluate_math(evaluation(place, whole, limit=1, max_new_tokens=2, output=str(tmp_path / "out")))["problems"] == 1


def test_answers_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(HalotuneError, match=r"rows.jsonl: expected lines with id and answer"):
        evaluate_math(MathEvaluation(suite="gsm8k", answers=str(tmp_path / "rows.jsonl")))
    for text in ("[1]\n", "so\n"):
        (tmp_path / "rows.jsonl").write_text(text)
        with pytest.raises(HalotuneError, match=r"rows.jsonl: a line is no JSON.* Correct it"):
            evaluate_math(MathEvaluation(suite="gsm8k", answers=str(tmp_path / "rows.jsonl")))


def test_contradictions_are_refused() -> None:
    with pytest.raises(HalotuneError, match="evaluation: expected a file, or a share"):
        MathConfig(model="m", data="d", evaluation=1.5)
    with pytest.raises(HalotuneError, match="all the same"):
        MathEvaluation(suite="gsm8k", model="m", samples=4, temperature=0.0)
    with pytest.raises(HalotuneError, match="--adapter"):
        MathEvaluation(suite="gsm8k")


def test_vllm_answers_through_the_lora_that_equals_the_adapter(place: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    """A stand-in for vLLM, which is not installed here: what it is given, and what becomes of its answers."""
    given: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            given["options"] = options

        def generate(self, prompts: list[dict[str, Any]], how: Any, lora_request: Any) -> list[Any]:
            given.update(prompts=prompts, how=how, lora=lora_request)
            said = SimpleNamespace(text=" The answer is: 5 ### Instruction", token_ids=[1, 2], finish_reason="length")
            return [SimpleNamespace(outputs=[said]) for _ in prompts]

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *args: args))
    scores = evaluate_math(evaluation(place, whole, backend="vllm", limit=3, output=str(tmp_path / "out")))
    assert scores["strict"]["of"] == 3 and len(given["prompts"]) == 3 and given["how"]["temperature"] == 0
    assert given["options"]["max_lora_rank"] >= 4 and (Path(given["lora"][2]) / "adapter_model.safetensors").is_file()
    assert given["prompts"][0]["prompt_token_ids"][0] != 0 and given["how"]["stop_token_ids"]
    lines = read_lines(tmp_path / "out" / "answers.jsonl")
    assert lines[0]["answer"] == "The answer is: 5" and lines[0]["ended"]  # at the stop text
