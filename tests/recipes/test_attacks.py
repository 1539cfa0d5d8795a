"""What goes wrong around a run: its folder, its disk, its data."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("pebble")

from halotune import HalotuneError
from halotune.cli.main import main
from halotune.recipes import (
    MathEvaluation,
    NLUConfig,
    NLUEvaluation,
    SFTConfig,
    evaluate_math,
    evaluate_nlu,
    train_nlu,
    train_sft,
)
from halotune.recipes.common import processes
from halotune.recipes.common.run import Run, locked
from halotune.recipes.grading.workers import Task, grade_all

from .jobs import run
from .problems import base_folder, write_problems
from .test_run import configure, measured

pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("attacks") / "base")


@pytest.fixture(scope="module")
def whole(encoder: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_nlu(configure(encoder, table, folder))
    return folder


def fields(encoder: Path, table: Path, output: Path) -> dict[str, Any]:
    return vars(configure(encoder, table, output))


def test_a_folder_that_was_moved_goes_on(whole, encoder, table, tmp_path):
    run("train_nlu", fields(encoder, table, tmp_path / "here"), 7)
    (tmp_path / "here").rename(tmp_path / "there")
    train_nlu(configure(encoder, table, tmp_path / "there"))
    assert measured(tmp_path / "there") == measured(whole) and not (tmp_path / "here").exists()


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(whole, encoder, table, tmp_path, monkeypatch, capsys):
    """It fills up in the middle: a line of metrics is not written, nor what run.json would say of that."""
    config = configure(encoder, table, tmp_path / "run")
    full = OSError(errno.ENOSPC, "No space left on device")
    usual = Run.append

    def append(self: Run, entries: Any) -> None:
        if entries["step"] == 7:
            monkeypatch.setattr(Run, "update", update)
            raise full
        usual(self, entries)

    def update(self: Run, **entries: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(Run, "append", append)
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps({**json.loads((whole / "run.json").read_text())["config"], "output": str(config.output)}))
        assert main(["train", "nlu", "--config", str(file)]) == 1
    monkeypatch.undo()
    assert capsys.readouterr().err.splitlines()[-1] == "halotune train: error: [Errno 28] No space left on device"
    train_nlu(config)
    assert measured(tmp_path / "run") == measured(whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(encoder, table, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        train_nlu(configure(encoder, table, tmp_path / "run"))


def test_other_data_than_the_run_began_with_are_refused(encoder, table, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_bytes(table.read_bytes())
    run("train_nlu", fields(encoder, data, tmp_path / "run"), 7)
    data.write_text(table.read_text().replace("song", "film"))
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(HalotuneError, match=r"the data have changed since the run began\. Put them back"):
        train_nlu(configure(encoder, data, tmp_path / "run"))
    assert (tmp_path / "run" / "run.json").read_text() == before
    data.write_bytes(table.read_bytes())
    assert train_nlu(configure(encoder, data, tmp_path / "run"))["status"] == "finished"


def test_a_run_answers_wherever_it_is_asked_from(encoder, table, tmp_path, monkeypatch):
    """Its base and its data were named relative to the folder that it was started in."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "base").symlink_to(encoder)
    (here / "rows.csv").symlink_to(table)
    monkeypatch.chdir(here)
    train_nlu(configure(Path("base"), Path("rows.csv"), Path("run"), max_steps=1))
    found = evaluate_nlu(NLUEvaluation("run", device="cpu"))
    monkeypatch.chdir(there)
    assert evaluate_nlu(NLUEvaluation("../here/run", device="cpu")) == found


def test_a_very_long_text_in_a_table(encoder, table, tmp_path):
    (tmp_path / "rows.csv").write_text(table.read_text() + "film " * 50_000 + ",positive\n")
    assert train_nlu(configure(encoder, tmp_path / "rows.csv", tmp_path / "run", max_steps=1))["status"] == "finished"


