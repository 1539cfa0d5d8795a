"""`halotune data coco DIR`: photographs with captions, 118,287 to learn from and 5,000 (COCO 2017; each under its own licence).

DIR/train, DIR/val: color/*.jpg, prompts.jsonl; and of what is given with --from canny/*.png, depth/*.png

Edges are made of the pictures as they are needed. Depth is in no release: it is taken from SPLIT/depth/ of what is given.
Captions are those of a prompt_SPLIT_blip.json there, else the first of COCO's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import HalotuneError
from ..common.download import Remote
from .layout import blip_captions, find_folder, source, write_split

_FROM = "http://images.cocodataset.org"
CAPTIONS = Remote(
    f"{_FROM}/annotations/annotations_trainval2017.zip",
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    252907541,
)
FILES = {
    "train": Remote(
        f"{_FROM}/zips/train2017.zip", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", 19336861798
    ),
    "val": Remote(f"{_FROM}/zips/val2017.zip", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", 815585330),
}
PARTS = tuple(FILES)
HINTS = ("canny", "depth")


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """Lay the data set out in `folder`, fetched or from what the user has: COCO's folders, or SPLIT/color."""
    parts = list(parts)
    with source("COCO", folder, given, [CAPTIONS, *(FILES[part] for part in parts)]) as root:
        return [_split(folder, part, root) for part in parts]


def _split(folder: Path, part: str, root: Path) -> Path:
    pictures = find_folder(root, f"{part}2017", f"{part}/color")
    if pictures is None:
        raise HalotuneError(
            f"{root}: holds neither {part}2017/ nor {part}/color/. Give COCO's folders, or --only the other part."
        )
    captions = _captions(root, part) | blip_captions(root, part)
    targets = [f for f in sorted(pictures.glob("*.jpg")) if f.stem in captions]
    if not targets:
        raise HalotuneError(f"{pictures}: none of its pictures has a caption. Add captions_{part}2017.json beside it.")
    files: dict[str, list[Path]] = {"color": targets}
    hints = {name: place for name in HINTS if (place := find_folder(root, f"{part}/{name}"))}
    for name, place in hints.items():
        files[name] = [place / f"{f.stem}.png" for f in targets]
        for file in files[name]:
            if not file.is_file():
                raise HalotuneError(f"{file}: is missing, but there is its picture. Add it, or take {name}/ away.")
    rows = [
        {"target": f"color/{f.name}", "prompt": captions[f.stem], **{name: f"{name}/{f.stem}.png" for name in hints}}
        for f in targets
    ]
    return write_split(folder / part, rows, files)


def _captions(root: Path, part: str) -> dict[str, str]:
    """The first caption of each picture."""
    table = next(iter(sorted(root.rglob(f"captions_{part}2017.json"))), None)
    if table is None:
        return {}
    held = json.loads(table.read_text(encoding="utf-8"))
    names = {image["id"]: Path(image["file_name"]).stem for image in held["images"]}
    found: dict[str, str] = {}
    for entry in sorted(held["annotations"], key=lambda e: e["id"]):
        found.setdefault(names[entry["image_id"]], " ".join(entry["caption"].split()))
    return found
