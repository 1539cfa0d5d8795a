"""The three kinds of maps `W -> W'`.

| kind | map | price of a forward pass |
|---|---|---|
| `Rotation` | `W' = W Q` | one low-rank product on x (or one of small blocks), base untouched |
| `LowRank` | `W' = W + B A` | two low-rank products, base untouched |
| `Dense` | any `W' = f(W, θ)` | W' is built, used and dropped; built again in backward |

Any of them may be applied as a weight instead: W' of all layers of one shape is then prepared together.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.build import build_low_rank
from .adapter import Adapter
from .frozen_linear import low_rank_linear
from .operator import Operator
from .prepared import Tensors
from .weight_form import weight_form, weight_form_linear

if TYPE_CHECKING:
    from .experts import Groups


class Rotation(Adapter):
    """`W' = W Q`: the input is rotated, then meets the base as it is."""

    @abstractmethod
    def rotate(self, x: Tensor, *factors: Tensor) -> Tensor:
        """`x Qᵀ` over the last dimension, in the dtype of `x`."""

    def rotate_groups(self, x: Tensor, groups: Groups, *factors: Tensor) -> Tensor:
        """`rotate` for rows sorted by expert, with factors `(experts, …)`."""
        sizes = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1)).tolist()
        *rows, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
        return torch.cat([*(self.rotate(part, *(f[e] for f in factors)) for e, part in enumerate(rows)), rest])

    def drop(self, *factors: Tensor) -> Tensors:
        """The factors of a rotation of which each part is left out with the chance `dropout`."""
        return factors

    def reads_weight(self, op: Operator) -> bool:
        return not op.bare.shape.is_linear

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        if self.training and self.dropout:
            factors = self.drop(*factors)
        if not op.bare.shape.is_linear:  # patches of an image cannot be rotated before they are cut
            return self.run_on_patches(x, op, factors, scale)
        rotated = self.rotate(x, *factors)
        return op(rotated if scale == 1.0 else torch.lerp(x, rotated, scale))

    def run_on_patches(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        """`run` for a convolution. Where `Q − I` is of low rank there may be a cheaper way than W'."""
        return weight_form(x, op, self, factors, scale, self.dither(x.dtype))


class LowRank(Adapter):
    """`W' = W + B A` with low-rank factors that do not depend on `W`."""

    axes = (("out", -1), ("in", -1))

    @abstractmethod
    def prepare(self, *parameters: Tensor) -> Tensors:
        """`Bᵀ (…, k, out)` and `A (…, k, in)`; without A, x is folded to k numbers."""

    def low_rank(self, *factors: Tensor) -> tuple[Tensor, Tensor]:
        """`B (…, out, k)`, `A (…, k, in)` from what was prepared, in its dtype."""
        Bt, A = factors
        return Bt.mT, A

    def parameters_as_factors(self, *parameters: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """`B (…, out, k)`, `A (…, k, in)` and s of `W' = W + s B A`, where parameters are such as they are; else None."""
        return None

    def build(self, W: Tensor, *factors: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        return build_low_rank(W, *self.low_rank(*factors), noise)

    def pull(self, G: Tensor, W: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        B, A = self.low_rank(*factors)
        return (A @ G.mT, B.mT @ G)[: len(factors)]

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.low_rank(*self.factors_now())

    def adapt(self, W: Tensor, *factors: Tensor) -> Tensor:
        B, A = self.low_rank(*factors)
        return (W + B @ A).to(W.dtype)

    def drop(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        if self.whole is None:
            return F.dropout(x, self.dropout)
        mask = F.dropout(x.new_ones(*x.shape[:-1], self.whole_shape.in_features), self.dropout)
        return x * self.cut_mask("in", mask, -1)

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        return add_low_rank(x, self.drop(x), op, self.low_rank(*factors), scale)

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return low_rank_linear(x, W, bias, *factors)


class Dense(Adapter):
    """Any other map. `W'` is of full size, so it never outlives the product it is built for."""

    makes_weight = True

    def reads_weight(self, op: Operator) -> bool:
        return True

    def run(self, x: Tensor, op: Operator, factors: Tensors, scale: float) -> Tensor:
        return weight_form(x, op, self, factors, scale, self.dither(x.dtype))

    def run_plain(self, x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        return weight_form_linear(x, W, bias, self, *factors, dither=self.dither(W.dtype))


def add_low_rank(x: Tensor, dropped: Tensor, op: Operator, factors: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    """`op(x) + scale · (B A) dropped`, for x in its compute dtype."""
    B, A = (t.to(x.dtype) for t in factors)
    return op.bare.add_low_rank(op(x), dropped, B if scale == 1.0 else B * scale, A)
