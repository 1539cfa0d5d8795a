"""How well predictions agree with ratings."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """1 … n by size; equal values share the mean of their ranks."""
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2.0)[group]


def spearman(a: Tensor, b: Tensor) -> float:
    """The correlation of the ranks, in [−1, 1]; 0 where one side is constant, as it then orders nothing."""
    a, b = (r.double() - r.double().mean() for r in (ranks(a), ranks(b)))
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0


def sign_accuracy(predictions: Tensor, ratings: Tensor) -> float:
    """The share of words whose prediction is on the right side of neutral."""
    return float(((predictions > 0) == (ratings > 0)).float().mean())
