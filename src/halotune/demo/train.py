"""The training loop, plain PyTorch and the same for every method, and how well predictions agree with ratings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import HalotuneError
from .data import RatedWords

BATCH = 64
WARM_UP = 0.1  # share of the steps in which the learning rate rises; then it falls to 0, linearly
SCORED_AT = (1 / 8, 1 / 4, 1 / 2, 1)  # shares of the steps after which the held-out words are scored


@dataclass(frozen=True)
class Score:
    """Agreement with the held-out ratings after so many words of training."""

    words: int
    spearman: float
    sign_accuracy: float


@dataclass
class Run:
    """What a training run leaves: the loss of every step, scores on the way, final predictions, seconds of training."""

    words: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    predictions: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


@torch.inference_mode()
def predict(model: nn.Module, words: RatedWords) -> Tensor:
    model.eval()
    predictions = torch.empty(len(words))
    for rows in words.by_length(list(range(len(words))), BATCH):
        predictions[rows] = model(**words.inputs(rows))
    return predictions


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


def score(predictions: Tensor, words: RatedWords, seen: int) -> Score:
    return Score(seen, spearman(predictions, words.ratings), sign_accuracy(predictions, words.ratings))


def steps_in(epochs: float, words: RatedWords) -> int:
    return max(1, math.ceil(epochs * math.ceil(len(words) / BATCH)))


def train(
    model: nn.Module,
    words: RatedWords,
    held_out: RatedWords,
    learning_rate: float,
    epochs: float,
    seed: int,
    on_step: Callable[[float], object],
) -> Run:
    """Fit the ratings by least squares. Scoring on the way is not counted into the seconds."""
    steps = steps_in(epochs, words)
    warm = max(1, round(WARM_UP * steps))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    scored = {max(1, round(share * steps)) for share in SCORED_AT}
    batches = words.shuffled(BATCH, seed)
    run, seen = Run(), 0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        rows = next(batches)
        model.train()
        loss = nn.functional.mse_loss(model(**words.inputs(rows)), words.ratings[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.seconds += time.perf_counter() - started
        if not math.isfinite(loss.item()):
            raise HalotuneError(f"the loss is {loss.item()} at step {step}: lr {learning_rate} is too high for this model.")
        seen += len(rows)
        run.words.append(seen)
        run.losses.append(loss.item())
        on_step(loss.item())
        if step in scored:
            run.predictions = predict(model, held_out)
            run.scores.append(score(run.predictions, held_out, seen))
    return run
