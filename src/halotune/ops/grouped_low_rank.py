"""Low-rank products of rows with the factors of the groups that they belong to.

Rows are sorted by group, as in `grouped.py`. Factors are A `(groups, r, k)` and B `(groups, m, r)`, or one of them without the
first dimension where all groups share it. They may be finer than the rows: they are rounded where they are used, so that
parameters in fp32 serve as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import Kernel, Op
from .grouped import MOST_GROUPS, grouped_outer, product_of_each
from .product import MOST

COLUMNS = 512  # of what is added in place: made at once
ROWS = 128  # of a group on average, from which on our product is faster than torch's and an addition to it


def low_rank_rows(x: Tensor, A: Tensor, ends: Tensor, scale: float, whole: bool) -> Tensor:
    """`z_i = s A_e x_i`: `x (n, k)` -> `(n, r)`."""
    return product_of_each(x, (A if scale == 1.0 else A * scale).mT, ends, whole)


def _add_low_rank(
    x: Tensor, A: Tensor, B: Tensor, b: Tensor | None, ends: Tensor, scale: float, whole: bool, inplace: bool
) -> tuple[Tensor, Tensor]:
    z = low_rank_rows(x, A, ends, scale, whole)
    if b is None or not inplace:
        y = product_of_each(z, B.mT, ends, whole)
        return (y if b is None else b + y), z
    step = COLUMNS if b.is_cuda else max(1, b.shape[1])  # so that nothing of the size of b is made
    for begin in range(0, b.shape[1], step):
        part = slice(begin, begin + step)
        b[:, part] += product_of_each(z, B[..., part, :].mT, ends, whole)
    return b, z


def _linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, ends: Tensor, scale: float, whole: bool) -> tuple[Tensor, Tensor]:
    y = product_of_each(x, W.mT, ends, whole)
    return add_grouped_low_rank(x, A, B, y, ends, scale, whole, not torch.is_grad_enabled())


def _outer_pair(d: Tensor, z: Tensor, w: Tensor, x: Tensor, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dB = grouped_outer(d, z, ends).to(dtype)
    dA = grouped_outer(w, x, ends).to(dtype) if x.shape[1] else dB.new_empty(ends.shape[0], z.shape[1], 0)
    return dB, dA


def _refusal(r: int, rows: tuple[Tensor | None, ...], factors: tuple[Tensor, ...] = ()) -> str | None:
    if r > MOST:
        return f"r = {r} is above {MOST}: the product is no longer of low rank"
    dtype = next(t.dtype for t in rows if t is not None)
    for t in rows:
        if t is not None and t.dtype is not dtype:
            return f"the rows differ in dtype: {dtype}, {t.dtype}"
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"the last dimension of rows {tuple(t.shape)} has stride {t.stride(-1)}, not 1"
    for t in factors:
        if t.dtype not in (dtype, torch.float32):
            return f"a factor must have the dtype of the rows ({dtype}) or torch.float32; got {t.dtype}"
    return None


def _wins(x: Tensor, *_: object) -> bool:
    return x.is_cuda and x.numel() > 0


def _linear_refusal(x: Tensor, W: Tensor, A: Tensor, B: Tensor, *_: object) -> str | None:
    if W.dtype is not x.dtype:
        return f"the rows and the weight differ in dtype: {x.dtype}, {W.dtype}"
    if W.shape[0] > MOST_GROUPS:
        return f"there are more than {MOST_GROUPS} groups: {W.shape[0]}"
    return _refusal(A.shape[-2], (x,), (A, B))


def _linear_wins(x: Tensor, W: Tensor, *_: object) -> bool:
    """Where groups fill their tiles, on GPUs of the kind that these were chosen on; elsewhere torch's product fits better."""
    known = x.is_cuda and x.dtype is torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == 9
    return known and x.shape[0] >= ROWS * W.shape[0] and {W.stride(-1), W.stride(-2)} >= {1}


_KERNELS = "halotune.ops.grouped_kernels"

# `z_i = s A_e x_i` and `b_i + B_e z_i`: x `(n, k)`, b `(n, m)` or None for zeros; the sum in b itself, or new. Returns both. Of
# the rows past the last end z is zero, and b stays as it is.
add_grouped_low_rank = Op(
    "add_grouped_low_rank",
    _add_low_rank,
    like=lambda x, A, B, b, *_: (x.new_empty(x.shape[0], B.shape[-2]), x.new_empty(x.shape[0], A.shape[-2])),
    kernel=Kernel(
        _KERNELS, "add_grouped_low_rank", lambda x, A, B, b, *_: _refusal(A.shape[-2], (x, b), (A, B)), lambda x, *_: _wins(x)
    ),
)

# `z_i = s A_e x_i` and `y_i = W_e x_i + B_e z_i`: x `(n, k)`, W `(groups, m, k)`. Returns y and z, zero past the last end.
grouped_low_rank_linear = Op(
    "grouped_low_rank_linear",
    _linear,
    like=lambda x, W, A, *_: (x.new_empty(x.shape[0], W.shape[-2]), x.new_empty(x.shape[0], A.shape[-2])),
    kernel=Kernel("halotune.ops.grouped_linear_kernels", "grouped_low_rank_linear", _linear_refusal, _linear_wins),
)

# `Σ_i d_i z_iᵀ (groups, m, r)` and `Σ_i w_i x_iᵀ (groups, r, k)` over the rows of each group: d `(n, m)`, x `(n, k)`, z and w
# `(n, r)`; without columns of x the first alone. Summed in fp32 and rounded once, to a dtype.
grouped_outer_pair = Op(
    "grouped_outer_pair",
    _outer_pair,
    like=lambda d, z, w, x, ends, dtype: (
        d.new_empty(ends.shape[0], d.shape[1], z.shape[1], dtype=dtype),
        d.new_empty(ends.shape[0], w.shape[1], x.shape[1], dtype=dtype),
    ),
    kernel=Kernel(
        _KERNELS, "grouped_outer_pair", lambda d, z, w, x, *_: _refusal(z.shape[-1], (d, z, w, x)), lambda d, *_: _wins(d)
    ),
)
