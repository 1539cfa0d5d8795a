"""The nine tasks: their columns, labels and metrics, and what they are called on the hub, in files and in submissions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

DIAGNOSTIC = "ax"  # the sentences that GLUE's diagnosis is made of, which a model of MNLI answers
Metric = Callable[[NDArray[Any], NDArray[Any]], dict[str, float]]


def accuracy(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(true, predicted))}


def matthews(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Matthews' correlation; 0 where all predictions are one class."""
    return {"matthews_correlation": float(matthews_corrcoef(true, predicted))}


def accuracy_and_f1(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Accuracy, F1 of class 1, and their mean, which GLUE scores and the HRA paper's code logs as accuracy."""
    right, f1 = float(accuracy_score(true, predicted)), float(f1_score(true, predicted, zero_division=0.0))  # type: ignore[arg-type]
    return {"accuracy": right, "f1": f1, "accuracy_f1_mean": (right + f1) / 2}


def correlations(predicted: NDArray[Any], true: NDArray[Any]) -> dict[str, float]:
    """Pearson's and Spearman's correlation and their mean; 0 where all predictions are one number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, for which both are NaN
        found = [float(np.nan_to_num(f(predicted, true).statistic)) for f in (pearsonr, spearmanr)]  # type: ignore[union-attr]
    return {"pearson": found[0], "spearman": found[1], "pearson_spearman_mean": sum(found) / 2}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as on the hub and of --task.
        folder: what GLUE's own download calls it.
        columns: of the text, or of the two texts, on the hub.
        labels: by their number on the hub; None for a regression.
        metric: (predictions, labels) -> figures.
        score: which of them says which evaluation is the best.
        evaluations: the labelled splits on the hub by the name that goes before their metrics; "" where there is one.
        tests: the splits without labels -> the submission's file.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: Metric
    score: str
    evaluations: Mapping[str, str]
    tests: Mapping[str, str]

    @property
    def regression(self) -> bool:
        return self.labels is None


def _task(name: str, folder: str, columns: str, labels: str, metric: Metric, score: str) -> Task:
    one = {"": "validation"}
    return Task(name, folder, tuple(columns.split()), tuple(labels.split()), metric, score, one, {"test": f"{folder}.tsv"})


_MNLI = Task(
    "mnli",
    "MNLI",
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    accuracy,
    "matched_accuracy",
    {"matched_": "validation_matched", "mismatched_": "validation_mismatched"},
    {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", DIAGNOSTIC: "AX.tsv"},
)
_STSB = Task(
    "stsb",
    "STS-B",
    ("sentence1", "sentence2"),
    None,
    correlations,
    "pearson_spearman_mean",
    {"": "validation"},
    {"test": "STS-B.tsv"},
)
_PAIR = "sentence1 sentence2"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("cola", "CoLA", "sentence", "unacceptable acceptable", matthews, "matthews_correlation"),
        _task("sst2", "SST-2", "sentence", "negative positive", accuracy, "accuracy"),
        _task("mrpc", "MRPC", _PAIR, "not_equivalent equivalent", accuracy_and_f1, "accuracy_f1_mean"),
        _STSB,
        _task("qqp", "QQP", "question1 question2", "not_duplicate duplicate", accuracy_and_f1, "accuracy_f1_mean"),
        _MNLI,
        _task("qnli", "QNLI", "question sentence", "entailment not_entailment", accuracy, "accuracy"),
        _task("rte", "RTE", _PAIR, "entailment not_entailment", accuracy, "accuracy"),
        _task("wnli", "WNLI", _PAIR, "not_entailment entailment", accuracy, "accuracy"),
    )
}

# Submissions name the class of these; of all others they have its number.
NAMED_IN_SUBMISSIONS = ("mnli", "qnli", "rte")


def submission(task: Task, predicted: NDArray[Any]) -> str:
    """Predictions (class numbers, or values) as GLUE's server takes them: `index`, tab, `prediction`."""
    if task.labels is None:
        answers = [f"{value:.3f}" for value in np.clip(predicted, 0.0, 5.0)]
    elif task.name in NAMED_IN_SUBMISSIONS:
        answers = [task.labels[int(number)] for number in predicted]
    else:
        answers = [str(int(number)) for number in predicted]
    return "index\tprediction\n" + "".join(f"{i}\t{answer}\n" for i, answer in enumerate(answers))
