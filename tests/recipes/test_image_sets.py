"""`halotune data ade20k|coco|celebhq`: from a local server, cut off and gone on with, and from what the user has."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halotune import HalotuneError
from halotune.cli.main import main

pytest.importorskip("diffusers")
pytest.importorskip("cv2")

from halotune.recipes.control_data import read_pairs
from halotune.recipes.control_hints import read_labels
from halotune.recipes.image_sets import ade20k, coco

from .control_pairs import face_points
from .test_download import server

__all__ = ["server"]  # the fixture


def picture(ending: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((16, 16), 60).convert("RGB").save(file, ending)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name, content in files.items():
            z.writestr(name, content)
    return file.getvalue()


def ade_files() -> dict[str, bytes]:
    labels = io.BytesIO()
    Image.fromarray(np.array([[0, 1], [150, 2]], dtype=np.uint8)).save(labels, "png")
    files: dict[str, bytes] = {}
    for split, name in (("training", "train"), ("validation", "val")):
        for i in (1, 2):
            stem = f"ADE_{name}_{i:08}"
            files[f"ADEChallengeData2016/images/{split}/{stem}.jpg"] = picture()
            files[f"ADEChallengeData2016/annotations/{split}/{stem}.png"] = labels.getvalue()
    files["ADEChallengeData2016/sceneCategories.txt"] = b"ADE_train_00000001 airport_terminal\nADE_val_00000001 street\n"
    return files


def test_ade20k_is_fetched_and_goes_on(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = zipped(ade_files())
    remote = replace(server.remote("ade.zip", content), algorithm="sha1", checksum=hashlib.sha1(content).hexdigest())
    monkeypatch.setattr(ade20k, "FILES", (remote,))
    server.limit = 1000
    assert main(["data", "ade20k", str(tmp_path / "ade")]) == 2
    server.limit = None
    assert main(["data", "ade20k", str(tmp_path / "ade")]) == 0
    assert server.asked[-1] == ("ade.zip", "bytes=1000-")
    first, second = read_pairs(tmp_path / "ade", "train", "segm")
    assert (first.prompt, second.prompt) == ("a photo of an airport terminal", "a photo of a scene")
    assert first.labels is not None
    numbers, colours = read_labels(first.labels, None)
    assert numbers.tolist() == [[255, 0], [149, 1]]
    assert [colours.getpixel(p) for p in ((0, 0), (1, 0), (0, 1))] == [(0, 0, 0), (120, 120, 120), (92, 0, 255)]
    monkeypatch.setattr(ade20k, "FILES", (replace(remote, url=remote.url, checksum="0" * 40),))
    shutil.rmtree(tmp_path / "ade")
    with pytest.raises(HalotuneError, match="not kept, as its SHA-1 is"):
        ade20k.get(tmp_path / "ade", ["val"], None)


def test_ade20k_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in ade_files().items():
        file = tmp_path / "own" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    blip = {"source": "x.png", "target": "color/ADE_val_00000001.png", "prompt": "a busy street"}
    (tmp_path / "own" / "prompt_val_blip.json").write_text(json.dumps(blip) + "\n")
    assert main(["data", "ade20k", str(tmp_path / "ade"), "--only", "val", "--from", str(tmp_path / "own")]) == 0
    assert [p.prompt for p in read_pairs(tmp_path / "ade", "val", "segm")] == ["a busy street", "a photo of a scene"]
    (tmp_path / "own" / "ADEChallengeData2016/annotations/training/ADE_train_00000002.png").unlink()
    assert main(["data", "ade20k", str(tmp_path / "ade"), "--from", str(tmp_path / "own")]) == 2
    assert "ADE_train_00000002.png: is missing" in capsys.readouterr().err
    assert not (tmp_path / "ade" / "train").exists()


def coco_captions(split: str) -> bytes:
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in (1, 2)]
    notes = [{"id": n, "image_id": i, "caption": c} for n, i, c in ((9, 1, "later"), (3, 1, "a  dog\n"), (4, 2, "a cat"))]
    return json.dumps({"images": images, "annotations": notes, "split": split}).encode()


def test_coco_with_its_captions(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = zipped({f"annotations/captions_{s}2017.json": coco_captions(s) for s in ("train", "val")})
    pictures = zipped({f"val2017/{i:012}.jpg": picture() for i in (1, 2, 3)})  # the third has no caption
    monkeypatch.setattr(coco, "CAPTIONS", server.remote("notes.zip", notes))
    monkeypatch.setattr(coco, "FILES", {"val": server.remote("val.zip", pictures)})
    assert main(["data", "coco", str(tmp_path / "coco"), "--only", "val"]) == 0
    pairs = read_pairs(tmp_path / "coco", "val", "canny")
    assert [(p.prompt, p.source) for p in pairs] == [("a dog", None), ("a cat", None)]


def test_coco_with_depth(tmp_path: Path) -> None:
    own = tmp_path / "own" / "train"
    for folder, ending in (("color", "jpg"), ("depth", "png")):
        (own / folder).mkdir(parents=True)
        (own / folder / f"a.{ending}").write_bytes(picture("png" if ending == "png" else "jpeg"))
    (own / "prompt_train_blip.json").write_text('{"target": "color/a.jpg", "source": "depth/a.png", "prompt": "a room"}\n')
    assert main(["data", "coco", str(tmp_path / "coco"), "--only", "train", "--from", str(tmp_path / "own")]) == 0
    (pair,) = read_pairs(tmp_path / "coco", "train", "depth")
    assert pair.source == tmp_path / "coco" / "train" / "depth" / "a.png"
    (edges,) = read_pairs(tmp_path / "coco", "train", "canny")
    assert edges.source is None  # depth is no hint of edges


def test_celebhq_is_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "celebhq", str(tmp_path / "faces")]) == 2
    assert "Give what you have with --from" in capsys.readouterr().err
    own = tmp_path / "own"
    for folder in ("celebhq-text/celeba-hq-img", "celeba-hq-landmark2d"):
        (own / folder).mkdir(parents=True)
    for i in (1, 2):
        (own / "celebhq-text/celeba-hq-img" / f"{i}.jpg").write_bytes(picture())
        (own / "celeba-hq-landmark2d" / f"{i}.txt").write_text("\n".join(f"{x} {y}" for x, y in face_points(1024)))
    for split, i in (("train", 1), ("val", 2)):
        row = {"source": f"celeba-hq-landmark2d_cond_512/{i}.png", "target": f"celeba-hq-img/{i}.jpg", "prompt": "a face"}
        (own / f"prompt_{split}_blip.json").write_text(json.dumps(row) + "\n")
    assert main(["data", "celebhq", str(tmp_path / "faces"), "--from", str(own)]) == 0
    (pair,) = read_pairs(tmp_path / "faces", "val", "landmark")
    assert (pair.target.name, pair.landmark_size) == ("2.jpg", 1024)
    (own / "celebhq-text/celeba-hq-img/2.jpg").unlink()
    assert main(["data", "celebhq", str(tmp_path / "faces"), "--from", str(own)]) == 2
    assert "names 2, which is not in" in capsys.readouterr().err
