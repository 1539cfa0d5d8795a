"""GLUE's own files. They are lines with tabs in them, where a quotation mark is a letter like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ..common.rows import Row, text_of
from .tasks import DIAGNOSTIC, TASKS, Task


@dataclass(frozen=True)
class Layout:
    """How a task's files are laid out.

    Attributes:
        files: split -> the names it may have; the first that is there is read.
        texts: the columns of the texts.
        label: the column of the label.
        header: the columns of the files without a header, and of those whose first line is none; None: all have one.
        words: what the label column holds -> the class; None for a number.
    """

    files: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None
    words: Mapping[str, int] | None = None


_USUAL = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
_PAIR = ("sentence1", "sentence2")
_STS = ("genre", "filename", "year", "old_index", "score", "sentence1", "sentence2")
_MSR = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def _words(task: str) -> dict[str, int]:
    return {word: number for number, word in enumerate(TASKS[task].labels or ())}


LAYOUTS: dict[str, Layout] = {
    "cola": Layout(_USUAL, ("sentence",), "label", ("source", "label", "star", "sentence")),
    "sst2": Layout(_USUAL, ("sentence",), "label"),
    "mrpc": Layout(
        {
            "train": ("train.tsv", "msr_paraphrase_train.txt"),
            "validation": ("dev.tsv", "msr_paraphrase_test.txt"),
            "test": ("test.tsv", "msr_paraphrase_test.txt"),
        },
        ("#1 String", "#2 String"),
        "Quality",
        _MSR,
    ),
    "stsb": Layout(
        {
            "train": ("train.tsv", "sts-train.csv", "sts-train.tsv"),
            "validation": ("dev.tsv", "sts-dev.csv", "sts-dev.tsv"),
            "test": ("test.tsv", "sts-test.csv", "sts-test.tsv"),
        },
        _PAIR,
        "score",
        _STS,
    ),
    "qqp": Layout(_USUAL, ("question1", "question2"), "is_duplicate"),
    "mnli": Layout(
        {
            "train": ("train.tsv",),
            "validation_matched": ("dev_matched.tsv",),
            "validation_mismatched": ("dev_mismatched.tsv",),
            "test_matched": ("test_matched.tsv",),
            "test_mismatched": ("test_mismatched.tsv",),
            DIAGNOSTIC: ("diagnostic.tsv", "AX.tsv", "../diagnostic/diagnostic.tsv", "../AX.tsv"),
        },
        _PAIR,
        "gold_label",
        words=_words("mnli"),
    ),
    "qnli": Layout(_USUAL, ("question", "sentence"), "label", words=_words("qnli")),
    "rte": Layout(_USUAL, _PAIR, "label", words=_words("rte")),
    "wnli": Layout(_USUAL, _PAIR, "label"),
}

# A first line that holds one of these is a header, even of files that usually have none.
_HEADERS = {"sentence", "sentence1", "#1 String", "question", "question1"}


def folder_of(task: Task, data: Path) -> Path:
    """The folder with a task's files: the one of its name in `data`, or `data` itself."""
    wanted = [name for names in LAYOUTS[task.name].files.values() for name in names]
    for folder in (data / task.folder, data / task.name, data):
        if any((folder / name).is_file() for name in wanted):
            return folder
    raise HalotuneError(
        f"{data}: holds no file of {task.folder}, neither itself nor in {task.folder}/. Expected {', '.join(wanted[:3])}."
    )


def find_file(task: Task, data: Path, split: str) -> Path | None:
    """The file of a split; None where there is none."""
    folder = folder_of(task, data)
    return next((folder / name for name in LAYOUTS[task.name].files[split] if (folder / name).is_file()), None)


def read_split(task: Task, file: Path) -> Iterator[Row]:
    """The rows of a file of GLUE, by column."""
    layout = LAYOUTS[task.name]
    with file.open(encoding="utf-8-sig", newline="\n") as lines:  # other characters that end lines elsewhere stand inside texts
        columns: tuple[str, ...] | None = None
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\r\n").split("\t")
            if columns is None:
                if _HEADERS & set(fields):
                    columns = tuple(fields)
                    continue
                if layout.header is None:
                    raise HalotuneError(f"{file}, line 1: expected a header with {layout.texts[0]!r}; found {line[:60]!r}.")
                columns = layout.header
            missing = columns[len(fields) :]
            yield Row(
                file, number, dict(zip(columns, fields, strict=False)) if not missing else {None: _short(fields, columns)}
            )


def _short(fields: list[str], columns: tuple[str, ...]) -> str:
    return f"has {len(fields)} fields where {len(columns)} were expected ({', '.join(columns)})"


def converter(task: Task, labelled: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The columns of a file -> {"a": text, "b": second text, "label": class or value}.

    A text may be empty in pairs, of which QQP has two such rows, and in test sets, of which every row is to be answered.
    """
    layout = LAYOUTS[task.name]
    empty = len(layout.texts) == 2 or not labelled

    def convert(values: dict[str, Any]) -> dict[str, Any]:
        texts = {key: text_of(values, column, empty) for key, column in zip("ab", layout.texts, strict=False)}
        return texts | ({"label": _label(task, layout, values.get(layout.label))} if labelled else {})

    return convert


def _label(task: Task, layout: Layout, value: Any) -> int | float:
    if layout.words is not None:
        if value not in layout.words:
            raise ValueError(f"expected one of {', '.join(layout.words)} in {layout.label!r}; found {value!r}")
        return layout.words[value]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number in {layout.label!r}; found {value!r}") from None
    if task.labels is None:
        if not 0.0 <= number <= 5.0:
            raise ValueError(f"expected a score from 0 to 5 in {layout.label!r}; found {value!r}")
        return number
    if number not in range(len(task.labels)):
        raise ValueError(f"expected 0 to {len(task.labels) - 1} in {layout.label!r}; found {value!r}")
    return int(number)
