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

from ..ops.product import add_product


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, at no price where nobody asks for a second derivative."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (guarded if wanted else backward)(ctx, *grads)

    return run


def by_columns(B: Tensor) -> Tensor:
    """`B (…, out, k)` with every column contiguous: added to rows of `out` numbers, it is read in wide words."""
    return B.mT.contiguous().mT


class Down(ABC):
    """The first of the two thin products: `x (n, in) -> z (n, k)`, linear in x."""

    needs_x = True  # for the gradients of θ

    @abstractmethod
    def forward(self, x: Tensor, *θ: Tensor) -> Tensor: ...

    @abstractmethod
    def backward(self, dx: Tensor | None, dz: Tensor, x: Tensor | None, *θ: Tensor) -> tuple[Tensor | None, ...]:
        """`dx`, which may be overwritten, with what flows back through z; and the gradients of θ."""


class MatrixDown(Down):
    """`z = x Aᵀ`, `A (k, in)`."""

    def forward(self, x: Tensor, *θ: Tensor) -> Tensor:
        return torch.mm(x, θ[0].t())

    def backward(self, dx: Tensor | None, dz: Tensor, x: Tensor | None, *θ: Tensor) -> tuple[Tensor | None, ...]:
        assert x is not None
        return (None if dx is None else add_product(dx, dz, θ[0], True)), torch.mm(dz.t(), x)


MATRIX = MatrixDown()


class _ThinLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, Bt: Tensor, down: Down, *θ: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, z = _thin_linear(flat, W, bias, Bt, down, *θ)
        ctx.save_for_backward(flat if down.needs_x else None, W, z, Bt, *θ)
        ctx.down, ctx.shape = down, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, z, Bt, *θ = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, W.shape[0])
        dz = torch.mm(dy, Bt.t())
        dx = torch.mm(dy, W) if ctx.needs_input_grad[0] else None
        dx, *dθ = ctx.down.backward(dx, dz, x, *θ)
        return (None if dx is None else dx.view(ctx.shape)), None, None, torch.mm(z.t(), dy), None, *dθ


def _thin_linear(x: Tensor, W: Tensor, bias: Tensor | None, Bt: Tensor, down: Down, *θ: Tensor) -> tuple[Tensor, Tensor]:
    z = down.forward(x, *θ)
    return add_product(F.linear(x, W, bias), z, Bt, True), z


def thin_linear(x: Tensor, W: Tensor, bias: Tensor | None, Bt: Tensor, down: Down, *θ: Tensor) -> Tensor:
    """`x Wᵀ + b + down(x) Bt` for a frozen `W (out, in)`, `Bt (k, out)`."""
    if not torch.is_grad_enabled():
        return _thin_linear(x.reshape(-1, x.shape[-1]), W, bias, Bt, down, *θ)[0].view(*x.shape[:-1], -1)
    return _ThinLinear.apply(x, W, bias, Bt, down, *θ)


class Rule(ABC):
    """A map `W -> W'` of full rank with parameters θ, and the way back."""

    @abstractmethod
    def build(self, W: Tensor, *θ: Tensor) -> Tensor:
        """`W' (out, in)`, in the dtype of W."""

    @abstractmethod
    def rebuild(self, W: Tensor, *θ: Tensor) -> Tensor:
        """`build` once more, in backward, by calls that say so (`Op.again`)."""

    @abstractmethod
    def pull(self, G: Tensor, W: Tensor, *θ: Tensor) -> tuple[Tensor, ...]:
        """The gradients of θ from `G = dL/dW'`, which may be overwritten."""


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, rule: Rule, *θ: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, W, *θ)
        ctx.rule, ctx.shape = rule, x.shape
        return F.linear(flat, rule.build(W, *θ), bias).view(*x.shape[:-1], -1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, *θ = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, W.shape[0])
        dx = torch.mm(dy, ctx.rule.rebuild(W, *θ)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *ctx.rule.pull(torch.mm(dy.t(), x), W, *θ)


def dense_linear(x: Tensor, W: Tensor, bias: Tensor | None, rule: Rule, *θ: Tensor) -> Tensor:
    """`x W'ᵀ + b` for a frozen `W (out, in)`; W' is built, used and dropped, in forward and again in backward."""
    if not torch.is_grad_enabled():
        return F.linear(x, rule.build(W, *θ), bias)
    return _DenseLinear.apply(x, W, bias, rule, *θ)
