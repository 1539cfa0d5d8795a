"""PEFT's types for our models and layers.

transformers' Trainer, accelerate, TRL and diffusers treat a model as one with adapters where it is an instance of
`peft.PeftModel`, and a layer where it is one of `peft.tuners.tuners_utils.BaseTunerLayer`. So where PEFT is installed and one
of these libraries is loaded, a wrapped model's class derives from the first, and `AdaptedLayer` is registered with the second.
PEFT's functions for state dicts then know our models, too.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ..core.layer import AdaptedLayer
from ..engine.tuner import external_types
from .peft_state_dict import answer_for_ours

_READERS = ("peft", "transformers", "accelerate", "diffusers")  # the others load one of these


def peft_types() -> tuple[type, ...]:
    """`(peft.PeftModel,)`; empty where PEFT is not installed, or nothing is loaded that would ask."""
    if not any(sys.modules.get(name) for name in _READERS) or find_spec("peft") is None:
        return ()
    try:  # beside transformers this costs a fifth of a second, once
        from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    except Exception:  # an installation that is broken; who needs it says so
        return ()
    BaseTunerLayer.register(AdaptedLayer)
    answer_for_ours(PEFT_TYPE_TO_TUNER_MAPPING, BaseTuner)
    return (PeftModel,)


external_types.append(peft_types)
