"""`halotune data metamath DIR`: 395,000 worked solutions, made from GSM8K's and MATH's training problems (Yu et al., MIT).

MetaMathQA-395K.json: query, response (which ends with "The answer is: 72"), original_question, type
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ..common.download import Remote, fetch
from ..common.rows import read_rows, text_of
from .layout import find_file, opened, write_rows

FILE = Remote(
    "https://huggingface.co/datasets/meta-math/MetaMathQA/resolve/aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18/MetaMathQA-395K.json",
    "fb39a5d8c05c042ece92eae37dfd5ea414a5979df2bf3ad3b86411bef8205725",
)
PARTS = ("train",)


def get(folder: Path, parts: Iterable[str], given: Path | None, skip_bad_rows: bool = False) -> list[Path]:
    """The file, fetched, or taken from a file, a folder or an archive that the user has."""
    if given is None:
        return [fetch(FILE, folder)]
    with opened(given, folder) as root:
        file = root if root.is_file() else find_file(root, "*MetaMath*.json*")
        if file is None:
            raise HalotuneError(f"--from {given}: holds no {FILE.name}. Give that file.")
        return [write_rows(read_rows(file), _check, folder / f"{file.stem}.jsonl", skip_bad_rows)]


def _check(values: dict[str, Any]) -> None:
    text_of(values, "query")
    text_of(values, "response")
