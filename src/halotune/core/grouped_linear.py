"""A frozen stack of experts with a low-rank delta on each, in one autograd node that holds nothing twice of the size of x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.grouped import grouped_outer, grouped_product

COLUMNS = 512  # of a sum that are made at once


def add_grouped_(y: Tensor, z: Tensor, Q: Tensor, ends: Tensor, whole: bool) -> Tensor:
    """`y_i += z_i Q_e` in place, some columns at a time: `y (n, m)`, `z (n, r)`, `Q (experts, r, m)`."""
    step = COLUMNS if y.is_cuda else y.shape[1]
    for begin in range(0, y.shape[1], max(1, step)):
        part = slice(begin, begin + step)
        y[:, part] += grouped_product(z, Q[..., part], ends, whole)
    return y


class _GroupedLowRank(torch.autograd.Function):
    """`y_i = W_e x_i + B_e (A_e x_i)` for a frozen W. Inputs are all that is kept, but for z = A x, made again where a second
    derivative is recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, Bt: Tensor, A: Tensor, ends: Tensor, whole: bool) -> Tensor:
        z = grouped_product(x, A.mT, ends, whole)
        ctx.save_for_backward(x, W, Bt, A, ends, z)
        ctx.whole = whole
        return add_grouped_(grouped_product(x, W.mT, ends, whole), z, Bt, ends, whole)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, W, Bt, A, ends, z = ctx.saved_tensors
        dy, whole, again = grad_outputs[0], ctx.whole, torch.is_grad_enabled()
        if again:
            z = grouped_product(x, A.mT, ends, whole)
        dz = grouped_product(dy, Bt.mT, ends, whole)
        dBt = grouped_outer(z, dy, ends) if ctx.needs_input_grad[2] else None
        dA = grouped_outer(dz, x, ends) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_product(dy, W, ends, whole)
            dx = dx + grouped_product(dz, A, ends, whole) if again else add_grouped_(dx, dz, A, ends, whole)
        return dx, None, dBt, dA, None, None


def grouped_low_rank(x: Tensor, W: Tensor, Bt: Tensor, A: Tensor, ends: Tensor, whole: bool) -> Tensor:
    """`x (n, in)` sorted by expert, a frozen W `(experts, out, in)`, Bᵀ `(…, r, out)`, A `(…, r, in)` -> `(n, out)`."""
    return _GroupedLowRank.apply(x, W, Bt, A, ends, whole)  # type: ignore[return-value]
