"""Pictures and what leads to them: rows of a jsonl file, or of a data set's own layout, as the model takes them.

DIR/prompts.jsonl, or metadata.jsonl: a row for each picture, paths from DIR. Splits are DIR/train/ and DIR/val/, or one DIR.
    target      the picture; also image, file_name
    prompt      its caption; also text, caption
    source      its hint; also hint, conditioning_image, canny … Else it is made of the picture (canny, landmark).
    labels      its label map, for segm; also label, where it is not the hint itself
    landmarks   68 pairs x, y in pixels of the picture, or the file that has them; landmark_size: the width that they count in
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..core.errors import HalotuneError
from .common.run import said
from .control_hints import FaceMesh, draw_edges, draw_landmarks, find_palette, read_depth, read_labels, read_points
from .diffusion import Family
from .image_sets.layout import read_lines
from .latents import LatentEncoder
from .pictures import Cache, fitted, pixels, read_picture, sha256

if TYPE_CHECKING:
    from .control import ControlConfig

T = TypeVar("T")

NAMES = {
    "target": ("target", "image", "file_name"),
    "prompt": ("prompt", "text", "caption"),
    "source": ("source", "hint", "conditioning_image"),
    "labels": ("labels", "label"),
    "landmarks": ("landmarks",),
}
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
# Folders of the released data sets, relative to a split's: pictures, and hints of each kind.
COLOURS = ("color", "celeba-hq-img")


@dataclass(frozen=True)
class Pair:
    """A picture's file, its caption, and where its hint is or what it is made of."""

    target: Path
    prompt: str
    source: Path | None = None
    labels: Path | None = None
    landmarks: Any = None  # pairs, or a file
    landmark_size: float | None = None
    name: str = ""  # unique in its split; the file name of what is drawn for it


def read_pairs(folder: str | Path, split: str, control: str, left_out: list[str] | None = None) -> list[Pair]:
    """The rows of a split, checked: every file is there, no picture twice.

    Args:
        left_out: where it is given, rows that cannot be used are left out, and why is added to it.

    Raises:
        HalotuneError: there is no such folder or table, it is empty, or a row is not as expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HalotuneError(f"{folder}: there is no such folder. Give --data the folder of a data set.")
    table = find_table(folder, split)
    pairs = []
    for number, line in enumerate(read_lines(table), 1):
        try:
            if line.strip():
                pairs.append(_pair(line, table, f"{table} line {number}", control))
        except HalotuneError as e:
            if left_out is None:
                raise
            left_out.append(str(e))
    if not pairs:
        why = f" that can be used, such as: {left_out[0]}" if left_out else ". Add pictures, or give another --data."
        raise HalotuneError(f"{table}: has no row{why}")
    seen: dict[str, Path] = {}
    for pair in pairs:
        if pair.name in seen:
            raise HalotuneError(f"{table}: has two rows for {pair.target}, whose results would have one name. Take one out.")
        seen[pair.name] = pair.target
    return pairs


def evenly(items: Sequence[T], count: int | None) -> list[T]:
    """So many of them, at even distances: what lies side by side in a table is often alike. All, where there are no more."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def find_table(folder: Path, split: str) -> Path:
    """The jsonl file of a split: in its folder, or beside it, under one of the usual names."""
    names = SPLITS[split]
    for place in [folder / name for name in names] + [folder]:
        own = [f"prompt_{name}_blip{kind}.json" for name in names for kind in ("", "_full")]
        plain = [f"{name}.jsonl" for name in names] if place == folder else []
        everyone = ["prompts.jsonl", "metadata.jsonl"] if place != folder or split == "train" else []
        for name in (*own, *plain, *everyone, *(["prompt.json"] if everyone else [])):
            if (place / name).is_file():
                return place / name
    there = ", or take `--split train`, which is there" if split == "val" and has_split(folder, "train") else ""
    raise HalotuneError(
        f"{folder}: holds no {split} split: no {names[0]}/prompts.jsonl, no {names[0]}.jsonl. Lay it out with `halotune data`, "
        f'or write rows {{"target": …, "prompt": …}} into one{there}.'
    )


def has_split(folder: str | Path, split: str) -> bool:
    try:
        find_table(Path(folder), split)
    except HalotuneError:
        return False
    return True