def test_tables_that_cannot_be_read(encoder, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label,label\na film,good,bad\n")
    with pytest.raises(HalotuneError, match=r"rows.csv: two columns are named 'label'. Rename or delete one"):
        train_nlu(configure(encoder, tmp_path / "rows.csv", tmp_path / "run"))
    (tmp_path / "rows.parquet").write_text("PAR")
    with pytest.raises(HalotuneError, match=r"rows.parquet: cannot be read as parquet: .* Write it again"):
        train_nlu(configure(encoder, tmp_path / "rows.parquet", tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no row can be used"),
        ("text,label\n", "no row can be used"),
        ("text,label\na film,good\n", "leaves nothing to learn from or to evaluate"),
        ("text,label\n" + "a film,good\n" * 5, "1 classes in"),
    ],
    ids=["empty", "header", "one row", "one class"],
)
def test_too_little_to_learn_from(text, said, encoder, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(HalotuneError, match=said):
        train_nlu(configure(encoder, tmp_path / "rows.csv", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_class_that_was_not_learned_is_refused(encoder, table, tmp_path):
    (tmp_path / "held.csv").write_text("text,label\na film,wonderful\n")
    config = NLUConfig(**{**fields(encoder, table, tmp_path / "run"), "evaluation": str(tmp_path / "held.csv")})
    with pytest.raises(HalotuneError, match=r"held.csv: class 'wonderful' is none of .*rows.csv's \(negative, positive\)"):
        train_nlu(config)


def sft(base: Path, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> SFTConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"max_length": 128, "batch_size": 4, "adapter": {"r": 4}, "tracker": "none", "device": "cpu"}
    where = {"model": str(base), "template": "plain", "data": str(folder / "rows.jsonl"), "output": str(folder / "run")}
    return SFTConfig(**{**where, **sizes, **changes})


def test_one_row_is_learned(base, tmp_path):
    record = train_sft(sft(base, tmp_path, [{"prompt": "What?", "response": "That."}]))
    assert record["status"] == "finished" and record["rows"]["train"] == 1


def test_texts_of_all_kinds(base, tmp_path):
    """Any script, and answers longer than a row; half a character is a bad row."""
    texts = ["naïve 🦊👩‍👩‍👧", "العربية", "漢字かな", "a\u2028b\u0000c\r\nd", "e\u0301" * 50, "x" * 10_000]
    good = [{"prompt": text, "response": text} for text in texts[:-1]] + [{"prompt": "?", "response": texts[-1]}]
    config = sft(base, tmp_path, [*good, {"prompt": "half", "response": "\ud83e"}])
    with pytest.raises(HalotuneError, match=r"rows.jsonl, line 7: .*--skip-bad-rows"):
        train_sft(config)
    config.skip_bad_rows = True
    config.__post_init__()
    record = train_sft(config)
    assert record["status"] == "finished" and record["skipped"]["count"] == 1 and record["rows"]["cut"] >= 1


def test_a_conversation_that_the_assistant_begins(base, tmp_path):
    """Nothing asks for its first words, so they are no answer."""
    first = {"from": "gpt", "value": "Hello."}
    asked = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    config = sft(base, tmp_path, [{"conversations": [first]}, {"conversations": [first, *asked]}], skip_bad_rows=True)
    record = train_sft(config)
    assert record["rows"]["train"] == 1 and "holds no answer of the assistant" in record["skipped"]["rows"][0]


def test_two_evaluations_into_one_folder(base, tmp_path):
    config = MathEvaluation(
        suite="gsm8k",
        model=str(base),
        data=str(write_problems(tmp_path / "test.jsonl", range(2))),
        output=str(tmp_path / "answers"),
    )
    with locked(tmp_path / "answers"), pytest.raises(HalotuneError, match="another process writes into it"):
        evaluate_math(config)


def test_other_problems_than_were_answered_are_refused(base, tmp_path):
    file = write_problems(tmp_path / "test.jsonl", range(3))
    own = {"suite": "gsm8k", "model": str(base), "data": str(file), "output": str(tmp_path / "answers"), "device": "cpu"}
    config = MathEvaluation(**own, template="plain", limit=1, max_new_tokens=2, workers=1)
    assert evaluate_math(config)["strict"]["of"] == 1
    config.limit = 2
    assert evaluate_math(config)["strict"]["of"] == 2
    write_problems(file, range(5, 8))
    with pytest.raises(HalotuneError, match="asked for with another content of data"):
        evaluate_math(config)


def test_answers_of_an_adapter_that_was_trained_anew_are_refused(base, tmp_path):
    train_sft(sft(base, tmp_path, [{"prompt": "What?", "response": "That."}]))
    file = write_problems(tmp_path / "test.jsonl", range(1))
    asked = {"suite": "gsm8k", "adapter": str(tmp_path / "run" / "adapter"), "data": str(file), "output": str(tmp_path / "out")}
    config = MathEvaluation(**asked, device="cpu", max_new_tokens=2, workers=1)
    evaluate_math(config)
    train_sft(sft(base, tmp_path, [{"prompt": "What?", "response": "That."}], output=str(tmp_path / "new"), seed=1))
    (tmp_path / "run" / "adapter").rename(tmp_path / "old")
    (tmp_path / "new" / "adapter").rename(tmp_path / "run" / "adapter")
    with pytest.raises(HalotuneError, match="asked for with another content of adapter"):
        evaluate_math(config)


BOMBS = [
    "\\boxed{" * 1500,
    "\\boxed{" * 1500 + "1" + "}" * 1500,
    "\\boxed{9^{9^{9^{9}}}}",
    "The answer is: " + "9" * 10_000,
    "\\boxed{" + "9" * 10_000 + "}",
    "The answer is: 10!!!!!!!!!!!",
    "{" * 10_000,
    "\x00\ud800",
]


def test_what_a_model_may_write_ends_no_grader():
    tasks = [Task(suite, text, gold) for suite, gold in (("gsm8k", "#### 2"), ("math", "\\boxed{2}")) for text in BOMBS]
    grades = list(grade_all([*tasks, Task("math", "\\boxed{2}", "\\boxed{2}")], workers=2, seconds=1.5))
    assert not any(right for grade in grades[:-1] for right in grade.right.values())
    assert grades[-1].right == {"strict": True, "paper": False}  # the others' processes were ended


def test_graders_that_cannot_work_are_an_error(monkeypatch):
    """Else every answer would count as wrong."""
    monkeypatch.setattr("halotune.recipes.grading.workers._prepare", os.getpid)  # takes no argument
    with pytest.raises(HalotuneError, match=r"the processes that grade cannot work .*__main__"):
        list(grade_all([Task("gsm8k", "1", "#### 1")], workers=1))


def test_several_processes_share_no_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HalotuneError, match=r"each of 2 processes takes one of its own; got 'cuda:1'. Use auto"):
        processes.join("cuda:1")
