"""`benchmarks/control.py` at toy size: its data, its judge of label maps, a run of the sitting, the table."""

from __future__ import annotations

import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("cv2")

from PIL import Image

from ..examples.models import save_stable_diffusion


def pack(folder: Path, archive: Path) -> str:
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")
    return str(archive)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The archives that the data are made of: a class, faces, streets of two halves with a void corner."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)

    def picture(file: Path, pixels: Any = None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8) if pixels is None else pixels).save(file)

    for i in range(11):
        picture(folder / "classes" / "n02085620" / f"{i:02}.jpg")
    for split in ("train", "test"):
        picture(folder / split / split / "a.jpg")
        pack(folder / split, folder / f"{split}_16.tar")
        (folder / f"{split}.jsonl").write_text(json.dumps({"file": f"{split}/a.jpg", "landmarks": [[8, 8]] * 68}) + "\n")
    labels = np.repeat([[0] * 8 + [1] * 8], 16, 0).astype(np.uint8)
    labels[0, 0] = 11
    for split in ("train", "val"):
        for i in range(3):
            picture(folder / "streets" / split / f"{i}.jpg")
            picture(folder / "streets" / f"{split}annot" / f"{i}.png", labels)
    streets, classes = (pack(folder / name, folder / f"{name}.tar") for name in ("streets", "classes"))
    return ["--classes", classes, "--faces", str(folder), "--streets", streets]


def test_a_sitting(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "control.py"))
    data, judge = str(tmp_path / "data"), str(tmp_path / "judge")
    script["main"](["data", *sources, "--output", data])
    captions = [json.loads(line)["text"] for line in (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()]
    kinds = {"dog": 9, "face": 1, "street": 3}  # of the dogs two are for evaluation
    assert captions == [f"a photo of a {name}" for name, count in kinds.items() for _ in range(count)]

    small = ["--data", data, "--segmenter", judge, "--resolution", "16", "--batch-size", "2", "--device", "cpu"]
    for steps in (1, 2):  # the second goes on
        script["main"](["segmenter", *small, "--segmenter-steps", str(steps)])
        assert f"step {steps} of {steps}, on the held-out originals {{'aAcc': " in capsys.readouterr().out

    # One run, in this process.
    monkeypatch.setitem(script["train"].__globals__, "sitting", lambda missing, work, args, kind: work(next(missing()), args))
    given = [*small, "--model", str(save_stable_diffusion(tmp_path / "sd")), "--runs", str(tmp_path / "runs")]
    given += ["--results", str(tmp_path / "results"), "--tasks", "segm", "--methods", "HRA", "--steps", "2", "--limit", "2"]
    script["main"](["train", *given, "--inference-steps", "2"])
    assert sorted(f.name for f in (tmp_path / "results").iterdir()) == ["segm-HRA-0.json", "segm-HRA-0.webp"]
    found = json.loads((tmp_path / "results" / "segm-HRA-0.json").read_text())
    assert found["figures"]["pictures"] == 2
    assert str(tmp_path) not in json.dumps(found["config"])  # where it ran is nobody's business
    capsys.readouterr()
    script["main"](["table", "--results", str(tmp_path / "results"), "--tasks", "segm", "canny", "--methods", "HRA"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["HRA"]] == ["1", "0"]
