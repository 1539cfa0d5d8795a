"""Rows of a user's files, each with the place it came from, so that an error can name it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...core.errors import HalotuneError

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A row of a file: its values by column, and the line (of JSON arrays and parquet files, the row) it stands on, from 1."""

    file: Path
    line: int
    values: dict[Any, Any]

    @property
    def place(self) -> str:
        return f"{self.file}, line {self.line}"


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a csv, tsv, jsonl, json (a list of objects) or parquet file; csv and tsv with a header.

    Raises:
        HalotuneError: the file cannot be read, or is of another kind.
    """
    if file.is_dir():
        raise HalotuneError(f"{file}: is a folder. Give a file in it ({', '.join(READERS)}).")
    if file.suffix.lower() not in READERS:
        raise HalotuneError(f"{file}: expected a file that ends in {', '.join(READERS)}. Rename or convert it.")
    if not file.is_file():
        raise HalotuneError(f"{file}: there is no such file. Give the path of one.")
    try:
        yield from READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as e:
        raise HalotuneError(f"{file}: is not UTF-8 ({e.reason} at byte {e.start}). Save it as UTF-8.") from e


def _csv(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as f:
        csv.field_size_limit(2**31 - 1)  # a text may be long
        reader = csv.DictReader(f, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            names = reader.fieldnames or []
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise HalotuneError(f"{file}: two columns are named {twice[0]!r}. Rename or delete one.")
            for values in reader:
                yield Row(file, reader.line_num, values)
        except csv.Error as e:
            raise HalotuneError(f"{file}, line {reader.line_num}: {e}. Quote fields that hold quotes or line ends.") from e


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    values = json.loads(line)
                except ValueError as e:
                    values = {None: f"is no JSON ({e})"}
                yield Row(file, number, _checked(values, "\\ud" in line.lower()))


def _checked(values: Any, escaped: bool) -> dict[Any, Any]:
    """A JSON object, or what is wrong with it; `escaped`: it may hold half a character, which JSON allows and no tokenizer."""
    if not isinstance(values, dict):
        return {None: "is no JSON object"}
    try:
        if escaped:
            json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return {None: "holds half a character (a surrogate without the other)"}
    return values


def _json(file: Path) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        entries = json.loads(text)
    except ValueError as e:
        raise HalotuneError(f"{file}: is no JSON ({e}). A file with an object on each line is called .jsonl.") from e
    if not isinstance(entries, list):
        raise HalotuneError(f"{file}: expected a list of objects; found a {type(entries).__name__}. Give the list alone.")
    escaped = "\\ud" in text.lower()
    for number, values in enumerate(entries, 1):
        yield Row(file, number, _checked(values, escaped))


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet  # datasets needs it

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(file, number, values)
    except pyarrow.ArrowException as e:
        raise HalotuneError(f"{file}: cannot be read as parquet: {e}. Write it again.") from e


READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def usable(rows: Iterable[Row], convert: Callable[[dict[str, Any]], T], skip: bool | None) -> tuple[list[T], list[str]]:
    """What `convert` makes of every row, and what was wrong with those that it could not use.

    Args:
        convert: raises ValueError, whose text says what is wrong with the row.
        skip: go on after a bad row; None where no row may be left out, so that an error does not propose it.

    Raises:
        HalotuneError: a row cannot be used, and `skip` is False; or no row can.
    """
    good: list[T] = []
    bad: list[str] = []
    for row in rows:
        try:
            if None in row.values:  # the readers' key for what has no column
                extra = row.values[None]
                raise ValueError(extra if isinstance(extra, str) else f"has {len(extra)} fields more than the header")
            good.append(convert(row.values))
        except ValueError as e:
            if not skip:
                also = "" if skip is None else ", or leave such rows out with --skip-bad-rows"
                raise HalotuneError(f"{row.place}: {e}. Correct the row{also}.") from e
            bad.append(f"{row.place}: {e}")
    if not good:
        raise HalotuneError(f"no row can be used{': ' + bad[0] if bad else ', since there is none'}. Give a file with rows.")
    return good, bad


def text_of(values: dict[str, Any], column: str, empty: bool = False) -> str:
    """A column's text, which may be `empty`.

    Raises:
        ValueError: it is missing, or it is empty and may not be.
    """
    if column not in values:
        raise ValueError(f"has no column {column!r}; it has {', '.join(map(repr, values))}")
    value = values[column]
    if not isinstance(value, str) or not (value.strip() or empty):
        raise ValueError(f"expected text in {column!r}; found {value!r}")
    return value
