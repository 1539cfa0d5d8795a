"""LoRA: the baseline."""

from ...core.config import PeftType
from ..registry import Method, register
from .adapter import Lora
from .config import LoraConfig
from .lycoris import FORM
from .measures import MEASURES

METHOD = register(
    Method(PeftType.LORA.value, "lora_", LoraConfig, (Lora,), Lora.create, {"LORA": 2e-3}, lycoris=FORM, measures=MEASURES)
)

__all__ = ["METHOD", "Lora", "LoraConfig"]
