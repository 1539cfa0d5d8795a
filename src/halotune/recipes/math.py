"""Mathematical reasoning: a language model learns to solve word problems, and is graded.

    halotune train math --model meta-llama/Llama-2-7b-hf --data meta-math/MetaMathQA --output runs/math
    halotune eval math --adapter runs/math --suite gsm8k

`train math` is `train sft` with the settings that belong to MetaMathQA: its columns, the Alpaca template, an end that is
learned. GSM8K's and MATH's own files are taken too. `eval math` has a model answer a test set and grades what it wrote.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..core.errors import HalotuneError
from ..core.files import write_atomically
from ..report.record import write_record
from .common import processes
from .common.config import check_types, require
from .common.run import locked, read_lines, said
from .grading import stored
from .grading.scores import accuracy, by, vote
from .grading.workers import Grade, Task, grade_all
from .language.problems import Problem, as_metamath, read_problems
from .language.rows import Columns, Example, understood
from .sft import SFTConfig, quiet, train_sft

if TYPE_CHECKING:
    from .language.evaluated import Evaluated

# What the authors of HRA did: "paper" as their paper says, "paper-code" as their script does.
COMMON = {
    "epochs": 2.0,
    "batch_size": 32,
    "schedule": "cosine",
    "warmup": 0.005,
    "max_length": 512,
    "max_rows": 100_000,
    "packing": False,
    "precision": "bf16",
}
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": (
        {**COMMON, "learning_rate": 3e-5},
        {"r": 32, "orthogonality_weight": 1e-4, "target_modules": ["q_proj", "v_proj"]},
    ),
    "paper-code": (
        {**COMMON, "learning_rate": 1e-5, "save_every": 100},
        {"r": 8, "orthogonality_weight": 1e-4, "orthogonality_norm": "unsquared", "target_modules": ["q_proj", "v_proj"]},
    ),
}
DIFFERENCES = (
    "the rotation acts on a layer's input; the authors' code rotates the output, and softens the vectors' norm (eps 1e-4)",
    "training starts at the pretrained function; the authors' random start does not",
    "padding takes a token that is there; the authors add one and enlarge the embeddings",
    "the base is held in bf16; the authors' is in fp32 under autocast",
    "the prompt of the evaluation ends with words that were not in training only where --preset paper is given there, too",
)


@dataclass(kw_only=True)
class MathConfig(SFTConfig):
    """Teach a causal language model to solve problems of mathematics.

    Args:
        data: MetaMathQA (meta-math/MetaMathQA, or its file) or GSM8K's and MATH's own files; several with commas between.
        preset: the settings of the HRA paper, or of its code, for all that is not given.
    """

    preset: Literal["paper", "paper-code"] | None = None
    template: str = "alpaca"
    # What presets set is None until it is filled in: what is given wins, be it the usual value.
    max_length: int | None = None  # type: ignore[assignment]
    batch_size: int | None = None  # type: ignore[assignment]
    schedule: str | None = None  # type: ignore[assignment]
    packing: bool | None = None  # type: ignore[assignment]
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # type: ignore[assignment]

    RECIPE: ClassVar[str] = "math"

    @classmethod
    def preset_fields(cls, preset: str | None) -> Mapping[str, Any]:
        return PRESETS[preset][1] if preset in PRESETS else {}

    def fill(self) -> None:
        if self.preset:
            self.require("preset", self.method == "hra", f"is for HRA, not for {self.method}", "Leave it out, or use HRA.")
            self.fill_in(**PRESETS[self.preset][0])
        self.fill_in(max_length=512, batch_size=16, schedule="cosine", packing=True, precision="fp32")
        super().fill()

    def example(self, values: dict[str, Any]) -> Example:
        return understood(as_metamath(values), Columns(self.prompt_column, self.response_column, self.text_column))


def train_math(config: MathConfig, *, dry_run: bool = False, command: str | None = None) -> dict[str, Any]:
    """Train, or go on where a run was interrupted; see `train_sft`."""
    return train_sft(config, dry_run=dry_run, command=command, substitutes=DIFFERENCES if config.preset else ())


# -- evaluation


@dataclass(kw_only=True)
class MathEvaluation:
    """Have a model solve a test set of problems, and grade its answers.

    Args:
        suite: the test set, gsm8k or math.
        adapter: a run's folder, or an adapter's; none for the model alone.
        model: the base model; by default the one that the run or the adapter names.
        data: the suite's own file (jsonl), or MATH's folder; by default the hub's.
        output: where answers.jsonl, grades.jsonl and scores.json are written; by default in the run's predictions/, else in
            evaluations/.
        answers: grade the answers stored in this file instead of writing any: answers.jsonl of an evaluation, or lm-eval's
            samples, whose verdicts are compared then.
        preset: paper asks as the HRA paper's evaluation did (words that end the prompt, stop words, room).
        template: as in training; auto is the one stored with the adapter, or the model's.
        suffix: what ends every prompt.
        stop: an answer ends before any of these texts.
        limit: the first problems only.
        batch_size: answers written side by side.
        max_new_tokens: room for an answer; by default 512 for gsm8k, 1024 for math.
        samples: answers to a problem; with more than one, what most of them say is graded, too.
        temperature: 0 takes the likeliest token each time; by default 0 for one sample, else 0.7.
        top_p: sample from the likeliest tokens of this share alone.
        seed: of the sampling.
        backend: transformers; vllm with the adapter as the LoRA that equals it; auto is vllm where it is installed.
        precision: of the model; auto is as it is stored, on a CPU float32.
        device: auto takes the accelerator where there is one.
        seconds: that grading an answer may take.
        workers: processes that grade; by default one to a core.
    """

    suite: Literal["gsm8k", "math"]
    adapter: str | None = None
    model: str | None = None
    data: str | None = None
    output: str | None = None
    answers: str | None = None
    preset: Literal["paper"] | None = None
    template: str = "auto"
    suffix: str | None = None
    stop: list[str] | None = None
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    backend: Literal["auto", "transformers", "vllm"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seconds: float = 10.0
    workers: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        paper = self.preset == "paper"
        if self.suffix is None:
            self.suffix = " Let's think step by step." if paper else ""
        if self.stop is None:
            self.stop = ["Instruction:", "Instruction", "Response:", "Response"] if paper else ["### Instruction"]
        if self.max_new_tokens is None:
            self.max_new_tokens = {"gsm8k": 512, "math": 1024}[self.suite] * (2 if paper else 1)
        if self.temperature is None:
            self.temperature = 0.0 if self.samples == 1 else 0.7
        for name in ("batch_size", "max_new_tokens", "samples", "limit", "workers"):
            require(self, name, (value := getattr(self, name)) is None or value >= 1, "must be at least 1", "Use 1 or more.")
        require(
            self, "temperature", 0 <= self.temperature < math.inf, "must not be negative", "Use 0 for the likeliest tokens."
        )
        require(self, "top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1", "Use 1 for all tokens.")
        require(self, "seconds", self.seconds > 0, "must be above 0", "Use a number such as 10.")
        if self.samples > 1 and not self.temperature:
            raise HalotuneError(
                "samples: several answers at temperature 0 are all the same. Use --temperature 0.7, or one sample."
            )
        if self.answers is None and self.adapter is None and self.model is None:
            raise HalotuneError(
                "needed, and not given: --adapter (or --model alone, or --answers with what is written already)."
            )


def evaluate_math(config: MathEvaluation) -> dict[str, Any]:
    """Have the model answer (what a former call has written is kept), grade, and write the scores.

    Returns:
        what scores.json holds.
    """
    quiet()
    if config.answers is not None:
        processes.join(config.device)
        return processes.from_first(lambda: grade_stored(config))
    from .language.evaluated import Evaluated

    subject = Evaluated.find(config.model, config.adapter)
    folder = Path(config.output) if config.output else subject.default_output(config.suite)
    problems = read_problems(config.suite, config.data)
    with locked(folder) if processes.first() else nullcontext():
        file = subject.answer(config, problems, folder)
        return processes.from_first(lambda: scored(config, subject, problems[: config.limit], read_lines(file), folder))


def scored(
    config: MathEvaluation, subject: Evaluated, problems: list[Problem], lines: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """What scores.json holds, which is written, shown, and told to the run."""
    rows = graded(config, problems, lines, folder)
    scores = {"suite": config.suite, "model": subject.base, "adapter": subject.adapter, **summary(config, rows)}
    write_record(folder / "scores.json", scores)
    subject.record(config.suite, scores)
    show(scores)
    said(f"{folder}: answers.jsonl, grades.jsonl, scores.json")
    return scores


def graded(
    config: MathEvaluation, problems: list[Problem], lines: list[dict[str, Any]], folder: Path | None
) -> list[dict[str, Any]]:
    """The answers with their grades, a row for each; kept as grades.jsonl."""
    known = {p.id: p for p in problems}
    lines = sorted((line for line in lines if line["id"] in known), key=lambda line: (line["id"], line.get("sample", 0)))
    work = [Task(config.suite, line["answer"], known[line["id"]].gold) for line in lines]
    rows = []
    for line, grade in zip(lines, grade_all(work, workers=config.workers, seconds=config.seconds), strict=True):
        problem = known[line["id"]]
        rows.append({**line, "subject": problem.subject, "level": problem.level, **asdict(grade)})
    if folder is not None:
        write_lines(folder / "grades.jsonl", rows)
    return rows


def summary(config: MathEvaluation, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores: of the only answer to each problem, or of the majority of several."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["id"]].append(row)
    chosen = [g[vote([Grade(r["right"], r["final"], r["failed"]) for r in g])] for g in groups.values()]
    out: dict[str, Any] = {"problems": len(groups), "samples": config.samples, "temperature": config.temperature}
    for rule in ("strict", "paper"):
        out[rule] = accuracy([r["right"][rule] for r in chosen])
        if config.samples > 1:
            out[rule]["mean_of_samples"] = sum(r["right"][rule] for r in rows) / max(len(rows), 1)
            out[rule]["any_of_samples"] = sum(any(r["right"][rule] for r in g) for g in groups.values()) / max(len(groups), 1)
        for name in ("subject", "level"):
            out[rule][f"by_{name}"] = by(chosen, lambda r, name=name: r[name], rule)
    out["not_ended"] = sum(not r.get("ended", True) for r in rows)
    out["not_graded"] = [{"id": r["id"], "why": r["failed"]} for r in rows if r["failed"]]
    return out


def grade_stored(config: MathEvaluation) -> dict[str, Any]:
    """Grade answers of a file: our own, against the problems, or lm-eval's samples, against its verdicts."""
    file = Path(str(config.answers))
    if not file.is_file():
        raise HalotuneError(
            f"--answers {file}: there is no such file. Give an answers.jsonl, or a samples_….jsonl of lm-eval's."
        )
    folder = Path(config.output) if config.output else None
    lines = read_lines(file)
    if lines and "resps" in lines[0]:
        samples = stored.read_samples(config.suite, file)
        grades = list(grade_all(stored.tasks(config.suite, samples), workers=config.workers, seconds=config.seconds))
        rows = [
            {"id": s.id, "answer": s.answer, "subject": s.subject, "level": s.level, **asdict(g)}
            for s, g in zip(samples, grades, strict=True)
        ]
        scores = {"suite": config.suite, **summary(config, rows), "lm_eval": stored.agreement(config.suite, samples, grades)}
    else:
        if not all(isinstance(line.get("answer"), str) and "id" in line for line in lines):
            raise HalotuneError(
                f"--answers {file}: expected lines with id and answer. Give an answers.jsonl, or lm-eval's samples."
            )
        rows = graded(config, read_problems(config.suite, config.data, config.limit), lines, folder)
        scores = {"suite": config.suite, **summary(config, rows)}
    if folder is not None:
        write_record(folder / "scores.json", scores)
    show(scores)
    return scores


