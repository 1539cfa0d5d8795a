"""Small data sets of pictures with hints, cut from scikit-learn's photograph of a flower."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .pictures import photograph


def crops(count: int, size: int = 32) -> list[Image.Image]:
    whole = photograph()
    return [whole.crop((60 + 37 * i, 60, 360 + 37 * i, 360)).resize((size, size)) for i in range(count)]


def write_rows(table: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def save_pairs(folder: Path, train: int = 5, val: int = 3) -> Path:
    """train/ and val/, without hints."""
    pictures = crops(train + val)
    for split, own in (("train", pictures[:train]), ("val", pictures[train:])):
        (folder / split).mkdir(parents=True)
        for i, picture in enumerate(own):
            picture.save(folder / split / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "text": "a flower" if i else "a yellow flower"} for i in range(len(own))]
        write_rows(folder / split / "metadata.jsonl", rows)
    return folder


def save_labels(folder: Path, count: int = 4) -> Path:
    """Pictures of two halves, and their labels 0 and 1, void in the corner, as numbers."""
    for split in ("train", "val"):
        rows = []
        for i in range(count):
            labels = np.zeros((32, 32), dtype=np.uint8)
            labels[:, 8 * (i % 3 + 1) :] = 1
            pixels = np.stack([255 * (labels == 0), 255 * (labels == 1), 0 * labels], -1).astype(np.uint8)
            labels[:2, :2] = 255
            for kind, values in (("color", pixels), ("segm", labels)):
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / split / kind / f"{i}.png")
            rows.append({"target": f"color/{i}.png", "source": f"segm/{i}.png", "prompt": "two halves"})
        write_rows(folder / split / "prompts.jsonl", rows)
    return folder


def face_points(size: float = 32.0) -> list[list[float]]:
    """68 points on a circle."""
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    return (size / 2 + size / 3 * np.stack([np.cos(angles), np.sin(angles)], -1)).tolist()
