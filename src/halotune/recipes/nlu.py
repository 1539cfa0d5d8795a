"""`halotune train nlu`: understanding of language, by GLUE's tasks or a user's own table of texts and labels.

    train_nlu(NLUConfig(model="microsoft/deberta-v3-base", task="cola", preset="paper"))

A classifier's head on a pretrained encoder, adapters in all its linear layers; the dev set's figures after every
interval. Reads from top to bottom: the configuration, the training, then what is done with a finished run.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from ..cli.loading import loadable
from ..core.config import TaskType
from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..engine.model import PeftModel
from .common import processes
from .common.config import RunConfig
from .common.dry_run import dry_run as show_dry_run
from .common.model import adapt, load_base, model_source
from .common.rows import read_rows, text_of, usable
from .common.run import Run, read_run, said
from .common.trainer import RunTrainer, arguments, placement, seed
from .glue.presets import differences, settings
from .glue.tasks import TASKS, Task, submission
from .nlu_data import Columns, Data, Example, file_split, hub_split, load_glue, load_table, table_task

MAX_LENGTH = 128
HEADS = ("classifier", "score", "pooler", "classification_head", "logits_proj", "sequence_summary")


@dataclass(kw_only=True)
class NLUConfig(RunConfig):
    """Train a classifier of texts or of pairs of texts, or a regression, on a task of GLUE or on your own table.

    Args:
        task: a task of GLUE, or csv for a table of your own (csv, tsv, jsonl, json or parquet).
        data: hub (nyu-mll/glue), or a folder with GLUE's own files; for csv the file to learn from.
        evaluation: for csv, the file to evaluate on, or the share of the rows that is held out for it.
        text: for csv, the column of the text.
        pair: for csv, the column of the second text, if there is one.
        target: for csv, the column of the label.
        regression: for csv, the label is a number to be predicted.
        train_rows: learn from so many rows alone, drawn at random, the same ones for all seeds.
        max_length: longer inputs are cut, in tokens; by default 128, or the preset's.
        freeze_head: leave the new head as it is drawn, as the HRA paper's code does; by default it is trained.
        preset: the HRA paper's settings of the task, or those of its authors' scripts; flags win over them.
    """

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "csv"]
    data: str = "hub"
    evaluation: float | str = 0.1
    text: str = "text"
    pair: str | None = None
    target: str = "label"
    regression: bool = False
    train_rows: int | None = None
    max_length: int | None = None
    freeze_head: bool | None = None
    preset: Literal["paper", "paper-code"] | None = None

    RECIPE: ClassVar[str] = "nlu"

    @property
    def name(self) -> str:
        task = Path(self.data).stem if self.task == "csv" else self.task
        return f"nlu-{task}-{self.method}"

    @property
    def columns(self) -> Columns:
        return Columns(self.text, self.pair, self.target)

    def fill(self) -> None:
        if self.preset:
            weight = getattr(self.adapter, "orthogonality_weight", None)
            self.require("preset", weight is not None, f"{self.method} has none", "Leave it out, or use the paper's method.")
            self.require("preset", self.task != "csv", "a table of your own has none", "Leave it out.")
            self.fill_in(**vars(settings(self.preset, self.task, bool(weight))), freeze_head=self.preset == "paper-code")
        self.fill_in(max_length=MAX_LENGTH, freeze_head=False)

    def check(self) -> None:
        self.require("task", self.task in (*TASKS, "csv"), f"expected csv or one of {', '.join(TASKS)}", "Choose one.")
        self.require("data", self.task != "csv" or self.data != "hub", "csv needs a file", "Give --data FILE.")


def load_data(config: NLUConfig) -> Data:
    if config.task == "csv":
        data = load_table(config.columns, config.data, config.evaluation, config.regression, config.skip_bad_rows)
    else:
        data = load_glue(TASKS[config.task], config.data, config.skip_bad_rows)
    return data.sampled(config.train_rows)


def load_tokenizer(config: NLUConfig) -> Any:
    with loadable("the tokenizer of", config.model):
        tokenizer = AutoTokenizer.from_pretrained(model_source(config.model), revision=config.revision or "main")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenized(examples: Sequence[Example], tokenizer: Any, max_length: int | None) -> Any:
    """Token ids, and the labels where there are any: a dataset as torch has them, one dictionary an example."""
    texts = [[e["a"] for e in examples]] + ([[e["b"] for e in examples]] if "b" in examples[0] else [])
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    columns |= {"labels": [e["label"] for e in examples]} if "label" in examples[0] else {}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def load_classifier(config: NLUConfig, labels: Sequence[str] | None, tokenizer: Any) -> Any:
    """The base with a new head: one output for each class, or one for a regression."""
    names = dict(enumerate(labels or ["value"]))
    kind = "regression" if labels is None else "single_label_classification"
    model = load_base(AutoModelForSequenceClassification, config, HEADS, num_labels=len(names), problem_type=kind)
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def first_output(outputs: Any) -> Any:
    """The logits: some models give more."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def answers(logits: Any, regression: bool) -> np.ndarray[Any, Any]:
    """Class numbers or values, from a model's outputs (N, classes) or (N, 1)."""
    logits = np.asarray(first_output(logits), dtype=np.float64)
    return logits[:, 0] if regression else logits.argmax(-1)


def metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """The task's metrics, and the loss: the Trainer's own counts the rows that fill up the last batch of several processes."""

    def found(p: EvalPrediction) -> dict[str, float]:
        logits, labels = (torch.as_tensor(x) for x in (first_output(p.predictions), p.label_ids))
        if task.regression:
            loss = nn.functional.mse_loss(logits[:, 0].double(), labels.double())
        else:
            loss = nn.functional.cross_entropy(logits.double(), labels)
        return {"loss": loss.item(), **task.metric(answers(p.predictions, task.regression), np.asarray(p.label_ids))}

    return found


