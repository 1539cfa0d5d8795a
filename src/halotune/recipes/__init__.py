"""Whole jobs, from the data to a report: `train_nlu(NLUConfig(...))`, or `halotune train nlu` on the command line.

A recipe is one module with one configuration and one function. What needs transformers is imported when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any


@dataclass(frozen=True)
class Recipe:
    """Where a recipe's parts are: names in its module, none of which is imported before it is asked for.

    Attributes:
        module: beside this file.
        extra: the packages it needs, as `pip install "halotune[extra]"` has them.
        packages: those of them whose absence is looked for.
        config, train: the dataclass, and the function that takes one; "" where there is nothing to train.
        evaluate: the dataclass and the function of `halotune eval`, for recipes that have one; MODULE:NAME elsewhere.
        others: what else is had from here.
    """

    module: str
    extra: str
    packages: tuple[str, ...]
    config: str = ""
    train: str = ""
    evaluate: tuple[str, str] | None = None
    others: tuple[str, ...] = ()

    def part(self, name: str) -> Any:
        module, _, inner = name.rpartition(":")
        return getattr(import_module(f".{module or self.module}", __name__), inner)


RECIPES = {
    "nlu": Recipe(
        "nlu",
        "nlu",
        ("transformers", "accelerate", "datasets", "sklearn", "scipy", "jsonargparse"),
        "NLUConfig",
        "train_nlu",
        ("nlu_eval:NLUEvaluation", "nlu_eval:evaluate_nlu"),
        ("nlu_eval:Prediction", "nlu_eval:predict_nlu"),
    ),
    "subject": Recipe(
        "subject",
        "image",
        ("diffusers", "transformers", "accelerate", "PIL", "jsonargparse"),
        "SubjectConfig",
        "train_subject",
        ("subject_eval:SubjectEvaluation", "subject_eval:evaluate_subject"),
    ),
    "control": Recipe(
        "control",
        "control",
        ("diffusers", "transformers", "accelerate", "PIL", "jsonargparse", "cv2"),
        "ControlConfig",
        "train_control",
        ("control_eval:ControlEvaluation", "control_eval:evaluate_control"),
        ("control_model:load_control",),
    ),
    "sft": Recipe("sft", "sft", ("transformers", "accelerate", "datasets", "trl", "jsonargparse"), "SFTConfig", "train_sft"),
    "math": Recipe(
        "math",
        "math",
        ("transformers", "accelerate", "datasets", "trl", "jsonargparse", "math_verify", "pebble", "scipy"),
        "MathConfig",
        "train_math",
        ("MathEvaluation", "evaluate_math"),
    ),
    "harness": Recipe(
        "harness",
        "math",
        ("transformers", "accelerate", "jsonargparse", "lm_eval"),
        evaluate=("HarnessEvaluation", "evaluate_harness"),
    ),
}

# Data sets of `halotune data`, and their modules: PARTS, and get(folder, parts, given) -> the paths that were made.
DATASETS = {
    "glue": "glue.download",
    "vader": "vader",
    "dreambooth": "dreambooth",
    "ade20k": "image_sets.ade20k",
    "coco": "image_sets.coco",
    "celebhq": "image_sets.celebhq",
    "metamath": "problem_sets.metamath",
    "gsm8k": "problem_sets.gsm8k",
    "math": "problem_sets.math",
}

CHECKED = ("metamath", "gsm8k", "math")  # those whose rows are read there; get() takes skip_bad_rows, too


def dataset(name: str) -> Any:
    return import_module(f".{DATASETS[name]}", __name__)


_PARTS = {
    name.rpartition(":")[2]: (recipe, name)
    for recipe in RECIPES.values()
    for name in (recipe.config, recipe.train, *(recipe.evaluate or ()), *recipe.others)
    if name
}

if TYPE_CHECKING:
    from .control import ControlConfig as ControlConfig
    from .control import train_control as train_control
    from .control_eval import ControlEvaluation as ControlEvaluation
    from .control_eval import evaluate_control as evaluate_control
    from .control_model import load_control as load_control
    from .harness import HarnessEvaluation as HarnessEvaluation
    from .harness import evaluate_harness as evaluate_harness
    from .math import MathConfig as MathConfig
    from .math import MathEvaluation as MathEvaluation
    from .math import evaluate_math as evaluate_math
    from .math import train_math as train_math
    from .nlu import NLUConfig as NLUConfig
    from .nlu import train_nlu as train_nlu
    from .nlu_eval import NLUEvaluation as NLUEvaluation
    from .nlu_eval import Prediction as Prediction
    from .nlu_eval import evaluate_nlu as evaluate_nlu
    from .nlu_eval import predict_nlu as predict_nlu
    from .sft import SFTConfig as SFTConfig
    from .sft import train_sft as train_sft
    from .subject import SubjectConfig as SubjectConfig
    from .subject import train_subject as train_subject
    from .subject_eval import SubjectEvaluation as SubjectEvaluation
    from .subject_eval import evaluate_subject as evaluate_subject
else:

    def __getattr__(name):
        if name not in _PARTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        recipe, part = _PARTS[name]
        return recipe.part(part)

    def __dir__():
        return sorted({*globals(), *_PARTS})
