"""`halotune eval nlu` and `halotune predict`: what a finished run of `train nlu` says of texts.

evaluate_nlu(NLUEvaluation("runs/nlu-cola-hra-seed0"))
predict_nlu(Prediction("runs/ratings", data="words.csv"))
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..engine.model import PeftModel
from .common import processes
from .common.config import check_types, require
from .common.rows import read_rows, text_of, usable
from .common.run import configuration, read_run, said
from .common.trainer import on_one_device, placement
from .glue.tasks import TASKS, submission
from .nlu import NLUConfig, answers, load_classifier, load_data, load_tokenizer, tokenized
from .nlu_data import Example, file_split, hub_split, table_task


@dataclass
class NLUEvaluation:
    """Evaluate a finished run, and write its answers to GLUE's test sets in the format of GLUE's server.

    Args:
        run: the run's folder.
        which: the adapter of the last step, or that of the best evaluation.
        data: hub, or a folder with GLUE's own files; for csv, the file to evaluate on. By default what the run was given.
        output: where the submission's files go; by default the run's folder predictions/.
        batch_size: examples at once.
        device: auto takes the accelerator where there is one.
    """

    run: str
    _: KW_ONLY
    which: Literal["last", "best"] = "last"
    data: str | None = None
    output: str | None = None
    batch_size: int = 64
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "batch_size", self.batch_size >= 1, "must be at least 1", "Use a number such as 64.")


def evaluate_nlu(config: NLUEvaluation) -> dict[str, Any]:
    """The figures on the labelled splits; the submission's files are written."""
    trained = TrainedRun(Path(config.run), config.which, config.batch_size, config.device)
    task, own = trained.task, trained.config
    own.train_rows = None
    if config.data and own.task == "csv":
        own.evaluation = config.data
    elif config.data:
        own.data = config.data
    data = load_data(own)
    found: dict[str, Any] = {}
    for prefix, examples in data.evaluations.items():
        figures = task.metric(trained.answers(examples), np.asarray([e["label"] for e in examples]))
        found |= {f"{prefix}{name}": value for name, value in figures.items()}
    folder = Path(config.output) if config.output else trained.folder / "predictions"
    for split, name in task.tests.items():
        try:
            tests = (
                hub_split(task, split)
                if own.data == "hub"
                else file_split(task, Path(own.data), split, None, labelled=False)[0]
            )
        except HalotuneError as e:
            said(f"no {name} was written: {e}")
            continue
        text = submission(task, trained.answers(tests))
        if processes.first():
            write_atomically(folder / name, lambda file, text=text: file.write_text(text, encoding="utf-8"))
        said(f"{folder / name}: {len(tests):,} answers")
    return found


@dataclass
class Prediction:
    """Let a finished run answer the rows of a table.

    Args:
        run: the run's folder.
        data: the file with the texts (csv, tsv, jsonl, json or parquet), in the columns that the run was trained on.
        output: the csv file to write; by default in the run's folder predictions/, under the name of `data`.
        which: the adapter of the last step, or that of the best evaluation.
        batch_size: examples at once.
        device: auto takes the accelerator where there is one.
        skip_bad_rows: leave out rows that cannot be used, and count them.
    """

    run: str
    _: KW_ONLY
    data: str
    output: str | None = None
    which: Literal["last", "best"] = "last"
    batch_size: int = 64
    device: Literal["auto", "cpu"] = "auto"
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "batch_size", self.batch_size >= 1, "must be at least 1", "Use a number such as 64.")


def predict_nlu(config: Prediction) -> Path:
    """Write the table with a column `prediction`, and of classes one with the `probability`; its path."""
    trained = TrainedRun(Path(config.run), config.which, config.batch_size, config.device)
    columns, labels = trained.task.columns, trained.task.labels

    def convert(values: dict[str, Any]) -> Example:
        return values | {"": {key: text_of(values, column) for key, column in zip("ab", columns, strict=False)}}

    rows, bad = usable(read_rows(Path(config.data)), convert, config.skip_bad_rows)
    if bad:
        said(f"{len(bad)} rows were left out, such as {bad[0]}")
    logits = trained.logits([row.pop("") for row in rows])
    if labels is None:
        added = [{"prediction": f"{value:.6g}"} for value in logits[:, 0]]
    else:
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        shares = odds / odds.sum(-1, keepdims=True)
        added = [{"prediction": labels[p.argmax()], "probability": f"{p.max():.4f}"} for p in shares]
    if taken := [name for name in added[0] if any(name in row for row in rows)]:
        raise HalotuneError(f"{config.data}: has a column {taken[0]!r} already, which would be written over. Rename it.")
    output = Path(config.output) if config.output else trained.folder / "predictions" / f"{Path(config.data).stem}.csv"

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, [*dict.fromkeys(name for row in rows for name in row), *added[0]])  # JSON's rows differ
            writer.writeheader()
            writer.writerows(row | more for row, more in zip(rows, added, strict=True))

    processes.from_first(lambda: write_atomically(output, write))
    said(f"{output}: {len(rows):,} predictions")
    return output


class TrainedRun:
    """A finished run's model, ready to answer."""

    def __init__(self, folder: Path, which: Literal["last", "best"], batch_size: int, device: str) -> None:
        record = read_run(folder)
        adapter = folder / ("adapter" if which == "last" else "best")
        if record is None or record.get("recipe") != NLUConfig.RECIPE or not adapter.is_dir():
            raise HalotuneError(
                f"{folder}: is no finished run of `halotune train nlu`: it has no run.json, or no {adapter.name}/."
            )
        self.folder = folder
        self.config = NLUConfig(**configuration(record) | {"device": device})
        self.task = TASKS[record["task"]] if record["task"] in TASKS else table_task(self.config.columns, record["labels"])
        self.tokenizer = load_tokenizer(self.config)
        base = load_classifier(self.config, record["labels"], self.tokenizer)
        model: Any = PeftModel.from_pretrained(base, adapter)
        args = TrainingArguments(
            output_dir=str(folder / "predictions"),
            per_device_eval_batch_size=batch_size,
            bf16_full_eval=self.config.precision == "bf16",
            fp16_full_eval=self.config.precision == "fp16",
            **placement(device),
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
        )
        on_one_device(args)
        self.trainer = Trainer(model, args, DataCollatorWithPadding(self.tokenizer))

    def logits(self, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
        texts = [{k: e[k] for k in "ab" if k in e} for e in examples]
        return np.asarray(self.trainer.predict(tokenized(texts, self.tokenizer, self.config.max_length)).predictions)

    def answers(self, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
        return answers(self.logits(examples), self.task.regression)
