"""Problems of mathematics with worked solutions: GSM8K's and MATH's own files, and MetaMathQA's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from ..common.rows import Row, text_of, usable
from ..grading.paper import MARKER, boxed
from .rows import find_rows

SUITES = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
HUB = {  # where the test rows are, for who names no file
    "gsm8k": ("openai/gsm8k:main:test",),
    "math": tuple(
        f"EleutherAI/hendrycks_math:{subject}:test"
        for subject in (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        )
    ),
}
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator: "48/2 = <<48/2=24>>24"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: its number in the data, from 0.
        gold: the data set's worked solution.
    """

    id: int
    question: str
    gold: str
    subject: str | None = None
    level: str | None = None


def read_problems(suite: str, source: str | None, limit: int | None = None) -> list[Problem]:
    """The problems of a file of the suite's own (jsonl; MATH's folder of json files, too), or of the hub."""
    sources = HUB[suite] if source is None else source.split(",")
    rows = (row for part in sources for row in _rows(part.strip()))
    found, _ = usable(rows, lambda values: checked_problem(suite, values), skip=None)
    return [Problem(i, *p) for i, p in enumerate(found[:limit])]


def _rows(source: str) -> Iterator[Row]:
    yield from folder_rows(Path(source)) if Path(source).is_dir() else find_rows(source)


def folder_rows(folder: Path) -> Iterator[Row]:
    """The problems of MATH's folders, each of which is a file of its own: algebra/1.json."""
    files = sorted(folder.rglob("*.json"), key=lambda f: (f.parent, int(f.stem) if f.stem.isdecimal() else 0, f.stem))
    if not files:
        raise HalotuneError(f"{folder}: holds no .json file. Give the data set's own folder, such as MATH/test, or a file.")
    for file in files:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:
            values = {None: f"is no JSON ({e})"}
        yield Row(file, 1, values if isinstance(values, dict) else {None: "is no JSON object"})


def checked_problem(suite: str, values: dict[str, Any]) -> tuple[str, str, str | None, str | None]:
    """Question, worked solution, subject and level of a row of the suite's.

    Raises:
        ValueError: it does not say what the answer is.
    """
    question, gold = (text_of(values, column) for column in SUITES[suite])
    if suite == "gsm8k" and not re.search(r"#### -?[\d,.]+\s*$", gold):
        raise ValueError(f"'answer' does not end with '#### ' and a number; it ends with {gold[-30:]!r}")
    if suite == "math" and boxed(gold) is None:
        raise ValueError("'solution' holds no \\boxed{…}")
    return question, gold, values.get("type") or values.get("subject"), _level(values.get("level"))


def _level(value: Any) -> str | None:
    """ "Level 3" and 3 -> "3"."""
    return None if value is None else str(value).removeprefix("Level ").strip()


def as_metamath(values: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K or MATH in MetaMathQA's schema: `query`, and a `response` that ends with "The answer is: 72"; other rows
    as they are.

    Raises:
        ValueError: a solution does not say what its answer is.
    """
    if {"question", "answer"} <= values.keys():
        question, gold, *_ = checked_problem("gsm8k", values)
        work, answer = CALCULATION.sub("", gold).rsplit("#### ", 1)
        answer = answer.strip()
        return {"query": question, "response": f"{work.rstrip()}\n#### {answer}\n{MARKER}{answer}", "type": "GSM8K"}
    if {"problem", "solution"} <= values.keys():
        question, gold, *_ = checked_problem("math", values)
        return {"query": question, "response": f"{gold.rstrip()}\n{MARKER}{boxed(gold)}", "type": "MATH"}
    return values
