"""Triton kernels of HRA. The reference is `ops._rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _subtract_product(
    x_ptr, z_ptr, v_ptr, y_ptr, n, d, stride_x, stride_z, stride_v,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of `y = x − z V`: x read once, y written once."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)  # r, filled up to what a matrix unit takes
    z = tl.load(z_ptr + rows[:, None] * stride_z + ranks[None], (rows[:, None] < n) & (ranks[None] < R), other=0.0)
    n_ = tl.load(v_ptr + ranks[:, None] * stride_v + cols[None], (ranks[:, None] < R) & (cols[None] < d), other=0.0)
    inside = (rows[:, None] < n) & (cols[None] < d)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + cols[None], inside, other=0.0)
    y = x.to(tl.float32) + tl.dot(z, n_, input_precision="ieee")
    tl.store(y_ptr + rows[:, None].to(tl.int64) * d + cols[None], y.to(x.dtype), inside)


def rotation(x: Tensor, Û: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """`x − (x Û) V` and `z = x Û`: the thin product by the library, the subtraction in one pass."""
    z = x @ Û
    n, d = x.shape
    r = V.shape[0]
    V = V if V.stride(1) == 1 else V.contiguous()
    y = torch.empty(n, d, dtype=x.dtype, device=x.device)
    rows, cols = 64, 128
    _subtract_product[(triton.cdiv(n, rows), triton.cdiv(d, cols))](
        x, z, V, y, n, d, x.stride(0), z.stride(0), V.stride(0),
        R=r, RANK=max(16, triton.next_power_of_2(r)), ROWS=rows, COLS=cols, num_warps=4,
    )  # fmt: skip
    return y, z


def refuses(x: Tensor, Û: Tensor, V: Tensor) -> str | None:
    """Why the kernel cannot run, or None."""
    if x.stride(-1) != 1:
        return f"the last dimension of x has stride {x.stride(-1)}, not 1"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no matrix product for {x.dtype}"
    if V.shape[0] > 256:
        return f"r = {V.shape[0]} is above 256"
    return None
