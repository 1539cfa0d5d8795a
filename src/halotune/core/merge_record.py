"""What a merge did to the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeRecord:
    """What one merge did to one weight, or to several.

    Attributes:
        weight_norm: `‖W‖`.
        delta_norm: `‖W' − W‖`, before rounding.
        lost_norm: `‖round(W') − W'‖`.
        weights: how many there are.
        changed_weights: how many changed in their stored value.
    """

    weight_norm: float
    delta_norm: float
    lost_norm: float
    weights: int
    changed_weights: int

    @property
    def delta(self) -> float:
        """The relative size of the delta."""
        return self.delta_norm / self.weight_norm if self.weight_norm else self.delta_norm

    @property
    def lost(self) -> float:
        """The share of the delta lost to the dtype of the base."""
        return self.lost_norm / self.delta_norm if self.delta_norm else 0.0

    @property
    def error(self) -> float:
        """What was lost, relative to the weight."""
        return self.lost_norm / self.weight_norm if self.weight_norm else self.lost_norm

    @property
    def changed(self) -> float:
        """The share of the weights whose stored value changed."""
        return self.changed_weights / self.weights if self.weights else 0.0

    def rounding(self, dtype: torch.dtype) -> float:
        """The most that rounding W' to a dtype can lose, as a norm; twice, for safety."""
        limits = torch.finfo(dtype)
        return limits.eps * (self.weight_norm + self.delta_norm + math.sqrt(self.weights) * limits.smallest_normal)

    def to_dict(self) -> dict[str, float]:
        return {"delta": self.delta, "lost": self.lost, "error": self.error, "changed": self.changed}

    @classmethod
    def measure(cls, before: Tensor, after: Tensor, stored: Tensor) -> MergeRecord:
        """`before` and `stored` in the base's dtype, `after` as computed."""
        before, stored = before.to(after), stored.to(after)
        return cls(
            float(before.norm()),
            float((after - before).norm()),
            float((stored - after).norm()),
            before.numel(),
            int((stored != before).sum()),
        )

    @classmethod
    def total(cls, records: list[MergeRecord]) -> MergeRecord:
        norms = [[r.weight_norm, r.delta_norm, r.lost_norm] for r in records]
        W, D, L = (math.hypot(*column) for column in zip(*norms, strict=True)) if records else (0.0, 0.0, 0.0)
        return cls(W, D, L, sum(r.weights for r in records), sum(r.changed_weights for r in records))
