"""LoHa: low-rank Hadamard products."""

from ..measures import Measures
from ..registry import Kind, Method, register
from .adapter import DecomposedLoHa, LoHa, create_loha, shape_of
from .config import LoHaConfig
from .from_peft import FROM_PEFT
from .lycoris import FORM

KINDS = {"LOHA": Kind(1e-2, lambda r: {"r": r, "alpha": r}, "LoHa")}
TYPES = LoHa, DecomposedLoHa
METHOD = register(
    Method(
        "LOHA", "hada_", LoHaConfig, TYPES, create_loha, KINDS, lycoris=FORM, from_peft=FROM_PEFT, measures=Measures(shape_of)
    )
)

__all__ = ["METHOD", "DecomposedLoHa", "LoHa", "LoHaConfig"]
