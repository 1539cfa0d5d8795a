"""LoHa: low-rank Hadamard products."""

from ..registry import Kind, Method, register
from .adapter import DecomposedLoHa, LoHa, create_loha
from .config import LoHaConfig
from .from_peft import FROM_PEFT
from .lycoris import FORM
from .measures import MEASURES

METHOD = register(
    Method(
        "LOHA",
        "hada_",
        LoHaConfig,
        (LoHa, DecomposedLoHa),
        create_loha,
        {"LOHA": Kind(1e-2, lambda r: {"r": r, "alpha": r})},
        lycoris=FORM,
        from_peft=FROM_PEFT,
        measures=MEASURES,
    )
)

__all__ = ["METHOD", "DecomposedLoHa", "LoHa", "LoHaConfig"]
