"""HRA: Householder reflection adaptation."""

from ...core.config import PeftType
from ..registry import Method, register
from .adapter import HRA
from .config import HRAConfig
from .from_peft import FROM_PEFT
from .measures import MEASURES

METHOD = register(
    Method(PeftType.HRA.value, "hra_", HRAConfig, (HRA,), HRA.create, {"HRA": 1e-2}, from_peft=FROM_PEFT, measures=MEASURES)
)

__all__ = ["HRA", "METHOD", "HRAConfig"]
