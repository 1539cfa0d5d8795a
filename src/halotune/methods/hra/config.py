"""The configuration of HRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from ...core.config import AdapterConfig, beyond_peft


@dataclass(kw_only=True)
class HRAConfig(AdapterConfig):
    """HRA: `W' = W H_1 … H_r`, r Householder reflections of the input (arXiv 2405.17484).

    Args:
        r: the number of reflections. An even r starts as the identity; an odd one cannot.
        apply_GS: orthonormalise the vectors first (Gram–Schmidt). Training then starts away from the base's function.
        init_weights: True starts as the identity (even r; independent orthonormal vectors under Gram–Schmidt), False
            at random.
        bias: which biases are trained: `"none"`, `"all"`, or `"hra_only"`, those of the adapted layers.
        orthogonality_weight: λ of the penalty `λ Σ_layers ‖I − ÛᵀÛ‖²`, which `model.penalty()` returns for your loss, and
            `halotune.integrations.transformers.AdapterTrainer` adds to its own. The paper tries 1e-5 to 1e-3.
        orthogonality_norm: `"squared"`, as in the paper, or `"unsquared"`, as in its authors' code.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] | str = "none"
    orthogonality_weight: float = beyond_peft(default=0.0)
    orthogonality_norm: Literal["squared", "unsquared"] | str = beyond_peft(default="squared")

    TYPE: ClassVar[str] = "HRA"
    BIASES: ClassVar[tuple[str, ...]] = ("none", "all", "hra_only")

    def check(self) -> None:
        super().check()
        self.require_choice("orthogonality_norm", ("squared", "unsquared"))
        if self.orthogonality_weight < 0:
            found = f"must not be negative; got {self.orthogonality_weight}"
            raise self.error("orthogonality_weight", found, "Use 0 for no penalty, or 1e-5 to 1e-3.")

    def notices(self) -> list[str]:
        if not self.init_weights:
            return []
        if self.apply_GS:
            return [
                "HRA: with apply_GS=True training starts away from the pretrained function (‖Q − I‖ = 2√r for any "
                "vectors). Use apply_GS=False to start at it, or init_weights=False to silence this."
            ]
        odd = sorted({r for r in (self.r, *self.rank_pattern.values()) if r % 2})
        return [
            f"HRA: the identity at the start needs an even r (reflections cancel in pairs); got r={r}, so training "
            "starts at random. Use an even r, or init_weights=False to silence this."
            for r in odd
        ]

    def combined(self, r: int) -> Self:
        return replace(super().combined(r), apply_GS=False)

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if not self.orthogonality_weight:
            out.pop("orthogonality_norm", None)
        return out
