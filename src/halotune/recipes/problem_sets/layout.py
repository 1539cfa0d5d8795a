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


@contextmanager
def opened(given: Path, folder: Path) -> Iterator[Path]:
    """What the user has, as a folder: an archive is unpacked for the time being."""
    if not given.exists():
        raise HalotuneError(f"--from {given}: there is no such file or folder. Give a folder, an archive or a file.")
    if given.is_dir():
        yield given
    elif given.suffix in (".json", ".jsonl"):
        yield given.parent
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unpack(given, Path(scratch))
            yield Path(scratch)


def write_rows(rows: Iterator[Row], check: Callable[[dict[str, Any]], object], file: Path) -> Path:
    """Write rows as jsonl, if every one of them can be used.

    Args:
        check: raises ValueError for a row that cannot.
    """

    def checked(values: dict[str, Any]) -> dict[str, Any]:
        check(values)
        return values

    good, _ = usable(rows, checked, skip=False)
    text = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in good)
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return file
