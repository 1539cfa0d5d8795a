"""Bone, BAT and MiSS on one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.errors import HalotuneError
from ...core.kinds import Dense, LowRank
from ...core.operator import Operator, WeightShape, add_to
from ...core.prepared import Tensors, exact_dtype
from ...core.sharded_parameters import copied
from ...core.weight_shard import Axis, Shard
from ...ops.product import fold
from . import ops
from .config import BlockConfig, MissConfig


class _Block(Adapter):
    """What has one block as its parameter, in which the delta is linear."""

    block: ClassVar[str] = "bone_block"

    def __init__(self, shape: WeightShape, r: int, *size: int) -> None:
        super().__init__(shape)
        self.r = r
        self.register_parameter(self.block, nn.Parameter(torch.empty(size)))

    @property
    def rank(self) -> int:
        return self.r

    @classmethod
    def combined(cls, adapters: Sequence[Any], weights: Sequence[float], how: str, rank: int) -> Self | None:
        """Blocks of one r add."""
        blocks = [a.get_parameter(a.block).detach() for a in adapters]
        if how != "linear" or len({b.shape for b in blocks}) > 1:
            return None
        out = copied(adapters[0])
        with torch.no_grad():
            out.get_parameter(out.block).copy_(torch.stack([w * b for w, b in zip(weights, blocks, strict=True)]).sum(0))
        return out


class Bone(_Block, LowRank):
    """`W' = W + tile(Dᵀ)`: column k of the delta is row `k mod r` of D; `bone_block` D: `(r, out)`, zero at the start.

    Forward: `base(x) + fold(x) D`. Low-rank factors: `B = Dᵀ`, `A = [I I …]`. Source: arXiv 2409.15371.
    """

    def __init__(self, shape: WeightShape, r: int, columns: int | None = None) -> None:
        super().__init__(shape, r, r, columns or shape.out_features)

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, BlockConfig)
        columns = None
        if isinstance(config, MissConfig) and config.init_weights == "mini":
            columns = config.mini_r
            if shape.out_features % columns:
                raise HalotuneError(
                    f"MiSS: mini_r must divide the {shape.out_features} outputs of a weight of {shape}; got {columns}. "
                    "Use a divisor, or leave the module out with exclude_modules."
                )
        adapter = cls(shape, config.r, columns)
        if isinstance(config, MissConfig):
            adapter.dropout = config.miss_dropout
        adapter.reset(identity=config.init_weights is not False)
        return adapter

    def reset(self, identity: bool) -> None:
        block = self.get_parameter(self.block)
        nn.init.zeros_(block) if identity else nn.init.kaiming_uniform_(block, a=math.sqrt(5))

    def prepare(self, *parameters: Tensor) -> Tensors:
        """`D (…, r, out)`: the block, repeated over the outputs in the mini form."""
        D = parameters[0].to(exact_dtype(parameters[0].dtype))
        repeats = self.shape.out_features // D.shape[-1]
        return (D if repeats == 1 else D.unsqueeze(-2).expand(*D.shape[:-1], repeats, D.shape[-1]).flatten(-2),)

    def cut(self, shard: Shard, *factors: Tensor) -> Tensors:
        """Of columns that begin at c, column k is row `(c + k) mod r` of D."""
        (D,) = super().cut(shard, *factors)
        return (D.roll(-shard.spans[0][0], -2) if shard.axis == "in" else D,)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Of rank r; of rank `mini_r` in the mini form, where that is less: `B = [I I …]ᵀ`, `A = tile(blockᵀ)`."""
        block = self.get_parameter(self.block)
        r, columns = block.shape
        if columns >= r:
            return self.low_rank(*self.factors_now())
        block = block.to(exact_dtype(block.dtype))
        B = ops.unfolding(columns, self.shape.out_features, block).mT
        return B, block.mT.repeat(1, -(-self.shape.in_features // r))[:, : self.shape.in_features]

    def low_rank(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        (D,) = factors
        return D.mT, ops.unfolding(self.r, self.shape.in_features, D)

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        if not op.bare.shape.is_linear:
            return super().run(x, op, factors, scale)
        (D,) = factors
        return add_to(op(x), fold(self.drop(x), self.r), D if scale == 1.0 else D * scale)


class Bat(_Block, Dense):
    """`W'_ij = W_ij + W_ij B_i + B_i`, W cut into r×r blocks, i the output block; `bone_block` B: `(out/r, r, r)`, zero at
    the start. The delta has full rank. Source: arXiv 2409.15371, where it is called BAT.
    """

    def __init__(self, shape: WeightShape, r: int) -> None:
        super().__init__(shape, r, shape.out_features // r, r, r)

    @classmethod
    def create(cls, shape: WeightShape, config: AdapterConfig) -> Self:
        assert isinstance(config, BlockConfig)
        if shape.out_features % config.r or shape.in_features % config.r:
            raise HalotuneError(
                f"BAT: r must divide both sizes of the weight, {shape}; got r={config.r}. Use a common divisor "
                f"(the largest is {math.gcd(shape.out_features, shape.in_features)}), a rank_pattern for this module, or "
                "init_weights=True (Bone), which takes any r."
            )
        adapter = cls(shape, config.r)
        nn.init.zeros_(adapter.get_parameter(cls.block))
        return adapter

    axes = (("out", -3),)

    @property
    def side(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.r

    def prepare(self, *parameters: Tensor) -> Tensors:
        return parameters

    @property
    def rows_in_blocks(self) -> tuple[int, list[int]] | None:
        """On a shard of rows that begins or ends within a block: see `Shard.rows_in_blocks`."""
        if self.whole is None or self.shard is None or self.shard.axis != "out":
            return None
        return self.shard.rows_in_blocks(self.r) if any(b % self.r for span in self.shard.spans for b in span) else None

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        if (found := self.rows_in_blocks) is None:
            return ops.bat(W, factors[0])
        n, rows = found
        index = torch.tensor(rows, device=W.device, dtype=torch.long)
        blocks = W.new_zeros(*W.shape[:-2], n * self.r, W.shape[-1]).index_copy(-2, index, W)  # a row of W' is of its row of W
        return ops.bat(blocks, factors[0]).index_select(-2, index)

    def unit(self, axis: Axis) -> int:
        return self.r if axis == "in" else 1

    def build(self, W: Tensor, *factors: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        if self.rows_in_blocks:
            return super().build(W, *factors, noise=noise, again=again)
        return ops.build_bat.call(again, W, factors[0], noise)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> Sequence[Tensor | None]:
        if self.rows_in_blocks:
            return super().pull(G, W, *factors)
        return (ops.pull_bat(G, W, factors[0]),)


class Miss(Bone):
    """Bone under PEFT's newer name."""

    block = "miss_block"


class MissBat(Bat):
    """BAT under PEFT's newer name."""

    block = "miss_block"


def create(shape: WeightShape, config: AdapterConfig) -> Adapter:
    """The kind and the name that the configuration asks for."""
    assert isinstance(config, BlockConfig)
    affine, bat = (Miss, MissBat) if isinstance(config, MissConfig) else (Bone, Bat)
    return (bat if config.init_weights == "bat" else affine).create(shape, config)
