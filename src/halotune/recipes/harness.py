"""`halotune eval harness`: any task of lm-eval's, on a model with an adapter that stays unmerged, by lm-eval's own runner.

halotune eval harness --tasks hellaswag,gsm8k --adapter runs/math
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import HalotuneError, closest
from .common import processes
from .common.config import check_types, require
from .common.run import said
from .language.evaluated import Evaluated


@dataclass(kw_only=True)
class HarnessEvaluation:
    """Run tasks of lm-eval on a model, with or without an adapter.

    Args:
        tasks: names of lm-eval's, with commas between, or task files (.yaml).
        adapter: a run's folder, or an adapter's; none for the model alone.
        model: the base model; by default the one that the run or the adapter names.
        output: where lm-eval writes its results and samples; by default in the run's predictions/, else in evaluations/.
        num_fewshot: solved examples before each question; by default the task's own number.
        limit: so many examples of each task.
        batch_size: requests side by side.
        chat_template: put questions into the model's chat template.
        precision: of the model; auto is as it is stored, on a CPU float32.
        device: auto takes the accelerator where there is one.
        seed: of lm-eval's choices.
        allow_code: run tasks that execute what a model writes.
    """

    tasks: str
    adapter: str | None = None
    model: str | None = None
    output: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    chat_template: bool = False
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    seed: int = 0
    allow_code: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.adapter is None and self.model is None:
            raise HalotuneError("needed, and not given: --adapter, or --model alone.")
        for name in ("limit", "batch_size"):
            require(self, name, (value := getattr(self, name)) is None or value >= 1, "must be at least 1", "Use 1 or more.")


def evaluate_harness(config: HarnessEvaluation) -> dict[str, Any]:
    """Run the tasks and print lm-eval's table.

    Returns:
        lm-eval's `results`: task -> metric -> number.
    """
    from accelerate import Accelerator
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    state = processes.join(config.device)
    names = [name.strip() for name in config.tasks.split(",")]
    manager = TaskManager(include_defaults=not all(map(_is_file, names)))  # reading its thousands of tasks takes a while
    tasks: list[Any] = [_known(name, manager) for name in names]
    subject = Evaluated.find(config.model, config.adapter)
    model, tokenizer = subject.load(config.precision, config.device)
    folder = Path(config.output) if config.output else subject.default_output("harness")
    tracker = EvaluationTracker(output_path=str(folder))
    named = f"pretrained={subject.base}" + (f",peft={subject.adapter}" if subject.adapter else "")
    wrap: Any = HFLM  # whose metaclass hides its arguments
    runner = wrap(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    if state.num_processes > 1:  # of a model that is there already it asks for no others
        runner._rank, runner._world_size, runner.accelerator = state.process_index, state.num_processes, Accelerator()
    found = simple_evaluate(
        runner,
        model_args=named,  # for the names of its files
        tasks=tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.chat_template,
        evaluation_tracker=tracker,
        task_manager=manager,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
        confirm_run_unsafe_code=config.allow_code,
    )

    def kept() -> dict[str, Any]:
        assert found is not None  # which it is in the other processes
        samples: dict[str, Any] = found.pop("samples")  # type: ignore[misc]
        for lines in samples.values():
            lines.sort(key=lambda line: line["doc_id"])  # they come process by process
        tracker.save_results_aggregated(results=found, samples=samples)  # type: ignore[arg-type]
        for task, lines in samples.items():
            tracker.save_results_samples(task_name=task, samples=lines)
        said(make_table(found))
        said(f"{folder}: results and samples, as lm-eval writes them")
        results: dict[str, Any] = found["results"]  # type: ignore[typeddict-item]
        return {task: {k: v.item() if hasattr(v, "item") else v for k, v in m.items()} for task, m in results.items()}

    return processes.from_first(kept)


def _known(name: str, manager: Any) -> str:
    """A task as lm-eval takes it, if there is one."""
    if _is_file(name):
        if not Path(name).is_file():
            raise HalotuneError(f"--tasks {name}: there is no such file. Give a task file, or the name of a task.")
    elif name not in manager.all_tasks:
        near = closest(name, list(manager.all_tasks), 1)
        hint = f"Did you mean {near[0]}?" if near else "Give the name of one, or a task file (.yaml)."
        raise HalotuneError(f"--tasks: lm-eval has no task {name!r}. {hint}")
    return name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))
