"""Hints, label maps, landmarks and rows: what is made of them, and what is refused; and the figures by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from halotune import HalotuneError

pytest.importorskip("diffusers")
pytest.importorskip("cv2")

from halotune.recipes.control_data import Pair, Preparation, evenly, read_pairs
from halotune.recipes.control_eval import judge_faces, judge_labels
from halotune.recipes.control_hints import (
    MESH_TO_68,
    PARTS,
    FaceMesh,
    draw_landmarks,
    edges,
    find_palette,
    read_depth,
    read_labels,
    read_points,
)
from halotune.recipes.control_metrics import Confusion, edge_overlap, landmark_error
from halotune.recipes.control_pictures import Job
from halotune.recipes.image_sets.palettes import PALETTES
from halotune.recipes.pictures import read_picture

from .control_pairs import crops, face_points, write_rows
from .pictures import photograph


def preparation(control: str = "canny", size: int = 16, **also: Any) -> Preparation:
    config: Any = SimpleNamespace(control=control, palette=None, skip_bad_rows=False, **also)
    return Preparation(config, [(size, size)])


def saved(image: Image.Image, file: Path) -> Path:
    image.save(file)
    return file


# -- the figures


def test_overlap_of_edges() -> None:
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert edge_overlap(a, b) == (1.0, 1.0)  # both empty: equal
    a[0] = True
    assert edge_overlap(a, b) == edge_overlap(b, a) == (0.0, 0.0)
    b[0, :2] = b[1, 0] = True
    iou, f1 = edge_overlap(a, b)
    assert (iou, f1) == (pytest.approx(2 / 5), pytest.approx(2 * 2 / (2 * 2 + 1 + 2)))
    assert edge_overlap(a, a) == (1.0, 1.0)
    assert f1 == pytest.approx(2 * iou / (1 + iou))


def test_figures_of_labels() -> None:
    confusion = Confusion(4, void=9)
    confusion.add(np.array([[0, 0, 0, 1], [1, 9, 9, 0]]), np.array([[0, 0, 1, 1], [1, 2, 0, 2]]))
    found = confusion.figures()
    assert found["aAcc"] == pytest.approx(4 / 6)
    assert found["mAcc"] == pytest.approx((2 / 4 + 1) / 2)  # class 2 has no pixel, class 3 is nowhere
    assert found["mIoU"] == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    assert np.isnan(Confusion(4, void=9).figures()["mIoU"])


def test_faces_that_are_not_found_are_counted(tmp_path: Path) -> None:
    """Left out of the error, but not silently; the floor is the detector's own error on the originals."""
    picture = saved(Image.new("RGB", (32, 32), "red"), tmp_path / "a.png")
    points = np.array(face_points())
    jobs = [Job(str(i), Pair(picture, "a face", landmarks=points.tolist()), i) for i in range(3)]

    def mesh(image: Image.Image) -> np.ndarray | None:
        colour = image.getpixel((0, 0))
        shift = {(255, 0, 0): 1.0, (0, 0, 255): 3.0}.get(colour)  # type: ignore[arg-type]
        return None if shift is None else np.add(points, (shift, 0))

    drawn = [(job, Image.new("RGB", (32, 32), colour)) for job, colour in zip(jobs, ("blue", "blue", "black"), strict=True)]
    found = judge_faces(drawn, preparation("landmark", 32), mesh)
    assert found == {
        "pictures": 3,
        "error": pytest.approx(3.0),
        "undetected": pytest.approx(1 / 3),
        "floor": pytest.approx(1.0),
        "original_undetected": 0.0,
    }
    nothing = judge_faces(drawn[2:], preparation("landmark", 32), mesh)
    assert (nothing["error"], nothing["undetected"]) == (None, 1.0)
    assert landmark_error(points, np.add(points, (3, 4))) == pytest.approx(5.0)


def test_labels_are_judged_beside_the_originals(tmp_path: Path) -> None:
    labels = np.zeros((16, 16), dtype=np.uint8)
    labels[:, 8:] = 1
    target = saved(Image.fromarray(labels * 255).convert("RGB"), tmp_path / "a.png")
    pair = Pair(target, "halves", labels=saved(Image.fromarray(labels), tmp_path / "l.png"))

    def segmenter(image: Image.Image) -> np.ndarray:
        return (np.array(image.convert("L")) > 128).astype(np.int64)

    segmenter.classes, segmenter.source = 2, "a segmenter"  # type: ignore[attr-defined]
    drawn = [(Job("a", pair, 0), Image.new("RGB", (16, 16)))]
    found = judge_labels(drawn, preparation("segm"), segmenter, 255)  # type: ignore[arg-type]
    assert (found["aAcc"], found["original"]["mIoU"]) == (pytest.approx(0.5), pytest.approx(1.0))
    segmenter.classes = 1  # type: ignore[attr-defined]
    with pytest.raises(HalotuneError, match=r"l\.png: has label 1, but a segmenter knows 1 classes"):
        judge_labels(drawn, preparation("segm"), segmenter, 255)  # type: ignore[arg-type]


