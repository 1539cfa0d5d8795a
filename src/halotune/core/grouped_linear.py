"""Low-rank deltas on a stack of experts, each in one autograd node: `s B_e (A_e x_i)` for rows x sorted by expert.

A is `(experts, r, in)`, B `(experts, out, r)`; a constant A may be `(r, in)` for all. Both may be parameters in fp32 as they
are. Inputs are all that is kept, but for `z = s A x`, which is made again where a second derivative is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.grouped import grouped_product
from ..ops.grouped_low_rank import add_grouped_low_rank, grouped_outer_pair, low_rank_rows
from ..ops.product import apply


def _gradients(ctx: Any, dy: Tensor, b: Tensor | None, inplace: bool, *saved: Tensor) -> tuple[Tensor | None, ...]:
    """`b_i + s A_eᵀ B_eᵀ dy_i`, where that is needed, and the gradients of A and B."""
    x, A, B, ends, z = saved
    scale, whole, again = ctx.scale, ctx.whole, torch.is_grad_enabled()
    need_x, need_A, need_B, *_ = ctx.needs_input_grad
    if again:
        z = low_rank_rows(x, A, ends, scale, whole)
    if need_x:
        dx, dz = add_grouped_low_rank(dy, B.mT, A.mT, b, ends, scale, whole, inplace and not again)
    else:
        dx, dz = None, low_rank_rows(dy, B.mT, ends, scale, whole)
    if not (need_A or need_B):
        return dx, None, None
    dB, dA = grouped_outer_pair(dy, z, dz, x if need_A else x[:, :0], ends, B.dtype)
    return dx, (dA if need_A else None), (dB if need_B else None)


def _rows(t: Tensor) -> Tensor:
    """As kernels read them; the gradient of a sum is no such thing."""
    return t if t.stride(-1) == 1 else t.contiguous()


class _AddLowRank(torch.autograd.Function):
    """`y_i + s B_e A_e x_i`. None for y is x itself, whose gradient is then made in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, y: Tensor | None, ends: Tensor, scale: float, whole: bool) -> Tensor:
        out, z = add_grouped_low_rank(x, A, B, x if y is None else y, ends, scale, whole, False)
        ctx.save_for_backward(x, A, B, ends, z)
        ctx.scale, ctx.whole, ctx.to_itself = scale, whole, y is None
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = _rows(grad_outputs[0])
        gradients = _gradients(ctx, dy, dy if ctx.to_itself else None, False, *ctx.saved_tensors)
        return *gradients, (None if ctx.to_itself else dy), None, None, None


class _LowRankLinear(torch.autograd.Function):
    """`W_e x_i + s B_e A_e x_i` for a frozen W. Nothing is held twice of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
        y, z = add_grouped_low_rank(x, A, B, grouped_product(x, W.mT, ends, whole), ends, scale, whole, True)
        ctx.save_for_backward(x, A, B, ends, z, W)
        ctx.scale, ctx.whole = scale, whole
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dy = _rows(grad_outputs[0])
        *saved, W = ctx.saved_tensors
        dx = grouped_product(dy, W, saved[3], ctx.whole) if ctx.needs_input_grad[0] else None
        return *_gradients(ctx, dy, dx, True, *saved), None, None, None, None


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
    """`y (n, out)`, which may be x itself, and the delta of `x (n, in)`: a new tensor."""
    return apply(_AddLowRank, _rows(x), A, B, None if y is x else _rows(y), ends, scale, whole)


def low_rank_linear(x: Tensor, A: Tensor, B: Tensor, W: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
    """`x (n, in)` with a frozen `W (experts, out, in)` and the delta on it -> `(n, out)`."""
    return apply(_LowRankLinear, _rows(x), A, B, W, ends, scale, whole)
