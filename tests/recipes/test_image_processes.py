"""The image recipes over several processes: one training by two of them, and a suite in shards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from halotune.recipes.common.run import FINISHED, read_lines, read_run
from halotune.recipes.subject import SubjectConfig, train_subject

from .pictures import adapter
from .test_dreambooth import write_suite
from .test_processes import kill, launch
from .test_subject import options, root

__all__ = ["root"]  # the fixture


def test_two_processes_train_one_run_and_resume(root: Path, tmp_path: Path) -> None:
    """The noise is each process's own, so numbers are near those of one process, and the same in both adapters."""
    values = {"batch_size": 2, "max_steps": 40, "save_every": 4, "evaluate_every": 20, "learning_rate": 0.01}
    train_subject(SubjectConfig(**options(root, tmp_path / "one", **values)))
    config = SubjectConfig(**options(root, tmp_path / "two", **values))
    first = launch(config, tmp_path / "two.yaml")
    while first.poll() is None and not any(line["step"] >= 6 for line in read_lines(tmp_path / "two" / "metrics.jsonl")):
        time.sleep(0.01)
    kill(first)
    assert 0 < max(line["step"] for line in read_lines(tmp_path / "two" / "metrics.jsonl")) < 40
    second = launch(config, tmp_path / "two.yaml")
    assert second.wait() == 0, (tmp_path / "two.log").read_text()[-2000:]
    record = read_run(tmp_path / "two")
    assert record and record["status"] == FINISHED and record["hardware"]["processes"] == 2
    one, two = read_lines(tmp_path / "one" / "metrics.jsonl"), read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in two]  # one writer: no line is there twice
    for a, b in zip(one, two, strict=True):
        if "evaluation" in a:
            assert b["evaluation"]["loss"] == pytest.approx(a["evaluation"]["loss"], rel=0.05)
    assert adapter(tmp_path / "two").keys() == adapter(tmp_path / "one").keys()


def test_two_processes_prepare_pictures_and_train_on_hints(root: Path, tmp_path: Path) -> None:
    """Each prepares its share of the pictures; adapter and encoder of hints are one process's."""
    pytest.importorskip("cv2")
    from halotune.recipes.control import ControlConfig, train_control

    from .control_pairs import save_pairs
    from .test_control import options as control_options
    from .test_control import weights

    values = {"data": str(save_pairs(tmp_path / "pairs")), "max_steps": 6, "evaluate_every": 6, "empty_prompts": 0.2}

    def config(name: str) -> ControlConfig:
        return ControlConfig(**control_options(root, tmp_path / name, **values, cache=str(tmp_path / f"cache-{name}")))

    train_control(config("one"))
    job = launch(config("two"), tmp_path / "two.yaml")
    assert job.wait() == 0, (tmp_path / "two.log").read_text()[-2000:]
    record = read_run(tmp_path / "two")
    assert record and record["status"] == FINISHED and record["hardware"]["processes"] == 2
    assert {f.name for f in (tmp_path / "cache-one").iterdir()} == {f.name for f in (tmp_path / "cache-two").iterdir()}
    one, two = read_lines(tmp_path / "one" / "metrics.jsonl"), read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        if "evaluation" in a:
            assert b["evaluation"]["loss"] == pytest.approx(a["evaluation"]["loss"], rel=0.05)
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()


def test_a_suite_is_shared_by_its_processes(root: Path, tmp_path: Path) -> None:
    """With --shard, two commands at once train every subject, each once; the same commands again have nothing to do."""
    suite = write_suite(tmp_path / "data")
    values = {"subject": str(suite), "suite": "dreambooth", "class_word": None, "max_steps": 1, "class_folder": None}
    values["class_images"], values["prior_weight"] = 1, 0.0

    def sitting() -> str:
        jobs = []
        for number in range(2):
            config = SubjectConfig(**options(root, tmp_path / "runs", **values, shard=f"{number}/2"))
            jobs.append((launch(config, tmp_path / f"{number}.yaml", processes=1), tmp_path / f"{number}.log"))
        for job, log in jobs:
            assert job.wait() == 0, log.read_text()[-2000:]
        return "".join(log.read_text() for _, log in jobs)

    sitting()
    for name in ("dog6", "rc_car", "bear"):
        record = read_run(tmp_path / "runs" / name)
        assert record and record["status"] == FINISHED
    assert "2 of 3 runs are this process's, 2 of them finished already" in sitting()
