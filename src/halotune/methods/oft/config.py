"""The configuration of OFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...core.config import AdapterConfig


@dataclass(kw_only=True)
class OFTConfig(AdapterConfig):
    """OFT: `W' = W Rᵀ`, R orthogonal and block-diagonal (arXiv 2306.07280, 2506.19847).

    One of `r` and `oft_block_size` is above 0. Where it does not divide the inputs of a layer, the nearest divisor is taken.

    Args:
        r, oft_block_size: the number of blocks, or the side of each; a side of 32 where neither is given.
        module_dropout: in training, the chance of every block to be the identity.
        bias: which biases are trained: `"none"`, `"all"`, or `"oft_only"`, those of the adapted layers.
        init_weights: True starts as the identity, False at random.
        coft, eps: constrain every block: its skew-symmetric matrix has at most the norm `eps / √blocks`.
        block_share: all blocks of a layer are one.
        use_cayley_neumann, num_cayley_neumann_terms: the Cayley transform by so many terms of its series (no inverse;
            orthogonal where rotations are small), or exactly.
        fan_in_fan_out: accepted for PEFT's sake; the layer itself tells how its weight is stored.
        rank_pattern: name or regular expression -> r or oft_block_size, whichever is set.
    """

    peft_version: str | None = "0.18.0"  # since then peft counts the series like this, and asks files for it
    r: int = 0
    oft_block_size: int | None = None
    module_dropout: float = 0.0
    bias: Literal["none", "all", "oft_only"] | str = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    fan_in_fan_out: bool = False

    TYPE: ClassVar[str] = "OFT"
    BIASES: ClassVar[tuple[str, ...]] = ("none", "all", "oft_only")

    @property
    def size(self) -> tuple[str, int]:
        return super().size if self.r else ("oft_block_size", self.oft_block_size or 0)

    def check(self) -> None:
        if self.oft_block_size is None:
            self.oft_block_size = 0 if self.r else 32
        if self.r * self.oft_block_size or self.r + self.oft_block_size < 1:
            found = f"exactly one of r and oft_block_size must be above 0; got {self.r} and {self.oft_block_size}"
            raise self.error("r", found, "Give one and leave the other out.")
        super().check()
        for name in ("num_cayley_neumann_terms", "eps"):
            if (value := getattr(self, name)) <= 0:
                raise self.error(name, f"must be above 0; got {value}", "Leave it out for its default.")
        self.require_share("module_dropout")
