"""The texts and labels of `train nlu`: from the hub, from a folder of GLUE's own files, or from a user's table."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import HalotuneError
from .common.rows import read_rows, text_of, usable
from .glue.files import converter, find_file, read_split
from .glue.tasks import DIAGNOSTIC, Task, accuracy, correlations

HUB = "nyu-mll/glue"
SPLIT_SEED = 0  # fixed, so that runs of different seeds see the same rows

Example = dict[str, Any]  # "a": the text; "b": the second, of pairs; "label": the class's number, or the value


@dataclass
class Data:
    """What a run learns from and is measured on.

    Attributes:
        task: what the labels mean.
        train: the examples to learn from.
        evaluations: the prefix of their metrics -> examples.
        notes: what was used in the place of something else.
        skipped: what was wrong with rows that were left out.
    """

    task: Task
    train: list[Example]
    evaluations: dict[str, list[Example]]
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def sampled(self, rows: int | None) -> Data:
        """With so many examples to learn from, drawn at random, always the same ones."""
        if rows is not None and rows < len(self.train):
            self.train = random.Random(SPLIT_SEED).sample(self.train, rows)
        return self


def load_glue(task: Task, data: str, skip: bool) -> Data:
    """A task of GLUE: `data` is `hub`, or a folder with GLUE's own files."""
    if data == "hub":
        return Data(task, hub_split(task, "train"), {p: hub_split(task, s) for p, s in task.evaluations.items()})
    found = Data(task, [], {})
    found.train, found.skipped = file_split(task, Path(data), "train", skip)
    for prefix, split in task.evaluations.items():
        found.evaluations[prefix], bad = file_split(task, Path(data), split, skip)
        found.skipped += bad
        file = find_file(task, Path(data), split)
        if file is not None and file == find_file(task, Path(data), next(iter(task.tests))):
            found.notes.append(f"evaluated on {file.name}, the test set, as there is no {split} file")
    return found


def file_split(
    task: Task, folder: Path, split: str, skip: bool | None, labelled: bool = True
) -> tuple[list[Example], list[str]]:
    file = find_file(task, folder, split)
    if file is None:
        raise HalotuneError(f"{folder}: holds no file of {task.folder}'s split {split}. Get GLUE's files, or use --data hub.")
    return usable(read_split(task, file), converter(task, labelled), skip)


def hub_split(task: Task, split: str) -> list[Example]:
    from datasets import load_dataset

    try:
        part = (split, "test") if split == DIAGNOSTIC else (task.name, split)
        rows: Any = load_dataset(HUB, part[0], split=part[1])
    except Exception as e:  # the hub's client has no common class of errors
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise HalotuneError(
            f"{HUB}, {task.name}, {split}: could not be had from the hub: {reason.rstrip('.')}. Check the network, or give a "
            "folder with GLUE's own files: --data DIR."
        ) from e
    texts = zip(*(rows[column] for column in task.columns), strict=True)
    return [dict(zip("ab", text, strict=False)) | {"label": y} for text, y in zip(texts, rows["label"], strict=True)]


@dataclass(frozen=True)
class Columns:
    """Where a user's table has the text, the second text of pairs, and the label."""

    text: str
    pair: str | None
    target: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.pair is None else (self.text, self.pair)


def load_table(columns: Columns, data: str, evaluation: str | float, regression: bool, skip: bool) -> Data:
    """A user's file of texts and labels; the classes are those of `data`, in the order of their names."""
    read = read_value if regression else read_class
    train, skipped = usable(read_rows(Path(data)), _converter(columns, read), skip)
    labels = sorted({row["label"] for row in train}, key=_as_number) if not regression else []
    if isinstance(evaluation, str):
        held_out, bad = usable(read_rows(Path(evaluation)), _converter(columns, read), skip)
        skipped += bad
    else:
        train, held_out = _split(train, evaluation)
    if regression and len(held_out) < 2:
        raise HalotuneError(f"evaluation: a correlation needs two rows; got {len(held_out)}. Hold out more of them.")
    if regression:
        return Data(table_task(columns, None), train, {"": held_out}, skipped=skipped)
    if len(labels) < 2 or len(labels) > max(2, len(train) // 2):
        found = f"{len(labels)} classes in {len(train)} rows"
        raise HalotuneError(f"{data}: column {columns.target!r} has {found}. For a number to be predicted use --regression.")
    numbers = {label: number for number, label in enumerate(labels)}
    for row in (*train, *held_out):
        if row["label"] not in numbers:
            raise HalotuneError(
                f"{evaluation}: class {row['label']!r} is none of {data}'s ({', '.join(labels)}). Correct the row, or add such "
                "rows to learn from."
            )
        row["label"] = numbers[row["label"]]
    return Data(table_task(columns, labels), train, {"": held_out}, skipped=skipped)


def table_task(columns: Columns, labels: list[str] | None) -> Task:
    """The task that a user's table is."""
    metric, score = (correlations, "pearson_spearman_mean") if labels is None else (accuracy, "accuracy")
    return Task("csv", "csv", columns.texts, None if labels is None else tuple(labels), metric, score, {"": ""}, {})


def _converter(columns: Columns, read: Callable[[Any], Any]) -> Callable[[Mapping[Any, Any]], Example]:
    def convert(values: Mapping[Any, Any]) -> Example:
        texts = {key: text_of(dict(values), column) for key, column in zip("ab", columns.texts, strict=False)}
        if columns.target not in values:
            raise ValueError(f"has no column {columns.target!r}; it has {', '.join(map(repr, values))}")
        try:
            return texts | {"label": read(values[columns.target])}
        except (TypeError, ValueError) as e:
            raise ValueError(f"column {columns.target!r}: {e}") from None

    return convert


def read_class(value: Any) -> str:
    if value is None or str(value).strip() == "":
        raise ValueError("expected a class; found nothing")
    return str(value).strip()


def read_value(value: Any) -> float:
    number = float(value)
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"expected a finite number; found {value!r}")
    return number


def _as_number(label: str) -> tuple[float, str]:
    """Sorts class 10 after class 9."""
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def _split(rows: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    if not 0.0 < share < 1.0 or not 0 < round(share * len(rows)) < len(rows):
        raise HalotuneError(f"evaluation: {share:g} of {len(rows)} rows leaves nothing to learn from or to evaluate. Use 0.1.")
    rows = random.Random(SPLIT_SEED).sample(rows, len(rows))
    held_out = round(share * len(rows))
    return rows[held_out:], rows[:held_out]
