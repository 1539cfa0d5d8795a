"""`halotune data gsm8k DIR`: word problems of primary school, 7,473 to learn from and 1,319 to be tested on (OpenAI, MIT).

train.jsonl, test.jsonl: question, answer (which ends with "#### 72")
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ...core.errors import HalotuneError
from ..common.download import Remote, fetch
from ..common.rows import read_rows
from ..language.problems import checked_problem
from .layout import find_file, opened, write_rows

_FROM = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
FILES = {
    "train": Remote(
        f"{_FROM}/grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        4166206,
    ),
    "test": Remote(
        f"{_FROM}/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        749738,
    ),
}
PARTS = tuple(FILES)


def get(folder: Path, parts: Iterable[str], given: Path | None, skip_bad_rows: bool = False) -> list[Path]:
    """The files of the parts, fetched, or taken from a folder or an archive that the user has."""
    if given is None:
        return [fetch(FILES[part], folder) for part in parts]
    with opened(given, folder) as root:
        found = {part: file for part in parts if (file := find_file(root, f"{part}.jsonl"))}
        if not found:
            raise HalotuneError(f"--from {given}: holds neither train.jsonl nor test.jsonl. Give GSM8K's own files.")
        check = partial(checked_problem, "gsm8k")
        return [write_rows(read_rows(file), check, folder / f"{part}.jsonl", skip_bad_rows) for part, file in found.items()]
