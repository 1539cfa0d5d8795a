"""The public names in front. `halotune` itself offers them, and imports this module when it is first asked for one."""

from . import quant as _quant  # noqa: F401  (registers quantized layers)
from .convert.files import convert_adapter
from .convert.loading import load_lycoris, save_lycoris
from .core.config import AdapterConfig as PeftConfig
from .core.config import TaskType
from .core.errors import AdapterFileError, HalotuneError
from .engine.auto import AutoPeftModel
from .engine.files.hotswap import hotswap_adapter
from .engine.gathering import shard_adapters
from .engine.model import PeftModel, get_peft_model
from .engine.training import parameter_groups
from .engine.weights.merge import MergeReport
from .integrations import peft_types as _peft  # noqa: F401  (lets other libraries know our types)
from .integrations.peft_bridge import slow_down, speed_up
from .methods.registry import kinds as _kinds

# By kind of adapter.
DEFAULT_LEARNING_RATES: dict[str, float] = {name: kind.learning_rate for name, (_, kind) in _kinds().items()}

__all__ = [
    "DEFAULT_LEARNING_RATES",
    "AdapterFileError",
    "AutoPeftModel",
    "HalotuneError",
    "MergeReport",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "convert_adapter",
    "get_peft_model",
    "hotswap_adapter",
    "load_lycoris",
    "parameter_groups",
    "save_lycoris",
    "shard_adapters",
    "slow_down",
    "speed_up",
]
