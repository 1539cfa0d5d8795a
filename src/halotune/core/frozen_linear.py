"""A frozen linear layer with an adapter of low rank on it, in one autograd node.

Used where the base is a plain matrix (`Operator.plain`). Additions happen in place, in forward on the base's output and in
backward on the gradient of its input, so neither is read or written once more than without an adapter.

The small product z is an output of the node as well, which nobody uses: what backward computes is then differentiable in all
that was kept, and second derivatives need no code of their own (operations that autograd records run as plain torch).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.product import add_product, add_unfolded, apply, flattened, gradients_of, no_view, transposed_products


def _linear(x: Tensor, W: Tensor, bias: Tensor | None, Q: Tensor, A: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + b + z Q` and z."""
    y = F.linear(x, W, bias)
    sums, z = add_product(flattened(y), flattened(x), A, Q, True)
    if torch.compiler.is_compiling() or sums.data_ptr() != y.data_ptr():  # not written to in place
        y = sums.view_as(y)
    return y, z


class _LowRankLinear(torch.autograd.Function):
    """With `Q (r, out)` and `A (r, in)`, or None for a fold: then x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, Q: Tensor, A: Tensor | None) -> tuple[Tensor, Tensor]:
        y, z = _linear(x, W, bias, Q, A)
        ctx.save_for_backward(None if A is None else x, W, z, Q, A)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return no_view(y), z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, z, Q, A = ctx.saved_tensors
        grad, dz_more = gradients_of(grad_outputs)
        dy = z.new_zeros(z.shape[0], W.shape[0]) if grad is None else flattened(grad)
        dx = dz = dQ = dA = None
        if ctx.needs_input_grad[0]:
            dx, dz = add_product(torch.mm(dy, W), dy, Q, A, True)
        if dz is None and A is not None:
            dz = torch.mm(dy, Q.t())
        if dz_more is not None:
            if dx is not None:
                dx = add_unfolded(dx, dz_more, False) if A is None else torch.addmm(dx, dz_more, A)
            dz = None if dz is None else dz + dz_more
        if any(ctx.needs_input_grad[3:]):
            dQ, dA = (torch.mm(z.t(), dy), None) if A is None else transposed_products(z, dy, dz, flattened(x))
        return (None if dx is None else dx.view(*ctx.shape)), None, None, dQ, dA


def low_rank_linear(x: Tensor, W: Tensor, bias: Tensor | None, Q: Tensor, A: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b + (x Aᵀ) Q` for a frozen W; `Q (r, out)`, and `A (r, in)` or None, which folds x."""
    if torch.is_grad_enabled():
        return apply(_LowRankLinear, x, W, bias, Q, A)[0]
    return _linear(x, W, bias, Q, A)[0]
