"""The configuration of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from ...core.config import AdapterConfig

# PEFT's ways to start A and B that leave the base's weights alone.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


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
    FOREIGN: ClassVar[dict[str, str]] = {
        "use_dora": "DoRA, a LoRA with a magnitude for each output",
        "trainable_token_indices": "a LoRA with embeddings for single tokens",
        "layer_replication": "a LoRA on a model whose layers are repeated",
        "alora_invocation_tokens": "aLoRA, which is active from an invocation on",
        "lora_bias": "a LoRA with biases in lora_B",
        "use_qalora": "QALoRA, which pools its input",
        "use_bdlora": "a LoRA with block-diagonal factors",
        "arrow_config": "Arrow, which routes tokens between LoRAs",
        "megatron_config": "a LoRA on Megatron's parallel layers",
    }

    @classmethod
    def foreign(cls, entries: Mapping[str, Any]) -> tuple[str, str] | None:
        start = entries.get("init_lora_weights")
        if not isinstance(start, str) or start in PLAIN_STARTS:
            return super().foreign(entries)
        return (
            f"LoraConfig.init_lora_weights: set to {start!r}: the adapter is a LoRA over other base weights (as PiSSA, OLoRA, "
            "CorDA and LoftQ are), which peft makes anew whenever it loads the adapter; that is not supported.",
            "peft reads it, and makes it a plain LoRA: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=…).",
        )

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> Self:
        if entries.get("init_lora_weights") in PLAIN_STARTS:  # it has been started, and is a plain LoRA now
            entries = {k: v for k, v in entries.items() if k not in ("init_lora_weights", "eva_config", "lora_ga_config")}
        return super().from_dict(entries)

    def check(self) -> None:
        super().check()
        if self.init_lora_weights is not None:
            self.init_weights, self.init_lora_weights = self.init_lora_weights, None
        self.require_choice("init_weights", (True, False, "gaussian"))
        self.require_share("lora_dropout")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