# -- pictures as people have them


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("size", [(33, 47), (200, 31), (16, 16)])
def test_pictures_of_every_kind_have_edges(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    whole = photograph().crop((60, 60, 360, 360)).resize(size)
    if mode == "I;16":
        image = Image.fromarray(np.array(whole.convert("L")).astype(np.uint16) * 257)
    else:
        image = whole.convert(mode)
    file = saved(image, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    hint = preparation().hint(Pair(file, "a flower"))
    assert (hint.size, hint.mode) == ((16, 16), "RGB")
    if mode in ("L", "I;16"):
        kept = np.array(read_picture(file).convert("L")).astype(int)
        assert np.abs(kept - np.array(whole.convert("L")).astype(int)).max() <= 1


def test_edges_are_opencvs() -> None:
    import cv2

    (picture,) = crops(1, 64)
    assert np.array_equal(edges(picture), cv2.Canny(np.array(picture), 100, 200) == 255)
    assert 0 < edges(picture).mean() < 0.5


def test_hints_of_another_size(tmp_path: Path) -> None:
    """Are scaled where the shape is the same, and refused where it is not."""
    (picture,) = crops(1, 64)
    target = saved(picture, tmp_path / "a.png")
    small, flat = saved(Image.new("RGB", (32, 32), "white"), tmp_path / "b.png"), tmp_path / "c.png"
    assert preparation().hint(Pair(target, "a", small)).getpixel((8, 8)) == (255, 255, 255)
    saved(Image.new("RGB", (64, 32)), flat)
    with pytest.raises(HalotuneError, match=r"c\.png: is of \(64, 32\), its picture of \(64, 64\) pixels"):
        preparation().hint(Pair(target, "a", flat))


def test_depth_of_more_than_8_bits_is_stretched(tmp_path: Path) -> None:
    depth = np.linspace(1000, 3000, 64).reshape(8, 8)
    found = np.array(read_depth(saved(Image.fromarray(depth.astype(np.uint16)), tmp_path / "d.png")))
    assert (found.min(), found.max()) == (0, 255)
    flat = read_depth(saved(Image.fromarray(np.full((8, 8), 7, dtype=np.uint16)), tmp_path / "f.png"))
    assert not np.array(flat).any()
    plain = Image.new("L", (8, 8), 77)
    assert read_depth(saved(plain, tmp_path / "p.png")).getpixel((0, 0)) == (77, 77, 77)


# -- label maps


def test_labels_and_their_colours(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 149], [255, 2, 3]], dtype=np.uint8)
    numbers, colours = read_labels(saved(Image.fromarray(labels), tmp_path / "l.png"), PALETTES["ade20k"])
    assert np.array_equal(numbers, labels)
    assert colours.getpixel((1, 0)) == (180, 120, 120)
    assert colours.getpixel((0, 1)) == (0, 0, 0)
    again, _ = read_labels(saved(colours, tmp_path / "c.png"), PALETTES["ade20k"])
    assert np.array_equal(again, labels)
    indexed = Image.fromarray(labels[:1] % 2)
    indexed.putpalette([9, 8, 7, 6, 5, 4])
    numbers, colours = read_labels(saved(indexed, tmp_path / "p.png"), None)  # its own palette
    assert numbers.tolist() == [[0, 1, 1]]
    assert colours.getpixel((1, 0)) == (6, 5, 4)


def test_label_maps_that_are_refused(tmp_path: Path) -> None:
    few = tmp_path / "few.json"
    few.write_text("[[0, 0, 0], [255, 0, 0]]")
    palette = find_palette(str(few))
    with pytest.raises(HalotuneError, match=r"l\.png: has label 2, which the palette of 2 colours lacks"):
        read_labels(saved(Image.fromarray(np.array([[0, 2]], dtype=np.uint8)), tmp_path / "l.png"), palette)
    with pytest.raises(HalotuneError, match=r"c\.png: has the colour \(1, 2, 3\) at x 1, y 0, which the palette of 2"):
        read_labels(saved(Image.fromarray(np.array([[[255, 0, 0], [1, 2, 3]]], dtype=np.uint8)), tmp_path / "c.png"), palette)
    with pytest.raises(HalotuneError, match="is a map of colours, whose labels are not known"):
        read_labels(tmp_path / "c.png", None)
    with pytest.raises(HalotuneError, match="is a JPEG; label maps must be PNG"):
        read_labels(saved(Image.new("L", (8, 8)), tmp_path / "l.jpg"), None)
    with pytest.raises(HalotuneError, match="palette: expected ade20k, voc or a JSON file"):
        find_palette("citscapes")
    few.write_text("[[0, 0, 0], [0, 0, 0]]")
    with pytest.raises(HalotuneError, match="or has a colour twice"):
        find_palette(str(few))
    few.write_text("[[0, 0, 300]]")
    with pytest.raises(HalotuneError, match="cannot be read as a palette"):
        find_palette(str(few))


