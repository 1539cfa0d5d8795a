"""LoHa: low-rank Hadamard products."""

from ...core.config import PeftType
from ..registry import Method, register
from .adapter import DecomposedLoHa, LoHa, create_loha
from .config import LoHaConfig
from .from_peft import FROM_PEFT
from .lycoris import FORM
from .measures import MEASURES

METHOD = register(
    Method(
        PeftType.LOHA.value,
        "hada_",
        LoHaConfig,
        (LoHa, DecomposedLoHa),
        create_loha,
        {"LOHA": 1e-2},
        lycoris=FORM,
        from_peft=FROM_PEFT,
        measures=MEASURES,
    )
)

__all__ = ["METHOD", "DecomposedLoHa", "LoHa", "LoHaConfig"]
