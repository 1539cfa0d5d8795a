"""OFT: orthogonal fine-tuning."""

from ...core.config import PeftType
from ..registry import Method, register
from .adapter import OFT
from .config import OFTConfig
from .from_peft import FROM_PEFT

METHOD = register(Method(PeftType.OFT.value, "oft_", OFTConfig, (OFT,), OFT.create, {"OFT": 2e-3}, from_peft=FROM_PEFT))

__all__ = ["METHOD", "OFT", "OFTConfig"]