def test_palettes() -> None:
    assert PALETTES["voc"][[1, 15, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
    assert len(PALETTES["ade20k"]) == 150
    assert len(np.unique(PALETTES["ade20k"], axis=0)) == 149  # roads and skyscrapers have one colour


# -- landmarks


def test_landmarks_are_lines_within_parts() -> None:
    assert [a for a, _, _ in PARTS] == [0, *(b for _, b, _ in PARTS[:-1])]
    assert PARTS[-1][1] == len(MESH_TO_68) == len(set(MESH_TO_68)) == 68
    points = np.zeros((68, 2))
    points[:17] = np.stack([np.linspace(10, 90, 17), np.full(17, 20)], -1)  # the jaw, a line; all others in a corner
    drawn = np.array(draw_landmarks(points, (100, 100)).convert("L")) > 0
    assert drawn[20, 10:91].all()
    assert drawn[19, 10] and not drawn[18, 10]  # dots of radius 1 at 100 pixels
    assert not drawn[40:].any()
    large = np.array(draw_landmarks(points * 8, (800, 800)).convert("L")) > 0
    assert large[160 - 4, 80] and not large[160 - 5, 80]  # 800 // 200


def test_landmarks_move_with_their_picture(tmp_path: Path) -> None:
    """A wide picture loses its sides; points count in pixels of the picture, or of the size that is said."""
    target = saved(Image.new("RGB", (64, 32)), tmp_path / "wide.png")
    points = np.add(face_points(32), (16, 0))
    found = preparation("landmark", 16).points(Pair(target, "a", landmarks=points.tolist()))
    assert found is not None
    np.testing.assert_allclose(found, (points - (16, 0)) / 2)
    double = preparation("landmark", 16).points(Pair(target, "a", landmarks=(points * 2).tolist(), landmark_size=128))
    np.testing.assert_allclose(double, found)  # type: ignore[arg-type]


def test_landmarks_in_files(tmp_path: Path) -> None:
    points = face_points()
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"{x}, {y}" for x, y in points))
    np.save(tmp_path / "a.npy", np.array(points))
    np.testing.assert_allclose(read_points(text, "a"), points)
    np.testing.assert_allclose(read_points(tmp_path / "a.npy", "a"), points)
    text.write_text("1 2\n3 4\n")
    with pytest.raises(HalotuneError, match=r"a\.txt: has landmarks of shape \(2, 2\)"):
        read_points(text, "a")
    text.write_text("one two\n")
    with pytest.raises(HalotuneError, match=r"a\.txt: cannot be read as landmarks"):
        read_points(text, "a")
    with pytest.raises(HalotuneError, match="there is no such file of landmarks"):
        read_points(tmp_path / "none.txt", "a")
    with pytest.raises(HalotuneError, match="finite or not"):
        read_points([[float("nan"), 0.0]] * 68, "a")


