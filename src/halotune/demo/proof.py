"""What was saved is what was trained: reload it, merge it, compare the predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .. import PeftModel
from .data import RatedWords
from .model import Pretrained
from .train import predict

RELOAD_TOLERANCE = 1e-5
MERGE_TOLERANCE = 1e-4  # merging rounds the sum of weight and adapter to fp32 once more


def prove(pretrained: Pretrained, folder: Path, trained: Tensor, words: RatedWords, seed: int) -> dict[str, Any]:
    """Load the adapter into a fresh base, whose random head is another one, then merge it into the weights.

    The largest differences from the trained model's predictions, as shares of the largest prediction, and whether they are
    small enough.
    """
    model = PeftModel.from_pretrained(pretrained.rater(seed + 1), folder)
    reloaded = difference(predict(model, words), trained)
    merged = difference(predict(model.merge_and_unload(), words), trained)
    passed = {"reloads": reloaded <= RELOAD_TOLERANCE, "merges": merged <= MERGE_TOLERANCE}  # False for NaN
    return {"reload_difference": reloaded, "merge_difference": merged, **passed}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())
