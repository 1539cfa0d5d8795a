"""How data sets of pictures with hints lie on the disk: SPLIT/prompts.jsonl, and what its rows name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ..common.download import Remote, fetch, put, unpack


@contextmanager
def source(name: str, folder: Path, given: Path | None, remotes: Iterable[Remote]) -> Iterator[Path]:
    """A folder with what the user has, or with the archives that are fetched; they are unpacked beside `folder`.

    Archives stay in FOLDER/archives, so that what ends early goes on where it was; delete them when all is laid out.
    """
    if given is not None and not given.exists():
        raise HalotuneError(f"--from {given}: there is no such file or folder. Give {name}'s archive, or the folder of it.")
    if given is not None and given.is_dir():
        yield given
        return
    archives = [given] if given is not None else [fetch(remote, folder / "archives") for remote in remotes]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for archive in archives:
            unpack(archive, Path(scratch))
        yield Path(scratch)


def find_folder(root: Path, *names: str) -> Path | None:
    """The first folder below `root` whose path ends so, such as images/training."""
    for name in names:
        parts = Path(name).parts
        found = sorted(f for f in [root, *root.rglob(parts[-1])] if f.is_dir() and f.parts[-len(parts) :] == parts)
        if found:
            return found[0]
    return None


def write_split(folder: Path, rows: Iterable[Mapping[str, Any]], files: Mapping[str, Iterable[Path]]) -> Path:
    """A split's folder, in the place of an earlier one: a folder of files for each name, and the table of rows.

    Files are linked where the disk allows it, else copied.
    """

    def fill(target: Path) -> None:
        for name, members in files.items():
            (target / name).mkdir()
            for file in members:
                _take(file, target / name / file.name)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / "prompts.jsonl").write_text(lines, encoding="utf-8")

    put(folder, fill)
    return folder


def _take(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk
        shutil.copyfile(file, target)


def read_lines(table: Path) -> list[str]:
    """The lines of a table of JSON lines, whose texts may hold characters that others take for the end of one."""
    try:
        return table.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as e:
        raise HalotuneError(f"{table}: cannot be read as UTF-8: {e}. Save it as UTF-8.") from e


def read_captions(table: Path) -> dict[str, str]:
    """Captions by the stem of their picture, of a table of JSON lines with target and prompt, as the HRA paper's data have."""
    found = {}
    for number, line in enumerate(read_lines(table), 1):
        if line.strip():
            try:
                values = json.loads(line)
                found[Path(values["target"]).stem] = str(values["prompt"])
            except (ValueError, KeyError, TypeError) as e:
                raise HalotuneError(f"{table} line {number}: has no target and prompt ({e!r}). Get the file again.") from e
    return found


def blip_captions(root: Path, split: str) -> dict[str, str]:
    """The captions that lie beside the data under the name that the HRA paper's have; {} where there are none."""
    tables = sorted(root.rglob(f"prompt_{split}_blip*.json"))
    return {stem: text for table in tables for stem, text in read_captions(table).items()}