def test_a_picture_without_a_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = saved(Image.new("RGB", (32, 32)), tmp_path / "a.png")
    own = preparation("landmark")
    own._mesh = lambda image: None  # type: ignore[assignment]
    with pytest.raises(HalotuneError, match=r"a\.png: no face is found in it"):
        own.hint(Pair(target, "a face"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with monkeypatch.context() as later:
        later.setattr("sys.version_info", (3, 13))
        with pytest.raises(HalotuneError, match=r"no release with a face mesh for Python 3\.13"):
            FaceMesh()
    monkeypatch.setattr("sys.version_info", (3, 12))
    with pytest.raises(HalotuneError, match=r'mediapipe not installed. Install with: pip install "halotune\[landmark\]"'):
        FaceMesh()


# -- rows


def test_rows_under_the_names_that_people_use(tmp_path: Path) -> None:
    for folder in ("color", "canny", "deep/er"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    target = saved(Image.new("RGB", (8, 8)), tmp_path / "train" / "color" / "a.png")
    deep = saved(Image.new("RGB", (8, 8)), tmp_path / "train" / "deep/er" / "a.png")
    hint = saved(Image.new("RGB", (8, 8)), tmp_path / "train" / "canny" / "a.png")
    rows = [
        {"file_name": "color/a.png", "text": " one "},
        {"image": "deep/er/a.png", "caption": "two", "conditioning_image": "canny/a.png"},
    ]
    table = write_rows(tmp_path / "train" / "metadata.jsonl", rows)
    one, two = read_pairs(tmp_path, "train", "canny")
    assert (one.target, one.prompt, one.source, one.name) == (target, "one", None, "color_a")
    assert (two.target, two.source, two.name) == (deep, hint, "deep_er_a")
    table.unlink()
    released = [{"source": "./data/COCO/train/canny/a.png", "target": "./data/COCO/train/color/a.png", "prompt": "three"}]
    write_rows(tmp_path / "train" / "prompt_train_blip.json", released)
    (three,) = read_pairs(tmp_path, "train", "canny")
    assert (three.target, three.source) == (target, hint)


def test_rows_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HalotuneError, match="there is no such folder"):
        read_pairs(tmp_path / "none", "train", "canny")
    with pytest.raises(HalotuneError, match=r"holds no train split: no train/prompts\.jsonl"):
        read_pairs(tmp_path, "train", "canny")
    saved(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    write_rows(tmp_path / "prompts.jsonl", [{"target": "a.png", "prompt": "one"}])
    with pytest.raises(HalotuneError, match=r"holds no val split: .*, or take `--split train`, which is there\.$"):
        read_pairs(tmp_path, "val", "canny")

    def reading(*rows: dict[str, Any], control: str = "canny") -> Any:
        write_rows(tmp_path / "prompts.jsonl", rows)
        return read_pairs(tmp_path, "train", control)

    for rows, message in (
        ([], "has no row"),
        ([{"target": "a.png"}], r"line 1: has no prompt \(prompt, text, caption\)"),
        ([{"target": "b.png", "prompt": "a"}], r"line 1: there is no .*b\.png.*go in pairs"),
        ([{"target": "a.png", "prompt": "a", "source": "b.png"}], r"there is no .*b\.png"),
        ([{"target": "a.png", "prompt": "a"}] * 2, r"two rows for .*a\.png"),
    ):
        with pytest.raises(HalotuneError, match=message):
            reading(*rows)
    with pytest.raises(HalotuneError, match="has no labels, which segm needs"):
        reading({"target": "a.png", "prompt": "a"}, control="segm")
    with pytest.raises(HalotuneError, match=r"line 1: landmark_size is a width in pixels; got '8'"):
        reading({"target": "a.png", "prompt": "a", "landmark_size": "8"}, control="landmark")
    table = tmp_path / "prompts.jsonl"
    table.write_bytes('{"target": "a.png", "prompt": "ä"}'.encode("latin-1"))
    with pytest.raises(HalotuneError, match=r"prompts\.jsonl: cannot be read as UTF-8"):
        read_pairs(tmp_path, "train", "canny")
    table.write_text('\ufeff{"target": "a.png", "prompt": "one\u2028line"}\r\n', encoding="utf-8")
    assert read_pairs(tmp_path, "train", "canny")[0].prompt == "one\u2028line"
    table.write_text("{broken\n[1]\n" + json.dumps({"target": "b.png", "prompt": "a"}) + "\n")
    with pytest.raises(HalotuneError, match="line 1: is no JSON"):
        read_pairs(tmp_path, "train", "canny")
    with pytest.raises(HalotuneError, match=r"has no row that can be used, such as: .*line 1: is no JSON"):
        read_pairs(tmp_path, "train", "canny", [])
    with table.open("a") as file:
        file.write('{"target": "a.png", "prompt": "a"}\n')
    left_out: list[str] = []
    assert [pair.name for pair in read_pairs(tmp_path, "train", "canny", left_out)] == ["a"]
    assert ["line 1" in left_out[0], "line 2" in left_out[1], "line 3" in left_out[2]] == [True] * 3


def test_a_few_are_taken_at_even_distances() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 8) == evenly(range(3), None) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:SymbolDatabase.GetPrototype:UserWarning")  # mediapipe's, of protobuf
def test_a_real_face_is_found() -> None:
    """Grace Hopper's, whom matplotlib ships: the eyes lie above the mouth, and the left one left of the right one."""
    pytest.importorskip("mediapipe")
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:  # type: ignore[arg-type]
        points = FaceMesh()(image)
    assert points is not None
    left, right, mouth = points[36:42].mean(0), points[42:48].mean(0), points[48:60].mean(0)
    assert left[0] < right[0]
    assert max(left[1], right[1]) < mouth[1]
    assert torch.from_numpy(points).isfinite().all()
