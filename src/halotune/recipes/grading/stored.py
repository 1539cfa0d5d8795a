"""Answers that are stored already: lm-eval's samples (`--log_samples`), whose own verdicts are compared with ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import HalotuneError
from .strict import last_number
from .workers import Grade, Task

# The verdict of lm-eval that stands for the strict rule, and the filter whose lines hold it (None: the only one).
VERDICTS = {"gsm8k": ("exact_match", "flexible-extract"), "math": ("math_verify", None)}


@dataclass(frozen=True)
class Sample:
    """A stored answer and what lm-eval says of it."""

    id: int
    answer: str
    gold: str
    verdict: bool
    subject: str | None = None
    level: str | None = None


def read_samples(suite: str, file: Path) -> list[Sample]:
    """The samples of a task of lm-eval's (samples_gsm8k_….jsonl, samples_minerva_math_algebra_….jsonl)."""
    metric, wanted_filter = VERDICTS[suite]
    column = {"gsm8k": "answer", "math": "solution"}[suite]
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            if wanted_filter is not None and row.get("filter", wanted_filter) != wanted_filter:
                continue
            answer, doc = row["resps"][0][0], row["doc"]
            out.append(Sample(row["doc_id"], answer, doc[column], bool(row[metric]), doc.get("type"), doc.get("level")))
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise HalotuneError(
                f"{file}, line {number}: is no sample of lm-eval's with {metric!r} ({type(e).__name__}: {e}). Write the file "
                "with lm_eval --log_samples, of a task gsm8k or minerva_math."
            ) from e
    return out


def tasks(suite: str, samples: Sequence[Sample]) -> list[Task]:
    return [Task(suite, s.answer, s.gold) for s in samples]


def agreement(suite: str, samples: Sequence[Sample], grades: Sequence[Grade]) -> dict[str, Any]:
    """How many of the strict verdicts are lm-eval's, and each other one with the reason."""
    differ = [
        {
            "id": s.id,
            "lm_eval": s.verdict,
            "strict": g.right["strict"],
            "answer": s.answer[-200:],
            "reason": _reason(suite, s, g),
        }
        for s, g in zip(samples, grades, strict=True)
        if s.verdict != g.right["strict"]
    ]
    return {"of": len(samples), "agree": 1 - len(differ) / max(len(samples), 1), "differ": differ}


def _reason(suite: str, sample: Sample, grade: Grade) -> str:
    if "strict: " in (grade.failed or ""):
        return f"not graded: {grade.failed}"
    if suite == "gsm8k":
        gold = sample.gold.rsplit("#### ", 1)[-1].strip()
        if grade.right["strict"]:
            return f"the same number, written another way: {last_number(sample.answer)!r} and {gold!r}; lm-eval compares texts"
        return f"other numbers: {last_number(sample.answer)!r} and {gold!r}"
    return (
        f"the same call of math-verify says otherwise here ({grade.final!r}): there it ran into its limit of time, or into "
        "what that process had parsed before"
    )
