"""OFT on one layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.adapter import InputSide
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.fused import Site
from ...core.operator import WeightShape
from . import ops
from .config import OFTConfig


class OFT(InputSide):
    """`W' = W Rᵀ`, R block-diagonal with blocks `(I + Q_i)(I − Q_i)⁻¹` for skew-symmetric Q_i.

    `oft_R.weight`: `(blocks, b (b − 1) / 2)`, the Q_i row by row above their diagonals; one row where blocks are shared.
    Forward rotates the input in blocks and leaves the base untouched. Source: arXiv 2306.07280; README.md beside this file.

    Args:
        b: the side of a block, which divides the inputs.
        terms: of the Cayley transform's series; 0 for the exact transform.
        eps: the constraint, or None.
    """

    def __init__(self, shape: WeightShape, b: int, shared: bool = False, terms: int = 0, eps: float | None = None) -> None:
        super().__init__(shape)
        self.b, self.terms, self.eps, self.module_dropout = b, terms, eps, 0.0
        θ = torch.empty(1 if shared else self.rank, b * (b - 1) // 2)
        self.oft_R = nn.ParameterDict({"weight": nn.Parameter(θ)})

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, OFTConfig)
        n, wanted = shape.in_features, config.r or config.oft_block_size or 0
        nearest = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
        b = n // nearest if config.r else nearest
        if b < 2:
            raise HalotuneError(
                f"OFT: blocks of side 1 rotate nothing; a weight of {shape} gets these from r={config.r}, "
                f"oft_block_size={config.oft_block_size}. Choose a divisor of {n}, or leave it out by exclude_modules."
            )
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        adapter = cls(shape, b, config.block_share, terms, config.eps if config.coft else None)
        adapter.module_dropout = config.module_dropout
        nn.init.zeros_(adapter.oft_R["weight"]) if config.init_weights else nn.init.normal_(adapter.oft_R["weight"], std=0.1)
        return adapter

    factors_exist = False

    @property
    def rank(self) -> int:
        """The number of blocks."""
        return self.shape.in_features // self.b

    @property
    def dropout(self) -> float:
        return self.module_dropout

    def kin(self) -> Hashable:
        return self.shape, self.b, self.terms, self.eps

    def derive(self, *θ: Tensor) -> tuple[Tensor, ...]:
        """`N (…, blocks, b, b)` with `R = I + N`. peft's exact transform turns the other way than its series."""
        Q = ops.skew(θ[0] if self.terms else -θ[0], self.b)
        N = ops.cayley(Q if self.eps is None else ops.constrained(Q, self.eps), self.terms)
        return (N.expand(*N.shape[:-3], self.rank, self.b, self.b),)

    def drop(self, *derived: Tensor) -> tuple[Tensor, ...]:
        (N,) = derived
        if not (self.training and self.module_dropout):
            return derived
        return (N * (torch.rand(len(N), 1, 1, device=N.device) >= self.module_dropout).to(N.dtype),)

    def rotate(self, x: Tensor, *derived: Tensor, transpose: bool = False) -> Tensor:
        return ops.rotate(x, *derived, transpose)

    def on_plain(
        self, sites: Sequence[Site], stack: tuple[Tensor, ...] | None = None
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        W, bias, derived = sites[0]
        return lambda x: (ops.rotated_linear(x, W, bias, *derived),)
