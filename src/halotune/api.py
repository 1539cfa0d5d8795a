"""All public names of halotune. `halotune` itself offers them, and imports this module when it is first asked for one."""

from . import quant as _quant  # noqa: F401  (registers quantized layers)
from .convert.files import convert_adapter
from .convert.loading import load_lycoris, save_lycoris
from .core.config import AdapterConfig, PeftType, TaskType
from .core.config import AdapterConfig as PeftConfig
from .core.errors import AdapterFileError, HalotuneError
from .engine.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .engine.files.hotswap import hotswap_adapter
from .engine.files.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from .engine.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from .engine.training import parameter_groups, prepare_model_for_kbit_training
from .engine.tuner import AdapterModel, tuner_class
from .engine.weights.merge import MergeReport
from .integrations import peft_types as _peft  # noqa: F401  (lets other libraries know our types)
from .integrations.peft_bridge import slow_down, speed_up
from .methods.bone import BoneConfig, MissConfig
from .methods.hra import HRAConfig
from .methods.loha import LoHaConfig
from .methods.lora import LoraConfig
from .methods.oft import OFTConfig
from .methods.registry import methods as _registered

HRAModel = tuner_class("HRA")
LoHaModel = tuner_class("LOHA")
BoneModel = tuner_class("BONE")
MissModel = tuner_class("MISS")
LoraModel = tuner_class("LORA")
OFTModel = tuner_class("OFT")

# Measured on the demo's task; û of HRA is scale-free, so its rate is an angle and needs no tuning with the width.
DEFAULT_LEARNING_RATES: dict[str, float] = {k: v for m in _registered() for k, v in m.learning_rates.items()}

__all__ = [
    "DEFAULT_LEARNING_RATES",
    "AdapterConfig",
    "AdapterFileError",
    "AdapterModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BoneConfig",
    "BoneModel",
    "HRAConfig",
    "HRAModel",
    "HalotuneError",
    "LoHaConfig",
    "LoHaModel",
    "LoraConfig",
    "LoraModel",
    "MergeReport",
    "MissConfig",
    "MissModel",
    "OFTConfig",
    "OFTModel",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "convert_adapter",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "load_lycoris",
    "parameter_groups",
    "prepare_model_for_kbit_training",
    "save_lycoris",
    "set_peft_model_state_dict",
    "slow_down",
    "speed_up",
]
