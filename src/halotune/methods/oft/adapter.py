"""OFT on one layer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.kinds import Rotation
from ...core.operator import WeightShape
from ...core.prepared import Tensors
from ...core.weight_shard import Axis
from ...ops.product import apply, flattened
from . import ops
from .config import OFTConfig


class OFT(Rotation):
    """`W' = W Rᵀ`, R orthogonal with blocks `(I + Q_i)(I − Q_i)⁻¹` of side b, Q_i skew-symmetric; the base is left untouched.

    `oft_R.weight (blocks, b (b − 1) / 2)`: the Q_i row by row above their diagonals; one row where blocks are `shared`.
    `terms` and `eps` are those of `ops`. Source: arXiv 2306.07280; README.md beside this file.
    """

    axes = (("in", -3),)

    def __init__(self, shape: WeightShape, b: int, shared: bool, terms: int, eps: float | None) -> None:
        super().__init__(shape)
        self.b, self.terms, self.eps = b, terms, eps
        self.oft_R = nn.ParameterDict({"weight": nn.Parameter(torch.empty(1 if shared else self.rank, b * (b - 1) // 2))})

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, OFTConfig)
        n, (field, wanted) = shape.in_features, config.size
        nearest = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
        if (b := n // nearest if config.r else nearest) < 2:
            raise HalotuneError(
                f"OFT: {field}={wanted} cuts the inputs of a weight of {shape} into blocks of side 1, which rotate nothing. "
                f"Choose another divisor of {n}, or leave the module out with exclude_modules."
            )
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        adapter = cls(shape, b, config.block_share, terms, config.eps if config.coft else None)
        adapter.dropout = config.module_dropout
        nn.init.normal_(adapter.oft_R["weight"], std=0.0 if config.init_weights else 0.1)
        return adapter

    @property
    def side(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.b

    @property
    def rank(self) -> int:
        """The number of blocks."""
        return self.shape.in_features // self.b

    def batch_key(self) -> Hashable:
        return self.shape.in_features, self.b, self.terms, self.eps

    def prepare(self, *parameters: Tensor) -> Tensors:
        """`R (…, blocks, b, b)`. peft's exact transform turns the other way than its series."""
        R = ops.cayley(ops.skew(parameters[0] if self.terms else -parameters[0], self.b, self.eps), self.terms)
        return (R.expand(*R.shape[:-3], self.rank, self.b, self.b),)

    def unit(self, axis: Axis) -> int:
        return self.b if axis == "in" else 1

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        return ops.rotate(W, factors[0].to(W.dtype).mT)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> Tensors:
        return (ops.in_blocks(G, self.b).mT @ ops.in_blocks(W, self.b),)

    def rotate(self, x: Tensor, *factors: Tensor) -> Tensor:
        return ops.rotate(flattened(x), *factors).view_as(x)

    def rotate_groups(self, x: Tensor, groups: Any, *factors: Tensor) -> Tensor:
        (R,) = factors
        return ops.rotate_groups(x, groups, R)

    def drop(self, *factors: Tensor) -> Tensors:
        (R,) = factors
        blocks = self.whole_shape.in_features // self.b
        dropped = self.cut_mask("in", torch.rand(blocks, 1, 1, device=R.device) < self.dropout, 0)
        return (torch.where(dropped, torch.eye(self.b, dtype=R.dtype, device=R.device), R),)

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return apply(ops.RotatedLinear, x, W, bias, *factors)