def _pair(line: str, table: Path, where: str, control: str) -> Pair:
    try:
        values = json.loads(line)
    except ValueError as e:
        raise HalotuneError(f"{where}: is no JSON: {e}. Write one object a line.") from e
    if not isinstance(values, dict):
        raise HalotuneError(f"{where}: is no object: {line[:60]!r}. Write one object a line.")
    keys = NAMES | {"source": (control, *NAMES["source"])}  # a table may have a column for each kind of hint
    found = {name: next((values[k] for k in own if values.get(k) is not None), None) for name, own in keys.items()}
    for name in ("target", "prompt"):
        if not isinstance(found[name], str) or not str(found[name]).strip():
            raise HalotuneError(f"{where}: has no {name} ({', '.join(NAMES[name])}). Add it.")
    target = _file(table, str(found["target"]), COLOURS, where)
    files = {k: _file(table, str(found[k]), (control,), where) for k in ("source", "labels") if found[k] is not None}
    landmarks = found["landmarks"]
    if isinstance(landmarks, str):
        landmarks = _file(table, landmarks, ("landmarks",), where)
    source, labels = files.get("source"), files.get("labels")
    if control == "segm":
        labels = labels or source
    if control in ("segm", "depth") and (labels if control == "segm" else source) is None:
        raise HalotuneError(f"{where}: has no {'labels' if control == 'segm' else 'source'}, which {control} needs. Add it.")
    inside = target.relative_to(table.parent) if target.is_relative_to(table.parent) else Path(target.name)
    name = "_".join(inside.with_suffix("").parts)
    size = values.get("landmark_size")
    if size is not None and not (isinstance(size, (int, float)) and size > 0):
        raise HalotuneError(f"{where}: landmark_size is a width in pixels; got {size!r}. Write a number, or leave it out.")
    return Pair(target, str(found["prompt"]).strip(), source, labels, landmarks, size, name)


def _file(table: Path, name: str, folders: Sequence[str], where: str) -> Path:
    """A row's file: from the table's folder; from the one above; or, of the released tables, by its name in a known folder."""
    tried = [table.parent / name, table.parent.parent / name]
    tried += [table.parent / folder / Path(name).name for folder in folders]
    for file in tried:
        if file.is_file():
            return file
    raise HalotuneError(f"{where}: there is no {tried[0]}. Add the file, or take the row out: pictures and hints go in pairs.")


# -- as the model takes them


class Preparation:
    """What is needed of a pair, at the run's resolution.

    Args:
        sizes: the (height, width) that pictures are brought to.
    """

    def __init__(self, config: ControlConfig, sizes: list[tuple[int, int]]) -> None:
        self.control, self.sizes = config.control, sizes
        self.palette = find_palette(config.palette)
        self.skip = config.skip_bad_rows
        self._mesh: FaceMesh | None = None

    @property
    def mesh(self) -> FaceMesh:
        self._mesh = self._mesh or FaceMesh()
        return self._mesh

    def picture(self, pair: Pair) -> Image.Image:
        return fitted(read_picture(pair.target), self.sizes)

    def hint(self, pair: Pair) -> Image.Image:
        """The hint of a picture, of the size that it is brought to.

        Raises:
            HalotuneError: it is of another shape than the picture, or no face is found.
        """
        picture = read_picture(pair.target)
        if self.control == "segm":
            return self._as(picture, read_labels(pair.labels or pair.target, self.palette)[1], pair.labels, nearest=True)
        if pair.source is not None:
            read = read_depth if self.control == "depth" else read_picture
            return self._as(picture, read(pair.source), pair.source)
        if self.control == "canny":
            return draw_edges(fitted(picture, self.sizes))
        points = self.points(pair)
        if points is None:
            raise HalotuneError(
                f"{pair.target}: no face is found in it. Take its row out, give its landmarks, or leave such rows out with "
                "--skip-bad-rows."
            )
        return draw_landmarks(points, fitted(picture, self.sizes).size)

    def labels(self, pair: Pair) -> np.ndarray:
        """The label of every pixel of the size that the picture is brought to, `(h, w)`."""
        labels, _ = read_labels(pair.labels or pair.target, self.palette)
        image = Image.fromarray(labels.astype(np.int32))
        return np.array(self._as(read_picture(pair.target), image, pair.labels, nearest=True)).astype(np.int64)

    def points(self, pair: Pair) -> np.ndarray | None:
        """The 68 points of a face in pixels of the size that the picture is brought to; None where none is found."""
        picture = read_picture(pair.target)
        if pair.landmarks is None:
            return self.mesh(fitted(picture, self.sizes))
        given = read_points(pair.landmarks, str(pair.target)) * (picture.width / (pair.landmark_size or picture.width))
        width, height = fitted(picture, self.sizes).size
        scale = max(width / picture.width, height / picture.height)  # covers it; what juts out is cut off on both sides
        return (given - (picture.width / 2, picture.height / 2)) * scale + (width / 2, height / 2)

    def _as(self, picture: Image.Image, hint: Image.Image, file: Path | None, nearest: bool = False) -> Image.Image:
        """A hint cut as its picture was; of another size it is scaled, of another shape refused."""
        own, other = picture.width / picture.height, hint.width / hint.height
        if abs(own - other) > 0.02 * own:
            raise HalotuneError(
                f"{file}: is of {hint.size}, its picture of {picture.size} pixels, which is another shape. Cut both alike."
            )
        size = fitted(picture, self.sizes).size
        return ImageOps.fit(hint, size, Image.Resampling.NEAREST if nearest else Image.Resampling.BOX)


