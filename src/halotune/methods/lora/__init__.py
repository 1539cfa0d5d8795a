"""LoRA: the baseline."""

from ..registry import Kind, Method, register
from .adapter import Lora
from .config import LoraConfig
from .lycoris import FORM
from .measures import MEASURES

METHOD = register(
    Method(
        "LORA",
        "lora_",
        LoraConfig,
        (Lora,),
        Lora.create,
        {"LORA": Kind(2e-3, lambda r: {"r": r, "lora_alpha": r})},
        low_rank=lambda r: LoraConfig(r=r, lora_alpha=r),
        lycoris=FORM,
        measures=MEASURES,
    )
)

__all__ = ["METHOD", "Lora", "LoraConfig"]
