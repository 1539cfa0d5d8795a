"""Linear operators: what an adapter sees of the layer it adapts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.product import linear_backward


@dataclass(frozen=True)
class WeightShape:
    """The weight of one linear operator, as a matrix `(out, in)`.

    A convolution's kernel is flattened: `in = (channels / groups) · k0 · k1 …`.
    """

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()  # () for a linear layer
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return not self.kernel

    @property
    def in_channels(self) -> int:
        """Input channels of one group."""
        return self.in_features // prod(self.kernel)

    def __str__(self) -> str:
        return f"({self.out_features}, {self.in_features})"


class Operator(ABC):
    """`x -> W x + bias`: a base layer, or a base layer with adapters on it."""

    @property
    @abstractmethod
    def bare(self) -> BareOperator:
        """The operator without adapters."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator, hooks and quantized kernels included."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a matrix `(out, in)`."""

    @property
    def transient(self) -> bool:
        """Whether `weight()` makes a new tensor, to be recomputed rather than kept."""
        return False

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        """`W (out, in)` and the bias, where `x Wᵀ + b` is all that a call on this dtype does and neither is trained."""
        return None


class BareOperator(Operator):
    """An operator without adapters; unless it says otherwise, on x's last dimension."""

    shape: WeightShape

    @property
    def bare(self) -> BareOperator:
        return self

    @property
    def opaque(self) -> bool:
        """Whether `weight()` cannot be had."""
        return False

    @property
    def takes_weight(self) -> bool:
        """Whether it can be run with another weight: not where the layer computes its own, or does more than multiply by it."""
        return not self.opaque

    @property
    def hooked(self) -> bool:
        """Whether somebody's hooks want to see the base layer called."""
        return False

    def pad(self, x: Tensor) -> Tensor:
        """`x` with the padding that `contract` does not add itself (a convolution's reflect, circular, 'same')."""
        return x

    def contract(self, x: Tensor, W: Tensor) -> Tensor:
        """`W x` for a padded `x`: no bias, no hooks."""
        return F.linear(x, W)

    def contract_backward(self, x: Tensor, W: Tensor, dy: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor]:
        """Gradients of `contract`: `dx` (where needed) and `dW` `(out, in)`."""
        return linear_backward(x, W, dy, need_x)

    def add_low_rank(self, y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
        """`y + (B A) x`, with `B` `(out, r)` and `A` `(r, in)`, never forming `B A`."""
        return add_to(y, F.linear(x, A), B.t())

    @abstractmethod
    def add_bias(self, y: Tensor) -> Tensor: ...

    def with_weight(self, x: Tensor, W: Tensor) -> Tensor:
        """Apply the operator with `W` `(out, in)` instead of its weight; its own bias is added."""
        return self.add_bias(self.contract(self.pad(x), W))


class Matrix(BareOperator):
    """`x Wᵀ + b` of plain tensors."""

    def __init__(self, W: Tensor, bias: Tensor | None = None) -> None:
        n_out, n_in = W.shape[-2:]
        self.W, self.bias, self.shape = W, bias, WeightShape(n_out, n_in)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self.bias)

    def weight(self) -> Tensor:
        return self.W

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
        frozen = not (self.W.requires_grad or (self.bias is not None and self.bias.requires_grad))
        return (self.W, self.bias) if frozen and self.W.dtype is dtype else None

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y)


def add_to(y: Tensor, z: Tensor, Bt: Tensor) -> Tensor:
    """`y + z Bt` in one pass over y: `y (…, out)`, `z (…, r)`, `Bt (r, out)`. Autograd sees it, unlike `ops.product`."""
    if y.dtype != z.dtype:  # a base that answers in a dtype of its own
        return y + (z @ Bt).to(y.dtype)
    n = z.numel() // max(1, z.shape[-1])  # y may be empty; tracing follows numbers of elements
    return torch.addmm(y.reshape(n, y.shape[-1]), z.reshape(n, z.shape[-1]), Bt).view_as(y)
