"""LoHa: low-rank Hadamard products."""

from ...core.config import PeftType
from ...core.registry import Method, register
from .adapter import LoHa
from .config import LoHaConfig
from .from_peft import FROM_PEFT
from .measures import MEASURES

METHOD = register(
    Method(
        PeftType.LOHA.value, "hada_", LoHaConfig, (LoHa,), LoHa.create, {"LOHA": 1e-2}, from_peft=FROM_PEFT, measures=MEASURES
    )
)

__all__ = ["METHOD", "LoHa", "LoHaConfig"]
