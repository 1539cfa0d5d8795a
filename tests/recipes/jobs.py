"""What torchrun starts in these tests: python jobs.py JOBS.json, a list of [function of halotune.recipes, its configuration's
fields, step to stop at or null]. Results go to JOBS.json's folder, as the first process has them."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from halotune import recipes
from halotune.recipes.common import processes
from halotune.recipes.common.trainer import RunTrainerMixin
from halotune.recipes.language import answers

CONFIGS = {
    "train_nlu": "NLUConfig",
    "evaluate_nlu": "NLUEvaluation",
    "train_sft": "SFTConfig",
    "train_math": "MathConfig",
    "evaluate_math": "MathEvaluation",
    "evaluate_harness": "HarnessEvaluation",
}


class Stopped(Exception):
    """As if the job had been ended there."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def run(name: str, fields: dict[str, Any], stop: int | None = None) -> Any:
    """A recipe's function; stopped at a step of training, or after so many batches of answers."""
    usual = RunTrainerMixin.train_run, answers._generate
    left = stop

    def train_run(self: Any) -> None:
        self.add_callback(StopAt(stop))
        usual[0](self)

    def generate(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return usual[1](*args)

    if stop is not None:
        RunTrainerMixin.train_run, answers._generate = train_run, generate
    try:
        if name == "predict_nlu":
            from halotune.recipes import Prediction, predict_nlu

            return str(predict_nlu(Prediction(**fields)))
        return getattr(recipes, name)(getattr(recipes, CONFIGS[name])(**fields))
    except Stopped:
        return None
    finally:
        RunTrainerMixin.train_run, answers._generate = usual


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    file = Path(sys.argv[1])
    found = [run(*job) for job in json.loads(file.read_text())]
    if processes.first():
        file.with_suffix(".found.json").write_text(json.dumps(found))
