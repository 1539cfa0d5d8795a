"""Low-rank deltas on a stack of experts, each in one autograd node: `s B_e (A_e x_i)` for rows x sorted by expert.

A is `(experts, r, in)`, B `(experts, out, r)`; a constant A may be `(r, in)` for all. Both may be parameters in fp32 as they
are. Inputs are all that is kept, but for `z = s A x`, which is made again where a second derivative is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.grouped_low_rank import add_grouped_low_rank, grouped_low_rank_linear, grouped_outer_pair, low_rank_rows
from ..ops.product import apply


def _gradients(ctx: Any, dy: Tensor, pull: Callable[..., tuple[Tensor, Tensor]], *saved: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, where that is needed, of A and of B.

    Args:
        pull: from `dy, Bᵀ, Aᵀ, ends, s, whole` what the gradient of x is, and `dz = s Bᵀ dy`.
    """
    x, A, B, ends, z = saved
    scale, whole = ctx.scale, ctx.whole
    need_x, need_A, need_B, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        z = low_rank_rows(x, A, ends, scale, whole)
    dx, dz = pull(dy, B.mT, A.mT, ends, scale, whole) if need_x else (None, low_rank_rows(dy, B.mT, ends, scale, whole))
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
        dy, to_itself = _rows(grad_outputs[0]), ctx.to_itself

        def pull(dy: Tensor, B: Tensor, A: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
            return add_grouped_low_rank(dy, B, A, dy if to_itself else None, *how, False)

        return *_gradients(ctx, dy, pull, *ctx.saved_tensors), (None if to_itself else dy), None, None, None


class _LowRankLinear(torch.autograd.Function):
    """`W_e x_i + s B_e A_e x_i` for a frozen W. Nothing is held twice of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
        y, z = grouped_low_rank_linear(x, W, A, B, ends, scale, whole)
        ctx.save_for_backward(x, A, B, ends, z, W)
        ctx.scale, ctx.whole = scale, whole
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *saved, W = ctx.saved_tensors

        def pull(dy: Tensor, B: Tensor, A: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
            return grouped_low_rank_linear(dy, W.mT, B, A, *how)

        return *_gradients(ctx, _rows(grad_outputs[0]), pull, *saved), None, None, None, None


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
    """`y (n, out)`, which may be x itself, and the delta of `x (n, in)`: a new tensor."""
    return apply(_AddLowRank, _rows(x), A, B, None if y is x else _rows(y), ends, scale, whole)


def low_rank_linear(x: Tensor, A: Tensor, B: Tensor, W: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
    """`x (n, in)` with a frozen `W (experts, out, in)` and the delta on it -> `(n, out)`."""
    return apply(_LowRankLinear, _rows(x), A, B, W, ends, scale, whole)