class ControlExamples(Dataset[dict[str, Any]]):
    """Pairs as the model takes them, read from the cache when they are asked for: data sets need not fit in memory."""

    def __init__(self, entries: Sequence[tuple[Pair, Mapping[str, Any], Mapping[str, Any]]], cache: Cache, text: bool) -> None:
        self.entries, self.cache, self.text = entries, cache, text

    @property
    def contents(self) -> list[tuple[Mapping[str, Any], str]]:
        """What tells each of them from others, wherever its files lie: all that its tensors are made from, and its caption."""
        return [(key, pair.prompt) for pair, key, _ in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, key, text_key = self.entries[index]
        held = self.cache.get(key, _gone)
        text = self.cache.get(text_key, _gone) if self.text else {}
        mean = held["mean"]
        return {
            "mean": mean,
            "deviation": held["deviation"],
            "mask": torch.ones(1, 1, *mean.shape[-2:]),
            "hint": hint_tensor(Image.open(io.BytesIO(held["hint"].numpy().tobytes()))),
            "text": text,
            "caption": pair.prompt,
            "name": pair.name,
            "prior": False,
        }


def _gone() -> dict[str, Tensor]:
    raise HalotuneError("the cache was emptied while it was used. Start again: it is filled at the start.")


def hint_tensor(image: Image.Image) -> Tensor:
    """`(1, 3, height, width)` in [0, 1]."""
    return (pixels(image.convert("RGB")) + 1) / 2


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"examples": list(rows)}


def as_text(batch: dict[str, Any]) -> str:
    """A batch as text: of each picture its name, its size, how much of the hint is not black, and its caption."""
    lines = [
        f"  {e['name']}  {' × '.join(map(str, e['mean'].shape[1:]))} latents, hint {tuple(e['hint'].shape[-2:])}, "
        f"{(e['hint'].amax(1) > 0).float().mean():.0%} of it drawn  {e['caption']}"
        for e in batch["examples"]
    ]
    return "\n".join(lines)


class Preparer(LatentEncoder):
    """Fills the cache: the latents and hints of pairs, and the embeddings of prompts."""

    def __init__(self, family: Family, config: ControlConfig, device: torch.device) -> None:
        super().__init__(family, config, device)
        self.preparation = Preparation(config, self.sizes)

    def examples(self, pairs: Sequence[Pair], what: str) -> tuple[ControlExamples, list[str]]:
        """The pairs from the cache, and why some were left out. Of several processes each makes its share first."""
        state = PartialState()
        keys = [self.keys(pair, flip) for flip in ((False, True) if self.config.flip else (False,)) for pair in pairs]
        share = range(state.process_index, len(keys), state.num_processes)
        missing = sum(not self.cache.has(keys[i][1]) for i in share)
        if missing:
            said(f"{self.config.cache}: preparing {missing} {what} pictures")
        problems: dict[int, str] = {}
        for i in random.Random().sample(share, len(share)):  # in any order: other runs may be preparing the same ones
            self._make(keys[i], i, problems)
        state.wait_for_everyone()
        for i in range(len(keys)):  # what others could not make is told here, too; all else is there
            self._make(keys[i], i, problems)
        problems = dict(sorted(problems.items()))
        good = [key for i, key in enumerate(keys) if i not in problems]
        if not good:
            raise HalotuneError(f"none of {len(keys)} {what} pictures can be used, such as: {next(iter(problems.values()))}")
        return ControlExamples([k[:3] for k in good], self.cache, not self.config.train_text_encoder), list(problems.values())

    def keys(self, pair: Pair, flip: bool) -> tuple[Pair, dict[str, Any], dict[str, Any], bool]:
        landmarks = pair.landmarks
        files = [sha256(f) for f in (pair.target, pair.source, pair.labels) if f is not None]
        key = {
            "files": files,
            "control": self.config.control,
            "landmarks": sha256(landmarks) if isinstance(landmarks, Path) else landmarks,
            "landmark_size": pair.landmark_size,
            "palette": None if self.preparation.palette is None else self.preparation.palette.tolist(),
            "sizes": self.sizes,
            "flip": flip,
            "vae": self.vae_print,
        }
        return pair, key, self.text_key(pair.prompt), flip

    def _make(self, keys: tuple[Pair, dict[str, Any], dict[str, Any], bool], number: int, problems: dict[int, str]) -> None:
        pair, key, text_key, flip = keys
        if number in problems:
            return
        try:
            if not self.cache.has(key):
                self.cache.get(key, lambda: self.make(pair, flip))
        except HalotuneError as e:
            if not self.config.skip_bad_rows:
                raise
            problems[number] = str(e)
            return
        if not self.config.train_text_encoder and not self.cache.has(text_key):
            self.text(pair.prompt)

    def make(self, pair: Pair, flip: bool) -> dict[str, Tensor]:
        """mean and deviation of the latents, before they are normalized, `(1, c, h, w)`; the hint as a PNG's bytes."""
        image, hint = self.preparation.picture(pair), self.preparation.hint(pair)
        if flip:
            image, hint = ImageOps.mirror(image), ImageOps.mirror(hint)
        file = io.BytesIO()
        hint.save(file, "png")
        return {
            **self.latents(pixels(image)),
            "hint": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8),
        }
