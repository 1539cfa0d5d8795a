"""The settings of the HRA paper (arXiv 2405.17484, DeBERTaV3-base, r = 8, batch 32) and of its authors' scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """Of one task: learning rate, epochs, warmup steps, longest input in tokens, steps between evaluations."""

    learning_rate: float
    epochs: float
    warmup: int
    max_length: int
    evaluate_every: int


# warmup, longest input, steps between evaluations: the scripts', as the paper gives none; then learning rate and epochs of
# the scripts, of the paper's table for λ = 0, and of its table for λ = 1e-6.
_ROWS: dict[str, tuple[tuple[int, int, int], tuple[float, int], tuple[float, int], tuple[float, int]]] = {
    "mnli": ((1000, 256, 1000), (9e-4, 8), (1e-2, 8), (2e-3, 5)),
    "sst2": ((500, 128, 100), (1e-3, 16), (3e-3, 10), (2e-3, 8)),
    "cola": ((100, 64, 100), (8e-4, 28), (9e-3, 34), (2e-3, 12)),
    "qqp": ((1000, 320, 500), (9e-4, 10), (8e-3, 12), (2e-3, 11)),
    "qnli": ((500, 512, 100), (1e-3, 12), (1e-2, 12), (2e-3, 6)),
    "rte": ((50, 320, 100), (1e-3, 20), (5e-3, 11), (1e-3, 44)),
    "mrpc": ((50, 320, 100), (2e-3, 55), (6e-3, 60), (1e-3, 35)),
    "stsb": ((50, 128, 100), (3e-3, 43), (5e-3, 39), (9e-4, 30)),
}


def settings(preset: Literal["paper", "paper-code"], task: str, regularised: bool) -> Settings:
    """Of a task; WNLI, which the paper leaves out, gets RTE's."""
    steps, code, plain, weighted = _ROWS.get(task, _ROWS["rte"])
    rate, epochs = code if preset == "paper-code" else weighted if regularised else plain
    return Settings(rate, epochs, *steps)


def differences(preset: Literal["paper", "paper-code"], task: str, model: str) -> list[str]:
    """What still differs from the paper, or from its code, under a preset: a text each."""
    found = [
        "Adam corrects its bias, the paper's code does not",
        "after warmup the rate falls linearly from its peak; the code's is peak × (1 − share of all steps), and drops there",
        "one evaluation at the end of each interval; the code has another one at the end of each epoch",
    ]
    if preset == "paper":
        found.append("the head is trained; the paper does not say, and its code leaves it at random")
        found.append("warmup, longest input and intervals are those of the code, as the paper gives none")
    else:
        found.append("half-precision training keeps fp32 weights and casts as it computes; the code halves the whole model")
        found.append("the seed is the run's own; the code's is 1234")
    if task == "wnli":
        found.append("the paper has no WNLI: these are RTE's settings")
    if "deberta-v3-base" not in model.lower():
        found.append(f"the model is {model}, not DeBERTaV3-base")
    return found
