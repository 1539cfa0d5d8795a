"""`halotune data math DIR`: problems of competitions, 7,500 to learn from and 5,000 to be tested on (Hendrycks et al., MIT).

train.jsonl, test.jsonl: problem, solution (with a \\boxed{answer}), level, type
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from ...core.errors import HalotuneError
from ..common.download import Remote, fetch, unpack
from ..common.rows import Row, read_rows
from ..language.problems import checked_problem, folder_rows
from .layout import find_file, opened, write_rows

# The authors' own address no longer answers; this is the archive's copy of it.
ARCHIVE = Remote(
    "https://web.archive.org/web/20240101000000id_/https://people.eecs.berkeley.edu/~hendrycks/MATH.tar",
    "0fbe4fad0df66942db6c221cdcc95b298cc7f4595a2f0f518360cce84e90d9ac",
)
PARTS = ("train", "test")


def get(folder: Path, parts: Iterable[str], given: Path | None, skip_bad_rows: bool = False) -> list[Path]:
    """The files of the parts, fetched, or made from a folder or an archive that the user has."""
    if given is not None:
        with opened(given, folder) as root:
            return _lay_out(root, parts, folder, skip_bad_rows)
    archive = fetch(ARCHIVE, folder / ".downloads")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unpack(archive, Path(scratch))
        made = _lay_out(Path(scratch), parts, folder)
    archive.unlink()
    archive.parent.rmdir()
    return made


def _lay_out(root: Path, parts: Iterable[str], folder: Path, skip: bool = False) -> list[Path]:
    made, check = [], partial(checked_problem, "math")
    for part in parts:
        rows = _rows(root, part)
        if rows is not None:
            made.append(write_rows(rows, check, folder / f"{part}.jsonl", skip))
    if not made:
        raise HalotuneError(f"{root}: holds neither train nor test. Give MATH's own folders, or train.jsonl and test.jsonl.")
    return made


def _rows(root: Path, part: str) -> Iterator[Row] | None:
    """A part's rows: of a jsonl file, or of MATH's folders with a file for every problem."""
    if file := find_file(root, f"{part}.jsonl"):
        return read_rows(file)
    folder = next((f for f in sorted(root.rglob(part)) if f.is_dir() and next(f.rglob("*.json"), None)), None)
    return None if folder is None else folder_rows(folder)
