"""Frozen linear layers with adapters on them, in one autograd node.

Used where base layers are plain matrices (`Base.plain`). Additions happen in place, in forward on the base's output and in
backward on the gradient of its input, so neither is read or written once more than without an adapter. Layers that are
given the same input (q, k and v; gate and up) are siblings: they share one node, and one layer is a family of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.product import grams, thin


class Site(NamedTuple):
    """A frozen layer `x Wᵀ + b`, and what was derived for the adapter on it."""

    W: Tensor
    bias: Tensor | None
    derived: tuple[Tensor, ...]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, at no price where nobody asks for a second derivative."""
    guarded = once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (guarded if wanted else backward)(ctx, *grads)

    return run


def flattened(x: Tensor) -> Tensor:
    """`(…, k) -> (n, k)`."""
    return x.reshape(-1, x.shape[-1])


def chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Pieces of `size` values."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def add_input_gradient(dx: Tensor | None, dy: Tensor, W: Tensor) -> Tensor:
    """`dx + dy W`, in the place of dx where there is one."""
    return torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)


Make = Callable[..., tuple[Tensor, Tensor | None]]


class _ThinLinears(torch.autograd.Function):
    """For each sibling W, b and θ: `Q (r, out)` and `A (r, in)`, or None for a fold; with `make`, what those are made of,
    here and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Make | None, siblings: int, *flat: Tensor | None) -> tuple[Tensor, ...]:
        rows, size = flattened(x), x.shape[:-1]
        ys, saved, needs_x = [], [], False
        for W, bias, *θ in chunks(flat, len(flat) // siblings):
            Q, A = θ if make is None else make(*θ)
            y, z = thin(F.linear(rows, W, bias), rows, A, Q, True)
            ys.append(y.view(*size, -1))
            saved += [W, z, *θ]
            needs_x = needs_x or A is not None
        ctx.save_for_backward(rows if needs_x else None, *saved)
        ctx.make, ctx.siblings, ctx.shape = make, siblings, x.shape
        return tuple(ys)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *saved = ctx.saved_tensors
        dx, dθ = None, []
        for grad, (W, z, *θ) in zip(grad_outputs, chunks(saved, len(saved) // ctx.siblings), strict=True):
            made = None
            if ctx.make is not None:
                θ = [t.detach().requires_grad_() for t in θ]
                with torch.enable_grad():
                    made = ctx.make(*θ)
            Q, A = made or θ
            dy = flattened(grad)
            dz = None
            if ctx.needs_input_grad[0]:
                dx, dz = thin(add_input_gradient(dx, dy, W), dy, Q, A, True)
            if A is None:
                dQ, dA = torch.mm(z.t(), dy), None
            else:
                dQ, dA = grams(z, dy, torch.mm(dy, Q.t()) if dz is None else dz, x)
            dθ += [None, None, *((dQ, dA) if made is None else torch.autograd.grad(made, θ, (dQ, dA)))]
        return (None if dx is None else dx.view(ctx.shape)), None, None, *dθ


def thin_linears(x: Tensor, siblings: int, *flat: Tensor | None, make: Make | None = None) -> tuple[Tensor, ...]:
    """`x Wᵀ + b + (x Aᵀ) Q` of siblings.

    Args:
        flat: for each W, b and θ: `Q (r, out)`, and `A (r, in)` or None, which folds x.
        make: Q and A from another θ. They are dropped, and made again in backward.
    """
    if make is not None and torch.compiler.is_compiling():  # a compiler decides itself what to keep
        pieces = chunks(flat, len(flat) // siblings)
        return thin_linears(x, siblings, *(t for W, bias, *θ in pieces for t in (W, bias, *make(*θ))))
    if torch.is_grad_enabled():
        return _ThinLinears.apply(x, make, siblings, *flat)  # type: ignore[return-value]
    rows, size, ys = flattened(x), x.shape[:-1], []
    for W, bias, *θ in chunks(flat, len(flat) // siblings):
        Q, A = θ if make is None else make(*θ)
        ys.append(thin(F.linear(rows, W, bias), rows, A, Q, True)[0].view(*size, -1))
    return tuple(ys)


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


class _DenseLinears(torch.autograd.Function):
    """For each sibling W, b and θ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, siblings: int, *flat: Tensor | None) -> tuple[Tensor, ...]:
        rows, size = flattened(x), x.shape[:-1]
        pieces = chunks(flat, len(flat) // siblings)
        ctx.save_for_backward(rows, *(t for W, _, *θ in pieces for t in (W, *θ)))
        ctx.rule, ctx.siblings, ctx.shape = rule, siblings, x.shape
        return tuple([F.linear(rows, rule.build(W, *θ), bias).view(*size, -1) for W, bias, *θ in pieces])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *saved = ctx.saved_tensors
        dx, dθ = None, []
        for grad, (W, *θ) in zip(grad_outputs, chunks(saved, len(saved) // ctx.siblings), strict=True):
            dy = flattened(grad)
            if ctx.needs_input_grad[0]:
                dx = add_input_gradient(dx, dy, ctx.rule.rebuild(W, *θ))
            dθ += [None, None, *ctx.rule.pull(torch.mm(dy.t(), x), W, *θ)]
        return (None if dx is None else dx.view(ctx.shape)), None, None, *dθ


def dense_linears(x: Tensor, rule: Rule, siblings: int, *flat: Tensor | None) -> tuple[Tensor, ...]:
    """`x W'ᵀ + b` of siblings: for each W, b and θ. W' is built, used and dropped, in forward and again in backward."""
    if torch.is_grad_enabled():
        return _DenseLinears.apply(x, rule, siblings, *flat)  # type: ignore[return-value]
    return tuple([F.linear(x, rule.build(W, *θ), bias) for W, bias, *θ in chunks(flat, len(flat) // siblings)])
