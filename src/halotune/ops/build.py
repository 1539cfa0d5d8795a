"""Building `W' = W + B A` of many layers in one pass over their weights."""

from __future__ import annotations

from torch import Tensor

from .dispatch import Op, triton_kernel
from .rounding import round_stochastically


def _build_low_rank(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return W + B @ A
    return round_stochastically(W.float() + B.float() @ A.float(), noise, W.dtype)


def _refuses(W: Tensor, B: Tensor, A: Tensor, noise: Tensor | None) -> str | None:
    if len({t.dtype for t in (W, B, A)}) > 1:
        return f"the tensors differ in dtype: W is {W.dtype}, the factors are {B.dtype}, {A.dtype}"
    if not W.is_contiguous():
        return "W must be contiguous"
    if A.shape[-2] > 128:
        return f"r = {A.shape[-2]} is above 128: the factors' tiles no longer fit on the chip"
    return None


def _wins(W: Tensor, *_: object) -> bool:
    return W.is_cuda and W.dtype.itemsize == 2


# W `(…, out, in)`, B `(…, out, r)`, A `(…, r, in)` or `(r, in)` for all; noise `(…, out + in)` or None: rounded to nearest.
build_low_rank = Op(
    "build_low_rank",
    _build_low_rank,
    like=lambda W, *_: W.new_empty(W.shape),
    kernels=[triton_kernel("halotune.ops.kernels", "build_low_rank", _refuses, _wins)],
)
