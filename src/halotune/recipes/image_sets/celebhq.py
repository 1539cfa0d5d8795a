"""`halotune data celebhq DIR`: faces with captions and 68 landmarks, as the HRA paper has them (CelebA-HQ; research alone).

DIR/train, DIR/val: color/*.jpg, landmarks/*.txt, prompts.jsonl, whose landmarks count in a width of 1024

Its makers hand it out by request, and the landmarks by hand, so there is nothing to fetch: what one has is taken with --from.
    celebhq-text/celeba-hq-img/*.jpg, celeba-hq-landmark2d/*.txt, celeba-hq-landmark2d_cond_512/*.png, prompt_SPLIT_blip*.json
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...core.errors import HalotuneError
from .layout import find_folder, read_captions, source, write_split

PARTS = ("train", "val")
LANDMARK_SIZE = 1024
SITE = "https://github.com/tkarras/progressive_growing_of_gans"


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """Lay the data set out in `folder`, from the folder or archive that the user has."""
    if given is None:
        raise HalotuneError(
            f"celebhq: is handed out by its makers, {SITE}, with no archive of one checksum. Give what you have with --from: "
            "celeba-hq-img/, celeba-hq-landmark2d/ and prompt_train_blip.json, as the paper's data have them."
        )
    with source("CelebA-HQ", folder, given, ()) as root:
        return [_split(folder, part, root) for part in parts]


def _split(folder: Path, part: str, root: Path) -> Path:
    pictures = find_folder(root, "celeba-hq-img", f"{part}/color")
    tables = sorted(root.rglob(f"prompt_{part}_blip*.json"))
    if pictures is None or not tables:
        raise HalotuneError(f"{root}: holds no celeba-hq-img/, or no prompt_{part}_blip.json. Give the data with both.")
    captions = read_captions(tables[0])
    by_stem = {f.stem: f for f in pictures.iterdir() if f.suffix in (".jpg", ".png")}
    missing = sorted(captions.keys() - by_stem.keys())
    if missing:
        raise HalotuneError(f"{tables[0]}: names {missing[0]}, which is not in {pictures}. Pictures and captions go in pairs.")
    targets = [by_stem[stem] for stem in captions]
    points, drawn = find_folder(root, "celeba-hq-landmark2d"), find_folder(root, "celeba-hq-landmark2d_cond_512")
    files: dict[str, list[Path]] = {"color": targets}
    rows = [{"target": f"color/{f.name}", "prompt": captions[f.stem]} for f in targets]
    for name, place, ending in (("landmarks", points, "txt"), ("hints", drawn, "png")):
        if place is None:
            continue
        files[name] = [place / f"{f.stem}.{ending}" for f in targets]
        lacking = next((f for f in files[name] if not f.is_file()), None)
        if lacking is not None:
            raise HalotuneError(f"{lacking}: is missing, but there is its picture. Add it, or take {place.name}/ away.")
        for row, file in zip(rows, files[name], strict=True):
            row["landmarks" if name == "landmarks" else "source"] = f"{name}/{file.name}"
    own = {"landmark_size": LANDMARK_SIZE} if points is not None else {}
    return write_split(folder / part, [row | own for row in rows], files)