def show(scores: dict[str, Any]) -> None:
    """The scores as lines of text, for who watches."""
    for rule in ("strict", "paper"):
        found = scores[rule]
        if not found["of"]:
            raise HalotuneError("there is nothing to grade: no answer belongs to a problem. Give the answers' own --data.")
        interval = f"{found['low']:.1%} to {found['high']:.1%}"
        said(f"{rule}: {found['accuracy']:.2%} of {found['of']} right (95 % interval {interval})")
    for name in ("subject", "level"):
        for group, found in scores["strict"][f"by_{name}"].items():
            said(f"  {name} {group}: {found['accuracy']:.1%} of {found['of']}")
    if scores["samples"] > 1:
        said(f"  majority of {scores['samples']}; mean {scores['strict']['mean_of_samples']:.2%}")
    if scores["not_ended"]:
        said(f"  {scores['not_ended']} answers were cut at their room (--max-new-tokens)")
    if scores["not_graded"]:
        said(f"  {len(scores['not_graded'])} answers could not be graded, and count as wrong; scores.json lists them")
    if "lm_eval" in scores:
        found = scores["lm_eval"]
        said(f"agrees with lm-eval on {found['agree']:.2%} of {found['of']}")
        for line in found["differ"][:20]:
            said(f"  {line['id']}: {line['reason']}")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    import json

    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
