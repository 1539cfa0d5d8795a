"""The public names in front. `halotune` itself offers them, and imports this module when it is first asked for one."""

from . import quant as _quant  # noqa: F401  (registers quantized layers)
from .convert.files import convert_adapter as convert_adapter
from .convert.loading import load_lycoris as load_lycoris
from .convert.loading import save_lycoris as save_lycoris
from .core import config as _config
from .core.config import TaskType as TaskType
from .core.errors import AdapterFileError as AdapterFileError
from .core.errors import HalotuneError as HalotuneError
from .engine.auto import AutoPeftModel as AutoPeftModel
from .engine.files.hotswap import hotswap_adapter as hotswap_adapter
from .engine.gathering import shard_adapters as shard_adapters
from .engine.model import PeftModel as PeftModel
from .engine.model import get_peft_model as get_peft_model
from .engine.training import parameter_groups as parameter_groups
from .engine.weights.merge import MergeReport as MergeReport
from .integrations import peft_types as _peft  # noqa: F401  (lets other libraries know our types)
from .integrations.peft_bridge import slow_down as slow_down
from .integrations.peft_bridge import speed_up as speed_up
from .methods.registry import kinds as _kinds

PeftConfig = _config.AdapterConfig

# By kind of adapter.
DEFAULT_LEARNING_RATES: dict[str, float] = {name: kind.learning_rate for name, (_, kind) in _kinds().items()}
