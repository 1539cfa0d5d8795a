"""LoRA: the baseline."""

from ...core.config import PeftType
from ...core.registry import Method, register
from .adapter import Lora
from .config import LoraConfig
from .lycoris import FORM

METHOD = register(Method(PeftType.LORA.value, "lora_", LoraConfig, (Lora,), Lora.create, {"LORA": 2e-3}, lycoris=FORM))

__all__ = ["METHOD", "Lora", "LoraConfig"]
