"""`halotune train nlu`: understanding of language, by GLUE's tasks or a user's own table of texts and labels.

    train_nlu(NLUConfig(model="microsoft/deberta-v3-base", task="cola", preset="paper"))

A classifier's head on a pretrained encoder, adapters in all its linear layers; the dev set's figures after every
interval. Reads from top to bottom: the configuration, the parts, the training. What is done with a finished run is in
`nlu_eval.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
)
from transformers.utils import logging

from ..cli.loading import loadable
from ..core.config import TaskType
from ..core.files import write_atomically
from ..engine.model import PeftModel
from .common.config import RunConfig
from .common.dry_run import dry_run as show_dry_run
from .common.model import adapt, load_base, model_source
from .common.run import Run, said
from .common.trainer import RunTrainer, arguments, seed
from .glue.presets import differences, settings
from .glue.tasks import TASKS, Task
from .nlu_data import Columns, Data, Example, load_glue, load_table

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
        self.require("data", self.task != "csv" or self.data != "hub", "csv needs a file", "Give --data FILE.")
        for name in ("evaluation", "text", "pair", "target", "regression"):
            usual = self.task == "csv" or getattr(self, name) == NLUConfig.__dataclass_fields__[name].default
            self.require(name, usual, f"is of your own tables; {self.task} has its own", "Leave it out, or use --task csv.")
        for name, least in (("train_rows", 1), ("max_length", 4)):
            value = getattr(self, name)
            self.require(name, value is None or value >= least, f"must be at least {least}", "Leave it out for the default.")


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
    usual = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers reports at length that the head is new, which it is meant to be
    try:
        own = {"num_labels": len(names), "problem_type": kind, "output_loading_info": True}
        model, info = load_base(AutoModelForSequenceClassification, config, HEADS, **own)
    finally:
        logging.set_verbosity(usual)
    inside = [k for k in info["missing_keys"] if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k]
    if inside:
        said(
            f"{config.model}: lacks {len(inside)} weights such as {min(inside)}, which are drawn at random. Is it the model "
            "that you mean?"
        )
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
    if not dry_run and run.left_alone():
        return run.record
    seed(config)  # of the head and the adapter
    data = load_data(config)
    run.same_data(data.train, *data.evaluations.values())
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
