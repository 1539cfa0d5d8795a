"""The other names of PEFT's API: `halotune` offers them too, but does not list them."""

from typing import Any as _Any

from .core.config import AdapterConfig as AdapterConfig
from .core.config import peft_types as _peft_types
from .engine.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from .engine.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from .engine.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from .engine.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from .engine.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
from .engine.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from .engine.files.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
from .engine.files.state_dict import set_peft_model_state_dict as set_peft_model_state_dict
from .engine.model import PeftModelForCausalLM as PeftModelForCausalLM
from .engine.model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from .engine.model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from .engine.model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from .engine.model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from .engine.model import PeftModelForTokenClassification as PeftModelForTokenClassification
from .engine.model import inject_adapter_in_model as inject_adapter_in_model
from .engine.training import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from .engine.tuner import AdapterModel as AdapterModel
from .engine.tuner import tuner_class as _tuner_class
from .methods.registry import methods as _methods

PeftType: _Any = _peft_types()

globals().update({c.__name__: c for c in (_tuner_class(m.peft_type) for m in _methods())})  # HRAModel, LoHaModel …
