"""Stored answers with lm-eval's verdicts, written by lm-eval's own runner, tasks and filters."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASKS = {"gsm8k": "gsm8k/gsm8k.yaml", "math": "minerva_math/minerva_math_algebra.yaml"}


def write_samples(suite: str, rows: Sequence[dict[str, Any]], answers: Sequence[str], folder: Path) -> Path:
    """lm-eval's samples file for rows of a suite's own, of which a model has said `answers`."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    class Stored(LM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [answers[r.doc_id] for r in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    original = Path(lm_eval.__file__).parent / "tasks" / TASKS[suite]
    task = folder / f"{suite}_local.yaml"
    task.write_text(
        f"include: {original}\ntask: {suite}_local\ndataset_path: json\ndataset_name: null\ntest_split: test\n"
        f"training_split: null\nfewshot_split: null\nnum_fewshot: 0\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
    )
    tracker = EvaluationTracker(output_path=str(folder))
    with antlr_of_any_version():
        found: Any = simple_evaluate(
            Stored(),
            tasks=[str(task)],
            task_manager=TaskManager(include_defaults=False),
            evaluation_tracker=tracker,
            bootstrap_iters=0,
        )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    tracker.save_results_samples(task_name=f"{suite}_local", samples=samples[f"{suite}_local"])
    return next(folder.rglob(f"samples_{suite}_local_*.jsonl"))


@contextmanager
def antlr_of_any_version() -> Iterator[None]:
    """lm-eval asks for antlr 4.11, which sympy's parser needs; math-verify's does not."""
    usual = importlib.metadata.version
    importlib.metadata.version = lambda name: "4.11.0" if name == "antlr4-python3-runtime" else usual(name)
    try:
        yield
    finally:
        importlib.metadata.version = usual
