"""The configuration of LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...core.config import AdapterConfig


@dataclass(kw_only=True)
class LoraConfig(AdapterConfig):
    """LoRA: `W' = W + (lora_alpha / r) B A` (arXiv 2106.09685): the baseline, and the format that serving stacks read.

    Args:
        r: the rank.
        lora_alpha: the scale's numerator.
        lora_dropout: dropout on the adapter's input.
        use_rslora: scale by `lora_alpha / √r` instead.
        bias: which biases are trained: `"none"`, `"all"`, or `"lora_only"`, those of the adapted layers.
        init_weights: True starts as the identity; `"gaussian"` too, with a normal A; False at random.
        init_lora_weights: PEFT's name of `init_weights`.
        rank_pattern: name or regular expression -> r.
        alpha_pattern: name or regular expression -> lora_alpha.
        fan_in_fan_out: accepted for PEFT's sake; the layer itself tells how its weight is stored.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] | str = "none"
    init_weights: bool | Literal["gaussian"] | str = True
    init_lora_weights: bool | str | None = field(default=None, metadata={"beyond_peft": True})
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    TYPE: ClassVar[str] = "LORA"
    BIASES: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")
    PATTERNS: ClassVar[dict[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    FILE_NAMES: ClassVar[dict[str, str]] = {"init_weights": "init_lora_weights"}
    INERT: ClassVar[dict[str, tuple[Any, ...]]] = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}

    def check(self) -> None:
        super().check()
        if self.init_lora_weights is not None:
            self.init_weights, self.init_lora_weights = self.init_lora_weights, None
        self.require_choice("init_weights", (True, False, "gaussian"))
        self.require_share("lora_dropout")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