def train_nlu(config: NLUConfig, *, dry_run: bool = False, command: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and write the run's folder; what run.json holds.

    A run that was interrupted goes on at its last checkpoint; a finished one is left as it is.

    Args:
        dry_run: show what would be done and what two steps cost, and write nothing.
        command: what run.json says the user typed.
    """
    run = Run(config, command)
    if run.finished and not dry_run:
        said(f"{run.folder}: finished already; nothing was done. Give another --output for a new run.")
        return run.record
    seed(config)  # of the head and the adapter
    data = load_data(config)
    task = data.task
    tokenizer = load_tokenizer(config)
    model = adapt(load_classifier(config, task.labels, tokenizer), config, TaskType.SEQ_CLS)
    if config.freeze_head:
        freeze_heads(model)
    evaluations = {p.rstrip("_"): tokenized(e, tokenizer, config.max_length) for p, e in data.evaluations.items()}
    trainer = RunTrainer(
        model=model,
        args=arguments(config, run, adam_epsilon=1e-6 if config.preset else 1e-8),
        train_dataset=tokenized(data.train, tokenizer, config.max_length),
        eval_dataset=evaluations if len(evaluations) > 1 else evaluations[""],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics(task),
        run=run,
        best=task.score,
    )
    # Classifiers take `num_items_in_batch` and leave it unused: the Trainer, which believes that they have divided by it,
    # would add up the losses of accumulated batches and of processes instead of averaging them.
    trainer.model_accepts_loss_kwargs = False
    if dry_run:
        show_dry_run(run, trainer, lambda batch: as_text(batch, tokenizer, task))
        return run.record
    with run.open():
        run.same_data(data.train, *data.evaluations.values())
        run.update(
            task=task.name,
            labels=None if task.labels is None else list(task.labels),
            rows={"train": len(data.train), "evaluation": {k or "validation": len(v) for k, v in evaluations.items()}},
            skipped={"count": len(data.skipped), "rows": data.skipped[:100]},
            substitutes=data.notes + (differences(config.preset, config.task, config.model) if config.preset else []),
        )
        if data.skipped:
            said(f"{len(data.skipped)} rows were left out, such as {data.skipped[0]}; run.json lists them")
        trainer.train_run()
        if not any(line["step"] == trainer.state.global_step for line in run.metrics() if "evaluation" in line):
            trainer.evaluate()
        for name, examples in evaluations.items():
            predicted = answers(trainer.predict(examples).predictions, task.regression)
            write_answers(
                run, f"predictions/{name or 'validation'}.jsonl", data.evaluations[name and f"{name}_"], predicted, task
            )
        trainer.finish(results(run, task.score))
    return run.record


def freeze_heads(model: PeftModel) -> None:
    """The head is stored with the adapter, as it was drawn, but not trained."""
    for name, p in model.named_parameters():
        if ".modules_to_save." in name:
            p.requires_grad_(False)


def results(run: Run, score: str) -> dict[str, Any]:
    """The figures of the last evaluation; of each figure its best, over all evaluations; the step of the best score."""
    steps: dict[int, dict[str, float]] = {}
    for line in run.metrics():
        if "evaluation" in line:
            steps.setdefault(line["step"], {}).update(line["evaluation"])
    last = steps[max(steps)]
    known = {k: [found[k] for found in steps.values() if found[k] is not None] for k in last}  # NaN is None in a file
    best = {k: (min if k.endswith("loss") else max)(values, default=None) for k, values in known.items()}
    return {"last": last, "best": best, "best_step": max(steps, key=lambda step: steps[step][score])}


def as_text(batch: dict[str, Any], tokenizer: Any, task: Task) -> str:
    """A batch as text; what counts in the loss is the label, after the arrow."""
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=False)
    labels = batch["labels"].tolist()
    shown = [f"{y:g}" if task.labels is None else task.labels[int(y)] for y in labels]
    return "\n".join(f"  {text.replace(tokenizer.pad_token, '').strip()}  → {y}" for text, y in zip(texts, shown, strict=True))


def write_answers(run: Run, name: str, examples: Sequence[Example], predicted: np.ndarray[Any, Any], task: Task) -> None:
    def named(value: Any) -> Any:
        return float(value) if task.labels is None else task.labels[int(value)]

    lines = [
        json.dumps({"index": i, "label": named(e["label"]), "prediction": named(p)}, ensure_ascii=False) + "\n"
        for i, (e, p) in enumerate(zip(examples, predicted, strict=True))
    ]
    if run.writer:
        write_atomically(run.folder / name, lambda file: file.write_text("".join(lines), encoding="utf-8"))


# -- what is done with a finished run


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
                else file_split(task, Path(own.data), split, False, labelled=False)[0]
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
    output = Path(config.output) if config.output else trained.folder / "predictions" / f"{Path(config.data).stem}.csv"

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0] | added[0]), extrasaction="ignore")
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
        self.config = NLUConfig(**record["config"] | {"device": device})
        self.task = TASKS[record["task"]] if record["task"] in TASKS else table_task(self.config.columns, record["labels"])
        self.tokenizer = load_tokenizer(self.config)
        logging.set_verbosity_error()  # of a head that the base lacks: the adapter has it
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
        self.trainer = Trainer(model, args, DataCollatorWithPadding(self.tokenizer))

    def logits(self, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
        texts = [{k: e[k] for k in "ab" if k in e} for e in examples]
        return np.asarray(self.trainer.predict(tokenized(texts, self.tokenizer, self.config.max_length)).predictions)

    def answers(self, examples: Sequence[Example]) -> np.ndarray[Any, Any]:
        return answers(self.logits(examples), self.task.regression)
