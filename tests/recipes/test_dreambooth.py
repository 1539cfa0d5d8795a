"""DreamBooth's data set: its table, its layout, and a training for every subject."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from halotune import HalotuneError
from halotune.cli.main import main

pytest.importorskip("diffusers")

from halotune.recipes import dreambooth
from halotune.recipes.common.download import Remote
from halotune.recipes.dreambooth import TABLE, read_suite, suite_runs, train_suite
from halotune.recipes.subject import SubjectConfig

from .test_download import Server, server

__all__ = ["server"]  # the fixture

OBJECTS, LIVE = ("in the snow", "on a mirror"), ("in the snow", "wearing a red hat")


def write_suite(folder: Path, names: str = "dog6,dog\nrc_car,toy\nbear,stuffed animal\n") -> Path:
    def prompts(endings: tuple[str, ...]) -> str:
        lines = ",\n".join(f"'a {{0}} {{1}} {e}'.format(unique_token, class_token)" for e in endings)
        return f"prompt_list = [\n{lines}\n]\n"

    folder.mkdir(parents=True)
    text = f"Classes\n\nsubject_name,class\n{names}\nPrompts\n\nObject Prompts\n\n{prompts(OBJECTS)}"
    (folder / TABLE).write_text(f"{text}\nLive Subject Prompts\n\n{prompts(LIVE)}")
    for line in names.split():
        place = folder / line.partition(",")[0]
        if "," in line:
            place.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(place / "00.jpg")
    return folder


def config(folder: Path, **also: Any) -> SubjectConfig:
    return SubjectConfig(model="none", subject=str(folder), suite="dreambooth", output="out", **also)


def test_living_subjects_have_prompts_of_their_own(tmp_path: Path) -> None:
    dog, car, bear = read_suite(write_suite(tmp_path / "data"))
    assert dog.live
    assert not car.live
    assert dog.prompts_with("qwe") == ["a qwe dog in the snow", "a qwe dog wearing a red hat"]
    assert car.prompts_with("qwe") == ["a qwe toy in the snow", "a qwe toy on a mirror"]
    assert bear.class_word == "stuffed animal"


def test_one_training_for_each_subject_or_prompt(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "data")
    runs = suite_runs(config(folder))
    assert [run.output for run in runs] == ["out/dog6", "out/rc_car", "out/bear"]
    assert runs[1].prompt == "a photo of qwe toy"
    assert runs[1].validation_prompts == ["a qwe toy in the snow", "a qwe toy on a mirror"]
    runs = suite_runs(config(folder, paper_code=True))
    assert [run.output for run in runs][:3] == ["out/dog6-0", "out/dog6-1", "out/rc_car-0"]
    (run,) = suite_runs(config(folder, paper_code=True, class_index=1, prompt_index=1))
    assert run.validation_prompts == ["a qwe toy on a mirror"]
    with pytest.raises(HalotuneError, match="class_index: must be from 0 to 2; got 3"):
        suite_runs(config(folder, class_index=3))
    with pytest.raises(HalotuneError, match="class_index: must be from 0 to 2; got -1"):
        suite_runs(config(folder, class_index=-1))
    with pytest.raises(HalotuneError, match="prompt_index: must be from 0 to 1; got -1"):
        suite_runs(config(folder, prompt_index=-1))
    assert [run.class_folder for run in suite_runs(config(folder))] == [None] * 3
    folders = [run.class_folder for run in suite_runs(config(folder, class_folder="class_data"))]  # of each class its own
    assert folders == ["class_data/dog", "class_data/toy", "class_data/stuffed animal"]


def test_shards_share_the_runs(tmp_path: Path) -> None:
    folder, done = write_suite(tmp_path / "data"), []

    def train(run: SubjectConfig, **_: Any) -> dict[str, Any]:
        done.append(run.output)
        return {"results": {"loss": 1.0}}

    for shard in ("0/2", "1/2"):
        train_suite(config(folder, shard=shard), train)
    assert sorted(done) == ["out/bear", "out/dog6", "out/rc_car"]


def test_the_data_are_laid_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_suite(tmp_path / "clone" / "dataset")
    assert main(["data", "dreambooth", str(tmp_path / "laid"), "--from", str(tmp_path / "clone")]) == 0
    assert [s.name for s in read_suite(tmp_path / "laid")] == ["dog6", "rc_car", "bear"]
    assert (tmp_path / "laid" / "rc_car" / "00.jpg").is_file()
    assert "3 subjects; the published data set has 30" in capsys.readouterr().err
    assert main(["data", "dreambooth", str(tmp_path / "other"), "--from", str(tmp_path / "none")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def packed(folder: Path, file: Path, commit: str = dreambooth.COMMIT) -> bytes:
    """As GitHub packs a repository: in a folder, with the commit as the archive's comment."""
    with zipfile.ZipFile(file, "w") as z:
        z.comment = commit.encode()
        for path in sorted(folder.rglob("*")):
            z.write(path, Path("dreambooth-main") / path.relative_to(folder))
    return file.read_bytes()


def test_the_data_are_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A transfer that is cut off goes on; what is damaged, or of another commit, is not kept."""
    write_suite(tmp_path / "clone" / "dataset")
    content = packed(tmp_path / "clone", tmp_path / "a.zip")
    remote = server.remote("a.zip", content)
    monkeypatch.setattr(dreambooth, "ARCHIVE", Remote(remote.url, None))
    command = ["data", "dreambooth", str(tmp_path / "laid")]
    server.limit = 700
    assert main(command) == 2
    assert "The same command goes on where it ended" in capsys.readouterr().err
    assert not (tmp_path / "laid").exists()
    server.limit = None
    server.asked.clear()
    assert main(command) == 0
    assert server.asked == [("a.zip", "bytes=700-")]
    assert [s.name for s in read_suite(tmp_path / "laid")] == ["dog6", "rc_car", "bear"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.zip", "clone", "laid"]
    damaged = bytearray(content)
    damaged[content.index(b"subject_name,class") + 4] ^= 1
    for wrong, said in (
        (bytes(damaged), "prompts_and_classes.txt is damaged"),
        (packed(tmp_path / "clone", tmp_path / "b.zip", "f" * 40), "it is of commit ffff"),
        (b"<html>try later</html>", "is damaged"),
    ):
        server.files["a.zip"] = wrong
        assert main(["data", "dreambooth", str(tmp_path / "other")]) == 2
        assert said in capsys.readouterr().err
        assert not list((tmp_path / ".other.downloads").iterdir())
    server.files["a.zip"] = content
    assert main(["data", "dreambooth", str(tmp_path / "other")]) == 0


def test_tables_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match=r"holds no prompts_and_classes\.txt"):
        read_suite(tmp_path)
    with pytest.raises(HalotuneError, match="two subjects named 'dog'"):
        read_suite(write_suite(tmp_path / "twice", "dog,dog\ndog,toy\n"))
    folder = write_suite(tmp_path / "gone")
    (folder / "bear" / "00.jpg").unlink()
    (folder / "bear").rmdir()
    with pytest.raises(HalotuneError, match="bear: there is no such folder"):
        read_suite(folder)
    (folder / TABLE).write_text("Classes\n")
    with pytest.raises(HalotuneError, match="0 subjects, 0 prompts"):
        read_suite(folder)
