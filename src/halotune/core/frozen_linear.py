"""A frozen linear layer with an adapter of low rank on it, in one autograd node.

Used where the base is a plain matrix (`Operator.plain`). Additions happen in place, in forward on the base's output and in
backward on the gradient of its input, so neither is read or written once more than without an adapter.

The small product z is an output of the node as well, which nobody uses: what backward computes is then differentiable in all
that was kept, and second derivatives need no code of their own (operations that autograd records run as plain torch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.product import add_product, add_unfolded, flattened, gradients_of, no_view, transposed_products

Make = Callable[..., tuple[Tensor, Tensor | None]]


def _linear(x: Tensor, W: Tensor, bias: Tensor | None, Q: Tensor | None, A: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + b + z Q` and z."""
    y = F.linear(x, W, bias)
    sums, z = add_product(flattened(y), flattened(x), A, Q, True)
    if torch.compiler.is_compiling() or sums.data_ptr() != y.data_ptr():  # not written to in place
        y = sums.view(y.shape)
    return y, z


class _LowRankLinear(torch.autograd.Function):
    """θ is `Q (r, out)` and `A (r, in)`, None for a fold; with `make`, what those are made of, here and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, make: Make | None, *θ: Tensor | None
    ) -> tuple[Tensor, ...]:
        Q, A = θ if make is None else make(*θ)
        y, z = _linear(x, W, bias, Q, A)
        ctx.save_for_backward(None if A is None else x, W, z, *θ)
        ctx.make, ctx.shape = make, x.shape
        ctx.set_materialize_grads(False)
        return no_view(y), z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, z, *θ = ctx.saved_tensors
        grad, dz_more = gradients_of(grad_outputs)
        made = None
        if ctx.make is not None:
            if not torch.is_grad_enabled():
                θ = [t.detach().requires_grad_() for t in θ]
            with torch.enable_grad():
                made = ctx.make(*θ)
        Q, A = made or θ
        dy = z.new_zeros(z.shape[0], W.shape[0]) if grad is None else flattened(grad)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx, dz = add_product(torch.mm(dy, W), dy, Q, A, True)
        if dz is None and A is not None:
            dz = torch.mm(dy, Q.t())
        if dz_more is not None:
            if dx is not None:
                dx = add_unfolded(dx, dz_more, False) if A is None else torch.addmm(dx, dz_more, A)
            dz = None if dz is None else dz + dz_more
        if not any(ctx.needs_input_grad[4:]):
            dθ = [None] * len(θ)
        elif A is None:
            dθ = torch.mm(z.t(), dy), None
        else:
            dθ = transposed_products(z, dy, dz, flattened(x))
        if made is not None and dθ[0] is not None:
            dθ = torch.autograd.grad(made, θ, dθ, create_graph=torch.is_grad_enabled())
        return (None if dx is None else dx.view(ctx.shape)), None, None, None, *dθ


def low_rank_linear(x: Tensor, W: Tensor, bias: Tensor | None, *θ: Tensor | None, make: Make | None = None) -> Tensor:
    """`x Wᵀ + b + (x Aᵀ) Q`.

    Args:
        θ: `Q (r, out)`, and `A (r, in)` or None, which folds x.
        make: Q and A from another θ. They are dropped, and made again in backward.
    """
    if make is not None and torch.compiler.is_compiling():  # a compiler decides itself what to keep
        θ, make = make(*θ), None
    if torch.is_grad_enabled():
        return _LowRankLinear.apply(x, W, bias, make, *θ)[0]  # type: ignore[index]
    Q, A = θ if make is None else make(*θ)
    return _linear(x, W, bias, Q, A)[0]
