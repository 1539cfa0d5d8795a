"""How well pictures follow their hints, in numbers: edges, landmarks, labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def edge_overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """IoU and F1 of two maps of edges, `(h, w)` of true and false: |∩| / |∪| and 2 |∩| / (|a| + |b|).

    Two empty maps are equal: 1. An empty one and another: 0.
    """
    both, either, sizes = (a & b).sum(), (a | b).sum(), a.sum() + b.sum()
    return (1.0, 1.0) if not either else (float(both / either), float(2 * both / sizes))


def landmark_error(a: np.ndarray, b: np.ndarray) -> float:
    """The mean distance of points `(n, 2)`, in pixels."""
    return float(np.linalg.norm(a - b, axis=-1).mean())


class Confusion:
    """How often each class was taken for each, over all pixels of all pictures.

    Args:
        classes: how many there are.
        void: the label of pixels that do not count.
    """

    def __init__(self, classes: int, void: int) -> None:
        self.void = void
        self.counts = np.zeros((classes, classes), dtype=np.int64)  # labels × predictions

    def add(self, labels: np.ndarray, predictions: np.ndarray) -> None:
        """Of one picture, both `(h, w)`; labels other than the void one are below `classes`."""
        counted = labels != self.void
        classes = len(self.counts)
        pairs = classes * labels[counted] + predictions[counted]
        self.counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def figures(self) -> dict[str, float]:
        """aAcc = share of pixels that are right; mAcc = mean over classes of recall; mIoU = mean of |∩| / |∪|.

        Classes that no pixel has, nor is taken for, have no IoU; those that no pixel has have no recall.
        """
        right = np.diag(self.counts).astype(np.float64)
        labelled, predicted = self.counts.sum(1), self.counts.sum(0)
        there, seen = labelled > 0, labelled + predicted > 0
        if not there.any():
            return {"aAcc": float("nan"), "mAcc": float("nan"), "mIoU": float("nan")}
        return {
            "aAcc": float(right.sum() / labelled.sum()),
            "mAcc": float((right[there] / labelled[there]).mean()),
            "mIoU": float((right[seen] / (labelled + predicted - right)[seen]).mean()),
        }


def mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    found = list(values)
    return sum(found) / len(found) if found else None
