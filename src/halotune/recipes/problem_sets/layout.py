"""Files of problems, found in what the user has or what was fetched, checked row by row, and put where they belong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ...core.files import write_atomically
from ..common.download import unpack
from ..common.rows import Row, usable
from ..common.run import said


@contextmanager
def opened(given: Path, folder: Path) -> Iterator[Path]:
    """What the user has, as a folder or a lone file of rows: an archive is unpacked for the time being."""
    if not given.exists():
        raise HalotuneError(f"--from {given}: there is no such file or folder. Give a folder, an archive or a file.")
    if given.is_dir() or given.suffix in (".json", ".jsonl"):
        yield given
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpack(given, Path(scratch))
            yield Path(scratch)


def find_file(root: Path, pattern: str) -> Path | None:
    """The first file of such a name below a folder; or the lone file, if it has it."""
    found = ([root] if root.match(pattern) else []) if root.is_file() else sorted(root.rglob(pattern))
    return next((file for file in found if file.is_file()), None)


def write_rows(rows: Iterator[Row], check: Callable[[dict[str, Any]], object], file: Path, skip: bool = False) -> Path:
    """Write rows as jsonl, if every one of them can be used.

    Args:
        check: raises ValueError for a row that cannot.
        skip: leave such rows out, and say which.
    """

    def checked(values: dict[str, Any]) -> dict[str, Any]:
        check(values)
        return values

    good, bad = usable(rows, checked, skip)
    if bad:
        said(f"{file}: {len(bad)} rows were left out:")
        for line in bad:
            said(f"  {line}")
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in good)
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return file
