"""OFT: orthogonal fine-tuning."""

from ..registry import Kind, Method, register
from .adapter import OFT
from .config import OFTConfig
from .from_peft import FROM_PEFT

KINDS = {"OFT": Kind(2e-3, lambda b: {"oft_block_size": b})}
METHOD = register(Method("OFT", "oft_", OFTConfig, (OFT,), OFT.create, KINDS, from_peft=FROM_PEFT))

__all__ = ["METHOD", "OFT", "OFTConfig"]
