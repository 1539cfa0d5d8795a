"""LoHa: low-rank Hadamard products."""

from ...core.config import PeftType
from ...core.registry import Method, register
from .adapter import DecomposedLoHa, LoHa, create_loha
from .config import LoHaConfig
from .lycoris import FORM

METHOD = register(
    Method(PeftType.LOHA.value, "hada_", LoHaConfig, (LoHa, DecomposedLoHa), create_loha, {"LOHA": 1e-2}, lycoris=FORM)
)

__all__ = ["METHOD", "DecomposedLoHa", "LoHa", "LoHaConfig"]
