"""The other names of PEFT's API: `halotune` offers them too, but does not list them."""

from typing import Any

from .core.config import AdapterConfig, peft_types
from .engine.auto import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .engine.files.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .engine.model import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    inject_adapter_in_model,
)
from .engine.training import prepare_model_for_kbit_training
from .engine.tuner import AdapterModel, tuner_class
from .methods.registry import methods as _methods

PeftType: Any = peft_types()

MODELS: dict[str, type[AdapterModel]] = {c.__name__: c for c in (tuner_class(m.peft_type) for m in _methods())}

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
