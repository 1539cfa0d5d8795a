"""A frozen linear layer and an adapter's thin products in one autograd node.

Used where the base layer is a plain matrix (`Base.plain`): the additions then happen in place, in forward on the base's
output and in backward on the gradient of its input, so neither is read or written once more than without an adapter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Down(ABC):
    """The first of the two thin products: `x (n, in) -> z (n, k)`, linear in x."""

    @abstractmethod
    def forward(self, x: Tensor, *θ: Tensor) -> Tensor: ...

    @abstractmethod
    def backward(self, dx: Tensor | None, dz: Tensor, x: Tensor, *θ: Tensor) -> tuple[Tensor, ...]:
        """Add to `dx` in place what flows back through z, and return the gradients of θ."""


class MatrixDown(Down):
    """`z = x Aᵀ`, `A (k, in)`."""

    def forward(self, x: Tensor, *θ: Tensor) -> Tensor:
        return torch.mm(x, θ[0].t())

    def backward(self, dx: Tensor | None, dz: Tensor, x: Tensor, *θ: Tensor) -> tuple[Tensor, ...]:
        if dx is not None:
            dx.addmm_(dz, θ[0])
        return (torch.mm(dz.t(), x),)


MATRIX = MatrixDown()


class _ThinLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, Bt: Tensor, down: Down, *θ: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        z = down.forward(flat, *θ)
        y = F.linear(flat, W, bias).addmm_(z, Bt)
        ctx.save_for_backward(flat, W, z, Bt, *θ)
        ctx.down, ctx.shape = down, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, z, Bt, *θ = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, W.shape[0])
        dz = torch.mm(dy, Bt.t())
        dx = torch.mm(dy, W) if ctx.needs_input_grad[0] else None
        dθ = ctx.down.backward(dx, dz, x, *θ)
        return (None if dx is None else dx.view(ctx.shape)), None, None, torch.mm(z.t(), dy), None, *dθ


def thin_linear(x: Tensor, W: Tensor, bias: Tensor | None, Bt: Tensor, down: Down, *θ: Tensor) -> Tensor:
    """`x Wᵀ + b + down(x) Bt` for a frozen `W (out, in)`, `Bt (k, out)`."""
    return _ThinLinear.apply(x, W, bias, Bt, down, *θ)


class Rule(ABC):
    """A map `W -> W'` of full rank with parameters θ, and the way back."""

    @abstractmethod
    def build(self, W: Tensor, *θ: Tensor) -> Tensor:
        """`W' (out, in)`, in the dtype of W."""

    @abstractmethod
    def rebuild(self, W: Tensor, *θ: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """`W'` again, and the function from `dL/dW'`, which it may overwrite, to the gradients of θ."""


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, rule: Rule, *θ: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, W, *θ)
        ctx.rule, ctx.shape = rule, x.shape
        return F.linear(flat, rule.build(W, *θ), bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, *θ = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, W.shape[0])
        adapted, pull = ctx.rule.rebuild(W, *θ)
        dx = torch.mm(dy, adapted).view(ctx.shape) if ctx.needs_input_grad[0] else None
        del adapted
        return dx, None, None, None, *pull(torch.mm(dy.t(), x))


def dense_linear(x: Tensor, W: Tensor, bias: Tensor | None, rule: Rule, *θ: Tensor) -> Tensor:
    """`x W'ᵀ + b` for a frozen `W (out, in)`; W' is built, used and dropped, in forward and again in backward."""
    return _DenseLinear.apply(x, W, bias, rule, *θ)
