"""Building `W' = W + B A` of many layers in one pass over their weights.

B and A may be finer than W: each is then taken as a sum of two numbers of the dtype of W, so that what nearly cancels between
columns, as pairs of reflections do, is not lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import Kernel, Op, is_half_on_gpu
from .rounding import rounded


def wide_product(W: Tensor, X: Tensor) -> Tensor:
    """`W X (…, out, r)` in the dtype of X, which may be finer than that of `W (…, out, in)`."""
    if X.dtype is W.dtype:
        return W @ X
    if not W.is_cuda:
        return W.to(X.dtype) @ X
    high = X.to(W.dtype)
    low = (X - high).to(W.dtype)  # high + low is X to twice the digits
    both = torch.bmm(W.reshape(-1, *W.shape[-2:]), torch.cat([high, low], -1).reshape(-1, X.shape[-2], 2 * X.shape[-1]),
                     out_dtype=X.dtype)  # fmt: skip
    high, low = both.chunk(2, -1)
    return (high + low).view(*W.shape[:-1], X.shape[-1])


def _build_low_rank(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> Tensor:
    return rounded(lambda W, B, A: (W + B @ A).to(W.dtype), noise, W, B, A)


def _refuses(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> str | None:
    if B.dtype is not A.dtype or B.dtype not in (W.dtype, torch.float32):
        return f"B and A must have one dtype, that of W ({W.dtype}) or torch.float32; got {B.dtype}, {A.dtype}"
    if not W.is_contiguous():
        return "W must be contiguous"
    if A.shape[-2] > 128:
        return f"r = {A.shape[-2]} is above 128: the factors' tiles no longer fit on the chip"
    return None


# W `(…, out, in)`, B `(…, out, r)`, A `(…, r, in)` or `(r, in)` for all; noise `(…, out + in)` or None: rounded to nearest.
build_low_rank = Op(
    "build_low_rank",
    _build_low_rank,
    like=lambda W, *_: W.new_empty(W.shape),
    kernel=Kernel("halotune.ops.kernels", "build_low_rank", _refuses, is_half_on_gpu),
)
