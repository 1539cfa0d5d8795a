"""HRA: Householder reflection adaptation."""

from ..registry import Kind, Method, register
from .adapter import HRA
from .config import HRAConfig
from .from_peft import FROM_PEFT
from .measures import MEASURES

METHOD = register(
    Method("HRA", "hra_", HRAConfig, (HRA,), HRA.create, {"HRA": Kind(1e-2)}, from_peft=FROM_PEFT, measures=MEASURES)
)

__all__ = ["HRA", "METHOD", "HRAConfig"]
