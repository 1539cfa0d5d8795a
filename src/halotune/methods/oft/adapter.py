"""OFT on one layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.adapter import InputSide
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.fused import Site, flattened
from ...core.operator import WeightShape
from . import ops
from .config import OFTConfig


class OFT(InputSide):
    """`W' = W Rᵀ`, R orthogonal with blocks `(I + Q_i)(I − Q_i)⁻¹` of side b, Q_i skew-symmetric; the base is left untouched.

    `oft_R.weight (blocks, b (b − 1) / 2)`: the Q_i row by row above their diagonals; one row where blocks are `shared`.
    `terms` and `eps` are those of `ops`. Source: arXiv 2306.07280; README.md beside this file.
    """

    factors_exist = False

    def __init__(self, shape: WeightShape, b: int, shared: bool, terms: int, eps: float | None) -> None:
        super().__init__(shape)
        self.b, self.terms, self.eps, self.module_dropout = b, terms, eps, 0.0
        θ = torch.empty(1 if shared else self.rank, b * (b - 1) // 2)
        self.oft_R = nn.ParameterDict({"weight": nn.Parameter(θ)})

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, OFTConfig)
        n, (field, wanted) = shape.in_features, config.size
        nearest = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
        b = n // nearest if config.r else nearest
        if b < 2:
            raise HalotuneError(
                f"OFT: {field}={wanted} cuts the inputs of a weight of {shape} into blocks of side 1, which rotate nothing. "
                f"Choose another divisor of {n}, or leave the module out with exclude_modules."
            )
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        adapter = cls(shape, b, config.block_share, terms, config.eps if config.coft else None)
        adapter.module_dropout = config.module_dropout
        nn.init.normal_(adapter.oft_R["weight"], std=0.0 if config.init_weights else 0.1)
        return adapter

    @property
    def rank(self) -> int:
        """The number of blocks."""
        return self.shape.in_features // self.b

    @property
    def dropout(self) -> float:
        return self.module_dropout

    def kin(self) -> Hashable:
        return self.shape.in_features, self.b, self.terms, self.eps

    def derive(self, *θ: Tensor) -> tuple[Tensor, ...]:
        """`R (…, blocks, b, b)`. peft's exact transform turns the other way than its series."""
        R = ops.cayley(ops.skew(θ[0] if self.terms else -θ[0], self.b, self.eps), self.terms)
        return (R.expand(*R.shape[:-3], self.rank, self.b, self.b),)

    def drop(self, *derived: Tensor) -> tuple[Tensor, ...]:
        (R,) = derived
        if not (self.training and self.module_dropout):
            return derived
        dropped = torch.rand(len(R), 1, 1, device=R.device) < self.module_dropout
        return (torch.where(dropped, torch.eye(self.b, dtype=R.dtype, device=R.device), R),)

    def rotate(self, x: Tensor, *derived: Tensor, transpose: bool = False) -> Tensor:
        (R,) = derived
        return ops.rotate(flattened(x), R.mT if transpose else R).view(x.shape)

    def on_plain(
        self, sites: Sequence[Site], stack: tuple[Tensor, ...] | None = None
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        W, bias, (R,) = sites[0]
        return lambda x: (ops.RotatedLinear.apply(x, W, bias, R),)  # type: ignore[return-value]
