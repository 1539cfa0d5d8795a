"""`halotune data ade20k DIR`: scenes and label maps of 150 classes, 20,210 to learn from and 2,000 (MIT, CSAIL; research).

DIR/train, DIR/val: color/*.jpg, segm/*.png, prompts.jsonl

Label maps are PNGs with the challenge's palette: class i of 150, from 0, in its colour; 255, black, is none of them. Captions
are those of a prompt_SPLIT_blip.json beside what is given with --from, else "a photo of" and the scene's category.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.errors import HalotuneError
from ..common.download import Remote
from .layout import blip_captions, find_folder, source, write_split
from .palettes import PALETTES

FILES = (
    Remote(
        "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        algorithm="sha1",  # what its readers have published
    ),
)
SPLITS = {"train": "training", "val": "validation"}
PARTS = tuple(SPLITS)
VOID = 255


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """Lay the data set out in `folder`, fetched or from what the user has: the challenge's archive, or its folder."""
    with source("ADE20K", folder, given, FILES) as root, tempfile.TemporaryDirectory() as scratch:
        return [_split(folder, part, root, Path(scratch)) for part in parts]


def _split(folder: Path, part: str, root: Path, scratch: Path) -> Path:
    name = SPLITS[part]
    pictures, maps = find_folder(root, f"images/{name}"), find_folder(root, f"annotations/{name}")
    if pictures is None or maps is None:
        raise HalotuneError(f"{root}: holds no images/{name} and annotations/{name}. Give ADEChallengeData2016, as released.")
    captions = blip_captions(root, part)
    scenes = _scenes(root)
    targets = sorted(pictures.glob("*.jpg"))
    rows, coloured = [], []
    for target in targets:
        labels = maps / f"{target.stem}.png"
        if not labels.is_file():
            raise HalotuneError(f"{labels}: is missing, but there is {target.name}. Unpack the archive again.")
        file = scratch / labels.name
        write_labels(labels, file)
        coloured.append(file)
        caption = captions.get(target.stem) or f"a photo of {scenes.get(target.stem, 'a scene')}"
        rows.append({"target": f"color/{target.name}", "source": f"segm/{labels.name}", "prompt": caption})
    return write_split(folder / part, rows, {"color": targets, "segm": coloured})


def write_labels(given: Path, file: Path) -> None:
    """Numbers 1 to 150, and 0 for none, as 0 to 149, and 255 for none, with the palette."""
    with Image.open(given) as image:
        labels = np.array(image)
    if labels.ndim != 2 or labels.max() > len(PALETTES["ade20k"]):
        raise HalotuneError(f"{given}: expected labels from 0 to 150; got shape {labels.shape}, up to {labels.max()}.")
    shifted = Image.fromarray(np.where(labels == 0, VOID, labels.astype(np.int64) - 1).astype(np.uint8))
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(PALETTES["ade20k"])] = PALETTES["ade20k"]
    shifted.putpalette(colours.tobytes())  # the mode is P then
    shifted.save(file, "png")


def _scenes(root: Path) -> dict[str, str]:
    """sceneCategories.txt: ADE_train_00000001 airport_terminal -> an airport terminal."""
    table = next(iter(sorted(root.rglob("sceneCategories.txt"))), None)
    lines = table.read_text(encoding="utf-8").splitlines() if table else []
    found = {}
    for stem, scene in (line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2):
        words = scene.strip().replace("_", " ")
        found[stem] = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return found
