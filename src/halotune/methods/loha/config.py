"""The configuration of LoHa."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...core.config import AdapterConfig, beyond_peft


class _Unset(int):
    """A default that can be told from the same number given."""


@dataclass(kw_only=True)
class LoHaConfig(AdapterConfig):
    """LoHa: `W' = W + (alpha / r) (A1 B1) ∘ (A2 B2)` (FedPara, arXiv 2108.06098).

    Args:
        r: the rank of each of the two products; ΔW has rank up to r².
        alpha: the scale's numerator.
        lora_alpha: another name of `alpha`, as PEFT's example prints it.
        rank_pattern: name or regular expression -> r.
        alpha_pattern: name or regular expression -> alpha.
        rank_dropout: the chance that an output row of ΔW is dropped in training; kept rows are scaled up.
        module_dropout: the chance that a layer's adapter is skipped in a training step.
        use_effective_conv2d: for kernels larger than 1, the Tucker form, whose size does not grow with the kernel.
        init_weights: True starts as the identity; False at random.
        use_rslora: scale by `alpha / √r` instead.
        use_scalar: ΔW has one more factor, trained: a number, which starts at zero.
        weight_decompose: `W + ΔW` is scaled to lengths of its own, trained (as DoRA does with LoRA): `m ∘ (W + ΔW) / ‖W + ΔW‖`.
        wd_on_out: these are the lengths of the output rows; False: of the input channels.
    """

    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    r: int = 8
    alpha: int | float = _Unset(8)
    lora_alpha: int | float | None = beyond_peft(None)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    use_rslora: bool = beyond_peft(False)
    use_scalar: bool = beyond_peft(False)
    weight_decompose: bool = beyond_peft(False)
    wd_on_out: bool = beyond_peft(True)

    TYPE: ClassVar[str] = "LOHA"
    PATTERNS: ClassVar[dict[str, str]] = {"r": "rank_pattern", "alpha": "alpha_pattern"}

    def check(self) -> None:
        super().check()
        self.require_share("rank_dropout")
        self.require_share("module_dropout")
        if self.lora_alpha is not None:
            if not isinstance(self.alpha, _Unset) and self.alpha != self.lora_alpha:
                found = f"is another name of alpha; got alpha={self.alpha}, lora_alpha={self.lora_alpha}"
                raise self.error("lora_alpha", found, "Give one.")
            self.alpha, self.lora_alpha = self.lora_alpha, None
        if isinstance(self.alpha, _Unset):
            self.alpha = int(self.alpha)
        if self.weight_decompose and self.module_dropout:
            found = f"is not defined for weight_decompose=True, which no ΔW = 0 undoes; got {self.module_dropout}"
            raise self.error("module_dropout", found, "Use rank_dropout.")
        if not (self.wd_on_out or self.weight_decompose):
            raise self.error("wd_on_out", "means nothing without weight_decompose=True; got False", "Set both, or neither.")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)
