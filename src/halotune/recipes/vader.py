"""`halotune data vader DIR`: words and the mean of ten human ratings, from the package vaderSentiment; needs no network.

train.csv, test.csv: word, rating (−4 bad to 4 good), sentiment (negative, positive)
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..demo.data import Rating, read_ratings, split
from ..demo.model import package_folder

PARTS = ("ratings",)


def get(folder: Path, parts: Iterable[str], given: Path | None) -> list[Path]:
    """The two tables; `given` is a copy of vader_lexicon.txt."""
    lexicon = given or package_folder("vaderSentiment", "vaderSentiment==3.3.2") / "vader_lexicon.txt"
    if not lexicon.is_file():
        raise HalotuneError(f"{lexicon}: there is no such file. Give VADER's lexicon, vader_lexicon.txt.")
    made = []
    for name, rows in zip(("train.csv", "test.csv"), split(read_ratings(lexicon)), strict=True):
        write_atomically(folder / name, lambda file, rows=rows: _write(file, rows))
        made.append(folder / name)
    return made


def _write(file: Path, rows: list[Rating]) -> None:
    with file.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["word", "rating", "sentiment"])
        writer.writerows([word, rating, "positive" if rating > 0 else "negative"] for word, rating in rows)
