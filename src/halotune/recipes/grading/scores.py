"""Shares of right answers, with the interval that they are sure to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .workers import Grade


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Share of right answers, and Wilson's interval of 95 %, which holds at 0 and 1 too."""
    from scipy.stats import binomtest

    if not right:
        return {"accuracy": None, "low": None, "high": None, "right": 0, "of": 0}
    k, n = sum(right), len(right)
    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {"accuracy": k / n, "low": float(interval.low), "high": float(interval.high), "right": k, "of": n}


def vote(grades: Sequence[Grade]) -> int:
    """Which of k answers to one problem stands for the majority: the first with the final answer that most of them give."""
    votes = Counter(g.final for g in grades if g.final is not None)
    if not votes:
        return 0
    most = max(votes.values())
    return next(i for i, g in enumerate(grades) if g.final is not None and votes[g.final] == most)


def by(rows: Iterable[dict[str, Any]], key: Callable[[dict[str, Any]], str | None], rule: str) -> dict[str, Any]:
    """Accuracy of each group of rows, whose `right` maps rules to verdicts; rows without a group are left out."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        group = key(row)
        if group is not None:
            groups[group].append(row["right"][rule])
    return {group: accuracy(groups[group]) for group in sorted(groups)}
