"""What was saved is what was trained: reload it, merge it, compare the predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .. import PeftModel
from .data import RatedWords
from .model import Pretrained
from .train import predict

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-4  # merging rounds the sum of weight and adapter to fp32 once more


@dataclass(frozen=True)
class Proof:
    """The largest differences from the trained model's predictions, as shares of the largest prediction."""

    reload_difference: float
    merge_difference: float

    @property
    def reloads(self) -> bool:
        return self.reload_difference <= RELOAD_TOLERANCE  # False for NaN

    @property
    def merges(self) -> bool:
        return self.merge_difference <= MERGE_TOLERANCE

    @property
    def passed(self) -> bool:
        return self.reloads and self.merges


def prove(pretrained: Pretrained, folder: Path, trained: Tensor, words: RatedWords, seed: int) -> Proof:
    """Load the adapter into a fresh base, whose random head is another one, then merge it into the weights."""
    model = PeftModel.from_pretrained(pretrained.rater(seed + 1), folder)
    reloaded = difference(predict(model, words), trained)
    merged = difference(predict(model.merge_and_unload(), words), trained)
    return Proof(reloaded, merged)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
