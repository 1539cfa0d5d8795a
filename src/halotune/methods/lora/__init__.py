"""LoRA: the baseline."""

from ..measures import Measures
from ..registry import Kind, Method, register
from .adapter import Lora, shape_of
from .config import LoraConfig
from .experts import FORM as EXPERTS
from .lycoris import FORM

KINDS = {"LORA": Kind(2e-3, lambda r: {"r": r, "lora_alpha": r}, "LoRA")}
METHOD = register(
    Method(
        "LORA",
        "lora_",
        LoraConfig,
        (Lora,),
        Lora.create,
        KINDS,
        low_rank=lambda r: LoraConfig(r=r, lora_alpha=r),
        lycoris=FORM,
        experts=EXPERTS,
        measures=Measures(shape_of),
    )
)

__all__ = ["METHOD", "Lora", "LoraConfig"]
