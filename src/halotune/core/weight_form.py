"""An operator applied with another weight W', of which nothing of the size of W is kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.product import apply, linear_backward, no_view
from ..ops.rounding import Dither
from .prepared import Preparation, Tensors, compute_dtype, is_transformed

if TYPE_CHECKING:
    from .adapter import Adapter
    from .operator import Operator


class Defined(Preparation):
    """The definition as a function of θ; without a W, of W and θ."""

    def __init__(self, adapter: Adapter, W: Tensor | None) -> None:
        self.adapter, self.W = adapter, W

    def make(self, *stacked: Tensor) -> Tensors:
        return (self.adapter.adapt(*stacked) if self.W is None else self.adapter.adapt(self.W, *stacked),)


class Scaled:
    """An adapter's map, scaled: `W + s (W' − W)`."""

    def __init__(self, adapter: Adapter, s: float) -> None:
        self.adapter, self.s = adapter, s

    def adapt(self, W: Tensor, *θ: Tensor) -> Tensor:
        return torch.lerp(W, self.adapter.adapt(W, *θ), self.s)

    def build(self, W: Tensor, *θ: Tensor, noise: Tensor | None = None, again: bool = False) -> Tensor:
        return self.adapt(W, *θ)

    def pull(self, G: Tensor, W: Tensor, *θ: Tensor) -> Sequence[Tensor | None]:
        return self.adapter.pull(G * self.s, W, *θ)


class _WeightForm(torch.autograd.Function):
    """`y = W' x (+ b)`. Backward builds W' again, forms `G = dyᵀ x` and pulls it back to θ (and W)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, bias: Tensor | None, given: Any, noise: Tensor | None, *θ: Tensor
    ) -> Tensor:
        op, W, adapter = given  # without an operator: a plain matrix; the adapter may be `Scaled`
        ctx.save_for_backward(x, kept, noise, *θ)
        ctx.op, ctx.adapter = op, adapter
        adapted = adapter.build(W, *θ, noise=noise)
        return no_view(F.linear(x, adapted, bias) if op is None else op.bare.contract(x, adapted))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, noise, *θ = ctx.saved_tensors
        need_x, need_W, *_ = ctx.needs_input_grad
        if W is None:
            W = ctx.op.weight().to(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative is recorded
            adapted = ctx.adapter.adapt(W, *θ)
        else:
            adapted = ctx.adapter.build(W, *θ, noise=noise, again=True)
        backward = linear_backward if ctx.op is None else ctx.op.bare.contract_backward
        dx, G = backward(x, adapted, grad_outputs[0], need_x)
        dW = None
        if need_W:
            dW, *dθ = Defined(ctx.adapter, None).pull((W, *θ), (G,))
        else:
            dθ = ctx.adapter.pull(G, W, *θ)
        return dx, dW, None, None, None, *dθ


def weight_form(
    x: Tensor, op: Operator, adapter: Adapter, θ: Tensors, scale: float = 1.0, dither: Dither | None = None
) -> Tensor:
    """`op` applied to `x` with `W + scale (W' − W)`.

    Args:
        dither: by what W' is rounded stochastically; None rounds to nearest.
    """
    mapping, bare = adapter if scale == 1.0 else Scaled(adapter, scale), op.bare
    x = x.to(compute_dtype(x))
    W = op.weight().to(x)  # the device too: it may be offloaded
    if torch.compiler.is_compiling() or bare.hooked or is_transformed():
        return bare.with_weight(x, mapping.adapt(W, *θ))
    x = bare.pad(x)
    kept = None if op.transient and not W.requires_grad else W  # what is made for a call is made again, not kept
    noise = None if dither is None else dither.noise(0, W)
    return bare.add_bias(_WeightForm.apply(x, kept, None, (op, W, mapping), noise, *θ))  # type: ignore[arg-type]


def weight_form_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, adapter: Adapter, *θ: Tensor, dither: Dither | None = None
) -> Tensor:
    """`x W'ᵀ + b` for a frozen matrix W. W' is built, used and dropped, in forward and again in backward."""
    noise = None if dither is None else dither.noise(0, W)
    if not torch.is_grad_enabled():
        return F.linear(x, adapter.build(W, *θ, noise=noise), bias)
    return apply(_WeightForm, x, W, bias, (None, W, adapter), noise, *θ)
